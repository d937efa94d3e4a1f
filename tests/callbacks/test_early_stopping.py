"""Early stopping: when it ends a run, and what a resumed run remembers."""

import math
from typing import ClassVar

import jax
import jax.numpy as jnp
import optax
import pytest

from tests.callbacks.test_model_checkpoint import build, run
from tests.core.test_eval_params import CASES
from tests.marks import slow_unless
from tests.problems import Busy, config, regression, squared_error
from tests.test_api import assert_same_bits
from trainer import (
    ArgumentError,
    Callback,
    EarlyStopping,
    Logger,
    ModelCheckpoint,
    ReduceLROnPlateau,
    Trainer,
    make_mesh,
)

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


@pytest.mark.parametrize(
    ("scores", "options", "reason"),
    [
        ([1, 2, 3], {"patience": 2}, "val_loss = 3 has not improved in 2 checks; best: 1 at step 1"),
        ([1, nan], {}, "val_loss = nan is not finite; best: 1 at step 1"),
        ([nan], {}, "val_loss = nan is not finite; best: none"),
        ([3, 0.5], {"stopping_threshold": 1}, "val_loss = 0.5 has reached 1; best: 0.5 at step 2"),
        ([3, 10], {"divergence_threshold": 9}, "val_loss = 10 is worse than 9; best: 3 at step 1"),
        ([3, 2], {}, None),
    ],
)
def test_it_says_why_and_what_was_best(scores, options, reason):
    assert play(scores, **options).reason == reason


def test_loggers_hear_why_a_run_ends_early(tmp_path):
    class Texts(Logger):
        said: ClassVar = []

        def log_text(self, name, text, step=None):
            self.said.append((name, text, step))

    class Enough(Callback):
        def on_epoch_end(self, trainer, epoch, logs):
            self.should_stop = epoch == 1

    stopping = EarlyStopping(monitor="loss", patience=1, min_delta=1e9)
    trainer = build(tmp_path, stopping, Enough(), logger=Texts())
    trainer.train(regression(20), 10, 4)
    ((_, text, step),) = [said for said in Texts.said if "stopped" in said[1]]
    assert text == f"stopped after 2 of 10 epochs: {stopping.reason}; Enough asked for it"
    assert (step, stopping.stopped_epoch, stopping.best_step) == (10, 1, 5)


@pytest.mark.parametrize(
    "layout", [{}, pytest.param({"data": 2, "fsdp": 2}, marks=pytest.mark.slow)], ids=["one device", "mesh"]
)
def test_the_best_params_come_back(layout, tmp_path):
    """The objective gets worse from the first epoch on, so the first is the best."""
    options = {"mesh": make_mesh(layout, jax.devices()[:4])} if layout else {}
    kept = []

    class Keep(Callback):
        def on_validation_end(self, trainer, logs):
            kept.append(jax.tree.map(jnp.copy, (trainer.state.params, trainer.state.model_state)))

    stopping = EarlyStopping(patience=2, min_delta=1e9, restore_best=True)
    trainer = build(tmp_path, Keep(), stopping, **options)
    shardings = [leaf.sharding for leaf in jax.tree.leaves(trainer.state)]
    run(trainer, epochs=10)
    assert (trainer.epoch, stopping.best_step) == (3, 5)
    assert_same_bits((trainer.state.params, trainer.state.model_state), kept[0])
    assert [leaf.sharding for leaf in jax.tree.leaves(trainer.state)] == shardings
    other = build(tmp_path / "other", EarlyStopping(patience=2, min_delta=1e9), **options)
    run(other, epochs=10)
    assert_same_bits((other.state.params, other.state.model_state), kept[-1])


class Keep(Callback):
    """Keeps the params of every validation."""

    def __init__(self):
        self.kept = []

    def on_validation_end(self, trainer, logs):
        self.kept.append(jax.tree.map(jnp.copy, (trainer.state.params, trainer.state.model_state)))


def best_first(patience=100):
    """Takes the first validation for the best."""
    return EarlyStopping(patience=patience, min_delta=1e9, restore_best=True)


def evaluated(trainer):
    return trainer.state.params, trainer.state.model_state


