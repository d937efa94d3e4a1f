"""The state: what it holds, that it holds it alone, and that equal architectures are one."""

import copy
import gc
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.problems import Busy, Counting, Linear, config, regression, squared_error
from trainer import (
    ArgumentError,
    ArgumentTypeError,
    Run,
    StateError,
    Trainer,
    TrainState,
    ema_of_params,
    make_train_step,
)


class Tied(nnx.Module):
    def __init__(self, rngs):
        self.encoder = nnx.Linear(3, 3, rngs=rngs)
        self.decoder = self.encoder


class Containers(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(2, 2, rngs=rngs) for _ in range(12)])
        self.table = nnx.Dict(a=nnx.Param(jnp.ones(3)), b=nnx.BatchStat(jnp.zeros(2)))


class Statistic(nnx.Variable):
    """A variable type of the user's own."""


class Odd(nnx.Module):
    def __init__(self, rngs):
        self.weight = nnx.Param(jnp.ones(2, jnp.bfloat16))
        self.statistic = Statistic(jnp.zeros(3))
        self.number = nnx.Variable(7)
        self.nothing = nnx.Variable(None)
        self.tree = nnx.Variable({"p": jnp.ones(2), "q": [jnp.zeros(1), jnp.ones(())]})
        self.bare = jnp.arange(3)
        self.host = np.arange(2, dtype=np.float32)
        self.key = nnx.Variable(jax.random.key(3))


class Empty(nnx.Module):
    pass


def create(model, **changes):
    return TrainState.create(model, optax.adam(1e-2), **{"rng": jax.random.key(0), **changes})


@pytest.mark.parametrize("make", [Linear, Busy, Tied, Containers, Odd], ids=lambda make: make.__name__)
def test_a_module_comes_back_as_it_went_in(make):
    module = make(rngs=nnx.Rngs(0))
    again = create(module).model()
    graphdef, values = nnx.split(module)
    graphdef_again, values_again = nnx.split(again)
    assert graphdef == graphdef_again
    chex.assert_trees_all_equal(nnx.to_pure_dict(values), nnx.to_pure_dict(values_again))


def test_a_module_without_variables_comes_back():
    state = create(Empty())
    assert isinstance(state.model(), Empty)
    assert state.params == {}
    assert state.model_state == {}


def test_tied_parameters_are_held_once_and_come_back_tied():
    state = create(Tied(nnx.Rngs(0)))
    assert list(state.params) == ["decoder"]
    model = state.model()
    assert model.encoder is model.decoder


def test_params_are_plain_nested_dicts_by_attribute():
    state = create(Containers(nnx.Rngs(0)))
    assert state.params["layers"][11]["kernel"].shape == (2, 2)
    assert type(state.params["layers"]) is dict
    assert list(state.model_state) == ["table"]


def test_wrt_decides_what_is_trained():
    state = create(Busy(), wrt=nnx.All(nnx.Param, nnx.PathContains("outer")))
    assert list(state.params) == ["outer"]
    assert "kernel" in state.model_state["inner"]


def test_flax_can_merge_what_the_state_holds():
    state = create(Busy())
    module = nnx.merge(state.graphdef, state.params, state.model_state)
    assert isinstance(module, Busy)


def test_two_states_of_one_architecture_share_their_graphdef():
    first, second = create(Busy(rngs=nnx.Rngs(0))), create(Busy(rngs=nnx.Rngs(1)))
    assert first.graphdef is second.graphdef
    assert first.graphdef == second.graphdef
    assert hash(first.graphdef) == hash(second.graphdef)
    assert first.graphdef != create(Linear()).graphdef
    assert first.graphdef != "graphdef"


def test_attributes_that_are_equal_only_to_python_make_another_architecture():
    class Scaled(nnx.Module):
        def __init__(self, factor):
            self.factor = factor
            self.weight = nnx.Param(jnp.ones(2))

    whole, floating = create(Scaled(1)), create(Scaled(1.0))
    assert whole.graphdef != floating.graphdef
    assert type(whole.model().factor) is int
    assert type(floating.model().factor) is float


def test_a_graphdef_equals_its_plain_twin_and_survives_pickle_and_copy():
    state = create(Busy())
    assert state.graphdef == nnx.graphdef(Busy())
    assert pickle.loads(pickle.dumps(state.graphdef)) is state.graphdef
    assert copy.deepcopy(state).graphdef is state.graphdef


