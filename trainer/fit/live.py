"""`Live`: what a call to ``train`` or ``train_epoch`` changes; and `Planned`, its length."""

import dataclasses
import math
import weakref
from collections.abc import Callable
from typing import Any, Self

import jax

from trainer.distributed.passes import CommonPass
from trainer.metrics.throughput import Meter, Throughput
from trainer.run import Run


@dataclasses.dataclass(frozen=True)
class Planned:
    """The planned length of a call to ``train``, or of a sequence of calls to ``train_epoch``.

    Attributes:
        first_step: The updates finished when it began.
        num_steps: The total steps; None if unknown.
        steps_per_epoch: The steps of an epoch; None if unknown.
        first_epoch: The epochs finished when it began; 0 for calls to ``train_epoch``.
        num_epochs: The total epochs. None for calls to ``train_epoch`` if the configuration leaves ``num_epochs`` at
            its default: the caller decides when to stop.
    """

    first_step: int
    num_steps: int | None
    steps_per_epoch: int | None
    first_epoch: int
    num_epochs: int | None

    @property
    def last_epoch(self) -> int | None:
        """The epochs finished at its end; None if unknown."""
        return None if self.num_epochs is None else self.first_epoch + self.num_epochs

    @property
    def last_step(self) -> int | None:
        """The updates finished at its end; None if unknown."""
        return None if self.num_steps is None else self.first_step + self.num_steps


@dataclasses.dataclass(frozen=True)
class End:
    """What a call left: its last step, and weak references to the params and the model state, which others may free."""

    step: int
    leaves: tuple[weakref.ref[Any], ...]

    @classmethod
    def of(cls, run: Run) -> Self:
        """Returns the end of a call that left this run."""
        return cls(run.step, tuple(map(weakref.ref, _evaluated_leaves(run))))

    def is_still(self, run: Run) -> bool:
        """Returns whether a run has that step, and the very same params and model state."""
        if self.step != run.step:
            return False
        now = _evaluated_leaves(run.with_edits())
        return len(now) == len(self.leaves) and all(
            leaf is known() for leaf, known in zip(now, self.leaves, strict=True)
        )


@dataclasses.dataclass
class Live:
    """The mutable record of the current call, or else of the latest. It is never saved.

    Attributes:
        trainer: The trainer passed to events; a weak reference, since the trainer holds this object.
        is_running: Whether a call to ``train`` or ``train_epoch`` is in progress.
        validates: Whether the call has validation data.
        planned: The planned length of the call; None before the first.
        meter: Measures the throughput of the current or latest epoch.
        failure: What ended the call, as text, if it raised; empty otherwise.
        has_ended: Whether the call reached the end of a run: all epochs, or a stop requested by a callback.
        start_step: The step at which the call began or was resumed.
        idle_calls: How many calls in a row found a finished one to resume, after the first.
        unsaved_step: The step at which a call to ``train_epoch`` left its state to a later call to save; None if it is
            saved.
        throughput: The throughput of the latest epoch.
        figures_written: When the figures of epochs were last written, as `time.monotonic`.
        rate_asked: When the learning rate of an epoch was last computed, as `time.monotonic`.
        has_advised: Whether fusing was recommended.
        has_warned: Whether there was a warning that the loss is not finite.
        is_savable: Whether `Setup.check_savable` found that checkpoints can be saved.
        has_foreign_opt_state: Whether the trainer was made of a state whose ``opt_state`` does not fit its optimizer;
            see `check_opt_state`.
        passes: What compares the batches of single steps with those of other processes, by the name of the method.
        end: What the latest finished call left; None before the first, and after an exception outside of calls.
    """

    trainer: Callable[[], Any]
    is_running: bool = False
    validates: bool = False
    planned: Planned | None = None
    meter: Meter | None = None
    failure: str = ""
    has_ended: bool = False
    start_step: int = 0
    idle_calls: int = 0
    unsaved_step: int | None = None
    throughput: Throughput | None = None
    figures_written: float = 0.0
    rate_asked: float = -math.inf
    has_advised: bool = False
    has_warned: bool = False
    is_savable: bool = False
    has_foreign_opt_state: bool = False
    passes: dict[str, CommonPass] = dataclasses.field(default_factory=dict)
    end: End | None = None


def _evaluated_leaves(run: Run) -> list[Any]:
    # By number: the keys of a state are made anew whenever it is put together.
    state = jax.tree.unflatten(run.layout.treedef, range(len(run.leaves)))
    return [run.leaves[number] for number in jax.tree.leaves((state.params, state.model_state))]
