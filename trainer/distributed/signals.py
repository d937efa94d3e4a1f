"""Signals that end a run: recorded on arrival, acted on between steps."""

import contextlib
import signal
import threading
from types import FrameType
from typing import Any, Self

from trainer.distributed.start import end_others
from trainer.distributed.stop import CommonStop
from trainer.errors import TrainingInterrupted


class Signals:
    """Handles SIGTERM and SIGINT (Ctrl-C) during a run::

        with Signals() as signals:
            for tick in run_epoch(step, run, batches):
                run = tick.run
                signals.check()  # raises after a signal; `run` is complete here

    A signal may arrive at any instruction, even between the call of a step that consumes the old state and the
    assignment of the new one. So the handler only records it, and `check` raises. A second signal raises
    immediately, and may lose the state.
    On exit, the previous handlers are restored. Python handles signals only in the main thread, so in other threads
    this handles none; without ``with``, it never raises.

    Args:
        together: Whether all processes train together. A signal to any process then stops all of them at the same
            `check`, so that none waits in a collective for one that has stopped. A second signal also ends the
            other processes, unsaved.

    Attributes:
        received: The signal to act on, or None. With several processes, the one that all agreed on.
        second_signal: Whether a second signal came to this process, and was raised on arrival.
    """

    def __init__(self, *, together: bool = False) -> None:
        self.received: signal.Signals | None = None
        self.second_signal = False
        self._own: signal.Signals | None = None
        self._together = together
        self._stop: CommonStop | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._exits = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as exits:
            exits.callback(self._restore_handlers)
            if threading.current_thread() is threading.main_thread():
                for number in (signal.SIGTERM, signal.SIGINT):
                    self._previous[number] = signal.signal(number, self._receive)
            if self._together:
                self._stop = exits.enter_context(CommonStop(lambda: self._own))
                exits.callback(self._end_others)
            self._exits = exits.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        if self._stop is not None and isinstance(error, SystemExit) and not isinstance(error, TrainingInterrupted):
            # Python does not print it, and other processes may be in a collective that waits for this one.
            end_others(f"left its run by {type(error).__name__}({error.code!r})", grace=True)
        self._exits.__exit__(kind, error, trace)
        if error is None and self._own is not None and self.received is None:
            # It came after all processes had agreed that there was no signal, so the previous handler gets it.
            signal.raise_signal(self._own)

    def check(self) -> None:
        """Raises if a signal came; otherwise does nothing.

        Raises:
            KeyboardInterrupt: The signal was SIGINT.
            TrainingInterrupted: The signal was SIGTERM.
            DistributedError: A process received a signal, and another did not answer or has left the run.
        """
        if self._stop is not None:
            self._set_received(self._stop.pass_point())
        if self.received is not None:
            raise self.exception()

    def wait_for_all(self) -> bool:
        """Returns whether a signal came after the last `check`. With several processes, waits until all call this.

        Raises:
            DistributedError: Another process did not call this.
        """
        if self._stop is not None:
            self._set_received(self._stop.finish())
        return self.received is not None

    def exception(self) -> BaseException:
        """Returns the exception for the signal."""
        if (self._own if self.second_signal else self.received) == signal.SIGINT:
            return KeyboardInterrupt("training was interrupted")
        return TrainingInterrupted("training was terminated")

    def _set_received(self, number: int | None) -> None:
        if number is not None:
            self.received = signal.Signals(number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.second_signal = self._own is not None
        self._own = signal.Signals(number)
        if not self._together:
            self.received = self._own
        if self.second_signal:
            raise self.exception()

    def _end_others(self) -> None:
        self._stop = None
        if self.second_signal:
            end_others("got a second signal, and did not wait for the others")

    def _restore_handlers(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
