"""Reinforcement learning from a replay buffer: a contextual bandit on real handwritten digits.

The agent sees an image, names a digit, and learns only whether it was right. Images, actions and rewards go into a
buffer, which is part of the training state: saved, resumed, donated and moved to devices with it. Each step acts on a
batch, and learns the values of actions from a sample of the buffer (one-step Q-learning). It runs in the pure core, and
as the ``step_fn`` of a `Trainer`. Run it with ``python examples/bandit.py``.
"""

import tempfile

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

from trainer import OptimizerConfig, Trainer, TrainingConfig, TrainState, make_train_step

CAPACITY, DRAWN, EXPLORED = 8192, 256, 0.1
OPTIMIZER = optax.adam(1e-3)


class Values(nnx.Module):
    """The value of each action."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(64, 128, rngs=rngs)
        self.out = nnx.Linear(128, 10, rngs=rngs)

    def __call__(self, image):
        return self.out(nnx.relu(self.hidden(image)))


def td_error(model, batch, rng, step):
    """The squared error of the value of the chosen action. No state follows, so the target is the reward."""
    value = jnp.take_along_axis(model(batch["image"]), batch["action"][:, None], axis=1)[:, 0]
    return jnp.mean((value - batch["reward"]) ** 2), {}


learn = make_train_step(td_error, OPTIMIZER)


def accuracy(model, batch, rng, step):
    """How often the action with the highest value is right."""
    right = jnp.mean(model(batch["image"]).argmax(-1) == batch["label"])
    return 1 - right, {"accuracy": right}


def initial_state(rngs, rng):
    """A state with an empty buffer."""
    rows = {"image": jnp.zeros((CAPACITY, 64)), "action": jnp.zeros(CAPACITY, jnp.int32), "reward": jnp.zeros(CAPACITY)}
    state = TrainState.create(Values(rngs), OPTIMIZER, rng=rng)
    return state.replace(extensions={"buffer": {"rows": rows, "written": jnp.zeros((), jnp.int32)}})


def step_fn(state, batch):
    """Acts on a batch, stores the outcome in the buffer, and learns from a sample of the buffer."""
    exploring, choosing, drawing = jax.random.split(jax.random.fold_in(state.rng, state.step), 3)
    size, buffer = len(batch["label"]), state.extensions["buffer"]
    greedy = state.model()(batch["image"]).argmax(-1)
    at_random = jax.random.randint(choosing, (size,), 0, 10)
    action = jnp.where(jax.random.uniform(exploring, (size,)) < EXPLORED, at_random, greedy)
    reward = (action == batch["label"]).astype(jnp.float32)  # the label belongs to the environment, and is not stored

    where = (buffer["written"] + jnp.arange(size)) % CAPACITY
    seen = {"image": batch["image"], "action": action, "reward": reward}
    rows = jax.tree.map(lambda kept, new: kept.at[where].set(new), buffer["rows"], seen)
    written = buffer["written"] + size
    index = jax.random.randint(drawing, (DRAWN,), 0, jnp.minimum(written, CAPACITY))
    drawn = jax.tree.map(lambda kept: kept[index], rows)

    state = state.replace(extensions={"buffer": {"rows": rows, "written": written}})
    state, metrics = learn(state, drawn)
    return state, {**metrics, "reward": reward.mean()}


def data():
    """The digits to act on, and those for the test."""
    digits = load_digits()
    image, label = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    order = np.random.default_rng(0).permutation(len(label))
    return tuple({"image": image[rows], "label": label[rows]} for rows in (order[400:], order[:400]))


def main(workdir, epochs=150):
    """Returns the accuracy on unseen digits, and that of the pure loop after the same number of steps."""
    training, test = data()
    config = TrainingConfig(optimizer=OptimizerConfig(optimizer_type="adam", learning_rate=1e-3))  # has no effect here
    start = initial_state(nnx.Rngs(0), jax.random.key(1))
    trainer = Trainer(start, config, loss_fn=accuracy, step_fn=step_fn, workdir=workdir)
    trainer.train(training, epochs, 64)

    state, step = start.copy(), jax.jit(step_fn, donate_argnums=0)
    draws = np.random.default_rng(0)
    for _ in range(epochs):
        order = draws.permutation(len(training["label"]))
        for begin in range(0, len(order), 64):
            state, _ = step(state, {name: column[order[begin : begin + 64]] for name, column in training.items()})
    pure = jnp.mean(state.model()(test["image"]).argmax(-1) == test["label"])
    return {"accuracy": trainer.evaluate(test, 400)["accuracy"], "accuracy, pure core": float(pure)}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as directory:
        print(main(directory))
