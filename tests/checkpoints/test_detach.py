"""A detached run: equal to the bit, and untouched by the steps that follow."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.problems import Busy, regression, squared_error
from trainer import CompiledStep, Run, TrainState, make_train_step, open_pass
from trainer.checkpoints import detach as module
from trainer.checkpoints.detach import detach
from trainer.data.resumable import LoaderPosition


def started(rng):
    optimizer = optax.adam(1e-2)
    state = TrainState.create(Busy(), optimizer, rng=rng)
    return CompiledStep(make_train_step(squared_error, optimizer)), Run.start(state)


@pytest.mark.parametrize("most_compiled", [500, 0])
@pytest.mark.parametrize("rng", [jax.random.key(0), jax.random.PRNGKey(0)], ids=["typed", "raw"])
def test_later_steps_leave_it_as_it_was(rng, most_compiled, monkeypatch):
    monkeypatch.setattr(module, "_MOST_COMPILED", most_compiled)
    step, run = started(rng)
    run, _ = step(run, regression(), 8)
    copy, expected = detach(run), run.state.copy()
    for _ in range(3):
        run, _ = step(run, regression(), 8)
    assert (copy.step, run.step) == (1, 4)
    chex.assert_trees_all_equal(
        [np.asarray(leaf) for leaf in copy.leaves], [np.asarray(leaf) for leaf in Run.start(expected).leaves]
    )
    assert copy.layout == run.layout
    assert copy.average.compute() != run.average.compute()


def test_what_is_recorded_later_is_not_in_it():
    step, run = started(jax.random.key(0))
    run, metrics = step(run, regression(), 8)
    run = run.recorded(metrics)
    copy = detach(run)
    run, metrics = step(run, regression(), 8)
    run = run.recorded(metrics)
    assert [row["step"] for row in copy.history] == [1]
    assert [row["step"] for row in run.history] == [1, 2]


def test_the_position_of_a_loader_is_that_of_the_call():
    step, run = started(jax.random.key(0))
    run, batches = open_pass(run, [regression(seed=seed) for seed in range(4)])
    run, _ = step(run, next(batches), 8)
    copy = detach(run)
    run, _ = step(run, next(batches), 8)
    assert isinstance(copy.position.loader, LoaderPosition)
    assert (copy.batch, run.batch) == (1, 2)


def test_an_edit_is_in_it():
    _, run = started(jax.random.key(0))
    name = next(iter(run.state.params))
    edited = jax.tree.map(lambda leaf: leaf + 1, run.state.params[name])
    run.state.params[name] = edited
    chex.assert_trees_all_equal(detach(run).peek().params[name], edited)


def test_a_state_whose_moments_are_not_finite_cannot_go_on():
    state = TrainState.create(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), optax.adam(1e-2), rng=jax.random.key(0))
    assert state.is_finite()
    moments = jax.tree.map(lambda leaf: leaf * jnp.inf if leaf.ndim else leaf, state.opt_state)
    assert not state.replace(opt_state=moments).is_finite()


def test_nor_can_one_whose_model_state_is_not():
    state = TrainState.create(Busy(), optax.adam(1e-2), rng=jax.random.key(0))
    leaves, structure = jax.tree.flatten(state.model_state)
    floats = [index for index, leaf in enumerate(leaves) if jnp.issubdtype(leaf.dtype, jnp.floating)]
    assert len(floats) >= 2
    for chosen in floats:
        spoilt = [leaf.at[..., 0].set(jnp.nan) if index == chosen else leaf for index, leaf in enumerate(leaves)]
        assert not state.replace(model_state=jax.tree.unflatten(structure, spoilt)).is_finite()


def test_nor_can_one_whose_optimizer_holds_nan_in_arrays_of_another_shape_or_in_its_rate():
    # Adafactor holds sums over rows and columns of a param.
    optimizer = optax.inject_hyperparams(optax.adafactor)(learning_rate=1e-2, min_dim_size_to_factor=2)
    state = TrainState.create(nnx.Linear(4, 3, rngs=nnx.Rngs(0)), optimizer, rng=jax.random.key(0))
    assert state.is_finite()
    leaves, structure = jax.tree.flatten(state.opt_state)
    shapes = {leaf.shape for leaf in jax.tree.leaves(state.params)}
    spoilt = [
        [value * jnp.nan if index == chosen else value for index, value in enumerate(leaves)]
        for chosen, leaf in enumerate(leaves)
        if jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.shape not in shapes
    ]
    assert len(spoilt) > 2
    assert not any(state.replace(opt_state=jax.tree.unflatten(structure, one)).is_finite() for one in spoilt)


def test_a_scalar_of_an_optimizer_may_be_infinite():
    optimizer = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau())
    state = TrainState.create(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), optimizer, rng=jax.random.key(0))
    assert any(bool(jnp.isinf(leaf)) for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim == 0)
    assert state.is_finite()
