"""What a step costs beside the loop that you could write by hand.

Run it with ``make bench``. All contenders run in one process, in turns, on the same model and
batch; a row is the median over the turns, and what counts is the ratio to the first column.
"""

import json
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from trainer import OptimizerConfig, Trainer, TrainingConfig, TrainState, make_train_step


class Mlp(nnx.Module):
    def __init__(self, layers, width=32):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(layers)])

    def __call__(self, x):
        for layer in self.layers:
            x = nnx.relu(layer(x))
        return x


def loss_fn(model, batch, rng, step):
    del rng, step
    return jnp.mean((model(batch["input"]) - batch["target"]) ** 2), {}


def loop(step, state):
    """Returns a function that advances a state of its own by a batch."""
    compiled = jax.jit(step, donate_argnums=0)

    def run(batch):
        nonlocal state
        state, metrics = compiled(state, batch)
        return metrics

    return run


def by_hand(model, optimizer):
    """The best step without a library: plain dicts, one compiled function, everything donated."""
    graphdef, variables = nnx.split(model)
    params = jax.tree.map(jnp.copy, nnx.to_pure_dict(variables))
    state = (params, optimizer.init(params), jax.random.key(0), jnp.zeros((), jnp.int32))

    def step(state, batch):
        params, opt_state, rng, count = state
        rng, step_rng = jax.random.split(rng)
        objective = lambda p: loss_fn(nnx.merge(graphdef, p), batch, step_rng, count)  # noqa: E731
        (loss, metrics), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        state = (optax.apply_updates(params, updates), opt_state, rng, count + 1)
        return state, {**metrics, "loss": loss, "step": count + 1}

    return loop(step, state)


def pure_step(model, optimizer):
    state = TrainState.create(model, optimizer, rng=jax.random.key(0))
    return loop(make_train_step(loss_fn, optimizer), state)


def facade(model, optimizer):
    config = TrainingConfig(optimizer=OptimizerConfig(optimizer_type="adam", learning_rate=1e-3), log_frequency=10**9)
    return Trainer(model, config, optimizer, loss_fn=loss_fn, rng=jax.random.key(0)).train_step


def time_of(run, batch, steps):
    start = time.perf_counter()
    for _ in range(steps):
        metrics = run(batch)
    jax.block_until_ready(metrics)
    return (time.perf_counter() - start) / steps * 1e6


def main(turns=9):
    batch = {name: np.ones((8, 32), np.float32) for name in ("input", "target")}
    rows = []
    for layers, steps in ((2, 1000), (50, 200)):
        optimizer = optax.adam(1e-3)
        contenders = {"by hand": by_hand, "pure step": pure_step, "Trainer.train_step": facade}
        runs = {name: make(Mlp(layers), optimizer) for name, make in contenders.items()}
        for run in runs.values():
            time_of(run, batch, 20)
        times = {name: [] for name in runs}
        for _ in range(turns):
            for name, run in runs.items():
                times[name].append(time_of(run, batch, steps))
        arrays = 6 * layers
        for name, measured in times.items():
            ratios = [a / b for a, b in zip(measured, times["by hand"], strict=True)]
            row = {
                "arrays": arrays,
                "what": name,
                "microseconds": statistics.median(measured),
                "ratio": statistics.median(ratios),
            }
            rows.append(row)
            print(f"{arrays:5d} arrays   {name:20s} {row['microseconds']:8.1f} µs a step   {row['ratio']:.2f}x by hand")
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
