"""Optax optimizers by name: their configuration and construction."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainer.config.base import Config


class _Optimizer(NamedTuple):
    """A row of the registry.

    Attributes:
        build: Takes the learning rate, and the names in ``arguments`` as keywords.
        arguments: The fields of `OptimizerConfig` that the optimizer reads besides ``weight_decay``,
            each with the name of its argument of ``build``.
        decoupled: Whether the optimizer has its own weight decay: ``build`` then also takes
            ``weight_decay`` and ``mask``.
    """

    build: Callable[..., optax.GradientTransformation]
    arguments: Mapping[str, str]
    decoupled: bool = False


def _adafactor(rate: Any, *, weight_decay: float, mask: Any, **more: Any) -> optax.GradientTransformation:
    return optax.adafactor(rate, weight_decay_rate=weight_decay or None, weight_decay_mask=mask, **more)


def _muon(rate: Any, *, weight_decay: float, mask: Any, **more: Any) -> optax.GradientTransformation:
    # Muon leaves biases, norms and convolutions to Adam, which ignores muon's mask.
    adam = 0.0 if mask else weight_decay
    return optax.contrib.muon(rate, weight_decay=weight_decay, weight_decay_mask=mask, adam_weight_decay=adam, **more)


_ADAM = {"beta1": "b1", "beta2": "b2", "eps": "eps"}
_MOMENTUM = {"momentum": "momentum", "nesterov": "nesterov"}

_OPTIMIZERS = {
    "adam": _Optimizer(optax.adam, _ADAM),
    "adamw": _Optimizer(optax.adamw, _ADAM, decoupled=True),
    "sgd": _Optimizer(optax.sgd, _MOMENTUM),
    "rmsprop": _Optimizer(
        optax.rmsprop,
        {"beta2": "decay", "eps": "eps", "initial_accumulator_value": "initial_scale", **_MOMENTUM},
    ),
    "adagrad": _Optimizer(optax.adagrad, {"eps": "eps", "initial_accumulator_value": "initial_accumulator_value"}),
    "lamb": _Optimizer(optax.lamb, _ADAM, decoupled=True),
    "radam": _Optimizer(optax.radam, _ADAM),
    "nadam": _Optimizer(optax.nadam, _ADAM),
    "lion": _Optimizer(optax.lion, {"beta1": "b1", "beta2": "b2"}, decoupled=True),
    "adafactor": _Optimizer(_adafactor, {"momentum": "momentum"}, decoupled=True),
    "muon": _Optimizer(
        _muon, {"momentum": "beta", "beta1": "adam_b1", "beta2": "adam_b2", "eps": "eps"}, decoupled=True
    ),
}

OPTIMIZER_FIELDS: dict[str, frozenset[str]] = {
    name: frozenset({*row.arguments, "weight_decay"}) for name, row in _OPTIMIZERS.items()
}
"""Each optimizer with the fields it reads, in addition to those that all read (rate, clipping)."""

# Configurations of the reference, and files from before None was the default, hold these values for
# every optimizer. If an optimizer does not read the field, the value is kept rather than refused.
_REFERENCE_DEFAULTS = {
    "beta1": 0.9,
    "beta2": 0.999,
    "eps": 1e-8,
    "momentum": 0.0,
    "initial_accumulator_value": 0.1,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig(Config):
    """An optax optimizer by name, with its hyperparameters.

    A hyperparameter set to None takes optax's default for that optimizer (``beta2`` is 0.999 for
    adam, 0.99 for lion, 0.9 for rmsprop). A value that the optimizer does not read is refused,
    unless it is the default of the reference's configurations.

    Example:
        >>> OptimizerConfig(optimizer_type="adam", learning_rate=1e-3, momentum=0.9)
        Traceback (most recent call last):
        trainer.errors.ConfigError: `OptimizerConfig.momentum` is 0.9, but 'adam' does not read it, ...

    Attributes:
        optimizer_type: A key of `OPTIMIZER_FIELDS`.
        learning_rate: The learning rate, or the peak of the schedule.
        weight_decay: λ; 0 disables decay for every optimizer. Decoupled for adamw, lamb, lion,
            adafactor and muon; otherwise added to the gradient (L2). All but adafactor multiply it by
            the learning rate.
        beta1: Decay rate of the first moment.
        beta2: Decay rate of the second moment; for rmsprop, of the mean square.
        eps: Added to denominators.
        momentum: For sgd, rmsprop, adafactor (None is no momentum) and muon (None is 0.95). 0 is no
            momentum, for muon too.
        nesterov: Whether sgd and rmsprop use Nesterov momentum.
        initial_accumulator_value: The initial value of the accumulators of adagrad (None is 0.1) and
            rmsprop (None is 0).
        gradient_clip_norm: Gradients with a larger global norm are scaled down to this norm.
        gradient_clip_value: Every entry is clipped to ± this value, before ``gradient_clip_norm`` of this class, and
            after that of `TrainingConfig`.
        decay_mask: Decay only leaves with at least two dimensions, so neither biases nor norm scales;
            with muon, only the matrices that muon itself updates.
    """

    optimizer_type: str
    learning_rate: float
    weight_decay: float = 0.0
    beta1: float | None = None
    beta2: float | None = None
    eps: float | None = None
    momentum: float | None = None
    nesterov: bool = False
    initial_accumulator_value: float | None = None
    gradient_clip_norm: float | None = None
    gradient_clip_value: float | None = None
    decay_mask: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._positive("learning_rate", "eps", "gradient_clip_norm", "gradient_clip_value")
        for field in ("beta1", "beta2", "momentum"):
            self._require(field, "at least 0 and less than 1", 0 <= (getattr(self, field) or 0) < 1)
        for field in ("weight_decay", "initial_accumulator_value"):
            self._require(field, "zero or more, and finite", 0 <= (getattr(self, field) or 0) < math.inf)
        self._refuse_unread("optimizer_type", OPTIMIZER_FIELDS, _REFERENCE_DEFAULTS)
        self._require("decay_mask", "False while `weight_decay` is 0", not self.decay_mask or self.weight_decay > 0)
        self._require("nesterov", "False while `momentum` is 0", not self.nesterov or bool(self.momentum))

    def hyperparameters(self) -> dict[str, Any]:
        """Returns the hyperparameters, except the rate, that differ from our and the reference's defaults."""
        plain = {*(field.name for field in dataclasses.fields(Config)), "optimizer_type", "learning_rate"}
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(OptimizerConfig)  # a subclass's own fields are for its caller
            if field.name not in plain
            and getattr(self, field.name) not in (field.default, _REFERENCE_DEFAULTS.get(field.name))
        }


