"""What no checkpoint can hold is found before the first step of a run that is going to save."""

import pytest

from tests.problems import Linear, config, regression, squared_error
from trainer import Callback, CheckpointError, ModelCheckpoint, Trainer

SAID = r"`callbacks\[0\].state.seen` is an object of type set, which no checkpoint holds"


class Seen(Callback):
    def __init__(self, seen):
        self.seen, self.events = seen, []

    def on_train_begin(self, trainer):
        self.events.append("begin")

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


def build(*callbacks, settings=None, **options):
    return Trainer(Linear(4), settings or config(), loss_fn=squared_error, callbacks=callbacks, **options)


def train(trainer):
    trainer.train(regression(8), 1, 4, regression(4))
    return trainer


def options_of(how, path):
    if how == "interval":
        return {"save_interval": 2}
    return {how: path}


@pytest.mark.parametrize("how", ["workdir", "checkpoint_dir", "interval"])
def test_a_state_is_refused_before_the_first_step(how, tmp_path):
    seen = Seen({1, 2})
    trainer = build(seen, **options_of(how, tmp_path))
    with pytest.raises(CheckpointError, match=SAID):
        train(trainer)
    assert (trainer.step, seen.events, list(tmp_path.iterdir())) == (0, [], [])
    seen.seen = [1, 2]
    assert train(build(seen, workdir=tmp_path)).step == 2


def test_it_is_refused_where_a_callback_saves(tmp_path):
    trainer = build(Seen({1}), ModelCheckpoint(tmp_path, monitor="val_loss", mode="min"))
    with pytest.raises(CheckpointError, match=SAID):
        train(trainer)
    assert trainer.step == 0


def test_it_is_refused_by_train_epoch(tmp_path):
    trainer = build(Seen({1}), workdir=tmp_path, train_data_loader=[regression(4)])
    with pytest.raises(CheckpointError, match=SAID):
        trainer.train_epoch()
    assert trainer.step == 0


def test_metadata_are_refused_too(tmp_path):
    with pytest.raises(CheckpointError, match=r"`info.metadata.labels` is an object of type set"):
        train(build(settings=config(metadata={"labels": {1}}), workdir=tmp_path))


def test_a_run_that_saves_nothing_trains():
    assert train(build(Seen({1}))).step == 2
    assert train(build(Seen({1}), save_interval=None)).step == 2


def test_a_dry_run_trains(tmp_path):
    saving = ModelCheckpoint(tmp_path / "best", monitor="val_loss", mode="min")
    assert train(build(Seen({1}), saving, workdir=tmp_path, fast_dev_run=True)).step == 1


class Late(Seen):
    """Has a state from its first event on."""

    def __init__(self):
        pass

    def on_train_begin(self, trainer):
        self.seen = [1]


def test_a_callback_without_a_state_before_its_first_event_trains(tmp_path):
    assert train(build(Late(), workdir=tmp_path)).step == 2


class Counting(Seen):
    def __init__(self):
        super().__init__([1])
        self.asked = 0

    def state_dict(self):
        self.asked += 1
        return super().state_dict()


def test_states_that_were_found_savable_are_not_read_before_every_call(tmp_path):
    counting = Counting()
    settings = config(num_epochs=9, save_frequency=1000)
    trainer = build(counting, settings=settings, workdir=tmp_path, train_data_loader=[regression(4)])
    trainer.train_epoch()
    after_first = counting.asked
    for _ in range(3):
        trainer.train_epoch()
    assert (after_first, counting.asked) == (2, 2)  # to be checked, and in the first save
