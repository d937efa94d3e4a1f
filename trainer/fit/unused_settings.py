"""Warnings of settings that do nothing, since an `optimizer`, a `step_fn` or an argument of `train` overrides them."""

import dataclasses
from typing import Any

from flax import nnx

from trainer.config import TrainingConfig
from trainer.errors import warn


def warn_beside_optimizer(config: TrainingConfig) -> None:
    """Warns of what an `optimizer` replaces. Its name and rate are required, so they may be there for no reason."""
    if config.scheduler is not None and config.scheduler.scheduler_type != "none":
        warn(
            "`training_config.scheduler` does nothing, because an `optimizer` was given; put the schedule into "
            "that one, for example with trainer.make_schedule."
        )
    unused = config.optimizer.hyperparameters()
    if unused:
        names = ", ".join(f"`{name}` ({value!r})" for name, value in unused.items())
        warn(
            f"in `training_config.optimizer` {names} {'does' if len(unused) == 1 else 'do'} nothing, because an "
            f"`optimizer` was given, which has its own."
        )


def warn_beside_own_step(config: TrainingConfig, optimizer: Any, wrt: Any) -> None:
    """Warns of what a `step_fn` and a state replace together: what is trained, and by which optimizer."""
    given = {
        "optimizer": optimizer is not None,
        "wrt": wrt is not nnx.Param,
        "training_config.scheduler": config.scheduler is not None and config.scheduler.scheduler_type != "none",
        "training_config.gradient_clip_norm": config.gradient_clip_norm is not None,
    }
    if unused := [f"`{name}`" for name, is_given in given.items() if is_given]:
        warn(
            f"{', '.join(unused)} {'does' if len(unused) == 1 else 'do'} nothing, because `model` is a state and the "
            f"`step_fn` has an optimizer of its own; put it into that."
        )


def warn_of_overridden(config: TrainingConfig, save_interval: int | None, num_epochs: int, batch_size: int) -> None:
    """Warns of what the configuration says and `train` does not do, because an argument says otherwise."""
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    decided: dict[str, tuple[int | None, str]] = {
        "num_epochs": (num_epochs, "the argument of train()"),
        "batch_size": (batch_size, "the argument of train()"),
        "save_frequency": (save_interval, "`save_interval` of the Trainer"),
    }
    said = [
        f"`{name}` = {getattr(config, name)} ({by} is {value})"
        for name, (value, by) in decided.items()
        if getattr(config, name) not in (defaults[name], value)
    ]
    if said:
        warn(f"train() does not use of `training_config`: {', '.join(said)}.")
