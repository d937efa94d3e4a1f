"""What a run has measured: averages that weigh, and the record of what was logged."""

import collections
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

import jax
import numpy as np

from trainer.steps import BATCH_WEIGHT

# So many metrics may wait on the device; then the older half is read, which finished long ago.
_MOST_WAITING = 512


def read(metrics: Any) -> Any:
    """Copies a tree of arrays to the host as Python numbers, or lists of these, waiting for them in one go."""
    return jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), jax.device_get(metrics))


class Entry:
    """One entry of an array on the device, read when somebody looks: the metric of a step among many."""

    __slots__ = ("_array", "_index")

    def __init__(self, array: jax.Array, index: int) -> None:
        self._array, self._index = array, index

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray[Any, Any]:
        """Waits for the array."""
        del copy  # it is one already
        return np.asarray(np.asarray(self._array)[self._index], dtype)

    def __float__(self) -> float:
        """Waits for the array."""
        return float(self.__array__())


def metrics_at(metrics: Mapping[str, Any], index: int) -> dict[str, Any]:
    """Returns the metrics of one step of several, from those that `trainer.fuse_steps` returns."""
    return {name: Entry(array, index) for name, array in metrics.items()}


class WeightedAverage:
    """The average of the metrics of batches, each counted by its weight.

    A batch weighs as much as it has examples, or what its objective reports as ``batch_weight``
    (then the average of that is its sum). The sums are float64 on the host; metrics that are still
    being computed stay on the device until `compute`, or until so many wait that the oldest are
    long finished.

    Example:
        >>> average = WeightedAverage()
        >>> average.add({"loss": 1.0}, 30)
        >>> average.add({"loss": 5.0}, 10)
        >>> average.compute()
        {'loss': 2.0}
    """

    def __init__(self) -> None:
        # Metrics, the examples in a batch, and the number of batches if there are several.
        self._waiting: list[tuple[Mapping[str, Any], int, int | None]] = []
        self._sums: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, metrics: Mapping[str, Any], examples: int, count: int | None = None) -> None:
        """Counts the metrics of a batch of so many examples.

        Args:
            metrics: Scalars; or, where ``count`` is given, arrays of which the first ``count``
                entries belong to as many batches.
            examples: How many examples there are in a batch.
            count: How many batches.
        """
        self._waiting.append((dict(metrics), examples, count))
        if len(self._waiting) > _MOST_WAITING:
            self._settle(_MOST_WAITING // 2)

    def compute(self) -> dict[str, float]:
        """Returns the averages so far, ``step`` left out; empty if nothing was added."""
        self._settle(len(self._waiting))
        averages = {name: total / self._weights[name] for name, total in self._sums.items() if self._weights[name]}
        # A metric that only ever came with weight zero has no average, and saying so is honest.
        return {name: averages.get(name, float("nan")) for name in self._sums}

    def to_dict(self) -> dict[str, dict[str, float]]:
        """Returns the sums so far, such that `from_dict` goes on from them to the bit."""
        self._settle(len(self._waiting))
        return {"sums": dict(self._sums), "weights": dict(self._weights)}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Mapping[str, float]]) -> Self:
        """Makes an average again from what `to_dict` returned."""
        average = cls()
        average._sums, average._weights = dict(plain["sums"]), dict(plain["weights"])
        return average

    def _settle(self, count: int) -> None:
        settled, self._waiting = self._waiting[:count], self._waiting[count:]
        for metrics, (_, examples, batches) in zip(read([one for one, *_ in settled]), settled, strict=True):
            columns = {name: [value] if batches is None else value[:batches] for name, value in metrics.items()}
            weights = columns.get(BATCH_WEIGHT, [float(examples)] * (batches or 1))
            for name, column in columns.items():
                if name != "step":
                    self._count(name, column, weights)

    def _count(self, name: str, column: Sequence[float], weights: Sequence[float]) -> None:
        # One after the other, whether they came one by one or many at once: sums depend on the order.
        total, norm = self._sums.get(name, 0.0), self._weights.get(name, 0.0)
        for value, weight in zip(column, weights, strict=True):
            # The average weight of a batch would be of no use; the whole weight is.
            share, norm = (value, 1.0) if name == BATCH_WEIGHT else (value * weight, norm + weight)
            total += share
        self._sums[name], self._weights[name] = total, norm