def test_graphdefs_nobody_uses_are_forgotten():
    from trainer.core.nnx_bridge import interned

    class Unique(nnx.Module):
        def __init__(self):
            self.mark = object()

    def found():
        return [graphdef for graphdef in list(interned.values()) if graphdef.nodes[0].type is Unique]

    state = create(Unique())
    assert found() == [state.graphdef]
    del state
    gc.collect()
    assert found() == []


def test_two_states_and_a_rebuilt_optimizer_share_one_compiled_step(compilations):
    step = jax.jit(make_train_step(squared_error, optax.adam(1e-2)))
    batch = regression()
    for seed in range(3):
        state = TrainState.create(Busy(rngs=nnx.Rngs(seed)), optax.adam(1e-2), rng=jax.random.key(seed))
        step(state, batch)
    assert compilations["jit(train_step)"] == 1


def test_nothing_is_shared_with_the_module_that_was_passed():
    module, batch = Busy(), regression()
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngKey))))
    state = create(module)
    step = jax.jit(make_train_step(squared_error, optax.adam(1e-2)), donate_argnums=0)
    for _ in range(3):
        state, _ = step(state, batch)
    after = nnx.to_pure_dict(nnx.state(module, nnx.Not(nnx.RngKey)))
    chex.assert_trees_all_equal(before, jax.tree.map(np.asarray, after))


def test_no_two_leaves_share_a_buffer_even_if_the_optimizer_keeps_the_params():
    lookahead = optax.GradientTransformation(lambda params: {"slow": params}, optax.identity().update)
    state = TrainState.create(Linear(), lookahead, rng=jax.random.key(0))
    buffers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves((state.params, state.opt_state))]
    assert len(set(buffers)) == len(buffers)


class Sampler:
    """A leaf of an optimizer's initial state that notes the bytes of all live arrays when it is copied."""

    def __init__(self, found):
        self.found = found

    def __jax_array__(self):
        self.found.append(live_bytes())
        return jnp.zeros(())


def live_bytes():
    return sum(array.nbytes for array in jax.live_arrays() if not array.is_deleted())


def test_creation_never_holds_the_optimizer_state_twice():
    leaf_bytes, found = 4 * 2**16, []

    def init(params):
        del params
        return [leaf for _ in range(16) for leaf in (jnp.zeros(2**16), Sampler(found))]

    gc.collect()
    before = live_bytes()
    state = TrainState.create(
        Linear(), optax.GradientTransformation(init, optax.identity().update), rng=jax.random.key(0)
    )
    assert len(found) == 16
    assert sum(leaf.nbytes for leaf in state.opt_state) >= 16 * leaf_bytes
    assert max(found) - before < 18 * leaf_bytes
    assert state.opt_state[0].shape == (2**16,)


def keeps_the_params():
    """Lookahead by hand: the initial state is the params themselves."""

    def update(updates, state, params):
        slow = jax.tree.map(lambda slow, new: 0.5 * (slow + new), state, params)
        return jax.tree.map(lambda u: -0.1 * u, updates), slow

    return optax.GradientTransformation(lambda params: params, update), []


def keeps_an_array_of_its_own():
    """Its initial state is an array that the optimizer holds on to, and another object over the same buffer."""
    own = jnp.full(3, 2.0)
    same_buffer = jax.device_put(own, own.sharding)

    def update(updates, state, params=None):
        del params
        return updates, jax.tree.map(lambda leaf: leaf + 1, state)

    return optax.GradientTransformation(lambda params: (own, own, same_buffer), update), [own, same_buffer]


def keeps_a_numpy_array():
    """Its initial state is a view of NumPy memory, which JAX need not copy on a CPU."""
    host = np.full(1024, 2.0, np.float32)
    view = jnp.asarray(host)

    def update(updates, state, params=None):
        del params
        return updates, jax.tree.map(lambda leaf: leaf + 1, state)

    return optax.GradientTransformation(lambda params: {"host": host, "view": view}, update), [host, view]


