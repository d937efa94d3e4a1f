"""Signals during a run: wherever they come, the run ends in order and resumes to the same bits."""

import functools
import itertools
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from tests.marks import slow_unless
from tests.problems import Busy, config, regression, squared_error
from tests.test_api import Recorder, assert_same_bits
from trainer import Callback, Trainer, TrainingInterrupted, latest_checkpoint

SIGNALS = {signal.SIGTERM: TrainingInterrupted, signal.SIGINT: KeyboardInterrupt}
MOMENTS = [
    ("on_train_begin", 1),
    ("on_epoch_begin", 2),
    ("on_batch_begin", 1),
    ("on_batch_begin", 5),
    ("on_batch_end", 6),
    ("on_validation_begin", 1),
    ("on_validation_begin", 4),
    ("on_validation_end", 2),
    ("on_epoch_end", 1),
    ("on_epoch_end", 2),
    ("on_train_end", 1),
]


class Sending(Callback):
    """Sends this process a signal at an event."""

    def __init__(self, number, event, at=1, times=1):
        self.number, self.at, self.times, self.calls = number, at, times, 0
        setattr(self, event, self.send)

    def send(self, *_):
        self.calls += 1
        if self.calls == self.at:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


class Loader:
    """Batches of four that know where they are; set to the end of a pass, it has nothing left and then starts again."""

    def __init__(self, num_examples, seed=0):
        self.data, self.num_examples, self.at = regression(num_examples, seed=seed), num_examples, 0

    def __iter__(self):
        while self.at < self.num_examples:
            self.at += 4
            yield {name: column[self.at - 4 : self.at] for name, column in self.data.items()}
        self.at = 0

    def get_state(self):
        return self.at

    def set_state(self, state):
        self.at = state


CALLS = ["train", "train over a loader", "train_epoch"]


def build(directory, callbacks=(), call="train", loss_fn=squared_error, save_interval=None, **options):
    changes = {}
    if call == "train_epoch":
        options |= {"train_data_loader": Loader(24), "val_data_loader": Loader(12, seed=1)}
        changes = {"num_epochs": 2, "batch_size": 4, "save_frequency": save_interval or 1000}
    options |= {"workdir": directory, "callbacks": list(callbacks), "save_interval": save_interval}
    return Trainer(Busy(), config(**changes), loss_fn=loss_fn, **options)


def run(trainer, call="train", **options):
    """Two epochs of six steps."""
    if call == "train":
        return trainer.train(regression(24), 2, 4, regression(12, seed=1), val_interval=3, **options)
    if call == "train over a loader":
        return trainer.train(Loader(24), 2, 4, Loader(12, seed=1), val_interval=3, **options)
    while trainer.epoch < 2:
        returned = trainer.train_epoch(**options)
    return returned


@functools.cache
def uninterrupted(call):
    trainer = build(None, call=call)
    return run(trainer, call), trainer


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("call", "event", "at", "number"),
    slow_unless(
        lambda call, event, at, number: number is signal.SIGTERM or event in ("on_batch_end", "on_train_end"),
        (
            (call, event, at, number)
            for call in CALLS
            for event, at in MOMENTS
            for number in SIGNALS
            # `train_epoch` validates at the end of each epoch only.
            if call != "train_epoch" or "validation" not in event or at <= 2
        ),
    ),
)
@pytest.mark.few(3)
def test_wherever_it_comes_the_run_is_saved_and_resumes_to_the_same_bits(call, number, event, at, tmp_path):
    returned, whole = uninterrupted(call)
    recorder = Recorder()
    before = signal.getsignal(number)
    interrupted = build(tmp_path / "part", [Sending(number, event, at), recorder], call)
    with pytest.raises(SIGNALS[number]) as caught:
        run(interrupted, call)
    assert signal.getsignal(number) is before
    assert recorder.names[-1] == "on_train_end"
    interrupted.state.check_alive()
    path = latest_checkpoint(tmp_path / "part")
    assert f"the state was saved to {path}; train(..., resume=True) resumes from it" in caught.value.__notes__
    resumed = build(tmp_path / "part", call=call)
    assert run(resumed, call, resume=True) == returned
    assert_same_bits(resumed.state, whole.state)
    assert resumed.history.to_dict() == whole.history.to_dict()


def test_the_exception_says_where_and_is_an_exit(tmp_path):
    with pytest.raises(TrainingInterrupted, match="training was terminated") as caught:
        run(build(tmp_path, [Sending(signal.SIGTERM, "on_batch_end", 2)]))
    assert caught.value.code == 143
    assert caught.value.path == tmp_path / "checkpoint_2.msgpack"


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_does_not_wait(number, tmp_path):
    recorder = Recorder()
    with pytest.raises(SIGNALS[number]):
        run(build(tmp_path, [Sending(number, "on_batch_begin", 3, times=2), recorder]))
    assert recorder.names.count("on_batch_begin") == 2
    assert recorder.names[-1] == "on_train_end"


