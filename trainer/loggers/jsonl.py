"""`FileLogger`: a file of JSON lines."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from trainer.errors import ArgumentTypeError
from trainer.loggers.base import Logger, histogram_of, summary
from trainer.loggers.images import write_png
from trainer.paths import in_home


class FileLogger(Logger):
    """Appends one JSON object per call to a file, for ``pandas.read_json(path, lines=True)``::

        trainer = Trainer(model, config, loss_fn=loss_fn, logger=FileLogger("runs/mine"))

    writes ``runs/mine/metrics.jsonl``, and images beside it as PNG (needs pillow, the extra ``images``):
    ``runs/mine/metrics_images/<name>/<step>.png``. A row is in the file when the call returns. A resumed run appends,
    so the last row of a step counts. Non-finite numbers are written as ``NaN`` and ``Infinity``, as in Python's
    ``json``. The format: https://jsonlines.org.

    Attributes:
        path: The file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Creates a logger that writes to a file, or to ``metrics.jsonl`` in a directory.

        The file and its directory are created at the first call.

        Args:
            path: A file, or a directory: an existing one, or a name without a suffix (``runs/mine``).

        Raises:
            ArgumentTypeError: It is not a path.
        """
        if not isinstance(path, str | os.PathLike):
            raise ArgumentTypeError(f"`path` of FileLogger is of type {type(path).__name__}; it must be a path.")
        given = Path(in_home(path))
        is_directory = given.is_dir() or not (given.suffix or given.exists())
        self.path = given / "metrics.jsonl" if is_directory else given
        self._file: TextIO | None = None

    def log_scalars(self, scalars: Mapping[str, float], step: int | None = None) -> None:
        self._write(step, {name: float(value) for name, value in scalars.items()})

    def log_text(self, name: str, text: str, step: int | None = None) -> None:
        self._write(step, {name: text})

    def log_image(self, name: str, image: Any, step: int | None = None) -> None:
        folder = self.path.with_name(f"{self.path.stem}_images")
        file = write_png(folder, name, step, image, by="FileLogger").relative_to(self.path.parent)
        self._write(step, {name: {"file": file.as_posix(), **summary(image)}})

    def log_histogram(self, name: str, values: Any, step: int | None = None) -> None:
        _, counts, edges, not_finite = histogram_of(values)
        self._write(step, {name: {"counts": counts, "edges": edges, "not_finite": not_finite}})

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
