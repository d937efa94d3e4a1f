"""Files that hold a state: whole or not at all, refused by name where they do not fit."""

import dataclasses
import datetime
import functools
import os
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.problems import Busy, Counting, Linear, config, regression, squared_error
from tests.test_state import Containers, Odd, Tied
from trainer import (
    ArgumentError,
    CheckpointError,
    OptimizerConfig,
    StateError,
    Trainer,
    TrainState,
    latest_checkpoint,
    load_state,
    make_optimizer,
    make_train_step,
    save_state,
)
from trainer.checkpoints.file_format import Bundle, write_bundle
from trainer.checkpoints.open import open_source
from trainer.checkpoints.state_io import describe_leaf, load_with_progress
from trainer.config.optimizers import OPTIMIZER_FIELDS

EXTENSIONS = {"size": Counting()}


def create(model, optimizer=None, rng=None, **changes):
    rng = jax.random.key(0) if rng is None else rng
    return TrainState.create(model, optimizer or optax.adam(1e-2), rng=rng, **changes)


def assert_equal(one, other):
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("make", [Linear, Busy, Tied, Containers, Odd], ids=lambda make: make.__name__)
def test_a_state_comes_back_equal(make, tmp_path):
    state = create(make(rngs=nnx.Rngs(0)), extensions=EXTENSIONS).replace(step=jnp.int32(7))
    path = save_state(tmp_path / "new" / "state.msgpack", state)
    other = create(make(rngs=nnx.Rngs(1)), extensions=EXTENSIONS, rng=jax.random.key(9))
    loaded = load_state(path, like=other)
    assert_equal(loaded, state)
    assert loaded.graphdef is state.graphdef


@pytest.mark.parametrize(
    "rng",
    [jax.random.PRNGKey(3), jax.random.key(3), jax.random.key(3, impl="rbg"), jax.random.key(3, impl="unsafe_rbg")],
    ids=["raw", "threefry", "rbg", "unsafe_rbg"],
)
def test_keys_of_every_kind_come_back(rng, tmp_path):
    state = create(Linear(), rng=rng)
    loaded = load_state(save_state(tmp_path / "s.msgpack", state), like=state)
    assert_equal(loaded.rng, rng)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float8_e4m3fn", "int4", "bool", "complex64", "uint8"])
def test_dtypes_come_back(dtype, tmp_path):
    model = Linear()
    model.extra = nnx.BatchStat(jnp.asarray([0, 1, 1], dtype))
    model.none = nnx.BatchStat(jnp.zeros((0, 3), dtype))
    state = create(model)
    assert_equal(load_state(save_state(tmp_path / "s.msgpack", state), like=state), state)


def of_optax():
    """Every optimizer of the factory, and wrappers whose states are of many kinds."""
    for name in OPTIMIZER_FIELDS:
        yield name, make_optimizer(OptimizerConfig(optimizer_type=name, learning_rate=1e-2))
    sgd = optax.sgd(0.1, momentum=0.9)
    yield "MultiSteps", optax.MultiSteps(sgd, every_k_schedule=2).gradient_transformation()
    yield "inject_hyperparams", optax.inject_hyperparams(optax.adam)(learning_rate=1e-2)
    labels = lambda params: jax.tree.map(lambda leaf: "a" if leaf.ndim > 1 else "b", params)  # noqa: E731
    yield "multi_transform", optax.multi_transform({"a": sgd, "b": optax.set_to_zero()}, labels)
    yield "apply_if_finite", optax.apply_if_finite(sgd, 3)
    yield "chain", optax.chain(optax.clip(1.0), optax.adam(optax.linear_schedule(1.0, 0.0, 9)))


