"""Weighted averages of metrics, read from the device with a delay."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np

from trainer.core.partial_metrics import PartialMetric, Weighted, scalars_and_partials
from trainer.types import BATCH_WEIGHT, SKIPPED

MAX_PENDING = 64
"""At most this many calls keep their metrics on the device. Calls this old have long finished."""

MAX_PENDING_ON_HOST = 16
"""The same where reading is free. The first step of an epoch reads what the one before left: 0.4 ms for 64 calls."""


def read(metrics: Any) -> Any:
    """Returns a tree of arrays as Python numbers, or lists of them."""
    leaves, structure = jax.tree.flatten(metrics, is_leaf=_is_partial)
    if leaves and not is_on_host(leaves[0]):
        leaves = jax.device_get(leaves)  # starts all copies before waiting for the first
    return jax.tree.unflatten(structure, [np.asarray(leaf).tolist() for leaf in leaves])


def is_on_host(value: Any) -> bool:
    """Tells whether a value can be read without a copy from an accelerator."""
    value = value.array if isinstance(value, LazyScalar) else value
    value = jax.tree.leaves(value)[0] if isinstance(value, PartialMetric) else value
    return not isinstance(value, jax.Array) or next(iter(value.devices())).platform == "cpu"


def _is_partial(value: Any) -> bool:
    return isinstance(value, PartialMetric)


class LazyScalar:
    """One entry of a device array, read on demand: the metric of one step among several fused ones."""

    __slots__ = ("_index", "array")

    def __init__(self, array: Any, index: int) -> None:
        self.array, self._index = array, index

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """Waits for the array."""
        del copy  # the result never shares device memory
        if isinstance(self.array, PartialMetric):
            return np.asarray(self.array.at(self._index), dtype)
        return np.asarray(np.asarray(self.array)[self._index], dtype)

    def __float__(self) -> float:
        """Waits for the array."""
        return float(self.__array__())


def metrics_at(metrics: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Returns the metrics of one step from the stacked metrics of `trainer.fuse_steps`."""
    return {name: LazyScalar(array, index) for name, array in metrics.items()}


