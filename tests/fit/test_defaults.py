"""What a run does where nothing is said: enough points for a curve, validations, the last state saved."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.problems import Linear, config, regression, squared_error
from trainer import Callback, Trainer, TrainingConfig, load_run
from trainer.config import OptimizerConfig
from trainer.fit.cadence import row_interval
from trainer.loggers.base import Logger

MANY = 100_000


class Scalar(nnx.Module):
    """Next to nothing to compute, so that a hundred thousand steps take a second."""

    def __init__(self):
        self.value = nnx.Param(jnp.zeros(()))


def distance(model, batch, rng, step):
    del rng, step
    return jnp.mean((model.value[...] - batch) ** 2), {}


def defaults():
    return TrainingConfig(name="defaults", optimizer=OptimizerConfig(optimizer_type="sgd", learning_rate=1e-3))


def build(tmp_path=None, settings=None, **options):
    settings = defaults() if settings is None else settings
    return Trainer(Linear(4), settings, workdir=tmp_path, loss_fn=squared_error, **options)


class Calls(Callback):
    def __init__(self):
        self.number = 0

    def on_call_end(self, trainer, step, logs):
        self.number += 1


class TestFiveEpochsOfEightSteps:
    def test_every_step_is_a_point_of_the_curve(self):
        logged = []
        trainer = build(log_callback=lambda step, metrics, prefix: logged.append((prefix, step)))
        trainer.train(regression(64), 5, 8)
        steps, losses = trainer.history.series("loss")
        assert steps == list(range(1, 41))
        assert np.isfinite(losses).all()
        # That which `log_frequency` promises to loggers is as it was.
        assert logged == [("train", 1), ("train", 40)]

    def test_it_is_validated_at_the_end_of_every_epoch(self):
        trainer = build()
        trainer.train(regression(64), 5, 8, regression(16))
        assert trainer.history.series("val_loss")[0] == [8, 16, 24, 32, 40]

    def test_the_last_state_is_saved_where_there_is_a_directory(self, tmp_path):
        trainer = build(tmp_path)
        trainer.train(regression(64), 5, 8)
        (saved,) = tmp_path.glob("checkpoint_*.msgpack")
        assert load_run(saved, trainer.run).step == 40

    def test_train_epoch_does_the_same(self, tmp_path):
        data = regression(64)
        batches = [{name: array[i : i + 8] for name, array in data.items()} for i in range(0, 64, 8)]
        trainer = build(tmp_path, train_data_loader=batches, val_data_loader=batches[:2])
        for _ in range(5):
            trainer.train_epoch()
        assert trainer.history.series("loss")[0] == list(range(1, 41))
        assert trainer.history.series("val_loss")[0] == [8, 16, 24, 32, 40]

    def test_steps_stay_fused(self):
        calls = Calls()
        build(callbacks=[calls]).train(regression(64), 5, 8)
        assert calls.number == 5

    def test_a_loop_of_train_step_has_its_curve_too(self):
        trainer, batch = build(), regression(8)
        for _ in range(30):
            trainer.train_step(batch)
        assert trainer.history.series("loss")[0] == list(range(1, 31))


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    directory, calls = tmp_path_factory.mktemp("run"), Calls()
    trainer = Trainer(
        Scalar(),
        defaults(),
        optax.sgd(1e-3),
        loss_fn=distance,
        workdir=directory,
        save_interval=MANY // 2,
        callbacks=[calls],
    )
    trainer.train(np.ones(MANY // 5, np.float32), 5, 1, np.ones(2, np.float32), val_interval=MANY)
    return trainer, directory, calls.number


class TestAHundredThousandSteps:
    def test_the_history_has_the_rows_of_the_loggers_and_no_more(self, trained):
        trainer, _, _ = trained
        steps, losses = trainer.history.series("loss")
        assert steps == [1, *range(100, MANY + 1, 100)]
        assert losses[0] == 1.0
        assert losses[-1] < 1e-6

    def test_it_is_validated_at_the_end_of_every_epoch(self, trained):
        trainer, _, _ = trained
        assert trainer.history.series("val_loss")[0] == [MANY // 5 * epoch for epoch in range(1, 6)]

    def test_the_last_state_is_saved(self, trained):
        trainer, directory, _ = trained
        assert load_run(directory / f"checkpoint_{MANY}.msgpack", trainer.run).step == MANY

    def test_steps_stay_fused(self, trained):
        assert trained[2] < MANY / 100


class Saves(Logger):
    def __init__(self):
        self.steps = []

    def log_checkpoint(self, path, step):
        self.steps.append(step)

    def log_scalars(self, scalars, step=None):
        pass

    def log_text(self, name, text, step=None):
        pass


@pytest.mark.slow
def test_a_hundred_thousand_steps_in_which_nothing_is_said(tmp_path):
    """A thousand validations and a hundred saves, of which the last five are kept."""
    saves, calls = Saves(), Calls()
    trainer = Trainer(
        Scalar(), defaults(), optax.sgd(1e-3), loss_fn=distance, workdir=tmp_path, logger=saves, callbacks=[calls]
    )
    trainer.train(np.ones(MANY // 5, np.float32), 5, 1, np.ones(2, np.float32))
    trainer.close()
    assert saves.steps == list(range(1000, MANY + 1, 1000))
    kept = sorted(int(path.stem.partition("_")[2]) for path in tmp_path.glob("checkpoint_*"))
    assert kept == saves.steps[-5:]
    assert load_run(tmp_path / f"checkpoint_{MANY}.msgpack", trainer.run).step == MANY
    steps, losses = trainer.history.series("val_loss")
    assert steps == list(range(100, MANY + 1, 100))
    assert losses[-1] < 1e-6 < losses[0]
    assert trainer.history.series("loss")[0] == [1, *steps]
    assert calls.number == MANY / 100


@pytest.mark.parametrize(
    ("log_frequency", "finished", "total", "interval"),
    [
        (100, 1, 40, 1),
        (100, 1, 199, 1),
        (100, 1, 1000, 10),
        (100, 900, 1000, 10),
        (100, 1, MANY, 100),
        (5, 1, MANY, 5),
        (100, 1, None, 1),
        (100, 199, None, 1),
        (100, 250, None, 2),
        (100, 5000, None, 50),
        (100, 10**6, None, 100),
    ],
)
def test_the_steps_from_row_to_row(log_frequency, finished, total, interval):
    assert row_interval(log_frequency, finished, total) == interval


@pytest.mark.parametrize("length", [1, 99, 100, 101, 250, 1000, 3000, 20_000])
def test_a_run_of_unknown_length_has_a_hundred_rows_wherever_it_ends(length):
    rows = sum(step % row_interval(100, step, None) == 0 for step in range(1, length + 1))
    assert rows >= min(length, 100)


@pytest.mark.parametrize("stop", [3, 8, 21])
def test_a_resumed_run_has_the_rows_of_one_that_was_not_interrupted(stop, tmp_path):
    class Interrupts(Callback):
        def on_call_end(self, trainer, step, logs):
            if step == stop:
                raise KeyboardInterrupt

    data, settings = regression(64), config(log_frequency=20)
    whole = build(settings=settings)
    whole.train(data, 4, 8)
    first = build(tmp_path, settings, callbacks=[Interrupts()], save_interval=stop, steps_per_call=1)
    with pytest.raises(KeyboardInterrupt):
        first.train(data, 4, 8)
    first.save_checkpoint()
    resumed = build(tmp_path, settings, save_interval=stop)
    resumed.train(data, 4, 8, resume=True)
    assert resumed.history.to_dict() == whole.history.to_dict()


def test_a_second_run_has_its_own_hundred_rows():
    trainer = build(settings=config(log_frequency=50))
    trainer.train(regression(80), 20, 8)
    trainer.train(regression(80), 20, 8)
    assert trainer.history.series("loss")[0] == [1, *range(2, 401, 2)]
