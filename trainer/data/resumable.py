"""A pass over a loader of the caller's, which can be taken up again in the middle.

A loader can be set to a position if it, or the iterator that it makes, has ``get_state()`` and
``set_state(state)``, as those of Grain and datarax, or ``state_dict()`` and ``load_state_dict(state)``,
as that of torchdata. The batches of any other are drawn again and dropped.
"""

import dataclasses
import warnings
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from typing import Any, NamedTuple, Self

from trainer.data.loaders import check_drawn, no_batch, open_loader, warn_of_unseen
from trainer.data.position_codec import decode, encode
from trainer.errors import ArgumentError, CheckpointError
from trainer.types import Batch

BOUND = "TrainingConfig.steps_per_epoch"
"""The setting that bounds a pass, for messages. A loop of your own has ``limit`` of `trainer.open_pass` for it."""


class _Protocol(NamedTuple):
    get: str
    set: str


_STATE = _Protocol("get_state", "set_state")
_STATE_DICT = _Protocol("state_dict", "load_state_dict")


@dataclasses.dataclass(frozen=True)
class LoaderPosition:
    """Where a loader was, in plain values.

    Attributes:
        state: What the loader said of its position, encoded; None if it could not say anything.
        drawn: How many batches of the pass had been drawn there. Those finished since are drawn
            again. 0 at the end of a pass means the pass before.
        over: Whether it is the end of a pass.
        exhausted: Whether the pass ended because the loader did, and not at ``steps_per_epoch``.
        loader: The type of what said it.
    """

    state: bytes | None = None
    drawn: int = 0
    over: bool = False
    exhausted: bool = False
    loader: str = ""

    @classmethod
    def from_dict(cls, plain: Any) -> Self:
        """Makes it again from what `dataclasses.asdict` returned.

        Raises:
            ValueError: It is no such thing.
        """
        if not isinstance(plain, dict) or plain.keys() != {field.name for field in dataclasses.fields(cls)}:
            raise ValueError("`loader` is no position of a loader")
        kinds = {"state": (bytes, type(None)), "drawn": (int,), "over": (bool,), "exhausted": (bool,), "loader": (str,)}
        for name, allowed in kinds.items():
            if type(plain[name]) not in allowed:
                raise ValueError(f"`loader/{name}` is of type {type(plain[name]).__name__}")
        if plain["drawn"] < 0:
            raise ValueError(f"`loader/drawn` is {plain['drawn']}, not a count")
        if plain["state"] is not None:
            decode(plain["state"])
        return cls(**plain)


