"""Several runs in a directory, and things that are no checkpoints: nothing is lost or adopted in silence."""

import dataclasses
import os
import shutil
import warnings

import jax
import jax.numpy as jnp
import optax
import pytest

from tests.distributed.test_signals import Loader
from tests.problems import Busy, Linear, config, regression, squared_error
from tests.test_api import assert_same_bits
from trainer import (
    ArgumentError,
    Checkpointer,
    CheckpointError,
    Trainer,
    TrainState,
    latest_checkpoint,
    load_run,
    make_mesh,
)
from trainer.checkpoints import checkpointer
from trainer.checkpoints.listing import Written, entries_in, info_of, names_in, open_named
from trainer.run import Run

LATER = "holds checkpoints up to step .*, later than this run's step"


def build(directory, keep=3, model=None, **options):
    options = {"save_interval": 2, **options}
    model = Busy() if model is None else model
    return Trainer(model, config(max_checkpoints=keep), loss_fn=squared_error, workdir=directory, **options)


def train(trainer, epochs, **options):
    """Four steps an epoch."""
    with trainer:
        trainer.train(regression(16), epochs, 4, **options)
    return trainer


def run_in(path):
    return info_of(path)["run"]


class Runs:
    """Runs of one kind: into files or directories, over data in memory or a loader; two epochs of four steps."""

    def __init__(self, kind, caller, keep=3):
        self.suffix, self.caller, self.keep = kind, caller, keep

    def build(self, directory, seed=0):
        mesh = make_mesh({"data": 2}, jax.devices()[:2]) if self.suffix == "orbax" else None
        settings = {"num_epochs": 2, "save_frequency": 2} if self.caller == "train_epoch" else {}
        return Trainer(
            Linear(4),
            config(max_checkpoints=self.keep, **settings),
            loss_fn=squared_error,
            train_data_loader=Loader(16) if self.caller == "train_epoch" else None,
            workdir=directory,
            save_interval=2,
            mesh=mesh,
            rng=jax.random.key(seed),
        )

    def train(self, directory, seed=0, resume=False, epochs=2):
        trainer = self.build(directory, seed)
        with trainer:
            if self.caller == "train":
                trainer.train(regression(16), epochs, 4, resume=resume)
            while trainer.epoch < epochs:
                trainer.train_epoch(resume=resume)
        return trainer

    def names(self, *stems):
        return {f"checkpoint_{stem}.{self.suffix}" for stem in stems}


def all_runs(keep=3):
    kinds = [("msgpack", "train"), ("orbax", "train_epoch"), ("msgpack", "train_epoch"), ("orbax", "train")]
    return pytest.mark.parametrize("runs", [pytest.param(Runs(*kind, keep), id="-".join(kind)) for kind in kinds])


@pytest.fixture
def shared(tmp_path):
    """A directory in which a long run has saved steps 16, 18 and 20."""
    train(build(tmp_path), 5)
    assert list(names_in(tmp_path).values()) == [16, 18, 20]
    return tmp_path


