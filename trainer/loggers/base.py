"""The interfaces of loggers and metrics loggers. Compiled code never calls them."""

import contextlib
import functools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

import numpy as np

from trainer.errors import ArgumentError, ArgumentTypeError, ObjectiveError
from trainer.paths import in_home


class Logger:
    """A logger that drops everything: override the methods you need.

    Any object with these methods works; `log_checkpoint` and `rewind` are optional. If a method raises, the trainer
    warns once, names the logger, and continues training.
    """

    def log_scalar(self, name: str, value: float, step: int | None = None) -> None:
        """Records one number."""
        self.log_scalars({name: value}, step)

    def log_scalars(self, scalars: Mapping[str, float], step: int | None = None) -> None:
        """Records several numbers of the same step."""

    def log_text(self, name: str, text: str, step: int | None = None) -> None:
        """Records a text."""

    def log_image(self, name: str, image: Any, step: int | None = None) -> None:
        """Records an image.

        Args:
            name: The name; ``/`` makes groups.
            image: An array of shape (height, width), or (height, width, channels) with 1, 3 or 4 channels: floats from
                0 to 1, or integers from 0 to 255. Values out of range are clipped, with a warning.
            step: The number of updates finished.
        """

    def log_histogram(self, name: str, values: Any, step: int | None = None) -> None:
        """Records the distribution of the entries of an array."""

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Records the configuration of a run that starts or resumes; values may be nested dicts."""

    def log_checkpoint(self, path: str | os.PathLike[str], step: int) -> None:
        """Records that a checkpoint, a file or a directory, is complete.

        A checkpoint written in the background is complete some steps after ``step``.
        """

    def rewind(self, step: int) -> None:
        """Discards rows of steps after ``step``, because the resumed run will measure them again."""

    def close(self) -> None:
        """Closes files and connections. The code that creates a logger closes it."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class MetricsLoggerLike(Protocol):
    """The methods that the Trainer calls on a metrics logger. Values are plain floats."""

    def log_training_metrics(self, metrics: Mapping[str, float], *, step: int) -> Any: ...

    def log_validation_metrics(self, metrics: Mapping[str, float], *, step: int) -> Any: ...

    def log_test_metrics(self, metrics: Mapping[str, float]) -> Any: ...


class MetricsLogger:
    """Logs metrics under ``train/``, ``val/`` or ``test/``, depending on where they were measured."""

    def __init__(self, logger: Logger) -> None:
        """Wraps a logger, which the caller must close."""
        self.logger = logger

    def rewind(self, step: int) -> None:
        """Tells the logger that the run is resumed; see `Logger.rewind`."""
        if hasattr(self.logger, "rewind"):
            self.logger.rewind(step)

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
    """Returns the metrics with ``prefix`` before each name, once. Leaves out ``step``, which is not a metric.

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
    """Refuses names reserved for validation averages: a metric `val_loss` would hide the validation's loss.

    Call it with the result of a train step or an eval step. It uses only the names, so it never blocks.

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


def histogram_of(values: Any) -> tuple[np.ndarray[Any, Any], list[int], list[float], int]:
    """Returns the finite entries of an array, their counts in 30 bins, the 31 edges, and the number of non-finite ones.

    ``np.histogram`` rejects NaN and infinity. Their presence is what a reader most needs to see, so they are counted.
    """
    array = np.asarray(values, np.float64)
    finite = array[np.isfinite(array)]
    counts, edges = np.histogram(finite, bins=30)
    return finite, counts.tolist(), edges.tolist(), array.size - finite.size


def flattened(params: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested hyperparameters to one dict with keys joined by ``/``; values other than numbers become text."""
    flat: dict[str, Any] = {}
    for name, value in params.items():
        if isinstance(value, Mapping) and value:
            flat |= flattened(value, f"{prefix}{name}/")
        else:
            flat[f"{prefix}{name}"] = value if isinstance(value, bool | int | float | str) else str(value)
    return flat


@contextlib.contextmanager
def needed(by: str, package: str, extra: str) -> Iterator[None]:
    """Turns a failed import of an optional package into an error that says what to install.

    Raises:
        ArgumentError: The package is not installed, or cannot be imported.
    """
    try:
        yield
    except ImportError as error:
        raise ArgumentError(
            f"{by} needs {package}, which cannot be imported ({error}); run `pip install 'nnx-trainer[{extra}]'`."
        ) from error


def as_directory(directory: Any, by: str) -> Path:
    """Returns the directory of a logger, which need not exist yet.

    Raises:
        ArgumentTypeError: It is not a path.
        ArgumentError: It is a file.
    """
    if not isinstance(directory, str | os.PathLike):
        raise ArgumentTypeError(f"`directory` of {by} is of type {type(directory).__name__}; it must be a path.")
    path = Path(in_home(directory))
    if path.exists() and not path.is_dir():
        raise ArgumentError(f"`directory` of {by} is `{path}`, which is a file; it must be a directory.")
    return path


def check_logger(logger: Any, name: str) -> Any:
    """Returns a logger after checking it.

    Raises:
        ArgumentTypeError: It is a class, or has no method ``log_scalars``.
    """
    if isinstance(logger, type):
        raise ArgumentTypeError(f"`{name}` is the class {logger.__name__}; pass an instance, {logger.__name__}(…).")
    if not callable(getattr(logger, "log_scalars", None)):
        raise ArgumentTypeError(
            f"`{name}` is of type {type(logger).__name__}; it must have the methods of trainer.Logger."
        )
    return logger


def names_checked(step: Callable[..., Any]) -> Callable[..., Any]:
    """Wraps a train step or an eval step to refuse metric names that are reserved for validation.

    Names are known during tracing, so the check costs nothing later and runs before a state is donated.
    """

    @functools.wraps(step)
    def checked(*arguments: Any) -> Any:
        result = step(*arguments)
        check_metric_names(result[1] if isinstance(result, tuple) else result)
        return result

    return checked
