"""Averages over the mapped axis of `pmap`, `vmap` and `shard_map`, and what a batch that counts nothing becomes.

`typeof(...).manual_axis_type`, `pcast` and `manual_axes` are recent additions to JAX, checked with 0.10 and 0.11.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from trainer.core.partial_metrics import merged_over_axis, scalars_and_partials
from trainer.types import BATCH_WEIGHT, Metrics

AxisName = str | tuple[str, ...]
"""One mapped axis, or several."""


def fold_in_device(rng: jax.Array, axis_name: AxisName | None) -> jax.Array:
    """Returns a key for each device of the mapped axis."""
    return rng if axis_name is None else jax.random.fold_in(rng, jax.lax.axis_index(axis_name))


def per_device(params: Any, axis_name: AxisName | None) -> Any:
    """Marks replicated params as varying over the mapped axis, so that each device gets its own gradient.

    Under ``shard_map`` JAX sums the gradient of a replicated value over the devices, without weights; under
    ``pmap`` and ``vmap`` it does not. With this mark it never does, and `average_over_axis` reduces in all cases.
    """
    if axis_name is None:
        return params
    axes = (axis_name,) if isinstance(axis_name, str) else axis_name
    mapped_by_shard_map = jax.sharding.get_abstract_mesh().manual_axes

    def mark(leaf: jax.Array) -> jax.Array:
        varying = jax.typeof(leaf).manual_axis_type.varying
        missing = tuple(axis for axis in axes if axis in mapped_by_shard_map and axis not in varying)
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, params)


def average_over_axis(grads: Any, metrics: Metrics, axis_name: AxisName | None) -> tuple[Any, Metrics]:
    """Averages over the mapped axis, weighted by ``batch_weight`` if there is one, which itself is summed.

    A device of weight zero adds nothing, even if its gradients are not finite. If all weights are zero there is no
    average: gradients, metrics and ``batch_weight`` are zero. Without an axis the batch itself is all there is.
    """
    weight = metrics.get(BATCH_WEIGHT)
    if axis_name is None and weight is None:
        return grads, metrics
    metrics, partials = scalars_and_partials(metrics)
    if axis_name is None:
        grads, metrics = zero_unless(weight, (grads, metrics))
        return grads, metrics | partials
    partials = {name: merged_over_axis(metric, axis_name, weight) for name, metric in partials.items()}
    metrics = jax.tree.map(_floating, metrics)
    if weight is None:
        grads, metrics = jax.lax.pmean((grads, metrics), axis_name)
        return grads, metrics | partials
    total = jax.lax.psum(weight, axis_name)
    share = weight / jnp.where(total == 0, 1, total)

    scaled = jax.tree.map(lambda leaf: leaf * share.astype(leaf.dtype), (grads, metrics))
    grads, metrics = jax.lax.psum(zero_unless(weight, scaled), axis_name)
    return grads, metrics | partials | {BATCH_WEIGHT: total}


def zero_unless(weight: Any, tree: Any) -> Any:
    """Returns the tree, or zeros if ``weight`` is zero: a mean over nothing is 0 / 0, and 0 * nan is nan."""
    return jax.tree.map(lambda leaf: jnp.where(weight == 0, jnp.zeros_like(leaf), leaf), tree)


def average_if_changed(axis_name: AxisName | None) -> Callable[[Any, Any], Any]:
    """Returns the ``reduce`` of `merge_updated` that averages variables assigned in the forward pass over the axis.

    Only floating and complex variables are averaged. Variables that were not assigned are already equal on all
    devices, and averaging them could round.
    """

    def reduce(old: Any, new: Any) -> Any:
        changed = axis_name is not None and new is not old and jnp.issubdtype(new.dtype, jnp.inexact)
        return jax.lax.pmean(new, axis_name) if changed else new

    return reduce


def _floating(metric: jax.Array) -> jax.Array:
    return metric if jnp.issubdtype(metric.dtype, jnp.inexact) else metric.astype(jnp.float32)
