"""What a person does first with the installed package: trains, saves, resumes, asks the commands.

Runs in an empty directory, with nothing but the package and what pip installed for it.
"""

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import trainer
from trainer import InMemoryData, OptimizerConfig, Trainer, TrainingConfig

assert "site-packages" in trainer.__file__, trainer.__file__
installed = {distribution.name.lower() for distribution in importlib.metadata.distributions()}
assert not installed & {"tensorflow", "tensorflow-datasets"}, "TensorFlow was installed"
assert ("datarax" in installed) == ("--datarax" in sys.argv)


def loss_fn(model, batch, rng, step):
    """Least squares."""
    del rng, step
    return jnp.mean((model(batch["x"])[:, 0] - batch["y"]) ** 2), {}


def make(directory):
    """Returns a trainer with a directory of its own."""
    config = TrainingConfig(optimizer=OptimizerConfig(optimizer_type="adam", learning_rate=0.03))
    return Trainer(nnx.Linear(4, 1, rngs=nnx.Rngs(0)), config, loss_fn=loss_fn, workdir=directory, progress=False)


x = np.random.default_rng(0).normal(size=(1000, 4)).astype(np.float32)
data = {"x": x, "y": x @ np.arange(4, dtype=np.float32)}

whole = make("whole")
first = float(whole.evaluate(data, 128)["loss"])
result = whole.train(data, 10, 128)
assert result["loss"] < first / 2, (first, result)

make("halves").train(data, 4, 128)
resumed = make("halves")
resumed.train(data, 10, 128, resume=True)
assert resumed.step == whole.step == 80
for one, other in zip(jax.tree.leaves(resumed.state.params), jax.tree.leaves(whole.state.params), strict=True):
    np.testing.assert_array_equal(one, other)

held = InMemoryData(data, 128)
if "--datarax" in sys.argv:
    assert type(held.source).__name__ == "MemorySource"
    assert not {name.split(".")[0] for name in sys.modules} & {"tensorflow", "tensorflow_datasets"}
else:
    message = ""
    try:
        held.source  # noqa: B018
    except ImportError as error:
        message = str(error)
    assert "nnx-trainer[datarax]" in message, message


def ask(*arguments):
    """Returns what a command of the package prints."""
    command = [str(Path(sys.executable).with_name("trainer")), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


version = importlib.metadata.version("nnx-trainer")
assert version in ask("--version")
assert "80" in ask("inspect", "halves")
print(f"nnx-trainer {version} on Python {sys.version.split()[0]}, jax {jax.__version__}: ok")
