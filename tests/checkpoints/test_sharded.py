"""Checkpoints of states on a mesh: from any number of devices and processes to any other, or not at all."""

import json
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from tests.distributed.test_start import run
from tests.problems import Busy, Counting, Playing, config, regression, squared_error
from tests.test_api import assert_same_bits
from trainer import (
    CheckpointError,
    Trainer,
    abstract_state,
    create_sharded,
    latest_checkpoint,
    load_state,
    make_mesh,
    save_state,
)
from trainer.checkpoints.file_format import DTYPES
from trainer.checkpoints.orbax_directory import _Writing, begin_directory
from trainer.checkpoints.saving import take_snapshot
from trainer.checkpoints.state_io import default_name, load_latest, load_with_progress

ADAM = optax.adam(1e-2)
NARROW = sorted(DTYPES.keys() - {"int64", "uint64", "float64", "complex128"})
RULES = {"params/inner/kernel": PartitionSpec(None, "fsdp"), "params/outer/kernel": PartitionSpec("fsdp")}


def sharded(mesh, seed=0):
    """A state of which every kind of array is split: every dtype, and keys."""
    state = create_sharded(
        lambda rngs: Busy(rngs=rngs),
        ADAM,
        rng=jax.random.key(seed),
        mesh=mesh,
        rules=RULES,
        extensions={"size": Counting()},
    )
    split = NamedSharding(mesh, PartitionSpec("fsdp"))
    extra = {}
    for name in NARROW:
        values = np.ones(8) if name == "float8_e8m0fnu" else np.arange(8) % 2 + seed
        extra[name] = spread(values.astype(DTYPES[name]), split)
    make_keys = jax.jit(lambda key: jax.random.split(key, 8), out_shardings=split)
    extra["keys"] = make_keys(jax.random.key(seed + 1))
    extra["empty"] = spread(np.zeros((0, 4), ml_dtypes.bfloat16), NamedSharding(mesh, PartitionSpec()))
    return state.replace(model_state={**state.model_state, "extra": extra})


def spread(values, sharding):
    return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])


def mesh_of(count):
    return make_mesh({"fsdp": count}, jax.devices()[:count])


def words(state):
    """What each device of this process holds, by its place."""
    held = {}
    for path, leaf in jax.tree.leaves_with_path(state):
        array = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        for shard in array.addressable_shards:
            held[jax.tree_util.keystr(path), str(shard.index)] = np.asarray(shard.data).tobytes()
    return held


def shardings(state):
    return jax.tree.map(lambda leaf: leaf.sharding, state)


class TestOneProcess:
    @pytest.mark.parametrize("suffix", [".orbax", ".msgpack"])
    @pytest.mark.slow
    def test_from_any_number_of_devices_to_any_other(self, suffix, tmp_path):
        whole = sharded(mesh_of(1))
        path = save_state(tmp_path / f"s{suffix}", sharded(mesh_of(8)), progress={"epoch": 2})
        for count in (8, 4, 1):
            like = sharded(mesh_of(count), seed=3)
            for leaf in jax.tree.leaves(like):
                leaf.delete()  # where it was is all that is asked
            loaded = load_with_progress(path, like)
            assert loaded.progress == {"epoch": 2}
            assert_same_bits(loaded.state, whole)
            assert shardings(loaded.state) == shardings(like)
            save_state(path, loaded.state, progress={"epoch": 2})  # the next comes from fewer
        assert_same_bits(load_state(path, like=sharded(mesh_of(8), seed=3)), whole)

    @pytest.mark.parametrize("suffix", ["orbax", "msgpack"])
    def test_to_where_shapes_say_without_any_array_before(self, suffix, tmp_path):
        how = {"rng": jax.random.key(0), "mesh": mesh_of(2), "rules": RULES}
        state = create_sharded(lambda rngs: Busy(rngs=rngs), ADAM, **how)
        like = abstract_state(lambda rngs: Busy(rngs=rngs), ADAM, **how)
        loaded = load_state(save_state(tmp_path / f"s.{suffix}", state), like=like)
        assert_same_bits(loaded, state)
        assert shardings(loaded) == shardings(state)

    def test_to_one_device_that_is_no_mesh(self, tmp_path):
        trainer = Trainer(Busy(), config(), loss_fn=squared_error, workdir=tmp_path)
        state = jax.device_put(trainer.state, NamedSharding(mesh_of(8), PartitionSpec()))
        loaded = load_state(save_state(tmp_path / "s.orbax", state), like=trainer.state)
        assert_same_bits(loaded, trainer.state)
        assert shardings(loaded) == shardings(trainer.state)
        assert not loaded.step.committed


