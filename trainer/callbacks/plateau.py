"""`ReduceLROnPlateau`: reduces the learning rate when a metric stops improving."""

import functools
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from trainer.callbacks.base import flatten
from trainer.callbacks.monitor import Checking, Monitor
from trainer.core.checks import check_count
from trainer.core.other_names import takes_no
from trainer.errors import ArgumentError


class ReduceLROnPlateau(Checking):
    """Multiplies the learning rate by ``factor`` when a metric has not improved for ``patience`` checks in a row.

    The rule is that of `optax.contrib.reduce_on_plateau`, fed with the metric: ``val_<name>`` at every validation, any
    other metric at the end of every epoch. The trainer chains the scaling after its optimizer, whichever that is, so it
    multiplies the updates; its scale and counts are saved in checkpoints as part of the optimizer state.
    `LearningRateMonitor` and ``report=["learning_rate"]`` report the rate after scaling::

        Trainer(model, config, loss_fn=loss_fn, callbacks=[ReduceLROnPlateau("val_loss", patience=3)])

    Args:
        monitor: The metric.
        mode: "min" or "max": whether smaller or larger values are better.
        factor: The factor for the rate, between 0 and 1.
        patience: The number of checks in a row without an improvement.
        min_delta: An improvement must exceed the best value by more than this.
        cooldown: The number of checks to ignore after a reduction.
        min_lr: The lower bound of the rate, for an optimizer named in the configuration.
        min_scale: The same as a fraction of the initial rate, for any optimizer.

    Attributes:
        optimizer_part: The transformation that ``Trainer(callbacks=[...])`` chains after its optimizer.

    Raises:
        ArgumentError: An argument is invalid; at the start of a run, if the run cannot measure the metric or the
            trainer was created without this callback.
    """

    @takes_no("ReduceLROnPlateau")
    def __init__(
        self,
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        factor: float = 0.1,
        patience: int = 10,
        min_delta: float = 1e-4,
        cooldown: int = 0,
        *,
        min_lr: float = 0.0,
        min_scale: float = 0.0,
    ) -> None:
        self._monitor = Monitor(monitor, mode)
        if not 0 < factor < 1:
            raise ArgumentError(f"`factor` is {factor!r}; it must be between 0 and 1.")
        for name, value in {"min_delta": min_delta, "min_lr": min_lr, "min_scale": min_scale}.items():
            if not 0 <= value < float("inf"):
                raise ArgumentError(f"`{name}` is {value!r}; it must be zero or more, and finite.")
        patience = check_count(patience, "patience", otherwise="; 1 reduces at the first check without an improvement")
        cooldown = cooldown and check_count(cooldown, "cooldown")
        # optax requires a nonzero tolerance; this one is below any difference of two numbers.
        atol = max(float(min_delta), float(np.finfo(np.float32).tiny))
        self._settings: dict[str, Any] = {
            "factor": factor,
            "patience": patience,
            "rtol": 0.0,
            "atol": atol,
            "cooldown": cooldown,
        }
        self._min_lr, self._min_scale = float(min_lr), float(min_scale)
        self.optimizer_part = _scaling(self._settings)

    def on_train_begin(self, trainer: Any) -> None:
        self._monitor.check_run(trainer)
        self._state_in(trainer)
        if self._min_lr and trainer.setup.given_optimizer is not None:
            raise ArgumentError(
                "`min_lr` needs an optimizer of the configuration; set `min_scale`, a part of its rate."
            )

    def _check(self, trainer: Any, logs: Mapping[str, float]) -> None:
        value = -self._monitor.rank(self._monitor.read(logs))
        floor = max(self._min_scale, self._min_lr / trainer.training_config.optimizer.learning_rate)
        rule = optax.contrib.reduce_on_plateau(**self._settings, min_scale=floor)
        before = self._state_in(trainer)
        _, after = rule.update({}, optax.contrib.ReduceLROnPlateauState(*before), value=value)
        # Updating the rule on the host may change dtypes, but the step was compiled for the old ones.
        after = _PlateauScale(*(jnp.asarray(new, old.dtype) for new, old in zip(after, before, strict=True)))
        nodes, structure = jax.tree.flatten(trainer.opt_state, is_leaf=_is_scale)
        nodes[self._place_in(trainer, nodes)] = after
        trainer.state = trainer.state.replace(opt_state=jax.tree.unflatten(structure, nodes))
        was, now = float(before.scale), float(after.scale)
        if now < was:
            said = f"{self._monitor.name} has not improved for {self._settings['patience']} checks"
            trainer.loggers.log_text("learning_rate", f"{said}: the learning rate is {now / was:.3g} times what it was")

    def _state_in(self, trainer: Any) -> Any:
        nodes = jax.tree.leaves(trainer.opt_state, is_leaf=_is_scale)
        return nodes[self._place_in(trainer, nodes)]

    def _place_in(self, trainer: Any, nodes: list[Any]) -> int:
        """Returns the index of this callback's state among the nodes of the optimizer state."""
        places = [index for index, node in enumerate(nodes) if _is_scale(node)]
        own = [one for one in flatten([trainer.callbacks]) if isinstance(one, ReduceLROnPlateau)]
        if len(own) != len(places) or all(one is not self for one in own):
            raise ArgumentError(
                "ReduceLROnPlateau puts a scale behind the optimizer, so it has to be among the `callbacks` that the "
                "Trainer is made with."
            )
        return places[next(index for index, one in enumerate(own) if one is self)]


class _PlateauScale(optax.contrib.ReduceLROnPlateauState):  # type: ignore[misc]
    """The state of a scale decided on the host, as opposed to one decided in the step."""


def _scaling(settings: Mapping[str, Any]) -> optax.GradientTransformation:
    return optax.GradientTransformation(functools.partial(_initial_scale, settings), _scaled)


# Not within `_scaling`, so that a callback can be pickled.
def _initial_scale(settings: Mapping[str, Any], params: Any) -> Any:
    return _PlateauScale(*optax.contrib.reduce_on_plateau(**settings).init(params))


def _scaled(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
    del params
    return jax.tree.map(lambda update: update * state.scale.astype(update.dtype), updates), state


def _is_scale(node: Any) -> bool:
    return isinstance(node, _PlateauScale)
