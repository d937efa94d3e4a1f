"""Configuration: typed, immutable and checked, with the optimizers and schedules that it names."""

from trainer.config.base import Config as Config
from trainer.config.optimizers import OPTIMIZER_FIELDS as OPTIMIZER_FIELDS
from trainer.config.optimizers import OptimizerConfig as OptimizerConfig
from trainer.config.optimizers import make_optimizer as make_optimizer
from trainer.config.schedules import SCHEDULER_FIELDS as SCHEDULER_FIELDS
from trainer.config.schedules import SchedulerConfig as SchedulerConfig
from trainer.config.schedules import check_horizon as check_horizon
from trainer.config.schedules import make_schedule as make_schedule
from trainer.config.schedules import needs_horizon as needs_horizon
from trainer.config.training import TrainingConfig as TrainingConfig
