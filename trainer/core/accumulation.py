"""Gradient accumulation: one update from several micro-batches, in the memory of one.

With micro-batches i of weight w_i, gradient g_i and loss l_i::

    g = Σ_i w_i · g_i / Σ_i w_i,    l = Σ_i w_i · l_i / Σ_i w_i

This is the gradient of the whole batch if the loss is an average with these weights. The unweighted mean of the
micro-batch averages is not (huggingface/transformers#34191, google/tunix#1744).
"""

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainer.batches import check_batch, summarize
from trainer.core.gradient import Gradient, GradientFn, Objective
from trainer.core.mapped_axes import AxisName, per_device
from trainer.core.partial_metrics import merged, scalars_and_partials
from trainer.errors import BatchError
from trainer.state import TrainState
from trainer.types import BATCH_WEIGHT, Batch, Metrics


def accumulated(
    objective: Objective, gradient: GradientFn, steps: int, axis_name: AxisName | None = None
) -> tuple[Objective, GradientFn]:
    """Returns the objective and its gradient over the whole batch, computed one micro-batch at a time.

    A batch of n rows is split into q = ⌊n / m⌋ micro-batches of m = ⌈n / steps⌉ rows. Micro-batch i has the rows i,
    i + q, i + 2q, …; rows from q · m on form a shorter one at the end. So if a mesh shards the rows and the number of
    devices divides m, every device has a part of every micro-batch, and no rows move. Under ``jit`` over a mesh
    gradients are reduced over the devices after every micro-batch, with ``axis_name`` once at the end.

    Rows are counted along the leading dimension that most arrays of the batch share. Arrays with another one (a table,
    for example) or none are passed whole to every micro-batch.

    Args:
        objective: The objective of one micro-batch.
        gradient: Its gradient.
        steps: The maximum number of micro-batches; 1 returns both functions unchanged.
        axis_name: As for `make_train_step`. Each device accumulates over its own part of the batch.

    Returns:
        The objective, differentiable in its params with the memory of one micro-batch, and the gradient. Micro-batches
        are weighted by ``batch_weight`` if the objective reports one, which itself is summed, else by their number of
        rows; metrics are averaged like the loss. A micro-batch of weight zero adds nothing, even if it is not finite.
        If all weights are zero, so are gradient and metrics. Sums are float32 or wider, and are divided once.

        The state is carried through the micro-batches in order, so batch normalization uses the statistics of each
        micro-batch and updates the running ones once per micro-batch. Micro-batch i uses the key ``fold_in(rng, i)``.

        Both raise `BatchError`, before they trace the objective, if the batch has fewer rows than ``steps``, or if no
        leading dimension is shared by most of its arrays.
    """
    if steps == 1:
        return objective, gradient

    def accumulated_gradient(state: TrainState, batch: Batch, rng: jax.Array) -> Gradient:
        zeros = jax.tree.map(_zeros, per_device(state.params, axis_name))
        return _over_micro_batches(gradient, state, batch, rng, steps, zeros)

    def loss_alone(state: TrainState, batch: Batch, rng: jax.Array) -> Gradient:
        loss, (metrics, after) = objective(state.params, state, batch, rng)
        return Gradient((), {**metrics, "loss": loss}, after)

    def accumulated_objective(
        params: Any, state: TrainState, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[Metrics, TrainState]]:
        def value(params: Any) -> tuple[jax.Array, tuple[Metrics, TrainState]]:
            return _as_objective(_over_micro_batches(loss_alone, state.replace(params=params), batch, rng, steps, ()))

        def forward(params: Any) -> tuple[tuple[jax.Array, tuple[Metrics, TrainState]], Any]:
            found = accumulated_gradient(state.replace(params=params), batch, rng)
            return _as_objective(found), found.grads

        def backward(grads: Any, cotangents: Any) -> tuple[Any]:
            return (jax.tree.map(lambda leaf: cotangents[0].astype(leaf.dtype) * leaf, grads),)

        # Differentiating through the scan would keep the activations of every micro-batch.
        differentiable = jax.custom_vjp(value)
        differentiable.defvjp(forward, backward)
        result: tuple[jax.Array, tuple[Metrics, TrainState]] = differentiable(params)
        return result

    return accumulated_objective, accumulated_gradient


def micro_batches(batch: Batch, steps: int) -> Iterator[tuple[Batch, range]]:
    """Yields the micro-batches that `accumulated` forms of a concrete batch, each with the indices of its rows."""
    rows, size, count = _split_of(batch, steps)
    for index in range(count):
        yield _strided(batch, rows, size, count, jnp.int32(index)), range(index, count * size, count)
    if count * size < rows:
        yield _split(batch, rows, lambda leaf: leaf[count * size :]), range(count * size, rows)


