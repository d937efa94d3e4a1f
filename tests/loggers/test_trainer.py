"""Loggers of a `Trainer`: what it takes, what they get and when."""

import itertools

import numpy as np
import pytest

from tests.problems import Linear, config, regression, squared_error
from trainer import (
    ArgumentTypeError,
    Callback,
    ConsoleLogger,
    CSVLogger,
    EarlyStopping,
    FileLogger,
    Logger,
    ModelCheckpoint,
    Trainer,
    WeightedAverage,
)

DATA = regression(40)


class Spy(Logger):
    def __init__(self):
        self.events, self.closed = [], 0

    def log_scalars(self, scalars, step=None):
        self.events.append(("scalars", step, dict(scalars)))

    def log_text(self, name, text, step=None):
        self.events.append(("text", step, text))

    def log_hyperparams(self, params):
        self.events.append(("hyperparams",))

    def log_checkpoint(self, path, step):
        self.events.append(("checkpoint", step, path, path.exists()))

    def rewind(self, step):
        self.events.append(("rewind", step))

    def close(self):
        self.closed += 1

    def of(self, kind):
        return [event[1:] for event in self.events if event[0] == kind]

    def series(self, name):
        return [(step, row[name]) for step, row in self.of("scalars") if name in row]


def build(logger, **how):
    return Trainer(Linear(4), how.pop("settings", config()), loss_fn=squared_error, logger=logger, **how)


@pytest.mark.parametrize("sequence", [list, tuple])
def test_several_loggers_get_the_same(sequence):
    first, second = Spy(), Spy()
    trainer = build(sequence([first, second]))
    trainer.train(DATA, 1, 4)
    trainer.close()
    assert first.events
    assert first.events == second.events
    assert (first.closed, second.closed) == (0, 0)


@pytest.mark.parametrize("nothing", [None, [], ()])
def test_no_logger(nothing):
    build(nothing).train(DATA, 1, 4)


@pytest.mark.parametrize(
    ("logger", "text"),
    [
        ("runs", "`logger` is of type str; it must have the methods of trainer.Logger"),
        (CSVLogger, r"`logger` is the class CSVLogger; pass an instance, CSVLogger\(…\)"),
        ([Spy(), print], r"`logger\[1\]` is of type builtin_function_or_method; it must have"),
        ([[Spy()]], r"`logger\[0\]` is of type list"),
        ({"a": Spy()}, "`logger` is of type dict"),
    ],
)
def test_what_is_no_logger_is_refused_by_name(logger, text):
    with pytest.raises(ArgumentTypeError, match=text):
        build(logger)


@pytest.mark.parametrize("steps_per_call", [1, "auto"])
@pytest.mark.parametrize("frequency", [3, 1000])
def test_the_average_of_each_epoch_comes_at_its_last_step(steps_per_call, frequency):
    class Ends(Callback):
        def __init__(self):
            self.averages = []

        def on_epoch_end(self, trainer, epoch, logs):
            self.averages.append((trainer.step, logs["loss"]))

    spy, ends = Spy(), Ends()
    trainer = build(spy, settings=config(log_frequency=frequency), steps_per_call=steps_per_call, callbacks=[ends])
    trainer.train(DATA, 3, 4, regression(8))
    assert spy.series("epoch/loss") == ends.averages
    assert [step for step, _ in ends.averages] == [10, 20, 30]
    steps = [event[1] for event in spy.events if event[0] in ("scalars", "text")]
    assert steps == sorted(steps)


def test_the_average_comes_from_train_epoch_and_from_a_run_that_stops_early():
    spy = Spy()
    by_epoch = build(spy, train_data_loader=[regression(8)] * 5)
    losses = [by_epoch.train_epoch()["loss"] for _ in range(2)]
    assert spy.series("epoch/loss") == [(5, losses[0]), (10, losses[1])]
    spy = Spy()
    stopping = EarlyStopping(monitor="val_loss", patience=1, min_delta=1e9)
    build(spy, callbacks=[stopping]).train(DATA, 9, 4, regression(8))
    assert [step for step, _ in spy.series("epoch/loss")] == [10, 20]


