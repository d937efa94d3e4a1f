"""Callbacks that roll a state back, or train steps of their own: every later checkpoint can be resumed, to the bit."""

import re
import warnings

import pytest

from tests.problems import Busy, config, regression, squared_error
from tests.test_api import assert_same_bits
from trainer import ArgumentError, Callback, Trainer

DATA, HELD_OUT = regression(32), regression(8, seed=1)  # eight steps an epoch
LOADER = [regression(4, seed=seed) for seed in range(8)]


class Once(Callback):
    """Acts once, in one event, at or after a step."""

    state_key = "Once"

    def __init__(self, event, act, step=0):
        self.has_acted, self._act, self._step = False, act, step
        setattr(self, event, self._in_event)

    def _in_event(self, trainer, *arguments):
        if not self.has_acted and trainer.step >= self._step:
            self.has_acted = True
            self._act(trainer)

    def on_epoch_begin(self, trainer, epoch):
        pass

    def on_batch_begin(self, trainer, step):
        pass

    def on_batch_end(self, trainer, step, logs):
        pass

    def on_call_end(self, trainer, step, logs):
        pass

    def on_validation_end(self, trainer, logs):
        pass

    def on_epoch_end(self, trainer, epoch, logs):
        self.logs = logs

    def state_dict(self):
        return {"has_acted": self.has_acted}

    def load_state_dict(self, state):
        self.has_acted |= state["has_acted"]  # a rollback does not undo its own act


def build(directory, callback):
    return Trainer(
        Busy(),
        config(max_checkpoints=100),
        loss_fn=squared_error,
        callbacks=[callback],
        workdir=directory,
        steps_per_call=1,
        save_interval=1,
        progress=False,
    )


def run(trainer, data=DATA, **options):
    trainer.train(data, 2, 4, HELD_OUT, 6, **options)
    return trainer


def check_resumed(trainer, callback, step, tmp_path, data=DATA):
    """Compares with a run that resumes from the checkpoint of a step."""
    path = trainer.workdir / f"checkpoint_{step}.msgpack"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*cannot be set to a position")
        resumed = run(build(tmp_path / f"resumed {step}", callback), data, resume=path)
    assert (resumed.step, resumed.epoch) == (trainer.step, trainer.epoch)
    assert_same_bits(resumed.state, trainer.state)


@pytest.mark.parametrize("data", [DATA, LOADER], ids=["in memory", "loader"])
@pytest.mark.parametrize("how", ["load", "assign"])
def test_a_state_that_is_rolled_back_in_the_first_epoch_is_saved_and_resumed(how, data, tmp_path):
    saved = build(tmp_path / "other", Once("on_epoch_end", print, 99))
    saved.train(regression(8, seed=5), 1, 4)

    def back(trainer):
        if how == "load":
            trainer.load_checkpoint(tmp_path / "other" / "checkpoint_2.msgpack")
        else:
            trainer.state = trainer.state.replace(step=2)

    trainer = run(build(tmp_path / "run", Once("on_call_end", back, 5)), data)
    assert (trainer.step, trainer.epoch) == (2 + 3 + 8, 2)
    check_resumed(trainer, Once("on_call_end", back, 99), 4, tmp_path, data)  # of batch 7 of the first epoch


def extra(trainer):
    trainer.train_step(regression(3, seed=7))


EVENTS = ["on_epoch_begin", "on_batch_begin", "on_batch_end", "on_call_end", "on_validation_end", "on_epoch_end"]


@pytest.mark.parametrize("event", EVENTS)
def test_a_step_of_a_callback_moves_nothing_in_the_data(event, tmp_path):
    trainer = run(build(tmp_path / "run", Once(event, extra)))
    assert (trainer.step, trainer.epoch) == (17, 2)
    # `on_epoch_begin` is emitted again where an epoch is resumed.
    check_resumed(trainer, Once(event, extra), 12, tmp_path)


def test_a_validation_counts_for_its_epoch_whatever_steps_came_beside(tmp_path):
    callback = Once("on_call_end", lambda trainer: [extra(trainer) for _ in range(7)], 14)
    trainer = run(build(tmp_path / "run", callback))
    assert trainer.step == 16 + 7
    assert "val_loss" in callback.logs


@pytest.mark.parametrize("caller", ["train", "train_epoch"])
def test_a_run_within_a_run_is_refused(caller, tmp_path):
    def act(trainer):
        trainer.train_epoch() if caller == "train_epoch" else trainer.train(HELD_OUT, 1, 4)

    trainer = Trainer(
        Busy(),
        config(),
        loss_fn=squared_error,
        callbacks=[Once("on_epoch_end", act)],
        train_data_loader=LOADER,
        progress=False,
    )
    said = f"{caller}() was called while this trainer is training, and would replace the position of that run; call"
    with pytest.raises(ArgumentError, match=re.escape(said)):
        trainer.train(DATA, 1, 4)
    trainer.train(DATA, 1, 4)  # nothing is left of it
    assert trainer.step == 16