@pytest.mark.parametrize("make", [keeps_the_params, keeps_an_array_of_its_own, keeps_a_numpy_array])
def test_training_destroys_no_array_that_an_optimizer_starts_from(make):
    optimizer, kept = make()
    values, model, batch = [np.array(array) for array in kept], Linear(), regression(features=3)
    predicted = np.array(model(batch["input"]))
    state = TrainState.create(model, optimizer, rng=jax.random.key(0))
    started = jax.tree.map(np.array, state.opt_state)
    step = jax.jit(make_train_step(squared_error, optimizer), donate_argnums=0)
    for _ in range(3):
        state, _ = step(state, batch)
    for array, value in zip(kept, values, strict=True):
        np.testing.assert_array_equal(array, value)
    np.testing.assert_array_equal(model(batch["input"]), predicted)
    again = TrainState.create(model, optimizer, rng=jax.random.key(0))
    chex.assert_trees_all_equal(jax.tree.map(np.array, again.opt_state), started)


def test_weak_types_are_made_strong():
    state = create(Odd(nnx.Rngs(0)))
    assert not any(getattr(leaf, "weak_type", False) for leaf in jax.tree.leaves(state))
    assert state.model_state["number"].dtype == jnp.int32


def test_sown_values_are_not_part_of_the_state():
    module = Linear()
    module.seen = nnx.Intermediate((jnp.ones(3),))
    state = create(module)
    assert state.model_state == {}
    assert hasattr(module, "seen")


@pytest.mark.parametrize(
    "rng", [jax.random.key(1), jax.random.PRNGKey(1), jax.random.key(1, impl="rbg")], ids=["typed", "raw", "rbg"]
)
def test_keys_of_every_kind_are_kept_as_they_came(rng):
    state = create(Linear(), rng=rng)
    assert state.rng.dtype == rng.dtype
    stepped, _ = make_train_step(squared_error, optax.adam(1e-2))(state, regression(features=3))
    assert stepped.rng.dtype == rng.dtype


def test_step_starts_at_zero_as_an_int32_scalar():
    step = create(Linear()).step
    assert (step.dtype, step.shape, int(step)) == (jnp.int32, (), 0)


def test_extension_variables_and_weights_are_arrays_of_the_state():
    extension = Counting()
    extension.weight = 0.25
    held = create(Linear(), extensions={"count": extension}).extensions["count"]
    assert held["weight"] == jnp.float32(0.25)
    assert held["variables"]["evaluations"].dtype == jnp.int32


def test_replace_leaves_the_original():
    state = create(Linear())
    changed = state.replace(step=jnp.int32(5))
    assert (int(state.step), int(changed.step)) == (0, 5)
    with pytest.raises(AttributeError):
        state.step = 3


def test_a_copy_outlives_the_donation_of_the_original():
    state = create(Busy())
    kept = state.copy()
    jax.jit(make_train_step(squared_error, optax.adam(1e-2)), donate_argnums=0)(state, regression())
    assert kept.model()(regression()["input"]).shape == (64,)
    with pytest.raises(StateError, match=r"`state` was donated: the buffer of `params/inner/bias` is gone"):
        state.model()
    with pytest.raises(StateError, match=r"keep a `state.copy\(\)`"):
        make_train_step(squared_error, optax.adam(1e-2))(state, regression())


def test_a_living_state_is_checked_without_naming_its_leaves(monkeypatch):
    state = create(Busy())

    def named(tree):
        raise AssertionError("the paths of a state that is alive were made")

    monkeypatch.setattr(jax.tree, "leaves_with_path", named)
    state.check_alive()


def test_its_description_has_sizes_and_no_values():
    state = create(Linear())
    described = repr(state)
    assert repr(jax.eval_shape(lambda: state)) == described  # and without a warning of JAX
    assert described.startswith("TrainState(params: 2 arrays, 4 entries; model_state: 0 arrays, 0 entries; opt_state: ")
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    assert repr(state) == described


