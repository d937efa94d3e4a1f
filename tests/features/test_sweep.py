"""Ensembles and sweeps: one program over seeds and learning rates, and the best of it as a trainer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from sklearn.datasets import load_digits

from trainer import OptimizerConfig, Trainer, TrainingConfig, TrainState, make_train_step

OPTIMIZER = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
MEMBERS = 16


def objective(model, batch, rng, step):
    logits = model(batch["image"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return losses.mean(), {"accuracy": jnp.mean(logits.argmax(-1) == batch["label"])}


def member(key, rate):
    made, draws = jax.random.split(key)
    hidden, out = jax.random.split(made)
    layers = nnx.Linear(64, 32, rngs=nnx.Rngs(hidden)), nnx.relu, nnx.Linear(32, 10, rngs=nnx.Rngs(out))
    return TrainState.create(nnx.Sequential(*layers), OPTIMIZER, rng=draws).with_learning_rate(rate)


def batches(size=128):
    digits = load_digits()
    image, label = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    return [{"image": image[i : i + size], "label": label[i : i + size]} for i in range(0, len(label) - size, size)]


@pytest.mark.slow
def test_a_sweep_is_its_members_trained_one_by_one():
    keys, rates = jax.random.split(jax.random.key(0), MEMBERS), jnp.logspace(-4, -1, MEMBERS)
    step = make_train_step(objective, OPTIMIZER)
    together, alone = jax.jit(jax.vmap(step, in_axes=(0, None))), jax.jit(step)
    members = jax.vmap(member)(keys, rates)
    singles = [member(key, rate) for key, rate in zip(keys, rates, strict=True)]
    for batch in batches():
        members, metrics = together(members, batch)
        results = [alone(state, batch) for state in singles]
        singles = [state for state, _ in results]
    losses = np.array([found["loss"] for _, found in results])
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-3)
    for index, state in enumerate(singles):
        for one, other in zip(jax.tree.leaves(state.params), jax.tree.leaves(members.params), strict=True):
            np.testing.assert_allclose(other[index], one, rtol=1e-2, atol=1e-4)
    assert np.argmin(metrics["loss"]) == np.argmin(losses)


@pytest.mark.slow
def test_the_best_member_becomes_a_trainer(tmp_path):
    keys, rates = jax.random.split(jax.random.key(0), 4), jnp.logspace(-4, -1, 4)
    members = jax.vmap(member)(keys, rates)
    step = jax.jit(jax.vmap(make_train_step(objective, OPTIMIZER), in_axes=(0, None)))
    for batch in batches():
        members, metrics = step(members, batch)
    best = int(jnp.argmin(metrics["loss"]))
    config = TrainingConfig(optimizer=OptimizerConfig(optimizer_type="adam", learning_rate=1e-3))
    state = jax.tree.map(lambda leaf: leaf[best], members)
    trainer = Trainer(state, config, OPTIMIZER, loss_fn=objective, workdir=tmp_path, report=["learning_rate"])
    assert trainer.step == len(batches())
    everything = {name: np.concatenate([batch[name] for batch in batches()]) for name in ("image", "label")}
    before = trainer.evaluate(everything, 256)
    averages = trainer.train(everything, 3, 128)
    assert averages["learning_rate"] == pytest.approx(float(rates[best]))
    assert averages["loss"] < before["loss"]
