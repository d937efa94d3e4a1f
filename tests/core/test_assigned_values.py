"""What is assigned to a state is used as it is meant, or refused: numbers, NumPy arrays, hyperparameters."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from optax import contrib

from tests.problems import Linear, regression
from tests.test_api import assert_same_bits, build
from trainer import ArgumentError, StateError, make_mesh

DATA = regression(24)


def linear(optimizer=None, **options):
    return build(model=Linear(features=4), optimizer=optimizer, **options)


def kernel(trainer):
    return np.asarray(trainer.state.params["layer"]["kernel"])


def halved(trainer, to):
    """The params, each half as large, as arrays that `to` makes."""
    return jax.tree.map(lambda leaf: to(np.asarray(leaf) * np.float32(0.5)), trainer.state.params)


class TestArraysOfNumPy:
    USES = {
        "train": lambda trainer: trainer.train(DATA, 1, 8),
        "compile": lambda trainer: trainer.compile(DATA),
        "train_step": lambda trainer: trainer.train_step(DATA),
    }

    @pytest.mark.parametrize("mesh", [0, 1, 8], ids=["no mesh", "one device", "8 devices"])
    @pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
    @pytest.mark.parametrize("use", USES)
    def test_they_become_what_the_run_holds(self, use, dtype, mesh):
        options = {"mesh": make_mesh({"data": mesh}, devices=jax.devices()[:mesh])} if mesh else {}
        trainer, other = linear(**options), linear(**options)
        other.state = other.state.replace(
            params=halved(other, lambda leaf: jnp.asarray(leaf.astype(dtype), jnp.float32))
        )
        given = halved(trainer, lambda leaf: leaf.astype(dtype))
        kept = jax.tree.map(np.copy, given)
        trainer.state = trainer.state.replace(params=given)
        assert {leaf.dtype for leaf in jax.tree.leaves(trainer.state.params)} == {np.dtype(np.float32)}
        for each in (trainer, other):
            self.USES[use](each)
        assert_same_bits(trainer.state, other.state)
        jax.tree.map(np.testing.assert_array_equal, given, kept)

    def test_also_of_a_bfloat16_model_and_in_a_state_that_a_trainer_is_made_of(self):
        trainer = linear()
        params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), trainer.state.params)
        trainer.state = trainer.state.replace(params=params)
        trainer = build(model=trainer.state)
        trainer.state = trainer.state.replace(params=halved(trainer, np.float32))
        assert kernel(trainer).dtype == jnp.bfloat16
        trainer = build(model=trainer.state.replace(params=halved(trainer, np.float64)))
        assert kernel(trainer).dtype == np.float32
        trainer.train(DATA, 1, 8)

    def test_a_key_cannot_be_one(self):
        trainer = linear(rng=jax.random.key(0))
        with pytest.raises(StateError, match=r"`rng` of key<fry>\(\) was given uint32\(2,\)"):
            trainer.state = trainer.state.replace(rng=np.zeros(2, np.uint32))


class TestIntegers:
    """A hyperparameter that was given as an integer: optax keeps one."""

    WAYS = {
        "set_learning_rate": lambda trainer, rate: trainer.set_learning_rate(rate),
        "edit": lambda trainer, rate: trainer.opt_state.hyperparams.update(learning_rate=rate),
        "edit, an array": lambda trainer, rate: trainer.opt_state.hyperparams.update(learning_rate=jnp.asarray(rate)),
        "tree_set": lambda trainer, rate: setattr(
            trainer, "opt_state", optax.tree_utils.tree_set(trainer.opt_state, learning_rate=rate)
        ),
    }

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("make", [optax.sgd, contrib.prodigy])
    def test_a_rate_of_one_is_a_number_like_any_other(self, make, way):
        trainer, other = (linear(optax.inject_hyperparams(make)(learning_rate=rate)) for rate in (1, 0.125))
        self.WAYS[way](trainer, 0.125)
        for each in (trainer, other):
            each.train(DATA, 1, 8)
        assert_same_bits(trainer.state, other.state)

    def test_unset_it_trains_as_by_hand(self):
        optimizer = optax.inject_hyperparams(optax.sgd)(1)
        trainer = linear(optimizer)
        params = trainer.state.copy().params
        opt_state = optimizer.init(params)
        grads = jax.tree.map(jnp.ones_like, params)
        updates, _ = optimizer.update(grads, opt_state, params)
        mine, _ = trainer.optimizer.update(grads, trainer.opt_state, params)
        assert_same_bits(mine, updates)

    def test_the_search_for_a_rate_tries_them(self):
        found = linear(optax.inject_hyperparams(optax.sgd)(1)).find_learning_rate(regression(256), 64)
        assert found.losses[-1] < found.losses[0]

    def test_a_state_of_the_callers_is_no_exception(self):
        state = linear(optax.inject_hyperparams(optax.sgd)(1)).state
        held = {**state.opt_state.hyperparams, "learning_rate": jnp.int32(1)}
        after = state.replace(opt_state=state.opt_state._replace(hyperparams=held)).with_learning_rate(0.5)
        assert float(after.opt_state.hyperparams["learning_rate"]) == 0.5

    @pytest.mark.parametrize("value", [0.5, np.float64(0.5), jnp.float32(0.5), float("nan"), 2**40], ids=repr)
    def test_another_that_it_cannot_hold_is_refused(self, value):
        trainer = linear(optax.inject_hyperparams(optax.sgd)(0.1, momentum=0))
        trainer.opt_state.hyperparams["momentum"] = value
        message = (
            r"`opt_state/hyperparams/momentum` of int32\(\) was given .*, which it cannot hold; make the optimizer"
        )
        with pytest.raises(StateError, match=message):
            trainer.train_step(DATA)
        trainer.opt_state.hyperparams["momentum"] = 0.0
        trainer.train_step(DATA)
        if not isinstance(value, jax.Array):  # of which the dtype is kept in an assignment, as by optax
            with pytest.raises(StateError, match=message):
                trainer.opt_state = optax.tree_utils.tree_set(trainer.opt_state, momentum=value)


class TestSchedules:
    def scheduled(self):
        return linear(optax.inject_hyperparams(optax.sgd)(optax.linear_schedule(0.1, 0.0, 10), momentum=0.5))

    MESSAGE = r"`opt_state/hyperparams/learning_rate` follows a schedule, which sets it anew in every step"

    @pytest.mark.parametrize("value", [0.0, jnp.zeros(())], ids=["number", "array"])
    def test_an_edit_of_what_one_sets_is_refused_once(self, value):
        trainer, other = self.scheduled(), self.scheduled()
        trainer.opt_state.hyperparams["learning_rate"] = value
        with pytest.raises(StateError, match=self.MESSAGE):
            trainer.train_step(DATA)
        for each in (trainer, other):
            each.train_step(DATA)
        assert_same_bits(trainer.state, other.state)

    def test_so_is_an_assignment(self):
        trainer = self.scheduled()
        with pytest.raises(StateError, match=self.MESSAGE):
            trainer.opt_state = trainer.opt_state._replace(
                hyperparams={**trainer.opt_state.hyperparams, "learning_rate": 0.5}
            )
        # This replaces the state of the schedule too.
        with pytest.raises(ArgumentError, match=r"it lacks `hyperparams_states/learning_rate/count`"):
            trainer.opt_state = optax.tree_utils.tree_set(trainer.opt_state, learning_rate=0.5)

    SAME = {
        "nan_to_num": lambda leaf: jnp.nan_to_num(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
        "numpy": lambda leaf: np.asarray(leaf) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
        "float64": lambda leaf: np.asarray(leaf, np.float64) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf,
    }

    @pytest.mark.parametrize("by", ["state", "opt_state"])
    @pytest.mark.parametrize("change", SAME)
    def test_a_map_over_the_state_that_leaves_its_value_is_none(self, change, by):
        trainer, other = self.scheduled(), self.scheduled()
        for each in (trainer, other):
            each.train_step(DATA)
        setattr(trainer, by, jax.tree.map(self.SAME[change], getattr(trainer, by)))
        for each in (trainer, other):
            each.train_step(DATA)
        assert_same_bits(trainer.state, other.state)

    def test_nor_is_one_to_another_precision(self):
        trainer = self.scheduled()
        trainer.train_step(DATA)
        rate = trainer.opt_state.hyperparams["learning_rate"]
        narrow = {jnp.dtype("float32"): jnp.bfloat16}
        trainer.state = jax.tree.map(lambda leaf: leaf.astype(narrow.get(leaf.dtype, leaf.dtype)), trainer.state)
        assert trainer.opt_state.hyperparams["learning_rate"].dtype == rate.dtype

    @pytest.mark.parametrize("rate", [0, 1, 0.05, np.nan], ids=repr)
    def test_but_one_that_changes_it_is(self, rate):
        trainer = self.scheduled()
        trainer.train_step(DATA)
        with pytest.raises(StateError, match=self.MESSAGE):
            trainer.opt_state = trainer.opt_state._replace(
                hyperparams={**trainer.opt_state.hyperparams, "learning_rate": rate}
            )
        trainer.opt_state.hyperparams["learning_rate"] = rate
        with pytest.raises(StateError, match=self.MESSAGE):
            trainer.train_step(DATA)

    @pytest.mark.parametrize("rate", ["equal", "due"])
    def test_edits_of_its_value_or_with_its_state_are_none(self, rate):
        trainer, other = self.scheduled(), self.scheduled()
        fresh = trainer.optimizer.init(trainer.state.params)
        trainer.train(DATA, 1, 8)
        other.train(DATA, 1, 8)
        if rate == "equal":
            held = trainer.opt_state.hyperparams
            held.update({name: np.asarray(value) for name, value in held.items()})
        else:
            for each in (trainer, other):
                each.opt_state.hyperparams_states.update(fresh.hyperparams_states)
            trainer.opt_state.hyperparams.update(fresh.hyperparams)
        for each in (trainer, other):
            each.train_step(DATA)
        assert_same_bits(trainer.state, other.state)

    def test_another_beside_it_can_be_set(self):
        trainer = self.scheduled()
        trainer.opt_state.hyperparams["momentum"] = 0.25
        trainer.train_step(DATA)
        assert float(trainer.opt_state.hyperparams["momentum"]) == 0.25

    def test_a_state_that_starts_it_anew_is_none(self):
        trainer, other = self.scheduled(), self.scheduled()
        trainer.train_step(DATA)
        trainer.opt_state = trainer.optimizer.init(trainer.state.params)
        assert_same_bits(trainer.opt_state, other.opt_state)
