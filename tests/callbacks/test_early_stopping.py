"""Early stopping: when it ends a run, and what a resumed run remembers."""

import math

import pytest

from tests.callbacks.test_model_checkpoint import build, run
from tests.marks import slow_unless
from tests.problems import regression
from tests.test_api import assert_same_bits
from trainer import ArgumentError, EarlyStopping

nan, inf = math.nan, math.inf


def play(scores, **options):
    class Played:
        step = 0

    stopping, trainer = EarlyStopping(**options), Played()
    stopping.on_train_begin(trainer)
    for step, score in enumerate(scores, start=1):
        trainer.step = step
        stopping.on_validation_end(trainer, {"loss": score})
    return stopping


@pytest.mark.parametrize(
    ("scores", "options", "stopped", "best"),
    [
        ([3, 2, 1, 0], {}, None, 0),
        ([1, 2, 3, 4, 5], {"patience": 3}, 4, 1),
        ([1] * 12, {}, 11, 1),
        ([1, 2, 3, 4, 5], {"mode": "max"}, None, 5),
        ([1, 2, 0.5, 3, 3, 3], {"patience": 3}, 6, 0.5),
        ([1, 0.95, 0.9, 0.85], {"min_delta": 0.2, "patience": 2}, 3, 1),
        ([nan, nan], {"patience": 2, "check_finite": False}, 2, None),
        ([nan, 1, nan, nan], {"patience": 2, "check_finite": False}, 4, 1),
        ([inf, 5], {"patience": 1, "check_finite": False}, 1, 5),
        ([2, nan, 1], {}, 2, 1),
        ([2, -inf, 1], {}, 2, 1),
        ([inf], {"mode": "max"}, 1, None),
        ([3, 2, 1, 0], {"stopping_threshold": 1}, 3, 0),
        ([0.5, 1.0], {"stopping_threshold": 1, "mode": "max"}, 2, 1.0),
        ([3, 9, 10, 2], {"divergence_threshold": 9}, 3, 2),
        ([3, 1, 0.5], {"divergence_threshold": 1, "mode": "max"}, 3, 3),
        ([1, nan], {"check_finite": False, "divergence_threshold": 9}, 2, 1),
        ([1, 1], {"patience": 1}, 2, 1),
    ],
)
def test_when_it_stops(scores, options, stopped, best):
    stopping = play(scores, **options)
    assert stopping.stopped_step == stopped
    assert stopping.should_stop == (stopped is not None)
    assert stopping.best_score == best


def test_it_ends_a_run_after_the_epoch_and_the_next_run_starts_anew(tmp_path):
    stopping = EarlyStopping(patience=1, min_delta=1e9)
    trainer = build(tmp_path, stopping)
    run(trainer, epochs=10)
    assert (trainer.epoch, stopping.stopped_step) == (2, 10)
    run(trainer, epochs=10)
    assert (trainer.epoch, stopping.stopped_step) == (4, 20)


def test_a_metric_of_training(tmp_path):
    stopping = EarlyStopping(monitor="loss", patience=2, min_delta=1e9)
    trainer = build(tmp_path, stopping)
    trainer.train(regression(20), 10, 4)
    assert trainer.epoch == 3


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that stopped early, with a checkpoint of every step, and where it is."""
    directory = tmp_path_factory.mktemp("whole")
    trainer = build(directory, EarlyStopping(patience=2, min_delta=1e9), save_interval=1)
    run(trainer, epochs=10)
    assert trainer.step == 15
    return directory, trainer


@pytest.mark.parametrize("step", slow_unless({1, 9, 10, 15}.__contains__, range(1, 16)))
def test_a_resumed_run_stops_where_it_would_have(step, whole, tmp_path):
    directory, trainer = whole
    again = build(tmp_path / "again", stopping := EarlyStopping(patience=2, min_delta=1e9))
    run(again, epochs=10, resume=directory / "files" / f"checkpoint_{step}.msgpack")
    assert (again.step, stopping.stopped_step) == (15, 15)
    assert_same_bits(again.state, trainer.state)


def test_arguments():
    with pytest.raises(ArgumentError, match="`patience` is 0; it must be a positive integer"):
        EarlyStopping(patience=0)
    with pytest.raises(ArgumentError, match="`min_delta` is -1; it must be zero or more"):
        EarlyStopping(min_delta=-1)
    with pytest.raises(ArgumentError, match="`stopping_threshold` is nan; it must be a finite number, or None"):
        EarlyStopping(stopping_threshold=nan)
    with pytest.raises(ArgumentError, match="`divergence_threshold` is inf; it must be a finite number"):
        EarlyStopping(divergence_threshold=inf)


def test_a_run_without_validation_is_refused_before_it_trains(tmp_path):
    trainer = build(tmp_path, EarlyStopping())
    with pytest.raises(ArgumentError, match="`monitor` is 'val_loss', but this run validates on nothing; pass"):
        trainer.train(regression(20), 3, 4)
    assert trainer.step == 0


class Continuing:
    """Stands for a trainer in the next call of one run."""

    step, is_new_run = 7, False


def test_calls_that_continue_a_run_continue_the_count():
    stopping = play([1, 2, 3], patience=4)
    stopping.on_train_begin(Continuing())
    stopping.on_validation_end(Continuing(), {"loss": 4.0})
    stopping.on_train_begin(Continuing())
    stopping.on_validation_end(Continuing(), {"loss": 5.0})
    assert (stopping.stopped_step, stopping.best_score) == (7, 1)


def test_a_state_that_was_loaded_outlives_the_start_of_the_next_run_only(tmp_path):
    first = build(tmp_path, stopping := EarlyStopping(patience=5, min_delta=1e9))
    run(first, epochs=2)
    path = first.save_checkpoint()
    second = build(tmp_path / "again", again := EarlyStopping(patience=5, min_delta=1e9))
    second.load_checkpoint(path)
    again.on_train_begin(object())
    assert again.state_dict() == stopping.state_dict() != EarlyStopping().state_dict()
    again.on_train_begin(object())
    assert again.state_dict() == EarlyStopping().state_dict()


def test_a_missing_monitor(tmp_path):
    with pytest.raises(ArgumentError, match="`monitor` is 'val_los', which nothing measured; did you mean"):
        run(build(tmp_path, EarlyStopping("val_los")))
