"""A disk that is really full: one clear error, and everything that was there before still is."""

import os
import subprocess

import jax
import pytest

from tests.problems import Busy, config, regression, squared_error
from tests.test_api import Recorder, assert_same_bits
from trainer import CheckpointError, Trainer, latest_checkpoint


@pytest.fixture
def small(tmp_path):
    """A file system of 3 MiB."""
    directory = tmp_path / "small"
    directory.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(directory)]
    try:
        subprocess.run(command, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"mounting is not permitted here: {getattr(error, 'stderr', None) or error}")
    yield directory
    subprocess.run(["umount", str(directory)], check=True)


@pytest.fixture(params=["reserved", "not reserved"])
def reservation(request, monkeypatch):
    """With and without reserving space, so that it is found out before the first byte and in the middle."""
    if request.param == "not reserved":
        monkeypatch.delattr(os, "posix_fallocate")


def build(directory, callbacks=(), **options):
    """A trainer whose checkpoint takes about 1.2 MB, so that the third does not fit."""
    return Trainer(
        Busy(width=14_000),
        config(max_checkpoints=10),
        loss_fn=squared_error,
        workdir=directory,
        rng=jax.random.key(1),
        callbacks=list(callbacks),
        **options,
    )


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.usefixtures("reservation")
def test_what_is_there_stays_and_training_can_go_on(small):
    trainer, other = build(small), build(small)
    for step in (1, 2):
        trainer.train_step(regression())
        assert trainer.save_checkpoint().name == f"checkpoint_{step}.msgpack"
    saved = trainer.state.copy()
    trainer.train_step(regression())
    kept = trainer.state.copy()
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"checkpoint_3.msgpack` could not be written: .*No space left on dev"
        ):
            trainer.save_checkpoint()
        assert_same_bits(trainer.state, kept)
        assert names(small) == ["checkpoint_1.msgpack", "checkpoint_2.msgpack"]
    other.load_checkpoint(latest_checkpoint(small))
    assert_same_bits(other.state, saved)
    (small / "checkpoint_1.msgpack").unlink()
    other.load_checkpoint(trainer.save_checkpoint())
    assert_same_bits(other.state, kept)


@pytest.mark.usefixtures("reservation")
@pytest.mark.slow
def test_a_run_ends_with_it_and_goes_on_once_there_is_room(small, tmp_path):
    def run(trainer, **options):
        return trainer.train(regression(24), 1, 4, **options)

    whole, recorder = build(tmp_path / "whole"), Recorder()
    returned = run(whole)
    trainer = build(small, [recorder], save_interval=1)
    with pytest.raises(CheckpointError, match="No space left on device"):
        run(trainer)
    assert recorder.names[-1] == "on_train_end"
    assert names(small) == ["checkpoint_1.msgpack", "checkpoint_2.msgpack", "run.json"]
    (small / "checkpoint_1.msgpack").unlink()
    resumed = build(small)  # saves at the end
    assert run(resumed, resume=True) == returned
    assert_same_bits(resumed.state, whole.state)


# Where a save fails, Orbax leaves coroutines behind that complain when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_directory_that_does_not_fit_leaves_what_was_there(small):
    """No space is reserved for it, so this is found out in the middle."""
    trainer, other, kept = build(small), build(small), {}

    def fill():
        for number in range(10):
            trainer.train_step(regression())
            kept[trainer.save_checkpoint(small / f"{number}.orbax").name] = trainer.state.copy()

    with pytest.raises(CheckpointError, match=r"\d.orbax` could not be written"):
        fill()
    assert len(kept) >= 1
    assert names(small) == sorted(kept)
    trainer.state.check_alive()
    for name, state in kept.items():
        other.load_checkpoint(small / name)
        assert_same_bits(other.state, state)
