"""Traces and memory profiles, read back."""

import gzip
import json

import pytest

from tests.problems import Linear, config, regression, squared_error
from trainer import ArgumentError, JAXProfiler, MemoryProfiler, Trainer


def trained(callback, steps=8, **options):
    trainer = Trainer(Linear(4), config(), loss_fn=squared_error, callbacks=[callback], **options)
    trainer.train(regression(8 * steps), 1, 8)
    return trainer


@pytest.mark.parametrize("steps_per_call", [1, 4])
def test_a_trace_of_some_steps_that_perfetto_and_xprof_open(steps_per_call, tmp_path):
    trained(JAXProfiler(tmp_path / "trace", first_step=3, num_steps=2), steps_per_call=steps_per_call)
    (path,) = (tmp_path / "trace").rglob("perfetto_trace.json.gz")
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    calls = [event for event in events if "PjitFunction" in event.get("name", "")]
    assert calls
    (plane,) = (tmp_path / "trace").rglob("*.xplane.pb")
    assert b"/host:CPU" in plane.read_bytes()


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
