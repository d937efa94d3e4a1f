"""The table of finished epochs, a row at a time: which columns fit, and what their values look like."""

import math
from collections.abc import Mapping
from typing import Any

_WIDEST = 16
"""The maximum width of a table column, in characters."""

_NUMBER = 8
"""The width of a number, as in -0.01234."""


class EpochTable:
    """Rows under a heading, cut to the width of the display.

    The heading is repeated when a row has a value that no earlier row had, such as the first validation, or when
    the width has changed. Columns keep their order; if not all fit, the least important ones, the last metrics, are
    left out.
    """

    def __init__(self) -> None:
        self._names: list[str] = []
        self._widths: dict[str, int] = {}
        self._fitted: tuple[int, int] | None = None

    def add(self, cells: Mapping[str, str], width: int) -> tuple[str | None, str]:
        """Returns the heading, if one is due, and the row.

        Args:
            cells: The cell of each column, by name: ``epoch`` first, then metrics of training and of
                validation, ``time`` last.
            width: The width of the display, in characters.
        """
        new = [name for name in cells if name not in self._names]
        if new:
            self._names = sorted({*self._names, *new}, key=[*cells, *self._names].index)
        fitted = (len(self._names), width)
        if fitted != self._fitted:
            self._fitted = fitted
            self._widths = self._fit(cells, width)
            return _joined({name: name for name in self._widths}, self._widths), _joined(cells, self._widths)
        return None, _joined(cells, self._widths)

    def _fit(self, cells: Mapping[str, str], width: int) -> dict[str, int]:
        from rich.cells import cell_len

        left, kept = width + 2, {}
        for name in sorted(self._names, key=self._rank):
            own = max(cell_len(cells.get(name, "")), min(cell_len(name), _WIDEST))
            own = own if name == "epoch" else max(own, _NUMBER)
            left -= own + 2
            if left < 0:
                break
            kept[name] = own
        return {name: kept[name] for name in self._names if name in kept}

    def _rank(self, name: str) -> tuple[int, int]:
        first = ("epoch", "loss", "val_loss", "time")
        if name in first:
            return first.index(name), 0
        # A metric and its validation stay together.
        plain = name.removeprefix("val_")
        position = self._names.index(plain) if plain in self._names else self._names.index(name)
        return len(first) + position, name.startswith("val_")


def number(value: Any) -> str | None:
    """Returns a metric as text with four digits; None if it is not a single number."""
    try:
        value = float(value)
    except (TypeError, ValueError):
        return None
    if math.isfinite(value) and value == int(value) and abs(value) < 1e6:
        return str(int(value))
    return f"{value:.4g}"


def duration(seconds: float) -> str:
    """Returns a time as text: ``0.3 s``, ``1:05``, ``2:03:04``."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def counted(value: int, of: int | None) -> str:
    """Returns ``12/40``, or ``12`` if the total is unknown."""
    return f"{value}" if of is None else f"{value}/{of}"


def in_words(cells: Mapping[str, str]) -> str:
    """Returns the row as a line that names its values, for displays without a heading."""
    return "  ".join(text if name == "time" else f"{name} {text}" for name, text in cells.items())


def _joined(cells: Mapping[str, str], widths: Mapping[str, int]) -> str:
    return "  ".join(_aligned(cells.get(name, ""), width) for name, width in widths.items())


def _aligned(text: str, width: int) -> str:
    """Returns text that takes ``width`` columns of a terminal, right-aligned, cut if it is longer."""
    from rich.cells import cell_len, set_cell_size

    taken = cell_len(text)
    return " " * (width - taken) + text if taken <= width else set_cell_size(text, width - 1) + "~"