class Phase:
    """Sends signals during some work, once; during a step, as its objective.

    With ``times=0`` it compiles to the same programs, and sends nothing. Resuming compares what its methods read, of
    which only ``left``, that they change, may be another.
    """

    def __init__(self, name, number=signal.SIGTERM, times=1):
        self.name, self.number, self.left = name, number, times

    def send(self):
        times, self.left = self.left, 0
        for _ in range(times):
            os.kill(os.getpid(), self.number)

    def __call__(self, model, batch, rng, step):
        evaluating = model.norm.use_running_average
        if self.name == "evaluation" if evaluating else self.name == "step":
            jax.debug.callback(lambda step: self.send() if int(step) in (3, 6) else None, step)
        if self.name == "compilation of the evaluation" if evaluating else self.name == "compilation":
            self.send()
        return squared_error(model, batch, rng, step)

    def sending_fsync(self, fsync, number=1):
        """Stands for `os.fsync`, and sends before the file that is being saved has its name."""
        calls = itertools.count(1)

        def call(descriptor):
            if self.name == "save" and next(calls) == number:
                self.send()
            return fsync(descriptor)

        return call

    def build(self, directory, callbacks=(), call="train"):
        return build(directory, callbacks, call, loss_fn=self, save_interval=2)


@functools.cache
def never_interrupted(phase, call):
    trainer = Phase(phase, times=0).build(None, call=call)
    return run(trainer, call), trainer


@pytest.mark.usefixtures("elsewhere")
@pytest.mark.parametrize(
    ("call", "phase", "times", "number"),
    slow_unless(
        lambda call, phase, times, number: number is signal.SIGTERM or (times == 1 and phase in ("step", "save")),
        itertools.product(
            CALLS, ["compilation", "compilation of the evaluation", "step", "evaluation", "save"], [1, 2], SIGNALS
        ),
    ),
)
@pytest.mark.few(3)
def test_whatever_is_under_way_the_run_ends_in_order_and_resumes_to_the_same_bits(
    call, phase, times, number, tmp_path, monkeypatch
):
    returned, whole = never_interrupted(phase, call)
    recorder, sending = Recorder(), Phase(phase, number, times)
    before = signal.getsignal(number)
    interrupted = sending.build(tmp_path / "part", [recorder], call)
    monkeypatch.setattr(os, "fsync", sending.sending_fsync(os.fsync))
    with pytest.raises(SIGNALS[number]) as caught:
        run(interrupted, call)
    assert sending.left == 0
    assert signal.getsignal(number) is before
    assert recorder.names[-1] == "on_train_end"
    assert recorder.names.count("on_train_end") == recorder.names.count("on_train_begin")
    interrupted.close()
    assert not list((tmp_path / "part").glob(".*"))
    if times == 1:
        assert "train(..., resume=True) resumes from it" in caught.value.__notes__[0]
    # A second one may come between the call of a step, which consumes the state, and its return.
    if times == 1 or phase not in ("step", "save"):
        interrupted.state.check_alive()
    resumed = Phase(phase, number, times=0).build(tmp_path / "part", call=call)
    assert run(resumed, call, resume=True) == returned
    assert_same_bits(resumed.state, whole.state)
    assert resumed.history.to_dict() == whole.history.to_dict()


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_one_while_the_first_is_obeyed_gives_up_the_save_but_not_the_end(number, tmp_path, monkeypatch):
    first, second = Sending(number, "on_batch_end", 5), Phase("save", number)
    recorder = Recorder()
    trainer = second.build(tmp_path, [first, recorder])
    # Two saves in the background, each of which flushes its file and its directory, go before.
    monkeypatch.setattr(os, "fsync", second.sending_fsync(os.fsync, number=5))
    with pytest.raises(SIGNALS[number]) as caught:
        run(trainer)
    assert second.left == 0
    assert isinstance(caught.value.__context__, SIGNALS[number])
    assert recorder.names[-1] == "on_train_end"
    assert sorted(path.name for path in tmp_path.glob("c*")) == [
        "checkpoint_2.msgpack",
        "checkpoint_4.msgpack",
    ]
    trainer.state.check_alive()
    assert trainer.step == 5


