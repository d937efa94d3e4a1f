"""A functional training core for Flax NNX models, and a thin Trainer around it."""

__version__ = "0.1.0"

from typing import TYPE_CHECKING

from trainer.core.lazy_names import imported_when_used as _imported_when_used

# In reading order: the state, the steps, the run, the loop, the trainer; then what each package adds.
from trainer.state import TrainState as TrainState
from trainer.steps import make_train_step as make_train_step
from trainer.steps import make_eval_step as make_eval_step
from trainer.steps import make_predict_step as make_predict_step
from trainer.steps import fuse_steps as fuse_steps
from trainer.run import Run as Run
from trainer.loop import run_epoch as run_epoch
from trainer.loop import evaluate as evaluate
from trainer.loop import predict as predict
from trainer.loop import open_pass as open_pass
from trainer.loop import prefetched as prefetched
from trainer.loop import Tick as Tick
from trainer.api import Trainer as Trainer
from trainer.types import LossFn as LossFn
from trainer.types import StepFn as StepFn
from trainer.core.path_patterns import by_path as by_path
from trainer.core.nonfinite import check_finite as check_finite
from trainer.core.report import Update as Update
from trainer.core.partial_metrics import vector as vector
from trainer.core.partial_metrics import histogram as histogram
from trainer.core.precision import Precision as Precision
from trainer.extensions import Extension as Extension
from trainer.extensions import ExtensionConfig as ExtensionConfig
from trainer.config.training import TrainingConfig as TrainingConfig
from trainer.config.optimizers import OptimizerConfig as OptimizerConfig
from trainer.config.optimizers import make_optimizer as make_optimizer
from trainer.config.schedules import SchedulerConfig as SchedulerConfig
from trainer.config.schedules import make_schedule as make_schedule
from trainer.data.memory import InMemoryData as InMemoryData
from trainer.data.padding import pad_batch as pad_batch
from trainer.compile.dispatch import CompiledStep as CompiledStep
from trainer.compile.cost import ProgramCost as ProgramCost
from trainer.sharding.mesh import make_mesh as make_mesh
from trainer.sharding.mesh import batch_sharding as batch_sharding
from trainer.sharding.partition import partition as partition
from trainer.sharding.create import abstract_state as abstract_state
from trainer.sharding.create import create_sharded as create_sharded
from trainer.sharding.step import jit_step as jit_step
from trainer.distributed.signals import Signals as Signals
from trainer.checkpoints.state_io import save_state as save_state
from trainer.checkpoints.state_io import load_state as load_state
from trainer.checkpoints.state_io import latest_checkpoint as latest_checkpoint
from trainer.checkpoints.run_record import save_run as save_run
from trainer.checkpoints.run_record import load_run as load_run
from trainer.checkpoints.checkpointer import Checkpointer as Checkpointer
from trainer.callbacks.base import Callback as Callback
from trainer.callbacks.base import CallbackList as CallbackList
from trainer.loggers.base import Logger as Logger
from trainer.loggers.base import MetricsLogger as MetricsLogger
from trainer.metrics.average import WeightedAverage as WeightedAverage
from trainer.metrics.history import History as History
from trainer.metrics.throughput import Meter as Meter
from trainer.metrics.throughput import Throughput as Throughput
from trainer.errors import TrainerError as TrainerError
from trainer.errors import ArgumentError as ArgumentError
from trainer.errors import ArgumentTypeError as ArgumentTypeError
from trainer.errors import ConfigError as ConfigError
from trainer.errors import BatchError as BatchError
from trainer.errors import ObjectiveError as ObjectiveError
from trainer.errors import StateError as StateError
from trainer.errors import NonFiniteError as NonFiniteError
from trainer.errors import DistributedError as DistributedError
from trainer.errors import CheckpointError as CheckpointError
from trainer.errors import UnreadableError as UnreadableError
from trainer.errors import TrainingInterrupted as TrainingInterrupted

