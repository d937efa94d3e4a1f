"""The first and last event of a run, with signals and saves in between, so that every run shuts down cleanly."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.distributed.signals import Signals
from trainer.errors import ArgumentError, TrainingInterrupted

if TYPE_CHECKING:
    from trainer.api import Trainer
    from trainer.fit.setup import Setup
    from trainer.run import Run


def check_not_running(trainer: Trainer, caller: str) -> None:
    """Raises `ArgumentError` if a callback, an extension or a logger trains the trainer that it was called by."""
    if trainer.setup.live.is_running:
        raise ArgumentError(
            f"{caller}() was called while this trainer is training, and would replace the position of that run; call "
            f"train_step(batch) for single steps, or train another Trainer."
        )


def check_opt_state(setup: Setup, run: Run) -> None:
    """Raises `ArgumentError` if the trainer was made of a state whose ``opt_state`` is that of another optimizer.

    Evaluation and prediction do not need it. So this is called by what makes a step, before anything has happened.
    """
    if setup.live.has_foreign_opt_state:
        state = run.peek()
        setup.whole_optimizer.fitted(state.opt_state, state.params)
        setup.live.has_foreign_opt_state = False  # the caller has assigned another since


@contextlib.contextmanager
def running(trainer: Trainer) -> Iterator[Signals]:
    """Emits the first and last event of a run, even if it fails in between, and handles signals."""
    setup = trainer.setup
    signals = Signals(together=setup.placement.num_processes > 1)
    with signals if setup.handle_signals else contextlib.nullcontext():
        setup.live.is_running = True
        try:
            setup.events.emit("on_train_begin", trainer)
            yield signals
            setup.finish_saves()
            # A signal after the last step must not be lost: it asks the process to end.
            signals.check()
        except BaseException as error:
            is_interrupt = isinstance(error, KeyboardInterrupt | TrainingInterrupted)
            setup.live.failure = "interrupted" if is_interrupt else f"failed ({type(error).__name__})"
            with contextlib.suppress(Exception):  # log the metrics of finished steps if possible
                setup.fanout.flush()
            try:
                _finish_saves(trainer, signals, error)
            finally:  # also if a second signal interrupts the save
                told = _noted(error, _end(trainer))
            if told is not error:
                raise told from error
            # XLA replaces an exception raised in a host callback of the objective with its own.
            if signals.second_signal and isinstance(error, Exception):
                raise signals.exception() from error
            raise
        finally:
            setup.live.is_running = False
        failures = _end(trainer)
        # All processes wait for each other here, so this must come before anything is raised.
        if signals.wait_for_all():
            late = _noted(signals.exception(), failures)
            _finish_saves(trainer, signals, late)
            raise late
        ordinary = [failure for failure in failures if isinstance(failure, Exception)]
        if len(ordinary) == len(failures) > 1:
            raise ExceptionGroup("several callbacks failed in on_train_end", ordinary)
        if failures:
            raise _noted(failures[0], failures)


def save_if_finite(trainer: Trainer) -> Path | None:
    """Saves without a copy of the arrays, as no training goes on beside it; returns None if the state is not finite."""
    if trainer.run.state_with_edits().is_finite():
        return trainer.save_checkpoint()
    trainer.setup.checkpointer.leave_out(trainer.run)
    return None


def _end(trainer: Trainer) -> list[BaseException]:
    """Emits the last event of a run, waits for saves that callbacks start in it, and returns the failures."""
    failures = trainer.setup.events.emit_to_all("on_train_end", trainer)
    try:
        trainer.setup.finish_saves()
    except BaseException as failure:
        failures.append(failure)
    return failures


def _noted(error: BaseException, failures: Sequence[BaseException]) -> BaseException:
    """Returns the error, or a Ctrl-C raised in ``on_train_end``, with the other failures added as notes."""
    told = next((one for one in (error, *failures) if not isinstance(one, Exception)), error)
    for failure in failures:
        if failure is not told:
            told.add_note(f"and on_train_end raised {failure!r}")
    return told


def _finish_saves(trainer: Trainer, signals: Signals, error: BaseException) -> None:
    """Waits for the save in flight and, after a signal, saves for ``resume``. Failures become notes of the error."""
    try:
        trainer.setup.finish_saves()
    except Exception as unsaved:
        error.add_note(f"and a save in the background raised {unsaved!r}")
    if signals.received is None:
        return
    try:
        path = save_if_finite(trainer)
    except Exception as failure:
        error.add_note(f"the state could not be saved: {failure}")
        return
    if path is not None:
        error.add_note(f"the state was saved to {path}; train(..., resume=True) resumes from it")
    if isinstance(error, TrainingInterrupted):
        error.path = path