@pytest.mark.parametrize("optimizer", [pytest.param(optimizer, id=name) for name, optimizer in of_optax()])
@pytest.mark.few(2)
def test_states_of_every_optimizer_come_back_and_go_on(optimizer, tmp_path):
    step = jax.jit(make_train_step(squared_error, optimizer))
    state, _ = step(create(Busy(), optimizer), regression())
    loaded = load_state(save_state(tmp_path / "s.msgpack", state), like=create(Busy(), optimizer))
    assert_equal(loaded, state)
    assert_equal(step(loaded, regression())[0], step(state, regression())[0])


def test_arrays_go_where_their_counterparts_are(tmp_path):
    state = create(Linear())
    path = save_state(tmp_path / "s.msgpack", state)
    device = jax.devices()[3]
    loaded = load_state(path, like=jax.device_put(state, device))
    assert loaded.params["layer"]["kernel"].devices() == {device}
    assert not load_state(path, like=state).step.committed


def test_the_file_says_what_is_in_it(tmp_path):
    with Bundle(save_state(tmp_path / "s.msgpack", create(Linear()), {"name": "mine"})) as bundle:
        assert bundle.info["step"] == 0
        assert bundle.info["name"] == "mine"
        assert bundle.info["versions"]["jax"] == jax.__version__
        assert datetime.datetime.fromisoformat(bundle.info["time"]).tzinfo is not None
        assert [describe_leaf(leaf) for leaf in bundle.leaves[:2]] == ["(1,) float32", "(3, 1) float32"]
        assert [leaf.name for leaf in bundle.leaves[:2]] == ["params/layer/bias", "params/layer/kernel"]


def test_a_donated_state_may_say_where_things_go(tmp_path):
    state = create(Busy())
    path, kept = save_state(tmp_path / "s.msgpack", state), state.copy()
    for leaf in jax.tree.leaves(state):
        leaf.delete()
    assert_equal(load_state(path, like=state), kept)


def test_a_loaded_state_trains_and_is_donated_like_any_other(tmp_path, compilations):
    state, optimizer = create(Busy()), optax.adam(1e-2)
    step = jax.jit(make_train_step(squared_error, optimizer), donate_argnums=0)
    path = save_state(tmp_path / "s.msgpack", state)
    loaded = load_state(path, like=state)
    expected, _ = step(state, regression())
    leaves = jax.tree.leaves(loaded)
    after, _ = step(loaded, regression())
    assert_equal(after, expected)
    assert all(leaf.is_deleted() for leaf in leaves)
    assert compilations["jit(train_step)"] == 1


