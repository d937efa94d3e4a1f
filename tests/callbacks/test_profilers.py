"""Traces and memory profiles, read back."""

import gzip
import json
from types import SimpleNamespace

import jax
import pytest

from tests.problems import Linear, config, regression, squared_error
from trainer import ArgumentError, JAXProfiler, MemoryProfiler, Trainer
from trainer.loggers.base import Logger


def trained(callback, steps=8, **options):
    trainer = Trainer(Linear(4), config(), loss_fn=squared_error, callbacks=[callback], **options)
    trainer.train(regression(8 * steps), 1, 8)
    return trainer


def calls_in(directory, name):
    """Returns how many calls of a program a trace holds; each has several events, one inside the other."""
    (path,) = directory.rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    times = sorted((one["ts"], one["ts"] + one["dur"]) for one in events if one.get("name") == f"PjitFunction({name})")
    count, end = 0, 0.0
    for start, stop in times:
        count, end = count + (start >= end), max(end, stop)
    return count


@pytest.mark.parametrize(("first_step", "num_steps"), [(3, 2), (2, 5), (8, 1)])
def test_a_trace_of_some_steps_that_perfetto_and_xprof_open(first_step, num_steps, tmp_path):
    trained(JAXProfiler(tmp_path, first_step=first_step, num_steps=num_steps), steps_per_call=1)
    assert calls_in(tmp_path, "train_step") == num_steps
    (plane,) = tmp_path.rglob("*.xplane.pb")
    assert b"/host:CPU" in plane.read_bytes()


@pytest.mark.parametrize(("num_steps", "calls"), [(1, 1), (4, 1), (8, 2)])
def test_fused_steps_are_traced_in_whole_calls(num_steps, calls, tmp_path):
    """Of four steps each: the call that holds step 3 began before it."""
    trained(JAXProfiler(tmp_path, first_step=3, num_steps=num_steps), steps=16, steps_per_call=4)
    assert calls_in(tmp_path, "train_steps") == calls


def test_a_run_that_ends_before_it(tmp_path):
    with pytest.warns(UserWarning, match="recorded nothing: the run ended at step 2, before step 10"):
        trained(JAXProfiler(tmp_path / "trace"), steps=2)
    assert not (tmp_path / "trace").exists()


def test_a_run_that_ends_within_it(tmp_path):
    with pytest.warns(UserWarning, match="fewer steps"):
        trained(JAXProfiler(tmp_path / "trace", first_step=1, num_steps=99), steps=2)
    assert list((tmp_path / "trace").rglob("*.xplane.pb"))


def test_an_error_within_it_leaves_no_trace_running(tmp_path):
    def broken(trainer, step, logs):
        raise RuntimeError("enough")

    from trainer import LambdaCallback

    for attempt in ("one", "two"):  # a second trace could not start beside the first
        trainer = Trainer(
            Linear(4),
            config(),
            loss_fn=squared_error,
            callbacks=[JAXProfiler(tmp_path / attempt, first_step=1), LambdaCallback(on_call_end=broken)],
        )
        with pytest.warns(UserWarning, match="fewer steps"), pytest.raises(RuntimeError, match="enough"):
            trainer.train(regression(16), 1, 8)


@pytest.mark.parametrize("arguments", [{"first_step": 0}, {"num_steps": 0}])
def test_steps_that_are_none(arguments, tmp_path):
    with pytest.raises(ArgumentError, match="must be a positive integer"):
        JAXProfiler(tmp_path, **arguments)


def test_the_memory_of_the_devices_every_so_many_epochs(tmp_path):
    trainer = Trainer(Linear(4), config(), loss_fn=squared_error, callbacks=[MemoryProfiler(tmp_path / "memory", 2)])
    trainer.train(regression(16), 4, 8)
    files = sorted((tmp_path / "memory").iterdir())
    assert [path.name for path in files] == ["memory_4.prof", "memory_8.prof"]
    assert all(gzip.decompress(path.read_bytes()) for path in files)


class Scalars(Logger):
    def __init__(self):
        self.rows = []

    def log_scalars(self, scalars, step=None):
        self.rows.append((step, dict(scalars)))

    def log_text(self, name, text, step=None):
        pass


USED = {"bytes_in_use": 100, "peak_bytes_in_use": 250, "bytes_limit": 1000}


@pytest.mark.parametrize(
    ("stats", "logged"),
    [
        ([USED], {"memory/bytes_in_use": 100.0, "memory/peak_bytes": 250.0}),
        # The largest over the devices, each number by itself.
        (
            [USED, {"bytes_in_use": 300, "peak_bytes_in_use": 200}],
            {"memory/bytes_in_use": 300.0, "memory/peak_bytes": 250.0},
        ),
        ([USED, {"bytes_in_use": 7}], {"memory/bytes_in_use": 100.0}),
        ([USED, None], None),
        ([None], None),
    ],
)
def test_the_loggers_get_the_memory_in_use(stats, logged, tmp_path, monkeypatch):
    spy, profiler = Scalars(), MemoryProfiler(tmp_path)
    trainer = Trainer(Linear(4), config(), loss_fn=squared_error, logger=spy)
    trainer.train(regression(16), 1, 8)
    spy.rows.clear()
    devices = [SimpleNamespace(memory_stats=lambda one=one: one) for one in stats]
    monkeypatch.setattr(jax, "local_devices", lambda: devices)
    profiler.on_epoch_end(trainer, 0, {})
    assert spy.rows == ([] if logged is None else [(2, logged)])
    assert (tmp_path / "memory_2.prof").exists()


def test_each_process_has_a_file_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for process in range(2):
        monkeypatch.setattr(jax, "process_index", lambda process=process: process)
        MemoryProfiler(tmp_path).on_epoch_end(SimpleNamespace(step=4), 0, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory_4_0.prof", "memory_4_1.prof"]
