"""`MetricFanout`: which destination gets what, when, and who is closed."""

import threading

import jax
import jax.numpy as jnp
import pytest

from tests.problems import Linear, config, regression, squared_error
from trainer import Logger, MetricsLogger, Throughput, Trainer, WeightedAverage
from trainer.loggers.fanout import MetricFanout


class Spy(Logger):
    def __init__(self):
        self.rows, self.closed = [], 0

    def log_scalars(self, scalars, step=None):
        self.rows.append((step, dict(scalars)))

    def log_text(self, name, text, step=None):
        self.rows.append((step, name, text))

    def log_hyperparams(self, params):
        self.rows.append(("hyperparameters", dict(params)))

    def close(self):
        self.closed += 1


def metrics(loss, step):
    return {"loss": jnp.float32(loss), "step": jnp.int32(step)}


def test_every_destination_gets_plain_numbers():
    calls, inside, logger = [], Spy(), Spy()
    fanout = MetricFanout(lambda step, row, prefix: calls.append((step, row, prefix)), MetricsLogger(inside), [logger])
    fanout.report("train", 3, metrics(0.5, 3))
    fanout.report("val", 3, metrics(0.25, 3))
    assert calls == [(3, {"loss": 0.5, "step": 3}, "train"), (3, {"loss": 0.25, "step": 3}, "val")]
    assert inside.rows == logger.rows == [(3, {"train/loss": 0.5}), (3, {"val/loss": 0.25})]


@pytest.mark.parametrize(
    "newer",
    [
        lambda fanout: fanout.flush(),
        lambda fanout: fanout.report("val", 2, metrics(2.0, 2)),
        lambda fanout: fanout.log_text("note", "text", 2),
        lambda fanout: fanout.log_throughput(2, Throughput(1.0, 2.0, 0.0)),
        lambda fanout: fanout.log_test_metrics({"loss": 3.0}),
        lambda fanout: fanout.close(),
    ],
)
def test_what_was_deferred_is_sent_before_anything_newer(newer):
    spy = Spy()
    fanout = MetricFanout(None, MetricsLogger(spy), [spy])
    fanout.defer("train", 1, metrics(0.5, 1))
    fanout.defer("train", 2, metrics(0.25, 2))
    assert spy.rows == []
    newer(fanout)
    assert spy.rows[:2] == [(1, {"train/loss": 0.5}), (2, {"train/loss": 0.25})]
    sent = len(spy.rows)
    fanout.flush()
    assert len(spy.rows) == sent


def test_without_a_destination_nothing_is_read_from_the_device(monkeypatch):
    monkeypatch.setattr(jax, "device_get", None)
    fanout = MetricFanout(None, None, ())
    assert not fanout.has_destination
    fanout.report("train", 1, metrics(0.5, 1))
    fanout.defer("train", 2, metrics(0.5, 2))
    fanout.log_text("note", "text", 2)
    fanout.log_test_metrics({"loss": 1.0})
    fanout.close()


@pytest.mark.parametrize("given", [(print, None, ()), (None, MetricsLogger(Spy()), ()), (None, None, [Spy()])])
def test_any_destination_counts(given):
    assert MetricFanout(*given).has_destination
    assert MetricFanout(None, None, (), owned=[Spy()]).has_destination


def test_hyperparameters_are_logged_once():
    spy = Spy()
    fanout = MetricFanout(None, None, [spy])
    fanout.log_hyperparams({"a": 1})
    fanout.log_hyperparams({"a": 2})
    assert spy.rows == [("hyperparameters", {"a": 1})]


def test_speeds_that_are_unknown_are_left_out():
    spy = Spy()
    MetricFanout(None, None, [spy]).log_throughput(4, Throughput(1.0, 2.0, 0.5))
    assert spy.rows == [
        (4, {"speed/steps_per_second": 1.0, "speed/examples_per_second": 2.0, "speed/waiting_for_data": 0.5})
    ]


def test_only_owned_loggers_are_closed():
    callers, owned = Spy(), Spy()
    fanout = MetricFanout(None, MetricsLogger(callers), [callers], owned=[owned])
    fanout.report("train", 1, metrics(0.5, 1))
    fanout.close()
    assert (callers.closed, owned.closed, len(owned.rows)) == (0, 1, 1)