class TestPickles:
    @pytest.mark.parametrize("make", [Linear, Busy, Tied, Containers, Odd], ids=lambda make: make.__name__)
    def test_a_state_comes_back_equal(self, make, tmp_path):
        state = create(make(rngs=nnx.Rngs(0)), extensions=EXTENSIONS).replace(step=jnp.int32(7))
        other = create(make(rngs=nnx.Rngs(1)), extensions=EXTENSIONS, rng=jax.random.key(9))
        assert_equal(load_state(save_state(tmp_path / "s.pkl", state), like=other), state)

    def test_plain_pickle_reads_the_keys_of_the_reference(self, tmp_path):
        state = create(Linear()).replace(step=jnp.int32(7))
        with open(save_state(tmp_path / "s.pkl", state), "rb") as file:
            bundle = pickle.load(file)
        assert list(bundle) == ["step", "opt_state", "model_state", "rng", "extensions_state"]
        assert bundle["step"] == 7
        np.testing.assert_array_equal(bundle["model_state"]["layer"]["kernel"], state.params["layer"]["kernel"])

    def test_what_the_reference_wrote_is_read_whatever_it_is_called(self, tmp_path):
        model, optimizer = Busy(rngs=nnx.Rngs(1)), optax.adam(1e-2)
        bundle = {
            "step": 5,
            "opt_state": optimizer.init(nnx.state(model, nnx.Param)),
            "model_state": nnx.state(model),
            "rng": jax.random.PRNGKey(1),
            "extensions_state": {},
        }
        (tmp_path / "old.msgpack").write_bytes(pickle.dumps(bundle))
        loaded = load_state(tmp_path / "old.msgpack", like=create(Busy(), rng=jax.random.PRNGKey(0)))
        assert_equal(loaded, create(model, rng=jax.random.PRNGKey(1)).replace(step=jnp.int32(5)))

    def test_the_live_weight_of_an_extension_stays(self, tmp_path):
        path = save_state(tmp_path / "s.pkl", create(Linear(), extensions=EXTENSIONS))
        light = Counting()
        light.weight = 0.25
        loaded = load_state(path, like=create(Linear(), extensions={"size": light}))
        assert loaded.extensions["size"]["weight"] == 0.25

    def test_one_that_does_not_fit_is_refused_by_name(self, tmp_path):
        path = save_state(tmp_path / "s.pkl", create(Busy()))
        with pytest.raises(
            CheckpointError, match=r"params/inner/kernel: \(4, 8\) float32 in the file, \(4, 9\) float32"
        ):
            load_state(path, like=create(Busy(width=9)))

    def test_one_that_would_run_code_does_not(self, tmp_path):
        class Evil:
            def __reduce__(self):
                return os.system, ("touch " + str(tmp_path / "ran"),)

        (tmp_path / "evil.pkl").write_bytes(pickle.dumps({"step": Evil()}))
        with pytest.raises(CheckpointError, match="Nothing in it was executed"):
            load_state(tmp_path / "evil.pkl", like=create(Linear()))
        assert not (tmp_path / "ran").exists()

    def test_a_trainer_saves_and_loads_them(self, tmp_path):
        trainer = Trainer(Busy(), config(), loss_fn=squared_error)
        trainer.train_step(regression())
        path = trainer.save_checkpoint(tmp_path / "s.pkl")
        other = Trainer(Busy(rngs=nnx.Rngs(5)), config(), loss_fn=squared_error)
        other.load_checkpoint(path)
        assert other.step == 1
        assert_equal(other.state, trainer.state)


class TestParts:
    def test_only_what_is_named_is_loaded(self, tmp_path):
        saved = create(Busy(rngs=nnx.Rngs(1)), rng=jax.random.key(1)).replace(step=jnp.int32(9))
        here = create(Busy(rngs=nnx.Rngs(2)), optax.sgd(0.1))
        loaded = load_state(save_state(tmp_path / "s.msgpack", saved), like=here, only=("params", "step"))
        assert_equal(loaded.params, saved.params)
        assert_equal((loaded.rng, loaded.model_state), (here.rng, here.model_state))
        assert int(loaded.step) == 9
        jax.tree.map(lambda leaf: leaf.delete(), loaded)
        here.check_alive()

    def test_an_unknown_part_is_refused(self, tmp_path):
        path = save_state(tmp_path / "s.msgpack", create(Linear()))
        with pytest.raises(
            ArgumentError, match="`only` names 'parms', which is no field of a state; did you mean 'para"
        ):
            load_state(path, like=create(Linear()), only=["parms"])

    def test_what_does_not_fit_may_keep_its_value(self, tmp_path):
        path = save_state(tmp_path / "s.msgpack", create(Busy(rngs=nnx.Rngs(1), width=8)))
        here = create(Busy(rngs=nnx.Rngs(2), features=5, width=8))
        with pytest.warns(
            UserWarning, match=r"not loaded: params/inner/kernel: \(4, 8\) float32 in the file, \(5, 8\)"
        ):
            loaded = load_state(path, like=here, strict=False)
        assert_equal(loaded.params["inner"]["kernel"], here.params["inner"]["kernel"])
        assert_equal(loaded.params["outer"], create(Busy(rngs=nnx.Rngs(1), width=8)).params["outer"])


