"""The first and the last event of a run, with the signals and saves between: whatever ends it, the end is in order."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from trainer.checkpoints.checkpointer import warn_of_state
from trainer.distributed.signals import Signals
from trainer.errors import TrainingInterrupted

if TYPE_CHECKING:
    from trainer.api import Trainer


@contextlib.contextmanager
def running(trainer: Trainer) -> Iterator[Signals]:
    """Emits the first and the last event of a run, whatever happens in between, and handles signals."""
    setup = trainer.setup
    signals = Signals(together=setup.placement.num_processes > 1)
    with signals if setup.handle_signals else contextlib.nullcontext():
        setup.live.is_running = True
        try:
            setup.events.emit("on_train_begin", trainer)
            yield signals
            setup.finish_saves()
            # A signal that came after the last step must not be lost: it wants the process to end.
            signals.check()
        except BaseException as error:
            is_interrupt = isinstance(error, KeyboardInterrupt | TrainingInterrupted)
            setup.live.failure = "interrupted" if is_interrupt else f"failed ({type(error).__name__})"
            with contextlib.suppress(Exception):  # the metrics of finished steps are logged if they can be
                setup.fanout.flush()
            try:
                _finish_saves(trainer, signals, error)
            finally:  # also where a second signal ends the saving
                told = _noted(error, _end(trainer))
            if told is not error:
                raise told from error
            # XLA replaces an exception that is raised in a host callback of the objective by its own.
            if signals.second_signal and isinstance(error, Exception):
                raise signals.exception() from error
            raise
        finally:
            setup.live.is_running = False
        failures = _end(trainer)
        # Before anything is raised: every process waits here for the others.
        if signals.wait_for_all():
            late = _noted(signals.exception(), failures)
            _finish_saves(trainer, signals, late)
            raise late
        ordinary = [failure for failure in failures if isinstance(failure, Exception)]
        if len(ordinary) == len(failures) > 1:
            raise ExceptionGroup("several callbacks failed in on_train_end", ordinary)
        if failures:
            raise _noted(failures[0], failures)


def _end(trainer: Trainer) -> list[BaseException]:
    """Emits the last event of a run, waits for what callbacks have begun to save at it, and returns the failures."""
    failures = trainer.setup.events.emit_to_all("on_train_end", trainer)
    try:
        trainer.setup.finish_saves()
    except BaseException as failure:
        failures.append(failure)
    return failures


def _noted(error: BaseException, failures: Sequence[BaseException]) -> BaseException:
    """Returns the error, or the Ctrl-C among what ``on_train_end`` raised, with notes of the rest of that."""
    told = next((one for one in (error, *failures) if not isinstance(one, Exception)), error)
    for failure in failures:
        if failure is not told:
            told.add_note(f"and on_train_end raised {failure!r}")
    return told


def _finish_saves(trainer: Trainer, signals: Signals, error: BaseException) -> None:
    """Waits for the save in flight and, if a signal came, saves for ``resume``; no failure hides the error."""
    try:
        trainer.setup.finish_saves()
    except Exception as unsaved:
        error.add_note(f"and a save in the background raised {unsaved!r}")
    if signals.received is None:
        return
    path = None
    try:
        if trainer.run.state_with_edits().is_finite():
            path = trainer.save_checkpoint()
        else:
            warn_of_state(trainer.run.step)
    except Exception as failure:
        error.add_note(f"the state could not be saved: {failure}")
        return
    if path is not None:
        error.add_note(f"the state was saved to {path}; train(..., resume=True) resumes from it")
    if isinstance(error, TrainingInterrupted):
        error.path = path