def test_all_are_closed_where_a_destination_raises():
    def broken(step, row, prefix):
        raise ZeroDivisionError

    first, second = Spy(), Spy()
    second.close = lambda: 1 / 0
    fanout = MetricFanout(broken, None, (), owned=[first, second])
    fanout.defer("train", 1, metrics(0.5, 1))
    said = pytest.warns(UserWarning, match=r"^Spy failed in close: ZeroDivisionError")
    with said, pytest.raises(ZeroDivisionError):
        fanout.close()
    assert first.closed == 1


def test_a_row_at_which_a_destination_raises_is_not_sent_again():
    rows = []

    def once_broken(step, row, prefix):
        rows.append(step)
        if len(rows) == 1:
            raise ZeroDivisionError

    fanout = MetricFanout(once_broken, None, ())
    fanout.defer("train", 1, metrics(0.5, 1))
    fanout.defer("train", 2, metrics(0.5, 2))
    with pytest.raises(ZeroDivisionError):
        fanout.flush()
    fanout.flush()
    assert rows == [1, 2]


@pytest.mark.parametrize("steps_per_call", [1, "auto"])
def test_rows_and_texts_of_a_run_come_in_ascending_order(steps_per_call, tmp_path):
    """Compilations, fused steps, validations, saves, speeds: some loggers drop a row of an earlier step."""
    spy = Spy()
    options = {"steps_per_call": steps_per_call, "save_interval": 7, "workdir": tmp_path}
    settings = config(log_frequency=3)
    trainer = Trainer(Linear(4), settings, loss_fn=squared_error, logger=spy, **options)
    for _ in range(2):
        trainer.train(regression(40), 2, 4, regression(8), 5)
    trainer.close()
    steps = [row[0] for row in spy.rows if isinstance(row[0], int)]
    assert steps == sorted(steps)
    assert steps[-1] == 40


def test_a_metrics_logger_takes_the_step_by_position():
    spy = Spy()
    logger = MetricsLogger(spy)
    logger.log_training_metrics({"loss": 1.0}, 3)
    logger.log_validation_metrics({"loss": 2.0}, 4)
    logger.log_test_metrics({"loss": 3.0}, 5)
    logger.log_training_metrics({"loss": 4.0}, step=6)
    assert spy.rows == [
        (3, {"train/loss": 1.0}),
        (4, {"val/loss": 2.0}),
        (5, {"test/loss": 3.0}),
        (6, {"train/loss": 4.0}),
    ]


class Failing(Logger):
    """Fails in every method, or passes a given exception on."""

    def __init__(self, error=None):
        self.calls = []

        def method(name):
            def fail(*arguments, **named):
                self.calls.append(name)
                raise error or OSError("no server")

            return fail

        for name in CALLS:
            setattr(self, name, method(name))


CALLS = ("log_scalars", "log_text", "log_hyperparams", "log_checkpoint", "rewind", "close")


def tell_everything(fanout):
    fanout.log_hyperparams({})
    fanout.rewind(0)
    for step in (1, 2):
        fanout.report("train", step, metrics(0.5, step))
    fanout.log_text("note", "text", 2)
    fanout.log_checkpoint("path", 2)
    fanout.log_throughput(2, Throughput(1.0, 2.0, 0.0))
    fanout.close()


def test_a_logger_that_fails_is_said_once_and_the_others_get_everything():
    failing, spy = Failing(), Spy()
    said = r"^Failing failed in log_hyperparams: OSError\('no server'\). The training continues, what it cannot log is"
    with pytest.warns(UserWarning, match=said) as warned:
        tell_everything(MetricFanout(None, None, [failing, spy], owned=[failing]))
    assert len(warned) == 1
    assert set(failing.calls) == set(CALLS)
    assert [row[0] for row in spy.rows] == ["hyperparameters", 1, 2, 2, 2]


def test_each_of_several_is_named():
    class Other(Failing):
        pass

    with pytest.warns(UserWarning, match="failed in") as warned:
        tell_everything(MetricFanout(None, MetricsLogger(Other()), [Failing(), Other()]))
    names = [str(one.message).split(" failed in ")[0] for one in warned]
    assert names == ["Failing", "Other", "MetricsLogger(Other)"]


