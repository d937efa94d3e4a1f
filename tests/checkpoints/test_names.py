"""Names: an ending that promises a format is honoured or refused; files of weights come back as what they were."""

import sys
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from tests.problems import Busy, Counting, regression, squared_error
from tests.test_api import assert_same_bits
from trainer import (
    ArgumentError,
    Checkpointer,
    CheckpointError,
    Run,
    TrainState,
    load_run,
    load_state,
    make_train_step,
    save_run,
    save_state,
)
from trainer.checkpoints.export import convert
from trainer.checkpoints.file_format import MAGIC

OPTIMIZER = optax.adam(1e-2)
SAYS_WHAT = r"holds the params and the model state of step 1, and nothing to continue a run with; save a name in \.msg"
SAYS_REST = r"holds weights only; not loaded: extensions, opt_state, rng, step\. They stay as they were"


def fresh(key=5):
    return TrainState.create(Busy(), OPTIMIZER, rng=jax.random.key(key), extensions={"size": Counting()})


@pytest.fixture(scope="module")
def trained():
    step = jax.jit(make_train_step(squared_error, OPTIMIZER, extensions={"size": Counting()}))
    return step(fresh(0), regression(16))[0]


def weights_of(state):
    return state.params, state.model_state


@pytest.mark.parametrize(
    ("name", "promise", "instead"),
    [
        ("w.pt", "a file of PyTorch", "save a name in .safetensors, which `safetensors.torch.load_file` reads"),
        ("w.PTH", "a file of PyTorch", ".safetensors"),
        ("w.h5", "an HDF5 file of Keras", "checkpoints are .msgpack, .orbax, .pkl or .safetensors"),
        ("w.ckpt", "PyTorch Lightning or TensorFlow", "checkpoints are .msgpack"),
        ("w.npz", "holds no whole run", "run `trainer convert` on it with a target in .npz"),
        ("w.msgpack.gz", "an archive", "save a name in .msgpack, and pack that file"),
        ("w.zip", "an archive", "pack that file"),
        ("w.pickle", "a pickle of any objects", "the reference's pickle layout is .pkl"),
        ("w.json", "a text", "checkpoints are .msgpack"),
    ],
)
def test_the_ending_of_another_program_is_refused_with_what_to_do(name, promise, instead, trained, tmp_path):
    run = Run.start(trained)
    saves = [
        lambda path: save_state(path, trained),
        lambda path: save_run(path, run),
        lambda path: Checkpointer(tmp_path).save(run, path),
        lambda path: Checkpointer(tmp_path).save(run, path, background=True),
    ]
    for save in saves:
        with pytest.raises(ArgumentError) as raised:
            save(tmp_path / "below" / name)
        assert promise in str(raised.value)
        assert instead in str(raised.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["state", "state.v2", "state.best", "state.0-loss"])
def test_an_ending_that_promises_nothing_is_our_format(name, trained, tmp_path):
    save_state(tmp_path / name, trained)
    assert (tmp_path / name).read_bytes().startswith(MAGIC)
    assert_same_bits(load_state(tmp_path / name, like=fresh()), trained)


@pytest.mark.parametrize(("name", "start"), [("a.PKL", b"\x80\x04"), ("a.MsgPack", MAGIC)])
def test_the_case_of_an_ending_does_not_matter(name, start, trained, tmp_path):
    save_state(tmp_path / name, trained)
    assert (tmp_path / name).read_bytes().startswith(start)


def test_safetensors_hold_every_variable_of_the_model(trained, tmp_path):
    with pytest.warns(UserWarning, match=SAYS_WHAT):
        save_state(tmp_path / "w.safetensors", trained)
    arrays = safetensors.numpy.load_file(tmp_path / "w.safetensors")
    np.testing.assert_array_equal(arrays["inner.kernel"], trained.params["inner"]["kernel"])
    np.testing.assert_array_equal(arrays["norm.mean"], trained.model_state["norm"]["mean"])
    assert len(arrays) == len(jax.tree.leaves(weights_of(trained)))
    with safetensors.safe_open(tmp_path / "w.safetensors", framework="numpy") as file:
        assert file.metadata()["step"] == "1"


