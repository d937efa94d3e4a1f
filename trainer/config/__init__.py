"""Configuration: typed, immutable, checked; and the optimizers and schedules that it names."""

from trainer.config.optimizers import make_optimizer as make_optimizer
from trainer.config.optimizers import make_schedule as make_schedule
from trainer.config.training import Config as Config
from trainer.config.training import OptimizerConfig as OptimizerConfig
from trainer.config.training import SchedulerConfig as SchedulerConfig
from trainer.config.training import TrainingConfig as TrainingConfig
