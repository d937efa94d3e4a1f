"""Optimizers and schedules of optax, chosen by name from a configuration."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax

from trainer.config.training import OptimizerConfig, SchedulerConfig
from trainer.errors import ConfigError

if TYPE_CHECKING:  # a few types, which are not worth a tenth of the time of the import
    import chex


def make_optimizer(
    config: OptimizerConfig, learning_rate: optax.ScalarOrSchedule | None = None
) -> optax.GradientTransformation:
    """Builds the optax chain ``clip(value) → clip_by_global_norm → optimizer``.

    The hyperparameters go to the optax function of the same name. Where that has no decoupled
    weight decay (adam, sgd, rmsprop, adagrad, radam, nadam), λ = ``weight_decay`` is added to the
    gradient before it: g ← g + λθ.

    Args:
        config: Which optimizer, and its hyperparameters.
        learning_rate: Replaces ``config.learning_rate``, usually by a schedule.

    Raises:
        ConfigError: Never for a valid configuration; they are checked when they are made.
    """
    rate = config.learning_rate if learning_rate is None else learning_rate
    parts: list[optax.GradientTransformation] = []
    if config.gradient_clip_value is not None:
        parts.append(optax.clip(config.gradient_clip_value))
    if config.gradient_clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.gradient_clip_norm))
    if config.weight_decay > 0 and config.optimizer_type not in _DECOUPLED:
        parts.append(optax.add_decayed_weights(config.weight_decay, _decay_mask(config)))
    parts.append(_OPTIMIZERS[config.optimizer_type](config, rate))
    return parts[0] if len(parts) == 1 else optax.chain(*parts)


def make_schedule(config: SchedulerConfig, learning_rate: float, total_steps: int | None = None) -> optax.Schedule:
    """Builds the schedule: a linear warm-up from 0, then, with t steps since and peak η::

        constant     η
        linear       η → ηr over the horizon           (r = min_lr_ratio)
        cosine       ηr + η(1-r)·(1 + cos(πt/T))/2
        polynomial   ηr + η(1-r)·(1 - t/T)^power
        exponential  max(η·decay_rate^(t/decay_steps), ηr)
        step         max(η·gamma^⌊t/step_size⌋, ηr)
        multistep    max(η·gamma^(milestones passed), ηr), milestones counted from the run's start
        cyclic       ηr → η over half a cycle and back, again and again
        one_cycle    ηr → η linearly over the first 30 % (or `warmup_steps`), then cosine to ηr

    Args:
        config: Which schedule. Its horizon is ``config.total_steps`` (or ``cycle_length``).
        learning_rate: η.
        total_steps: The horizon where the configuration leaves it out: the last step of the run.

    Example:
        >>> warm = SchedulerConfig(scheduler_type="linear", warmup_steps=2)
        >>> [float(make_schedule(warm, 1.0, total_steps=6)(step)) for step in range(7)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]

    Raises:
        ConfigError: The schedule needs a horizon and neither names one, or it is over before the
            warm-up is.
    """
    peak, floor = learning_rate, learning_rate * config.min_lr_ratio
    horizon = _horizon(config, total_steps)
    if config.scheduler_type == "one_cycle":
        rise = config.warmup_steps or int(0.3 * horizon)
        return optax.warmup_cosine_decay_schedule(floor, peak, rise, horizon, floor)
    after = _SCHEDULES[config.scheduler_type](config, peak, floor, horizon - config.warmup_steps)
    if config.warmup_steps == 0:
        return after
    rise = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([rise, after], [config.warmup_steps])


def needs_horizon(config: SchedulerConfig) -> bool:
    """Tells whether the schedule depends on a length of the run that the configuration leaves out."""
    horizons = {"linear", "cosine", "polynomial", "cyclic", "one_cycle"}
    given = config.total_steps or config.cycle_length
    return config.scheduler_type in horizons and given is None


def _horizon(config: SchedulerConfig, total_steps: int | None) -> int:
    given = config.total_steps or (None if config.scheduler_type == "cyclic" else config.cycle_length)
    horizon = given or total_steps
    if needs_horizon(config) and horizon is None:
        raise ConfigError(
            f"`SchedulerConfig.total_steps` is left out and the length of the run is not known here; set it, "
            f"or set `TrainingConfig.steps_per_epoch`. The schedule {config.scheduler_type!r} needs to know "
            f"when it ends."
        )
    horizon = horizon or config.warmup_steps + 1
    if needs_horizon(config) and horizon <= config.warmup_steps:
        raise ConfigError(
            f"`SchedulerConfig.warmup_steps` is {config.warmup_steps}, but the run ends after {horizon} steps; "
            f"it must be shorter than the run."
        )
    return horizon


def _decay_mask(config: OptimizerConfig) -> Callable[[chex.ArrayTree], Any] | None:
    if not config.decay_mask:
        return None
    return lambda params: jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, params)


def _adam(function: Callable[..., Any], **more: Any) -> Callable[..., optax.GradientTransformation]:
    def build(config: OptimizerConfig, rate: Any) -> optax.GradientTransformation:
        return function(rate, b1=config.beta1, b2=config.beta2, eps=config.eps, **more)

    return build


def _adam_decoupled(function: Callable[..., Any]) -> Callable[..., optax.GradientTransformation]:
    def build(config: OptimizerConfig, rate: Any) -> optax.GradientTransformation:
        decay = {"weight_decay": config.weight_decay, "mask": _decay_mask(config)}
        return _adam(function, **decay)(config, rate)

    return build


def _sgd(config: OptimizerConfig, rate: Any) -> optax.GradientTransformation:
    # `momentum=0.0` would keep a velocity the size of the model for nothing.
    return optax.sgd(rate, momentum=config.momentum or None, nesterov=config.nesterov)


def _rmsprop(config: OptimizerConfig, rate: Any) -> optax.GradientTransformation:
    return optax.rmsprop(
        rate,
        decay=config.beta2,
        eps=config.eps,
        initial_scale=config.initial_accumulator_value,
        momentum=config.momentum or None,
        nesterov=config.nesterov,
    )


def _adagrad(config: OptimizerConfig, rate: Any) -> optax.GradientTransformation:
    return optax.adagrad(rate, initial_accumulator_value=config.initial_accumulator_value, eps=config.eps)


def _lion(config: OptimizerConfig, rate: Any) -> optax.GradientTransformation:
    return optax.lion(
        rate,
        b1=config.beta1,
        b2=config.beta2,
        weight_decay=config.weight_decay,
        mask=_decay_mask(config),
    )


def _adafactor(config: OptimizerConfig, rate: Any) -> optax.GradientTransformation:
    return optax.adafactor(
        rate,
        momentum=config.momentum or None,
        weight_decay_rate=config.weight_decay or None,
        weight_decay_mask=_decay_mask(config),
    )


def _muon(config: OptimizerConfig, rate: Any) -> optax.GradientTransformation:
    return optax.contrib.muon(
        rate,
        beta=config.momentum or 0.95,
        weight_decay=config.weight_decay,
        weight_decay_mask=_decay_mask(config),
        adam_b1=config.beta1,
        adam_b2=config.beta2,
        eps=config.eps,
        # Muon's own mask does not reach the leaves that it leaves to Adam: biases, norms, convolutions.
        adam_weight_decay=0.0 if config.decay_mask else config.weight_decay,
    )


_OPTIMIZERS: dict[str, Callable[[OptimizerConfig, Any], optax.GradientTransformation]] = {
    "adam": _adam(optax.adam),
    "adamw": _adam_decoupled(optax.adamw),
    "sgd": _sgd,
    "rmsprop": _rmsprop,
    "adagrad": _adagrad,
    "lamb": _adam_decoupled(optax.lamb),
    "radam": _adam(optax.radam),
    "nadam": _adam(optax.nadam),
    "lion": _lion,
    "adafactor": _adafactor,
    "muon": _muon,
}

_DECOUPLED = frozenset({"adamw", "lamb", "lion", "adafactor", "muon"})


def _constant(config: SchedulerConfig, peak: float, floor: float, steps: int) -> optax.Schedule:
    del config, floor, steps
    return optax.constant_schedule(peak)


def _linear(config: SchedulerConfig, peak: float, floor: float, steps: int) -> optax.Schedule:
    del config
    return optax.linear_schedule(peak, floor, steps)


def _cosine(config: SchedulerConfig, peak: float, floor: float, steps: int) -> optax.Schedule:
    del floor
    return optax.cosine_decay_schedule(peak, steps, alpha=config.min_lr_ratio)


def _polynomial(config: SchedulerConfig, peak: float, floor: float, steps: int) -> optax.Schedule:
    return optax.polynomial_schedule(peak, floor, config.power, steps)


def _exponential(config: SchedulerConfig, peak: float, floor: float, steps: int) -> optax.Schedule:
    del steps
    decay = optax.exponential_decay(peak, config.decay_steps, config.decay_rate)
    return _not_below(floor, decay)


def _step(config: SchedulerConfig, peak: float, floor: float, steps: int) -> optax.Schedule:
    del steps
    return _not_below(floor, optax.exponential_decay(peak, config.step_size, config.gamma, staircase=True))


def _multistep(config: SchedulerConfig, peak: float, floor: float, steps: int) -> optax.Schedule:
    del steps
    drops = {milestone - config.warmup_steps: config.gamma for milestone in config.milestones}
    return _not_below(floor, optax.piecewise_constant_schedule(peak, drops))


def _cyclic(config: SchedulerConfig, peak: float, floor: float, steps: int) -> optax.Schedule:
    length = config.cycle_length or steps
    half = max(length // 2, 1)
    rise = optax.linear_schedule(floor, peak, half)
    fall = optax.linear_schedule(peak, floor, max(length - half, 1))
    triangle = optax.join_schedules([rise, fall], [half])
    return lambda count: triangle(count % length)


def _not_below(floor: float, schedule: optax.Schedule) -> optax.Schedule:
    return (lambda count: jnp.maximum(schedule(count), floor)) if floor > 0 else schedule


_SCHEDULES: dict[str, Callable[[SchedulerConfig, float, float, int], optax.Schedule]] = {
    "constant": _constant,
    "linear": _linear,
    "cosine": _cosine,
    "polynomial": _polynomial,
    "exponential": _exponential,
    "step": _step,
    "multistep": _multistep,
    "cyclic": _cyclic,
}