class History(Sequence[dict[str, Any]]):
    """The rows that were logged, oldest first; ``history[-1]`` is the latest.

    A row holds ``step`` and what was measured at it: training metrics under their names, validation
    averages as ``val_<name>``. Values are read from the device when somebody looks.

    Example:
        >>> history = History()
        >>> history.record(1, {"loss": 0.5})
        >>> history.record(2, {"loss": 0.25})
        >>> history.record(2, {"loss": 0.3}, prefix="val_")
        >>> history.to_dict()
        {'step': [1, 2], 'loss': [0.5, 0.25], 'val_loss': [None, 0.3]}
        >>> history.series("val_loss")
        ([2], [0.3])
    """

    def __init__(self, max_rows: int = 100_000) -> None:
        """Makes an empty record that forgets its oldest row for every one above ``max_rows``."""
        self._rows: collections.deque[dict[str, Any]] = collections.deque(maxlen=max_rows)
        self._unread = 0

    def record(self, step: int, metrics: Mapping[str, Any], prefix: str = "") -> None:
        """Adds what was measured at ``step``, to the row of that step if it is the latest."""
        values = {
            name if name.startswith(prefix) else prefix + name: value
            for name, value in metrics.items()
            if name != "step"
        }
        if self._rows and self._rows[-1]["step"] == step:
            self._rows[-1].update(values)
            self._unread = max(self._unread, 1)
        else:
            self._rows.append({"step": step, **values})
            self._unread = min(self._unread + 1, len(self._rows))
        if self._unread > _MOST_WAITING:
            self._settle(_MOST_WAITING // 2)

    def restore(self, rows: Sequence[Mapping[str, Any]]) -> None:
        """Forgets everything and takes these rows instead."""
        self._rows.clear()
        self._rows.extend(map(dict, rows))
        self._unread = 0

    def rewind(self, step: int) -> None:
        """Forgets the rows of later steps."""
        first_unread = len(self._rows) - self._unread
        kept = [(index, row) for index, row in enumerate(self._rows) if row["step"] <= step]
        self._rows.clear()
        self._rows.extend(row for _, row in kept)
        self._unread = sum(index >= first_unread for index, _ in kept)

    def to_dict(self) -> dict[str, list[Any]]:
        """Returns columns of one length, None where a row lacks a value: ``pandas.DataFrame`` takes it."""
        rows = self._read()
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name) for row in rows] for name in names}

    def series(self, name: str) -> tuple[list[int], list[Any]]:
        """Returns the steps at which ``name`` was logged, and its values there.

        Raises:
            KeyError: Nothing was logged under that name.
        """
        rows = [row for row in self._read() if name in row]
        if not rows:
            known = sorted({key for row in self._rows for key in row})
            raise KeyError(f"nothing was logged as {name!r}; there is {', '.join(known) or 'nothing'}")
        return [row["step"] for row in rows], [row[name] for row in rows]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        rows = self._read()
        return list(rows)[index] if isinstance(index, slice) else rows[index]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter(list(self._read()))

    def __repr__(self) -> str:
        return f"History({len(self)} rows, latest {self[-1] if self else None})"

    def _read(self) -> collections.deque[dict[str, Any]]:
        self._settle(self._unread)
        return self._rows

    def _settle(self, count: int) -> None:
        """Reads the ``count`` oldest rows that are still on the device."""
        first = len(self._rows) - self._unread
        unread = [self._rows[i] for i in range(first, first + count)]
        for row, values in zip(unread, read(unread), strict=True):
            row.update(values)
        self._unread -= count
