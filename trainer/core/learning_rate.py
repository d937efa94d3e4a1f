"""The learning rate in the optimizer state of `optax.inject_hyperparams`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import optax

from trainer.core.tree_paths import leaf_path
from trainer.errors import ArgumentError, ArgumentTypeError

_RATE = "hyperparams/learning_rate"
_SCHEDULED = "hyperparams_states/learning_rate"


def with_learning_rate(opt_state: Any, value: Any) -> Any:
    """Returns an optimizer state with another learning rate; see `trainer.TrainState.with_learning_rate`."""
    rate = _checked(value)
    leaves, structure = jax.tree.flatten(opt_state)
    paths = [leaf_path(path) for path, _ in jax.tree.leaves_with_path(opt_state)]
    rates = [index for index, path in enumerate(paths) if f"/{path}".endswith(f"/{_RATE}")]
    if not rates:
        raise ArgumentError(
            f"no learning rate can be set, because the optimizer keeps none in its state: {_instead(opt_state, paths)}"
        )
    if len(rates) > 1:
        listed = ", ".join(f"`{paths[index]}`" for index in rates[:5])
        raise ArgumentError(
            f"the state of the optimizer holds {len(rates)} learning rates ({listed}), and which is meant is not "
            f"known; assign each one in `opt_state`, as in hyperparams['learning_rate'] = 1e-3."
        )
    (index,) = rates
    scheduled = paths[index].removesuffix(_RATE) + _SCHEDULED
    if any(path == scheduled or path.startswith(f"{scheduled}/") for path in paths):
        raise ArgumentError(
            "the learning rate follows a schedule, which sets it anew in every step, so what is set would be lost; "
            "give optax.inject_hyperparams a number for it and not a schedule."
        )
    leaves[index] = _like(rate, leaves[index])
    return jax.tree.unflatten(structure, leaves)


def learning_rate_of(opt_state: Any) -> jax.Array:
    """Returns the learning rate in an optimizer state; after an update, the rate of that update.

    Raises:
        ArgumentError: There is none, or more than one.
    """
    held = {leaf_path(path): leaf for path, leaf in jax.tree.leaves_with_path(opt_state)}
    rates = {path: leaf for path, leaf in held.items() if f"/{path}".endswith(f"/{_RATE}")}
    if not rates and (others := _hyperparameters(list(held))):
        raise ArgumentError(
            f"`report` asks for the learning rate, and the optimizer keeps none under that name in its state, but "
            f"{_listed(others)}; report one of these by a function: "
            f"{{'learning_rate': lambda update: update.opt_state.hyperparams['{_likely_rate(others)}']}}."
        )
    if len(rates) != 1:
        listed = f"{len(rates)} of them: {', '.join(f'`{path}`' for path in list(rates)[:5])}" if rates else "none"
        raise ArgumentError(
            f"`report` asks for the learning rate, and the optimizer keeps {listed} in its state. One of "
            f"optax.inject_hyperparams keeps it; of any other, report a function of the step: "
            f"{{'learning_rate': lambda update: schedule(update.step)}}."
        )
    rate: jax.Array = next(iter(rates.values())) * plateau_scale(opt_state)
    return rate


def with_floating_rates(opt_state: Any, params: Any) -> Any:
    """Returns a new optimizer state in which an integer learning rate, ``learning_rate=1``, is what 1.0 would be.

    `optax.inject_hyperparams` keeps an integer as one, and no rate but an integer could be set.
    """

    def floating(path: Any, leaf: Any) -> Any:
        if not f"/{leaf_path(path)}".endswith(f"/{_RATE}") or not jnp.issubdtype(jnp.result_type(leaf), jnp.integer):
            return leaf
        return jnp.asarray(leaf, jnp.result_type(float, *jax.tree.leaves(params)))

    return jax.tree.map_with_path(floating, opt_state)


def plateau_scale(opt_state: Any) -> Any:
    """Returns the factor that `optax.contrib.reduce_on_plateau` or `trainer.ReduceLROnPlateau` applies; else 1."""

    scale: Any = math.prod(node.scale for node in _plateaus(opt_state))
    return scale


def has_plateau(opt_state: Any) -> bool:
    """Returns whether there is such a scale."""
    return bool(_plateaus(opt_state))


def _is_injected(node: Any) -> bool:
    return isinstance(node, optax.InjectHyperparamsState | optax.InjectStatefulHyperparamsState)


def _instead(opt_state: Any, paths: list[str]) -> str:
    """Returns why a state holds no learning rate, and what to do."""
    if not any(map(_is_injected, jax.tree.leaves(opt_state, is_leaf=_is_injected))):
        return (
            "it is compiled into the step. Pass an optimizer that keeps it, such as "
            "optax.inject_hyperparams(optax.adam)(learning_rate=1e-3), or "
            "optax.inject_hyperparams(make_optimizer)(optimizer_config, learning_rate=1e-3) for a configured one."
        )
    others = _hyperparameters(paths)
    of_numpy = "a rate of another type, such as np.float32(1e-3), is compiled into the step: pass a Python float."
    if not others:
        return f"optax.inject_hyperparams keeps Python numbers and arrays, and {of_numpy}"
    return (
        f"optax.inject_hyperparams keeps {_listed(others)}. Under another name, assign the rate in `opt_state`, as in "
        f"hyperparams['{_likely_rate(others)}'] = 1e-3; {of_numpy}"
    )


def _hyperparameters(paths: list[str]) -> list[str]:
    return [path for path in paths if "/hyperparams/" in f"/{path}"]


def _listed(paths: list[str]) -> str:
    return ", ".join(f"`{path}`" for path in paths[:5]) + (", …" if len(paths) > 5 else "")


def _likely_rate(paths: list[str]) -> str:
    names = [path.rsplit("/", 1)[-1] for path in paths]
    return next((name for name in names if any(part in name for part in ("rate", "lr", "step_size"))), names[0])


def _plateaus(opt_state: Any) -> list[Any]:
    def is_plateau(node: Any) -> bool:
        return isinstance(node, optax.contrib.ReduceLROnPlateauState)

    return [node for node in jax.tree.leaves(opt_state, is_leaf=is_plateau) if is_plateau(node)]


def _checked(value: Any) -> Any:
    if isinstance(value, jax.core.Tracer) and value.shape == ():  # a sweep over rates
        return value
    try:
        rate = float(value)
    except (TypeError, ValueError) as error:
        raise ArgumentTypeError(
            f"`value` is {value!r:.60}, of type {type(value).__name__}; a learning rate must be a number."
        ) from error
    if not 0 <= rate < float("inf"):
        raise ArgumentError(f"`value` is {rate}; a learning rate must be zero or more, and finite.")
    return rate


def _like(value: Any, old: jax.Array) -> jax.Array:
    # An integer would become 0. The state of a trainer has none, see `with_floating_rates`.
    dtype = old.dtype if jnp.issubdtype(old.dtype, jnp.inexact) else jnp.promote_types(old.dtype, jnp.float32)
    array = jnp.full(old.shape, value, dtype)
    # An uncommitted array must stay uncommitted, or the step would be compiled again.
    if isinstance(old, jax.core.Tracer) or not old.committed:
        return array
    placed: jax.Array = jax.device_put(array, old.sharding)
    return placed
