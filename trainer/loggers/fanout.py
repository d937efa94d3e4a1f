"""Who is told what a run measures: the caller's log callback, metrics logger and loggers."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.loggers.base import Logger, MetricsLoggerLike, prefixed
from trainer.metrics.history import read
from trainer.metrics.throughput import Throughput
from trainer.types import LogCallback


class Reporter:
    """Tells metrics, as plain numbers, to everyone who asked; reads none if nobody did."""

    def __init__(
        self, log_callback: LogCallback | None, metrics_logger: MetricsLoggerLike | None, loggers: Sequence[Logger]
    ) -> None:
        self._log_callback = log_callback
        self._metrics_logger = metrics_logger
        self._loggers = tuple(loggers)
        self._introduced = False
        self._postponed: list[tuple[str, int, Mapping[str, Any]]] = []

    @property
    def has_audience(self) -> bool:
        """Whether anybody is told what is measured."""
        return self._log_callback is not None or self._metrics_logger is not None or bool(self._loggers)

    def introduce(self, hyperparameters: Mapping[str, Any]) -> None:
        """Tells the loggers the hyperparameters, the first time it is called."""
        if not self._introduced:
            for logger in self._loggers:
                logger.log_hyperparams(hyperparameters)
        self._introduced = True

    def postpone(self, prefix: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Keeps the metrics of a step to tell them later, so that nobody waits for a step that is under way."""
        if self.has_audience:
            self._postponed.append((prefix, step, metrics))

    def catch_up(self) -> None:
        """Tells what was postponed."""
        while self._postponed:
            self._tell(*self._postponed.pop(0))

    def report(self, prefix: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Tells the metrics of a step, after what was postponed. ``prefix``: "train" or "val"."""
        self.catch_up()
        if self.has_audience:
            self._tell(prefix, step, metrics)

    def remark(self, name: str, text: str, step: int) -> None:
        """Tells the loggers something in words."""
        self.catch_up()
        for logger in self._loggers:
            logger.log_text(name, text, step)

    def report_speed(self, step: int, throughput: Throughput) -> None:
        """Tells the loggers how fast an epoch was."""
        known = {name: value for name, value in dataclasses.asdict(throughput).items() if value is not None}
        for logger in self._loggers:
            logger.log_scalars(prefixed("speed/", known), step)

    def _tell(self, prefix: str, step: int, metrics: Mapping[str, Any]) -> None:
        numbers = {**read(metrics), "step": step}
        if self._log_callback is not None:
            self._log_callback(step, numbers, prefix=prefix)
        if self._metrics_logger is not None:
            told = self._metrics_logger
            (told.log_training_metrics if prefix == "train" else told.log_validation_metrics)(numbers, step=step)
        # A metrics logger that wraps a logger has told it already.
        wrapped = getattr(self._metrics_logger, "logger", None)
        for logger in self._loggers:
            if logger is not wrapped:
                logger.log_scalars(prefixed(f"{prefix}/", numbers), step)
