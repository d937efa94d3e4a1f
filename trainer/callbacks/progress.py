"""`Progress`: a callback that shows how far a run is."""

import sys
import time
from collections.abc import Callable, Mapping
from typing import Any, TextIO

from trainer.callbacks.base import Callback


class Progress(Callback):
    """Shows a run's progress: a line per epoch, and on a terminal a line that is redrawn in place.

    The redrawn line shows the metrics of the call before, which are finished by then, so that drawing it hardly
    ever waits for the device. It is drawn at most ten times a second. A file or a pipe gets the lines per epoch
    only. Of several processes only the primary one writes.
    """

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Makes a progress display.

        Args:
            stream: Where to write; standard error if left out.
            clock: Returns the time in seconds.
        """
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._started = self._drawn = 0.0
        self._previous: Mapping[str, Any] = {}
        self._width = 0

    def on_epoch_begin(self, trainer: Any, epoch: int) -> None:
        del trainer, epoch
        self._started = self._clock()

    def on_compile_begin(self, trainer: Any, what: str) -> None:
        if trainer.is_primary_process and self._stream.isatty():
            self._write(f"compiling {what} …", {}, self._clock(), end="\r")

    def on_compile_end(self, trainer: Any, what: str, seconds: float) -> None:
        if trainer.is_primary_process:
            self._write(f"compiled {what} in {seconds:.1f} s", {}, self._clock(), end="\n")

    def on_call_end(self, trainer: Any, step: int, logs: Mapping[str, Any]) -> None:
        now = self._clock()
        if trainer.is_primary_process and self._stream.isatty() and now - self._drawn >= 0.1:
            self._write(f"epoch {trainer.epoch + 1}  step {step}", self._previous, now, end="\r")
            self._drawn = now
        self._previous = logs

    def on_epoch_end(self, trainer: Any, epoch: int, logs: dict[str, float]) -> None:
        if trainer.is_primary_process:
            self._write(f"epoch {epoch + 1}  step {trainer.step}", logs, self._clock(), end="\n")

    def _write(self, head: str, logs: Mapping[str, Any], now: float, end: str) -> None:
        shown = [f"{name} {float(value):.4g}" for name, value in logs.items() if name != "step"]
        line = "  ".join([head, *shown, f"{now - self._started:.1f} s"])
        # Padding overwrites the rest of a longer line.
        self._stream.write(f"{line:<{self._width}}{end}" if self._stream.isatty() else f"{line}{end}")
        self._width = len(line) if end == "\r" else 0
        self._stream.flush()
