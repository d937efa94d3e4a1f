"""What a checkpoint holds beside the state is checked before anything is changed, and what it lacks stays."""

import copy
import random

import jax
import numpy as np
import pytest

import trainer.checkpoints.open
from tests.fit.test_resume import StoppedError, Watching
from tests.problems import Busy, Linear, config, regression, squared_error
from tests.test_api import assert_same_bits
from trainer import ArgumentError, Callback, CheckpointError, Trainer, TrainState, UnreadableError, save_state
from trainer.checkpoints.file_format import Bundle
from trainer.checkpoints.state_io import load_with_progress
from trainer.data.position_codec import encode

DATA = regression(10)
BATCHES = [regression(4, seed=seed) for seed in range(3)]


class Stops(Callback):
    stops = False

    def on_batch_begin(self, trainer, step):
        if self.stops:
            raise StoppedError


def build(directory, **options):
    arguments = {"settings": config(log_frequency=1, save_frequency=2), "train_data_loader": BATCHES, **options}
    return Trainer(
        Busy(),
        arguments.pop("settings"),
        loss_fn=squared_error,
        workdir=directory,
        rng=jax.random.key(3),
        save_interval=2,
        **arguments,
    )


STRANGE = [
    None, True, -1, 0, 1, 2, 10**6, 2**64 - 1, 0.5, float("nan"), float("inf"), "", "text", b"", b"\xc1", [], {}, [1],
    {"a": 1}, [[]], {"step": 1}, [{"step": "1"}], [{}], encode({"x": 1}), [None], {"sums": {}, "weights": {}},
]  # fmt: skip


def mutated(draw, value):
    """Returns a copy in which one thing, anywhere, is another, missing, or too much."""
    if isinstance(value, dict) and value and draw.random() < 0.85:
        key = draw.choice(sorted(value))
        return {**value, key: mutated(draw, value[key])}
    if isinstance(value, list) and value and draw.random() < 0.85:
        index = draw.randrange(len(value))
        return [*value[:index], mutated(draw, value[index]), *value[index + 1 :]]
    if isinstance(value, dict) and draw.random() < 0.5:
        less = {key: value[key] for key in value if draw.random() < 0.7}
        return less if draw.random() < 0.5 else {**value, "strange": draw.choice(STRANGE)}
    return copy.deepcopy(draw.choice(STRANGE))


@pytest.mark.parametrize("method", ["load_checkpoint", "train", "train_epoch"])
@pytest.mark.filterwarnings("ignore:`train_data_loader` cannot be set to a position")
@pytest.mark.filterwarnings("ignore:the checkpoint holds, of the states of callbacks")
@pytest.mark.slow
def test_a_forged_progress_is_refused_or_taken_and_nothing_else(method, tmp_path):
    watching, stops = Watching(), Stops()
    trainer = build(tmp_path / "run", callbacks=[watching, stops])
    calls = {
        "load_checkpoint": trainer.load_checkpoint,
        "train": lambda path: trainer.train(DATA, 2, 4, resume=path),
        "train_epoch": lambda path: trainer.train_epoch(resume=path),
    }
    trainer.train(DATA, 2, 4) if method == "train" else trainer.train_epoch()
    genuine = load_with_progress(tmp_path / "run" / "checkpoint_2.msgpack", trainer.state)
    assert genuine.progress["run"]["step"] == 2
    stops.stops = True
    draw, path, refused = random.Random(1), tmp_path / "forged.msgpack", 0
    for _ in range(250):
        forged = genuine.progress
        for _ in range(draw.randint(1, 2)):
            forged = mutated(draw, forged)
        save_state(path, genuine.state, progress=forged)
        before, bits, rows = trainer.state, trainer.state.copy(), trainer.history.to_dict()
        books = trainer.epoch, trainer.step, watching.state_dict()
        try:
            calls[method](path)
        except StoppedError:
            pass
        except (CheckpointError, ArgumentError):
            refused += 1
            assert trainer.state is before
            assert_same_bits(before, bits)
            # Columns of NaN are not equal to themselves.
            np.testing.assert_equal(trainer.history.to_dict(), rows)
            assert (trainer.epoch, trainer.step, watching.state_dict()) == books
    assert 50 < refused < 250