# The same for names whose module is imported when they are first used: no run needs all of them.
if TYPE_CHECKING:
    from trainer.features.averages import ema_of_params as ema_of_params
    from trainer.features.averages import polyak_average as polyak_average
    from trainer.features.averages import averaged_params as averaged_params
    from trainer.features.averages import with_averaged_params as with_averaged_params
    from trainer.features.groups import by_group as by_group
    from trainer.features.groups import group_table as group_table
    from trainer.features.lora import add_lora as add_lora
    from trainer.features.lora import merge_lora as merge_lora
    from trainer.features.summary import summarize as summarize
    from trainer.features.search import find_learning_rate as find_learning_rate
    from trainer.features.search import find_batch_size as find_batch_size
    from trainer.features.sweep import make_sweep as make_sweep
    from trainer.features.sweep import sweep_members as sweep_members
    from trainer.features.debugging import make_check_step as make_check_step
    from trainer.compile.planning import plan as plan
    from trainer.checkpoints.into_model import load_weights as load_weights
    from trainer.checkpoints.exported import export_prediction as export_prediction
    from trainer.callbacks.progress import Progress as Progress
    from trainer.callbacks.early_stopping import EarlyStopping as EarlyStopping
    from trainer.callbacks.model_checkpoint import ModelCheckpoint as ModelCheckpoint
    from trainer.callbacks.plateau import ReduceLROnPlateau as ReduceLROnPlateau
    from trainer.callbacks.small import LearningRateMonitor as LearningRateMonitor
    from trainer.callbacks.small import LambdaCallback as LambdaCallback
    from trainer.callbacks.small import Timer as Timer
    from trainer.callbacks.small import TerminateOnNonFinite as TerminateOnNonFinite
    from trainer.callbacks.small import GenerateSamples as GenerateSamples
    from trainer.callbacks.profilers import JAXProfiler as JAXProfiler
    from trainer.callbacks.profilers import MemoryProfiler as MemoryProfiler
    from trainer.loggers.console import ConsoleLogger as ConsoleLogger
    from trainer.loggers.jsonl import FileLogger as FileLogger
    from trainer.loggers.csv import CSVLogger as CSVLogger
    from trainer.loggers.tensorboard import TensorBoardLogger as TensorBoardLogger
    from trainer.loggers.wandb import WandbLogger as WandbLogger
    from trainer.loggers.mlflow import MLflowLogger as MLflowLogger
    from trainer.loggers.background import InBackground as InBackground
    from trainer.metrics.plots.figure import plot_runs as plot_runs

__getattr__ = _imported_when_used(
    globals(),
    {
        "trainer.features.averages": ("ema_of_params", "polyak_average", "averaged_params", "with_averaged_params"),
        "trainer.features.groups": ("by_group", "group_table"),
        "trainer.features.lora": ("add_lora", "merge_lora"),
        "trainer.features.summary": ("summarize",),
        "trainer.features.search": ("find_learning_rate", "find_batch_size"),
        "trainer.features.sweep": ("make_sweep", "sweep_members"),
        "trainer.features.debugging": ("make_check_step",),
        "trainer.compile.planning": ("plan",),
        "trainer.checkpoints.into_model": ("load_weights",),
        "trainer.checkpoints.exported": ("export_prediction",),
        "trainer.callbacks.progress": ("Progress",),
        "trainer.callbacks.early_stopping": ("EarlyStopping",),
        "trainer.callbacks.model_checkpoint": ("ModelCheckpoint",),
        "trainer.callbacks.plateau": ("ReduceLROnPlateau",),
        "trainer.callbacks.small": (
            "LearningRateMonitor",
            "LambdaCallback",
            "Timer",
            "TerminateOnNonFinite",
            "GenerateSamples",
        ),
        "trainer.callbacks.profilers": ("JAXProfiler", "MemoryProfiler"),
        "trainer.loggers.console": ("ConsoleLogger",),
        "trainer.loggers.jsonl": ("FileLogger",),
        "trainer.loggers.csv": ("CSVLogger",),
        "trainer.loggers.tensorboard": ("TensorBoardLogger",),
        "trainer.loggers.wandb": ("WandbLogger",),
        "trainer.loggers.mlflow": ("MLflowLogger",),
        "trainer.loggers.background": ("InBackground",),
        "trainer.metrics.plots.figure": ("plot_runs",),
    },
)
