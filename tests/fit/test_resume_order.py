"""Loaders that shuffle by themselves, resumed between epochs: exact where that is possible, else it is said."""

import numpy as np
import pytest

from tests.problems import Linear, config, regression, squared_error
from tests.test_api import assert_same_bits
from trainer import Callback, Trainer

BATCHES = [regression(4, seed=seed) for seed in range(6)]
SAID = "begins every pass with another batch and cannot be set to a position .* and the run was resumed: its order"


class Shuffling:
    """As a ``keras.utils.Sequence`` that shuffles when an epoch ends."""

    def __init__(self):
        self.random = np.random.default_rng(0)
        self.on_epoch_end()

    def __len__(self):
        return len(BATCHES)

    def __getitem__(self, index):
        return BATCHES[self.order[index]]

    def on_epoch_end(self):
        self.order = self.random.permutation(len(BATCHES))


class Iterated:
    """Shuffles with a generator of its own in every pass."""

    def __init__(self, seed=0):
        self.random = np.random.default_rng(seed)

    def __iter__(self):
        return iter([BATCHES[index] for index in self.random.permutation(len(BATCHES))])


class ByEpoch(Iterated):
    def set_epoch(self, epoch):
        self.random = np.random.default_rng(epoch)


def by_epoch(epoch):
    return [BATCHES[index] for index in np.random.default_rng(epoch).permutation(len(BATCHES))]


def run(caller, loader, num_epochs, directory, resume=False, save_interval=None, callbacks=(), **settings):
    trainer = Trainer(
        Linear(4),
        config(max_checkpoints=50, **settings),
        loss_fn=squared_error,
        workdir=directory,
        train_data_loader=loader,
        save_interval=save_interval,
        callbacks=callbacks,
        progress=False,
    )
    if caller == "train":
        trainer.train(loader, num_epochs, 4, resume=resume)
    while trainer.epoch < num_epochs:
        trainer.train_epoch(resume=resume)
    trainer.close()
    return trainer


@pytest.mark.parametrize("caller", ["train", "train_epoch"])
def test_a_new_sequence_is_brought_to_the_epoch(caller, tmp_path):
    whole = run(caller, Shuffling(), 4, tmp_path / "whole")
    run(caller, Shuffling(), 2, tmp_path / "part")
    resumed = run(caller, Shuffling(), 4, tmp_path / "part", resume=True)
    assert resumed.step == whole.step
    assert_same_bits(resumed.state, whole.state)


@pytest.mark.parametrize("caller", ["train", "train_epoch"])
def test_the_sequence_of_the_same_process_is_where_it_was(caller, tmp_path):
    whole = run(caller, Shuffling(), 4, tmp_path / "whole")
    loader = Shuffling()
    run(caller, loader, 2, tmp_path / "part")
    resumed = run(caller, loader, 4, tmp_path / "part", resume=True)
    assert_same_bits(resumed.state, whole.state)


@pytest.mark.filterwarnings("ignore:.*is never seen")
@pytest.mark.parametrize("steps", [3, 6, 9], ids=["part of a pass", "a whole pass", "more than a pass"])
@pytest.mark.parametrize("caller", ["train", "train_epoch"])
def test_only_whole_passes_end_an_epoch_of_the_sequence(caller, steps, tmp_path):
    whole = run(caller, Shuffling(), 4, tmp_path / "whole", steps_per_epoch=steps)
    run(caller, Shuffling(), 2, tmp_path / "part", steps_per_epoch=steps)
    resumed = run(caller, Shuffling(), 4, tmp_path / "part", resume=True, steps_per_epoch=steps)
    assert_same_bits(resumed.state, whole.state)


class Extra(Callback):
    """Takes a step of its own after each of the loop, or takes steps back."""

    is_busy = False

    def __init__(self, act):
        self._act = act

    def on_batch_end(self, trainer, step, logs):
        if not self.is_busy:
            self.is_busy = True
            self._act(trainer)
            self.is_busy = False


def take_back(trainer):
    if trainer.run.batch == 5:
        trainer.state = trainer.state.replace(step=trainer.step - 2)


ACTS = {"takes steps": lambda trainer: trainer.train_step(BATCHES[0]), "takes steps back": take_back}


@pytest.mark.parametrize("act", ACTS)
@pytest.mark.parametrize("caller", ["train", "train_epoch"])
def test_steps_of_callbacks_are_no_batches_of_the_sequence(caller, act, tmp_path):
    extra = Extra(ACTS[act])
    whole = run(caller, Shuffling(), 4, tmp_path / "whole", callbacks=[extra])
    run(caller, Shuffling(), 2, tmp_path / "part", callbacks=[extra])
    resumed = run(caller, Shuffling(), 4, tmp_path / "part", resume=True, callbacks=[extra])
    assert_same_bits(resumed.state, whole.state)


def test_epochs_over_other_data_are_no_passes_over_the_sequence(tmp_path):
    def made(directory):
        options = {"workdir": directory, "train_data_loader": Shuffling(), "callbacks": [Extra(ACTS["takes steps"])]}
        return Trainer(Linear(4), config(), loss_fn=squared_error, progress=False, **options)

    def trained(directory, epochs):
        trainer = made(directory)
        trainer.train(BATCHES, 2, 4)
        while trainer.epoch < epochs:
            trainer.train_epoch()
        trainer.close()
        return trainer

    whole = trained(tmp_path / "whole", 6)
    trained(tmp_path / "part", 4)
    resumed = made(tmp_path / "part")
    while resumed.epoch < 6:
        resumed.train_epoch(resume=True)
    assert_same_bits(resumed.state, whole.state)


@pytest.mark.filterwarnings("ignore:.*are drawn again and dropped")
def test_within_an_epoch_too(tmp_path):
    whole = run("train", Shuffling(), 3, tmp_path, save_interval=1)
    resumed = run("train", Shuffling(), 3, tmp_path / "other", resume=tmp_path / "checkpoint_14.msgpack")
    assert_same_bits(resumed.state, whole.state)


@pytest.mark.parametrize("caller", ["train", "train_epoch"])
@pytest.mark.parametrize("make", [Iterated, lambda: Iterated().__iter__], ids=["iterable", "callable"])
def test_an_order_that_cannot_be_restored_is_said_once(make, caller, tmp_path):
    run(caller, make(), 1, tmp_path)
    with pytest.warns(UserWarning, match=SAID) as said:
        run(caller, make(), 4, tmp_path, resume=True)
    assert len([one for one in said if "begins every pass" in str(one.message)]) == 1


FIXED = {
    "list": lambda: BATCHES,
    "iterable": lambda: type("Fixed", (), {"__iter__": lambda self: iter(BATCHES)})(),
    "callable": lambda: lambda: iter(BATCHES),
    "callable of the epoch": lambda: by_epoch,
    "told the epoch": ByEpoch,
}


@pytest.mark.parametrize("kind", FIXED)
def test_of_one_that_keeps_its_order_or_is_told_the_epoch_nothing_is_said(kind, tmp_path):
    run("train", FIXED[kind](), 1, tmp_path)
    # Warnings are errors.
    assert run("train", FIXED[kind](), 4, tmp_path, resume=True).epoch == 4
