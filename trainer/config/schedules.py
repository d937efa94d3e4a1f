"""Learning-rate schedules by name: their configuration and construction."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from trainer.config.base import Config
from trainer.errors import ConfigError

# A number of steps: a Python int, or an int32 scalar passed to a compiled step.
_Steps = Any


def _at_least(least: int, steps: _Steps) -> _Steps:
    # A Python int stays an int, so that a schedule can be built before JAX initializes its devices.
    return jnp.maximum(steps, least) if isinstance(steps, jax.Array) else max(steps, least)


def _stretched(schedule: optax.Schedule, steps: _Steps) -> optax.Schedule:
    """Returns a schedule over [0, 1], stretched to ``steps``.

    Optax's constructors compare their number of steps with 0 in Python, which fails for a traced
    number. So they get 1 step, and the count is divided instead.
    """
    return lambda count: schedule(count / steps)


def _constant(config: "SchedulerConfig", peak: float, floor: float, steps: _Steps) -> optax.Schedule:
    del config, floor, steps
    return optax.constant_schedule(peak)


def _linear(config: "SchedulerConfig", peak: float, floor: float, steps: _Steps) -> optax.Schedule:
    del config
    return _stretched(optax.linear_schedule(peak, floor, 1), steps)


def _cosine(config: "SchedulerConfig", peak: float, floor: float, steps: _Steps) -> optax.Schedule:
    del floor
    alpha = config.min_lr_ratio

    # As in `optax.cosine_decay_schedule`. Near the end 1 + cos cancels, so dividing the count first,
    # as in `_stretched`, would round to a rate that differs from optax's in the fifth digit.
    def schedule(count: Any) -> Any:
        fall = 0.5 * (1 + jnp.cos(jnp.pi * jnp.minimum(count, steps) / steps))
        return peak * ((1 - alpha) * fall + alpha)

    return schedule


def _polynomial(config: "SchedulerConfig", peak: float, floor: float, steps: _Steps) -> optax.Schedule:
    return _stretched(optax.polynomial_schedule(peak, floor, config.power, 1), steps)


def _exponential(config: "SchedulerConfig", peak: float, floor: float, steps: _Steps) -> optax.Schedule:
    del steps
    return _not_below(floor, optax.exponential_decay(peak, config.decay_steps, config.decay_rate))


def _step(config: "SchedulerConfig", peak: float, floor: float, steps: _Steps) -> optax.Schedule:
    del steps
    return _not_below(floor, optax.exponential_decay(peak, config.step_size, config.gamma, staircase=True))


def _multistep(config: "SchedulerConfig", peak: float, floor: float, steps: _Steps) -> optax.Schedule:
    del steps
    drops = {milestone - config.warmup_steps: config.gamma for milestone in config.milestones}
    return _not_below(floor, optax.piecewise_constant_schedule(peak, drops))


def _cyclic(config: "SchedulerConfig", peak: float, floor: float, steps: _Steps) -> optax.Schedule:
    length = config.cycle_length or steps
    half = _at_least(1, length // 2)
    rise = _stretched(optax.linear_schedule(floor, peak, 1), half)
    fall = _stretched(optax.linear_schedule(peak, floor, 1), _at_least(1, length - half))
    triangle = optax.join_schedules([rise, fall], [half])
    return lambda count: triangle(count % length)


def _not_below(floor: float, schedule: optax.Schedule) -> optax.Schedule:
    return (lambda count: jnp.maximum(schedule(count), floor)) if floor > 0 else schedule


_Builder = Callable[["SchedulerConfig", float, float, _Steps], optax.Schedule]
_WARMUP = frozenset({"warmup_steps"})
_FLOOR = _WARMUP | {"min_lr_ratio"}
_HORIZON = _FLOOR | {"total_steps"}

# Each schedule with the fields that it reads, and the function that builds the part after the warm-up
# from the configuration, the peak, the floor and the number of steps left.
_SCHEDULES: dict[str, tuple[_Builder, frozenset[str]]] = {
    "none": (_constant, frozenset()),
    "constant": (_constant, _WARMUP),
    "linear": (_linear, _HORIZON),
    "cosine": (_cosine, _HORIZON | {"cycle_length"}),
    "exponential": (_exponential, _FLOOR | {"decay_rate", "decay_steps"}),
    "polynomial": (_polynomial, _HORIZON | {"power"}),
    "step": (_step, _FLOOR | {"step_size", "gamma"}),
    "multistep": (_multistep, _FLOOR | {"milestones", "gamma"}),
    "cyclic": (_cyclic, _HORIZON | {"cycle_length"}),
    "one_cycle": (_cosine, _HORIZON),
}

SCHEDULER_FIELDS: dict[str, frozenset[str]] = {name: fields for name, (_, fields) in _SCHEDULES.items()}
"""Each schedule with the fields it reads."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SchedulerConfig(Config):
    """A learning-rate schedule by name; see `make_schedule` for the formulas.

    An omitted horizon (``total_steps``, ``cycle_length``) defaults to the length of the run.

    Attributes:
        scheduler_type: A key of `SCHEDULER_FIELDS`.
        warmup_steps: Steps of linear warm-up from zero, before the schedule proper.
        min_lr_ratio: The floor, as a fraction of the learning rate.
        cycle_length: Steps per cycle for cyclic; the horizon for cosine.
        decay_rate: The factor of exponential per ``decay_steps``.
        decay_steps: Steps over which exponential multiplies by ``decay_rate``.
        total_steps: The step at which the schedule ends, including warm-up.
        step_size: Steps between two drops of step.
        gamma: The factor of each drop of step and multistep.
        milestones: The steps at which multistep drops, counted from the start of the run.
        power: The exponent of polynomial; 1 is linear.
    """

    scheduler_type: str
    warmup_steps: int = 0
    min_lr_ratio: float = 0.0
    cycle_length: int | None = None
    decay_rate: float = 0.95
    decay_steps: int = 1000
    total_steps: int | None = None
    step_size: int = 1000
    gamma: float = 0.1
    milestones: tuple[int, ...] = ()
    power: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._require("warmup_steps", "zero or more", self.warmup_steps >= 0)
        self._within("min_lr_ratio", 0, 1)
        self._positive("cycle_length", "decay_rate", "decay_steps", "total_steps", "step_size", "gamma", "power")
        self._within("decay_rate", 0, 1)
        self._within("gamma", 0, 1)
        self._refuse_unread("scheduler_type", SCHEDULER_FIELDS)
        if self.scheduler_type == "none":
            return  # no field is read, so none can conflict
        ascending = all(a < b for a, b in zip(self.milestones, self.milestones[1:], strict=False))
        late = all(milestone > self.warmup_steps for milestone in self.milestones)
        self._require("milestones", "ascending, and later than `warmup_steps`", ascending and late)
        if self.scheduler_type == "multistep":
            self._require("milestones", "at least one step", bool(self.milestones))
        if self.cycle_length is not None:
            self._require("cycle_length", "at least 2", self.cycle_length >= 2)
            self._require("total_steps", "left out where `cycle_length` is given", self.total_steps is None)
        if self.scheduler_type == "cosine" and self.cycle_length is not None:
            self._require("cycle_length", "more than `warmup_steps`", self.cycle_length > self.warmup_steps)
        if self.total_steps is not None:
            self._require("total_steps", "more than `warmup_steps`", self.total_steps > self.warmup_steps)


