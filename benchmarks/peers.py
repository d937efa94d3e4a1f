"""Equinox, Keras and the reference implementation, in one process with a loop by hand and with this library.

They are installed into a separate virtual environment, ``.bench/peers``, which also sees the packages of the current
one, so that all contenders use the same JAX. Nothing in the project depends on them.
Run it with ``python benchmarks/peers.py``; the first run needs a package index.

The reference runs each step uncompiled, so it gets only a few steps of an epoch. No contender saves checkpoints here.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx

import by_hand
import dispatch
import end_to_end
import workloads
from timing import Report, compared, in_turns, per

PINS = (
    "equinox==0.13.8",
    "keras==3.15.1",
    *("h5py==3.16.0", "namex==0.1.0", "optree==0.20.0"),  # for Keras
    "avitai-artifex==0.1.3",
    *("calibrax==0.1.1", "dacite==1.9.2"),  # for artifex, whose trainer needs no other dependencies
)
DIRECTORY = Path(__file__).resolve().parent.parent / ".bench" / "peers"


def make_environment():
    """Returns the interpreter of the environment, which is created if missing or of other pins."""
    python = DIRECTORY / "bin" / "python"
    ready = DIRECTORY / "pins.txt"
    if not ready.exists() or ready.read_text(encoding="utf-8").split() != list(PINS):
        venv.create(DIRECTORY, clear=True, with_pip=True)
        install = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check", "--no-deps", *PINS]
        subprocess.run(install, check=True)
        own = subprocess.run(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
            check=True,
            capture_output=True,
            text=True,
        )
        outer = sysconfig.get_path("purelib")
        Path(own.stdout.strip(), "outer.pth").write_text(f"import site; site.addsitedir({outer!r})\n", encoding="utf-8")
        ready.write_text("\n".join(PINS), encoding="utf-8")
    return python


def equinox_filter_jit(workload):
    """The step of Equinox's own guides, with everything but the batch donated."""
    import equinox as eqx

    layers = len(workload.make_model().layers)
    model = eqx.nn.MLP(32, 32, 32, layers - 1, key=jax.random.key(0))
    optimizer = workload.optimizer()

    def mean_squared_error(model, batch):
        return jnp.mean((jax.vmap(model)(batch["input"]) - batch["target"]) ** 2)

    @eqx.filter_jit(donate="all-except-first")
    def step(batch, model, opt_state):
        loss, grads = eqx.filter_value_and_grad(mean_squared_error)(model, batch)
        updates, opt_state = optimizer.update(grads, opt_state, eqx.filter(model, eqx.is_inexact_array))
        return (eqx.apply_updates(model, updates), opt_state), loss

    state = model, optimizer.init(eqx.filter(model, eqx.is_inexact_array))
    return dispatch.stepping(lambda state, batch: step(batch, *state), state)


def keras_model(workload):
    """The architecture of a workload in Keras."""
    import keras
    from keras import layers

    class Position(layers.Layer):
        def build(self, shape):
            self.table = self.add_weight(shape=shape[1:], initializer="random_normal")

        def call(self, x):
            return x + self.table

    if workload.name == "dispatch-bound MLP":
        return keras.Sequential([layers.Input((32,)), *(layers.Dense(32, "relu") for _ in range(3)), layers.Dense(32)])
    if workload.name == "MLP 784-128-10":
        return keras.Sequential([layers.Input((784,)), layers.Dense(128, "relu"), layers.Dense(10)])
    if workload.name == "convolutional net":
        convolutions = [
            layer
            for features in (16, 32)
            for layer in (layers.Conv2D(features, 3, padding="same", activation="relu"), layers.MaxPool2D())
        ]
        return keras.Sequential([layers.Input((28, 28, 1)), *convolutions, layers.Flatten(), layers.Dense(10)])
    ours = workload.make_model()
    context, width = ours.position.embedding.shape
    heads = ours.blocks[0].attention.num_heads
    tokens = layers.Input((context,), dtype="int32")
    x = Position()(layers.Embedding(workloads.VOCABULARY, width)(tokens))
    for _ in ours.blocks:
        y = layers.LayerNormalization()(x)
        x = x + layers.MultiHeadAttention(heads, width // heads)(y, y, use_causal_mask=True)
        y = layers.Dense(4 * width, "gelu")(layers.LayerNormalization()(x))
        x = x + layers.Dense(width)(y)
    return keras.Model(tokens, layers.Dense(workloads.VOCABULARY)(layers.LayerNormalization()(x)))


def keras_fit(workload, steps_per_execution):
    """Returns a function that trains for a number of epochs."""
    import keras

    model = keras_model(workload)
    ours = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(workload.make_model(), nnx.Param)))
    if model.count_params() != ours:
        raise RuntimeError(f"{workload.name} has {model.count_params()} parameters in Keras, and {ours} here")
    classes = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(
        keras.optimizers.Adam(workloads.LEARNING_RATE),
        "mse" if workload.loss_fn is workloads.squared_error else classes,
        steps_per_execution=steps_per_execution,
    )
    data, size = workload.data, workload.batch_size
    return lambda epochs: model.fit(data["input"], data["target"], size, epochs, verbose=0)


