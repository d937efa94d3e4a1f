"""`MetricFanout`: sends what a run measures to the log callback, the metrics logger and the loggers."""

import collections
import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.loggers.base import Logger, MetricsLoggerLike, prefixed
from trainer.metrics.average import read
from trainer.metrics.throughput import Throughput
from trainer.types import LogCallback


class MetricFanout:
    """Sends metrics, read from the device as plain numbers, to every destination; without one it reads nothing.

    Everything arrives in the order in which it was reported: deferred metrics are sent before anything newer.

    Args:
        log_callback: Called as ``log_callback(step, metrics, prefix="train")``, or ``"val"``.
        metrics_logger: Gets the metrics of training, of validation and of the end of a run.
        loggers: Loggers of the caller, who closes them.
        owned: Loggers that the trainer made. They get what ``loggers`` get, and `close` closes them.
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
        self._loggers = (*loggers, *(logger for logger in owned if all(logger is not other for other in loggers)))
        self._owned = tuple(owned)
        self._has_hyperparams = False
        self._deferred: collections.deque[tuple[str, int, Mapping[str, Any]]] = collections.deque()

    @property
    def has_destination(self) -> bool:
        """Whether metrics go anywhere."""
        return self._log_callback is not None or self._metrics_logger is not None or bool(self._loggers)

    def defer(self, prefix: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Keeps the metrics of a step for the next `flush`, which then need not wait for a step in flight.

        Args:
            prefix: "train" or "val".
            step: The updates finished.
            metrics: Scalars, on the device or not.
        """
        if self.has_destination:
            self._deferred.append((prefix, step, metrics))

    def flush(self) -> None:
        """Sends the deferred metrics; waits for the device to finish them."""
        while self._deferred:
            # Taken out first: if a destination raises, the next flush does not send the same row again.
            self._send(*self._deferred.popleft())

    def report(self, prefix: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Sends the metrics of a step now; the arguments are those of `defer`."""
        self.defer(prefix, step, metrics)
        self.flush()

    def log_text(self, name: str, text: str, step: int) -> None:
        """Sends a text to the loggers."""
        self.flush()
        for logger in self._loggers:
            logger.log_text(name, text, step)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        """Sends the configuration of the run to the loggers, at the first call only."""
        if not self._has_hyperparams:
            for logger in self._loggers:
                logger.log_hyperparams(params)
        self._has_hyperparams = True

    def log_throughput(self, step: int, throughput: Throughput) -> None:
        """Sends the known speeds of an epoch to the loggers, under ``speed/``."""
        self.flush()
        known = {name: value for name, value in dataclasses.asdict(throughput).items() if value is not None}
        for logger in self._loggers:
            logger.log_scalars(prefixed("speed/", known), step)

    def log_test_metrics(self, metrics: Mapping[str, float]) -> None:
        """Sends the averages at the end of a run to the metrics logger."""
        self.flush()
        if self._metrics_logger is not None:
            self._metrics_logger.log_test_metrics(metrics)

    def close(self) -> None:
        """Sends the deferred metrics and closes the loggers that the trainer made, all of them if any raises."""
        with contextlib.ExitStack() as stack:
            for logger in self._owned:
                stack.callback(logger.close)
            self.flush()

    def _send(self, prefix: str, step: int, metrics: Mapping[str, Any]) -> None:
        numbers = {**read(metrics), "step": step}
        if self._log_callback is not None:
            self._log_callback(step, numbers, prefix=prefix)
        if self._metrics_logger is not None:
            log = self._metrics_logger
            (log.log_training_metrics if prefix == "train" else log.log_validation_metrics)(numbers, step=step)
        # A MetricsLogger has sent the numbers to the logger inside it; that logger must not get them twice.
        wrapped = getattr(self._metrics_logger, "logger", None)
        for logger in self._loggers:
            if logger is not wrapped:
                logger.log_scalars(prefixed(f"{prefix}/", numbers), step)