def make_schedule(
    config: SchedulerConfig, learning_rate: float, total_steps: int | jax.Array | None = None
) -> optax.Schedule:
    """Returns the schedule: a linear warm-up from 0, then, for peak η and t steps after the warm-up::

        constant     η                                 (also `none`, which reads nothing)
        linear       η → ηr over the horizon           (r = min_lr_ratio)
        cosine       ηr + η(1-r)·(1 + cos(πt/T))/2
        polynomial   ηr + η(1-r)·(1 - t/T)^power
        exponential  max(η·decay_rate^(t/decay_steps), ηr)
        step         max(η·gamma^⌊t/step_size⌋, ηr)
        multistep    max(η·gamma^(milestones passed), ηr), milestones counted from the run's start
        cyclic       ηr → η over half a cycle and back, repeatedly
        one_cycle    ηr → η linearly over the first 30 % (or `warmup_steps`), then cosine to ηr

    Args:
        config: The schedule. Its horizon is ``config.total_steps`` (or ``cycle_length``).
        learning_rate: η.
        total_steps: The horizon if the configuration omits it: the last step of the run. An int is
            checked by `check_horizon`. A JAX scalar is not: it may be an argument of a compiled
            step, which then serves runs of any length.

    Example:
        >>> warm = SchedulerConfig(scheduler_type="linear", warmup_steps=2)
        >>> [float(make_schedule(warm, 1.0, total_steps=6)(step)) for step in range(7)]
        [0.0, 0.5, 1.0, 0.75, 0.5, 0.25, 0.0]

    Raises:
        ConfigError: As in `check_horizon`, unless ``total_steps`` is a JAX array.
    """
    if not isinstance(total_steps, jax.Array):
        check_horizon(config, total_steps)
    build, read = _SCHEDULES[config.scheduler_type]
    if not read:
        return build(config, learning_rate, 0.0, 0)
    peak, floor, warmup = learning_rate, learning_rate * config.min_lr_ratio, config.warmup_steps
    # For cyclic, `cycle_length` is a period, not an end.
    given = config.total_steps or (None if config.scheduler_type == "cyclic" else config.cycle_length)
    last = total_steps if given is None else given
    # Leave at least one step after the warm-up, to avoid division by zero even in a run of no steps.
    horizon = _at_least(warmup + 1, 0 if last is None else last)
    if config.scheduler_type == "one_cycle":
        start, rise_steps = floor, warmup or 3 * horizon // 10
    elif warmup:
        start, rise_steps = 0.0, warmup
    else:
        return build(config, peak, floor, horizon)
    rise = _stretched(optax.linear_schedule(start, peak, 1), _at_least(1, rise_steps))
    after = build(config, peak, floor, horizon - rise_steps)
    return optax.join_schedules([rise, after], [rise_steps])


def needs_horizon(config: SchedulerConfig) -> bool:
    """Tells whether the schedule depends on the length of the run because the configuration omits it."""
    given = config.total_steps or config.cycle_length
    return "total_steps" in SCHEDULER_FIELDS[config.scheduler_type] and given is None


def check_horizon(config: SchedulerConfig, total_steps: int | None) -> None:
    """Checks that the schedule fits a run of ``total_steps``; None means unknown.

    Raises:
        ConfigError: The schedule needs a horizon that is unknown, or the run ends before the
            warm-up does.
    """
    if not needs_horizon(config):
        return
    if total_steps is None:
        raise ConfigError(
            f"`SchedulerConfig.total_steps` is left out and the length of the run is not known here; set it, "
            f"or set `TrainingConfig.steps_per_epoch`. The schedule {config.scheduler_type!r} needs to know "
            f"when it ends."
        )
    if 0 < total_steps <= config.warmup_steps:  # a run of no steps needs no rate
        raise ConfigError(
            f"`SchedulerConfig.warmup_steps` is {config.warmup_steps}, but the run ends after {total_steps} steps; "
            f"it must be shorter than the run."
        )
