"""Averaged params: optax transformations that keep an average, and functions that extract it from the state.

Each is the last transformation of a chain. It leaves the updates unchanged, and averages the updated params::

    optimizer = optax.chain(optax.adam(1e-3), ema_of_params(0.999))
    evaluate = make_eval_step(loss_fn, eval_params=averaged_params)

``Trainer(..., params_average=ema_of_params(0.999))`` does the same. An average is kept in float32 if the params have
fewer bits, else in their dtype: bfloat16 has a relative precision of 1/256, so a change of 1/1000 would be lost.

Inside `optax.MultiSteps` an average sees only the real updates. After it, also as ``params_average``, it sees every
micro-batch, with the same params each time: a shorter memory for the same ``decay``.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainer.core.averaged_params import with_eval_params
from trainer.core.checks import check_bool, check_number
from trainer.core.tree_paths import leaf_path
from trainer.errors import ArgumentError, ArgumentTypeError
from trainer.state import TrainState


class EmaOfParamsState(NamedTuple):
    """The state of `ema_of_params`.

    Attributes:
        num_updates: The number of updates so far, an int32 scalar.
        weight: The sum of the weights of the params in ``average``, before normalization to 1; a float32 scalar.
        average: The bias-corrected average; a pytree like the params.
    """

    num_updates: jax.Array
    weight: jax.Array
    average: Any


class PolyakAverageState(NamedTuple):
    """The state of `polyak_average`.

    Attributes:
        num_updates: The number of updates so far, an int32 scalar.
        average: The average, a pytree like the params.
    """

    num_updates: jax.Array
    average: Any


def ema_of_params(
    decay: float | jax.Array, *, debias: bool = True, warmup: float = 0
) -> optax.GradientTransformationExtraArgs:
    """Keeps an exponential moving average of the params, as the last transformation of a chain.

    With decay β = ``decay``, warm-up ω = ``warmup`` and the params θ_t after update t = 1, 2, …::

        β_t = min(β, t / (ω + t - 1))
        m_t = β_t · m_{t-1} + (1 - β_t) · θ_t,    m_0 = 0
        average_t = m_t / (1 - Π_{i≤t} β_i)

    The division corrects the bias towards m_0 = 0, as in Adam (Kingma and Ba, https://arxiv.org/abs/1412.6980, section
    3). The state holds average_t itself, updated as a + (θ - a) · c, which is exactly constant if the params are.
    The warm-up is that of TensorFlow's ``ExponentialMovingAverage`` for ω = 10, where t - 1 is its number of updates.

    Args:
        decay: β, at least 0 and less than 1; the average spans about 1 / (1 - β) updates.
        debias: If False, the average starts from the initial params, m_0 = θ_0, without the division.
        warmup: ω, at least 0. The decay starts at 1 / ω; with 0 or 1 it is β from the start.

    Returns:
        A transformation whose state is an `EmaOfParamsState`. Before the first update its average is the initial
        params. ``optax.inject_hyperparams(ema_of_params)(decay=schedule)`` makes the decay follow a schedule.

    Raises:
        ArgumentTypeError: An argument is not a number.
        ArgumentError: It is out of range. ``update`` raises it if ``params`` is missing.

    Example:
        >>> optimizer = optax.chain(optax.sgd(1.0), ema_of_params(0.5))
        >>> params, state = jnp.array(0.0), optimizer.init(jnp.array(0.0))
        >>> for _ in range(2):  # to -1, and to -2
        ...     updates, state = optimizer.update(jnp.array(1.0), state, params)
        ...     params = optax.apply_updates(params, updates)
        >>> print(f"{averaged_params(state, params):.4f}")  # (0.25 · -1 + 0.5 · -2) / 0.75
        -1.6667
    """
    _check_range("decay", decay, "at least 0 and less than 1", lambda value: 0 <= value < 1)
    _check_range("warmup", warmup, "zero or more", lambda value: 0 <= value < float("inf"))
    check_bool(debias, "debias")

    def init(params: Any) -> EmaOfParamsState:
        weight = jnp.zeros((), jnp.float32) if debias else jnp.ones((), jnp.float32)
        return EmaOfParamsState(jnp.zeros((), jnp.int32), weight, _accumulators(params))

    def update(updates: Any, state: EmaOfParamsState, params: Any = None, **extra: Any) -> tuple[Any, EmaOfParamsState]:
        del extra
        after = _updated(params, updates, "ema_of_params")
        # 1 - β_t, computed without rounding β_t to float32 first: for β = 0.9999 the fourth digit would be wrong.
        start, before = jnp.asarray(warmup, jnp.float32), state.num_updates.astype(jnp.float32)
        gain = jnp.maximum(jnp.asarray(1 - decay, jnp.float32), (start - 1) / jnp.maximum(start + before, 1))
        weight = state.weight + gain * (1 - state.weight)
        average = _moved(state.average, after, gain / weight)
        return updates, EmaOfParamsState(optax.safe_increment(state.num_updates), weight, average)

    return optax.GradientTransformationExtraArgs(init, update)


def polyak_average(start_step: int = 0) -> optax.GradientTransformationExtraArgs:
    """Keeps the uniform average of the params from a step on, as the last transformation of a chain.

    With the params θ_t after update t = 1, 2, … and s = ``start_step``::

        average_t = (θ_{s+1} + … + θ_t) / (t - s)    for t > s, else θ_t

    It is the average of Polyak and Juditsky (1992, https://doi.org/10.1137/0330046), computed as
    a + (θ - a) / (t - s).

    Args:
        start_step: s, the number of initial updates to leave out, such as those before the loss is flat.

    Returns:
        A transformation whose state is a `PolyakAverageState`.

    Raises:
        ArgumentTypeError: ``start_step`` is not an integer.
        ArgumentError: It is negative. ``update`` raises it if ``params`` is missing.
    """
    if isinstance(start_step, bool) or not hasattr(start_step, "__index__"):
        raise ArgumentTypeError(
            f"`start_step` is {start_step!r:.60} of type {type(start_step).__name__}; it must be an integer."
        )
    if int(start_step) < 0:
        raise ArgumentError(f"`start_step` is {start_step}; it must be zero or more.")
    start = int(start_step)

    def init(params: Any) -> PolyakAverageState:
        return PolyakAverageState(jnp.zeros((), jnp.int32), _accumulators(params))

    def update(
        updates: Any, state: PolyakAverageState, params: Any = None, **extra: Any
    ) -> tuple[Any, PolyakAverageState]:
        del extra
        after = _updated(params, updates, "polyak_average")
        count = optax.safe_increment(state.num_updates)
        rate = 1 / jnp.maximum(count - start, 1).astype(jnp.float32)
        return updates, PolyakAverageState(count, _moved(state.average, after, rate))

    return optax.GradientTransformationExtraArgs(init, update)


def averaged_params(opt_state: Any, params: Any) -> Any:
    """Returns the average that an optimizer keeps, for use as the ``eval_params`` of a step or of a `Trainer`.

    Args:
        opt_state: The state of an optimizer with one `ema_of_params` or `polyak_average`, at any level: in a chain,
            in `optax.MultiSteps`, `optax.inject_hyperparams`, `trainer.by_group` or another transformation.
        params: The params. Params that the average does not cover, because they are in another group, are returned
            unchanged.

    Returns:
        A pytree like ``params``, in their dtypes. With `optax.lookahead` it is the average of the fast params.

    Raises:
        ArgumentError: There is no average, or more than one.
    """
    found = [
        (leaf_path(path), node)
        for path, node in jax.tree.leaves_with_path(opt_state, is_leaf=_keeps_average)
        if _keeps_average(node)
    ]
    if len(found) != 1:
        listed = "".join(f", `{path}`" for path, _ in found[:5])
        raise ArgumentError(
            f"`opt_state` holds {len(found) or 'no'} averages of params{listed}; it must hold one: put ema_of_params "
            f"or polyak_average last in the chain of the optimizer, or pass Trainer `params_average`."
        )
    ((_, node),) = found
    average = node.average.fast if isinstance(node.average, optax.LookaheadParams) else node.average

    def is_masked(node: Any) -> bool:
        return isinstance(node, optax.MaskedNode)

    # A mask or labels may be a prefix of the params: then a MaskedNode stands for a subtree.
    return jax.tree.map(
        lambda mean, leaf: leaf if is_masked(mean) else mean.astype(leaf.dtype), average, params, is_leaf=is_masked
    )


def with_averaged_params(state: TrainState) -> TrainState:
    """Returns a state whose params are the average that its optimizer keeps, to export or to continue from.

    ``save_state("averaged.safetensors", with_averaged_params(trainer.state))`` writes the average, ``save_state(...,
    trainer.state)`` the trained params. Everything else is that of ``state``, including the batch statistics, which
    belong to the trained params. The params are copies and the rest is shared, so a step may consume only one of the
    two states: ``trainer.state = with_averaged_params(trainer.state)`` continues from the average.

    Raises:
        ArgumentError: The optimizer keeps no average, or more than one.
        StateError: ``state`` was donated to a step.
    """
    state.check_alive()
    params = with_eval_params(state, averaged_params).params
    return state.replace(params=jax.tree.map(jnp.copy, params))


def _keeps_average(node: Any) -> bool:
    return isinstance(node, EmaOfParamsState | PolyakAverageState)


def _accumulators(params: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.promote_types(leaf.dtype, jnp.float32)), params)


def _updated(params: Any, updates: Any, name: str) -> Any:
    """Returns the params after the update, as the step computes them."""
    if params is None:
        raise ArgumentError(
            f"`params` were not given to {name}: it averages them, so pass update(updates, state, params)."
        )
    if isinstance(params, optax.LookaheadParams):  # updates are such a pair too
        return optax.LookaheadParams(*(optax.apply_updates(*pair) for pair in zip(params, updates, strict=True)))
    return optax.apply_updates(params, updates)


def _moved(average: Any, params: Any, rate: jax.Array) -> Any:
    """Returns the average, moved towards the params; at a rate of one it equals the params exactly."""

    def move(mean: jax.Array, leaf: jax.Array) -> jax.Array:
        if leaf.dtype != mean.dtype:
            # XLA may skip the rounding of a sum that is widened immediately; the average would then be of params that
            # differ from those the step returns.
            about: Any = jnp.finfo(leaf.dtype)  # type: ignore[no-untyped-call]
            leaf = jax.lax.reduce_precision(leaf, about.nexp, about.nmant).astype(mean.dtype)
        moved: jax.Array = mean + (leaf - mean) * rate.astype(mean.dtype)
        return jnp.where(rate >= 1, leaf, moved)

    return jax.tree.map(move, average, params)


def _check_range(name: str, value: Any, wanted: str, is_right: Any) -> None:
    if isinstance(value, jax.Array):  # of `optax.inject_hyperparams`, perhaps traced
        return
    if not is_right(check_number(value, name)):
        raise ArgumentError(f"`{name}` is {value}; it must be {wanted}.")