def test_nothing_is_read_from_the_device_before_the_next_epoch_has_begun(monkeypatch):
    """The average of an epoch is computed where its device work is known to be over: no wait comes with it."""
    calls, steps = [], []
    compute = WeightedAverage.compute
    monkeypatch.setattr(WeightedAverage, "compute", lambda self: calls.append(trainer.step) or compute(self))

    class Steps(Callback):
        def on_call_end(self, trainer, step, logs):
            steps.append(step)

    trainer = build(Spy(), settings=config(log_frequency=4), callbacks=[Steps()], steps_per_call=5, progress=False)
    trainer.train(DATA, 3, 4)
    assert steps == [5, 10, 15, 20, 25, 30]
    # Of the first epoch at step 20, where the rows up to 15 are sent; of the last at the end of the run.
    assert min(calls) == 20


def test_a_logger_that_fails_does_not_end_the_training():
    class Broken(Spy):
        def log_scalars(self, scalars, step=None):
            raise ConnectionError("gone")

    spy = Spy()
    trainer = build([Broken(), spy])
    with pytest.warns(UserWarning, match="Broken failed in log_scalars: ConnectionError") as warned:
        trainer.train(DATA, 2, 4)
    assert len(warned) == 1
    assert trainer.step == 20
    reference = build(None)
    reference.train(DATA, 2, 4)
    np.testing.assert_array_equal(trainer.model.layer.kernel[...], reference.model.layer.kernel[...])
    assert spy.series("train/loss")


def test_what_a_log_callback_raises_ends_it():
    def broken(step, row, prefix):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        build(Spy(), log_callback=broken).train(DATA, 1, 4)


def test_every_checkpoint_is_told_once_when_it_is_complete(tmp_path):
    spy = Spy()
    with build(spy, workdir=tmp_path, save_interval=7) as trainer:
        trainer.train(DATA, 2, 4)
        by_hand = trainer.save_checkpoint(tmp_path / "mine.msgpack")
        later = trainer.save_checkpoint(tmp_path / "later.msgpack", background=True)
    told = spy.of("checkpoint")
    assert [(step, path.name) for step, path, _ in told] == [
        (7, "checkpoint_7.msgpack"),
        (14, "checkpoint_14.msgpack"),
        (20, "checkpoint_20.msgpack"),
        (20, by_hand.name),
        (20, later.name),
    ]
    assert all(exists for *_, exists in told)


@pytest.mark.parametrize("background", [False, True])
def test_the_best_checkpoints_are_told_too(tmp_path, background):
    spy = Spy()
    best = ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=-1, background=background)
    build(spy, callbacks=[best]).train(DATA, 2, 4, regression(8))
    assert spy.of("checkpoint") == [(10, tmp_path / "10", True), (20, tmp_path / "20", True)]


def test_a_checkpoint_that_was_not_written_is_not_told(tmp_path):
    spy = Spy()
    trainer = build(spy)
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="file"):
        trainer.save_checkpoint(tmp_path / "file" / "checkpoint.msgpack")
    trainer.close()
    assert spy.of("checkpoint") == []


def test_the_loggers_hear_where_a_run_is_resumed_and_loaded(tmp_path):
    first = build(None, workdir=tmp_path)
    first.train(DATA, 1, 4)
    spy = Spy()
    resumed = build(spy, workdir=tmp_path)
    resumed.train(DATA, 2, 4, resume=True)
    resumed.load_checkpoint(tmp_path / "checkpoint_10.msgpack")
    assert spy.of("rewind") == [(10,)]
    resumed.train(DATA, 1, 4)
    assert spy.of("rewind") == [(10,), (10,)]
    kinds = [kind for kind, _ in itertools.groupby(event[0] for event in spy.events)]
    assert kinds[:2] == ["hyperparams", "rewind"]


@pytest.mark.parametrize("make", [CSVLogger, FileLogger])
def test_nothing_is_made_before_the_first_event(tmp_path, make):
    """Processes beside the first make their loggers too, and have no events."""
    make(tmp_path / "run").close()
    assert list(tmp_path.iterdir()) == []


def test_a_console_beside_a_table(tmp_path, capsys):
    table = CSVLogger(tmp_path)
    build([ConsoleLogger(), table]).train(DATA, 1, 4)
    table.close()
    assert "epoch/loss" in capsys.readouterr().err
    assert "epoch/loss" in table.path.read_text().splitlines()[0]