@pytest.mark.parametrize(("number", "status"), [("SIGTERM", 143), ("SIGINT", -2)])
@pytest.mark.slow
def test_a_process_that_does_not_catch_it_ends_with_the_usual_status(number, status, tmp_path):
    code = f"""
        import signal
        from tests.distributed.test_signals import Sending, build, run
        run(build({str(tmp_path)!r}, [Sending(signal.{number}, "on_batch_end", 2)]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=False)
    assert done.returncode == status
    assert (tmp_path / "checkpoint_2.msgpack").exists()


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="it looks for processes in /proc")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, -2)])
def test_workers_of_a_loader_end_with_the_run(number, status, tmp_path):
    """A run over two processes of Grain: it is saved, and none of them outlives it."""
    child = subprocess.Popen(
        [sys.executable, "-m", "tests.child"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    arguments = {"directory": str(tmp_path / "run"), "resume": True, "cache": str(tmp_path / "cache"), "keep": 3}
    arguments |= {"examples": 4000, "mebibytes": 0, "save_interval": 1000, "kind": "workers"}
    child.stdin.write(json.dumps(arguments) + "\n")
    child.stdin.flush()
    while child.stdout.readline() != "5\n":
        assert child.poll() is None
    workers = children_of(child.pid)
    child.send_signal(number)
    child.communicate(timeout=60)
    assert child.returncode == status
    assert latest_checkpoint(tmp_path / "run") is not None
    assert len(workers) >= 2
    deadline = time.monotonic() + 10
    while (alive := [pid for pid in workers if os.path.exists(f"/proc/{pid}")]) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert alive == []


def children_of(pid):
    """The processes that a process has started, from whichever thread."""
    return [
        int(child)
        for path in Path(f"/proc/{pid}/task").iterdir()
        for child in (path / "children").read_text(encoding="utf-8").split()
    ]


def test_nothing_is_handled_where_it_is_not_wanted(tmp_path):
    seen = []
    before = signal.signal(signal.SIGTERM, lambda *_: seen.append("mine"))
    try:
        run(build(tmp_path, [Sending(signal.SIGTERM, "on_batch_end", 2)], handle_signals=False))
    finally:
        signal.signal(signal.SIGTERM, before)
    assert seen == ["mine"]


def test_a_thread_other_than_the_main_one_trains_without(tmp_path):
    trainer = build(tmp_path)
    thread = threading.Thread(target=run, args=(trainer,))
    thread.start()
    thread.join()
    assert trainer.step == 12


def test_what_goes_wrong_in_saving_does_not_hide_the_interruption(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match=r"run.json.* could not"), pytest.raises(TrainingInterrupted) as caught:
        run(build(tmp_path / "file", [Sending(signal.SIGTERM, "on_batch_end", 2)]))
    assert "the state could not be saved: `" in caught.value.__notes__[0]
    assert caught.value.path is None


def test_what_a_callback_raises_while_saving_does_not_hide_it_either(tmp_path):
    class Stateful(Callback):
        def state_dict(self):
            raise ZeroDivisionError("mine")

        def load_state_dict(self, state):
            raise AssertionError

    recorder = Recorder()
    with pytest.raises(TrainingInterrupted) as caught:
        run(build(tmp_path, [Sending(signal.SIGTERM, "on_batch_end", 2), Stateful(), recorder]))
    assert caught.value.__notes__[0] == "the state could not be saved: mine"
    assert recorder.names[-1] == "on_train_end"


class TestNotFinite:
    def diverging(self, model, batch, rng, step):
        loss, metrics = squared_error(model, batch, rng, step)
        return jnp.where(step >= 3, jnp.nan, 1.0) * loss, metrics

    def test_it_is_not_saved_over_what_is_good(self, tmp_path):
        trainer = Trainer(Busy(), config(max_checkpoints=2), loss_fn=self.diverging, workdir=tmp_path, save_interval=1)
        with (
            pytest.warns(UserWarning, match=r"the state is not finite any more at step \d; it was not saved"),
            pytest.warns(UserWarning, match="the loss is nan at step 4"),
        ):
            trainer.train(regression(24), 1, 4)
        assert sorted(path.name for path in tmp_path.glob("c*")) == [
            "checkpoint_2.msgpack",
            "checkpoint_3.msgpack",
        ]

    def test_unless_asked(self, tmp_path):
        trainer = build(tmp_path)
        trainer.state = jax.tree.map(lambda leaf: leaf * jnp.nan if leaf.dtype == jnp.float32 else leaf, trainer.state)
        assert trainer.save_checkpoint().exists()

    def test_an_interruption_leaves_it_as_well(self, tmp_path):
        trainer = Trainer(
            Busy(),
            config(),
            loss_fn=self.diverging,
            workdir=tmp_path,
            callbacks=[Sending(signal.SIGTERM, "on_batch_end", 5)],
        )
        with pytest.warns(UserWarning, match="not finite"), pytest.raises(TrainingInterrupted) as caught:
            trainer.train(regression(24), 1, 4)
        assert caught.value.path is None
        assert [path.name for path in tmp_path.iterdir()] == ["run.json"]
        assert trainer.step == 5