def test_an_ensemble_is_made_under_vmap():
    def member(key):
        return create(Busy(rngs=nnx.Rngs(key)), rng=key)

    states = jax.vmap(member)(jax.random.split(jax.random.key(0), 5))
    assert states.params["inner"]["kernel"].shape == (5, 4, 8)
    alone = create(Busy(rngs=nnx.Rngs(jax.random.split(jax.random.key(0), 5)[2])))
    chex.assert_trees_all_close(jax.tree.map(lambda leaf: leaf[2], states.params), alone.params, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Linear, r"`model` is the class Linear; it must be a flax.nnx.Module instance. Call the class to make one."),
        (lambda x: x, "`model` is of type function; it must be a flax.nnx.Module instance."),
    ],
)
def test_what_is_no_module_is_refused(model, message):
    with pytest.raises(ArgumentTypeError, match=message):
        create(model)


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (1e-3, "`optimizer` is of type float; it must be an optax.GradientTransformation"),
        (lambda: nnx.Optimizer(Linear(), optax.sgd(1.0), wrt=nnx.Param), "which holds its own state"),
    ],
)
def test_what_is_no_optimizer_is_refused(optimizer, message):
    optimizer = optimizer() if callable(optimizer) else optimizer
    with pytest.raises(ArgumentTypeError, match=message):
        TrainState.create(Linear(), optimizer, rng=jax.random.key(0))


@pytest.mark.parametrize(
    ("rng", "described"),
    [
        (0.5, "`rng` is 0.5 of type float;"),
        (True, "`rng` is True of type bool;"),
        (nnx.Rngs(0), "of type Rngs;"),
        (jnp.zeros(2), r"`rng` is float32\(2,\);"),
        (jax.random.split(jax.random.key(0)), r"`rng` is key<fry>\(2,\);"),
        (jnp.zeros(3, jnp.uint32), r"`rng` is uint32\(3,\);"),
    ],
    ids=["float", "bool", "rngs", "floats", "keys", "long"],
)
def test_what_is_no_key_is_refused(rng, described):
    with pytest.raises(ArgumentTypeError, match=described + r" it must be one key, jax.random.key\(0\)"):
        create(Linear(), rng=rng)


@pytest.mark.parametrize("seed", [7, np.uint32(7), np.int64(7)])
def test_an_integer_is_the_seed_of_a_key(seed):
    np.testing.assert_array_equal(create(Linear(), rng=seed).rng, jax.random.PRNGKey(7))


def test_variables_without_arrays_are_named():
    module = Linear()
    module.label = nnx.Variable("seven")
    with pytest.raises(ArgumentError, match=r"`model_state/label` holds 'seven', of type str; a variable must hold"):
        create(module)


def test_parameters_without_gradients_are_named():
    module = Linear()
    module.table = nnx.Param(jnp.arange(3))
    with pytest.raises(ArgumentError, match=r"`wrt` selects variables without a gradient: `params/table` \(int32\)"):
        create(module)


def test_metadata_that_cannot_be_hashed_is_kept():
    def noted(note):
        module = Linear()
        module.noted = nnx.BatchStat(jnp.zeros(2), note=[note])
        return module

    module = noted("a")
    state = create(module)
    assert state.graphdef is create(noted("a")).graphdef
    assert state.graphdef != create(noted("b")).graphdef
    module.noted.get_metadata()["note"].append("c")
    assert state.model().noted.get_metadata()["note"] == ["a"]


@pytest.mark.parametrize("where", ["a state that was donated", "a state that lives"])
def test_a_model_whose_arrays_were_donated_is_named(where):
    state = create(Linear())
    model = (state if where == "a state that was donated" else state.copy()).model()
    jax.jit(make_train_step(squared_error, optax.adam(1e-2)), donate_argnums=0)(state, regression(8, 3))
    if where == "a state that lives":
        create(model)
        return
    with pytest.raises(StateError, match=r"`params/layer/bias` was donated: its buffer is gone. The model shares its"):
        create(model)


def test_a_key_that_was_donated_is_refused():
    key = jax.random.key(1)
    key.delete()
    with pytest.raises(StateError, match="`rng` was donated to a step"):
        create(Linear(), rng=key)


