"""Loggers: destinations for the numbers and texts of a run."""

from typing import TYPE_CHECKING

from trainer.loggers.base import Logger as Logger
from trainer.loggers.base import MetricsLogger as MetricsLogger
from trainer.loggers.base import MetricsLoggerLike as MetricsLoggerLike
from trainer.loggers.base import check_metric_names as check_metric_names
from trainer.loggers.base import prefixed as prefixed
from trainer.loggers.fanout import MetricFanout as MetricFanout
from trainer.core.lazy_names import imported_when_used as _imported_when_used

if TYPE_CHECKING:
    from trainer.loggers.console import ConsoleLogger as ConsoleLogger
    from trainer.loggers.jsonl import FileLogger as FileLogger
    from trainer.loggers.csv import CSVLogger as CSVLogger
    from trainer.loggers.tensorboard import TensorBoardLogger as TensorBoardLogger
    from trainer.loggers.wandb import WandbLogger as WandbLogger
    from trainer.loggers.mlflow import MLflowLogger as MLflowLogger
    from trainer.loggers.background import InBackground as InBackground

__getattr__ = _imported_when_used(
    globals(),
    {
        "trainer.loggers.console": ("ConsoleLogger",),
        "trainer.loggers.jsonl": ("FileLogger",),
        "trainer.loggers.csv": ("CSVLogger",),
        "trainer.loggers.tensorboard": ("TensorBoardLogger",),
        "trainer.loggers.wandb": ("WandbLogger",),
        "trainer.loggers.mlflow": ("MLflowLogger",),
        "trainer.loggers.background": ("InBackground",),
    },
)