def test_they_come_back_where_the_run_ends_by_itself_too(tmp_path):
    keep = Keep()
    trainer = build(tmp_path, keep, best_first())
    run(trainer, epochs=3)
    assert trainer.epoch == 3
    assert_same_bits(evaluated(trainer), keep.kept[0])


def test_they_do_not_where_it_is_interrupted(tmp_path):
    class Fail(Callback):
        def on_epoch_end(self, trainer, epoch, logs):
            if epoch == 2:
                raise ZeroDivisionError

    keep = Keep()
    trainer = build(tmp_path, keep, best_first(), Fail())
    with pytest.raises(ZeroDivisionError):
        run(trainer, epochs=4)
    assert_same_bits(evaluated(trainer), keep.kept[-1])


def test_calls_of_train_epoch_are_one_run(tmp_path):
    keep, batches = Keep(), [regression(4, seed=seed) for seed in range(3)]
    settings = config(num_epochs=3)
    loaders = {"train_data_loader": batches, "val_data_loader": [regression(8, seed=9)]}
    trainer = Trainer(
        Busy(), settings, loss_fn=squared_error, workdir=tmp_path, callbacks=[keep, best_first()], **loaders
    )
    for epoch in range(3):
        trainer.train_epoch()
        assert_same_bits(evaluated(trainer), keep.kept[epoch if epoch < 2 else 0])


@pytest.mark.parametrize("settings", [{}, {"num_epochs": 9}], ids=["of no number", "left before its end"])
def test_a_loop_of_another_length_ends_where_it_is_closed(settings, tmp_path):
    keep, batches = Keep(), [regression(4, seed=seed) for seed in range(3)]
    loaders = {"train_data_loader": batches, "val_data_loader": [regression(8, seed=9)]}
    settings = config(epochs_per_validation=1, **settings)
    with Trainer(
        Busy(), settings, loss_fn=squared_error, workdir=tmp_path, callbacks=[keep, best_first()], **loaders
    ) as trainer:
        for epoch in range(3):
            trainer.train_epoch()
            assert_same_bits(evaluated(trainer), keep.kept[epoch])
    assert_same_bits(evaluated(trainer), keep.kept[0])
    trainer.close()
    other = Trainer(Busy(), settings, loss_fn=squared_error, workdir=tmp_path, **loaders)
    other.load_checkpoint(tmp_path / "checkpoint_9.msgpack")  # the latest state
    assert_same_bits(evaluated(other), keep.kept[2])


def looped(callbacks, epochs=3):
    trainer = Trainer(
        Busy(),
        config(epochs_per_validation=1),
        optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
        loss_fn=squared_error,
        callbacks=callbacks,
        train_data_loader=[regression(4, seed=seed) for seed in range(3)],
        val_data_loader=[regression(8, seed=9)],
        progress=False,
    )
    for _ in range(epochs):
        trainer.train_epoch()
    return trainer


def assign(trainer):
    trainer.state = trainer.state.replace(params=jax.tree.map(lambda array: array + 1, trainer.state.params))


def assign_in_place(trainer):
    trainer.state.params["outer"] = jax.tree.map(lambda array: array + 1, trainer.state.params["outer"])


def load_other(trainer):
    other = looped([], 4)
    trainer.state = other.state.replace(step=trainer.state.step)


