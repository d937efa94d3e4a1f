"""Loggers: where numbers and words of a run go. None of them is called from compiled code."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, TextIO

import numpy as np

from trainer.errors import ArgumentError


class Logger:
    """Does nothing with what it is told; override what you need. Duck-typed objects work too."""

    def log_scalar(self, name: str, value: float, step: int | None = None) -> None:
        """Records one number."""
        self.log_scalars({name: value}, step)

    def log_scalars(self, scalars: Mapping[str, float], step: int | None = None) -> None:
        """Records several numbers of one step."""

    def log_text(self, name: str, text: str, step: int | None = None) -> None:
        """Records a remark."""

    def log_image(self, name: str, image: Any, step: int | None = None) -> None:
        """Records an image, an array of shape (height, width) or (height, width, channels)."""

    def log_histogram(self, name: str, values: Any, step: int | None = None) -> None:
        """Records how the entries of an array are distributed."""

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Records the configuration of a run."""

    def close(self) -> None:
        """Lets go of files and connections. Whoever made a logger closes it."""


class ConsoleLogger(Logger):
    """Writes one line per event for people to read."""

    def __init__(self, stream: TextIO | None = None) -> None:
        """Makes a logger that writes to ``stream``, standard error if left out."""
        self._stream = sys.stderr if stream is None else stream

    def log_scalars(self, scalars: Mapping[str, float], step: int | None = None) -> None:
        self._write(step, "  ".join(f"{name} {value:.6g}" for name, value in scalars.items()))

    def log_text(self, name: str, text: str, step: int | None = None) -> None:
        self._write(step, f"{name}: {text}")

    def log_image(self, name: str, image: Any, step: int | None = None) -> None:
        self._write(step, f"{name}: image {np.shape(image)}")

    def log_histogram(self, name: str, values: Any, step: int | None = None) -> None:
        summary = _summary(values)
        self._write(step, f"{name}: " + "  ".join(f"{key} {value:.6g}" for key, value in summary.items()))

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        self._write(None, f"hyperparameters: {json.dumps(params, default=str)}")

    def _write(self, step: int | None, text: str) -> None:
        self._stream.write(text + "\n" if step is None else f"step {step}  {text}\n")
        self._stream.flush()


class FileLogger(Logger):
    """Appends one JSON object per event to a file, ``pandas.read_json(path, lines=True)`` reads it.

    A number that is not finite is written as ``NaN`` or ``Infinity``, as Python's ``json`` does.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Names the file. It and its directory are made at the first event, not before."""
        self.path = Path(path)
        self._file: TextIO | None = None

    def log_scalars(self, scalars: Mapping[str, float], step: int | None = None) -> None:
        self._write(step, {name: float(value) for name, value in scalars.items()})

    def log_text(self, name: str, text: str, step: int | None = None) -> None:
        self._write(step, {name: text})

    def log_image(self, name: str, image: Any, step: int | None = None) -> None:
        self._write(step, {name: {"shape": list(np.shape(image)), **_summary(image)}})

    def log_histogram(self, name: str, values: Any, step: int | None = None) -> None:
        array = np.asarray(values, np.float64)
        # Of NaN and infinity NumPy makes no histogram, and they are what one most wants to hear of.
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
            # Line-buffered: a row is in the file when the call returns, whatever happens next.
            self._file = self.path.open("a", encoding="utf-8", buffering=1)
        self._file.write(json.dumps(row if step is None else {"step": step, **row}, default=str) + "\n")


class WandbLogger(Logger):
    """Logs to Weights & Biases; needs the extra ``wandb``."""

    def __init__(self, project: str | None = None, name: str | None = None) -> None:
        """Starts a run.

        Raises:
            ArgumentError: The package is not installed.
        """
        try:
            import wandb
        except ImportError as error:
            raise ArgumentError(
                "`TrainingConfig.use_wandb` is true but wandb is not installed; run `pip install wandb`."
            ) from error
        self._wandb: Any = wandb
        self._run = self._wandb.init(project=project, name=name or None)

    def log_scalars(self, scalars: Mapping[str, float], step: int | None = None) -> None:
        self._run.log(dict(scalars), step=step)

    def log_text(self, name: str, text: str, step: int | None = None) -> None:
        self._run.log({name: text}, step=step)

    def log_image(self, name: str, image: Any, step: int | None = None) -> None:
        self._run.log({name: self._wandb.Image(np.asarray(image))}, step=step)

    def log_histogram(self, name: str, values: Any, step: int | None = None) -> None:
        self._run.log({name: self._wandb.Histogram(np.asarray(values))}, step=step)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        self._run.config.update(dict(params))

    def close(self) -> None:
        self._run.finish()


class MetricsLoggerLike(Protocol):
    """What the Trainer calls on a metrics logger; values are plain floats."""

    def log_training_metrics(self, metrics: Mapping[str, float], *, step: int) -> Any: ...

    def log_validation_metrics(self, metrics: Mapping[str, float], *, step: int) -> Any: ...

    def log_test_metrics(self, metrics: Mapping[str, float]) -> Any: ...


class MetricsLogger:
    """Tells a logger which metrics come from training (``train/``), validation (``val/``) and the end."""

    def __init__(self, logger: Logger) -> None:
        """Wraps a logger, which whoever made it closes."""
        self.logger = logger

    def log_training_metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """Records the metrics of a training step."""
        self.logger.log_scalars(prefixed("train/", metrics), step)

    def log_validation_metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """Records the averages of a validation."""
        self.logger.log_scalars(prefixed("val/", metrics), step)

    def log_test_metrics(self, metrics: Mapping[str, float]) -> None:
        """Records the averages with which a run ended."""
        self.logger.log_scalars(prefixed("test/", metrics), None)


def prefixed(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns the metrics under longer names; ``step`` is left out, it is not a measurement."""
    return {
        name if name.startswith(prefix) else prefix + name: value for name, value in metrics.items() if name != "step"
    }


def _summary(values: Any) -> dict[str, float]:
    array = np.asarray(values, np.float64)
    return {
        "min": float(array.min()),
        "mean": float(array.mean()),
        "max": float(array.max()),
    }
