"""The content of a plot of runs: a panel for each metric, with a training and a validation curve for each run.

The last batch of an epoch may be short, so its metrics cover only a few examples. Therefore rows of batches with less
than half the usual weight are not part of the line, but separate dots. Their weight is the ``batch_weight`` that the
objective reports; for in-memory data it is known, see `with_weights`. For a loader it is not, so an isolated value far
from its neighbours is a dot too. Nothing is hidden, and no epoch ends in a dip.
"""

import dataclasses
import itertools
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from trainer.core.checks import did_you_mean
from trainer.errors import ArgumentError
from trainer.metrics.throughput import SPEED
from trainer.types import BATCH_WEIGHT

Rows = Sequence[Mapping[str, Any]]
Array = np.ndarray[Any, Any]

DENSE = 200
"""The number of rows from which a curve gets a smoothed line."""

_VALIDATION = "val_"
_NO_METRICS = {"step", "epoch", BATCH_WEIGHT}
_LEARNING_RATES = ("learning_rate", "lr")
_GRADIENT_NORMS = ("gradient_norm", "grad_norm")
STEPS_PER_SECOND = SPEED + "steps_per_second"
_LARGEST = 1e300  # of an axis, so that its length is finite
_FAR = 6.0  # standard deviations
_LOG_RATIO = {"loss": 10.0, "gradient_norm": 10.0, "learning_rate": 1000.0}


