"""How a trainer reacts to steps that are not finite: it raises, or warns once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.core.nonfinite import check_finite
from trainer.errors import NonFiniteError, warn
from trainer.metrics.average import WeightedAverage

if TYPE_CHECKING:
    from trainer.api import Trainer


def hold_if_finite(trainer: Trainer) -> None:
    """With ``nonfinite="raise"``, waits for the device and raises `NonFiniteError` if a step was not finite.

    The trainer then holds the state from before that step, with no position in the data; later steps are dropped.
    """
    if trainer.setup.nonfinite != "raise":
        return
    run = trainer.run.with_edits()
    try:
        check_finite(run.peek())
    except NonFiniteError as error:
        history = run.history.copy()
        history.rewind(error.step - 1)
        state = trainer.setup.placement.adopt(error.state)
        run = run.with_state(state, step=error.step - 1).replace(
            history=history, logged_step=min(run.logged_step, error.step - 1), average=WeightedAverage(), metrics={}
        )
        trainer.hold(run)
        raise


def react_if_not_finite(trainer: Trainer, average: WeightedAverage) -> None:
    """Raises, or warns once, as soon as an average has read metrics that are not finite."""
    if average.skipped:
        hold_if_finite(trainer)
    found = average.not_finite
    if found is None or trainer.setup.live.has_warned:
        return
    trainer.setup.live.has_warned = True
    warn(
        f"the loss is {found[1]} at step {found[0]}, and training continues. A smaller learning rate or "
        f"`gradient_clip_norm` may help; `debug` = True finds where it begins, and "
        f"EarlyStopping ends a run whose monitor is not finite."
    )
