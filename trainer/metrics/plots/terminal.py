"""Curves as text: Braille dots, or letters if the terminal has no Braille characters."""

import math
from collections.abc import Sequence

import numpy as np

from trainer.metrics.plots.panels import Array, Panel

_BRAILLE = 0x2800
_BITS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))  # of the dot in a row and a column of a character
_LETTERS = "abcdefghijklmnopqrstuvwxyz"
_MARGIN = 10  # columns for the numbers of the vertical axis


def draw_panels(panels: Sequence[Panel], width: int = 80, height: int = 10, *, braille: bool = True) -> str:
    """Returns panels as lines of text, each with its axes.

    Each curve has a letter, which is shown at its last point and in the legend above.

    Args:
        panels: See `trainer.metrics.plots.panels_of`.
        width: The total number of columns, at least 30.
        height: The number of lines for the curves of a panel.
        braille: Whether the terminal has Braille characters; else each curve is drawn with its letter.
    """
    return "\n\n".join("\n".join(_drawn(panel, max(width, 30), height, braille)) for panel in panels)


def _drawn(panel: Panel, width: int, height: int, braille: bool) -> list[str]:
    scale = " (log scale)" if panel.is_log else ""
    lines = [panel.title + scale]
    names = _names(panel)
    if len(names) > 1:
        lines.append("   ".join(f"{letter} {name}" for letter, name in zip(_LETTERS, names, strict=False)))
    limits = panel.limits
    if limits is None:
        return [*lines, "no value is finite"]
    low, high = limits
    first, last = _span(np.concatenate([curve.steps for curve in panel.curves]))
    columns = width - _MARGIN - 2
    canvas = _Canvas(columns, height, (first, last), (low, high), is_log=panel.is_log, braille=braille)
    for letter, curve in zip(_LETTERS * (1 + len(names) // len(_LETTERS)), panel.curves, strict=False):
        canvas.line(*(curve.smoothed or curve.line), letter)
        canvas.points(*curve.dots, letter)
    for letter, curve in zip(_LETTERS * (1 + len(names) // len(_LETTERS)), panel.curves, strict=False):
        is_point = np.isfinite(curve.line[1]).sum() == 1  # a single dot is easily overlooked
        canvas.label(*curve.line, letter if len(names) > 1 else "*" if is_point else "")
    middle = math.sqrt(low * high) if panel.is_log else (low + high) / 2
    numbers = {0: high, height // 2: middle, height - 1: low}
    for index, text in enumerate(canvas.rows()):
        number = f"{numbers[index]:.3g}" if index in numbers else ""
        lines.append(f"{number:>{_MARGIN}} |{text}".rstrip())
    lines.append(" " * _MARGIN + " +" + "-" * columns)
    begin = f"step {first:.0f}"
    end = f"{last:>{columns - len(begin)}.0f}" if last > first else ""
    lines.append(" " * (_MARGIN + 2) + begin + end)
    return lines


def _names(panel: Panel) -> list[str]:
    several = len({curve.run for curve in panel.curves}) > 1
    kinds = ["validation" if curve.is_validation else "training" for curve in panel.curves]
    return [f"{curve.label}, {kind}" if several else kind for curve, kind in zip(panel.curves, kinds, strict=True)]


def _span(steps: Array) -> tuple[float, float]:
    return float(steps.min()), float(steps.max())


class _Canvas:
    """A grid of dots, two by four per Braille character, or one per letter."""

    def __init__(
        self,
        columns: int,
        rows: int,
        steps: tuple[float, float],
        values: tuple[float, float],
        *,
        is_log: bool,
        braille: bool,
    ) -> None:
        self._wide, self._high = (2, 4) if braille else (1, 1)
        self._braille, self._is_log = braille, is_log
        self._steps, self._values = steps, values
        self._dots = np.full((rows * self._high, columns * self._wide), "", dtype="<U1")
        self._labels: dict[tuple[int, int], str] = {}

    def line(self, steps: Array, values: Array, letter: str) -> None:
        """Draws a line through points, with gaps at NaN."""
        x, y = self._placed(steps, values)
        known = np.isfinite(y)
        for index in np.flatnonzero(known[:-1] & known[1:]):
            here, there = (x[index], y[index]), (x[index + 1], y[index + 1])
            count = int(max(abs(there[0] - here[0]), abs(there[1] - here[1]))) + 2
            between = np.linspace(here, there, count)
            self._set(between[:, 0], between[:, 1], letter)
        self._set(x[known], y[known], letter)

    def points(self, steps: Array, values: Array, letter: str) -> None:
        """Draws points; those outside the axes are drawn at the edge."""
        self._set(*self._placed(steps, np.clip(values, *self._values)), letter)

    def label(self, steps: Array, values: Array, letter: str) -> None:
        """Writes a letter at the last point of a line, or beside it if that place is taken."""
        x, y = self._placed(steps, values)
        if letter and np.isfinite(y).any():
            last = np.flatnonzero(np.isfinite(y))[-1]
            row, column = round(y[last]) // self._high, round(x[last]) // self._wide
            while (row, column) in self._labels and column:
                column -= 1
            self._labels[row, column] = letter

    def rows(self) -> list[str]:
        """Returns the lines of text."""
        height, width = self._dots.shape
        lines = []
        for top in range(0, height, self._high):
            letters = []
            for left in range(0, width, self._wide):
                cell = self._dots[top : top + self._high, left : left + self._wide]
                letters.append(self._labels.get((top // self._high, left // self._wide)) or self._letter(cell))
            lines.append("".join(letters))
        return lines

    def _letter(self, cell: Array) -> str:
        if not self._braille:
            return str(cell[0, 0]) or " "
        bits = sum(_BITS[row][column] for row, column in np.argwhere(cell != ""))
        return chr(_BRAILLE + bits) if bits else " "

    def _placed(self, steps: Array, values: Array) -> tuple[Array, Array]:
        """Returns the columns and rows of the dots, counted from the upper left."""
        low, high = self._values
        if self._is_log:
            values, low, high = np.log(values), math.log(low), math.log(high)
        height, width = self._dots.shape
        first, last = self._steps
        x = (steps - first) / (last - first) * (width - 1) if last > first else np.full(len(steps), width // 2)
        return x, np.clip((high - values) / (high - low) * (height - 1), 0, height - 1)

    def _set(self, x: Array, y: Array, letter: str) -> None:
        self._dots[np.rint(y).astype(int), np.rint(x).astype(int)] = letter
