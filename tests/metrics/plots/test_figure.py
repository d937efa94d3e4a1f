"""Figures: what is drawn, where it is written, and that pyplot is left alone."""

import math
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from tests.problems import Linear, config, regression, squared_error
from trainer import ArgumentError, History, ReduceLROnPlateau, SchedulerConfig, Trainer, plot_runs
from trainer.commands.histories import read_rows
from trainer.features.search import RateSearch
from trainer.fit import speeds
from trainer.metrics.plots import panels_of
from trainer.metrics.plots.figure import COLOURS


def history(count=8, **more):
    rows = [{"step": step, "loss": 1 / step, "learning_rate": 0.1, **more} for step in range(1, count + 1)]
    return History.from_rows([*rows[:-1], {**rows[-1], "val_loss": 0.5}])


def drawn(axes):
    return [line for line in axes.get_lines() if len(line.get_xdata())]


def test_training_and_validation_are_in_one_panel():
    figure = history().plot()
    loss, rate = figure.axes
    assert (loss.get_title(), rate.get_title()) == ("loss", "learning rate")
    training, validation = drawn(loss)[0], drawn(loss)[-1]
    np.testing.assert_array_equal(training.get_xdata(), range(1, 9))
    assert (training.get_color(), validation.get_color()) == COLOURS[:2]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["training", "validation"]


def test_a_run_of_a_trainer_is_drawn_with_what_it_reports(tmp_path):
    model = nnx.Linear(4, 1, rngs=nnx.Rngs(0))

    def loss_fn(model, batch, rng, step):
        return squared_error(lambda x: model(x)[:, 0], batch, rng, step)[0], {}

    report = ["learning_rate", "gradient_norm"]
    trainer = Trainer(model, config(log_frequency=1), loss_fn=loss_fn, report=report, workdir=tmp_path)
    trainer.train(regression(32), 3, 8, regression(16))
    titles = [axes.get_title() for axes in trainer.history.plot().axes]
    assert titles == ["loss", "learning rate", "gradient norm", "steps per second"]
    speed = drawn(trainer.history.plot().axes[-1])[0]
    assert speed.get_xdata().tolist() == [8, 12]  # not of the epoch that compiled
    assert trainer.history.plot().axes[-1].get_ylim()[0] == 0
    assert speed.get_ydata()[-1] == pytest.approx(trainer.throughput.steps_per_second)


SCHEDULES = {
    "constant": {},
    "cosine": {"scheduler": SchedulerConfig(scheduler_type="cosine", warmup_steps=3)},
    "plateau": {},
}


@pytest.mark.parametrize("kind", SCHEDULES)
def test_without_a_report_the_learning_rate_is_that_of_each_epochs_last_update(kind, monkeypatch):
    monkeypatch.setattr(speeds, "_RATE_EVERY", 0.0)

    def trained(**options):
        # Every epoch but the first is no improvement.
        callbacks = [ReduceLROnPlateau("loss", patience=1, min_delta=1e9)] if kind == "plateau" else []
        settings = config(log_frequency=1, **SCHEDULES[kind])
        trainer = Trainer(Linear(4), settings, loss_fn=squared_error, callbacks=callbacks, **options)
        trainer.train(regression(32), 4, 8)
        return trainer.history

    reported, silent = trained(report=["learning_rate"]), trained()
    expected = dict(zip(*reported.series("learning_rate"), strict=True))
    rates = silent.figures["learning_rate"]
    assert [step for step, _ in rates] == [4, 8, 12, 16]
    assert [rate for _, rate in rates] == pytest.approx([expected[step] for step, _ in rates], rel=1e-6)
    assert (len({rate for _, rate in rates}) == 1) == (kind == "constant")
    assert "learning rate" in [axes.get_title() for axes in silent.plot().axes]
    assert all("learning_rate" not in row for row in silent)
    drawn_steps = [row["step"] for row in reported.to_draw() if "learning_rate" in row]
    assert drawn_steps == list(range(1, 17))


def test_a_rate_that_is_not_known_is_not_drawn():
    trainer = Trainer(Linear(4), config(), optax.adam(1e-3), loss_fn=squared_error)
    trainer.train(regression(32), 4, 8)
    assert "learning_rate" not in trainer.history.figures


def test_of_short_epochs_the_rate_is_computed_now_and_then(monkeypatch):
    monkeypatch.setattr(speeds, "_RATE_EVERY", 1e9)
    trainer = Trainer(Linear(4), config(), loss_fn=squared_error)
    trainer.train(regression(32), 4, 8)
    assert trainer.history.figures["learning_rate"] == ((4, pytest.approx(1e-2)),)


def test_short_last_batches_of_data_in_memory_are_known(tmp_path):
    trainer = Trainer(Linear(4), config(log_frequency=1), loss_fn=squared_error, workdir=tmp_path)
    trainer.train(regression(33), 3, 8)
    for rows in (trainer.history.to_draw(), read_rows(tmp_path)):
        (panel,) = panels_of({"a": rows}, ["loss"])
        lone = panel.curves[0].steps[panel.curves[0].is_lone]
        assert set(lone) >= {5, 10, 15}
    assert "batch_weight" not in trainer.history[-1]
    assert drawn(trainer.history.plot(metrics=["loss"]).axes[0])[0].get_xdata().tolist() == [
        step for step in range(1, 16) if step not in lone
    ]