@pytest.mark.parametrize("name", ["w.safetensors", "w.npz", "s.any-name", "n.any-name"])
def test_weights_are_loaded_and_the_rest_is_said(name, trained, tmp_path):
    save_state(tmp_path / "s.msgpack", trained)
    kind = "w.npz" if name[0] == "n" or name.endswith("npz") else "w.safetensors"
    assert convert(tmp_path / "s.msgpack", tmp_path / kind) == ["opt_state", "rng", "step", "extensions"]
    (tmp_path / kind).rename(tmp_path / name)
    other = fresh()
    with pytest.warns(UserWarning, match=SAYS_REST):
        loaded = load_state(tmp_path / name, like=other)
    assert_same_bits(weights_of(loaded), weights_of(trained))
    assert_same_bits(loaded.replace(params={}, model_state={}), other.replace(params={}, model_state={}))
    with pytest.warns(UserWarning, match=SAYS_REST):
        run = load_run(tmp_path / name, Run.start(other))
    assert_same_bits(weights_of(run.state), weights_of(trained))
    # Who asks for weights is told nothing; who asks for more, that it is not there.
    assert_same_bits(load_state(tmp_path / name, like=other, only=["params"]).params, trained.params)
    with pytest.raises(CheckpointError, match="step: not in the file"):
        load_state(tmp_path / name, like=other, only=["step"])


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_weights_of_another_program_find_their_places(kind, trained, tmp_path):
    flat = {}
    for tree in weights_of(trained):
        for keys, leaf in jax.tree.leaves_with_path(tree):
            name = jax.tree_util.keystr(keys, simple=True, separator=".")
            is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            flat[name] = np.asarray(jax.random.key_data(leaf) if is_key else leaf, order="C")
    if kind == "npz":
        np.savez(tmp_path / "w.npz", **flat)
    else:
        safetensors.numpy.save_file(flat, tmp_path / "w.safetensors")
    with pytest.warns(UserWarning, match=SAYS_REST):
        loaded = load_state(tmp_path / f"w.{kind}", like=fresh())
    assert_same_bits(weights_of(loaded), weights_of(trained))


def test_weights_that_do_not_fit_are_named(trained, tmp_path):
    np.savez(tmp_path / "w.npz", **{"params/inner/kernel": np.zeros((2, 2), np.float32)})
    with (
        pytest.warns(UserWarning, match=SAYS_REST),
        pytest.raises(
            CheckpointError, match=r"inner/kernel: \(2, 2\) float32 in the file, .*norm/mean: not in the file"
        ),
    ):
        load_state(tmp_path / "w.npz", like=fresh())


def test_npz_refuses_what_numpy_would_read_as_raw_bytes(tmp_path):
    save_state(tmp_path / "s.msgpack", fresh().replace(params={"w": jnp.ones(2, "bfloat16")}))
    with pytest.raises(
        CheckpointError, match=r"`params/w` has dtype bfloat16, which .npz lacks; write `w.safetensors`"
    ):
        convert(tmp_path / "s.msgpack", tmp_path / "w.npz")
    assert not (tmp_path / "w.npz").exists()


def test_scalars_keep_their_shape(tmp_path):
    state = fresh().replace(params={"scale": jnp.float32(2)})
    with pytest.warns(UserWarning, match="nothing to continue"):
        save_state(tmp_path / "w.safetensors", state)
    assert safetensors.numpy.load_file(tmp_path / "w.safetensors")["scale"].shape == ()


def test_a_missing_extra_is_said_and_npz_needs_none(trained, tmp_path, monkeypatch):
    save_state(tmp_path / "s.msgpack", trained)
    with pytest.warns(UserWarning, match=SAYS_WHAT):
        save_state(tmp_path / "w.safetensors", trained)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    for use in (
        lambda: save_state(tmp_path / "x.safetensors", trained),
        lambda: load_state(tmp_path / "w.safetensors", like=fresh()),
        lambda: convert(tmp_path / "s.msgpack", tmp_path / "x.safetensors"),
    ):
        with pytest.raises(ArgumentError, match=r"need the package safetensors; run `pip install safetensors`"):
            use()
    assert not (tmp_path / "x.safetensors").exists()
    convert(tmp_path / "s.msgpack", tmp_path / "w.npz")
    with np.load(tmp_path / "w.npz") as arrays:
        np.testing.assert_array_equal(arrays["params/inner/kernel"], trained.params["inner"]["kernel"])


def test_objects_in_an_npz_are_not_unpickled(tmp_path):
    np.savez(tmp_path / "w.npz", a=np.array([{}], dtype=object), allow_pickle=True)
    with pytest.raises(CheckpointError, match=r"could not be read: Object arrays cannot be loaded"):
        load_state(tmp_path / "w.npz", like=fresh())
    with zipfile.ZipFile(tmp_path / "z.any", "w") as archive:
        archive.writestr("data.pkl", "a file of PyTorch, say")
    with pytest.raises(CheckpointError, match=r"is an archive of other things than arrays: `data.pkl` is none"):
        load_state(tmp_path / "z.any", like=fresh())
