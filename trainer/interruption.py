"""Signals that ask a run to end: noticed at once, obeyed when the state is whole."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from trainer.errors import TrainingInterrupted


class Interruption:
    """Remembers that SIGTERM or SIGINT (Ctrl-C) came, until a run asks.

    A signal may come at any instruction, also between the call of a step that consumes the old
    state and the assignment of the new one; so the handler only takes a note. A second signal is
    somebody who will not wait: it raises where it comes.

    Attributes:
        received: The signal that came last, None if none did.
        insisted: Whether it was not the first, and was raised where it came.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.insisted = False

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        """Handles the signals inside the block, and restores the handlers that were there.

        In a thread other than the main one, where Python handles no signals, it does nothing.
        """
        self.received, self.insisted = None, False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous: dict[signal.Signals, Any] = {}
        try:
            for number in (signal.SIGTERM, signal.SIGINT):
                previous[number] = signal.signal(number, self._receive)
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Does nothing, unless a signal came.

        Raises:
            KeyboardInterrupt: It was SIGINT.
            TrainingInterrupted: It was SIGTERM.
        """
        if self.received is not None:
            raise self.exception()

    def exception(self) -> BaseException:
        """Returns what stands for the signal that came last."""
        if self.received == signal.SIGINT:
            return KeyboardInterrupt("training was interrupted")
        return TrainingInterrupted("training was terminated")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.insisted = self.received is not None
        self.received = signal.Signals(number)
        if self.insisted:
            raise self.exception()