@pytest.mark.parametrize(
    ("progress", "message"),
    [
        ({"epoch": -1}, "holds a progress that cannot be used: `epoch` is -1, not a count."),
        ({"epoch": True}, "cannot be used: `epoch` is True, not a count."),
        ({"history": {}}, "`history` is of type dict, not a list."),
        ({"history": [5]}, "`history/0` is of type int, not a mapping."),
        ({"history": [{"step": 1}, {"loss": 1.0}]}, "`history/1/step` is None, not a count."),
        ({"history": [{"step": 1, "loss": {"a": 1}}]}, r"`history/0` has {'a': 1} of type dict under 'loss'"),
        ({"history": [{"step": 1, "loss": [[b"1"]]}]}, r"`history/0` has \[\[b'1'\]\] of type list under 'loss'"),
        ({"listeners": 3}, "`listeners` is of type int, not a list."),
        ({"listeners": [{"batches": 1}]}, r"Watching.load_state_dict raised KeyError\('epochs'\) at the state in the"),
        ({"listeners": [5]}, "Watching.load_state_dict raised TypeError"),
    ],
)
def test_what_is_wrong_with_a_progress_is_said(progress, message, tmp_path):
    trainer = build(tmp_path, callbacks=[Watching()])
    trainer.train_step(BATCHES[0])
    before, rows = trainer.state, trainer.history.to_dict()
    save_state(tmp_path / "s.msgpack", trainer.state, progress=progress)
    with pytest.raises(CheckpointError, match=message):
        trainer.load_checkpoint(tmp_path / "s.msgpack")
    assert trainer.state is before
    assert (trainer.epoch, trainer.history.to_dict()) == (0, rows)


def test_what_callbacks_had_taken_before_another_refused_is_put_back(tmp_path):
    class Refusing(Callback):
        refuses = True

        def state_dict(self):
            return {}

        def load_state_dict(self, state):
            if self.refuses:
                raise RuntimeError("no")

    watching = Watching()
    trainer = build(tmp_path, callbacks=[watching, Refusing()])
    trainer.train_step(BATCHES[0])
    path = trainer.save_checkpoint()
    trainer.train_step(BATCHES[0])
    with pytest.raises(CheckpointError, match=r"Refusing.load_state_dict raised RuntimeError\('no'\)"):
        trainer.load_checkpoint(path)
    assert watching.batches == trainer.step == 2


@pytest.mark.parametrize("suffix", ["pkl", "msgpack"])
class TestFilesWithoutAHistory:
    def test_rows_up_to_the_step_stay_and_later_ones_go(self, suffix, tmp_path):
        trainer = build(tmp_path, callbacks=[watching := Watching()])
        for batch in BATCHES[:2]:
            trainer.train_step(batch)
        path = save_state(tmp_path / f"s.{suffix}", trainer.state)
        rows = trainer.history.to_dict()
        trainer.train_epoch()
        trainer.load_checkpoint(path)
        assert trainer.history.to_dict() == rows
        # The rest that such a file does not hold stays as well.
        assert (trainer.epoch, watching.batches) == (1, 5)
        assert trainer.history.series("loss")[0] == [1, 2]
        trainer.train_step(BATCHES[0])
        assert trainer.history.series("loss")[0] == [1, 2, 3]

    def test_a_file_of_a_later_step_forgets_nothing(self, suffix, tmp_path):
        other = build(tmp_path)
        other.train_epoch()
        path = save_state(tmp_path / f"s.{suffix}", other.state)
        trainer = build(tmp_path)
        trainer.train_step(BATCHES[0])
        trainer.load_checkpoint(path)
        assert [row["step"] for row in trainer.history] == [1]


