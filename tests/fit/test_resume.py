"""A run that was interrupted and resumed is, to the bit, one that never was."""

import itertools
import subprocess
import sys
import textwrap

import jax
import numpy as np
import pytest

from tests.marks import slow_unless
from tests.problems import Busy, Counting, config, regression, squared_error
from tests.test_api import assert_same_bits
from trainer import (
    ArgumentError,
    Callback,
    CheckpointError,
    SchedulerConfig,
    Trainer,
    latest_checkpoint,
    save_state,
)

EXAMPLES, BATCH, EPOCHS = 58, 4, 2  # 15 steps an epoch, the last on two examples
STEPS = 30


class StoppedError(Exception):
    pass


class Watching(Callback):
    """Counts batches, keeps what it is told at the end of epochs, and may interrupt."""

    state_key = "Watching"  # of its subclasses too

    def __init__(self, stop_at=None):
        self.stop_at, self.batches, self.epochs = stop_at, 0, []

    def on_batch_begin(self, trainer, step):
        if step == self.stop_at:
            raise StoppedError

    def on_batch_end(self, trainer, step, logs):
        self.batches += 1

    def on_epoch_end(self, trainer, epoch, logs):
        self.epochs.append((epoch, logs))

    def state_dict(self):
        return {"batches": self.batches, "epochs": self.epochs}

    def load_state_dict(self, state):
        self.batches, self.epochs = state["batches"], [(epoch, dict(logs)) for epoch, logs in state["epochs"]]


def build(directory, watching, key=3):
    settings = config(
        scheduler=SchedulerConfig(scheduler_type="cosine", warmup_steps=3), log_frequency=4, max_checkpoints=100
    )
    return Trainer(
        Busy(),
        settings,
        loss_fn=squared_error,
        workdir=directory,
        rng=jax.random.key(key),
        callbacks=[watching],
        extensions={"size": Counting()},
        save_interval=1,
    )


