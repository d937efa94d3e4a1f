"""The example: a transformer over data, sequence and tensor axes is the same training, by rules alone."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.marks import slow_unless
from trainer import abstract_state, create_sharded, jit_step, make_mesh, make_train_step, plan
from trainer.compile.hlo import collectives
from trainer.sharding import shardings_of

ROOT = Path(__file__).parents[2]


def load_example():
    spec = importlib.util.spec_from_file_location("transformer_example", ROOT / "examples" / "transformer.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


example = load_example()

ADAM = optax.adam(1e-3)
# Not Adam where weights are compared: the bias of a key changes no attention, so that its gradient is zero but for
# rounding, and Adam scales that up.
SGD = optax.sgd(0.1, momentum=0.9)

LAYOUTS = {
    "sequence": {"sequence": 8, "tensor": 1},
    "data x tensor": {"data": 2, "tensor": 4},
    "data x sequence x tensor": {"data": 2, "sequence": 2, "tensor": 2},
    "data x fsdp x sequence": {"data": 2, "fsdp": 2, "sequence": 2, "tensor": 1},
}


def how(axes, devices=None):
    return {"rng": jax.random.key(0), "mesh": make_mesh(axes, devices), "rules": example.RULES, "min_size": 2**12}


def train(axes, devices=None, steps=20):
    state = create_sharded(example.Transformer, SGD, **how(axes, devices))
    split = example.sharding_of_batches(jax.tree.leaves(state)[0].sharding.mesh)
    step = jit_step(make_train_step(example.cross_entropy, SGD), state, split)
    losses = []
    for seed in range(steps):
        state, metrics = step(state, example.sequences(seed, 16))
        losses.append(metrics["loss"])
    return np.array(losses), jax.tree.map(np.asarray, state.params)


def planned(axes, batch_size=32):
    mesh = make_mesh(axes)
    state = abstract_state(example.Transformer, ADAM, **{**how(axes), "mesh": mesh})
    split = example.sharding_of_batches(mesh)
    step = make_train_step(example.cross_entropy, ADAM)
    return state, plan(step, state, example.sequences(0, batch_size), split)


@pytest.fixture(scope="module")
def alone():
    return train({"data": 1, "tensor": 1}, jax.devices()[:1])


@pytest.mark.parametrize("layout", slow_unless({"data x sequence x tensor"}.__contains__, LAYOUTS))
@pytest.mark.slow
def test_twenty_steps_are_those_of_one_device(layout, alone):
    losses, params = train(LAYOUTS[layout])
    # Float32: sums over parts round otherwise, and every step builds on the one before.
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    chex.assert_trees_all_close(params, alone[1], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_a_split_sequence_divides_the_memory_of_activations():
    # An axis over which nothing is split, in place of `sequence`: each device computes everything.
    _, whole = planned({"idle": 8, "tensor": 1})
    _, split = planned({"sequence": 8, "tensor": 1})
    assert split.state == whole.state
    assert split.temporary < whole.temporary / 4
    assert "all-gather" in split.collectives
    assert not whole.collectives


@pytest.mark.parametrize("layout", [pytest.param("data x tensor", marks=pytest.mark.slow), "data x sequence x tensor"])
@pytest.mark.slow
def test_it_communicates_what_the_same_step_by_hand_does_and_no_more(layout):
    state, ours = planned(LAYOUTS[layout])
    mesh = jax.tree.leaves(state)[0].sharding.mesh
    graphdef = nnx.graphdef(nnx.eval_shape(lambda: example.Transformer(nnx.Rngs(0))))

    def by_hand(params, opt_state, batch):
        def loss_fn(params):
            return example.cross_entropy(nnx.merge(graphdef, params), batch, None, None)

        (loss, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(params)
        updates, opt_state = ADAM.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, {**metrics, "loss": loss}

    shardings = shardings_of(state)
    compiled = (
        jax.jit(
            by_hand,
            in_shardings=(shardings.params, shardings.opt_state, example.sharding_of_batches(mesh)),
            out_shardings=(shardings.params, shardings.opt_state, NamedSharding(mesh, P())),
            donate_argnums=(0, 1),
        )
        .lower(state.params, state.opt_state, jax.tree.map(jnp.asarray, example.sequences(0, 32)))
        .compile()
    )
    assert ours.collectives == collectives(compiled.as_text())


def run_example(*flags):
    done = subprocess.run(
        [sys.executable, "examples/transformer.py", *flags],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        env={name: value for name, value in os.environ.items() if name != "XLA_FLAGS"} | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_it_learns_over_data_sequence_and_tensor():
    printed = run_example("--steps", "100", "--mesh", "data=2,sequence=2,tensor=2")
    assert float(printed.split()[-1]) > 0.99


@pytest.mark.slow
def test_a_plan_runs_nothing():
    printed = run_example("--plan", "64", "--mesh", "data=16,fsdp=2,tensor=2")
    assert printed.startswith("on each of 64 devices (data 16 x fsdp 2 x tensor 2)\nstate ")
    assert "loss" not in printed