class TestOpeningOnce:
    @pytest.fixture
    def opened(self, monkeypatch):
        """The names of the files that were opened, and whether all of each was verified for nothing."""
        names = []

        class Counted(Bundle):
            def __init__(self, path):
                names.append(path.name)
                super().__init__(path)

            def verify(self):
                raise AssertionError("what is loaded is verified by that")

        monkeypatch.setattr(trainer.checkpoints.open, "Bundle", Counted)
        return names

    @pytest.fixture
    def directory(self, tmp_path):
        build(tmp_path).train(DATA, 3, 4)
        (tmp_path / "checkpoint_9.msgpack").unlink()  # the end of the run
        return tmp_path

    def test_resuming_reads_the_newest_once(self, directory, opened):
        build(directory).train(DATA, 3, 4, resume=True)
        assert opened == ["checkpoint_8.msgpack"]

    def test_so_does_loading(self, directory, opened):
        build(directory).load_checkpoint(directory / "checkpoint_4.msgpack")
        assert opened == ["checkpoint_4.msgpack"]

    @pytest.mark.parametrize("where", [10, -600, -30])
    @pytest.mark.few(1)
    def test_a_damaged_one_is_passed_over_aloud(self, where, directory, opened):
        newest = directory / "checkpoint_8.msgpack"
        whole = bytearray(newest.read_bytes())
        whole[where] ^= 1
        newest.write_bytes(whole)
        resumed = build(directory / "unused", callbacks=[], checkpoint_dir=directory)
        with pytest.warns(UserWarning, match=r"using `.*checkpoint_6.msgpack`, since newer ones are unusable: .*_8"):
            resumed.train(DATA, 3, 4, resume=True)
        assert opened == ["checkpoint_8.msgpack", "checkpoint_6.msgpack"]
        expected = build(directory / "expected")
        expected.train(DATA, 3, 4)
        assert_same_bits(resumed.state, expected.state)

    def test_one_that_does_not_fit_is_no_reason_to_go_back(self, directory, opened):
        state = TrainState.create(Linear(features=4), build(directory).optimizer, rng=jax.random.key(0))
        save_state(directory / "checkpoint_9.msgpack", state)
        with pytest.raises(CheckpointError, match=r"checkpoint_9.msgpack` does not fit the state") as caught:
            build(directory).train(DATA, 3, 4, resume=True)
        assert not isinstance(caught.value, UnreadableError)
        assert opened == ["checkpoint_9.msgpack"]

    def test_nor_is_one_whose_progress_makes_no_sense(self, directory):
        trainer = build(directory)
        save_state(directory / "checkpoint_9.msgpack", trainer.state, progress={"epoch": "many"})
        with pytest.raises(
            CheckpointError, match=r"_9.msgpack` holds a progress that cannot be used: `epoch` is 'many'"
        ):
            trainer.train(DATA, 3, 4, resume=True)

    def test_if_all_are_damaged_it_says_so(self, directory):
        for path in directory.iterdir():
            path.write_bytes(b"")
        with pytest.raises(CheckpointError, match=r"no checkpoint in .* can be used: .*_8.msgpack.*_6.msgpack"):
            build(directory).train(DATA, 3, 4, resume=True)


def test_a_run_in_memory_goes_on_from_what_a_callback_saved_at_the_end_of_a_batch(tmp_path):
    class Saves(Callback):
        def on_batch_end(self, trainer, step, logs):
            trainer.save_checkpoint(tmp_path / f"{step}.msgpack")

    watching = Watching()
    expected = build(tmp_path, callbacks=[watching, Saves()])
    returned = expected.train(DATA, 2, 4, DATA, val_interval=2)
    for step in range(1, 7):
        again = Watching()
        trainer = build(tmp_path / "again", callbacks=[again])
        assert trainer.train(DATA, 2, 4, DATA, val_interval=2, resume=tmp_path / f"{step}.msgpack") == returned
        assert_same_bits(trainer.state, expected.state)
        assert trainer.history.to_dict() == expected.history.to_dict()
        assert (again.batches, again.epochs) == (watching.batches, watching.epochs)


def test_a_step_outside_a_run_belongs_to_none(tmp_path):
    trainer = build(tmp_path)
    trainer.train(DATA, 1, 4)
    trainer.train_step(BATCHES[0])
    path = trainer.save_checkpoint()
    with pytest.raises(CheckpointError, match=r"was not saved during train\(\)"):
        trainer.train(DATA, 1, 4, resume=path)
