"""When a call saves: whether its end is that of the run, and what is saved there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from trainer.callbacks.base import flatten, runs_last
from trainer.fit.plan import FitPlan
from trainer.fit.running import save_if_finite
from trainer.fit.setup import Setup
from trainer.run import Run

if TYPE_CHECKING:
    from trainer.api import Trainer


def may_save(setup: Setup, plan: FitPlan, run: Run) -> bool:
    """Returns whether a call is going to save: at its end, at an interval that it reaches, or by a callback.

    With several processes, their horizons may differ, and a save that cannot be written fails in all of them.
    """
    if setup.placement.num_processes > 1:
        return False
    saves_itself = not setup.fast_dev_run and any(map(runs_last, flatten([setup.callbacks])))
    return setup.is_directory_given or plan.reaches_save(run.step, if_unknown=False) or saves_itself


def is_to_be_saved(setup: Setup, plan: FitPlan, run: Run) -> bool:
    """Returns whether to save so that no training is lost: at the end of a run whose latest step is in no checkpoint.

    A call to ``train_epoch`` may be the last one, so the first call also saves if there is no checkpoint yet.
    """
    saved = setup.checkpointer.saved_step(run)
    if not setup.is_directory_given or saved == run.step:
        return False
    return is_end(setup, plan, run) or saved is None


def leave(trainer: Trainer, plan: FitPlan) -> None:
    """Sees to it that an epoch of ``train_epoch`` is not lost if no other call follows.

    If the configuration leaves ``num_epochs`` at its default, every call may be the last, and few loops call `close`.
    So each call saves, but in the background and after its last event, so that it does not wait for the save: the next
    epoch runs beside it, and only a save that takes longer than an epoch delays the next one. Of a known number, the
    last call saves; a loop that ends before leaves the rest to `close`.
    """
    setup, run = trainer.setup, trainer.run
    if plan.caller != "train_epoch" or not setup.is_directory_given or setup.checkpointer.saved_step(run) == run.step:
        return
    if plan.planned.num_epochs is None:
        save_end(trainer, background=True)
    else:
        setup.live.unsaved_step = run.step


def save_end(trainer: Trainer, *, background: bool = False) -> None:
    """Saves the run at the end of an epoch, or starts to."""
    run = trainer.run
    trainer.hold(trainer.setup.with_known_position(run))
    try:
        if background:
            trainer.save_checkpoint(background="if_finite")
        else:
            save_if_finite(trainer)
    finally:
        trainer.hold(run)


def is_end(setup: Setup, plan: FitPlan, run: Run) -> bool:
    """Returns whether the end of a call is the end of the run, by its length or because a callback stopped it."""
    return plan.ends_run(setup.config, run.epoch) or setup.events.should_stop
