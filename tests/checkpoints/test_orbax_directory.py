"""Orbax directories: everything comes back to its place, and no damage goes unnoticed."""

import json
import os
import shutil
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore
import xxhash
from jax.sharding import NamedSharding, PartitionSpec

from tests.checkpoints.test_plain_values import growth
from tests.problems import Busy, Counting, regression, squared_error
from tests.test_api import assert_same_bits
from trainer import CheckpointError, TrainState, UnreadableError, load_state, make_train_step, save_state
from trainer.checkpoints.file_format import DTYPES
from trainer.checkpoints.orbax_directory import OrbaxDirectory, write_directory
from trainer.checkpoints.saving import take_snapshot
from trainer.checkpoints.state_io import load_latest, load_with_progress
from trainer.core import checksums

MESH = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def save(path, state, **options):
    """Saves a state as a directory under a name without an ending, as those of `ModelCheckpoint` are."""
    snapshot = take_snapshot(state, {"score": 0.5}, **options)
    write_directory(path, snapshot.info, snapshot.leaves)
    return path


def busy_state(key=0, optimizer=None):
    return TrainState.create(
        Busy(), optimizer or optax.adam(1e-2), rng=jax.random.key(key), extensions={"size": Counting()}
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    state = busy_state()
    step = jax.jit(make_train_step(squared_error, optax.adam(1e-2), extensions={"size": Counting()}))
    for _ in range(3):
        state, _ = step(state, regression(16))
    return save(tmp_path_factory.mktemp("orbax") / "3", state, progress={"epoch": 2}), state


@pytest.fixture
def copy(saved, tmp_path):
    """A directory to damage."""
    shutil.copytree(saved[0], tmp_path / "3")
    return tmp_path / "3"


def test_everything_comes_back(saved):
    path, state = saved
    assert_same_bits(load_state(path, like=busy_state(7)), state)
    assert load_with_progress(path, busy_state()).progress == {"epoch": 2}
    with OrbaxDirectory(path) as directory:
        assert (directory.info["step"], directory.info["score"]) == (3, 0.5)
        directory.verify()


def test_what_is_loaded_compiles_nothing_again(saved, compilations):
    path, state = saved
    step = jax.jit(make_train_step(squared_error, optax.adam(1e-2), extensions={"size": Counting()}))
    expected, _ = step(state, regression(16))
    found, _ = step(load_state(path, like=busy_state()), regression(16))
    assert compilations["jit(train_step)"] == 1
    assert_same_bits(found, expected)


def test_a_save_of_many_shapes_compiles_no_checksums(tmp_path, compilations):
    state = busy_state()
    many = {str(size): jax.device_put(np.ones((size, 2), np.float32)) for size in range(1, 301)}
    compilations.clear()
    path = save(tmp_path / "0", state.replace(model_state=many))
    assert_same_bits(load_state(path, like=state.replace(model_state=many)).model_state, many)
    assert sum(compilations.values()) < 10, compilations


def test_parts_of_it(saved):
    path, state = saved
    other = busy_state(7)
    warm = load_state(path, like=other, only=["params"])
    assert_same_bits(warm.params, state.params)
    assert_same_bits(warm.opt_state, other.opt_state)
    with pytest.warns(UserWarning, match="does not fit the state everywhere"):
        partly = load_state(path, like=busy_state(optimizer=optax.sgd(0.1)), strict=False)
    assert_same_bits(partly.params, state.params)


def test_what_does_not_fit_is_named(saved):
    with pytest.raises(CheckpointError, match=r"opt_state/0/nu/norm/bias: \(8,\) float32 in the file, nothing"):
        load_state(saved[0], like=busy_state(optimizer=optax.sgd(0.1)))
    state = busy_state()
    half = state.replace(params=jax.tree.map(lambda leaf: leaf.astype(jnp.float16), state.params))
    with pytest.raises(CheckpointError, match=r"params/inner/kernel: \(4, 8\) float32 in the file, \(4, 8\) float16 h"):
        load_state(saved[0], like=half)


@pytest.mark.parametrize("name", sorted(DTYPES.keys() - {"int64", "uint64", "float64", "complex128"}))
@pytest.mark.few(6)
def test_every_dtype_and_shape(name, tmp_path):
    values = np.random.default_rng(0).integers(0, 2, 6)
    ones = np.ones(6) if name == "float8_e8m0fnu" else values  # which has no zero
    arrays = {"a": jnp.asarray(ones.reshape(2, 3), DTYPES[name]), "b": jnp.zeros((0, 4), DTYPES[name])}
    state = busy_state().replace(model_state={**arrays, "c": jnp.asarray(1, DTYPES[name]), "e": {}, "n": None})
    path = save(tmp_path / "0", state)
    assert_same_bits(load_state(path, like=jax.tree.map(lambda leaf: leaf[...], state)), state)


@pytest.mark.parametrize("implementation", ["threefry2x32", "rbg", "unsafe_rbg"])
def test_every_kind_of_key(implementation, tmp_path):
    keys = jax.random.split(jax.random.key(3, impl=implementation), (2, 3))
    state = busy_state().replace(model_state={"keys": keys, "raw": jax.random.PRNGKey(1)})
    path = save(tmp_path / "0", state)
    assert_same_bits(load_state(path, like=state.copy()), state)
    other = "rbg" if implementation == "threefry2x32" else "threefry2x32"
    others = {**state.model_state, "keys": jax.random.split(jax.random.key(0, impl=other), (2, 3))}
    with pytest.raises(CheckpointError, match=r"model_state/keys: .* key<"):
        load_state(path, like=state.replace(model_state=others))


def test_64_bits_round_trip_and_are_verified_without_x64(tmp_path):
    with jax.enable_x64(True):
        wide = {"f": jnp.arange(5.0) / 3, "i": jnp.asarray(2**40), "c": jnp.full((2, 1), 1 / 3 - 2j)}
        state = busy_state().replace(model_state=wide)
        path = save(tmp_path / "0", state)
        assert_same_bits(load_state(path, like=state.copy()), state)
    with OrbaxDirectory(path) as directory:
        directory.verify()


def test_names_that_mean_something_to_others(tmp_path):
    names = {"a.b": jnp.zeros(1), "a": {"b": jnp.ones(1)}, "a/b": jnp.ones(2), "": jnp.ones(3), "..": jnp.ones(4)}
    state = busy_state().replace(model_state={**names, "%2E": jnp.ones(5), "ä": jnp.ones(6)})
    path = save(tmp_path / "0", state)
    assert_same_bits(load_state(path, like=state.copy()), state)


class TestSharded:
    def spread(self, state, *axes):
        def put(leaf):
            fits = leaf.shape == (4, 8)
            return jax.device_put(leaf, NamedSharding(MESH, PartitionSpec(*axes) if fits else PartitionSpec()))

        return jax.tree.map(put, state)

    def test_it_comes_back_in_the_sharding_that_is_asked_for(self, saved, tmp_path):
        _, state = saved
        path = save(tmp_path / "3", self.spread(state, "data"))
        for like in (self.spread(busy_state(), None, "model"), self.spread(busy_state(), "data"), busy_state()):
            loaded = load_state(path, like=like)
            assert_same_bits(loaded, state)
            shardings = jax.tree.map(lambda leaf: leaf.sharding, loaded)
            assert shardings == jax.tree.map(lambda leaf: leaf.sharding, like)

    def test_nothing_is_gathered(self, saved, tmp_path, monkeypatch):
        """No whole copy of a sharded array above 1 MiB is made on the host, neither to save nor to load."""
        large = jax.device_put(jnp.ones((4, 2**17)), NamedSharding(MESH, PartitionSpec("data")))
        state = self.spread(saved[1], "data").replace(model_state={**saved[1].model_state, "large": large})
        monkeypatch.setattr(type(state.step), "__array__", _refuse_to_gather(type(state.step).__array__))
        hashed = []
        monkeypatch.setattr(checksums, "digest_on_host", _recording(checksums.digest_on_host, hashed))
        path = save(tmp_path / "3", state)
        load_state(path, like=self.spread(busy_state(), "data").replace(model_state=state.model_state))
        assert max(hashed) <= 2**20


def _refuse_to_gather(original):
    def to_numpy(array, *args, **kwargs):
        assert array.is_fully_replicated, f"an array of shape {array.shape} was gathered"
        return original(array, *args, **kwargs)

    return to_numpy


def _recording(original, sizes):
    def digest_on_host(array):
        sizes.append(array.nbytes)
        return original(array)

    return digest_on_host


# Where a restore fails, Orbax leaves coroutines behind that complain when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
class TestDamage:
    @pytest.mark.slow
    def test_a_flipped_bit_in_the_arrays(self, copy, saved):
        """Of those in the numbers Orbax itself notices none."""
        refused = 0
        for file in sorted((copy / "state").rglob("d/*")):
            whole = file.read_bytes()
            for position in np.random.default_rng(0).integers(0, len(whole), 12):
                damaged = bytearray(whole)
                damaged[position] ^= 1 << (position % 8)
                file.write_bytes(damaged)
                try:
                    loaded = load_state(copy, like=busy_state(7))
                except CheckpointError:
                    refused += 1
                else:  # bytes of an index that no array needs
                    assert_same_bits(loaded, saved[1])
            file.write_bytes(whole)
        assert refused > 0

    @pytest.mark.parametrize("seed", range(3))
    @pytest.mark.few(1)
    def test_a_flipped_bit_anywhere_else(self, seed, copy, saved):
        draw, refused = np.random.default_rng(seed), 0
        files = [path for path in sorted(copy.rglob("*")) if path.is_file() and path.parent.name != "d"]
        for file in files:
            whole = file.read_bytes()
            for position in draw.integers(0, max(len(whole), 1), 6 if whole else 0):
                damaged = bytearray(whole)
                damaged[position] ^= 1 << draw.integers(8)
                file.write_bytes(damaged)
                try:
                    loaded = load_state(copy, like=busy_state(7))
                except UnreadableError:
                    refused += 1
                else:
                    assert_same_bits(loaded, saved[1])
            file.write_bytes(whole)
        assert refused > 10

    @pytest.mark.parametrize("text", ["", "{}", "[]", "null", "[" * 10_000, '{"tree_metadata": 3}'])
    def test_metadata_that_makes_no_sense(self, text, copy):
        (copy / "state" / "_METADATA").write_text(text)
        with pytest.raises(UnreadableError, match="is damaged"):
            load_state(copy, like=busy_state())

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"chunks": [4, 2**40]}, "has chunks"),
            ({"chunks": [0, 8]}, "has chunks"),
            ({"chunks": [4.0, 8]}, "has chunks"),
            ({"chunks": [32]}, "has chunks"),
            ({"chunks": None}, "has chunks"),
            ({"shape": [4, 2**40], "chunks": [4, 2**40]}, "is stored as"),
            ({"dtype": "<f8"}, "is stored as"),
            ({"dtype": [["a", "<f4"]]}, "is stored as"),
        ],
    )
    def test_a_description_of_an_array_that_lies(self, changes, message, copy):
        """Such a chunk ends the process, unless it is refused before TensorStore sees it."""
        base = {"driver": "file", "path": f"{copy / 'state'}/"}
        store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
        name = b"params.inner.kernel/.zarray"
        stored = json.loads(store.read(name).result().value)
        store.write(name, json.dumps({**stored, **changes})).result()
        with pytest.raises(UnreadableError, match=f"`params.inner.kernel` {message}"):
            load_state(copy, like=busy_state())

    @pytest.mark.parametrize("size", [0, 5, 113, 2**34])
    def test_a_manifest_of_zeros(self, size, copy):
        os.truncate(copy / "state" / "manifest.ocdbt", 0)
        os.truncate(copy / "state" / "manifest.ocdbt", size)
        with pytest.raises(UnreadableError, match=r"`manifest.ocdbt` is no manifest"):
            load_state(copy, like=busy_state())

    def test_a_manifest_that_grew(self, copy):
        os.truncate(copy / "state" / "manifest.ocdbt", 2**34)
        with pytest.raises(UnreadableError, match=r"`manifest.ocdbt` has 17179869184 bytes, which is not what it says"):
            load_state(copy, like=busy_state())

    @pytest.mark.parametrize("bomb", ["[],", "{},", '{"":0},', '"ab",', "999,", "1.5,"])
    @pytest.mark.parametrize("is_signed", [False, True])
    def test_a_description_takes_memory_in_proportion_to_its_bytes(self, bomb, is_signed, copy):
        file = copy / "about" / "metadata"
        text = json.loads(file.read_text())["about"].replace(
            '"score": 0.5', f'"score": [{bomb * (2**20 // len(bomb))}0]'
        )
        checksum = xxhash.xxh3_64_hexdigest(text.encode()) if is_signed else "0"
        file.write_text(json.dumps({"format": "nnx-trainer orbax 1", "about": text, "checksum": checksum}))
        peak, error = growth(lambda: OrbaxDirectory(copy))
        assert peak < 40 * file.stat().st_size
        assert error is None or isinstance(error, UnreadableError)
        assert is_signed or "does not have the checksum" in str(error)

    def test_a_description_of_any_size_is_not_read(self, copy):
        os.truncate(copy / "about" / "metadata", 2**34)
        peak, error = growth(lambda: OrbaxDirectory(copy))
        assert peak < 2**20
        assert "it is too large" in str(error)

    @pytest.mark.parametrize("size", [2**20, 2**34])
    def test_a_tree_of_orbax_that_is_larger_than_its_arrays_need_is_not_read(self, size, copy):
        os.truncate(copy / "state" / "_METADATA", size)
        peak, error = growth(lambda: load_state(copy, like=busy_state()))
        assert f"`_METADATA` has {size} bytes, more than its arrays can need" in str(error)
        assert isinstance(error, UnreadableError)
        assert peak < 8 * 2**20

    def test_a_tree_of_many_arrays_with_long_names_is_no_bomb(self, tmp_path):
        """Orbax describes each part of each name."""
        deep = {}
        for index in range(300):
            node = deep
            for part in range(20):
                node = node.setdefault(f"ä{part}" if index % 2 else "a", {})
            node[str(index)] = np.ones(1, np.float32)
        state = busy_state().replace(model_state=jax.tree.map(jnp.asarray, deep))
        path = save(tmp_path / "0", state)
        sizes = [(path / name).stat().st_size for name in ("state/_METADATA", "about/metadata")]
        assert 64 * 2**10 < sizes[0] < 8 * sizes[1]
        assert_same_bits(load_state(path, like=state.copy()), state)

    @pytest.mark.slow
    @pytest.mark.parametrize("name", ["state/manifest.ocdbt", "state/_METADATA", "about/metadata"])
    def test_files_of_16_gib_take_no_memory_and_no_time(self, name, copy):
        """All memory, also that of Orbax and TensorStore, so in a process of its own."""
        code = f"""
            import resource, time
            from tests.checkpoints.test_orbax_directory import busy_state
            from trainer import UnreadableError, load_state
            like = busy_state()
            def attempt():
                try:
                    load_state({str(copy)!r}, like=like)
                except UnreadableError as error:
                    print(repr(str(error)))
            attempt()
            before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
            import os
            os.truncate({str(copy / name)!r}, 2**34)
            attempt()
            print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, time.perf_counter() - start)
        """
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
        *errors, last = done.stdout.splitlines()
        assert len(errors) == 1, errors  # whole, it is read; then not
        kibibytes, seconds = map(float, last.split())
        assert kibibytes < 32 * 1024
        assert seconds < 10

    @pytest.mark.parametrize("name", ["about/metadata", "state/_METADATA", "state/manifest.ocdbt", "state/_sharding"])
    def test_a_named_pipe_is_no_file(self, name, copy):
        (copy / name).unlink()
        os.mkfifo(copy / name)
        with pytest.raises(UnreadableError, match="is no regular file"):
            load_state(copy, like=busy_state())

    def test_arrays_that_the_files_cannot_hold(self, copy):
        file = copy / "about" / "metadata"
        about = json.loads(json.loads(file.read_text())["about"])
        leaf = next(leaf for leaf in about["leaves"] if leaf["path"] == ["params", "inner", "kernel"])
        leaf["shape"] = [2**20, 2**20]
        text = json.dumps(about)
        envelope = {"format": "nnx-trainer orbax 1", "about": text, "checksum": xxhash.xxh3_64_hexdigest(text.encode())}
        file.write_text(json.dumps(envelope))
        with pytest.raises(UnreadableError, match=r"its files of \d+ bytes cannot hold arrays of 4398046511104 bytes"):
            OrbaxDirectory(copy).verify()

    def test_a_run_falls_back_to_the_one_before(self, copy, tmp_path, saved):
        copy.rename(tmp_path / "checkpoint_3.orbax")
        save_state(tmp_path / "checkpoint_2.msgpack", saved[1])
        (tmp_path / "checkpoint_3.orbax" / "state" / "_METADATA").write_text("{}")
        with pytest.warns(UserWarning, match="since newer ones are unusable"):
            assert load_latest(tmp_path, saved[1]).path == tmp_path / "checkpoint_2.msgpack"

    def test_the_description_is_under_a_checksum(self, copy):
        file = copy / "about" / "metadata"
        envelope = json.loads(file.read_text())
        file.write_text(json.dumps({**envelope, "about": envelope["about"].replace("0.5", "0.6")}))
        with pytest.raises(CheckpointError, match="its description does not have the checksum that was written"):
            OrbaxDirectory(copy)

    @pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"format": 1}', "\x00", "[" * 100_000])
    def test_a_description_that_makes_no_sense(self, text, copy):
        (copy / "about" / "metadata").write_text(text)
        with pytest.raises(CheckpointError, match="is damaged"):
            OrbaxDirectory(copy)

    def test_a_newer_format(self, copy):
        file = copy / "about" / "metadata"
        file.write_text(json.dumps({**json.loads(file.read_text()), "format": "nnx-trainer orbax 2"}))
        with pytest.raises(CheckpointError, match="its format is 'nnx-trainer orbax 2', and this release reads"):
            OrbaxDirectory(copy)

    @pytest.mark.parametrize("missing", ["state", "state/manifest.ocdbt", "state/d"])
    def test_missing_parts(self, missing, copy):
        gone = copy / missing
        shutil.rmtree(gone) if gone.is_dir() else gone.unlink()
        with pytest.raises(CheckpointError, match="is damaged"):
            load_state(copy, like=busy_state())

    def test_a_directory_of_something_else(self, tmp_path):
        with pytest.raises(CheckpointError, match="is no Orbax directory that this library wrote"):
            load_state(tmp_path, like=busy_state())

    def test_the_directory_above(self, saved):
        with pytest.raises(CheckpointError, match="holds checkpoints of the steps 3; pass one of them"):
            load_state(saved[0].parent, like=busy_state())
