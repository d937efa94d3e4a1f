"""Models, objectives and data that several tests share."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trainer import Extension, OptimizerConfig, TrainingConfig


class Linear(nnx.Module):
    """y = x·w + b: the optimum of least squares is known in closed form."""

    def __init__(self, features=3, *, rngs=None):
        rngs = nnx.Rngs(0) if rngs is None else rngs
        self.layer = nnx.Linear(features, 1, rngs=rngs)

    def __call__(self, x):
        return self.layer(x)[:, 0]


class Busy(nnx.Module):
    """Has a bit of everything that changes in training: batch statistics, dropout, a counter."""

    def __init__(self, features=4, width=8, *, rngs=None):
        rngs = nnx.Rngs(0) if rngs is None else rngs
        self.inner = nnx.Linear(features, width, rngs=rngs)
        self.norm = nnx.BatchNorm(width, rngs=rngs)
        self.dropout = nnx.Dropout(0.2, rngs=rngs)
        self.outer = nnx.Linear(width, 1, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        return self.outer(self.dropout(jax.nn.relu(self.norm(self.inner(x)))))[:, 0]


def squared_error(model, batch, rng, step):
    del rng, step
    prediction = model(batch["input"])
    error = prediction - batch["target"]
    return jnp.mean(error**2), {"mean_error": jnp.mean(error), "model_outputs": prediction}


class Counting(Extension):
    """Penalizes large outputs, and counts its own evaluations both in a variable and in Python."""

    def __init__(self, config=None, *, rngs=None):
        super().__init__(config, rngs=rngs)
        self.evaluations = nnx.Variable(jnp.zeros((), jnp.int32))
        self.batches = 0
        self.seen = []

    def loss_fn(self, batch, model_outputs, **kwargs):
        self.evaluations[...] += 1
        return jnp.mean(model_outputs**2)

    def on_batch_end(self, trainer, step, logs):
        self.batches += 1
        self.seen.append(step)


def regression(num_examples=64, features=4, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(num_examples, features)).astype(np.float32)
    y = x @ rng.normal(size=features) + 0.3 + 0.1 * rng.normal(size=num_examples)
    return {"input": x, "target": y.astype(np.float32)}


def config(**changes):
    optimizer = {"optimizer_type": "adam", "learning_rate": 1e-2, **changes.pop("optimizer", {})}
    return TrainingConfig(optimizer=OptimizerConfig(**optimizer), **changes)


class Playing:
    """A stand-in for a trainer that emits the events of a run with the scores that it is given."""

    def play(self, callback, scores, *, first=1):
        callback.on_train_begin(self)
        for epoch, score in enumerate(scores):
            callback.on_epoch_begin(self, epoch)
            self.step = first + epoch
            callback.on_validation_end(self, {"loss": score})
            callback.on_epoch_end(self, epoch, {"loss": 0.0, "val_loss": score})
        callback.on_train_end(self)
