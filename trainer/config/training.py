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
    """How to train: what to optimize with, for how long, and what to save and log.

    Attributes:
        name: A label, logged with the hyperparameters and written into checkpoints.
        metadata: Any plain values; logged and written into checkpoints.
        optimizer: Which optimizer to build, where the Trainer gets none.
        scheduler: Its learning-rate schedule; None keeps the rate constant.
        batch_size: Passed by name to ``train_data_loader`` and ``val_data_loader``, where they are callables that
            take it.
        num_epochs: Epochs of a run by ``train_epoch``; gives the horizon of a schedule there.
        gradient_clip_norm: Gradients of a larger global norm are scaled down to this norm, also with
            an optimizer that the caller passes.
        checkpoint_dir: Where checkpoints go if the Trainer gets no directory.
        save_frequency: ``train_epoch`` saves every ``save_frequency`` steps.
        max_checkpoints: How many checkpoints with default names a run keeps: those that it wrote last.
        log_frequency: Loggers get the training metrics of the first step, of every ``log_frequency``-th, and of the
            last. The history has these rows and more: at least a hundred of a run that has as many steps, all of a
            shorter one; see `trainer.fit.cadence`.
        steps_per_epoch: The most batches of training data in an epoch, None for all. An endless loader needs it; of
            data in memory every epoch draws others.
        validation_steps: The most batches of validation data in a validation, None for all; likewise.
        epochs_per_validation: Validate at the end of every so many epochs, and of the run; None at the end of the run
            only. Beside these, ``train`` validates at multiples of its ``val_interval``.
        use_wandb: Whether to log to Weights & Biases too (the extra ``wandb``).
        wandb_project: The project to log to.
    """

    optimizer: OptimizerConfig
    scheduler: SchedulerConfig | None = None
    batch_size: int = 32
    num_epochs: int = 100
    gradient_clip_norm: float | None = None
    checkpoint_dir: str | Path = "./checkpoints"
    save_frequency: int = 1000
    max_checkpoints: int = 5
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
