"""Configurations that several tests start from."""

from trainer import ExtensionConfig, OptimizerConfig, SchedulerConfig, TrainingConfig

ADAM = OptimizerConfig(optimizer_type="adam", learning_rate=1e-3)
MINIMAL = {
    OptimizerConfig: {"optimizer_type": "adam", "learning_rate": 1e-3},
    SchedulerConfig: {"scheduler_type": "constant"},
    TrainingConfig: {"optimizer": ADAM},
    ExtensionConfig: {},
}
FULL = TrainingConfig(
    name="full",
    optimizer=OptimizerConfig(optimizer_type="sgd", learning_rate=0.5, momentum=0.9, nesterov=True),
    scheduler=SchedulerConfig(scheduler_type="multistep", milestones=(10, 20), gamma=0.5, warmup_steps=3),
    gradient_clip_norm=1.0,
    steps_per_epoch=7,
    validation_steps=2,
    epochs_per_validation=None,
    use_wandb=True,
    wandb_project="project",
    metadata={"seed": 3, "tags": ["a", "b"], "nested": {"rate": 1e-3, "none": None}},
)


def optimizer(**changes):
    return OptimizerConfig(**{**MINIMAL[OptimizerConfig], **changes})


def scheduler(scheduler_type, **changes):
    return SchedulerConfig(scheduler_type=scheduler_type, **changes)


def training(**changes):
    return TrainingConfig(**{"optimizer": ADAM, **changes})