class WeightedAverage:
    """The average of metrics over batches, weighted by the size of each batch.

    The weight of a batch is its number of examples, or the metric ``batch_weight`` if the objective reports it;
    ``batch_weight`` itself is reported as a sum. Batches of weight zero are ignored, and so are steps that were
    skipped (``nonfinite``); ``skipped`` is the number of those read so far. Metrics that are not averages of scalars,
    such as an accuracy with its own merge, are merged in order. Sums are float64 on the host. ``not_finite`` is the
    step and value of the first loss read that was not finite, or None. The metrics of the latest calls stay on the
    device until `compute`; those of older calls are read as new ones are added.

    A copy costs nothing: the two share their parts, which are replaced and never mutated.

    Example:
        >>> average = WeightedAverage()
        >>> average.add({"loss": 1.0}, 30)
        >>> average.add({"loss": 5.0}, 10)
        >>> average.compute()
        {'loss': 2.0}
    """

    __slots__ = ("_is_on_host", "_merged", "_pending", "_sums", "_weights", "not_finite", "skipped")

    def __init__(self) -> None:
        # (metrics, examples per batch, number of batches or None for a single one) for each call.
        self._pending: tuple[tuple[Mapping[str, Any], int, int | None], ...] = ()
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}
        self._merged: dict[str, Any] = {}
        self._is_on_host: bool | None = None
        self.not_finite: tuple[int, float] | None = None
        self.skipped = 0

    def add(self, metrics: Mapping[str, Any], examples: int, count: int | None = None) -> None:
        """Adds the metrics of a batch, or of several.

        Args:
            metrics: Scalars; with ``count``, arrays with one entry per batch, of which the first ``count``
                are used.
            examples: The number of examples in each batch.
            count: The number of batches.
        """
        self._pending = (*self._pending, (dict(metrics), examples, count))
        if len(self._pending) > MAX_PENDING_ON_HOST:
            # If reading is free, read one call per new call, so that all steps take equally long. From an accelerator,
            # read many at once.
            if self._is_on_host is None:
                self._is_on_host = all(map(is_on_host, metrics.values()))
            if self._is_on_host:
                self._read(1)
            elif len(self._pending) > MAX_PENDING:
                self._read(MAX_PENDING // 2)

    def compute(self) -> dict[str, Any]:
        """Returns the averages so far, without ``step``. Waits for the device.

        A metric whose total weight is zero is omitted. The average of an array is a list.
        """
        self._read(len(self._pending))
        averages = {name: total / self._weights[name] for name, total in self._sums.items() if self._weights[name]}
        return averages | {name: _computed(metric) for name, metric in self._merged.items()}

    def copy(self) -> Self:
        """Returns an equal, independent average."""
        copied = type(self)()
        copied._pending, copied._sums, copied._weights = self._pending, self._sums, self._weights
        copied._is_on_host, copied.not_finite = self._is_on_host, self.not_finite
        copied._merged, copied.skipped = self._merged, self.skipped
        return copied

    def to_dict(self) -> dict[str, dict[str, Any]]:
        """Returns the sums and weights so far; `from_dict` resumes from them bit for bit."""
        self._read(len(self._pending))
        plain: dict[str, dict[str, Any]] = {"sums": dict(self._sums), "weights": dict(self._weights)}
        if self._merged:
            plain["merged"] = {name: _plain(metric) for name, metric in self._merged.items()}
        return plain

    @classmethod
    def from_dict(cls, plain: Mapping[str, Mapping[str, Any]]) -> Self:
        """Returns the average from the result of `to_dict`."""
        average = cls()
        average._sums, average._weights = dict(plain["sums"]), dict(plain["weights"])
        average.skipped = int(average._sums.get(SKIPPED, 0))
        average._merged = {name: _Restored(**held) for name, held in plain.get("merged", {}).items()}
        return average

    def _read(self, count: int) -> None:
        """Moves the metrics of the ``count`` oldest calls from the device to the sums."""
        if not count:
            return
        pending, self._pending = self._pending[:count], self._pending[count:]
        self._sums, self._weights = dict(self._sums), dict(self._weights)
        split = [scalars_and_partials(metrics) for metrics, *_ in pending]
        partials = [found for _, found in split]
        if any(partials):
            self._merged = dict(self._merged)
        scalars = read([metrics for metrics, _ in split])
        for metrics, found, (_, examples, batches) in zip(scalars, partials, pending, strict=True):
            columns = {name: [value] if batches is None else value[:batches] for name, value in metrics.items()}
            weights = columns.get(BATCH_WEIGHT, [float(examples)] * (batches or 1))
            if SKIPPED in columns:
                weights = [
                    0.0 if skipped else weight for weight, skipped in zip(weights, columns[SKIPPED], strict=True)
                ]
            if self.not_finite is None and not all(map(math.isfinite, columns.get("loss", ()))):
                self.not_finite = _first_not_finite(columns, weights)
            for name, column in columns.items():
                if name != "step":
                    self._sum(name, column, weights)
            for name, metric in found.items():
                self._merge(name, jax.device_get(metric), batches, weights)
        self.skipped = int(self._sums.get(SKIPPED, 0))

    def _merge(self, name: str, metric: PartialMetric, batches: int | None, weights: Sequence[float]) -> None:
        """Adds one or several batches to a metric that is not an average of scalars."""
        parts = [metric] if batches is None else [metric.at(index) for index in range(batches)]
        counted = [part for part, weight in zip(parts, weights, strict=True) if weight]
        if isinstance(metric, Weighted):
            pairs: Any = [read(jax.tree.leaves(part)) for part in counted]
            self._sum(name, [value for value, _ in pairs], [weight for _, weight in pairs])
            return
        for part in counted:
            held = self._merged.get(name)
            held = held.like(part) if isinstance(held, _Restored) else held
            self._merged[name] = part if held is None else jax.device_get(held.merge(part))

    def _sum(self, name: str, column: Sequence[float], weights: Sequence[float]) -> None:
        # One value at a time, in order: floating-point sums depend on the order, and fused steps must give the
        # same bits as single steps.
        total, norm = self._sums.get(name, 0.0), self._weights.get(name, 0.0)
        for value, weight in zip(column, weights, strict=True):
            if name in (BATCH_WEIGHT, SKIPPED):  # reported as sums
                total, norm = total + (weight if name == BATCH_WEIGHT else value), 1.0
            elif weight != 0:  # ignore a batch of only padding, since 0 * nan is nan
                total, norm = total + value * weight, norm + weight
        self._sums[name], self._weights[name] = total, norm


@dataclasses.dataclass(frozen=True)
class _Restored:
    """A merged metric from a checkpoint, before the next batch determines its type."""

    value: Any
    dtypes: list[str]
    shapes: list[list[int]]
    entries: list[list[Any]]

    def like(self, metric: PartialMetric) -> PartialMetric:
        arrays = [
            np.array(entries, dtype).reshape(shape)
            for entries, dtype, shape in zip(self.entries, self.dtypes, self.shapes, strict=True)
        ]
        restored: PartialMetric = jax.tree.unflatten(jax.tree.structure(metric), arrays)
        return restored


def _plain(metric: Any) -> dict[str, Any]:
    if isinstance(metric, _Restored):
        return dataclasses.asdict(metric)
    leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(metric)]
    return {
        "value": _computed(metric),
        "dtypes": [leaf.dtype.name for leaf in leaves],
        "shapes": [list(leaf.shape) for leaf in leaves],
        "entries": [leaf.ravel().tolist() for leaf in leaves],
    }


def check_merged(plain: Any) -> None:
    """Raises ValueError unless ``plain`` holds merged metrics in the form of `WeightedAverage.to_dict`."""
    if not isinstance(plain, dict):
        raise ValueError("`average/merged` is no dict")
    for name, held in plain.items():
        try:
            restored = _Restored(**held)
            arrays = zip(restored.entries, restored.dtypes, restored.shapes, strict=True)
            for entries, dtype, shape in arrays:
                np.array(entries, dtype).reshape(shape)
            np.asarray(restored.value, np.float64)
        except (TypeError, ValueError, OverflowError) as error:
            raise ValueError(f"`average/merged/{name}` does not describe a metric: {error}") from error


def _computed(metric: Any) -> Any:
    return metric.value if isinstance(metric, _Restored) else np.asarray(metric).tolist()


def _first_not_finite(columns: Mapping[str, Sequence[float]], weights: Sequence[float]) -> tuple[int, float] | None:
    steps = columns.get("step", [0] * len(weights))
    for loss, step, weight in zip(columns["loss"], steps, weights, strict=True):
        if weight and not math.isfinite(loss):
            return int(step), loss
    return None
