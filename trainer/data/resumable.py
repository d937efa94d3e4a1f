"""One pass over a loader, with a position from which another process can resume the pass.

A loader can restore its position if it, or its iterator, has ``get_state()`` and ``set_state(state)``
(Grain, datarax), or ``state_dict()`` and ``load_state_dict(state)`` (torchdata). For any other loader, finished batches
are drawn again and dropped.
"""

import collections
import contextlib
import copy
import dataclasses
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, NamedTuple, Self

from trainer.data.loaders import (
    add_position,
    check_drawn,
    check_seen,
    check_seen_again,
    digest_of,
    end_finished_epochs,
    finish_pass,
    is_factory,
    keeps_order,
    no_batch,
    open_loader,
)
from trainer.data.position_codec import decode, encode
from trainer.errors import ArgumentError, CheckpointError, warn
from trainer.types import Batch

BOUND = "TrainingConfig.steps_per_epoch"
"""The setting that bounds a pass, for messages. In a custom loop it is ``limit`` of `trainer.open_pass`."""


class _Protocol(NamedTuple):
    get: str
    set: str


_STATE = _Protocol("get_state", "set_state")
_STATE_DICT = _Protocol("state_dict", "load_state_dict")


@dataclasses.dataclass(frozen=True)
class LoaderPosition:
    """The position of a loader, as plain values.

    Attributes:
        state: The loader's state, encoded; None if it reports none.
        drawn: The number of batches of the pass drawn before the position. Later batches are drawn again. At the end
            of a pass, 0 means that it is the previous pass.
        over: Whether the position is the end of a pass.
        exhausted: Whether the pass ended because the loader did, rather than at ``steps_per_epoch``.
        loader: The type of the object whose state it is.
    """

    state: bytes | None = None
    drawn: int = 0
    over: bool = False
    exhausted: bool = False
    loader: str = ""

    @classmethod
    def from_dict(cls, plain: Any) -> Self:
        """Returns a position from its `dataclasses.asdict`.

        Raises:
            ValueError: ``plain`` does not describe a position.
        """
        if not isinstance(plain, dict) or plain.keys() != {field.name for field in dataclasses.fields(cls)}:
            raise ValueError("`loader` is not the position of a loader")
        kinds = {"state": (bytes, type(None)), "drawn": (int,), "over": (bool,), "exhausted": (bool,), "loader": (str,)}
        for name, allowed in kinds.items():
            if type(plain[name]) not in allowed:
                raise ValueError(f"`loader/{name}` is of type {type(plain[name]).__name__}")
        if plain["drawn"] < 0:
            raise ValueError(f"`loader/drawn` is {plain['drawn']}, not a count")
        if plain["state"] is not None:
            decode(plain["state"])
        return cls(**plain)


@contextlib.contextmanager
def left_in_place(loader: Any, name: str) -> Iterator[None]:
    """Leaves a loader where it was, after batches were drawn for something other than training.

    An object that reports its position is set to it again. A callable makes other iterators, and an iterable without a
    position starts over. An iterator without one is used up as far as it was drawn: this causes a warning.
    """
    protocol = next((protocol for protocol in (_STATE_DICT, _STATE) if _supports(loader, protocol)), None)
    if protocol is None and isinstance(loader, Iterator):
        warn(
            f"`{name}` is an iterator of type {type(loader).__name__}, which cannot be taken back: batches that are "
            f"drawn from it now are not trained on later. Pass a callable that makes one, or an iterable."
        )
    before = None if protocol is None else copy.deepcopy(getattr(loader, protocol.get)())
    try:
        yield
    finally:
        if protocol is not None:
            getattr(loader, protocol.set)(before)


