"""Resuming a run from a checkpoint, and loading a checkpoint: both are atomic."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import jax

from trainer.checkpoints.run_record import Restored
from trainer.data.resumable import LoaderPass, LoaderPosition
from trainer.errors import ArgumentTypeError, CheckpointError, warn
from trainer.fit.identity import check_same_call
from trainer.fit.live import Live
from trainer.fit.plan import FitPlan
from trainer.fit.setup import Setup
from trainer.run import FromLoader, InMemory, Run

if TYPE_CHECKING:
    from trainer.api import Trainer


def load(trainer: Trainer, path: str | os.PathLike[str]) -> None:
    """Restores a checkpoint; see `Trainer.load_checkpoint`."""
    setup = trainer.setup
    restored = setup.checkpointer.load(path, trainer.run)
    # A trainer without callbacks, used for evaluation, needs no callback states.
    if restored.callback_states is not None and setup.events.has_states:
        with put_back(trainer, trainer.run, copy.deepcopy(setup.events.state_dict())):
            setup.events.load_state_dict(restored.callback_states)
    # A run shares it again after each epoch. Here, callbacks of any process may have taken back what they asked for.
    if setup.events.has_shared_stop and not setup.live.is_running:
        setup.share_stop()
    own = trainer.run  # which keeps its identity, wherever the state is from
    run = restored.run.replace(
        id=own.id, position=None, validation=None, logged_step=0, average=own.average, arguments=None
    )
    if setup.live.is_running:
        # A callback rolls the state back: the run keeps its position in the data.
        run = run.replace(position=own.position, epoch=own.epoch, arguments=own.arguments)
    trainer.hold(run)
    setup.fanout.rewind_later(trainer.run.step)
    setup.fanout.log_text("checkpoint", f"loaded {path}", trainer.run.step)


def find(setup: Setup, run: Run, plan: FitPlan, resume: Any) -> Restored | None:
    """Returns the checkpoint to resume from; None to start the plan from the current run."""
    if not isinstance(resume, bool) and not (isinstance(resume, str | os.PathLike) and os.fspath(resume)):
        raise ArgumentTypeError(
            f"`resume` is {resume!r:.60} of type {type(resume).__name__}; it must be a bool, 'latest', or the path of "
            f"a checkpoint."
        )
    if resume is False:
        return None
    found = None if resume is True or resume == "latest" else setup.checkpointer.load(resume, run)
    if found is not None or setup.fast_dev_run:
        return None if setup.fast_dev_run else found  # a check begins and ends with itself
    here = run.position
    # This trainer has itself just finished the call or the epoch: `while trainer.epoch < n` must terminate.
    if plan.caller == "train" and here is not None and _has_just_trained(setup.live, run):
        return None
    if plan.caller == "train_epoch" and isinstance(here, FromLoader) and _is_over(here):
        return None
    return setup.checkpointer.load_latest(run)


def checked(setup: Setup, plan: FitPlan, restored: Restored) -> Run:
    """Returns the run in a checkpoint, after checking that it is the requested one."""
    run = restored.run
    if not isinstance(run.position, InMemory if plan.data is not None else FromLoader):
        what = "epoch" if plan.caller == "train_epoch" else "run"
        kinds = {InMemory: "data in memory", FromLoader: "a loader"}
        if run.position is not None:
            raise CheckpointError(
                f"`{restored.path}` was saved in a run over {kinds[type(run.position)]}, and {plan.caller}() is called "
                f"with {kinds[InMemory if plan.data is not None else FromLoader]}, so there is no {what} to resume; "
                f"pass the same kind of data, or load_checkpoint() and train on."
            )
        raise CheckpointError(
            f"`{restored.path}` was not saved during {plan.caller}(), so there is no {what} to resume; "
            f"load_checkpoint() and train on."
        )
    run.check_same_run(plan.position)
    check_same_call(run.arguments, plan.arguments, in_epoch=run.position.batch > 0)
    position, run = run.position, run.replace(arguments=plan.arguments)
    if isinstance(position, FromLoader):
        position = dataclasses.replace(position, loader=_own_position(setup, restored, position))
        run = run.replace(position=position)
    return setup.with_horizon(run, planned_end(position.first_step, plan))


def planned_end(first_step: int, plan: FitPlan) -> int | None:
    """Returns the last step of a run that began at ``first_step``; None if its length is unknown."""
    return None if plan.horizon is None else first_step + plan.horizon


@contextlib.contextmanager
def put_back(trainer: Trainer, run: Run, callback_states: list[Any]) -> Iterator[None]:
    """Restores the trainer's run and the callbacks' states if the block raises."""
    try:
        yield
    except BaseException:
        trainer.hold(run)
        with contextlib.suppress(CheckpointError):  # from a callback that rejects its own state
            trainer.setup.events.load_state_dict(callback_states)
        raise


def _own_position(setup: Setup, restored: Restored, position: FromLoader) -> Any:
    """Returns the position of this process's loader."""
    loaders = restored.loaders or [None]
    if len(loaders) != setup.placement.num_processes:
        raise CheckpointError(
            f"`{restored.path}` was saved by {len(loaders)} processes, each with a loader of its own, and there are "
            f"{setup.placement.num_processes}; start as many, or train(data), whose order does not depend on them."
        )
    if len(loaders) == 1:
        return position.loader
    try:
        return LoaderPosition.from_dict(loaders[jax.process_index()])
    except ValueError as error:
        raise CheckpointError(f"`{restored.path}` holds a position that cannot be understood: {error}.") from error


def _has_just_trained(live: Live, run: Run) -> bool:
    """Returns whether the latest call of this trainer has finished, and trained. Warns if it never trains again."""
    if not live.has_ended or live.failure:
        return False
    if run.step != live.start_step:
        live.idle_calls = 0
        return True
    live.idle_calls += 1
    if live.idle_calls == 2:
        warn(
            f"train(..., resume=True) finds a finished call at step {run.step} for the third time in a row, and trains "
            f"nothing: a loop until `trainer.epoch` has some value never ends. Train all epochs in one call, or leave "
            f"`resume` out to train more."
        )
    return False


def _is_over(position: FromLoader) -> bool:
    return position.batch == 0 and isinstance(position.loader, LoaderPass | LoaderPosition) and position.loader.over
