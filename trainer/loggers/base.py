"""The methods of a logger, and of a metrics logger. Compiled code calls none of them."""

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np


class Logger:
    """A logger that drops everything: override the methods that you need. Any object with these methods works."""

    def log_scalar(self, name: str, value: float, step: int | None = None) -> None:
        """Records one number."""
        self.log_scalars({name: value}, step)

    def log_scalars(self, scalars: Mapping[str, float], step: int | None = None) -> None:
        """Records several numbers of one step."""

    def log_text(self, name: str, text: str, step: int | None = None) -> None:
        """Records a text."""

    def log_image(self, name: str, image: Any, step: int | None = None) -> None:
        """Records an image, an array of shape (height, width) or (height, width, channels)."""

    def log_histogram(self, name: str, values: Any, step: int | None = None) -> None:
        """Records the distribution of the entries of an array."""

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Records the configuration of a run."""

    def close(self) -> None:
        """Closes files and connections. The code that made a logger closes it."""


class MetricsLoggerLike(Protocol):
    """The methods that the Trainer calls on a metrics logger. Values are plain floats."""

    def log_training_metrics(self, metrics: Mapping[str, float], *, step: int) -> Any: ...

    def log_validation_metrics(self, metrics: Mapping[str, float], *, step: int) -> Any: ...

    def log_test_metrics(self, metrics: Mapping[str, float]) -> Any: ...


class MetricsLogger:
    """Logs metrics under ``train/``, ``val/`` and ``test/``, by where they were measured."""

    def __init__(self, logger: Logger) -> None:
        """Wraps a logger, which stays the caller's to close."""
        self.logger = logger

    def log_training_metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """Records the metrics of a training step."""
        self.logger.log_scalars(prefixed("train/", metrics), step)

    def log_validation_metrics(self, metrics: Mapping[str, float], *, step: int | None = None) -> None:
        """Records the averages of a validation."""
        self.logger.log_scalars(prefixed("val/", metrics), step)

    def log_test_metrics(self, metrics: Mapping[str, float]) -> None:
        """Records the averages at the end of a run."""
        self.logger.log_scalars(prefixed("test/", metrics), None)


def prefixed(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns the metrics with ``prefix`` before each name, once; ``step`` is left out, it is no measurement."""
    return {
        name if name.startswith(prefix) else prefix + name: value for name, value in metrics.items() if name != "step"
    }


def summary(values: Any) -> dict[str, float]:
    """Returns the smallest, mean and largest entry of an array."""
    array = np.asarray(values, np.float64)
    return {
        "min": float(array.min()),
        "mean": float(array.mean()),
        "max": float(array.max()),
    }