class TestLatest:
    def save(self, directory, *steps):
        for step in steps:
            save_state(directory / f"checkpoint_{step}.msgpack", create(Linear()).replace(step=jnp.int32(step)))

    def test_it_is_the_one_of_the_highest_step(self, tmp_path):
        self.save(tmp_path, 100, 9, 20)
        (tmp_path / "checkpoint_0999.msgpack").write_text("")
        (tmp_path / "checkpoint_500.msgpack.tmp").write_text("")
        assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint_100.msgpack"

    def test_there_is_none_where_nothing_was_saved(self, tmp_path):
        assert latest_checkpoint(tmp_path) is None
        assert latest_checkpoint(tmp_path / "absent") is None

    def test_a_damaged_one_is_passed_over_aloud(self, tmp_path):
        self.save(tmp_path, 1, 2, 3)
        newest = tmp_path / "checkpoint_3.msgpack"
        newest.write_bytes(newest.read_bytes()[:-20])
        (tmp_path / "checkpoint_2.msgpack").write_bytes(b"")
        with pytest.warns(
            UserWarning, match=r"checkpoint_1.msgpack`, since .*_3.msgpack` is damaged.*_2.msgpack` is no checkpoint of"
        ):
            assert latest_checkpoint(tmp_path) == tmp_path / "checkpoint_1.msgpack"

    def test_if_all_are_damaged_it_says_so(self, tmp_path):
        (tmp_path / "checkpoint_3.msgpack").write_bytes(b"")
        with pytest.raises(
            CheckpointError, match=r"no checkpoint in .* can be used: .*_3.msgpack` is no checkpoint of"
        ):
            latest_checkpoint(tmp_path)


class TestRefusals:
    @pytest.fixture
    def path(self, tmp_path):
        return save_state(tmp_path / "s.msgpack", create(Busy()))

    def refused(self, path, like=None):
        like = create(Busy()) if like is None else like
        before = jax.tree.map(lambda leaf: leaf, like)
        with pytest.raises(CheckpointError) as caught:
            load_state(path, like=like)
        chex.assert_trees_all_equal(like.params, before.params)
        assert str(path) in str(caught.value)
        return str(caught.value)

    def test_all_arrays_that_do_not_fit_are_named(self, path):
        message = self.refused(path, create(Busy(width=9)))
        assert "params/inner/kernel: (4, 8) float32 in the file, (4, 9) float32 here" in message
        assert "opt_state/0/mu/outer/kernel: (8, 1) float32 in the file, (9, 1) float32 here" in message

    def test_another_optimizer_is_named(self, path):
        message = self.refused(path, create(Busy(), optax.sgd(0.1, momentum=0.9)))
        assert "opt_state/0/trace/inner/bias: not in the file, (8,) float32 here" in message
        assert "opt_state/0/nu/inner/bias: (8,) float32 in the file, nothing here" in message

    def test_another_dtype_or_key_is_named(self, path):
        raw = create(Busy(), rng=jax.random.PRNGKey(0))
        assert "rng: (2,) key<threefry2x32> in the file, (2,) uint32 here" in self.refused(path, raw)

    def test_a_long_list_is_cut(self, path):
        message = self.refused(path, create(Containers(nnx.Rngs(0))))
        assert message.count(";") == 20
        assert message.endswith(" more.")

    def test_no_file(self, tmp_path):
        assert "could not be read" in self.refused(tmp_path / "absent.msgpack")

    def test_a_64_bit_array_says_what_it_needs(self, path):
        with Bundle(path) as bundle:
            leaves = [(leaf, functools.partial(bundle.read, leaf)) for leaf in bundle.leaves]
            wide = dataclasses.replace(leaves[0][0], dtype="float64"), lambda: np.zeros(8, np.float64)
            write_bundle(path, {}, [wide, *leaves[1:]])
        assert "params/inner/bias: (8,) float64 in the file (64 bits need jax_enable_x64)" in self.refused(path)

    def test_a_donated_state(self, tmp_path):
        state = create(Linear())
        state.params["layer"]["bias"].delete()
        with pytest.raises(StateError, match="`state` was donated"):
            save_state(tmp_path / "s.msgpack", state)

    def test_the_trainer_is_as_it_was(self, path):
        trainer = Trainer(Busy(width=9), config(), loss_fn=squared_error)
        state = trainer.state
        with pytest.raises(CheckpointError):
            trainer.load_checkpoint(path)
        assert trainer.state is state


