"""The methods of a logger, and of a metrics logger. Compiled code calls none of them."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from trainer.errors import ObjectiveError


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

    def log_training_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Records the metrics of a training step."""
        self.logger.log_scalars(prefixed("train/", metrics), step)

    def log_validation_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Records the averages of a validation."""
        self.logger.log_scalars(prefixed("val/", metrics), step)

    def log_test_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Records the averages at the end of a run."""
        self.logger.log_scalars(prefixed("test/", metrics), step)


def prefixed(prefix: str, metrics: Mapping[str, float]) -> dict[str, float]:
    """Returns the metrics with ``prefix`` before each name, once; ``step`` is left out, it is no measurement.

    Raises:
        ObjectiveError: Two metrics would get the same name.
    """
    longer: dict[str, float] = {}
    for name, value in metrics.items():
        key = name if name.startswith(prefix) else prefix + name
        if key in longer:
            raise ObjectiveError(f"metrics `{key.removeprefix(prefix)}` and `{key}` are both `{key}`; rename one.")
        if name != "step":
            longer[key] = value
    return longer


def check_metric_names(metrics: Iterable[str]) -> None:
    """Refuses names that the averages of a validation have: a metric `val_loss` would hide the validation's loss.

    Call it with what a train step or an eval step returned. It looks at names only, so it waits for nothing.

    Raises:
        ObjectiveError: The name of a metric begins with ``val_``.
    """
    for name in metrics:
        if name.startswith("val_"):
            raise ObjectiveError(
                f"the objective or an extension reports a metric `{name}`, but names that begin with `val_` belong to "
                f"the averages of a validation; rename it, for example to `own_{name}`."
            )


def summary(values: Any) -> dict[str, float]:
    """Returns the smallest, mean and largest entry of an array."""
    array = np.asarray(values, np.float64)
    return {
        "min": float(array.min()),
        "mean": float(array.mean()),
        "max": float(array.max()),
    }


def names_checked(step: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a train step or an eval step that refuses metrics whose names belong to a validation.

    Names are known while the step is traced, so the check costs nothing later and comes before a state is donated.
    """

    @functools.wraps(step)
    def checked(*arguments: Any) -> Any:
        result = step(*arguments)
        check_metric_names(result[1] if isinstance(result, tuple) else result)
        return result

    return checked