class TestNames:
    @pytest.mark.slow
    def test_a_state_on_a_mesh_has_a_name_of_its_own(self):
        assert default_name(3, sharded(mesh_of(2))) == "checkpoint_3.orbax"
        assert default_name(3, sharded(mesh_of(1))) == "checkpoint_3.msgpack"

    @pytest.mark.slow
    def test_the_latest_is_the_one_of_the_highest_step_of_both_kinds(self, tmp_path):
        state = sharded(mesh_of(2))
        for step, suffix in ((9, "orbax"), (10, "msgpack"), (11, "orbax"), (100, "orbax"), (20, "msgpack")):
            save_state(tmp_path / f"checkpoint_{step}.{suffix}", state.replace(step=state.step + step))
        (tmp_path / "checkpoint_0500.orbax").mkdir()
        (tmp_path / "checkpoint_600.orbax.orbax-checkpoint-tmp").mkdir()
        assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint_100.orbax"
        assert load_latest(tmp_path, state).state.step == 100

    @pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
    @pytest.mark.slow
    def test_a_damaged_directory_is_passed_over_aloud(self, tmp_path):
        state = sharded(mesh_of(2))
        for step in (1, 2):
            save_state(tmp_path / f"checkpoint_{step}.orbax", state)
        (tmp_path / "checkpoint_2.orbax" / "state" / "manifest.ocdbt").unlink()
        for find in (latest_checkpoint, lambda directory: load_latest(directory, state).path):
            with pytest.warns(UserWarning, match=r"using `.*checkpoint_1.orbax`, since newer .*_2.orbax` is damaged"):
                assert find(tmp_path) == tmp_path / "checkpoint_1.orbax"


