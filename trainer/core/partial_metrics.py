"""Metrics that are not plain averages of scalars: pairs of value and weight, and objects that merge and compute.

A step returns the contribution of its batch, a pytree that is a `PartialMetric`. Contributions are merged over
micro-batches, devices, fused steps and batches, and then computed once, so that accuracy, AUC or perplexity over
batches of different sizes equals that over the whole data.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trainer.core.checks import check_count
from trainer.core.private_api import names_of_metrics
from trainer.errors import ArgumentError, ObjectiveError


class PartialMetric:
    """The contribution of a batch to a metric. ``float(metric)`` is the metric of this contribution alone."""

    def compute(self) -> Any:
        """Returns the metric, a scalar or an array."""
        raise NotImplementedError

    def merge(self, other: Self) -> Self:
        """Returns the combined contribution."""
        raise NotImplementedError

    def at(self, index: int) -> Self:
        """Returns the contribution at an index of stacked ones."""
        one: Self = jax.tree.map(lambda leaf: leaf[index], self)
        return one

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """Waits for the device."""
        del copy
        return np.asarray(self.compute(), dtype)

    def __float__(self) -> float:
        """Waits for the device."""
        return float(np.asarray(self))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["value", "weight"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Weighted(PartialMetric):
    """A mean with its own weight, Σ w·v / Σ w, independent of the weight of the batch."""

    value: Any
    weight: Any

    def compute(self) -> Any:
        return self.value

    def merge(self, other: Self) -> Self:
        weight = self.weight + other.weight
        # `where`, because 0 * nan is nan.
        parts = [jnp.where(one.weight == 0, 0, one.value * one.weight) for one in (self, other)]
        return dataclasses.replace(self, value=sum(parts) / jnp.where(weight == 0, 1, weight), weight=weight)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["total", "weight"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Vector(PartialMetric):
    """Elementwise means with a weight per entry, Σ w·v / Σ w; NaN where the total weight is zero."""

    total: Any
    weight: Any

    def compute(self) -> Any:
        return self.total / self.weight

    def merge(self, other: Self) -> Self:
        return dataclasses.replace(self, total=self.total + other.total, weight=self.weight + other.weight)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["counts"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Histogram(PartialMetric):
    """Counts of values per bin, see `histogram`."""

    counts: Any

    def compute(self) -> Any:
        return self.counts

    def merge(self, other: Self) -> Self:
        return dataclasses.replace(self, counts=self.counts + other.counts)


def vector(values: Any, weights: Any = 1.0) -> Vector:
    """Returns an array as a metric of an objective, averaged elementwise over batches, such as accuracy per class.

    With values v_b and weights w_b of batch b, entry i is Σ_b w_bi · v_bi / Σ_b w_bi.

    Args:
        values: An array of the same shape in all batches, such as ``(num_classes,)``.
        weights: The weight of each entry in the mean over batches: a number, or an array of the same shape. An entry
            whose total weight is zero is NaN.

    Raises:
        ArgumentError: The shapes do not match.

    Example:
        >>> correct, count = jnp.array([3.0, 1.0]), jnp.array([4.0, 1.0])
        >>> first, second = vector(correct / count, count), vector(jnp.array([0.0, 0.5]), jnp.array([1.0, 3.0]))
        >>> first.merge(second).compute().tolist()
        [0.6..., 0.625]
    """
    values = jnp.asarray(values)
    weights = jnp.asarray(weights, jnp.float32)
    if weights.shape not in ((), values.shape):
        raise ArgumentError(
            f"`weights` is of shape {weights.shape}; it must be a number, or of the shape {values.shape} of `values`."
        )
    weights = jnp.broadcast_to(weights, values.shape)
    # `where`, because 0 * nan is nan.
    return Vector(jnp.where(weights == 0, 0, values * weights), weights)


def histogram(values: Any, low: float, high: float, bins: int = 20) -> Histogram:
    """Returns a histogram of all entries of an array, as a metric of an objective; counts are summed over batches.

    An entry v counts into bin ⌊bins · (v - low) / (high - low)⌋, cut to 0 and bins - 1.

    Args:
        values: An array of any shape.
        low, high: The outer edges of the first and last bin. Values outside count in these two bins, NaN in none.
        bins: The number of bins, all of the same width.

    Raises:
        ArgumentError: ``low`` is not less than ``high``, or ``bins`` is not positive.

    Example:
        >>> histogram(jnp.array([0.1, 0.2, 0.9, 5.0]), 0.0, 1.0, bins=2).counts.tolist()
        [2, 2]
    """
    bins = check_count(bins, "bins")
    if not low < high:
        raise ArgumentError(f"`low` is {low!r} and `high` is {high!r}; the edges of a histogram must ascend.")
    values = jnp.ravel(jnp.asarray(values)).astype(jnp.float32)
    index = jnp.clip(jnp.floor((values - low) * (bins / (high - low))), 0, bins - 1)
    index = jnp.where(jnp.isnan(values), bins, index).astype(jnp.int32)
    return Histogram(jnp.zeros(bins, jnp.int32).at[index].add(1, mode="drop"))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["metric"], meta_fields=["field"])
@dataclasses.dataclass(frozen=True)
class Mergeable(PartialMetric):
    """A metric object that is a pytree with ``merge(other)`` and ``compute()``, as in clu and metrax.

    If it computes a mapping, as a ``clu.metrics.Collection`` does, ``field`` is the entry to report.
    """

    metric: Any
    field: str | None = None

    def compute(self) -> Any:
        computed = self.metric.compute()
        return computed if self.field is None else computed[self.field]

    def merge(self, other: Self) -> Self:
        return dataclasses.replace(self, metric=self.metric.merge(other.metric))


@functools.partial(jax.tree_util.register_dataclass, data_fields=["values"], meta_fields=["graphdef", "field"])
@dataclasses.dataclass(frozen=True)
class NnxMetric(PartialMetric):
    """The variables of an `nnx.Metric` updated on one batch; ``field`` of its result is reported, or all of it."""

    values: Any
    graphdef: Any
    field: str | None

    def compute(self) -> Any:
        computed = nnx.merge(self.graphdef, self.values).compute()
        return computed if self.field is None else getattr(computed, self.field)

    def merge(self, other: Self) -> Self:
        # Variables do not support assignment into NumPy arrays, which is what a read from the device gives.
        metrics = [nnx.merge(one.graphdef, list(map(jnp.asarray, one.values))) for one in (self, other)]
        _merge_into(*metrics)
        return dataclasses.replace(self, values=_split(metrics[0])[1])


def partial_metrics(name: str, value: Any, source: str = "loss_fn") -> dict[str, PartialMetric] | None:
    """Returns the contributions of a metric that ``source`` returned, by the names to report; None for a scalar.

    Raises:
        ObjectiveError: It cannot be merged, or does not compute an array.
    """
    if isinstance(value, PartialMetric):
        return {name: value}
    if isinstance(value, tuple) and len(value) == 2:
        pair = Weighted(*map(jnp.asarray, value))
        if pair.value.shape == pair.weight.shape == ():
            return {name: pair}
        raise ObjectiveError(
            f"`{source}` returned a metric `{name}` of shapes {pair.value.shape} and {pair.weight.shape}; a pair is a "
            f"scalar and its weight. Means by entry are trainer.vector(values, weights)."
        )
    if isinstance(value, nnx.metrics.MultiMetric):
        parts: dict[str, PartialMetric] = {}
        for part in names_of_metrics(value):
            parts |= partial_metrics(part, getattr(value, part), source) or {}
        return parts
    if isinstance(value, nnx.Metric):
        return _of_nnx(name, value, source)
    if not (callable(getattr(value, "merge", None)) and callable(getattr(value, "compute", None))):
        return None
    if jax.tree_util.all_leaves([value]):
        raise ObjectiveError(
            f"`{source}` returned a metric `{name}` of type {type(value).__name__}, which has merge() and compute() "
            f"but is no pytree; register it, or derive it from flax.struct.PyTreeNode."
        )
    return _of_mergeable(name, jax.tree.map(jnp.asarray, value), source)


def merged_over_axis(metric: PartialMetric, axis_name: Any, weight: Any = None) -> PartialMetric:
    """Returns the merged contribution of all devices of a mapped axis, except those of ``batch_weight`` zero."""
    count, index = jax.lax.axis_size(axis_name), jax.lax.axis_index(axis_name)

    # `psum` instead of `all_gather`: `shard_map` then knows that the result is the same on all devices.
    def gathered(leaf: jax.Array) -> jax.Array:
        own = jnp.zeros((count, *leaf.shape), leaf.dtype).at[index].set(leaf)
        everyone: jax.Array = jax.lax.psum(own.astype(jnp.int32) if leaf.dtype == bool else own, axis_name)
        return everyone.astype(leaf.dtype)

    where = None if weight is None else gathered(jnp.asarray(weight)) != 0
    return merged(jax.tree.map(gathered, metric), count, where)


def merged(stacked: PartialMetric, count: int, where: Any = None) -> PartialMetric:
    """Merges ``count`` stacked contributions in order; with ``where``, only those for which it is true."""

    def add(total: PartialMetric, index: Any) -> tuple[PartialMetric, None]:
        one = stacked.at(index)
        both = total.merge(one)
        if where is not None:
            # Excluded entries contribute nothing; the first included one replaces the total.
            begun = jnp.any(jnp.where(jnp.arange(count) < index, where, False))
            both = jax.tree.map(
                lambda new, old, first: jnp.where(where[index], jnp.where(begun, new, first), old), both, total, one
            )
        return jax.tree.map(lambda new, old: new.astype(old.dtype), both, total), None

    total, _ = jax.lax.scan(add, stacked.at(0), jnp.arange(1, count))
    return total


def _of_mergeable(name: str, metric: Any, source: str) -> dict[str, PartialMetric]:
    try:
        jax.eval_shape(lambda: metric.merge(metric))
    except NotImplementedError as error:  # of a base class, as of metrax.FBetaScore
        raise ObjectiveError(_not_mergeable(name, metric, source)) from error
    computed = jax.eval_shape(lambda: metric.compute())
    if not isinstance(computed, Mapping):
        return {name: _checked(name, Mergeable(metric), source)}
    return {field: _checked(field, Mergeable(metric, field), source) for field in computed}


def _not_mergeable(name: str, metric: Any, source: str) -> str:
    return (
        f"`{source}` returned a metric `{name}` of type {type(metric).__name__}, whose parts cannot be put together; "
        f"give it a method merge(other), or report (value, weight)."
    )


def _of_nnx(name: str, metric: Any, source: str) -> dict[str, PartialMetric]:
    if not _can_merge(metric):
        raise ObjectiveError(_not_mergeable(name, metric, source))
    graphdef, values = _split(metric)
    if isinstance(metric, nnx.metrics.Welford):
        fields = [field.name for field in dataclasses.fields(nnx.metrics.Statistics)]
        return {f"{name}_{field}": NnxMetric(values, graphdef, field) for field in fields}
    return {name: _checked(name, NnxMetric(values, graphdef, None), source)}


def _checked(name: str, metric: PartialMetric, source: str) -> PartialMetric:
    computed = jax.eval_shape(lambda: metric.compute())
    if not hasattr(computed, "shape"):
        raise ObjectiveError(
            f"`{source}` returned a metric `{name}` that computes {type(computed).__name__}; it must compute an array. "
            f"Report its parts as metrics of their own."
        )
    return metric


def _split(metric: Any) -> tuple[Any, list[jax.Array]]:
    graphdef, flat = nnx.flatten(metric, graph=True)
    raw = (leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf for leaf in flat.leaves)
    return graphdef, [jnp.asarray(leaf) for leaf in raw]


def _can_merge(metric: Any) -> bool:
    return isinstance(metric, nnx.metrics.Average | nnx.metrics.Welford) or callable(getattr(metric, "merge", None))


def _merge_into(metric: Any, other: Any) -> None:
    if callable(getattr(metric, "merge", None)):
        metric.merge(other)
    elif isinstance(metric, nnx.metrics.Average):
        metric.total[...] += other.total[...]
        metric.count[...] += other.count[...]
    else:  # the formula of Chan, Golub and LeVeque for combining the moments of two samples
        one, two = metric.count[...], other.count[...]
        count = jnp.maximum(one + two, 1)
        delta = other.mean[...] - metric.mean[...]
        metric.mean[...] += delta * two / count
        metric.m2[...] += other.m2[...] + delta**2 * one * two / count
        metric.count[...] += two


def scalars_and_partials(metrics: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, PartialMetric]]:
    """Splits metrics into scalars and partial metrics."""
    partials = {name: value for name, value in metrics.items() if isinstance(value, PartialMetric)}
    return {name: value for name, value in metrics.items() if name not in partials}, partials
