"""`FileLogger`: a file of JSON lines."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from trainer.loggers.base import Logger, summary


class FileLogger(Logger):
    """Appends a JSON object per call to a file, which ``pandas.read_json(path, lines=True)`` reads.

    Numbers that are not finite are written as ``NaN`` and ``Infinity``, as Python's ``json`` does.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Makes a logger that writes to ``path``. The file and its directory are created at the first call."""
        self.path = Path(path)
        self._file: TextIO | None = None

    def log_scalars(self, scalars: Mapping[str, float], step: int | None = None) -> None:
        self._write(step, {name: float(value) for name, value in scalars.items()})

    def log_text(self, name: str, text: str, step: int | None = None) -> None:
        self._write(step, {name: text})

    def log_image(self, name: str, image: Any, step: int | None = None) -> None:
        self._write(step, {name: {"shape": list(np.shape(image)), **summary(image)}})

    def log_histogram(self, name: str, values: Any, step: int | None = None) -> None:
        array = np.asarray(values, np.float64)
        # np.histogram refuses NaN and infinity; a reader most wants to know that they are there, so they are counted.
        finite = array[np.isfinite(array)]
        counts, edges = np.histogram(finite, bins=30)
        row = {"counts": counts.tolist(), "edges": edges.tolist(), "not_finite": array.size - finite.size}
        self._write(step, {name: row})

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        self._write(None, {"hyperparameters": dict(params)})

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, step: int | None, row: dict[str, Any]) -> None:
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # Line-buffered: a row is in the file when the call returns, so a crash loses none.
            self._file = self.path.open("a", encoding="utf-8", buffering=1)
        self._file.write(json.dumps(row if step is None else {"step": step, **row}, default=str) + "\n")