class TestWholeOrNotAtAll:
    def test_one_that_is_not_finished_has_no_name_and_is_swept(self, tmp_path):
        snapshot = take_snapshot(sharded(mesh_of(2)))
        path = tmp_path / "checkpoint_1.orbax"
        finish = begin_directory(path, snapshot.info, snapshot.leaves)
        (unfinished,) = tmp_path.iterdir()
        assert latest_checkpoint(tmp_path) is None
        save_state(tmp_path / "checkpoint_0.msgpack", snapshot.state)
        assert unfinished.exists()  # whoever writes it lives
        finish()
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_0.msgpack", "checkpoint_1.orbax"]
        killed = tmp_path / unfinished.name
        path.rename(killed)  # as a process that is killed leaves it
        save_state(tmp_path / "checkpoint_0.msgpack", snapshot.state)
        assert [path.name for path in tmp_path.iterdir()] == ["checkpoint_0.msgpack"]

    @pytest.mark.slow
    def test_an_earlier_one_is_there_until_the_new_one_is(self, tmp_path):
        one, other = sharded(mesh_of(2)), sharded(mesh_of(4), seed=1)
        path = save_state(tmp_path / "s.orbax", one)
        snapshot = take_snapshot(other)
        finish = begin_directory(path, snapshot.info, snapshot.leaves)
        assert_same_bits(load_state(path, like=other), one)
        finish()
        assert_same_bits(load_state(path, like=one), other)
        assert list(tmp_path.iterdir()) == [path]

    def test_a_process_that_is_killed_while_it_replaces_one_loses_none(self, tmp_path):
        one = sharded(mesh_of(2))
        save_state(tmp_path / "checkpoint_3.orbax", one.replace(step=one.step + 3))
        code = f"""
            import os, pathlib, signal
            from trainer.checkpoints.atomic import NewDirectory
            new = NewDirectory(pathlib.Path({str(tmp_path / "checkpoint_3.orbax")!r}))
            rename = os.rename
            def renamed_once(*arguments):
                rename(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            os.rename = renamed_once
            new.commit()
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], check=False)
        assert done.returncode == -9
        assert sorted(path.suffix for path in tmp_path.iterdir()) == [".old", ".tmp"]
        assert load_latest(tmp_path, one).state.step == 3
        save_state(tmp_path / "checkpoint_4.orbax", one)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint_3.orbax", "checkpoint_4.orbax"]

    @pytest.mark.parametrize("step", ["prepare", "begin", "wait", "commit"])
    @pytest.mark.few(2)
    def test_a_save_that_fails_leaves_what_was_there(self, step, tmp_path, monkeypatch):
        one, other = sharded(mesh_of(2)), sharded(mesh_of(2), seed=1)
        path = save_state(tmp_path / "s.orbax", one)

        work = getattr(_Writing, step)

        def fail(*arguments):
            if step != "commit":
                work(*arguments)
            raise OSError("the disk is gone")

        with monkeypatch.context() as patch:
            patch.setattr(_Writing, step, fail)
            with pytest.raises(CheckpointError, match=r"`.*s.orbax` could not be written \(OSError: the disk is gone"):
                save_state(path, other)
        assert_same_bits(load_state(path, like=other), one)
        assert list(tmp_path.iterdir()) == [path]

    def test_a_directory_of_something_else_is_not_replaced(self, tmp_path):
        (tmp_path / "s.orbax").mkdir()
        (tmp_path / "s.orbax" / "thesis.tex").touch()
        with pytest.raises(CheckpointError, match="a directory of something else, which is not replaced"):
            save_state(tmp_path / "s.orbax", sharded(mesh_of(2)))


class TestTrainer:
    def build(self, tmp_path, count=4, **options):
        trainer = Trainer(
            Busy(), config(max_checkpoints=2), loss_fn=squared_error, workdir=tmp_path, rng=jax.random.key(3), **options
        )
        mesh = mesh_of(count)
        trainer.state = jax.tree.map(
            lambda leaf: jax.device_put(leaf, NamedSharding(mesh, PartitionSpec())), trainer.state
        )
        return trainer

    def test_a_run_is_saved_beside_the_training_and_goes_on_to_the_bit(self, tmp_path):
        whole = self.build(tmp_path, save_interval=2)
        whole.train(regression(24), 2, 4)
        assert sorted(path.name for path in tmp_path.glob("c*")) == ["checkpoint_10.orbax", "checkpoint_12.orbax"]
        again = self.build(tmp_path / "again", count=2)
        again.train(regression(24), 2, 4, resume=tmp_path / "checkpoint_10.orbax")
        assert_same_bits(again.state, whole.state)
        assert again.history.to_dict() == whole.history.to_dict()
        other = self.build(tmp_path)
        other.train(regression(24), 2, 4, resume=True)
        assert_same_bits(other.state, whole.state)

    def test_a_file_is_written_beside_the_training_too(self, tmp_path):
        trainer = self.build(tmp_path)
        before = trainer.state.copy()
        trainer.save_checkpoint(tmp_path / "file.msgpack", background=True)
        trainer.train(regression(24), 1, 4)
        again = self.build(tmp_path / "again")
        again.load_checkpoint(tmp_path / "file.msgpack")
        assert_same_bits(again.state, before)

    def test_one_that_fails_in_the_background_raises_at_the_next_call(self, tmp_path, monkeypatch):
        trainer = self.build(tmp_path)

        wait = _Writing.wait

        def fail(writing):
            wait(writing)
            raise OSError("the disk is gone")

        with monkeypatch.context() as patch:
            patch.setattr(_Writing, "wait", fail)
            trainer.save_checkpoint(background=True)
            with pytest.raises(CheckpointError, match="the disk is gone"):
                trainer.close()
        assert list(tmp_path.iterdir()) == []
        assert trainer.save_checkpoint(background=True) == tmp_path / "checkpoint_0.orbax"
        trainer.close()
        assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint_0.orbax"


TOGETHER = """
import pathlib, resource, warnings
from tests.problems import squared_error, regression
from tests.checkpoints.test_sharded import ADAM, Judged, begin, mesh_of, sharded, words, shardings, spread
from trainer import CheckpointError, ModelCheckpoint, load_state, make_train_step, save_state, jit_step
from trainer.checkpoints.background import BackgroundSaver
from trainer.checkpoints.listing import Written
from trainer.checkpoints.state_io import load_latest, load_with_progress
from trainer.checkpoints.orbax_directory import OrbaxDirectory, _Writing
from tests.problems import Counting

directory = pathlib.Path(json.loads(os.environ["FLAGS"])[0])
mesh = mesh_of(jax.device_count())

def refused(call):
    try:
        call()
    except CheckpointError as error:
        return f"{type(error).__name__}: {error}"

