"""Loggers: destinations for the numbers and texts of a run."""

from trainer.loggers.base import ConsoleLogger as ConsoleLogger
from trainer.loggers.base import FileLogger as FileLogger
from trainer.loggers.base import Logger as Logger
from trainer.loggers.base import MetricsLogger as MetricsLogger
from trainer.loggers.base import MetricsLoggerLike as MetricsLoggerLike
from trainer.loggers.base import WandbLogger as WandbLogger
from trainer.loggers.base import prefixed as prefixed
