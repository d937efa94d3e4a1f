"""Averages that weigh, and the record of a run: device arrays go in, Python numbers come out."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import trainer.metrics.average as average_module
import trainer.metrics.history as history_module
from trainer import History, WeightedAverage
from trainer.metrics.average import MAX_PENDING, MAX_PENDING_ON_HOST, read


@pytest.fixture
def reads(monkeypatch):
    """Notes how many rows each reading of the device fetches."""
    counts = []
    for module in (average_module, history_module):
        monkeypatch.setattr(module, "read", lambda rows: counts.append(len(rows)) or read(rows))
    return counts


@pytest.fixture
def far_away(monkeypatch):
    """Treats the CPU as an accelerator, from which values have to be copied."""
    copies = []
    device_get = jax.device_get
    monkeypatch.setattr(average_module, "is_on_host", lambda value: False)
    monkeypatch.setattr(jax, "device_get", lambda tree: copies.append(len(tree)) or device_get(tree))
    return copies


def test_read_gives_python_numbers():
    values = read({"a": jnp.float32(0.5), "b": np.int32(3), "c": 1.5, "d": jnp.array(True)})
    assert values == {"a": 0.5, "b": 3, "c": 1.5, "d": True}
    assert [type(value) for value in values.values()] == [float, int, float, bool]


def average_of(*batches):
    average = WeightedAverage()
    for metrics, examples in batches:
        average.add(metrics, examples)
    return average.compute()


def test_batches_weigh_as_much_as_they_have_examples():
    assert average_of(({"loss": jnp.float32(1.0)}, 32), ({"loss": 6.0}, 8)) == {"loss": 2.0}


def test_nothing_added_means_nothing_averaged():
    assert average_of() == {}


def test_step_is_no_metric():
    assert average_of(({"step": 7, "loss": 1.0}, 2)) == {"loss": 1.0}


def test_batch_weight_replaces_the_number_of_examples_and_is_summed():
    averages = average_of(
        ({"loss": 1.0, "batch_weight": jnp.float32(3.0)}, 8),
        ({"loss": 5.0, "batch_weight": 1.0}, 8),
    )
    assert averages == {"loss": 2.0, "batch_weight": 4.0}


def test_batches_with_and_without_weight_can_be_mixed():
    averages = average_of(({"loss": 1.0, "batch_weight": 3.0}, 8), ({"loss": 5.0}, 1))
    assert averages == {"loss": 2.0, "batch_weight": 3.0}


def test_a_batch_of_weight_zero_does_not_count():
    averages = average_of(({"loss": 9.0, "batch_weight": 0.0}, 8), ({"loss": 5.0, "batch_weight": 2.0}, 8))
    assert averages == {"loss": 5.0, "batch_weight": 2.0}


def test_a_metric_of_weight_zero_only_has_no_average():
    assert average_of(({"loss": 9.0, "batch_weight": 0.0}, 8)) == {"batch_weight": 0.0}


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_a_batch_of_weight_zero_reports_does_not_matter(bad):
    padding = {"loss": bad, "batch_weight": 0.0}
    averages = average_of((padding, 8), ({"loss": 5.0, "batch_weight": 2.0}, 8), (padding, 8))
    assert averages == {"loss": 5.0, "batch_weight": 2.0}
    assert average_of((padding, 8)) == {"batch_weight": 0.0}
    # What counts is not hidden.
    assert not math.isfinite(average_of(({"loss": bad, "batch_weight": 1.0}, 8))["loss"])


def test_a_metric_counts_only_where_it_is_present():
    assert average_of(({"loss": 1.0}, 1), ({"loss": 2.0, "rare": 4.0}, 1), ({"rare": 10.0}, 2)) == {
        "loss": 1.5,
        "rare": 8.0,
    }


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_stays_visible(bad):
    averages = average_of(({"loss": 1.0, "other": 1.0}, 4), ({"loss": jnp.float32(bad), "other": 1.0}, 4))
    np.testing.assert_equal(averages, {"loss": bad, "other": 1.0})


def test_sums_are_double():
    # In float32 the sum would stop growing at 2**24.
    assert average_of(({"loss": 2.0**24}, 1), *[({"loss": 1.0}, 1)] * 4) == {"loss": (2.0**24 + 4) / 5}


def test_adding_more_after_computing_goes_on():
    average = WeightedAverage()
    average.add({"loss": 1.0}, 1)
    assert average.compute() == average.compute() == {"loss": 1.0}
    average.add({"loss": 4.0}, 2)
    assert average.compute() == {"loss": 3.0}


def test_metrics_may_be_reused_by_the_caller():
    average, metrics = WeightedAverage(), {"loss": 1.0}
    average.add(metrics, 1)
    metrics["loss"] = 3.0
    average.add(metrics, 1)
    assert average.compute() == {"loss": 2.0}


def test_an_average_reads_an_old_call_for_each_new_one(reads):
    average = WeightedAverage()
    values = jnp.arange(1000.0)
    for i in range(MAX_PENDING_ON_HOST):
        average.add({"loss": values[i]}, 1)
    assert reads == []
    for i in range(MAX_PENDING_ON_HOST, 1000):
        average.add({"loss": values[i]}, 1)
    assert reads == [1] * (1000 - MAX_PENDING_ON_HOST)
    assert average.compute() == {"loss": 499.5}
    assert reads[-1] == MAX_PENDING_ON_HOST


def test_an_average_collects_copies_from_an_accelerator(far_away):
    average = WeightedAverage()
    values = jnp.arange(1000.0)
    for i in range(1000):
        average.add({"loss": values[i], "error": values[i]}, 1)
    assert set(far_away) == {MAX_PENDING}  # two metrics of half as many calls
    assert average.compute() == {"loss": 499.5, "error": 499.5}


def filled(*rows, **how):
    history = History(**how)
    for step, metrics in rows:
        history.record(step, metrics)
    return history


def test_a_history_is_a_sequence_of_rows():
    history = filled((1, {"loss": jnp.float32(0.5)}), (2, {"loss": 0.25, "step": 99}))
    rows = [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.25}]
    assert (len(history), list(history), history[0], history[-1], history[:1]) == (2, rows, *rows, rows[:1])
    assert (list(reversed(history)), rows[1] in history, history.index(rows[1])) == (rows[::-1], True, 1)
    assert type(history[0]["loss"]) is float
    with pytest.raises(IndexError):
        history[2]


def test_an_empty_history():
    history = History()
    assert (len(history), list(history), history.to_dict(), bool(history)) == (0, [], {}, False)
    assert repr(history) == "History(0 rows, latest None)"


def test_repr_shows_the_latest_row():
    history = filled((1, {"loss": 1.0}), (2, {"loss": jnp.float32(0.5)}))
    assert repr(history) == "History(2 rows, latest {'step': 2, 'loss': 0.5})"


def test_a_history_may_grow_while_it_is_read():
    history = filled((1, {"loss": 1.0}), (2, {"loss": 2.0}))
    for row in history:
        history.record(row["step"] + 10, {"loss": 0.0})
    assert [row["step"] for row in history] == [1, 2, 11, 12]


def test_what_is_measured_at_one_step_is_one_row():
    history = History()
    history.record(1, {"loss": jnp.float32(1.0)})
    history.record(1, {"loss": jnp.float32(2.0), "val_error": 3.0, "step": 1}, prefix="val_")
    assert list(history) == [{"step": 1, "loss": 1.0, "val_loss": 2.0, "val_error": 3.0}]


def test_a_row_that_was_read_is_read_again_when_it_has_grown(reads):
    history = filled((1, {"loss": jnp.float32(1.0)}))
    assert history[-1] == {"step": 1, "loss": 1.0}
    history.record(1, {"loss": jnp.float32(2.0)}, prefix="val_")
    row = history[-1]
    assert (row, type(row["val_loss"])) == ({"step": 1, "loss": 1.0, "val_loss": 2.0}, float)
    assert reads == [1, 1]


def test_a_row_is_merged_with_the_latest_only():
    assert len(filled((1, {"a": 1}), (2, {"a": 2}), (1, {"a": 3}))) == 3


@pytest.mark.parametrize("max_rows", [1, 3])
def test_the_oldest_rows_are_forgotten(max_rows):
    history = filled(*[(i, {"loss": jnp.float32(i)}) for i in range(10)], max_rows=max_rows)
    assert history.to_dict() == {"step": list(range(10))[-max_rows:], "loss": [float(i) for i in range(10)][-max_rows:]}


def test_a_history_of_no_rows_forgets_everything():
    assert list(filled((1, {"loss": 1.0}), (1, {"loss": 2.0}), max_rows=0)) == []


def test_columns_have_one_length():
    history = filled((1, {"loss": 1.0}), (2, {"loss": 2.0, "val_loss": jnp.float32(3.0)}), (3, {"rate": 4.0}))
    assert history.to_dict() == {
        "step": [1, 2, 3],
        "loss": [1.0, 2.0, None],
        "val_loss": [None, 3.0, None],
        "rate": [None, None, 4.0],
    }


def test_a_series_leaves_gaps_out():
    history = filled((1, {"loss": 1.0}), (2, {"val_loss": 2.0}), (5, {"loss": jnp.float32(3.0)}))
    assert history.series("loss") == ([1, 5], [1.0, 3.0])


def test_an_unknown_series_names_what_there_is():
    with pytest.raises(KeyError) as caught:
        filled((1, {"loss": 1.0}), (2, {"accuracy": 2.0})).series("los")
    assert caught.value.args == ("nothing was logged as 'los'; there is accuracy, loss, step",)
    with pytest.raises(KeyError) as caught:
        History().series("loss")
    assert caught.value.args == ("nothing was logged as 'loss'; there is nothing",)


def test_a_history_is_read_when_somebody_looks(reads):
    history = filled(*[(i, {"loss": jnp.float32(i)}) for i in range(20)])
    assert (len(history), reads) == (20, [])
    assert history[3] == {"step": 3, "loss": 3.0}
    assert history[-1]["loss"] == 19.0
    assert sum(reads) == 20


def test_a_history_nobody_reads_leaves_few_rows_on_the_device(reads):
    history = filled(*[(i, {"loss": i / 2}) for i in range(2000)])
    assert set(reads) == {1}
    assert 2000 - sum(reads) <= MAX_PENDING + 1
    assert history.series("loss")[1] == [i / 2 for i in range(2000)]
    assert sum(reads) == 2000


def test_rows_that_come_together_are_read_when_the_next_ones_come(reads):
    history = History()
    history.extend([(i, {"loss": jnp.float32(i)}) for i in range(200)])
    assert reads == []
    history.extend([(i, {"loss": jnp.float32(i)}) for i in range(200, 400)])
    assert reads == [200 - MAX_PENDING]
    assert history.series("loss") == (list(range(400)), [float(i) for i in range(400)])


def test_a_full_history_nobody_reads_is_bounded_on_the_device_as_well(reads):
    history = filled(*[(i, {"loss": jnp.float32(i)}) for i in range(1500)], max_rows=600)
    assert 1500 - sum(reads) <= MAX_PENDING + 1
    assert history.to_dict() == {"step": list(range(900, 1500)), "loss": [float(i) for i in range(900, 1500)]}


@pytest.mark.parametrize("read_first", [False, True])
def test_rewinding_forgets_later_steps_and_reads_nothing(read_first, reads):
    history = History()
    for step in (5, 1, 2, 3):  # a state of an earlier step may have been assigned in between
        history.record(step, {"loss": jnp.float32(step)})
    if read_first:
        list(history)
    history.record(4, {"loss": jnp.float32(4)})
    del reads[:]
    history.rewind(2)
    assert reads == []
    assert history.to_dict() == {"step": [1, 2], "loss": [1.0, 2.0]}
    history.record(3, {"loss": jnp.float32(9)})
    assert history.series("loss") == ([1, 2, 3], [1.0, 2.0, 9.0])
    history.rewind(0)
    assert len(history) == 0


@pytest.mark.parametrize("max_rows", [3, 700, 100_000])
def test_rows_recorded_together_are_those_recorded_alone(max_rows):
    rows = [(step // 2 if step < 40 else step, {"loss": jnp.float32(step)}) for step in range(1500)]
    one, other = History(max_rows), History(max_rows)
    for step, metrics in rows:
        one.record(step, metrics)
    for start in range(0, 1500, 128):
        other.extend(rows[start : start + 128])
        assert len(other) == len(list(other))
    assert list(one) == list(other)
    assert one.packed()[0] == other.packed()[0] == len(one)
    assert b"".join(one.packed()[1]) == b"".join(other.packed()[1])


class TestFiguresOfEpochs:
    """They belong to the pictures of this process, and to no row and no checkpoint."""

    def test_they_are_beside_the_rows_and_copies_are_independent(self):
        history = History()
        history.record(4, {"loss": 1.0})
        copied = history.copy()
        copied.know_epoch(4, steps_per_second=10.0)
        assert (history.figures.get("steps_per_second", ()), copied.figures.get("steps_per_second", ())) == (
            (),
            ((4, 10.0),),
        )
        assert copied.packed() == history.packed()
        assert list(copied) == list(history)
        assert copied.to_draw() == [{"step": 4, "loss": 1.0}, {"step": 4, "speed/steps_per_second": 10.0}]

    def test_rewinding_drops_those_of_later_epochs(self):
        history = History()
        for step in (4, 8, 12):
            history.know_epoch(step, steps_per_second=float(step))
        history.rewind(8)
        assert history.figures.get("steps_per_second", ()) == ((4, 4.0), (8, 8.0))

    def test_of_many_the_latest_stays_and_the_number_is_bounded(self):
        history = History()
        for step in range(1, 5001):
            history.know_epoch(step, steps_per_second=float(step))
            assert history.figures["steps_per_second"][-1][0] == step
        assert 500 <= len(history.figures.get("steps_per_second", ())) <= history_module.MAX_EPOCHS
        assert history.figures.get("steps_per_second", ()) == tuple(sorted(history.figures.get("steps_per_second", ())))

    def test_a_rate_on_the_device_is_read_on_demand_and_drawn_unless_the_rows_hold_it(self):
        history = History()
        history.record(4, {"loss": 1.0})
        history.know_epoch(4, learning_rate=jnp.float32(0.5))
        assert history.copy().to_draw() == [{"step": 4, "loss": 1.0}, {"step": 4, "learning_rate": 0.5}]
        assert history.figures == {"learning_rate": ((4, 0.5),)}
        assert type(history.figures["learning_rate"][0][1]) is float
        assert history.figures.get("steps_per_second", ()) == ()
        history.record(5, {"learning_rate": 0.25})
        assert history.to_draw() == list(history)
