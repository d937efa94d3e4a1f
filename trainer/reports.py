"""Who is told what a run measures: the caller's log callback, metrics logger and loggers."""

from collections.abc import Mapping, Sequence
from typing import Any

from trainer.history import read
from trainer.loggers import Logger, MetricsLoggerLike, prefixed
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

    def introduce(self, hyperparameters: Mapping[str, Any]) -> None:
        """Tells the loggers the hyperparameters, the first time it is called."""
        if not self._introduced:
            for logger in self._loggers:
                logger.log_hyperparams(hyperparameters)
        self._introduced = True

    def report(self, prefix: str, step: int, metrics: Mapping[str, Any]) -> None:
        """Tells the metrics of a step. ``prefix``: "train" or "val"."""
        if self._log_callback is None and self._metrics_logger is None and not self._loggers:
            return
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

    def remark(self, name: str, text: str, step: int) -> None:
        """Tells the loggers something in words."""
        for logger in self._loggers:
            logger.log_text(name, text, step)