class Timed:
    """Ends a run of the reference after some steps; the first ones are not counted."""

    def __init__(self, steps, uncounted=2):
        self.first, self.last = uncounted, uncounted + steps
        self.count = 0

    def __getattr__(self, event):
        return lambda *args: None

    def on_batch_end(self, trainer, step, logs):
        self.count += 1
        if self.count == self.first:
            self.start = time.perf_counter()
        if self.count == self.last:
            self.seconds = (time.perf_counter() - self.start) / (self.last - self.first)
            raise StopIteration


def reference(workload, steps, directory):
    """Returns a contender that takes some steps of an epoch and times them, including making the batches."""
    from artifex.generative_models.core.configuration import OptimizerConfig, TrainingConfig
    from artifex.generative_models.training.trainer import Trainer

    optimizer = OptimizerConfig(name="adam", optimizer_type="adam", learning_rate=workloads.LEARNING_RATE)
    config = TrainingConfig(name="reference", optimizer=optimizer)
    trainer = Trainer(
        workload.make_model(), config, loss_fn=workload.loss_fn, save_interval=10**9, workdir=str(directory)
    )

    def run():
        trainer.callbacks = timed = Timed(steps)
        try:
            trainer.train(workload.data, 1, workload.batch_size)
        except StopIteration:
            return timed.seconds
        raise RuntimeError(f"an epoch of the reference has no {timed.last} steps")

    return run


def contenders(workload, epochs, reference_steps, directory):
    trainer = workload.trainer(workdir=directory / "ours", save_interval=10**9)
    runs = {
        "by hand, a loop": by_hand.loop(workload),
        "Trainer.train": lambda epochs: trainer.train(workload.data, epochs, workload.batch_size),
        "Keras fit": keras_fit(workload, 1),
        "Keras fit, steps_per_execution=32": keras_fit(workload, 32),
    }
    made = {name: per(epochs * workload.steps, lambda run=run: run(epochs)) for name, run in runs.items()}
    return {**made, "reference, uncompiled": reference(workload, reference_steps, directory / "reference")}


DISPATCH = {
    "by hand": (dispatch.plain, 1),
    "Trainer.train_step": (dispatch.facade(), 1),
    "Equinox filter_jit": (equinox_filter_jit, 1),
}


def main():
    report = Report(__doc__, repeats=5)  # here, so that a wrong command line creates no environment
    if Path(sys.prefix).resolve() != DIRECTORY.resolve():
        surroundings = {**os.environ, "KERAS_BACKEND": "jax"}
        sys.exit(subprocess.run([make_environment(), __file__, *sys.argv[1:]], env=surroundings).returncode)
    dispatch.run(report, DISPATCH, dispatch.small(report))
    for workload, epochs in end_to_end.workloads_of(report):
        with tempfile.TemporaryDirectory() as directory:
            runs = contenders(workload, epochs, 2 if report.quick else 10, Path(directory))
            times = in_turns(runs, report.repeats)
        baselines = {"x loop": "by hand, a loop", "x Trainer.train": "Trainer.train"}
        report.table(end_to_end.title(workload, epochs), compared(times, "µs a step", 1e6, baselines))
    report.close()


if __name__ == "__main__":
    main()