@pytest.mark.parametrize(("name", "begins"), [("a.png", b"\x89PNG"), ("b/c.SVG", b"<?xml"), ("d.pdf", b"%PDF")])
def test_a_path_is_written_in_its_format(name, begins, tmp_path):
    assert history().plot(tmp_path / name) is None
    assert (tmp_path / name).read_bytes().startswith(begins)


def test_another_ending_is_refused_before_anything_is_drawn(tmp_path):
    with pytest.raises(ArgumentError, match=r"`path` is '.*a.jpg'; a picture is a name in .png, .svg, .pdf"):
        history().plot(tmp_path / "a.jpg")
    with pytest.raises(ArgumentError, match="there is nothing to plot"):
        History().plot(tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("where", ["drawing", "writing"])
def test_a_failure_leaves_the_earlier_picture(where, tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    path.write_bytes(b"earlier")
    write = Path.write_bytes

    def fail(drawing, *arguments, **options):
        if where == "writing":
            write(drawing, b"half")
        raise OSError("no")

    monkeypatch.setattr(*((type(history().plot()), "savefig") if where == "drawing" else (Path, "write_bytes")), fail)
    with pytest.raises(OSError, match="no"):
        history().plot(path)
    assert path.read_bytes() == b"earlier"
    assert list(tmp_path.iterdir()) == [path]


def test_runs_are_over_each_other_with_their_labels():
    names = ["a", "_b", "$c$", *(f"run {number}" for number in range(7))]
    figure = plot_runs({name: history() for name in names})
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [
        *("a", " _b", r"\$c\$", *(f"run {number}" for number in range(7)), "validation")
    ]
    looks = {(line.get_color(), str(line._dash_pattern)) for line in figure.legends[0].get_lines()[:-1]}
    assert len(looks) == len(names)  # more than there are colours


@pytest.mark.parametrize(
    "values", [[math.nan] * 4, [1.0], [math.nan, 1.0, math.inf, 2.0, 3.0], [0.0, 0.0], [1e30, 1e-30, 1.0], [-1.0, 5.0]]
)
def test_hard_values_are_drawn_without_a_warning(values, tmp_path):
    recorded = History.from_rows([{"step": step, "loss": value} for step, value in enumerate(values)])
    recorded.plot(tmp_path / "a.png")
    bad = sum(not math.isfinite(value) for value in values)
    assert recorded.plot().axes[0].get_title() == "loss" + (f"  ({bad} not finite)" if bad else "")


def test_a_lone_row_outside_of_the_axis_is_at_its_edge():
    values = 5.0 + np.random.default_rng(0).normal(size=60) / 10
    values[[19, 39]] = 500.0, -500.0
    figure = History.from_rows([{"step": step, "loss": value} for step, value in enumerate(values.tolist())]).plot()
    low, high = figure.axes[0].get_ylim()
    assert 4 < low < high < 6
    markers = {line.get_marker(): line.get_ydata() for line in drawn(figure.axes[0])}
    assert (markers["^"], markers["v"]) == ([high], [low])


def test_pyplot_and_its_backend_are_left_alone(tmp_path):
    code = f"""
import sys, matplotlib
settings = lambda: {{name: matplotlib.rcParams[name] for name in matplotlib.rcParams if name != "backend"}}
before = settings()
from trainer import History
History.from_rows([{{"step": 1, "loss": 1.0}}, {{"step": 2, "loss": 0.01}}]).plot({str(tmp_path / "a.png")!r})
assert settings() == before
assert matplotlib.get_backend(auto_select=False) is None
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-W", "error::UserWarning", "-c", code], check=True)
    assert (tmp_path / "a.png").exists()


def test_a_notebook_shows_a_figure_and_pickle_keeps_it():
    figure = history().plot()
    assert figure._repr_png_().startswith(b"\x89PNG")
    again = pickle.loads(pickle.dumps(figure))
    assert [axes.get_title() for axes in again.axes] == ["loss", "learning rate"]


def test_without_matplotlib_the_error_names_the_extra(monkeypatch):
    from trainer.metrics.plots import figure

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    figure._figure_class.cache_clear()
    with pytest.raises(ImportError, match=r"plotting needs matplotlib: pip install 'nnx-trainer\[plot\]'"):
        history().plot()
    figure._figure_class.cache_clear()


def test_without_pandas_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"needs pandas: pip install 'nnx-trainer\[pandas\]'"):
        history().to_pandas()


def test_a_range_test_marks_its_suggestion(tmp_path):
    rates = np.geomspace(1e-5, 1.0, 50)
    losses = 1 / (1 + rates * 100)
    losses[-1] = np.inf
    axes = RateSearch(rates, losses, 1e-2).plot().axes[0]
    assert axes.get_title() == "the loss falls fastest at 0.01"
    assert axes.get_xscale() == "log"
    assert 1e-2 in [line.get_xdata()[0] for line in drawn(axes) if len(line.get_xdata()) == 2]
    assert RateSearch(rates, np.full(50, np.nan), None).plot().axes[0].get_title() == "the loss falls at no rate"
    RateSearch(rates, losses, 1e-2).plot(tmp_path / "a.svg")
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")


def test_values_on_the_device_are_read():
    recorded = History()
    recorded.record(1, {"loss": jax.numpy.float32(2.0)})
    recorded.record(2, {"loss": jax.numpy.float32(1.0)})
    np.testing.assert_array_equal(drawn(recorded.plot().axes[0])[0].get_ydata(), [2.0, 1.0])
