"""`ModelCheckpoint` and `EarlyStopping` over `train_epoch`: what they keep, and what a kill leaves to be done."""

import shutil

import jax
import pytest

from tests.fit.test_resume import StoppedError
from tests.problems import Busy, config, regression, squared_error
from tests.test_api import Recorder, assert_same_bits
from trainer import Callback, EarlyStopping, ModelCheckpoint, Trainer
from trainer.checkpoints.orbax_directory import OrbaxDirectory

EPOCHS = 3


def batches(num_examples, seed=0):
    data = regression(num_examples, seed=seed)
    return [{name: column[at : at + 4] for name, column in data.items()} for at in range(0, num_examples, 4)]


def build(directory, *callbacks, num_epochs=EPOCHS, **options):
    """Five steps an epoch, and a validation at the end of each."""
    return Trainer(
        Busy(),
        config(num_epochs=num_epochs, max_checkpoints=100, save_frequency=1000),
        loss_fn=squared_error,
        train_data_loader=batches(20),
        val_data_loader=batches(8, seed=1),
        workdir=directory,
        rng=jax.random.key(3),
        callbacks=callbacks,
        **options,
    )


def train(trainer, epochs=EPOCHS, **options):
    """As the documentation of `train_epoch` has it."""
    with trainer:
        while trainer.epoch < epochs:
            trainer.train_epoch(**options)
    return trainer


def scores_in(directory):
    found = {}
    for path in directory.iterdir():
        with OrbaxDirectory(path) as opened:
            found[int(path.name)] = opened.info["score"]
    return dict(sorted(found.items()))


@pytest.mark.parametrize("monitor", ["val_loss", "loss"])
def test_every_epoch_is_judged_on_the_state_it_is_saved_with(monitor, tmp_path):
    best = ModelCheckpoint(tmp_path / "best", monitor=monitor, save_top_k=-1)
    trainer = train(build(tmp_path / "run", best))
    found = scores_in(tmp_path / "best")
    assert list(found) == [5, 10, 15]
    assert best.best_model_score == min(found.values())
    for step in found if monitor == "val_loss" else ():
        other = build(tmp_path / "other")
        other.load_checkpoint(tmp_path / "best" / str(step))
        assert other.step == step
        assert other.evaluate(batches(8, seed=1), 4)["loss"] == found[step]
    assert trainer.step == 15


class Dies(Callback):
    """Ends the process, as it were, once the trainer's checkpoint of a step is on the disk."""

    def __init__(self, step):
        self.step = step

    def on_train_end(self, trainer):
        if trainer.step == self.step:
            raise StoppedError


@pytest.mark.parametrize("num_epochs", [EPOCHS, 50])
@pytest.mark.parametrize("monitor", ["val_loss", "loss"])
def test_a_kill_after_the_last_save_of_the_trainer_does_not_lose_the_best(monitor, num_epochs, tmp_path):
    """Of `num_epochs`, 50 stands for a loop whose end only the caller knows."""
    whole = ModelCheckpoint(tmp_path / "whole", monitor=monitor, save_top_k=-1)
    expected = train(build(tmp_path / "a", whole, num_epochs=num_epochs))
    best = ModelCheckpoint(tmp_path / "best", monitor=monitor, save_top_k=-1)
    trainer = build(tmp_path / "b", best, Dies(15), num_epochs=num_epochs)
    with pytest.raises(StoppedError):
        train(trainer)
    trainer.save_checkpoint()  # which the trainer itself does at the end of a run
    trainer.close()
    shutil.rmtree(tmp_path / "best" / "15")  # it was not complete
    again = ModelCheckpoint(tmp_path / "best", monitor=monitor, save_top_k=-1)
    resumed = train(build(tmp_path / "b", again, num_epochs=num_epochs), resume=True)
    assert scores_in(tmp_path / "best") == scores_in(tmp_path / "whole")
    assert again.best_model_score == whole.best_model_score
    assert_same_bits(resumed.state, expected.state)
    other = build(tmp_path / "other")
    other.load_checkpoint(tmp_path / "best" / "15")
    assert_same_bits(other.state, expected.state)


@pytest.mark.parametrize("step", [5, 10])
def test_after_an_epoch_that_is_not_the_last_too(step, tmp_path):
    best = ModelCheckpoint(tmp_path / "best", save_top_k=-1)
    trainer = build(tmp_path / "run", best, Dies(step))
    with pytest.raises(StoppedError):
        train(trainer)
    trainer.save_checkpoint()
    trainer.close()
    whole = scores_in(tmp_path / "best")
    shutil.rmtree(tmp_path / "best" / str(step))
    again = ModelCheckpoint(tmp_path / "best", save_top_k=-1)
    train(build(tmp_path / "run", again), resume=True)
    found = scores_in(tmp_path / "best")
    assert list(found) == [5, 10, 15]
    assert found.items() >= whole.items()


@pytest.mark.parametrize("keeps", [True, False])
def test_early_stopping_restores_the_best_when_only_its_end_was_missing(keeps, tmp_path):
    """The last epoch was saved, and the process killed before `on_train_end`."""

    def callbacks(directory):
        stopping = EarlyStopping(monitor="val_loss", mode="max", patience=10, restore_best=True)
        best = ModelCheckpoint(directory, monitor="val_loss", mode="max", save_top_k=1)
        return [stopping, best] if keeps else [stopping]

    expected = train(build(tmp_path / "a", *callbacks(tmp_path / "whole")))
    trainer = build(tmp_path / "b", Dies(15), *callbacks(tmp_path / "best"))
    with pytest.raises(StoppedError):
        train(trainer)
    saved = tmp_path / "b" / "checkpoint_15.msgpack"
    assert saved.exists()
    trainer.close()
    resumed = build(tmp_path / "b", *callbacks(tmp_path / "best"))
    if not keeps:
        with pytest.warns(UserWarning, match="EarlyStopping cannot restore the best params, those of step 5"):
            train(resumed, resume=True)
        return
    train(resumed, resume=True)
    assert_same_bits(resumed.state.params, expected.state.params)
    plain = build(tmp_path / "c")
    plain.load_checkpoint(saved)
    assert any(
        (a != b).any() for a, b in zip(*map(jax.tree.leaves, (plain.state.params, resumed.state.params)), strict=True)
    )


def test_a_finished_epoch_that_is_resumed_has_the_events_of_a_call_and_no_step(tmp_path):
    train(build(tmp_path), epochs=1)
    recorder = Recorder()
    trainer = build(tmp_path, recorder)
    trainer.train_epoch(resume=True)
    assert (trainer.epoch, trainer.step) == (1, 5)
    assert recorder.names == ["on_train_begin", "on_train_end"]
    trainer.train_epoch(resume=True)
    assert (trainer.epoch, trainer.step) == (2, 10)
    trainer.close()