def _over_micro_batches(
    evaluate: GradientFn, state: TrainState, batch: Batch, rng: jax.Array, steps: int, zeros: Any
) -> Gradient:
    """Returns the weighted average of the results of ``evaluate``; ``zeros`` initializes the sums of gradients."""
    rows, size, count = _split_of(batch, steps)
    carried = state.model_state, state.extensions

    def add(carry: Any, index: Any, micro_batch: Batch, examples: int) -> tuple[Any, tuple[jax.Array, Metrics]]:
        (model_state, extensions), sums = carry
        before = state.replace(model_state=model_state, extensions=extensions)
        grads, metrics, after = evaluate(before, micro_batch, jax.random.fold_in(rng, index))
        weight = _wide(metrics.get(BATCH_WEIGHT, jnp.float32(examples)))
        sums = jax.tree.map(lambda total, leaf: total + _weighted(leaf, weight), sums, grads)
        return ((after.model_state, after.extensions), sums), (weight, metrics)

    def scanned(carry: Any, index: jax.Array) -> tuple[Any, tuple[jax.Array, Metrics]]:
        return add(carry, index, _strided(batch, rows, size, count, index), size)

    carry, (weights, metrics) = jax.lax.scan(scanned, (carried, zeros), jnp.arange(count))
    rest = rows - count * size
    if rest:
        carry, last = add(carry, count, _split(batch, rows, lambda leaf: leaf[count * size :]), rest)
        weights, metrics = jax.tree.map(
            lambda most, one: jnp.concatenate([most, one[None].astype(most.dtype)]), (weights, metrics), last
        )
    (model_state, extensions), sums = carry
    total = weights.sum()
    divisor = jnp.where(total == 0, 1, total)

    def average(leaf: jax.Array, dtype: Any) -> jax.Array:
        return (leaf / divisor.astype(leaf.dtype)).astype(dtype)

    grads = jax.tree.map(lambda leaf, param: average(leaf, param.dtype), sums, state.params if zeros else ())
    metrics, partials = scalars_and_partials(metrics)
    averages = {
        name: total if name == BATCH_WEIGHT else average(_weighted(column, weights).sum(), _floating(column.dtype))
        for name, column in metrics.items()
    }
    whole = {name: merged(stacked, len(weights), weights != 0) for name, stacked in partials.items()}
    return Gradient(grads, averages | whole, state.replace(model_state=model_state, extensions=extensions))


def _as_objective(found: Gradient) -> tuple[jax.Array, tuple[Metrics, TrainState]]:
    metrics = dict(found.metrics)
    return metrics.pop("loss"), (metrics, found.state)


def _split_of(batch: Batch, steps: int) -> tuple[int, int, int]:
    """Returns the number of rows, of rows in a micro-batch, and of micro-batches of that size."""
    rows = _rows(batch, steps)
    size = -(-rows // steps)
    return rows, size, rows // size


def _rows(batch: Batch, steps: int) -> int:
    """Returns the length of the leading dimension to split."""
    rows = check_batch(batch)
    if rows is None:
        shapes = [np.shape(leaf) for leaf in jax.tree.leaves(batch)]
        lengths = Counter(shape[0] for shape in shapes if shape)
        rows, most = lengths.most_common(1)[0] if lengths else (0, 0)
        if 2 * most <= lengths.total():
            raise BatchError(
                f"`batch` has no leading dimension that most of its arrays have ({summarize(batch)}), so "
                f"`accumulate_steps` = {steps} cannot split it; pad its arrays to one length."
            )
    if rows < steps:
        raise BatchError(
            f"`batch` has {rows} examples ({summarize(batch)}), fewer than `accumulate_steps` = {steps}; a batch is "
            f"split into that many micro-batches. Pass a larger batch, or pad a short last one (`pad_to`)."
        )
    return rows


def _strided(batch: Batch, rows: int, size: int, count: int, index: jax.Array) -> Batch:
    """Returns every ``count``-th row, starting at ``index``."""

    # Indexed in the loop instead of transposed before it, which would copy the batch.
    def take(leaf: Any) -> Any:
        grouped = leaf[: count * size].reshape(size, count, *leaf.shape[1:])
        return jax.lax.dynamic_index_in_dim(grouped, index, axis=1, keepdims=False)

    return _split(batch, rows, take)


def _split(batch: Batch, rows: int, take: Callable[[Any], Any]) -> Batch:
    split: Batch = jax.tree.map(
        lambda leaf: take(jnp.asarray(leaf)) if np.ndim(leaf) and leaf.shape[0] == rows else leaf, batch
    )
    return split


def _weighted(leaf: jax.Array, weight: jax.Array) -> jax.Array:
    # `where`, because 0 * nan is nan.
    leaf = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
    return jnp.where(weight == 0, jnp.zeros_like(leaf), leaf * weight.astype(leaf.dtype))


def _zeros(param: jax.Array) -> jax.Array:
    return jnp.zeros_like(param, jnp.promote_types(param.dtype, jnp.float32))


def _wide(weight: jax.Array) -> jax.Array:
    at_least = jnp.float32 if jnp.issubdtype(weight.dtype, jnp.floating) else jnp.int32
    return weight.astype(jnp.promote_types(weight.dtype, at_least))


def _floating(dtype: Any) -> Any:
    return dtype if jnp.issubdtype(dtype, jnp.inexact) else jnp.float32