CHANGES = {
    "assigned": assign,
    "assigned in place": assign_in_place,
    "loaded": load_other,
    "trained": lambda trainer: trainer.train_step(regression(4)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_state_that_changed_since_the_last_call_stays_when_it_is_closed(change):
    with looped([best_first()]) as trainer:
        CHANGES[change](trainer)
        before = jax.tree.map(jnp.copy, evaluated(trainer))
    trainer.close()
    assert_same_bits(evaluated(trainer), before)


def test_reading_the_state_and_another_learning_rate_change_no_params():
    keep = Keep()
    with looped([keep, best_first()]) as trainer:
        assert trainer.state.params
        trainer.set_learning_rate(0.5)
        trainer.validate_step(regression(4))
    assert_same_bits(evaluated(trainer), keep.kept[0])


def test_nor_are_they_restored_where_an_exception_leaves_the_block():
    keep = Keep()
    with pytest.raises(KeyError), looped([keep, best_first()]) as trainer:
        raise KeyError
    trainer.close()
    assert_same_bits(evaluated(trainer), keep.kept[2])


def test_of_several_processes_one_alone_reads_no_checkpoint(tmp_path):
    stopping = EarlyStopping(mode="max", patience=100, restore_best=True)
    trainer = looped([stopping, ModelCheckpoint(tmp_path, mode="max", save_top_k=1)], 1)
    trainer.train_step(regression(4))
    stopping.load_state_dict(stopping.state_dict())  # as in a resumed run
    before = jax.tree.map(jnp.copy, evaluated(trainer))
    with pytest.warns(UserWarning, match=r"does not restore the best params, those of step 3: it keeps no copy"):
        stopping.restore(trainer, from_disk=False)
    assert_same_bits(evaluated(trainer), before)
    stopping.restore(trainer)
    assert (jax.tree.leaves(evaluated(trainer))[0] != jax.tree.leaves(before)[0]).any()


@pytest.mark.parametrize("ends", [3, 5], ids=["in the middle", "at its end"])
def test_a_resumed_run_takes_them_from_the_best_checkpoint(ends, tmp_path):
    def made(directory, *more):
        # The loss falls, so the first validation is the best by this mode.
        stopping = EarlyStopping(mode="max", patience=100, restore_best=True)
        best = ModelCheckpoint(directory / "best", mode="max", save_top_k=1)
        return build(directory, stopping, best, *more, save_interval=5)

    class Stop(Callback):
        def on_epoch_end(self, trainer, epoch, logs):
            if epoch + 1 == ends:
                raise KeyError

    whole = made(tmp_path / "whole")
    run(whole, epochs=5)
    with pytest.raises(KeyError):
        run(made(tmp_path / "parts", Stop()), epochs=5)
    resumed = made(tmp_path / "parts")
    run(resumed, epochs=5, resume=True)
    assert_same_bits(evaluated(resumed), evaluated(whole))


def test_the_best_averaged_params_come_back(tmp_path):
    """They are computed from the state of the optimizer, so that comes back too."""
    make, eval_params = CASES["ema"]
    stopping = EarlyStopping(patience=2, min_delta=1e9, restore_best=True)
    trainer = build(tmp_path, stopping, optimizer=make(), eval_params=eval_params)
    run(trainer, epochs=10)
    assert trainer.epoch == 3
    assert trainer.evaluate(regression(8, seed=1), 4)["loss"] == pytest.approx(stopping.best_score)


def test_best_params_that_are_not_in_a_checkpoint_are_not_restored_in_silence(tmp_path):
    def fresh():
        return EarlyStopping(patience=2, min_delta=1e9, restore_best=True)

    trainer = build(tmp_path, fresh())
    run(trainer, epochs=1)
    path = trainer.save_checkpoint()
    resumed = build(tmp_path, fresh())
    resumed.load_checkpoint(path)
    other = ModelCheckpoint(tmp_path / "other", monitor="loss")  # the best of another metric are not these
    resumed.callbacks.add(other)
    with pytest.warns(UserWarning, match=r"cannot restore the best params, those of step 5: the run was resumed"):
        run(resumed, epochs=10)


def test_a_metric_that_no_step_reports_is_refused_at_the_first_call(tmp_path):
    trainer = build(tmp_path, EarlyStopping(monitor="acuracy"))
    with pytest.raises(ArgumentError, match=r"`monitor` is 'acuracy', which nothing measured; .*`?loss"):
        trainer.train(regression(20), 10, 4)
    assert trainer.epoch == 0


def test_a_metric_that_a_callback_adds_is_fine(tmp_path):
    class Adds(Callback):
        def on_epoch_end(self, trainer, epoch, logs):
            logs["added"] = float(epoch)

    stopping = EarlyStopping(monitor="added", patience=2)
    trainer = build(tmp_path, Adds(), stopping)
    trainer.train(regression(20), 10, 4)
    assert (trainer.epoch, stopping.best_score) == (3, 0.0)


@pytest.mark.parametrize("kind", [EarlyStopping, ReduceLROnPlateau])
def test_a_patience_of_none_says_which_is_the_least(kind):
    with pytest.raises(ArgumentError, match=r"`patience` is 0; it must be a positive integer; 1 .* at the first check"):
        kind("val_loss", patience=0)
