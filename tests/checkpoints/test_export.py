"""From every format to every other, and back to the same bits."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import safetensors.numpy

from tests.problems import Busy, Counting, regression, squared_error
from tests.test_api import assert_same_bits
from trainer import ArgumentError, CheckpointError, TrainState, load_state, make_train_step, save_state
from trainer.checkpoints import export as conversion
from trainer.checkpoints.export import convert
from trainer.checkpoints.file_format import Leaf
from trainer.checkpoints.state_io import load_with_progress
from trainer.commands.main import main

# Empty states, masks and counters at places that a path alone would not tell.
OPTIMIZER = optax.chain(
    optax.clip_by_global_norm(1.0),
    optax.inject_hyperparams(optax.adamw)(learning_rate=1e-2, weight_decay=1e-3),
    optax.masked(optax.trace(0.9), lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)),
)


def fresh(key=5):
    return TrainState.create(Busy(), OPTIMIZER, rng=jax.random.key(key), extensions={"size": Counting()})


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    step = jax.jit(make_train_step(squared_error, OPTIMIZER, extensions={"size": Counting()}))
    state, _ = step(fresh(0), regression(16))
    path = tmp_path_factory.mktemp("made") / "a.msgpack"
    save_state(path, state, {"note": "ä"}, progress={"epoch": 2})
    return path, state


@pytest.mark.parametrize("through", ["b.msgpack", "b.orbax"])
@pytest.mark.parametrize("to", ["c.msgpack", "c"])
def test_there_and_further(through, to, trained, tmp_path):
    path, state = trained
    convert(path, tmp_path / "x" / through)
    convert(tmp_path / "x" / through, tmp_path / to)
    assert_same_bits(load_state(tmp_path / to, like=fresh()), state)
    assert load_with_progress(tmp_path / to, fresh()).progress == {"epoch": 2}


def test_parameters_for_others(trained, tmp_path):
    path, state = trained
    convert(path, tmp_path / "p.safetensors")
    arrays = safetensors.numpy.load_file(tmp_path / "p.safetensors")
    params = {f"{a}.{b}" for a in ("inner", "outer") for b in ("kernel", "bias")} | {"norm.scale", "norm.bias"}
    assert set(arrays) >= params | {"norm.mean", "norm.var"}
    np.testing.assert_array_equal(arrays["inner.kernel"], state.params["inner"]["kernel"])
    convert(tmp_path / "p.safetensors", tmp_path / "back.msgpack")
    other = fresh()
    assert_same_bits(
        load_state(tmp_path / "back.msgpack", like=other, only=["params"]), other.replace(params=state.params)
    )


def test_a_file_of_somebody_else(trained, tmp_path):
    arrays = {"inner.kernel": np.ones((4, 8), np.float32), "layers.0.w": np.zeros(3, np.float16)}
    safetensors.numpy.save_file(arrays, tmp_path / "p.safetensors")
    convert(tmp_path / "p.safetensors", tmp_path / "p.msgpack")
    with pytest.warns(UserWarning, match=r"params/layers/0/w: \(3,\) float16 in the file, nothing here"):
        warm = load_state(tmp_path / "p.msgpack", like=fresh(), strict=False, only=["params"])
    assert (warm.params["inner"]["kernel"] == 1).all()


@pytest.mark.parametrize(
    ("dtype", "travels"), [("bfloat16", True), ("bool", True), ("int4", False), ("complex64", True)]
)
def test_dtypes_travel_or_are_refused(dtype, travels, tmp_path):
    state = fresh().replace(params={"w": jnp.ones((3, 2), dtype)})
    save_state(tmp_path / "a.msgpack", state)
    convert(tmp_path / "a.msgpack", tmp_path / "b")
    convert(tmp_path / "b", tmp_path / "c.msgpack")
    assert_same_bits(load_state(tmp_path / "c.msgpack", like=state.copy()), state)
    if not travels:
        with pytest.raises(CheckpointError, match=r"d.safetensors` could not be written, safetensors says"):
            convert(tmp_path / "a.msgpack", tmp_path / "d.safetensors")
        return
    convert(tmp_path / "a.msgpack", tmp_path / "d.safetensors")
    convert(tmp_path / "d.safetensors", tmp_path / "e.msgpack")
    assert_same_bits(load_state(tmp_path / "e.msgpack", like=state.copy(), only=["params"]).params, state.params)


def test_non_contiguous_arrays_are_made_contiguous(trained, tmp_path):
    """The library itself writes the bytes as they lie."""
    transposed = np.arange(6, dtype=np.float32).reshape(2, 3).T
    leaf = Leaf(("params", "w"), "float32", (3, 2))

    class Transposed:
        path, info, leaves = tmp_path, {}, {leaf.path: leaf}

        def read(self, wanted):
            return {leaf.path: transposed}

    conversion._write_safetensors(tmp_path / "t.safetensors", Transposed())
    np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / "t.safetensors")["w"], transposed)


@pytest.mark.slow
def test_64_bits_survive_without_x64(tmp_path):
    with jax.enable_x64(True):
        state = fresh().replace(model_state={"f": jnp.arange(3.0) / 3, "i": jnp.asarray(2**40)})
        save_state(tmp_path / "a.msgpack", state)
    for one, other in (("a.msgpack", "b"), ("b", "c.msgpack")):
        convert(tmp_path / one, tmp_path / other)
    with jax.enable_x64(True):
        for name in ("b", "c.msgpack"):
            assert_same_bits(load_state(tmp_path / name, like=state.copy()), state)


class TestRefusals:
    def test_a_pickle_is_not_read_without_a_model(self, trained, tmp_path):
        save_state(tmp_path / "a.pkl", trained[1])
        with pytest.raises(ArgumentError, match=r"a.pkl` is a pickle, .* without the model; call `save_state\(\"x.msg"):
            convert(tmp_path / "a.pkl", tmp_path / "b.msgpack")
        assert not (tmp_path / "b.msgpack").exists()

    def test_a_pickle_is_not_written_without_a_model(self, trained, tmp_path):
        with pytest.raises(ArgumentError, match=r"b.pkl` is a pickle, .* call `save_state\(\"b.pkl\", state\)`"):
            convert(trained[0], tmp_path / "b.pkl")
        assert not (tmp_path / "b.pkl").exists()

    def test_an_unknown_ending(self, trained, tmp_path):
        with pytest.raises(ArgumentError, match=r"ends in '.ckpt'; known: .msgpack, .safetensors, .npz, .orbax, and"):
            convert(trained[0], tmp_path / "a.ckpt")

    def test_a_directory_is_not_replaced(self, trained, tmp_path):
        with pytest.raises(CheckpointError, match="exists already; a directory is not replaced"):
            convert(trained[0], tmp_path)

    def test_damage_is_found(self, trained, tmp_path):
        damaged = bytearray(trained[0].read_bytes())
        damaged[-200] ^= 1
        (tmp_path / "a.msgpack").write_bytes(damaged)
        for target in ("b.msgpack", "b", "b.safetensors"):
            with pytest.raises(CheckpointError, match="is damaged"):
                convert(tmp_path / "a.msgpack", tmp_path / target)
            assert not (tmp_path / target).exists()

    def test_no_safetensors_file(self, tmp_path):
        (tmp_path / "p.safetensors").write_bytes(b"nothing")
        with pytest.raises(CheckpointError, match=r"p.safetensors` could not be read"):
            convert(tmp_path / "p.safetensors", tmp_path / "p.msgpack")


def test_the_command(trained, tmp_path, capsys):
    assert main(["convert", str(trained[0]), str(tmp_path / "b")]) == 0
    assert_same_bits(load_state(tmp_path / "b", like=fresh()), trained[1])
    assert main(["convert", str(trained[0]), str(tmp_path / "a.pkl")]) == 1
    assert "save_state(" in capsys.readouterr().err
    save_state(tmp_path / "a.pkl", trained[1])
    for path in (tmp_path / "a.pkl", tmp_path / "b"):
        assert main(["inspect", str(path)]) == 0
        assert "kernel  (4, 8) float32  128 B" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "b"), "--verify"]) == 0
    assert "every checksum agrees" in capsys.readouterr().out
    assert main(["inspect", str(tmp_path / "a.pkl"), "--verify"]) == 1
    assert "is a pickle, which has no checksums" in capsys.readouterr().err


def test_the_containers_that_the_first_files_describe_are_not_shown(trained, tmp_path, capsys):
    save_state(tmp_path / "old.msgpack", trained[1], {"containers": [[["opt_state"], "tuple", [0, 1]]]})
    convert(tmp_path / "old.msgpack", tmp_path / "old.orbax")
    for name in ("old.msgpack", "old.orbax"):
        assert main(["inspect", str(tmp_path / name)]) == 0
        assert_same_bits(load_state(tmp_path / name, like=fresh()), trained[1])
    assert "containers" not in capsys.readouterr().out
