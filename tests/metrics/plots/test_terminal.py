"""Curves as text."""

import math

import pytest

from trainer.metrics.plots import draw_panels, panels_of


def drawn(rows, **how):
    return draw_panels(panels_of({"a": rows}), 34, 4, **how)


def test_a_falling_line_in_braille():
    assert drawn([{"step": step, "error": float(-step)} for step in (0, 5, 10)]).splitlines() == [
        "error",
        "       0.5 |⠒⠢⠤⣀⣀",
        "           |     ⠉⠑⠒⠤⢄⣀",
        "        -5 |           ⠉⠑⠒⠤⢄⣀",
        "     -10.5 |                 ⠉⠉⠒⠢⠤",
        "           +----------------------",
        "            step 0              10",
    ]


def test_letters_where_the_terminal_lacks_braille():
    rows = [{"step": step, "error": float(step), "val_error": 10.0 - step} for step in range(11)]
    text = drawn(rows, braille=False)
    assert text.isascii()
    lines = text.splitlines()
    assert lines[1] == "a training   b validation"
    assert lines[2].rstrip()[-1] == "a"
    assert lines[5].rstrip()[-1] == "b"


def test_runs_have_letters_and_a_legend():
    runs = {name: [{"step": step, "loss": value + step} for step in range(3)] for name, value in (("x", 1), ("y", 2))}
    assert draw_panels(panels_of(runs), 40, 4).splitlines()[1] == "a x, training   b y, training"


@pytest.mark.parametrize("braille", [True, False])
@pytest.mark.parametrize("width", [1, 30, 200])
@pytest.mark.parametrize(
    "values", [[1.0], [0.0, 0.0], [math.nan, 1.0], [1e300, 1e-300], [1.0] * 1000, [1.0, math.inf, 2.0, math.nan, 3.0]]
)
def test_hard_values_and_widths(values, width, braille):
    panels = panels_of({"a": [{"step": step, "loss": value} for step, value in enumerate(values)]})
    lines = draw_panels(panels, width, 4, braille=braille).splitlines()
    assert len(lines) == 7
    assert max(map(len, lines)) <= max(width, 30)


def test_a_single_point_is_seen():
    assert "*" in drawn([{"step": 3, "loss": 1.0}])


def test_nothing_finite():
    assert drawn([{"step": 3, "loss": math.nan}]).splitlines() == ["loss  (1 not finite)", "no value is finite"]