def make_optimizer(
    config: OptimizerConfig, learning_rate: optax.ScalarOrSchedule | None = None
) -> optax.GradientTransformation:
    """Returns the optax chain ``clip(value) → clip_by_global_norm → optimizer``.

    Hyperparameters go to the optax function of the same name, which keeps its default for a None.
    If that function has no decoupled weight decay (adam, sgd, rmsprop, adagrad, radam, nadam),
    λ = ``weight_decay`` is added to the gradient before it: g ← g + λθ.

    Args:
        config: The optimizer and its hyperparameters.
        learning_rate: Replaces ``config.learning_rate``, usually with a schedule.
    """
    optimizer = _OPTIMIZERS[config.optimizer_type]
    arguments = {argument: getattr(config, field) for field, argument in optimizer.arguments.items()}
    arguments = {argument: value for argument, value in arguments.items() if value is not None}
    # With `momentum=0.0`, optax keeps a velocity as large as the model, only to multiply it by zero.
    if arguments.get("momentum") == 0:
        del arguments["momentum"]
    mask = _at_least_two_dimensional if config.decay_mask else None
    parts: list[optax.GradientTransformation] = []
    if config.gradient_clip_value is not None:
        parts.append(optax.clip(config.gradient_clip_value))
    if config.gradient_clip_norm is not None:
        parts.append(optax.clip_by_global_norm(config.gradient_clip_norm))
    if optimizer.decoupled:
        arguments |= {"weight_decay": config.weight_decay, "mask": mask}
    elif config.weight_decay > 0:
        parts.append(optax.add_decayed_weights(config.weight_decay, mask))
    rate = config.learning_rate if learning_rate is None else learning_rate
    parts.append(optimizer.build(rate, **arguments))
    return parts[0] if len(parts) == 1 else optax.chain(*parts)


def _at_least_two_dimensional(params: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.ndim(leaf) > 1, params)