class LoaderPass:
    """One pass over a loader: an iterator of at most ``limit`` batches that can say where it is.

    Nothing is asked of the loader before `open`, which leaves room for what a callback does to it
    when an epoch begins.

    Args:
        loader: As for `trainer.data.open_loader`.
        batch_size: What to call it with.
        name: What to call the loader in an error.
        limit: Where to stop, None for the end of the loader.
        previous: The pass before this one, if there was one in this process.

    Attributes:
        drawn: How many batches were drawn, those before an interruption included.
        over: Whether there are no more.
    """

    def __init__(
        self, loader: Any, batch_size: int, name: str, limit: int | None, previous: "LoaderPass | None" = None
    ) -> None:
        self._loader, self._batch_size, self._name, self._limit = loader, batch_size, name, limit
        self._is_factory = callable(loader) and not isinstance(loader, Iterable)
        self._iterator: Iterator[Batch] = iter(())
        self._teller: tuple[Any, _Protocol] | None = None
        # An error is raised when a checkpoint is taken, which is perhaps never.
        self._known: LoaderPosition | CheckpointError = LoaderPosition()
        self.drawn = 0
        self.over: bool = False
        self._exhausted = False
        # The end of a pass, from a checkpoint, that the loader has not been set to yet.
        self._awaited: LoaderPosition | None = None if previous is None else previous._awaited
        self._is_first = previous is None
        if self._awaited is not None:
            self._known = dataclasses.replace(self._awaited, drawn=0)
        elif previous is not None and previous.over:
            try:
                self._known = dataclasses.replace(previous.position(0), drawn=0)
            except CheckpointError as error:
                self._known = error

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self.over:
            raise StopIteration
        if self._limit is not None and self.drawn >= self._limit:
            self.over = True
            raise StopIteration
        try:
            batch = next(self._iterator)
        except StopIteration:
            if self.drawn == 0:
                raise no_batch(self._name) from None
            self.over = self._exhausted = True
            raise
        check_drawn(batch, self.drawn, self._loader, self._name, self._limit, BOUND)
        self.drawn += 1
        return batch

    def open(self, position: LoaderPosition | None = None, finished: int = 0) -> None:
        """Opens the loader, such that the next batch is the one after those finished.

        Args:
            position: Where it was at or before that batch, None to start a pass.
            finished: How many batches of this pass are finished.

        Raises:
            CheckpointError: The loader refuses the position, or has too few batches.
            ArgumentError: It is an iterator that cannot be set to a position.
        """
        if position is not None and position.over and position.drawn:
            # This pass is over. Only the next one asks anything of the loader, if there is one.
            self._awaited = self._known = position
            self.drawn, self.over = finished, True
            return
        if position is None and self._awaited is not None:
            position = dataclasses.replace(self._awaited, drawn=0)
        at_start = position is None or (position.state is None and not finished)
        self._iterator = self._opened(position or LoaderPosition(), finished)
        self.drawn = finished
        self._awaited = None
        if position is not None:
            self._known = position
        if at_start:
            try:
                self._known = self._asked(LoaderPosition())
            except CheckpointError as error:
                self._known = error

    def position(self, finished: int) -> LoaderPosition:
        """Says where the loader is, for `open` in another process.

        The latest batch drawn may be unfinished: then it is a position of before, and the batches
        between are drawn again. If you prefetch, call this before prefetching.

        Args:
            finished: How many batches of this pass are finished.

        Raises:
            CheckpointError: The loader fails to say it, or says it in objects that no checkpoint holds.
        """
        if self._awaited is not None:
            pass  # the loader is not there yet
        elif self.over:
            end = LoaderPosition(drawn=self.drawn, over=True, exhausted=self._exhausted)
            # A callable is called again, and what it returns then starts where it likes.
            self._known = end if self._is_factory else self._asked(end)
        elif self._teller is not None and 0 < finished == self.drawn:
            self._known = self._asked(LoaderPosition(drawn=finished))
        if isinstance(self._known, CheckpointError):
            raise self._known
        return self._known

    def _opened(self, position: LoaderPosition, finished: int) -> Iterator[Batch]:
        iterator = self._iterate(position)
        is_one_shot = iterator is self._loader and self._teller is None
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
        loader = open_loader(self._loader, self._batch_size, self._name)
        if self._is_first:  # said once, and not in every epoch
            self._is_first = False
            warn_of_unseen(self._loader, loader, self._name, self._limit)
        # Iterating is an event for a loader of torchdata, which draws seeds then: only once, and set before.
        iterator = None if _speaks(loader, _STATE_DICT) else iter(loader)
        tellers = ((loader, _STATE_DICT), (iterator, _STATE), (loader, _STATE), (iterator, _STATE_DICT))
        self._teller = next((teller for teller in tellers if _speaks(*teller)), None)
        if position.state is not None:
            self._set(position, loader)
            if self._teller is not None and self._teller[0] is not iterator:
                iterator = None
        return iter(loader) if iterator is None else iterator

    def _set(self, position: LoaderPosition, loader: Any) -> None:
        assert position.state is not None
        if self._teller is None:
            raise CheckpointError(
                f"the checkpoint holds the position of a {position.loader}, which `{self._name}` of type "
                f"{type(loader).__name__} cannot take: it has neither set_state(state) nor load_state_dict(state)."
            )
        teller, protocol = self._teller
        try:
            getattr(teller, protocol.set)(decode(position.state))
        except Exception as error:
            raise CheckpointError(
                f"`{self._name}` refuses the position of a {position.loader} in the checkpoint: "
                f"{type(teller).__name__}.{protocol.set} raised {error!r}. Pass the loader of the interrupted run."
            ) from error

    def _next_pass(self, iterator: Iterator[Batch], exhausted: bool) -> Iterator[Batch]:
        """Goes from the end of a pass to the next, as the interrupted process would have done."""
        if exhausted:
            # Some loaders begin the next pass by themselves when they are set to the end of one.
            for first in iterator:
                return chain([first], iterator)
        return self._iterate(LoaderPosition())

    def _drop(self, iterator: Iterator[Batch], count: int, position: LoaderPosition) -> None:
        if count and position.state is None:
            warnings.warn(
                f"`{self._name}` cannot be set to a position (it has neither set_state(state) nor "
                f"load_state_dict(state)), so the {count} batches that were finished in this epoch are drawn again and "
                f"dropped; the run goes on as it would have only if they come in the same order.",
                stacklevel=6,  # where train_epoch() is called
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

    def _asked(self, position: LoaderPosition) -> LoaderPosition:
        if self._teller is None:
            return position
        teller, protocol = self._teller
        name = type(teller).__name__
        try:
            state = getattr(teller, protocol.get)()
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


def _speaks(teller: Any, protocol: _Protocol) -> bool:
    return all(callable(getattr(teller, name, None)) for name in protocol)
