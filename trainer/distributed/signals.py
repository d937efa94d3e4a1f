"""Signals that ask a run to end: noticed at once, obeyed when the state is whole."""

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from trainer.distributed.start import end_others
from trainer.distributed.stop import CommonStop
from trainer.errors import TrainingInterrupted


class Interruption:
    """Remembers that SIGTERM or SIGINT (Ctrl-C) came, until a run asks.

    A signal may come at any instruction, also between the call of a step that consumes the old
    state and the assignment of the new one; so the handler only takes a note. A second signal is
    somebody who will not wait: it raises where it comes.

    Where several processes train together, a signal to any of them is obeyed by all, at the same
    `check`: all come to the same ones, and may wait for each other anywhere between. A second signal
    ends the others too, unsaved.

    Attributes:
        received: The signal to obey, which came last, None if there is none. Of several processes, one
            that all have agreed on.
        insisted: Whether one came to this process that was not the first, and was raised where it came.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self.insisted = False
        self._own: signal.Signals | None = None
        self._together = False
        self._stop: CommonStop | None = None

    @contextlib.contextmanager
    def watching(self, *, together: bool = False) -> Iterator[None]:
        """Handles the signals inside the block, and restores the handlers that were there.

        In a thread other than the main one, where Python handles no signals, it handles none.

        Args:
            together: Whether all processes train together, so that they must stop together.
        """
        self.received, self._own, self.insisted, self._together = None, None, False, together
        with self._handling():
            if not together:
                yield
                return
            try:
                with CommonStop(lambda: self._own) as self._stop:
                    yield
            finally:
                self._stop = None
                if self.insisted:
                    end_others("was told a second time to end, and did not wait for the others")
        self._pass_on()

    def _pass_on(self) -> None:
        """Hands one that came after all had agreed that none did to whoever handles signals after the run."""
        if self._own is not None and self.received is None:
            signal.raise_signal(self._own)

    @contextlib.contextmanager
    def _handling(self) -> Iterator[None]:
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
            DistributedError: It came to one of several processes, and another did not answer.
        """
        if self._stop is not None:
            self._obey(self._stop.passes())
        if self.received is not None:
            raise self.exception()

    def settle(self) -> bool:
        """Tells whether a signal came after the last `check`. Of several processes, waits until all have come here.

        Raises:
            DistributedError: Another process did not come here.
        """
        if self._stop is not None:
            self._obey(self._stop.settles())
        return self.received is not None

    def _obey(self, number: int | None) -> None:
        if number is not None:
            self.received = signal.Signals(number)

    def exception(self) -> BaseException:
        """Returns what stands for the signal that came last."""
        if (self._own if self.insisted else self.received) == signal.SIGINT:
            return KeyboardInterrupt("training was interrupted")
        return TrainingInterrupted("training was terminated")

    def _receive(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.insisted = self._own is not None
        self._own = signal.Signals(number)
        if not self._together:
            self.received = self._own
        if self.insisted:
            raise self.exception()


class Signals(Interruption):
    def __init__(self, together=False):
        super().__init__()
        self._tog = together

    def __enter__(self):
        self._cm = self.watching(together=self._tog)
        self._cm.__enter__()
        return self

    def __exit__(self, *e):
        return self._cm.__exit__(*e)

    @property
    def second_signal(self):
        return self.insisted

    def wait_for_all(self):
        return self.settle()