def test_a_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file/s.msgpack` could not be written: \[Errno"):
        save_state(tmp_path / "file" / "s.msgpack", create(Linear()))


def test_numbers_and_arrays_of_callbacks_come_back_and_other_objects_are_refused(tmp_path):
    state = create(Linear())
    numbers = {"best": np.float32(0.5), "counts": np.arange(3), "scores": [jnp.float32(2.0)]}
    save_state(tmp_path / "s.msgpack", state, progress={"listeners": [numbers]})
    found = load_with_progress(tmp_path / "s.msgpack", state).progress
    counts = found["listeners"][0].pop("counts")
    assert (type(counts), counts.dtype, counts.tolist()) == (np.ndarray, numbers["counts"].dtype, [0, 1, 2])
    assert found == {"listeners": [{"best": 0.5, "scores": [2.0]}]}
    with pytest.raises(
        CheckpointError, match=r"`progress.listeners\[0\]` is an object of type object, which no checkp"
    ):
        save_state(tmp_path / "s.msgpack", state, progress={"listeners": [object()]})
    again = load_with_progress(tmp_path / "s.msgpack", state).progress
    assert again["listeners"][0].pop("counts").tolist() == [0, 1, 2]
    assert again == found


@pytest.mark.parametrize("suffix", ["msgpack", "orbax", "pkl"])
class TestTemplatesWithoutArraysOfJax:
    SAVED = staticmethod(lambda: create(Busy(rngs=nnx.Rngs(1)), rng=jax.random.key(1, impl="rbg")))
    LIKE = {
        "shapes": lambda: jax.eval_shape(TestTemplatesWithoutArraysOfJax.SAVED),
        "arrays of NumPy": lambda: jax.device_get(TestTemplatesWithoutArraysOfJax.SAVED()),
    }

    @pytest.mark.parametrize("like", LIKE)
    def test_a_state_comes_back_equal(self, like, suffix, tmp_path, compilations):
        saved = self.SAVED()
        loaded = load_state(save_state(tmp_path / f"s.{suffix}", saved), like=self.LIKE[like]())
        assert_equal(loaded, saved)
        step = jax.jit(make_train_step(squared_error, optax.adam(1e-2)))
        step(saved, regression())
        step(loaded, regression())
        assert compilations["jit(train_step)"] == 1

    def test_of_shapes_only_what_is_named_takes_memory(self, suffix, tmp_path):
        saved = self.SAVED()
        loaded = load_state(save_state(tmp_path / f"s.{suffix}", saved), like=self.LIKE["shapes"](), only=["params"])
        assert_equal(loaded.params, saved.params)
        assert all(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves((loaded.opt_state, loaded.rng)))


@pytest.mark.parametrize("suffix", ["msgpack", "orbax"])
def test_the_states_of_an_ensemble_come_back(suffix, tmp_path):
    members = jax.vmap(lambda key: create(Linear(rngs=nnx.Rngs(key)), rng=key))(jax.random.split(jax.random.key(0), 3))
    members = members.replace(step=jnp.int32([4, 6, 5]))
    path = save_state(tmp_path / f"s.{suffix}", members)
    assert_equal(load_state(path, like=members), members)
    with open_source(path) as source:
        assert source.info["step"] == 6  # for people


def test_a_pickle_has_one_step(tmp_path):
    members = jax.vmap(lambda key: create(Linear(rngs=nnx.Rngs(key)), rng=key))(jax.random.split(jax.random.key(0), 3))
    with pytest.raises(CheckpointError, match=r"a pickle holds one step, and `state.step` has the shape \(3,\)"):
        save_state(tmp_path / "s.pkl", members)