class LoaderPass:
    """One pass over a loader: an iterator of at most ``limit`` batches that reports its position.

    The loader is not used before `open`, so a callback may change it at the start of an epoch.

    Args:
        loader: As for `trainer.data.open_loader`.
        batch_size: As for `trainer.data.open_loader`.
        name: The loader's name in errors.
        limit: The maximum number of batches in the pass, None for all.
        previous: The previous pass in this process, if any.
        epoch: As for `trainer.data.open_loader`.
        passes: The number of passes over the loader before this one, also those of an interrupted process.

    Attributes:
        drawn: The number of batches drawn, including those before an interruption.
        over: Whether the pass has ended.
    """

    def __init__(
        self,
        loader: Any,
        batch_size: int,
        name: str,
        limit: int | None,
        previous: "LoaderPass | None" = None,
        epoch: int = 0,
        passes: int = 0,
    ) -> None:
        self._loader, self._batch_size, self._name, self._limit = loader, batch_size, name, limit
        self._epoch, self._passes = epoch, passes
        self._is_factory = is_factory(loader)
        self._iterator: Iterator[Batch] = iter(())
        self._stateful: tuple[Any, _Protocol] | None = None
        # An error is stored, and raised only if a checkpoint needs the position; most runs never do.
        self._latest: LoaderPosition | CheckpointError = LoaderPosition()
        self.drawn = 0
        self.over: bool = False
        self._exhausted = False
        # Positions after each prefetched batch, by the number of batches drawn.
        self._remembered: collections.deque[tuple[int, LoaderPosition | CheckpointError]] | None = None
        # An end of a pass from a checkpoint, to be restored when the next pass opens.
        self._to_restore: LoaderPosition | None = None if previous is None else previous._to_restore
        self._is_first = previous is None
        # Whether it is unknown that batches are never seen, and what tells: the first batch, and the pass before.
        self._compares: bool = previous is not None and previous._compares and previous._loader is loader
        self._first: bytes | None = None
        self._before = previous if self._compares else None
        self._begins_again = False
        # In a resumed run the first batches of its passes, while it is unknown whether all begin with the same.
        self._resumed: list[bytes | None] | None = None
        if previous is not None and previous._loader is loader:
            self._resumed = previous._resumed
        if self._to_restore is not None:
            self._latest = dataclasses.replace(self._to_restore, drawn=0)
        elif previous is not None and previous.over:
            try:
                self._latest = dataclasses.replace(previous.position(0), drawn=0)
            except CheckpointError as error:
                self._latest = error

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self.over:
            raise StopIteration
        if self._limit is not None and self.drawn >= self._limit:
            if self._begins_again:
                self._begins_again = False
                check_seen_again(self._loader, self._iterator, self._name, self._limit, self._first)
            finish_pass(self._iterator)
            self.over = self._remembered is None
            raise StopIteration
        try:
            batch = next(self._iterator)
        except StopIteration:
            if self.drawn == 0:
                raise no_batch(self._name) from None
            self._exhausted, self.over = True, self._remembered is None
            raise
        except Exception as error:
            add_position(error, self._name, self.drawn)
            raise
        check_drawn(batch, self.drawn, self._loader, self._name, self._limit, f"set `{BOUND}`")
        self.drawn += 1
        if self._compares and self.drawn == 1:
            self._compare(batch)
        if self._resumed is not None and self.drawn == 1:
            self._check_order(batch)
        if self._remembered is not None and self._stateful is not None:
            try:
                position: LoaderPosition | CheckpointError = self._with_state(LoaderPosition(drawn=self.drawn))
            except CheckpointError as error:
                position = error
            self._remembered.append((self.drawn, position))
        return batch

    def is_over(self, loader: Any) -> bool:
        """Returns whether it is a pass over this very loader."""
        return self._loader is loader

    def remember(self, count: int) -> None:
        """Keeps the positions after the last ``count`` batches, for a caller that draws ahead of training.

        The caller must then call `end` at the end of the pass.
        """
        self._remembered = collections.deque(maxlen=count)

    def end(self) -> None:
        """Ends a pass whose batches were drawn ahead, once the last is trained."""
        self.over = True

    def open(self, position: LoaderPosition | None = None, finished: int = 0) -> None:
        """Opens the loader at the batch after the finished ones.

        Args:
            position: A position at or before that batch; None to start a pass.
            finished: The number of finished batches in this pass.

        Raises:
            CheckpointError: The loader rejects the position, or has too few batches.
            ArgumentError: The loader is an iterator whose position cannot be set.
        """
        if position is not None and position.over and position.drawn:
            # This pass is over. The next one, if any, restores the loader.
            self._to_restore = self._latest = position
            self.drawn, self.over = finished, True
            return
        if position is None and self._to_restore is not None:
            position = dataclasses.replace(self._to_restore, drawn=0)
        at_start = position is None or (position.state is None and not finished)
        if position is not None and position.state is None:
            end_finished_epochs(self._loader, self._passes)
        self._iterator = self._opened(position or LoaderPosition(), finished)
        self.drawn = finished
        if position is not None and not finished and self._stateful is None:
            self._resumed = None if keeps_order(self._loader, self._name) else []
        self._to_restore = None
        if position is not None:
            self._latest = position
        if at_start:
            try:
                self._latest = self._with_state(LoaderPosition())
            except CheckpointError as error:
                self._latest = error

    def position(self, finished: int) -> LoaderPosition:
        """Returns the position of the loader, for `open` in another process.

        If the latest drawn batch is not finished, and positions are not remembered (`remember`), the position is an
        earlier one, and the batches since are drawn again.

        Args:
            finished: The number of finished batches in this pass.

        Raises:
            CheckpointError: The loader fails to report its state, or the state holds objects that cannot be saved.
        """
        if self._to_restore is not None:
            pass  # not yet restored in the loader
        elif self.over:
            end = LoaderPosition(drawn=self.drawn, over=True, exhausted=self._exhausted)
            # A callable is called again for the next pass, so this pass's state is of no use.
            self._latest = end if self._is_factory else self._with_state(end)
        elif self._remembered is not None:
            self._latest = dict(self._remembered.copy()).get(finished, self._latest)
        elif self._stateful is not None and 0 < finished == self.drawn:
            self._latest = self._with_state(LoaderPosition(drawn=finished))
        if isinstance(self._latest, CheckpointError):
            raise self._latest
        return self._latest

    def _opened(self, position: LoaderPosition, finished: int) -> Iterator[Batch]:
        iterator = self._iterate(position)
        is_one_shot = iterator is self._loader and self._stateful is None
        if is_one_shot and (finished or position.over):
            raise ArgumentError(
                f"`{self._name}` is an iterator of type {type(iterator).__name__}, which cannot be taken back to where "
                f"the interrupted run was. Pass a callable that makes one, something that can be iterated over again, "
                f"or an iterator with get_state() and set_state(state)."
            )
        if position.over and position.state is not None:
            iterator = self._next_pass(iterator, position.exhausted)
        self._drop(iterator, finished - position.drawn, position)
        return iterator

    def _iterate(self, position: LoaderPosition) -> Iterator[Batch]:
        loader = open_loader(self._loader, self._batch_size, self._name, epoch=self._epoch)
        if self._is_first:  # warn once, not in every epoch
            self._is_first = False
            self._compares = check_seen(self._loader, loader, self._name, self._limit)
        # A torchdata loader draws seeds in __iter__: call it only once, after restoring the state.
        iterator = None if _supports(loader, _STATE_DICT) else iter(loader)
        candidates = ((loader, _STATE_DICT), (iterator, _STATE), (loader, _STATE), (iterator, _STATE_DICT))
        self._stateful = next((stateful for stateful in candidates if _supports(*stateful)), None)
        if position.state is not None:
            self._set(position, loader)
            if self._stateful is not None and self._stateful[0] is not iterator:
                iterator = None
        return iter(loader) if iterator is None else iterator

    def _compare(self, batch: Batch) -> None:
        """Compares the first batch of the first two passes that this process begins.

        If they are equal, `check_seen_again` draws one more batch at the end of this pass. Before, it could take that
        batch from the pass: two iterators of a loader may share one file, or one counter.
        """
        before, self._before, self._first = self._before, None, digest_of(batch)
        if before is None or before._first is None:
            return
        self._compares = False
        is_same = before.over and not before._exhausted and self._first == before._first
        self._begins_again = is_same and self._stateful is None and before._iterator is not self._iterator

    def _check_order(self, batch: Batch) -> None:
        """Warns if the first two passes of a resumed run begin with other batches, as those of one that shuffles."""
        assert self._resumed is not None
        self._resumed.append(digest_of(batch))
        if len(self._resumed) < 2:
            return
        first, second = self._resumed
        self._resumed = None
        if None not in (first, second) and first != second:
            warn(
                f"`{self._name}` begins every pass with another batch and cannot be set to a position (it has neither "
                f"set_state(state) nor load_state_dict(state)), and the run was resumed: its order is that of the run "
                f"without the interruption only if it depends on the epoch alone. Pass a callable that takes `epoch`, "
                f"and shuffles by it."
            )

    def _set(self, position: LoaderPosition, loader: Any) -> None:
        assert position.state is not None
        if self._stateful is None:
            raise CheckpointError(
                f"the checkpoint holds the position of a {position.loader}, which `{self._name}` of type "
                f"{type(loader).__name__} cannot take: it has neither set_state(state) nor load_state_dict(state)."
            )
        stateful, protocol = self._stateful
        try:
            getattr(stateful, protocol.set)(decode(position.state))
        except Exception as error:
            raise CheckpointError(
                f"`{self._name}` refuses the position of a {position.loader} in the checkpoint: "
                f"{type(stateful).__name__}.{protocol.set} raised {error!r}. Pass the loader of the interrupted run."
            ) from error

    def _next_pass(self, iterator: Iterator[Batch], exhausted: bool) -> Iterator[Batch]:
        """Advances from the end of a pass to the next, as the interrupted process would have."""
        if exhausted:
            # Some loaders start the next pass by themselves when restored to the end of one.
            for first in iterator:
                return chain([first], iterator)
        return self._iterate(LoaderPosition())

    def _drop(self, iterator: Iterator[Batch], count: int, position: LoaderPosition) -> None:
        if count and position.state is None:
            warn(
                f"`{self._name}` cannot be set to a position (it has neither set_state(state) nor "
                f"load_state_dict(state)), so the {count} batches that were finished in this epoch are drawn again and "
                f"dropped; the run is the same as without the interruption only if they come in the same order."
            )
        if count < 0:
            raise CheckpointError(
                "the checkpoint holds a position of the loader behind the batches that were finished."
            )
        dropped = sum(1 for _ in islice(iterator, count))
        if dropped < count:
            raise CheckpointError(
                f"`{self._name}` yielded {dropped} batches where {count} were finished in the interrupted epoch; "
                f"pass the loader of the interrupted run."
            )

    def _with_state(self, position: LoaderPosition) -> LoaderPosition:
        if self._stateful is None:
            return position
        stateful, protocol = self._stateful
        name = type(stateful).__name__
        try:
            state = getattr(stateful, protocol.get)()
        except Exception as error:
            raise CheckpointError(
                f"the position of `{self._name}` cannot be saved: {name}.{protocol.get} raised {error!r}."
            ) from error
        try:
            return dataclasses.replace(position, state=encode(state), loader=name)
        except (TypeError, ValueError, OverflowError, RecursionError) as error:
            raise CheckpointError(
                f"the position of `{self._name}` cannot be saved: {name}.{protocol.get} returned {error}, which no "
                f"checkpoint holds; a position consists of numbers, strings, bytes, arrays, lists, tuples and mappings."
            ) from error


def _supports(stateful: Any, protocol: _Protocol) -> bool:
    return all(callable(getattr(stateful, name, None)) for name in protocol)
