"""Loaders of several processes: their lengths are compared before a pass, and their batches during it."""

import contextlib
from collections.abc import Iterator, Mapping, Sized
from typing import Any

from trainer.batches import checked_batch
from trainer.data.loaders import is_factory
from trainer.data.memory import Epoch
from trainer.distributed.agreement import gathered, who_holds_what
from trainer.distributed.passes import CommonPass
from trainer.errors import DistributedError
from trainer.sharding.placement import Placement, next_batch_from
from trainer.types import Batch


def length_of(loader: Any, limit: int | None = None) -> int | None:
    """Returns the number of batches in a pass over a loader, at most ``limit``; None if it is unknown."""
    length: int | None = None
    if isinstance(loader, Sized) and not is_factory(loader):
        # An iterable-style torch loader has no length after all.
        with contextlib.suppress(TypeError, NotImplementedError):
            length = len(loader)
    return length if length is None or limit is None else min(length, limit)


def length_to_compare(loader: Any, placement: Placement, limit: int | None = None) -> int | None:
    """Returns `length_of` for `check_lengths`, where several processes compare it; else None, without calling it.

    A length may be slow, or raise; it is then unknown, since one process must not raise where the others wait for it.
    """
    if placement.num_processes > 1:
        with contextlib.suppress(Exception):
            return length_of(loader, limit)
    return None


def check_lengths(lengths: Mapping[str, int | None]) -> None:
    """Checks that the loaders of all processes have equally many batches, as far as their lengths are known.

    Args:
        lengths: The result of `length_to_compare` for each loader, by its name.

    Raises:
        DistributedError: In all processes, naming the lengths.
    """
    everyone = gathered(dict(lengths), name="lengths of loaders")
    for name in lengths:
        known = {process: str(held[name]) for process, held in enumerate(everyone) if held.get(name) is not None}
        if known and (found := who_holds_what(known)):
            raise DistributedError(
                f"The number of batches in `{name}` is {found}, and all processes make every step together. Give each "
                f"equally many batches, or set `steps_per_epoch` and `validation_steps` of `TrainingConfig`."
            )


def common_batches(
    batches: Iterator[Batch], placement: Placement, name: str, *, first: int = 0, may_be_short: bool = True
) -> Iterator[Batch]:
    """Returns the batches of a pass, placed, after comparing them with those of the other processes.

    Data in memory, and the batches of a single process, are returned as they are.

    Args:
        batches: The batches, drawn ahead or not.
        placement: Where to place them.
        name: Names the pass, for messages.
        first: The number of the first batch, for messages.
        may_be_short: Whether the first batch may be a short last one.

    Raises:
        DistributedError: See `CommonPass`.
    """
    if placement.num_processes == 1 or isinstance(batches, Epoch):
        return batches
    return _compared(batches, placement, name, first, may_be_short)


@contextlib.contextmanager
def common_pass(batches: Iterator[Batch], placement: Placement, name: str, **options: Any) -> Iterator[Iterator[Batch]]:
    """A context with the `common_batches` of a pass. At its end no process waits in the pass for this one."""
    common = common_batches(batches, placement, name, **options)
    try:
        yield common
    finally:
        if common is not batches:
            common.close()  # type: ignore[attr-defined]


def _compared(
    batches: Iterator[Batch], placement: Placement, name: str, first: int, may_be_short: bool
) -> Iterator[Batch]:
    with CommonPass(name, placement.own_examples, first=first) as common:
        while (taken := next_batch_from(placement, batches, may_be_short=may_be_short)) is not None:
            common.draw(*taken)
            yield taken[0]
            may_be_short = True
        common.end()


def compare_single(passes: dict[str, CommonPass], placement: Placement, caller: str, batch: Batch) -> None:
    """Compares the batch of a single step, which all processes call, with those of the other processes.

    Args:
        passes: The comparison of each caller so far.
        placement: Where the batch is placed.
        caller: The name of the method, for messages.
        batch: The batch, placed.

    Raises:
        DistributedError: See `CommonPass`.
    """
    if placement.num_processes == 1:
        return
    examples = checked_batch(batch)[1] or 1
    if caller not in passes:
        passes[caller] = CommonPass(f"calls of {caller}", placement.own_examples)
    try:
        passes[caller].draw(batch, examples)
    except BaseException:  # Ctrl-C may come in the middle of an exchange, which cannot be resumed
        passes.pop(caller).leave()
        raise


def leave_single(passes: dict[str, CommonPass]) -> None:
    """Ends what `compare_single` began; the next single step begins anew."""
    while passes:
        passes.popitem()[1].leave()
