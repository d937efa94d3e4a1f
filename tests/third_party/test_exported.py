"""A prediction that runs without this library. JAX serializes it by flatbuffers, which nothing else needs.

`make third-party` installs the package and runs these.
"""

import subprocess
import sys

import chex
import jax
import jax.export
import numpy as np
import optax
import pytest

from tests.problems import Busy, Linear, config, regression, squared_error
from trainer import (
    ArgumentError,
    BatchError,
    CheckpointError,
    Trainer,
    TrainState,
    ema_of_params,
    export_prediction,
    make_mesh,
    make_predict_step,
)

pytestmark = pytest.mark.third_party

DATA = regression(20)


def trained(make=Busy, **arguments):
    trainer = Trainer(make(4), config(), loss_fn=squared_error, **arguments)
    trainer.train(DATA, num_epochs=2, batch_size=8)
    return trainer


def call(path, batch):
    return jax.export.deserialize(bytearray(path.read_bytes())).call(batch)


ALONE = """
import sys
import jax, jax.export, numpy as np
exported = jax.export.deserialize(bytearray(open(sys.argv[1], "rb").read()))
batch = dict(np.load(sys.argv[2]))
np.save(sys.argv[3], np.concatenate([exported.call({"input": batch["input"][:count]}) for count in (20, 7, 1)]))
print({"trainer", "flax", "optax"} & {name.split(".")[0] for name in sys.modules})
"""


def test_another_process_predicts_with_jax_alone(tmp_path):
    trainer = trained()
    path = trainer.export_prediction(tmp_path / "new" / "model.stablehlo", {"input": DATA["input"][:3]})
    np.savez(tmp_path / "batch.npz", **DATA)
    command = [sys.executable, "-c", ALONE, path, tmp_path / "batch.npz", tmp_path / "outputs.npy"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert done.stdout.strip() == "set()"
    expected = trainer.predict({"input": DATA["input"]}, 20)
    outputs = np.load(tmp_path / "outputs.npy")
    np.testing.assert_allclose(outputs, np.concatenate([expected, expected[:7], expected[:1]]), rtol=1e-5)


def test_what_is_exported_is_what_predicts(tmp_path):
    """The average of the params, in the precision of the trainer, from a mesh."""
    mesh = make_mesh({"data": 4}, devices=jax.devices()[:4])
    options = {"params_average": ema_of_params(0.5), "precision": "bfloat16", "mesh": mesh}
    trainer = trained(Linear, **options)

    def fn(model, batch):
        return {"prediction": model(batch["input"]), "input": batch["input"]}

    path = trainer.export_prediction(tmp_path / "model", {"input": DATA["input"]}, fn, batch_size=20)
    outputs = call(path, {"input": DATA["input"]})
    expected = trainer.predict({"input": DATA["input"]}, 20, fn)
    chex.assert_trees_all_close(outputs, expected, rtol=1e-2)
    assert outputs["prediction"].dtype == expected["prediction"].dtype
    with pytest.raises(ValueError, match="shape"):
        call(path, {"input": DATA["input"][:7]})


def test_platforms_are_those_asked_for(tmp_path):
    state = TrainState.create(Linear(4), optax.sgd(0.1), rng=jax.random.key(0))
    example = jax.ShapeDtypeStruct((1, 4), "float32")
    path = export_prediction(tmp_path / "model", make_predict_step(), state, example, platforms=["cpu", "cuda", "tpu"])
    exported = jax.export.deserialize(bytearray(path.read_bytes()))
    assert exported.platforms == ("cpu", "cuda", "tpu")
    assert exported.in_avals[0].str_short() == "float32[rows,4]"
    np.testing.assert_allclose(exported.call(DATA["input"]), state.model()(DATA["input"]), rtol=1e-5)


def test_what_cannot_be_exported_is_refused_by_name(tmp_path):
    state = TrainState.create(Linear(4), optax.sgd(0.1), rng=jax.random.key(0))
    example = DATA["input"]

    def refused(match, example=example, fn=None, error=ArgumentError, **options):
        with pytest.raises(error, match=match):
            export_prediction(tmp_path / "model", make_predict_step(fn), state, example, **options)
        assert list(tmp_path.iterdir()) == []

    refused("`platforms` names 'gpu'; ", platforms=["gpu"])
    refused("`platforms` is 'cpu'; it must be a list", platforms="cpu")
    refused("`batch_size` is 0; it must be a positive integer", batch_size=0)
    refused("`example` has no common number of rows", example=(np.ones(3), np.ones(4)))
    refused("`example` is None", example=None, error=BatchError)
    refused("`fn` was left out, and a batch of a: .* does not tell", example={"a": example, "b": example})
    needs_rows = lambda model, batch: model(batch) * np.ones(int(batch.shape[0]), np.float32)  # noqa: E731
    refused("pass `batch_size`", fn=needs_rows)
    export_prediction(tmp_path / "fixed", make_predict_step(needs_rows), state, example, batch_size=20)


def test_a_file_that_cannot_be_written_leaves_what_was_there(tmp_path):
    state = TrainState.create(Linear(4), optax.sgd(0.1), rng=jax.random.key(0))
    (tmp_path / "file").write_text("kept")
    with pytest.raises(CheckpointError, match="could not be written"):
        export_prediction(tmp_path / "file" / "model", make_predict_step(), state, DATA["input"])
    assert (tmp_path / "file").read_text() == "kept"