class TestPruning:
    def test_a_shorter_run_keeps_what_it_wrote_and_what_another_wrote(self, shared):
        with pytest.warns(
            UserWarning, match=r"holds checkpoints up to step 20, later than this run's step 0. They are kept"
        ):
            second = train(build(shared, keep=2), 2)
        assert list(names_in(shared).values()) == [6, 8, 16, 18, 20]
        path = second.save_checkpoint()
        assert path.exists()
        assert load_run(path, second.run).step == 8

    @all_runs(keep=2)
    @pytest.mark.few(2)
    def test_of_two_runs_each_keeps_its_own_number(self, runs, tmp_path):
        long = runs.train(tmp_path, epochs=4)
        with pytest.warns(UserWarning, match=LATER):
            short = runs.train(tmp_path, 1)
        assert names_in(tmp_path).keys() == runs.names(6, 8, 14, 16)
        ids = [long.run.id] * 2 + [short.run.id] * 2
        assert [run_in(tmp_path / f"checkpoint_{step}.{runs.suffix}") for step in (14, 16, 6, 8)] == ids

    def test_it_is_said_once(self, shared):
        trainer = build(shared)
        with pytest.warns(UserWarning, match=LATER):
            train(trainer, 1)
        train(trainer, 1)

    def test_a_resumed_run_counts_what_it_wrote_before(self, tmp_path):
        first = train(build(tmp_path), 2, resume=True)
        assert list(names_in(tmp_path).values()) == [4, 6, 8]
        second = train(build(tmp_path), 3, resume=True)
        assert list(names_in(tmp_path).values()) == [8, 10, 12]
        assert second.run.id == first.run.id

    def test_after_a_rollback_the_oldest_go_first(self, tmp_path):
        trainer = build(tmp_path, keep=3)
        early = train(trainer, 1).save_checkpoint(tmp_path / "early.msgpack")
        train(trainer, 4)
        assert list(names_in(tmp_path).values()) == [16, 18, 20]
        trainer.load_checkpoint(early)
        train(trainer, 1)
        assert list(names_in(tmp_path).values()) == [6, 8, 20]
        assert latest_checkpoint(tmp_path).name == "checkpoint_8.msgpack"

    def test_what_another_run_has_replaced_is_not_removed(self, tmp_path):
        first, second = build(tmp_path, keep=1), build(tmp_path, keep=1)
        mine = first.save_checkpoint()
        with pytest.warns(UserWarning, match="is of another run, which may be saving in this directory too"):
            second.save_checkpoint()
        assert names_in(tmp_path).keys() == {mine.name, f"checkpoint_0.{first.run.id}.msgpack"}
        assert first.setup.checkpointer.saved_path(first.run).name == f"checkpoint_0.{first.run.id}.msgpack"
        assert second.setup.checkpointer.saved_path(second.run) == mine
        first.train_step(regression(4))
        first.save_checkpoint()  # which removes its own of step 0, under whatever name
        assert run_in(mine) == second.run.id
        assert names_in(tmp_path).keys() == {mine.name, "checkpoint_1.msgpack"}

    def test_two_runs_of_one_object_keep_their_own_number_each(self, tmp_path):
        checkpoints = Checkpointer(tmp_path, max_checkpoints=2)
        state = TrainState.create(Linear(), optax.sgd(0.1), rng=jax.random.key(0))
        one, two = Run.start(state), Run.start(state)

        def save(run, step):
            at = Run.start(state.replace(step=jnp.asarray(step, jnp.int32)))
            checkpoints.save(dataclasses.replace(at, id=run.id))

        for step in (1, 2, 3):
            save(one, step)
        for step in (11, 12, 13):
            save(two, step)
        assert list(names_in(tmp_path).values()) == [2, 3, 12, 13]
        with pytest.warns(UserWarning, match="is of another run"):
            save(two, 3)
        assert names_in(tmp_path).keys() == {
            *(f"checkpoint_{step}.msgpack" for step in (2, 3, 13)),
            f"checkpoint_3.{one.id}.msgpack",
        }
        for step in (4, 5):  # the renamed one counts too
            save(one, step)
        assert {entry.step for entry in entries_in(tmp_path) if entry.run == one.id} == {4, 5}
        assert {entry.step for entry in entries_in(tmp_path) if entry.run == two.id} == {3, 13}

    def test_a_restored_run_names_what_it_saved_again_and_not_what_was_renamed_before(self, tmp_path):
        first = train(build(tmp_path), 1)
        with pytest.warns(UserWarning, match=LATER):
            second = train(build(tmp_path), 1)
        with pytest.warns(UserWarning, match="is of another run"):
            path = first.save_checkpoint()
        assert (tmp_path / f"checkpoint_4.{first.run.id}.msgpack").exists()
        checkpoints = Checkpointer(tmp_path)
        restored = checkpoints.load(path, second.run).run
        assert restored.id == first.run.id
        assert checkpoints.saved_path(restored) == path

    @pytest.mark.parametrize("keep", [1, 2])
    def test_a_kill_after_the_last_save_leaves_none_too_many(self, keep, tmp_path, monkeypatch):
        with monkeypatch.context() as killed:
            killed.setattr(Written, "prune", lambda self, keep: None)
            train(build(tmp_path, keep=keep), 3)
        assert list(names_in(tmp_path).values()) == [2, 4, 6, 8, 10, 12]
        train(build(tmp_path, keep=keep), 3, resume=True)
        assert list(names_in(tmp_path).values()) == [10, 12][-keep:]

    def test_none_keeps_all(self, tmp_path):
        train(build(tmp_path, keep=None), 3)
        assert list(names_in(tmp_path).values()) == [2, 4, 6, 8, 10, 12]
        checkpoints = Checkpointer(tmp_path / "own", max_checkpoints=None)
        run = Run.start(TrainState.create(Linear(), optax.sgd(0.1), rng=jax.random.key(0)))
        assert checkpoints.save(run).exists()

    @pytest.mark.parametrize("wrong", [-1, 0, True, 1.5, "5"])
    def test_a_number_that_would_remove_what_was_just_written_is_refused(self, wrong, tmp_path):
        with pytest.raises(ArgumentError, match=r"`max_checkpoints` is .* a positive integer, or None for all"):
            Checkpointer(tmp_path, max_checkpoints=wrong)

    def test_no_file_is_opened_for_it(self, tmp_path, monkeypatch):
        trainer = build(tmp_path, keep=2)
        trainer.save_checkpoint()
        monkeypatch.setattr("trainer.checkpoints.listing.info_of", None)
        for _ in range(4):
            trainer.train_step(regression(4))
            trainer.save_checkpoint()
        assert list(names_in(tmp_path).values()) == [3, 4]

    def test_names_of_others_stay(self, tmp_path):
        written = Written(tmp_path)
        others = ["checkpoint_1.msgpack.bak", "checkpoint_x.msgpack", "checkpoint_03.msgpack", "model.msgpack"]
        for name in others:
            (tmp_path / name).write_text("")
        for step in (2, 10, 9, 100):
            (tmp_path / f"checkpoint_{step}.msgpack").write_text(str(step))
            written.add(f"checkpoint_{step}.msgpack", "a run")
        written.prune(2)
        left = {"checkpoint_9.msgpack", "checkpoint_100.msgpack", *others}
        assert {path.name for path in tmp_path.iterdir()} == left