@dataclasses.dataclass(frozen=True, eq=False)
class Curve:
    """The history of one metric in one run, in training or in validation.

    Attributes:
        label: The name of the run.
        run: Its number, from 0.
        is_validation: Whether the values are averages of validations.
        steps: The steps, of shape (rows,), as floats.
        values: The values, of shape (rows,), including NaN and infinity.
        is_lone: Which values are isolated, of shape (rows,).
    """

    label: str
    run: int
    is_validation: bool
    steps: Array
    values: Array
    is_lone: Array

    @property
    def line(self) -> tuple[Array, Array]:
        """Steps and values of the line; NaN marks a gap, where a value is not finite or the steps start over."""
        steps, values = self.steps[~self.is_lone], self.values[~self.is_lone]
        values = np.where(np.isfinite(values), values, np.nan)
        back = np.flatnonzero(np.diff(steps) < 0) + 1
        return np.insert(steps, back, steps[back]), np.insert(values, back, np.nan)

    @property
    def dots(self) -> tuple[Array, Array]:
        """Steps and values of the rows outside the line: isolated ones, and those between two gaps."""
        steps, values = self.line
        padded = np.pad(values, 1, constant_values=np.nan)
        between = np.isfinite(values) & np.isnan(padded[:-2]) & np.isnan(padded[2:])
        lone = self.is_lone & np.isfinite(self.values)
        return np.concatenate([self.steps[lone], steps[between]]), np.concatenate([self.values[lone], values[between]])

    @property
    def smoothed(self) -> tuple[Array, Array] | None:
        """Medians of at least five rows each, at most 120 of them; None if the rows are not dense."""
        steps, values = self.line
        if len(steps) < DENSE:
            return None
        edges = np.linspace(0, len(steps), min(120, len(steps) // 5) + 1).astype(int)
        parts = [slice(start, end) for start, end in itertools.pairwise(edges)]
        medians = [np.median(kept) if len(kept := _finite(values[part])) else np.nan for part in parts]
        return np.array([steps[part].mean() for part in parts]), np.array(medians)

    @property
    def not_finite(self) -> Array:
        """The steps of values that are NaN or infinite."""
        return self.steps[~np.isfinite(self.values)]


@dataclasses.dataclass(frozen=True, eq=False)
class Panel:
    """The curves of one metric.

    Attributes:
        name: The name of the metric, without ``val_``.
        curves: The curves of all runs, training before validation.
        is_log: Whether a logarithmic axis shows them better.
    """

    name: str
    curves: list[Curve]
    is_log: bool

    @property
    def title(self) -> str:
        """The display name, with the number of values that cannot be drawn."""
        name = self.name.removeprefix(SPEED)
        known = self.name in (*_LEARNING_RATES, *_GRADIENT_NORMS) or self.name.startswith(SPEED)
        missing = sum(len(curve.not_finite) for curve in self.curves)
        return (name.replace("_", " ") if known else name) + (f"  ({missing} not finite)" if missing else "")

    @property
    def limits(self) -> tuple[float, float] | None:
        """The limits of the vertical axis: the range of the lines, plus a margin; None if nothing is finite."""
        values = np.concatenate([_finite(curve.line[1]) for curve in self.curves])
        if not len(values):
            return None
        low, high = max(float(values.min()), -_LARGEST), min(float(values.max()), _LARGEST)
        if self.is_log:
            low, high = math.log10(low), math.log10(high)
        room = 0.05 * (high - low) or 0.1 * abs(high) or 0.1
        low, high = low - room, high + room
        if self.name.startswith(SPEED):  # otherwise its noise looks large
            low = 0.0
        return (10 ** max(low, -300.0), 10 ** min(high, 300.0)) if self.is_log else (low, high)


def panels_of(runs: Mapping[str, Rows], metrics: Collection[str] | None = None) -> list[Panel]:
    """Returns the panels of some runs: the loss, other metrics, learning rate, gradient norm, and speeds at the end.

    Args:
        runs: The rows of each run by its label, as in a `trainer.History`.
        metrics: Which metrics to show, in this order; by default all, except that steps per second is the only speed.

    Raises:
        ArgumentError: Nothing was recorded, or a metric is in no run.
    """
    columns = {label: _columns(rows) for label, rows in runs.items()}
    found = dict.fromkeys(name.removeprefix(_VALIDATION) for named in columns.values() for name in named)
    names = [name for name in sorted(found, key=_place) if name not in _NO_METRICS]
    if not names:
        raise ArgumentError(
            "there is nothing to plot: no metrics were recorded. A history has rows from the first step on, see "
            "`TrainingConfig.log_frequency`."
        )
    usual = [name for name in names if not name.startswith(SPEED) or name == STEPS_PER_SECOND]
    wanted = (usual or names) if metrics is None else [name.removeprefix(_VALIDATION) for name in metrics]
    for name in wanted:
        if name not in found or name == "step":
            raise ArgumentError(f"no run recorded the metric {name!r}; {did_you_mean(name, names)}")
    return [_panel(name, columns) for name in dict.fromkeys(wanted)]


def with_weights(rows: Rows, first_step: int, num_examples: int, batch_size: int) -> list[Mapping[str, Any]]:
    """Returns rows with the ``batch_weight`` of each step of a run over data in memory: its number of examples.

    Args:
        rows: The rows. Rows of earlier steps, and rows that already have a weight, stay unchanged.
        first_step: The number of updates before the run.
        num_examples: The number of examples in an epoch.
        batch_size: The number of examples in a batch; the last batch of an epoch has the rest.
    """
    length, rest = -(-num_examples // batch_size), num_examples % batch_size or batch_size
    return [
        {BATCH_WEIGHT: batch_size if (row["step"] - first_step) % length else rest, **row}
        if row["step"] > first_step
        else row
        for row in rows
    ]


def figure_rows(figures: Mapping[str, Iterable[tuple[int, float]]], rows: Rows) -> list[Mapping[str, Any]]:
    """Returns a row for each figure of an epoch, with the step at which the epoch ended.

    Args:
        figures: As `trainer.History.figures`.
        rows: The rows of the history. If they hold the learning rate, that of epochs is left out.
    """
    has_rate = any(name in row for row in rows for name in _LEARNING_RATES)
    return [
        {"step": step, STEPS_PER_SECOND if name == "steps_per_second" else name: value}
        for name, pairs in figures.items()
        if not (has_rate and name in _LEARNING_RATES)
        for step, value in pairs
    ]


def _panel(name: str, columns: Mapping[str, Mapping[str, tuple[Array, Array]]]) -> Panel:
    drawn = [
        (label, run, prefix, *columns[label][prefix + name])
        for prefix in ("", _VALIDATION)
        for run, label in enumerate(columns)
        if prefix + name in columns[label]
    ]
    is_log = _is_log(name, np.concatenate([values for *_, values in drawn]))
    curves = []
    for label, run, prefix, steps, values in drawn:
        is_of_batches = not prefix and name not in _LEARNING_RATES and not name.startswith(SPEED)
        lone = np.zeros(len(values), bool)
        if is_of_batches:
            lone = stand_alone(np.log(values) if is_log else values)
        if is_of_batches and BATCH_WEIGHT in columns[label]:
            lone |= _is_short(steps, *columns[label][BATCH_WEIGHT])
        curves.append(Curve(label, run, bool(prefix), steps, values, lone))
    return Panel(name, curves, is_log)


def stand_alone(values: Array) -> Array:
    """Returns which values are isolated: far above or far below their neighbours, which are close together.

    "Far" is six standard deviations from the median of seven, where the deviation is a robust local estimate
    (1.4826 times the median of absolute residuals; Hampel 1974). The first value is never isolated, since runs start
    steeply; and no value is if more than a third of all would be.

    Args:
        values: Of shape (rows,). Non-finite values are never isolated.
    """
    alone = np.zeros(len(values), bool)
    rows = np.flatnonzero(np.isfinite(values))
    if len(rows) < 9:
        return alone
    finite = values[rows]
    away = np.abs(finite - _running_median(finite, 7))
    low, high = np.percentile(finite, [5, 95])
    limit = _FAR * np.maximum(1.4826 * _running_median(away, 31), 0.02 * (high - low))
    before = np.diff(finite, prepend=finite[0])
    after = np.append(-np.diff(finite), before[-1])  # the last has one neighbour
    is_peak = (before * after > 0) & (np.minimum(np.abs(before), np.abs(after)) > limit / 2)
    beside = np.pad(away, 1)
    far = (away > limit) & is_peak & (away >= beside[:-2]) & (away >= beside[2:])
    far[0] = False
    if 3 * far.sum() <= len(rows):
        alone[rows] = far
    return alone


def _running_median(values: Array, width: int) -> Array:
    half = min(width, len(values) - 1 + len(values) % 2) // 2
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(values, half, mode="reflect"), 2 * half + 1)
    median: Array = np.median(windows, axis=-1)
    return median


def _is_short(steps: Array, weighted_steps: Array, weights: Array) -> Array:
    """Returns which steps had less than half of the usual batch weight."""
    usual = np.median(_finite(weights)) if len(_finite(weights)) else 0.0
    return np.isin(steps, weighted_steps[weights < usual / 2])


def _is_log(name: str, values: Array) -> bool:
    ratio = _LOG_RATIO.get({"lr": "learning_rate", "grad_norm": "gradient_norm"}.get(name, name))
    finite = _finite(values)
    if ratio is None or not len(finite) or finite.min() <= 0:
        return False
    # A single large first value would make all others look like a flat line.
    return bool(finite.max() > ratio * finite.min())


def _place(name: str) -> int:
    """Returns the position of a metric: the loss first, metrics about the training process last."""
    groups = (("loss",), (), _LEARNING_RATES, _GRADIENT_NORMS)
    return next((place for place, names in enumerate(groups) if name in names), 4 if name.startswith(SPEED) else 1)


def _columns(rows: Rows) -> dict[str, tuple[Array, Array]]:
    """Returns the steps and values of all numeric entries, by name."""
    found: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        for name, value in row.items():
            if (number := _number(value)) is not None and _number(row.get("step")) is not None:
                steps, values = found.setdefault(name, ([], []))
                steps.append(float(row["step"]))
                values.append(number)
    return {name: (np.array(steps), np.array(values)) for name, (steps, values) in found.items()}


def _number(value: Any) -> float | None:
    if not isinstance(value, int | float | np.number) or isinstance(value, complex):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer too large for a float
        return math.inf if value > 0 else -math.inf


def _finite(values: Array) -> Array:
    finite: Array = values[np.isfinite(values)]
    return finite