class TestReplace:
    @pytest.mark.parametrize("step", [5, np.int64(5), np.uint8(5)], ids=lambda step: type(step).__name__)
    def test_a_number_of_steps_is_the_array_of_the_state(self, step, compilations):
        state = create(Linear())
        train = jax.jit(make_train_step(squared_error, optax.adam(1e-2)))
        train(state, regression(8, 3))
        after, _ = train(state.replace(step=step), regression(8, 3))
        assert (int(after.step), compilations["jit(train_step)"]) == (6, 1)

    @pytest.mark.parametrize("step", [5.0, True, np.float32(5)], ids=str)
    def test_what_is_no_number_of_steps_is_refused(self, step):
        with pytest.raises(ArgumentTypeError, match=r"`step` is .*; it must be an integer"):
            create(Linear()).replace(step=step)

    @pytest.mark.parametrize("kind", [jax.random.PRNGKey, jax.random.key, lambda n: jax.random.key(n, impl="rbg")])
    def test_an_integer_is_the_seed_of_a_key_as_the_state_has_one(self, kind):
        found, wanted = create(Linear(), rng=kind(0)).replace(rng=3).rng, kind(3)
        assert found.dtype == wanted.dtype
        assert jnp.all(found == wanted)

    def test_a_float_is_no_seed(self):
        with pytest.raises(ArgumentTypeError, match=r"`rng` is 0.5 of type float; it must be one key"):
            create(Linear()).replace(rng=0.5)

    def test_params_may_be_a_state_of_nnx(self):
        state, pretrained = create(Busy()), Busy(rngs=nnx.Rngs(5))
        params, rest = nnx.state(pretrained, nnx.Param), nnx.state(pretrained, nnx.Not(nnx.Param))
        wanted = create(pretrained)
        found = state.replace(params=params, model_state=rest)
        chex.assert_trees_all_equal(found.params, wanted.params)
        assert jax.tree.structure(found) == jax.tree.structure(wanted)
        jax.jit(make_train_step(squared_error, optax.adam(1e-2)))(found, regression(8))


class TestWithOptimizer:
    OPTIMIZERS = {
        "lbfgs": optax.lbfgs(),
        "prodigy": optax.contrib.prodigy(),
        "an average": optax.chain(optax.adam(1e-2), ema_of_params(0.9)),
        "lookahead": optax.lookahead(optax.sgd(0.1), 5, 0.5),
    }

    @pytest.mark.parametrize("name", OPTIMIZERS)
    def test_training_continues_with_it_and_the_state_is_donated(self, name):
        optimizer, data = self.OPTIMIZERS[name], regression(8, 3)
        state, _ = jax.jit(make_train_step(squared_error, optax.adam(1e-2)))(create(Linear()), data)
        other = state.with_optimizer(optimizer)
        fresh = TrainState.create(state.model(), optimizer, rng=state.rng)
        chex.assert_trees_all_equal(other.opt_state, fresh.opt_state)
        chex.assert_trees_all_equal(other.params, state.params)
        train = jax.jit(make_train_step(squared_error, optimizer), donate_argnums=0)
        for _ in range(2):
            other, metrics = train(other, data)
        assert (int(other.step), bool(jnp.isfinite(metrics["loss"]))) == (3, True)

    def test_what_is_none_is_refused(self):
        with pytest.raises(ArgumentTypeError, match="`optimizer` is of type float"):
            create(Linear()).with_optimizer(1e-3)


class TestStacked:
    """The states of an ensemble: `jax.vmap` over the creation."""

    def members(self, optimizer=None):
        def member(key):
            return TrainState.create(Linear(rngs=nnx.Rngs(key)), optimizer or optax.adam(1e-2), rng=key)

        return jax.vmap(member)(jax.random.split(jax.random.key(0), 3))

    def test_a_scalar_of_each_member_may_be_infinite(self):
        members = self.members(optax.contrib.reduce_on_plateau())
        assert bool(members.is_finite())
        assert not bool(members.replace(params=jax.tree.map(lambda leaf: leaf / 0, members.params)).is_finite())
        gone = jax.tree.map(lambda leaf: leaf * jnp.nan if leaf.dtype == jnp.float32 else leaf, members.opt_state)
        assert not bool(members.replace(opt_state=gone).is_finite())

    def test_a_run_needs_one_step_count(self):
        message = (
            r"`state.step` has the shape \(3,\): the state is that of several models, .*make_sweep\(step_fn, state\)"
        )
        with pytest.raises(ArgumentError, match=message):
            Run.start(self.members())
        with pytest.raises(ArgumentError, match=message):
            Trainer(self.members(), config(), optax.adam(1e-2), loss_fn=squared_error)
