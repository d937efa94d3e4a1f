"""The configuration of a training run."""

import dataclasses
from pathlib import Path

from trainer.config.base import Config as Config
from trainer.config.optimizers import OPTIMIZER_FIELDS as OPTIMIZER_FIELDS
from trainer.config.optimizers import OptimizerConfig as OptimizerConfig
from trainer.config.schedules import SCHEDULER_FIELDS as SCHEDULER_FIELDS
from trainer.config.schedules import SchedulerConfig as SchedulerConfig
from trainer.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingConfig(Config):
    """How to train: the optimizer, the duration, and what to save and log.

    Attributes:
        name: A label, logged with the hyperparameters and stored in checkpoints.
        metadata: Any plain values; logged and stored in checkpoints.
        optimizer: The optimizer to build, if the Trainer is not given one.
        scheduler: Its learning-rate schedule; None keeps the rate constant.
        batch_size: Passed by name to ``train_data_loader`` and ``val_data_loader``, if they are callables that
            take it.
        num_epochs: Epochs of a run with ``train_epoch``; sets the horizon of its schedule.
        gradient_clip_norm: Gradients with a larger global norm are scaled down to this norm, including with
            an optimizer passed by the caller. It comes first, also before ``gradient_clip_value`` of the optimizer.
        checkpoint_dir: The checkpoint directory, if the Trainer is not given one. Another than the default also asks
            for saves at the end of a run. The default, written out, does not: equal configurations do the same, and a
            file made by `to_yaml` holds all fields, given or not.
        save_frequency: ``train_epoch`` saves every ``save_frequency`` steps; the default only into a directory that
            was given, or with ``resume``.
        max_checkpoints: How many checkpoints with default names to keep per run: the last ones written; None keeps all.
        log_frequency: Loggers get the training metrics of the first step, every ``log_frequency``-th step, and the
            last. The history has these rows and more: at least a hundred, or all if the run has fewer steps;
            see `trainer.fit.cadence`.
        steps_per_epoch: The maximum number of training batches per epoch, None for all. An endless loader needs it;
            with in-memory data, each epoch draws different ones.
        validation_steps: The maximum number of batches per validation, None for all. An endless loader needs it.
        epochs_per_validation: Validate at the end of every n-th epoch and of the run; None: only at the end of the
            run. ``train`` also validates at multiples of its ``val_interval``.
        use_wandb: Whether to also log to Weights & Biases (the extra ``wandb``).
        wandb_project: The project to log to.
    """

    optimizer: OptimizerConfig
    scheduler: SchedulerConfig | None = None
    batch_size: int = 32
    num_epochs: int = 100
    gradient_clip_norm: float | None = None
    checkpoint_dir: str | Path = "./checkpoints"
    save_frequency: int = 1000
    max_checkpoints: int | None = 5
    log_frequency: int = 100
    steps_per_epoch: int | None = None
    validation_steps: int | None = None
    epochs_per_validation: int | None = 1
    use_wandb: bool = False
    wandb_project: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive(
            "batch_size",
            "num_epochs",
            "gradient_clip_norm",
            "save_frequency",
            "max_checkpoints",
            "log_frequency",
            "steps_per_epoch",
            "validation_steps",
            "epochs_per_validation",
        )
        if self.gradient_clip_norm is not None and self.optimizer.gradient_clip_norm is not None:
            raise ConfigError(
                f"`gradient_clip_norm` is set twice, in TrainingConfig ({self.gradient_clip_norm}) and in "
                f"its optimizer ({self.optimizer.gradient_clip_norm}); keep one of them."
            )
        if self.wandb_project is not None:
            self._require("wandb_project", "left out unless `use_wandb` is true", self.use_wandb)
