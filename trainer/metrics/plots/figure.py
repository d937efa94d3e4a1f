"""matplotlib figures, made without pyplot: no backend is selected, and the caller's figures are not affected."""

from __future__ import annotations

import functools
import io
import os
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from trainer.errors import ArgumentError
from trainer.metrics.plots.panels import Curve, Panel, Rows, panels_of
from trainer.metrics.whole_files import named_when_whole
from trainer.paths import in_home

# Okabe and Ito 2008, "Color Universal Design", without yellow, which is too light for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours that are distinguishable with colour blindness. They repeat from the eighth run on, with other dashes."""

_BAD = "#D55E00"
_DASHES = ("solid", (0, (5, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
_VALIDATION_DASH = (0, (3, 1.5))
_ENDINGS = (".png", ".svg", ".pdf")
_FEW = 40  # up to this many points, each gets a marker


def plot_runs(
    runs: Mapping[str, Rows],
    path: str | os.PathLike[str] | None = None,
    metrics: Collection[str] | None = None,
) -> Any:
    """Plots the histories of runs over each other: a panel for each metric.

    For a single run, training is blue and validation orange; for several, each run has a colour, and validation is
    dashed. Dense curves are pale, with a line of medians. An isolated value is a dot beside the line, see
    `trainer.metrics.plots.panels`; outside the range of the lines it is a triangle at the edge. A cross below marks a
    non-finite value.

    Args:
        runs: The rows of each run by its label: `trainer.History` objects.
        path: Where to write it: a ``.png``, ``.svg`` or ``.pdf`` file.
        metrics: Which metrics to show, in this order; all if left out.

    Returns:
        The ``matplotlib.figure.Figure``, which a notebook shows; None if it was written to ``path``.

    Raises:
        ArgumentError: Nothing was recorded, a metric is in no run, or ``path`` has another extension.
        ImportError: matplotlib is not installed (the extra ``plot``).
    """
    _check_ending(path)
    # A `trainer.History` knows more than its rows contain.
    known = {label: rows.to_draw() if hasattr(rows, "to_draw") else rows for label, rows in runs.items()}
    panels = panels_of(known, metrics)
    columns = (1, 1, 2, 3, 2, 3, 3)[min(len(panels), 6)]
    rows = -(-len(panels) // columns)
    figure = _figure_class()(figsize=(3.4 * columns + 0.2, 2.3 * rows + 0.5), dpi=120, layout="constrained")
    figure.get_layout_engine().set(h_pad=0.06, hspace=0.03)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    is_one = len(runs) == 1
    for axes, panel in zip(grid, panels, strict=False):
        _draw(axes, panel, is_one=is_one)
    for axes in grid[len(panels) :]:
        axes.remove()
    for axes in grid[max(0, len(panels) - columns) : len(panels)]:
        axes.set_xlabel("step", fontsize=8)
    _add_legend(figure, panels, is_one=is_one, columns=columns)
    return _finished(figure, path)


def plot_search(search: Any, path: str | os.PathLike[str] | None = None) -> Any:
    """Plots a learning rate range test with its suggestion; see `trainer.features.search.RateSearch.plot`."""
    _check_ending(path)
    figure = _figure_class()(figsize=(4.6, 3.0), dpi=120, layout="constrained")
    axes = figure.subplots()
    losses = np.where(np.isfinite(search.losses), search.losses, np.nan)
    smoothed = np.where(np.isfinite(search.smoothed), search.smoothed, np.nan)
    axes.plot(search.rates, losses, color=COLOURS[0], alpha=0.35, linewidth=0.8)
    axes.plot(search.rates, smoothed, color=COLOURS[0], linewidth=1.6, label="loss, smoothed")
    title = "the loss falls at no rate"
    if search.suggestion is not None:
        title = f"the loss falls fastest at {search.suggestion:.2g}"
        axes.axvline(search.suggestion, color=_BAD, linewidth=1.0, linestyle=(0, (4, 2)))
        axes.plot(search.suggestion, np.interp(search.suggestion, search.rates, smoothed), "o", color=_BAD)
    axes.set_xscale("log")
    finite = smoothed[np.isfinite(smoothed)]
    if len(finite):
        room = 0.1 * (np.ptp(finite) or 1.0)
        axes.set_ylim(finite.min() - room, finite.max() + room)
    _style(axes, title)
    axes.set_xlabel("learning rate", fontsize=8)
    axes.set_ylabel("loss", fontsize=8)
    return _finished(figure, path)


def _draw(axes: Any, panel: Panel, *, is_one: bool) -> None:
    low, high = panel.limits or (0.0, 1.0)
    for curve in panel.curves:
        _draw_curve(axes, curve, is_one=is_one)
        steps, values = curve.dots
        colour = _look(curve, is_one=is_one)["color"]
        for mask, marker in ((values > high, "^"), (values < low, "v"), ((values >= low) & (values <= high), "o")):
            if mask.any():
                at = np.clip(values[mask], low, high)
                (drawn,) = axes.plot(steps[mask], at, marker, color=colour, markersize=3, alpha=0.7, clip_on=False)
                drawn.set_in_layout(False)
        if len(bad := curve.not_finite):
            heights = np.full(len(bad), 0.03)
            axes.plot(bad, heights, "x", color=_BAD, markersize=4, transform=axes.get_xaxis_transform())
    if panel.is_log:
        _use_log(axes, few=high < 100 * low)
    axes.set_ylim(low, high)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if panel.limits is None:
        axes.set_yticks([])
    _style(axes, panel.title)


def _draw_curve(axes: Any, curve: Curve, *, is_one: bool) -> None:
    look = _look(curve, is_one=is_one)
    steps, values = curve.line
    smoothed = curve.smoothed
    if smoothed is not None:
        axes.plot(steps, values, **{**look, "linestyle": "solid"}, linewidth=0.5, alpha=0.3)
        axes.plot(*smoothed, **look, linewidth=1.5)
        return
    if len(steps) <= _FEW:
        look |= {"marker": "o", "markersize": 3}
        if curve.is_validation:
            look |= {"markerfacecolor": "white"}
    axes.plot(steps, values, **look, linewidth=1.2)


def _look(curve: Curve, *, is_one: bool) -> dict[str, Any]:
    if is_one:
        return {"color": COLOURS[curve.is_validation], "linestyle": "solid"}
    return {
        "color": _colour(curve.run),
        "linestyle": _VALIDATION_DASH if curve.is_validation else _dash(curve.run),
    }


def _colour(run: int) -> str:
    return COLOURS[run % len(COLOURS)]


def _dash(run: int) -> Any:
    return _DASHES[run // len(COLOURS) % len(_DASHES)]


def _use_log(axes: Any, *, few: bool) -> None:
    """Makes the vertical axis logarithmic, with plain numbers; with ``few`` decades also between the decades."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    if few:
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 3.0, 5.0)))
        axes.yaxis.set_minor_locator(LogLocator(subs=(1.0,)))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, place: f"{value:g}"))


def _style(axes: Any, title: str) -> None:
    axes.set_title(_text(title), fontsize=9)
    axes.tick_params(labelsize=7, which="both")
    axes.grid(visible=True, color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.03)


def _add_legend(figure: Any, panels: list[Panel], *, is_one: bool, columns: int) -> None:
    from matplotlib.lines import Line2D

    curves = [curve for panel in panels for curve in panel.curves]
    has_validation = any(curve.is_validation for curve in curves)
    looks: dict[str, dict[str, Any]] = {}
    if is_one and has_validation:
        looks = {name: {"color": COLOURS[index]} for index, name in enumerate(("training", "validation"))}
    elif not is_one:
        for curve in sorted(curves, key=lambda curve: curve.run):
            looks[_text(curve.label)] = {"color": _colour(curve.run), "linestyle": _dash(curve.run)}
        if has_validation:
            looks["validation"] = {"color": "0.4", "linestyle": _VALIDATION_DASH}
    handles, labels = [Line2D([], [], **look, linewidth=1.5) for look in looks.values()], list(looks)
    if labels:
        widest = max(map(len, labels))
        fitting = max(1, int(columns * 3.4 / (0.5 + 0.07 * widest)))
        figure.set_figheight(figure.get_figheight() + 0.18 * ((len(labels) - 1) // fitting))
        figure.legend(
            handles, labels, loc="outside upper center", ncols=min(len(labels), fitting), fontsize=8, frameon=False
        )


def _text(text: str) -> str:
    """Returns a text that matplotlib shows verbatim: not as a formula, and not hidden from a legend."""
    text = text.replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text


def _check_ending(path: str | os.PathLike[str] | None) -> None:
    if path is not None and Path(path).suffix.lower() not in _ENDINGS:
        raise ArgumentError(f"`path` is {os.fspath(path)!r}; a picture is a name in {', '.join(_ENDINGS)}.")


def _finished(figure: Any, path: str | os.PathLike[str] | None) -> Any:
    """Returns the figure, or writes it atomically: a failure leaves the previous file."""
    if path is None:
        return figure
    path, drawn = Path(in_home(path)), io.BytesIO()
    with warnings.catch_warnings():  # about characters in a label that the font lacks
        warnings.simplefilter("ignore")
        figure.savefig(drawn, format=path.suffix.lower().removeprefix("."))
    path.parent.mkdir(parents=True, exist_ok=True)
    with named_when_whole(Path(os.path.realpath(path))) as temporary:  # a link keeps pointing to the picture
        temporary.write_bytes(drawn.getvalue())
    return None


@functools.cache
def _figure_class() -> type[Any]:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("plotting needs matplotlib: pip install 'nnx-trainer[plot]'") from error

    class RunFigure(Figure):
        """A figure that a notebook displays without pyplot."""

        def _repr_png_(self) -> bytes:
            drawn = io.BytesIO()
            self.savefig(drawn, format="png")
            return drawn.getvalue()

        def __reduce__(self) -> Any:  # pickle cannot find a class inside a function by name
            return _empty_figure, (), super().__getstate__()

    return RunFigure


def _empty_figure() -> Any:
    return _figure_class()()
