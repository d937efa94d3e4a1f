"""`MetricFanout`: sends the metrics of a run to the log callback, the metrics logger and the loggers."""

import collections
import contextlib
import dataclasses
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainer.errors import ArgumentTypeError, ObjectiveError, warn
from trainer.loggers.base import Logger, MetricsLoggerLike, check_logger, prefixed
from trainer.metrics.average import WeightedAverage, read
from trainer.metrics.throughput import SPEED, Throughput
from trainer.types import LogCallback

_METRICS = ("log_training_metrics", "log_validation_metrics", "log_test_metrics")

_OPTIONAL = ("log_checkpoint", "rewind", *_METRICS)
"""Methods that a logger or a metrics logger may lack."""

_MOST_ENTRIES = 64
"""Loggers get the entries of arrays with at most this many; the history has them all."""


class MetricFanout:
    """Sends metrics, read from the device as plain numbers, to every destination; without any, it reads nothing.

    Everything arrives in the order in which it was reported: deferred metrics are sent before anything newer. If a
    logger raises, a warning names it, once, and it is called again next time. Errors of the log callback propagate.

    Args:
        log_callback: Called as ``log_callback(step, metrics, prefix="train")``, or ``"val"``.
        metrics_logger: Gets the metrics of training, of validation, and of the end of a run.
        loggers: Loggers of the caller, who closes them.
        owned: Loggers that the trainer created. They get the same as ``loggers``, and `close` closes them.
    """

    def __init__(
        self,
        log_callback: LogCallback | None,
        metrics_logger: MetricsLoggerLike | None,
        loggers: Sequence[Logger],
        owned: Sequence[Logger] = (),
    ) -> None:
        self._log_callback = log_callback
        self._metrics_logger = metrics_logger
        self._loggers = tuple({id(logger): logger for logger in (*loggers, *owned)}.values())
        self._owned = tuple(owned)
        self._has_hyperparams = False
        self._failed: set[int] = set()
        self._rewind_to: int | None = None
        # Epoch averages are queued among the metrics of steps, and computed when they are sent.
        self._deferred: collections.deque[tuple[str, int, Mapping[str, Any] | WeightedAverage]] = collections.deque()

    @property
    def has_destination(self) -> bool:
        """Whether metrics go anywhere."""
        return self._log_callback is not None or self._metrics_logger is not None or bool(self._loggers)

    def defer(self, prefix: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Keeps the metrics of a step for the next `flush`, so that sending them need not wait for a step in flight.

        Args:
            prefix: "train" or "val".
            step: The number of updates finished.
            metrics: Scalars, on the device or not.
        """
        if self.has_destination:
            self._deferred.append((prefix, step, metrics))

    def defer_average(self, step: int, average: WeightedAverage) -> None:
        """Keeps the average of an epoch that ended at ``step``; loggers get it under ``epoch/``."""
        if self._loggers:
            self._deferred.append(("epoch", step, average))

    def flush(self) -> None:
        """Sends everything deferred; waits for the device to finish it."""
        while self._deferred:
            # Remove it first: if a destination raises, the next flush must not send the same row again.
            self._send(*self._deferred.popleft())

    def flush_rows(self) -> None:
        """Sends the deferred metrics of steps, and anything older; waits for the device to finish those steps.

        An epoch average after them stays deferred: the device may not have finished the epoch. It will have once it
        finishes a step of the next epoch.
        """
        while self._deferred and any(prefix != "epoch" for prefix, *_ in self._deferred):
            self._send(*self._deferred.popleft())

    def report(self, prefix: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Sends the metrics of a step now; arguments as for `defer`."""
        self.defer(prefix, step, metrics)
        self.flush()

    def log_text(self, name: str, text: str, step: int) -> None:
        """Sends a text to the loggers."""
        self.tell("log_text", name, text, step=step)

    def tell(self, method: str, *arguments: Any, step: int) -> None:
        """Calls a method of every logger, after sending what is deferred; ``step`` is the last argument."""
        self.flush()
        self._reach(step)
        self._tell_all(method, *arguments, step)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Sends the configuration of the run to the loggers, only once."""
        if not self._has_hyperparams:
            self._tell_all("log_hyperparams", params)
        self._has_hyperparams = True

    def log_checkpoint(self, path: str | os.PathLike[str], step: int) -> None:
        """Tells the loggers that a checkpoint is complete."""
        self._tell_all("log_checkpoint", path, step)

    def rewind(self, step: int) -> None:
        """Tells the loggers that a run resumes at ``step``, and will repeat later steps."""
        self.flush()
        self._rewind_to = step
        self._reach(step + 1)

    def rewind_later(self, step: int) -> None:
        """Like `rewind`, but only once a later step is logged: a loaded state may be only for evaluation."""
        self.flush()
        self._rewind_to = step

    def log_throughput(self, step: int, throughput: Throughput) -> None:
        """Sends the known throughput figures of an epoch to the loggers, under ``speed/``."""
        known = {name: value for name, value in dataclasses.asdict(throughput).items() if value is not None}
        self.tell("log_scalars", prefixed(SPEED, known), step=step)

    def log_test_metrics(self, metrics: Mapping[str, float]) -> None:
        """Sends the averages at the end of a run to the metrics logger."""
        self.flush()
        if self._metrics_logger is not None:
            self._tell(self._metrics_logger, "log_test_metrics", metrics)

    def close(self) -> None:
        """Sends everything deferred and closes the loggers that the trainer created, even if some raise."""
        with contextlib.ExitStack() as stack:
            for logger in self._owned:
                stack.callback(self._tell, logger, "close")
            self.flush()

    def _send(self, prefix: str, step: int, metrics: Mapping[str, Any] | WeightedAverage) -> None:
        self._reach(step)
        if isinstance(metrics, WeightedAverage):
            self._tell_all("log_scalars", prefixed("epoch/", entries_of(metrics.compute())), step)
            return
        numbers = {**read(metrics), "step": step}
        if self._log_callback is not None:
            self._log_callback(step, _copied(numbers), prefix=prefix)
        numbers = entries_of(numbers)
        if self._metrics_logger is not None:
            method = "log_training_metrics" if prefix == "train" else "log_validation_metrics"
            self._tell(self._metrics_logger, method, numbers, step=step)
        # A MetricsLogger has already sent the numbers to the logger it wraps, which must not get them twice.
        wrapped = getattr(self._metrics_logger, "logger", None)
        row = prefixed(f"{prefix}/", numbers)
        for logger in self._loggers:
            if logger is not wrapped:
                self._tell(logger, "log_scalars", row, step)

    def _reach(self, step: int) -> None:
        if self._rewind_to is not None and step > self._rewind_to:
            to, self._rewind_to = self._rewind_to, None
            # Deferred rows come after this one, so nothing is flushed here.
            self._tell_all("rewind", to)
            if self._metrics_logger is not None:
                self._tell(self._metrics_logger, "rewind", to)

    def _tell_all(self, method: str, *arguments: Any) -> None:
        for logger in self._loggers:
            self._tell(logger, method, *arguments)

    def _tell(self, logger: Any, method: str, *arguments: Any, **named: Any) -> None:
        """Calls a method of a logger; its first exception becomes a warning."""
        if method in _OPTIONAL and not hasattr(logger, method):
            return
        try:
            # A copy: a destination may pop or add keys, and the next one gets the same.
            given = [_copied(one) if type(one) is dict else one for one in arguments]
            getattr(logger, method)(*given, **named)
        except ObjectiveError:  # two metrics with the same name
            raise
        except Exception as error:
            if id(logger) not in self._failed:
                self._failed.add(id(logger))
                inner = getattr(logger, "logger", None)
                name = type(logger).__name__ + ("" if inner is None else f"({type(inner).__name__})")
                warn(
                    f"{name} failed in {method}: {error!r}. The training continues, what it cannot log is lost, and "
                    f"its next failures are not reported."
                )


def _copied(value: Any) -> Any:
    """Returns a copy of nested dicts and lists. What they hold stays the same: not every object can be copied."""
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    return [_copied(entry) for entry in value] if isinstance(value, list) else value


def entries_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Returns metrics with each array entry as its own number, ``name/0``; long arrays are left out."""
    found: dict[str, float] = {}
    for name, value in metrics.items():
        if not isinstance(value, list):
            found[name] = value
        elif np.size(value) <= _MOST_ENTRIES:
            found |= {f"{name}/{index}": float(entry) for index, entry in enumerate(np.ravel(value))}
    return found


def as_loggers(given: Any) -> list[Logger]:
    """Returns the loggers in a trainer's ``logger`` argument: none, one, or a sequence of them.

    Raises:
        ArgumentTypeError: One of them is not a logger.
    """
    if given is None:
        return []
    if not isinstance(given, list | tuple):
        return [check_logger(given, "logger")]
    return [check_logger(logger, f"logger[{index}]") for index, logger in enumerate(given)]


def check_metrics_logger(given: Any) -> None:
    """Checks that a metrics logger has a method to call.

    Raises:
        ArgumentTypeError: It is a class, or has no method of `trainer.MetricsLogger`.
    """
    if isinstance(given, type) or not any(callable(getattr(given, name, None)) for name in _METRICS):
        what = f"the class {given.__name__}" if isinstance(given, type) else f"of type {type(given).__name__}"
        raise ArgumentTypeError(
            f"`metrics_logger` is {what}; it must have methods of trainer.MetricsLogger: {', '.join(_METRICS)}."
        )


class AllLoggers(Logger):
    """The loggers of a run as one, for callbacks: see ``trainer.loggers``. It closes none of them."""

    def __init__(self, fanout: MetricFanout, step: int) -> None:
        self._fanout, self._step = fanout, step

    def log_scalars(self, scalars: Mapping[str, float], step: int | None = None) -> None:
        self._tell("log_scalars", {name: float(value) for name, value in scalars.items()}, step=step)

    def log_text(self, name: str, text: str, step: int | None = None) -> None:
        self._tell("log_text", name, text, step=step)

    def log_image(self, name: str, image: Any, step: int | None = None) -> None:
        self._tell("log_image", name, image, step=step)

    def log_histogram(self, name: str, values: Any, step: int | None = None) -> None:
        self._tell("log_histogram", name, values, step=step)

    def _tell(self, method: str, *arguments: Any, step: int | None) -> None:
        self._fanout.tell(method, *arguments, step=self._step if step is None else step)