class TestTheSameScriptAgain:
    """The steps of all runs are the same, so all would have the same names."""

    @all_runs()
    def test_the_last_of_each_run_stays_whatever_saves_the_same_steps(self, runs, tmp_path):
        trained, last = [], []
        for seed in range(3):
            with warnings.catch_warnings(record=True) as told:
                warnings.simplefilter("always")
                trained.append(runs.train(tmp_path, seed))
            assert [LATER.split(" .*")[0] in str(one.message) for one in told] == [True] * (seed > 0)  # one warning
            last.append(latest_checkpoint(tmp_path))
            assert run_in(last[-1]) == trained[-1].run.id
        ids = [trainer.run.id for trainer in trained]
        assert names_in(tmp_path).keys() == runs.names(4, 6, 8, f"8.{ids[0]}", f"8.{ids[1]}")
        for trainer in trained:
            (path,) = [tmp_path / entry.name for entry in entries_in(tmp_path) if entry.run == trainer.run.id][-1:]
            with open_named(path) as opened:
                opened.verify()
            other = runs.build(tmp_path / "other")
            other.load_checkpoint(path)
            assert_same_bits(other.state, trainer.state)
        resumed = runs.train(tmp_path, 2, resume=True, epochs=3)  # and nothing is said of runs that were renamed
        assert (resumed.run.id, resumed.step) == (ids[2], 12)

    @all_runs()
    @pytest.mark.few(2)
    def test_one_under_another_name_is_resumed_and_pruned_by_its_run(self, runs, tmp_path):
        whole = runs.train(tmp_path / "whole", epochs=4)
        first = runs.train(tmp_path)
        with pytest.warns(UserWarning, match=LATER):
            second = runs.train(tmp_path, 1)
        renamed = tmp_path / runs.names(f"8.{first.run.id}").pop()
        again = runs.build(tmp_path)
        if runs.caller == "train":
            again.train(regression(16), 4, 4, resume=renamed)
        else:
            again.train_epoch(resume=renamed)
            for _ in range(2):
                again.train_epoch()
        again.close()
        assert again.run.id == first.run.id
        assert_same_bits(again.state, whole.state)
        assert names_in(tmp_path).keys() == runs.names(4, 6, 8, 12, 14, 16)
        assert {run_in(tmp_path / name) for name in runs.names(4, 6, 8)} == {second.run.id}

    @all_runs()
    @pytest.mark.few(2)
    def test_a_run_that_was_killed_at_its_first_save_leaves_the_other_to_be_resumed(self, runs, tmp_path, monkeypatch):
        first = runs.train(tmp_path)
        shutil.rmtree(path) if (path := tmp_path / runs.names(2).pop()).is_dir() else None
        second = runs.build(tmp_path, 1)
        for _ in range(8):
            second.train_step(regression(4))
        rename = os.rename if runs.suffix == "orbax" else os.replace

        def killed(source, target):
            if os.path.basename(target) == runs.names(8).copy().pop():
                raise KeyboardInterrupt
            rename(source, target)

        monkeypatch.setattr(os, rename.__name__, killed)
        with pytest.warns(UserWarning, match="is of another run"), pytest.raises(KeyboardInterrupt):
            second.save_checkpoint()
        monkeypatch.undo()
        assert latest_checkpoint(tmp_path) == tmp_path / runs.names(f"8.{first.run.id}").pop()
        assert runs.train(tmp_path, resume=True).run.id == first.run.id

    def test_what_another_run_saves_meanwhile_stays_too(self, tmp_path, monkeypatch):
        """Between the check of the name and the rename, as two runs at once do it."""
        first, second = build(tmp_path), build(tmp_path)
        write = checkpointer.write_snapshot

        def write_later(path, snapshot):
            monkeypatch.undo()
            first.save_checkpoint()
            write(path, snapshot)

        monkeypatch.setattr(checkpointer, "write_snapshot", write_later)
        path = second.save_checkpoint()
        assert run_in(path) == second.run.id
        assert run_in(tmp_path / f"checkpoint_0.{first.run.id}.msgpack") == first.run.id

    def test_a_link_is_renamed_and_what_it_points_to_stays(self, tmp_path):
        first, second = build(tmp_path), build(tmp_path)
        path = first.save_checkpoint()
        path.rename(tmp_path / "elsewhere")
        path.symlink_to("elsewhere")
        with pytest.warns(UserWarning, match="is of another run"):
            second.save_checkpoint()
        assert run_in(path) == second.run.id
        assert run_in(tmp_path / "elsewhere") == first.run.id
        assert os.readlink(tmp_path / f"checkpoint_0.{first.run.id}.msgpack") == "elsewhere"

    def test_one_that_cannot_be_renamed_is_not_replaced(self, tmp_path, monkeypatch):
        first, second = build(tmp_path), build(tmp_path)
        path, replace = first.save_checkpoint(), os.replace

        def refuse(source, target):
            if first.run.id in str(target):
                raise PermissionError("not yours")
            replace(source, target)

        monkeypatch.setattr(os, "replace", refuse)
        renamed = r"checkpoint_0.msgpack` of another run could not be renamed to .*: not yours"
        with pytest.warns(UserWarning, match="another run"), pytest.raises(CheckpointError, match=renamed):
            second.save_checkpoint()
        assert run_in(path) == first.run.id


