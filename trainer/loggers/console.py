"""`ConsoleLogger`: human-readable lines of text."""

import json
import sys
from collections.abc import Mapping
from typing import Any, TextIO

import numpy as np

from trainer.loggers.base import Logger, summary


class ConsoleLogger(Logger):
    """Writes a line of text per call."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Makes a logger that writes to ``stream``; standard error if left out."""
        self._stream = sys.stderr if stream is None else stream

    def __getstate__(self) -> dict[str, Any]:
        """Returns the state for a copy or a pickle, in which a standard stream has its name."""
        named = next((name for name in ("stderr", "stdout") if getattr(sys, name) is self._stream), None)
        return {**self.__dict__, "_stream": named or self._stream}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        if isinstance(self._stream, str):
            self._stream = getattr(sys, self._stream)

    def log_scalars(self, scalars: Mapping[str, float], step: int | None = None) -> None:
        self._write(step, "  ".join(f"{name} {value:.6g}" for name, value in scalars.items()))

    def log_text(self, name: str, text: str, step: int | None = None) -> None:
        self._write(step, f"{name}: {text}")

    def log_image(self, name: str, image: Any, step: int | None = None) -> None:
        self._write(step, f"{name}: image {np.shape(image)}")

    def log_histogram(self, name: str, values: Any, step: int | None = None) -> None:
        self._write(step, f"{name}: " + "  ".join(f"{key} {value:.6g}" for key, value in summary(values).items()))

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        self._write(None, f"hyperparameters: {json.dumps(params, default=str)}")

    def _write(self, step: int | None, text: str) -> None:
        self._stream.write(text + "\n" if step is None else f"step {step}  {text}\n")
        self._stream.flush()
