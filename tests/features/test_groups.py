"""Groups of params by path: the optimizer of each, the table, and one run with everything around it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.fit.test_resume import StoppedError, Watching
from tests.problems import Busy, config, regression, squared_error
from tests.test_api import assert_same_bits
from trainer import (
    ArgumentError,
    ArgumentTypeError,
    Trainer,
    TrainState,
    by_group,
    create_sharded,
    group_table,
    make_mesh,
    make_train_step,
)

GROUPS = {
    "*/bias": optax.sgd(0.3, momentum=0.9),
    "inner/**": optax.adamw(1e-2, weight_decay=0.1),
    "*": optax.adamw(1e-3, weight_decay=0.0),
}


def own_group(path):
    if path.endswith("/bias"):
        return "*/bias"
    return "inner/**" if path.startswith("inner/") else "*"


def flat(tree):
    leaves = jax.tree.leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def test_each_param_is_updated_by_the_optimizer_of_its_group():
    params = {"inner": {"kernel": jnp.ones((3, 2)), "bias": jnp.ones(2)}, "outer": {"kernel": jnp.ones((2, 1))}}
    together, opt_state = params, by_group(GROUPS).init(params)
    alone = flat(params)
    states = {path: GROUPS[own_group(path)].init(leaf) for path, leaf in alone.items()}
    for step in range(5):
        grads = jax.tree.map(lambda leaf, t=step: jnp.sin(leaf + t), together)
        updates, opt_state = by_group(GROUPS).update(grads, opt_state, together)
        together = optax.apply_updates(together, updates)
        for path, leaf in alone.items():
            update, states[path] = GROUPS[own_group(path)].update(jnp.sin(leaf + step), states[path], leaf)
            alone[path] = optax.apply_updates(leaf, update)
    for path, leaf in flat(together).items():
        np.testing.assert_allclose(leaf, alone[path], rtol=1e-6)
    assert set(opt_state.inner_states) == set(GROUPS)


def test_one_rate_of_which_those_of_the_groups_are_multiples():
    def make(learning_rate):
        return by_group({"inner/**": optax.sgd(0.1 * learning_rate), "*": optax.sgd(learning_rate)})

    optimizer = optax.inject_hyperparams(make)(learning_rate=1.0)
    state = TrainState.create(Busy(), optimizer, rng=jax.random.key(0)).with_learning_rate(0.5)
    updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, state.params), state.opt_state, state.params)
    assert {path: float(leaf.ravel()[0]) for path, leaf in flat(updates).items()} == pytest.approx(
        {path: -0.05 if path.startswith("inner/") else -0.5 for path in flat(updates)}
    )


def test_a_rate_is_set_where_one_group_keeps_it_and_refused_where_two_do():
    kept = optax.inject_hyperparams(optax.sgd)
    one = by_group({"inner/**": kept(learning_rate=1.0), "*": optax.sgd(1.0)})
    state = TrainState.create(Busy(), one, rng=jax.random.key(0)).with_learning_rate(0.25)
    updates, _ = one.update(jax.tree.map(jnp.ones_like, state.params), state.opt_state, state.params)
    assert float(updates["inner"]["bias"][0]) == -0.25
    assert float(updates["outer"]["bias"][0]) == -1.0
    two = by_group({"inner/**": kept(learning_rate=1.0), "*": kept(learning_rate=1.0)})
    with pytest.raises(ArgumentError, match="holds 2 learning rates"):
        TrainState.create(Busy(), two, rng=jax.random.key(0)).with_learning_rate(0.25)


def test_the_table():
    state = TrainState.create(Busy(), by_group(GROUPS), rng=jax.random.key(0))
    assert group_table(state, GROUPS) == "\n".join(
        [
            "group  pattern   arrays  entries  optimizer bytes",
            "    1  */bias         3       17               68",
            "    2  inner/**       1       32              260",
            "    3  *              2       16              132",
            "total                 6       65              460",
        ]
    )
    assert group_table(state.params, GROUPS) == group_table(state, GROUPS)
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)) == 460


def cells(table):
    """The rows of a table by pattern, each from column to cell."""
    names = ["pattern", "learning_rate", "weight_decay", "arrays", "entries", "bytes"]
    rows = [line.split()[1:] for line in table.splitlines()[1:-1]]
    return {row[0]: dict(zip(names, row, strict=True)) for row in rows}


class TestRatesInTheTable:
    """Of groups whose optimizers keep them, by `optax.inject_hyperparams`."""

    def groups(self, rate=1e-3):
        adamw = optax.inject_hyperparams(optax.adamw)
        return {
            "*/bias": optax.sgd(0.3),
            "inner/**": optax.chain(optax.clip_by_global_norm(1.0), adamw(rate, weight_decay=0.1)),
            "*": optax.inject_hyperparams(optax.sgd)(0.05),
        }

    def shown(self, params, groups):
        found = cells(group_table(params, groups))
        return {pattern: (row["learning_rate"], row["weight_decay"]) for pattern, row in found.items()}

    def test_they_are_those_of_the_start_where_only_params_are_given(self):
        groups = self.groups(optax.linear_schedule(0.25, 0.0, 10))
        wanted = {"*/bias": ("-", "-"), "inner/**": ("0.25", "0.1"), "*": ("0.05", "-")}
        state = TrainState.create(Busy(), by_group(groups), rng=jax.random.key(0))
        assert self.shown(state.params, groups) == wanted
        assert self.shown(jax.eval_shape(lambda: state), groups) == wanted
        assert self.shown(state, groups) == wanted

    @pytest.mark.parametrize("wrapped", [by_group, lambda groups: optax.chain(optax.clip(1.0), by_group(groups))])
    def test_of_a_state_they_are_what_it_holds(self, wrapped):
        groups = self.groups(optax.linear_schedule(0.25, 0.0, 10))
        optimizer = wrapped(groups)
        state = TrainState.create(Busy(), optimizer, rng=jax.random.key(0))
        step = jax.jit(make_train_step(squared_error, optimizer))
        for _ in range(3):  # the rate that is kept is that of the last update
            state, _ = step(state, regression(8))
        assert self.shown(state, groups)["inner/**"] == ("0.2", "0.1")
        assert self.shown(state.params, groups)["inner/**"] == ("0.25", "0.1")

    def test_of_an_ensemble_it_is_the_range(self):
        groups = {"*": optax.inject_hyperparams(optax.sgd)(0.05)}
        states = jax.vmap(
            lambda rate: TrainState.create(Busy(), by_group(groups), rng=jax.random.key(0)).with_learning_rate(rate)
        )(jnp.array([0.25, 0.5]))
        assert " 0.25 to 0.5 " in group_table(states, groups)

    def test_one_that_keeps_two_shows_both(self):
        sgd = optax.inject_hyperparams(optax.sgd)
        groups = {"*": optax.chain(sgd(0.5), sgd(0.25))}
        state = TrainState.create(Busy(), by_group(groups), rng=jax.random.key(0))
        assert " 0.5, 0.25 " in group_table(state, groups)
        assert "weight_decay" not in group_table(state, groups)

    def test_on_a_mesh(self):
        groups = self.groups()
        trainer = Trainer(Busy(), config(), by_group(groups), loss_fn=squared_error, mesh=make_mesh({"data": 8}))
        assert self.shown(trainer.state, groups)["inner/**"] == ("0.001", "0.1")


@pytest.mark.parametrize(
    ("groups", "kind", "message"),
    [
        ([], ArgumentTypeError, "`groups` is of type list; it must map patterns to optimizers, such as {'encoder/**'"),
        ({}, ArgumentError, "`groups` is empty; it must map patterns to optimizers"),
        ({"*": 0.1}, ArgumentTypeError, "`groups['*']` is of type float; it must be an optax.GradientTransformation"),
        ({3: optax.sgd(1.0)}, ArgumentTypeError, "`groups` has the pattern 3 of type int; it must be a string"),
        ({"(": optax.sgd(1.0)}, ArgumentError, "`groups` has the pattern '(', which is no regular expression"),
        (
            {"inner/**": optax.sgd(1.0), "outer/kernel": optax.sgd(1.0)},
            ArgumentError,
            "`groups` does not fit the params: no group has `norm/bias`, `norm/scale`, `outer/bias`: add one, such as "
            "'*' at the end for all others.",
        ),
        (
            {"inr/**": optax.sgd(1.0), "*": optax.sgd(1.0)},
            ArgumentError,
            "the group 'inr/**' matches no whole path; the nearest are ",
        ),
        (
            {"*": optax.sgd(1.0), "inner/**": optax.sgd(1.0)},
            ArgumentError,
            "the group 'inner/**' is left with no param, since '*' before it has every match.",
        ),
    ],
)
def test_groups_that_do_not_fit_are_refused_by_name(groups, kind, message):
    with pytest.raises(kind, match=re.escape(message)) as caught:
        TrainState.create(Busy(), by_group(groups), rng=jax.random.key(0))
    assert "cannot be initialized" not in str(caught.value)


class TestTrainer:
    def build(self, directory, **options):
        return Trainer(
            Busy(),
            config(gradient_clip_norm=1.0),
            by_group(GROUPS),
            loss_fn=squared_error,
            workdir=directory,
            **options,
        )

    @pytest.mark.parametrize("mesh", [None, {"data": 2, "fsdp": 4}])
    @pytest.mark.slow
    def test_killed_and_resumed_it_is_the_same_to_the_bit(self, mesh, tmp_path):
        mesh = mesh and make_mesh(mesh)
        whole = self.build(tmp_path / "whole", mesh=mesh)
        whole.train(regression(40), 2, 8)
        with pytest.raises(StoppedError):
            self.build(tmp_path / "cut", mesh=mesh, callbacks=[Watching(7)], save_interval=2).train(
                regression(40), 2, 8
            )
        resumed = self.build(tmp_path / "cut", mesh=mesh, callbacks=[Watching()], save_interval=2)
        resumed.train(regression(40), 2, 8, resume=True)
        assert_same_bits(resumed.state, whole.state)

    @pytest.mark.slow
    def test_on_a_mesh_the_moments_of_every_group_are_sharded_as_the_params(self):
        optimizer = by_group(GROUPS)
        state = create_sharded(
            lambda rngs: Busy(width=16, rngs=rngs),
            optimizer,
            rng=jax.random.key(0),
            mesh=make_mesh({"data": 2, "fsdp": 4}),
            min_size=16,
        )
        moment = state.opt_state.inner_states["inner/**"].inner_state[0].mu["inner"]["kernel"]
        assert moment.sharding == state.params["inner"]["kernel"].sharding
        assert not moment.sharding.is_fully_replicated
        alone = jax.device_put(state, jax.devices()[0])
        step = make_train_step(squared_error, optimizer)
        (state, _), (alone, _) = (jax.jit(step)(s, regression(8)) for s in (state, alone))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), state.params, alone.params)

    def test_an_ensemble_has_groups_too(self):
        optimizer, keys = by_group(GROUPS), jax.random.split(jax.random.key(0), 3)

        def create(key):
            return TrainState.create(Busy(), optimizer, rng=key)

        step = jax.jit(jax.vmap(make_train_step(squared_error, optimizer), in_axes=(0, None)))
        _, metrics = step(jax.vmap(create)(keys), regression(8))
        assert metrics["loss"].shape == (3,)