def test_ctrl_c_passes():
    failing = Failing(KeyboardInterrupt())
    for tell in (
        lambda fanout: fanout.log_text("note", "text", 1),
        lambda fanout: fanout.log_hyperparams({}),
        lambda fanout: fanout.report("train", 1, metrics(0.5, 1)),
        lambda fanout: fanout.close(),
    ):
        with pytest.raises(KeyboardInterrupt):
            tell(MetricFanout(None, None, [failing], owned=[failing]))


def test_a_logger_needs_no_method_that_came_later():
    class Old:
        def __init__(self):
            self.rows = []

        def log_scalars(self, scalars, step=None):
            self.rows.append(step)

        def log_text(self, name, text, step=None):
            self.rows.append(name)

        def log_hyperparams(self, params):
            self.rows.append("hyperparameters")

    old = Old()
    tell_everything(MetricFanout(None, None, [old]))
    assert old.rows == ["hyperparameters", 1, 2, "note", 2]


def test_a_logger_that_is_given_twice_gets_a_row_once():
    spy = Spy()
    MetricFanout(None, None, [spy, spy], owned=[spy]).report("train", 1, metrics(0.5, 1))
    assert spy.rows == [(1, {"train/loss": 0.5})]


class Average(WeightedAverage):
    def __init__(self, loss):
        super().__init__()
        self.add({"loss": loss}, 1)
        self.computed = 0

    def compute(self):
        self.computed += 1
        return super().compute()


def test_an_average_waits_for_a_row_behind_it():
    """The device may be computing it; with a row of the next epoch it has finished."""
    spy, average = Spy(), Average(2.0)
    fanout = MetricFanout(None, None, [spy])
    fanout.defer("train", 8, metrics(0.5, 8))
    fanout.defer_average(8, average)
    fanout.flush_rows()
    fanout.flush_rows()
    assert (average.computed, spy.rows) == (0, [(8, {"train/loss": 0.5})])
    fanout.defer("train", 10, metrics(0.25, 10))
    fanout.flush_rows()
    assert spy.rows[1:] == [(8, {"epoch/loss": 2.0}), (10, {"train/loss": 0.25})]
    fanout.defer_average(16, Average(1.0))
    fanout.close()
    assert spy.rows[3:] == [(16, {"epoch/loss": 1.0})]


def test_an_average_is_not_computed_for_a_callback_alone():
    average = Average(2.0)
    fanout = MetricFanout(lambda step, row, prefix: None, None, ())
    fanout.defer_average(8, average)
    fanout.close()
    assert average.computed == 0


class Emptying(Logger):
    """Takes what it gets apart, as some adapters do."""

    def log_scalars(self, scalars, step=None):
        scalars.clear()

    def log_hyperparams(self, params):
        params["optimizer"].clear()


def test_hyperparameters_that_cannot_be_copied_are_logged():
    spy, lock = Spy(), threading.Lock()
    settings = config(metadata={"device": jax.devices()[0], "held": [{"lock": lock}]})
    trainer = Trainer(Linear(4), settings, loss_fn=squared_error, logger=[Emptying(), spy])
    trainer.train(regression(8), 1, 8)
    assert spy.rows[0][1]["metadata"] == settings.metadata
    assert spy.rows[0][1]["metadata"]["held"][0]["lock"] is lock


def test_what_one_destination_does_to_its_row_reaches_no_other():
    spy = Spy()
    fanout = MetricFanout(lambda step, row, prefix: row.clear(), MetricsLogger(Emptying()), [Emptying(), spy])
    fanout.log_hyperparams({"optimizer": {"name": "adam"}})
    fanout.report("train", 3, metrics(0.5, 3))
    fanout.log_throughput(4, Throughput(2.0, 1.0, 0.0))
    assert spy.rows[:2] == [("hyperparameters", {"optimizer": {"name": "adam"}}), (3, {"train/loss": 0.5})]
    assert spy.rows[2][1]["speed/steps_per_second"] == 2.0
