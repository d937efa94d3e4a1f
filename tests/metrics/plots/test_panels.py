"""What a picture shows: which panels, which rows are joined, what is smoothed."""

import math

import numpy as np
import pytest

from trainer import ArgumentError
from trainer.metrics.plots import panels_of
from trainer.metrics.plots.panels import stand_alone


def rows(values, name="loss", **more):
    return [{"step": step + 1, name: value, **more} for step, value in enumerate(values)]


def only(values, **more):
    (panel,) = panels_of({"a": rows(values)}, **more)
    return panel


def decay(count, seed=0, noise=0.05):
    steps = np.arange(count)
    return 0.2 + 2 * np.exp(-steps / (count / 4)) + noise * np.random.default_rng(seed).normal(size=count)


def test_the_loss_comes_first_and_what_tells_of_the_training_itself_last():
    names = ["speed/steps_per_second", "learning_rate", "zeta", "val_zeta", "gradient_norm", "val_loss", "loss", "acc"]
    panels = panels_of({"a": [{"step": 1, **dict.fromkeys(names, 1.0), "epoch": 1, "batch_weight": 3, "note": "x"}]})
    assert [panel.name for panel in panels] == [
        *("loss", "zeta", "acc", "learning_rate", "gradient_norm", "speed/steps_per_second"),
    ]
    assert [curve.is_validation for curve in panels[0].curves] == [False, True]
    assert panels[-1].title == "steps per second"


def test_metrics_are_chosen_by_either_name_and_in_that_order():
    recorded = {"a": [{"step": 1, "loss": 1.0, "val_loss": 2.0, "error": 3.0}]}
    assert [panel.name for panel in panels_of(recorded, ["error", "val_loss", "loss"])] == ["error", "loss"]
    with pytest.raises(ArgumentError, match=r"no run recorded the metric 'los'; did you mean 'loss'\?"):
        panels_of(recorded, ["los"])


@pytest.mark.parametrize("recorded", [[], [{"step": 1}], [{"step": 1, "note": "x", "parts": [1]}], [{"loss": 1.0}]])
def test_a_history_of_no_metrics_is_refused(recorded):
    with pytest.raises(ArgumentError, match="there is nothing to plot: no metrics were recorded"):
        panels_of({"a": recorded})


def test_what_is_not_finite_is_a_gap_and_is_counted():
    panel = only([3.0, math.nan, 2.0, math.inf, -math.inf, 1.0, 1.0])
    _, values = panel.curves[0].line
    assert panel.title == "loss  (3 not finite)"
    np.testing.assert_array_equal(np.isnan(values), [False, True, False, True, True, False, False])
    np.testing.assert_array_equal(panel.curves[0].not_finite, [2, 4, 5])
    np.testing.assert_array_equal(panel.curves[0].dots[0], [1, 3])  # which no line joins
    assert panel.limits == pytest.approx((0.9, 3.1))
    assert only([math.nan] * 3).limits is None
    assert only([10**400, 1.0]).title == "loss  (1 not finite)"  # beyond every float


def test_steps_that_begin_again_are_not_joined():
    (panel,) = panels_of({"a": [{"step": step, "loss": float(step)} for step in (1, 2, 3, 2, 3)]})
    steps, values = panel.curves[0].line
    np.testing.assert_array_equal(steps, [1, 2, 3, 2, 2, 3])
    np.testing.assert_array_equal(values, [1, 2, 3, math.nan, 2, 3])


@pytest.mark.parametrize("period", [4, 8, 50])
@pytest.mark.parametrize("factor", [0.2, 4.0])
def test_short_last_batches_are_dots_beside_the_line(period, factor):
    values = decay(5 * period if period > 10 else 40, noise=0.02)
    short = np.arange(period - 1, len(values), period)
    values[short] *= factor
    curve = only(list(values)).curves[0]
    assert curve.is_lone[short].all()
    assert curve.is_lone.sum() <= len(short) + 1  # one of the others may be as far off
    assert not np.isin(short + 1, curve.line[0]).any()
    assert np.isin(short + 1, curve.dots[0]).all()  # nothing is hidden


@pytest.mark.parametrize("seed", range(5))
def test_noise_and_a_steep_start_are_joined(seed):
    rng = np.random.default_rng(seed)
    assert stand_alone(decay(300, seed)).mean() < 0.01
    assert stand_alone(rng.normal(size=300)).mean() < 0.01
    assert not stand_alone(np.exp(-np.arange(40.0))).any()
    assert not stand_alone(np.repeat([1.0, 0.1], 20)).any()  # a step of the learning rate
    assert not stand_alone(np.full(50, 0.01)).any()
    assert not stand_alone(np.tile([0.0, 1.0], 20)).any()
    assert not stand_alone(np.array([1.0, 9.0, 1.0])).any()  # too few to tell


def test_rows_of_little_weight_are_dots_where_the_objective_reports_it():
    recorded = rows(list(np.random.default_rng(0).normal(5, 1, 20)))
    for row in recorded:
        row["batch_weight"] = 3.0 if row["step"] % 5 == 0 else 8.0
    (panel,) = panels_of({"a": recorded})
    np.testing.assert_array_equal(panel.curves[0].steps[panel.curves[0].is_lone], [5, 10, 15, 20])


@pytest.mark.parametrize("name", ["learning_rate", "val_loss", "speed/steps_per_second"])
def test_what_is_no_average_over_a_batch_is_joined(name):
    recorded = rows(list(decay(40)), name, batch_weight=8.0)
    recorded[19] |= {name: 50.0, "batch_weight": 1.0}
    (panel,) = panels_of({"a": recorded})
    assert not panel.curves[0].is_lone.any()


def test_dense_rows_have_a_line_of_medians():
    assert only(list(decay(150))).curves[0].smoothed is None
    values = decay(5000, noise=0.0)
    values[::50] = 7.0
    steps, medians = only(list(values)).curves[0].smoothed
    assert len(steps) == 120
    np.testing.assert_allclose(medians, decay(5001, noise=0.0)[steps.astype(int)], atol=0.01)


def test_a_logarithmic_axis_is_for_losses_over_more_than_a_decade():
    assert only([5.0, 1.0, 0.1]).is_log
    assert not only([5.0, 1.0, 0.6]).is_log
    assert not only([5.0, 0.1, 0.0]).is_log
    assert not only([5.0, 0.1, -0.1]).is_log
    assert not panels_of({"a": rows([5.0, 0.1], "accuracy")})[0].is_log
