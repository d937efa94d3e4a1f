"""What other programs get: weights by name, in a plain model as well, and a directory of Orbax."""

import subprocess
import sys

import chex
import jax
import jax.export
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from tests.problems import Busy, Linear, config, regression, squared_error
from trainer import (
    ArgumentError,
    ArgumentTypeError,
    CheckpointError,
    Trainer,
    TrainState,
    load_state,
    load_weights,
    save_state,
)

DATA = regression(20)


def trained(make=Busy, **arguments):
    trainer = Trainer(make(), config(), loss_fn=squared_error, **arguments)
    trainer.train(DATA, num_epochs=2, batch_size=8)
    return trainer


def test_exporting_says_what_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(
        ArgumentError, match=r"needs the package flatbuffers; run `pip install 'nnx-trainer\[export\]'`"
    ):
        trained().export_prediction(tmp_path / "model", {"input": DATA["input"]})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".safetensors", ".npz", ".msgpack", ".orbax"])
@pytest.mark.few(1)
def test_all_variables_come_back_in_a_plain_model_and_in_a_new_trainer(suffix, tmp_path):
    from trainer.checkpoints.export import convert

    trainer = trained()
    path = tmp_path / f"weights{suffix}"
    convert(save_state(tmp_path / "state.msgpack", trainer.state), path)
    other = Busy(rngs=nnx.Rngs(7))
    untouched = nnx.state(other)
    loaded = load_weights(path, other)
    chex.assert_trees_all_equal(nnx.state(other), untouched)
    expected = nnx.state(trainer.model)
    chex.assert_trees_all_equal(nnx.to_pure_dict(nnx.state(loaded)), nnx.to_pure_dict(expected))
    new = Trainer(Busy(rngs=nnx.Rngs(7)), config(), loss_fn=squared_error)
    new.state = load_state(path, new.state, only=("params", "model_state"))
    assert new.evaluate(DATA, 8) == trainer.evaluate(DATA, 8)
    assert new.train(DATA, num_epochs=1, batch_size=8)["loss"] > 0


def test_names_are_the_attributes_of_the_model(tmp_path):
    safetensors = pytest.importorskip("safetensors.numpy")
    state = TrainState.create(Busy(), optax.adam(0.1), rng=jax.random.key(0))
    with pytest.warns(UserWarning, match="nothing to continue a run with"):
        path = save_state(tmp_path / "weights.safetensors", state)
    names = {
        ".".join(map(str, keys)) for keys, _ in nnx.to_flat_state(nnx.state(Busy())) if "rngs" not in map(str, keys)
    }
    assert names <= set(safetensors.load_file(path))


def test_what_does_not_fit_a_model_is_named(tmp_path):
    state = TrainState.create(Linear(3), optax.sgd(0.1), rng=jax.random.key(0))
    path = save_state(tmp_path / "weights.msgpack", state)
    with pytest.raises(CheckpointError, match=r"params/layer/kernel: \(3, 1\) float32 in the file, \(4, 1\)"):
        load_weights(path, Linear(4))
    with pytest.warns(UserWarning, match="not loaded: params/layer/kernel"):
        loaded = load_weights(path, Linear(4), strict=False)
    assert loaded.layer.kernel.shape == (4, 1)
    with pytest.raises(ArgumentTypeError, match=r"`model` is .* it must be a flax.nnx.Module instance"):
        load_weights(path, Linear)


PLAIN_ORBAX = """
import sys
import orbax.checkpoint as ocp
tree = ocp.PyTreeCheckpointer().restore(sys.argv[1])
print(float(abs(tree["params"]["layer"]["kernel"]).sum()), "trainer" in sys.modules)
"""


def test_plain_orbax_restores_our_directory(tmp_path):
    state = TrainState.create(Linear(), optax.adam(0.1), rng=jax.random.key(0))
    path = save_state(tmp_path / "checkpoint.orbax", state)
    command = [sys.executable, "-W", "ignore", "-c", PLAIN_ORBAX, path / "state"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    total, imported = done.stdout.split()
    assert float(total) == pytest.approx(float(jnp.abs(state.params["layer"]["kernel"]).sum()))
    assert imported == "False"
