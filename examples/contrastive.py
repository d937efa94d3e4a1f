"""Learning without labels: find the lower half of a real handwritten digit that belongs to an upper half.

The loss (InfoNCE, van den Oord et al. 2018; in both directions, as in CLIP) compares each example with the whole batch,
so it needs the examples of all devices. On a mesh, the program of a `Trainer` is that of one device and has them all.
In a custom loop, here under ``shard_map``, a device gathers them over the mapped axis. Both give the same loss.
Run it with ``python examples/contrastive.py``, on eight CPU devices with
``XLA_FLAGS=--xla_force_host_platform_device_count=8``.
"""

import functools
import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

from trainer import OptimizerConfig, Trainer, TrainingConfig, TrainState, make_eval_step, make_mesh, make_train_step

TEMPERATURE = 0.1


class Halves(nnx.Module):
    """An encoder for each half, to vectors of length one."""

    def __init__(self, rngs):
        self.upper, self.lower = (
            nnx.Sequential(nnx.Linear(32, 128, rngs=rngs), nnx.relu, nnx.Linear(128, 32, rngs=rngs)) for _ in range(2)
        )

    def __call__(self, image):
        halves = self.upper(image[:, :32]), self.lower(image[:, 32:])
        return tuple(half / jnp.linalg.norm(half, axis=-1, keepdims=True) for half in halves)


def info_nce(model, batch, rng, step, axis_name=None):
    """The cross entropy of finding the matching half among those of all devices."""
    upper, lower = model(batch["image"])
    own, everyone = jnp.arange(len(upper)), (upper, lower)
    if axis_name is not None:
        everyone = jax.lax.all_gather(everyone, axis_name, tiled=True)
        own += jax.lax.axis_index(axis_name) * len(upper)
    scores = upper @ everyone[1].T / TEMPERATURE, lower @ everyone[0].T / TEMPERATURE
    losses = [optax.softmax_cross_entropy_with_integer_labels(score, own).mean() for score in scores]
    return sum(losses) / 2, {"found": jnp.mean(scores[0].argmax(-1) == own)}


def data():
    """The digits without their labels, for training and for the test."""
    image = (load_digits().data / 16).astype(np.float32)
    order = np.random.default_rng(0).permutation(len(image))
    return {"image": image[order[384:]]}, {"image": image[order[:384]]}


def step_of_each_device(optimizer):
    """The pure step as one program for each device, which gathers the encoded halves of the others."""
    step = make_train_step(functools.partial(info_nce, axis_name="data"), optimizer, axis_name="data")
    specs = {"in_specs": (P(), P("data")), "out_specs": P()}
    return jax.jit(jax.shard_map(step, mesh=make_mesh({"data": -1}), **specs))


def loss_of_each_way(batch):
    """The loss of one step as one program over sharded arrays, and as one for each device."""
    optimizer = optax.sgd(0.0)
    state = TrainState.create(Halves(nnx.Rngs(0)), optimizer, rng=jax.random.key(0))
    steps = jax.jit(make_train_step(info_nce, optimizer)), step_of_each_device(optimizer)
    return tuple(float(step(state, batch)[1]["loss"]) for step in steps)


def trained_by_hand(training, epochs):
    """The state after some epochs in the pure core. Rows that do not fill a batch are left out."""
    optimizer = optax.adamw(2e-3)
    state, step = (
        TrainState.create(Halves(nnx.Rngs(0)), optimizer, rng=jax.random.key(0)),
        step_of_each_device(optimizer),
    )
    draws = np.random.default_rng(0)
    for _ in range(epochs):
        order = draws.permutation(len(training["image"]))
        for start in range(0, len(order) - 127, 128):
            state, metrics = step(state, {"image": training["image"][order[start : start + 128]]})
            jax.block_until_ready(metrics)  # CPU devices share threads, so gathers of two calls may wait for each other
    return state


def main(workdir, epochs=60):
    """Returns how often each loop finds the right half among 384, and the loss of a batch computed in both ways."""
    training, test = data()
    config = TrainingConfig(optimizer=OptimizerConfig(optimizer_type="adamw", learning_rate=2e-3))
    trainer = Trainer(Halves(nnx.Rngs(0)), config, loss_fn=info_nce, mesh=make_mesh({"data": -1}), workdir=workdir)
    before = trainer.evaluate(test, 384)["found"]
    trainer.train(training, epochs, 128)
    by_hand = make_eval_step(info_nce)(trained_by_hand(training, epochs), test)["found"]
    one, other = loss_of_each_way({"image": training["image"][:128]})
    return {
        "found before": before,
        "found": trainer.evaluate(test, 384)["found"],
        "found, pure core": float(by_hand),
        "loss by jit": one,
        "loss by shard_map": other,
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        print(main(directory))