def run(trainer, **options):
    data, held_out = regression(EXAMPLES), regression(10, seed=1)
    return trainer.train(data, EPOCHS, BATCH, held_out, val_interval=4, **options)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run with a checkpoint after every step."""
    directory = tmp_path_factory.mktemp("run")
    watching = Watching()
    trainer = build(directory, watching)
    return directory, trainer, watching, run(trainer)


def assert_same_run(trainer, watching, returned, uninterrupted):
    _, expected, expected_watching, expected_returned = uninterrupted
    assert_same_bits(trainer.state, expected.state)
    assert returned == expected_returned
    assert trainer.history.to_dict() == expected.history.to_dict()
    assert (trainer.epoch, trainer.step) == (EPOCHS, STEPS)
    assert watching.batches == expected_watching.batches == STEPS
    assert watching.epochs == expected_watching.epochs


@pytest.mark.parametrize("k", slow_unless({1, 14, 15, 16, 29, 30}.__contains__, range(1, STEPS + 1)))
@pytest.mark.few(1)
def test_resuming_from_every_step(k, uninterrupted):
    directory, *_ = uninterrupted
    watching = Watching()
    trainer = build(directory, watching, key=3)
    returned = run(trainer, resume=directory / f"checkpoint_{k}.msgpack")
    assert_same_run(trainer, watching, returned, uninterrupted)


@pytest.mark.parametrize(
    ("stop_at", "resume"),
    slow_unless(
        lambda stop_at, resume: resume is True or stop_at == 7, itertools.product([0, 7, 15, 29], [True, "latest"])
    ),
)
@pytest.mark.few(2)
def test_resuming_where_an_exception_ended_the_run(stop_at, resume, tmp_path, uninterrupted):
    with pytest.raises(StoppedError):
        run(build(tmp_path, Watching(stop_at)))
    watching = Watching()
    trainer = build(tmp_path, watching)
    assert_same_run(trainer, watching, run(trainer, resume=resume), uninterrupted)


@pytest.mark.slow
def test_a_process_killed_again_and_again_ends_with_the_same_bits(tmp_path, uninterrupted):
    code = f"""
        import os, signal, sys
        from tests.fit.test_resume import Watching, build, run

        class Deadly(Watching):
            def on_batch_begin(self, trainer, step):
                if step == int(sys.argv[1]):
                    os.kill(os.getpid(), signal.SIGKILL)

        run(build({str(tmp_path)!r}, Deadly()), resume=True)
    """
    for stop_at, status in ((6, -9), (6, -9), (21, -9), (99, 0)):
        command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code), str(stop_at)]
        assert subprocess.run(command, check=False, timeout=300).returncode == status
    watching = Watching()
    trainer = build(tmp_path, watching)
    returned = run(trainer, resume=tmp_path / f"checkpoint_{STEPS}.msgpack")
    assert_same_run(trainer, watching, returned, uninterrupted)


def test_a_second_run_is_resumed_as_a_second_run(tmp_path):
    whole = build(tmp_path / "whole", Watching())
    moved = r"the end of the learning-rate schedule 'cosine' moves from step 30 to step 60, .* jumps from 0 to 0.0054"
    run(whole)
    with pytest.warns(UserWarning, match=moved):
        run(whole)

    first = build(tmp_path / "part", Watching())
    run(first)
    first.callbacks.callbacks[0].stop_at = 40
    with pytest.raises(StoppedError), pytest.warns(UserWarning, match=moved):
        run(first)
    second = build(tmp_path / "part", Watching())
    run(second, resume=True)
    assert_same_bits(second.state, whole.state)
    assert second.epoch == 2 * EPOCHS


def test_a_finished_run_has_nothing_left_to_do(uninterrupted):
    directory, *_ = uninterrupted
    trainer = build(directory, Watching())
    run(trainer, resume=True)
    before = trainer.state.copy()
    assert run(trainer, resume=True) == uninterrupted[3]
    assert_same_bits(trainer.state, before)


def test_a_call_that_this_trainer_has_just_trained_is_not_resumed(tmp_path):
    def loop(num_epochs):
        trainer = Trainer(Busy(), config(), loss_fn=squared_error, workdir=tmp_path, progress=False)
        for _ in range(num_epochs):
            trainer.train(regression(8), 1, 4, resume=True)
        return trainer

    assert (loop(3).epoch, loop(1).epoch) == (3, 3)
    with pytest.warns(UserWarning, match=r"for the third time in a row, and trains nothing: a loop until"):
        assert loop(4).epoch == 3  # a repeated program repeats no training


def test_a_check_resumes_nothing(tmp_path):
    def made(**options):
        settings = config(checkpoint_dir=str(tmp_path))
        return Trainer(Busy(), settings, loss_fn=squared_error, progress=False, **options)

    made().train(regression(8), 2, 4)
    checked = made(fast_dev_run=True)
    checked.train(regression(8), 2, 4, resume=True)
    assert checked.step == 1
    checked = made(fast_dev_run=True)
    checked.train(regression(8), 2, 4, resume=tmp_path / "checkpoint_4.msgpack")
    assert checked.step == 1
    with pytest.raises(CheckpointError, match="checkpoint_5"):
        checked.train(regression(8), 2, 4, resume=tmp_path / "checkpoint_5.msgpack")


def test_calls_in_between_that_train_begin_the_count_of_idle_ones_anew(tmp_path):
    def train(resume):
        trainer.train(regression(8), 1, 4, resume=resume)

    def made():
        return Trainer(Busy(), config(checkpoint_dir=str(tmp_path)), loss_fn=squared_error, progress=False)

    trainer = made()
    train(False)
    trainer = made()
    train(True)
    train(True)  # the second in a row that trains nothing
    train(False)
    train(True)
    assert trainer.step == 6
    train(tmp_path / "checkpoint_2.msgpack")
    train(True)  # again; warnings are errors


def test_with_nothing_saved_it_starts_from_the_start(tmp_path, uninterrupted):
    watching = Watching()
    trainer = build(tmp_path, watching)
    assert_same_run(trainer, watching, run(trainer, resume=True), uninterrupted)


class TestRefusals:
    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"data": regression(60)}, r"`train_data` \(num examples\) was 58 and is 60"),
            ({"batch_size": 5}, r"`batch_size` \(batch size\) was 4 and is 5"),
            ({"key": 4}, r"`rng` \(seed\) was \(0, 3\) and is \(0, 4\)"),
        ],
    )
    def test_another_run_is_noticed_and_named(self, changes, message, uninterrupted):
        directory, *_ = uninterrupted
        trainer = build(directory, Watching(), key=changes.get("key", 3))
        before = trainer.state
        data = changes.get("data", regression(EXAMPLES))
        with pytest.raises(ArgumentError, match="`resume` cannot continue the interrupted run .*" + message):
            trainer.train(data, EPOCHS, changes.get("batch_size", BATCH), resume=True)
        assert trainer.state is before
        assert (trainer.epoch, len(trainer.history)) == (0, 0)

    def test_a_checkpoint_of_no_run(self, tmp_path):
        trainer = build(tmp_path, Watching())
        trainer.save_checkpoint()
        with pytest.raises(CheckpointError, match=r"was not saved during train\(\)"):
            run(trainer, resume=True)
        run(trainer)
        trainer.train_step(regression(BATCH))
        trainer.save_checkpoint()
        with pytest.raises(CheckpointError, match=r"was not saved during train\(\), so there is no run to resume"):
            run(trainer, resume=True)
        save_state(tmp_path / "bare.msgpack", trainer.state)
        with pytest.raises(CheckpointError, match=r"was not saved during train\(\)"):
            run(trainer, resume=tmp_path / "bare.msgpack")

    @pytest.mark.parametrize("run_there", [{"seed": 1}, {"strange": 1}, 5])
    def test_a_run_that_makes_no_sense(self, run_there, tmp_path):
        trainer = build(tmp_path, Watching())
        save_state(tmp_path / "s.msgpack", trainer.state, progress={"run": run_there})
        with pytest.raises(CheckpointError, match="holds a run that cannot be understood"):
            run(trainer, resume=tmp_path / "s.msgpack")

    def test_a_missing_file(self, tmp_path):
        with pytest.raises(CheckpointError, match="could not be read"):
            run(build(tmp_path, Watching()), resume=tmp_path / "absent.msgpack")


def test_loading_brings_epochs_history_and_callbacks_back(uninterrupted):
    directory, expected, expected_watching, _ = uninterrupted
    watching = Watching()
    trainer = build(directory, watching)
    trainer.load_checkpoint(latest_checkpoint(directory))
    assert trainer.epoch == 1  # the last checkpoint was saved within the second epoch
    assert watching.batches == expected_watching.batches
    assert trainer.history.series("loss") == expected.history.series("loss")
    assert np.isfinite(trainer.evaluate(regression(8), 8)["loss"])