class TestLatest:
    def test_it_is_of_the_run_that_saved_last_and_that_is_said(self, shared):
        with pytest.warns(UserWarning, match=LATER):
            second = train(build(shared), 2)
        assert latest_checkpoint(shared).name == "checkpoint_8.msgpack"
        with pytest.warns(UserWarning, match=r"holds checkpoints of 2 runs; `checkpoint_8.msgpack` is of the one that"):
            third = train(build(shared), 2, resume=True)
        assert (third.run.id, third.step) == (second.run.id, 8)

    def test_a_copy_of_a_directory_has_the_same(self, shared, tmp_path_factory):
        copy = tmp_path_factory.mktemp("copy")
        for time, name in enumerate(reversed(names_in(shared))):
            shutil.copy(shared / name, copy)
            os.utime(copy / name, (time, time))
        assert latest_checkpoint(copy).name == "checkpoint_20.msgpack"
        assert [entry.step for entry in entries_in(copy)] == [16, 18, 20]


class TestOtherThings:
    def test_directories_and_files_with_the_names_of_checkpoints_stay(self, tmp_path):
        (tmp_path / "checkpoint_0.msgpack").mkdir()
        (tmp_path / "checkpoint_0.msgpack" / "mine").write_text("mine")
        (tmp_path / "checkpoint_7.orbax").write_text("mine")
        trainer = train(build(tmp_path, keep=2), 2, resume=True)
        assert trainer.step == 8
        assert (tmp_path / "checkpoint_0.msgpack" / "mine").read_text() == "mine"
        assert (tmp_path / "checkpoint_7.orbax").read_text() == "mine"
        assert list(names_in(tmp_path).values()) == [6, 8]

    @pytest.mark.parametrize(
        "make", [lambda path: path.mkdir(), lambda path: path.write_bytes(b"\x81\xa6params\xc0 of flax")]
    )
    def test_what_is_no_checkpoint_is_not_replaced(self, make, tmp_path):
        path = tmp_path / "checkpoint_0.msgpack"
        make(path)
        with pytest.raises(CheckpointError, match=r"checkpoint_0.msgpack` was not written by this library, and is not"):
            build(tmp_path).save_checkpoint()
        assert path.is_dir() or path.read_bytes().endswith(b"of flax")

    @pytest.mark.parametrize("damage", [b"", bytes(100), None])
    def test_a_damaged_checkpoint_is_replaced(self, damage, tmp_path):
        trainer = build(tmp_path, model=Linear(4))
        path = trainer.save_checkpoint()
        content = path.read_bytes()
        path.write_bytes(content[: len(content) // 2] if damage is None else damage)
        again = build(tmp_path, model=Linear(4))
        assert again.save_checkpoint() == path
        assert latest_checkpoint(tmp_path) == path


class TestIdentity:
    def test_each_run_has_its_own_and_a_resumed_one_keeps_it(self, tmp_path):
        first, second = train(build(tmp_path / "a"), 1), train(build(tmp_path / "b"), 1)
        assert first.run.id != second.run.id
        assert run_in(latest_checkpoint(tmp_path / "a")) == first.run.id
        resumed = train(build(tmp_path / "a"), 1, resume=True)
        assert resumed.run.id == first.run.id
        assert load_run(latest_checkpoint(tmp_path / "a"), second.run).id == first.run.id

    def test_loading_a_checkpoint_of_another_run_leaves_it(self, tmp_path):
        first, second = train(build(tmp_path / "a"), 1), build(tmp_path / "b")
        before = second.run.id
        second.load_checkpoint(latest_checkpoint(tmp_path / "a"))
        assert second.run.id == before != first.run.id

    def test_nothing_is_said_of_one_run(self, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            trainer = build(tmp_path)
            train(trainer, 1)
            train(trainer, 1)
            train(build(tmp_path), 1, resume=True)