said = {}
"""


def together(body, tmp_path, **how):
    """Runs two processes with two devices each, and returns what they said."""
    results = run(TOGETHER + body + "\nprint(json.dumps(said))", 2, devices=2, flags=[str(tmp_path)], **how)
    assert [status for status, _, _ in results] == [0, 0], results
    return [json.loads(out.splitlines()[-1]) for _, out, _ in results]


class Judged(Playing):
    """Stands for a trainer whose state is spread over processes, in a run with one validation a step."""

    validates = True

    def __init__(self, state):
        self.state, self.step = state, 0

    def snapshot(self):
        return take_snapshot(self.state.replace(step=self.state.step + self.step), progress={"run": self.step})


def begin(path, state):
    return take_snapshot(state).begin(path)


class TestTwoProcesses:
    @pytest.mark.slow
    def test_they_save_and_load_what_others_load_and_saved(self, tmp_path):
        whole = sharded(mesh_of(8))
        save_state(tmp_path / "eight.orbax", whole, progress={"epoch": 8})
        save_state(tmp_path / "eight.msgpack", whole, progress={"epoch": 8})
        body = """
        state, other = sharded(mesh), sharded(mesh, seed=1)
        held, wanted = words(state), shardings(state)
        save_state(directory / "two.orbax", other, progress={"epoch": 1})
        save_state(directory / "two.orbax", state, progress={"epoch": 2})
        said["bundle"] = refused(lambda: save_state(directory / "no.msgpack", state))
        said["same"] = []
        for name in ("two.orbax", "eight.orbax", "eight.msgpack"):
            like = sharded(mesh, seed=1)
            for leaf in jax.tree.leaves(like):
                leaf.delete()
            found = load_with_progress(directory / name, like)
            said["same"].append([words(found.state) == held, shardings(found.state) == wanted, found.progress["epoch"]])
        part = load_state(directory / "two.orbax", other, only=["params"])
        said["part"] = [words(part.params) == words(state.params), words(part.opt_state) == words(other.opt_state)]

        # Beside steps that are in flight.
        state = state.replace(model_state={name: leaf for name, leaf in state.model_state.items() if name != "extra"})
        step = jit_step(make_train_step(squared_error, ADAM, extensions={"size": Counting()}), state)
        batch = {name: spread(column, jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp")))
                 for name, column in regression(16).items()}
        saver = BackgroundSaver()
        for turn in range(3):
            copied = begin(directory / f"checkpoint_{turn}.orbax", state)
            at = words(state)
            saver.start(copied.finish)
            for _ in range(20):
                state, metrics = step(state, batch)
            float(metrics["loss"])
        saver.wait()
        found = load_latest(directory, state)
        said["latest"] = [found.path.name, words(found.state) == at]
        written = Written(directory)
        for turn in range(3):
            written.add(f"checkpoint_{turn}.orbax", "a run")
        written.prune(1)
        barrier("pruned")
        said["left"] = sorted(path.name for path in directory.glob("checkpoint_*"))
        """
        for said in together(body_of(body), tmp_path):
            assert said["bundle"].endswith(
                "is sharded over several processes, which one file cannot hold; save under a name that ends in "
                ".orbax, in every process."
            )
            assert said["same"] == [[True, True, 2], [True, True, 8], [True, True, 8]]
            assert said["part"] == [True, True]
            assert said["latest"] == ["checkpoint_2.orbax", True]
            assert said["left"] == ["checkpoint_2.orbax"]
        for count in (8, 4, 1):
            found = load_with_progress(tmp_path / "two.orbax", sharded(mesh_of(count), seed=1))
            assert_same_bits(found.state, whole)
            assert found.progress == {"epoch": 2}

    @pytest.mark.slow
    def test_what_fails_in_one_fails_in_both_and_leaves_what_was_there(self, tmp_path):
        body = """
        state, other = sharded(mesh), sharded(mesh, seed=1)
        path = directory / "s.orbax"
        save_state(path, state)
        said["refused"] = []

        def broken(owner, name, failing, error, call):
            whole = getattr(owner, name)
            def fail(*_):
                raise error
            if process == failing:
                setattr(owner, name, fail)
            said["refused"].append(refused(call))
            setattr(owner, name, whole)

        full = OSError("the disk is full")
        broken(_Writing, "prepare", 0, full, lambda: save_state(path, other))
        broken(_Writing, "begin", 1, full, lambda: save_state(path, other))
        broken(_Writing, "wait", 1, full, lambda: save_state(path, other))
        broken(_Writing, "commit", 0, full, lambda: save_state(path, other))
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if process == 1:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
        said["refused"].append(refused(lambda: save_state(path, other)))
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        damaged = UnreadableError("`s.orbax` is damaged: here only.")
        broken(OrbaxDirectory, "_restore", 1, damaged, lambda: load_state(path, other))
        broken(OrbaxDirectory, "_read_about", 0, damaged, lambda: load_state(path, other))
        said["same"] = words(load_state(path, other)) == words(state)
        barrier("done")
        said["left"] = sorted(path.name for path in directory.iterdir() if not path.name.endswith(".tmp"))
        """
        one, other = together("from trainer.errors import UnreadableError\n" + body_of(body), tmp_path)
        failing = [0, 1, 1, 0, 1, 1, 0]
        for process, said in enumerate((one, other)):
            assert said["same"]
            assert said["left"] == ["s.orbax"]
            # Five saves that fail, then two loads.
            for number, (failed, text) in enumerate(zip(failing, said["refused"], strict=True)):
                assert text.startswith("CheckpointError: " if number < 5 else "UnreadableError: ")
                assert (f"process {failed} failed: " in text) == (process != failed)
                assert ("the disk is full", "(ValueError: OUT_OF_RANGE: ", "here only")[
                    (number > 3) + (number > 4)
                ] in text

    @pytest.mark.slow
    def test_what_one_process_cannot_prepare_or_pack_fails_in_both_and_leaves_nothing(self, tmp_path):
        body = """
        from trainer.checkpoints import orbax_directory
        from trainer.checkpoints.run_record import save_run, snapshot_run
        from trainer.checkpoints.saving import write_snapshot
        from trainer.run import Run

        state = sharded(mesh)
        run, path = Run.start(state), directory / "s.orbax"
        said["refused"], said["left"] = [], []

        def attempt(call):
            said["refused"].append(refused(call))
            barrier("attempted")
            said["left"].append(sorted(path.name for path in directory.iterdir()))
            barrier("listed")

        def broken(failing, owner, name):
            def fail(*_, **options):
                raise OSError("the disk is full")
            whole = getattr(owner, name)
            if process == failing:
                setattr(owner, name, fail)
            attempt(lambda: save_state(path, state))
            setattr(owner, name, whole)

        for failing in (0, 1):
            broken(failing, _Writing, "prepare")
            broken(failing, orbax_directory, "_tree_of")
        broken(0, pathlib.Path, "mkdir")
        for failing in (0, 1):
            states = [object() if process == failing else {"best": 1.0}]
            attempt(lambda: write_snapshot(path, snapshot_run(run, callback_states=lambda: states)))
            def broken_callback():
                if process == failing:
                    raise CheckpointError("the callback has no state")
                return []
            attempt(lambda: write_snapshot(path, snapshot_run(run, callback_states=broken_callback)))
        # They still agree on which save is which.
        save_run(path, run)
        said["same"] = words(load_state(path, sharded(mesh, seed=1))) == words(state)
        """
        one, other = together(body_of(body), tmp_path)
        failing = [0, 0, 1, 1, 0, 0, 0, 1, 1]
        texts = ["the disk is full"] * 5 + [
            "`callbacks[0]` is an object of type object",
            "the callback has no state",
        ] * 2
        for process, said in enumerate((one, other)):
            assert said["same"]
            assert said["left"] == [[]] * len(failing)
            for failed, wanted, text in zip(failing, texts, said["refused"], strict=True):
                assert wanted in text
                assert (f"process {failed} failed: " in text) == (process != failed)

    def test_checksums_that_one_process_cannot_begin_fail_in_both_before_any_collective(self, tmp_path):
        body = """
        import time
        from trainer.core import checksums

        # Three arrays above 1 MiB, which the devices hash together. One process fails at the second, in its local part.
        spec = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("fsdp"))
        state = sharded(mesh)
        large = {name: spread(np.full((2**17, 4), number, np.float32), spec) for number, name in enumerate("abc")}
        state = state.replace(model_state={**state.model_state, "large": large})
        path = directory / "s.orbax"
        save_state(path, state)
        held = words(state)
        said["refused"], said["seconds"] = [], []
        whole = checksums._digest_over

        class Failing:
            left = 1
            def __call__(self, mesh):
                if self.left == 0:
                    raise MemoryError("no memory to compile")
                self.left -= 1
                return whole(mesh)

        for call in (lambda: save_state(path, state), lambda: load_state(path, state)):
            for failing in (0, 1):
                if process == failing:
                    checksums._digest_over = Failing()
                start = time.monotonic()
                try:
                    call()
                except (CheckpointError, DistributedError, MemoryError) as error:
                    said["refused"].append(f"{type(error).__name__}: {error}")
                said["seconds"].append(time.monotonic() - start)
                checksums._digest_over = whole
        said["same"] = words(load_state(path, state)) == held
        barrier("done")
        said["left"] = sorted(path.name for path in directory.iterdir())
        """
        said = together("from trainer import DistributedError\n" + body_of(body), tmp_path)
        for process, found in enumerate(said):
            assert found["same"]
            assert found["left"] == ["s.orbax"]
            assert max(found["seconds"]) < 30, found
            for failing, text in zip((0, 1, 0, 1), found["refused"], strict=True):
                assert "no memory to compile" in text
                assert (f"process {failing} failed: " in text) == (process != failing)

    @pytest.mark.slow
    def test_they_keep_the_same_best_and_newest(self, tmp_path):
        body = """
        best = ModelCheckpoint(directory, save_top_k=1)
        trainer = Judged(sharded(mesh))
        trainer.play(best, [3.0, 1.0, 2.0, float("nan")])
        barrier("played")
        said["kept"] = sorted(int(path.name) for path in directory.iterdir())
        said["best"] = [best.best_model_path.name, best.best_model_score, best.last_model_path.name]
        again = ModelCheckpoint(directory, save_top_k=1)
        trainer.play(again, [0.5, 4.0], first=5)
        barrier("again")
        said["then"] = sorted(int(path.name) for path in directory.iterdir())
        said["again"] = [again.best_model_path.name, again.best_model_score, again.last_model_path.name]
        found = load_with_progress(again.best_model_path, trainer.state)
        said["progress"] = [found.progress["run"], int(found.state.step)]
        if process == 1:
            _Writing.wait = lambda _: 1 / 0
        said["refused"] = refused(lambda: trainer.play(again, [0.1], first=7))
        said["after"] = [again.best_model_path.name, again.last_model_path.name]
        """
        one, other = together(body_of(body), tmp_path)
        for said in (one, other):
            assert said["kept"] == [2, 4]
            assert said["best"] == ["2", 1.0, "4"]
            assert said["then"] == [5, 6]
            assert said["again"] == ["5", 0.5, "6"]
            assert said["progress"] == [5, 5]
            assert "7` could not be written (ZeroDivisionError: " in said["refused"]
            assert said["after"] == ["5", "6"]

    @pytest.mark.slow
    def test_a_link_of_another_run_is_renamed_by_one_and_a_failure_raised_in_both(self, tmp_path):
        body = """
        from trainer import Checkpointer
        from trainer.checkpoints import checkpointer
        from trainer.run import Run

        warnings.simplefilter("ignore")
        first, second = Run.start(sharded(mesh)), Run.start(sharded(mesh, seed=1))
        path = Checkpointer(directory).save(first)
        barrier("saved")
        if process == 0:
            path.rename(directory / "elsewhere.orbax")
            path.symlink_to("elsewhere.orbax")
        barrier("linked")
        calls, rename = [], os.replace

        def refuse(source, target):
            calls.append(str(target))
            raise PermissionError("not yours")

        os.replace = refuse
        said["refused"] = refused(lambda: Checkpointer(directory).save(second))
        os.replace = rename
        barrier("refused")
        said["calls"] = len(calls)
        said["still"] = os.path.islink(path)
        barrier("asked")
        Checkpointer(directory).save(second)
        barrier("renamed")
        said["left"] = sorted(path.name for path in directory.iterdir() if path.name.endswith(".orbax"))
        said["link"] = os.path.islink(path)
        said["id"] = first.id
        """
        one, other = together(body_of(body), tmp_path)
        assert [one["calls"], other["calls"]] == [1, 0]
        for process, said in enumerate((one, other)):
            assert said["refused"].endswith("not yours")
            assert ("process 0 failed: " in said["refused"]) == (process == 1)
            assert said["still"]
            assert not said["link"]
            assert said["left"] == sorted(["checkpoint_0.orbax", f"checkpoint_0.{one['id']}.orbax", "elsewhere.orbax"])


def body_of(text):
    """Takes the indentation of a method away."""
    return "\n".join(line.removeprefix("        ") for line in text.splitlines())
