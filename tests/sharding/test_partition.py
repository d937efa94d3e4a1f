"""Meshes, partition rules, states sharded from birth, and that sharded training is the same training."""

import itertools
import re

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
from trainer import ArgumentError, ArgumentTypeError, BatchError, Extension, TrainState, make_eval_step, make_train_step
from trainer.sharding import (
    abstract_state,
    batch_sharding,
    bytes_per_device,
    check_batch_fits,
    create_sharded,
    describe,
    jit_step,
    make_mesh,
    partition,
    shardings_of,
)

ADAM = optax.adam(1e-3)
TENSOR = {
    "params/layers/0/kernel": P(None, "tensor"),
    "params/layers/0/bias": P("tensor"),
    "params/layers/2/kernel": P("tensor", None),
}


INIT = nnx.initializers.lecun_normal()

BOTH = {
    "params/layers/0/kernel": P("fsdp", "tensor"),
    "params/layers/0/bias": P("tensor"),
    "params/layers/2/kernel": P("tensor", "fsdp"),
}


class Perceptron(nnx.Module):
    """Two layers with dropout between them: leaves worth splitting, and leaves that are not."""

    def __init__(self, rngs, width=512, features=64, kernel_init=INIT):
        self.layers = nnx.List(
            [
                nnx.Linear(features, width, kernel_init=kernel_init, rngs=rngs),
                nnx.Dropout(0.1, rngs=rngs),
                nnx.Linear(width, features, rngs=rngs),
            ]
        )

    def __call__(self, x):
        inner, dropout, outer = self.layers
        return outer(dropout(nnx.relu(inner(x))))


def squared_error(model, batch, rng, step):
    del rng, step
    return jnp.mean((model(batch["input"]) - batch["target"]) ** 2), {}


def batch(seed=0, examples=64, features=64):
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=(examples, features)).astype(np.float32) for name in ("input", "target")}


def create(axes, optimizer=ADAM, model_fn=Perceptron, rng=None, **how):
    rng = jax.random.key(0) if rng is None else rng
    return create_sharded(model_fn, optimizer, rng=rng, mesh=make_mesh(axes), **how)


def shapes_of(optimizer=ADAM, model_fn=Perceptron, **how):
    def init():
        return TrainState.create(model_fn(nnx.Rngs(0)), optimizer, rng=jax.random.key(0), **how)

    return jax.eval_shape(init)


def specs(tree):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(sharding.spec)
        for path, sharding in jax.tree.leaves_with_path(tree)
    }


class TestMesh:
    def test_an_open_size_takes_what_is_left(self):
        assert dict(make_mesh({"data": -1, "fsdp": 2, "tensor": 2}).shape) == {"data": 2, "fsdp": 2, "tensor": 2}

    def test_the_compiler_may_partition_over_every_axis(self):
        assert set(make_mesh({"data": 2, "fsdp": 4}).axis_types) == {jax.sharding.AxisType.Auto}

    def test_the_devices_can_be_chosen(self):
        mesh = make_mesh({"data": 2}, jax.devices()[4:6])
        assert set(mesh.devices.flat) == set(jax.devices()[4:6])

    @pytest.mark.parametrize(
        ("axes", "message"),
        [
            ({"data": 3, "fsdp": -1}, "needs a multiple of 3 devices, and there are 8; change the sizes."),
            ({"data": 2}, "needs 2 devices, and there are 8; change the sizes, or pass `devices` = jax.devices()[:2]."),
            ({"data": 16}, "needs 16 devices, and there are 8; change the sizes."),
            ({"data": -1, "fsdp": -1}, "`axes` leaves 'data' and 'fsdp' open; at most one size can be -1."),
            ({"data": 0}, "`axes['data']` is 0; it must be positive; -1 takes the remaining devices."),
            ({"data": 2.0}, "`axes['data']` is 2.0; it must be an integer; -1 takes the remaining devices."),
            ({}, "`axes` is {}; it must map names of axes to sizes"),
        ],
    )
    def test_sizes_that_do_not_fit_are_refused(self, axes, message):
        with pytest.raises(ArgumentError, match=re.escape(message)):
            make_mesh(axes)


class TestAutomaticRule:
    MESH = property(lambda self: make_mesh({"data": 2, "fsdp": 4}))

    @pytest.mark.parametrize(
        ("shape", "spec"),
        [
            ((512, 256), ("fsdp", None)),
            ((256, 512), (None, "fsdp")),
            ((256, 256), (None, "fsdp")),  # the last among equals
            ((1022, 256), (None, "fsdp")),  # 1022 is no multiple of 4
            ((511, 257), ()),
            ((255, 256), ()),  # just too small to be worth it
            ((2**16,), ("fsdp",)),
        ],
    )
    def test_the_largest_dimension_that_can_be_split_is(self, shape, spec):
        shape = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
        assert tuple(partition({"x": shape}, self.MESH)["x"].spec) == spec

    def test_a_tree_may_be_one_leaf(self):
        assert tuple(partition(jnp.zeros((512, 256)), self.MESH).spec) == ("fsdp", None)

    def test_small_leaves_can_be_split_too(self):
        shape = jax.ShapeDtypeStruct((8,), jnp.float32)
        assert tuple(partition({"x": shape}, self.MESH, min_size=8)["x"].spec) == ("fsdp",)

    def test_keys_are_replicated_however_many_there_are(self):
        keys = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 2**16))
        assert tuple(partition({"keys": keys}, self.MESH)["keys"].spec) == ()

    def test_without_the_axis_everything_is_replicated(self):
        assert set(specs(partition(shapes_of(), make_mesh({"data": 8}), min_size=0)).values()) == {()}


class TestRules:
    MESH = property(lambda self: make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))

    def test_the_first_match_wins(self):
        rules = {"params/.*/0/kernel": P("tensor"), "params/.*/kernel": P(None, "tensor")}
        found = specs(partition(shapes_of(), self.MESH, rules))
        assert found["params/layers/0/kernel"] == ("tensor",)
        assert found["params/layers/2/kernel"] == (None, "tensor")

    def test_the_optimizer_follows_and_can_be_ruled_by_itself(self):
        found = specs(partition(shapes_of(), self.MESH, {**TENSOR, "opt_state/0/nu/layers/0/kernel": P("fsdp")}))
        assert found["opt_state/0/mu/layers/0/kernel"] == (None, "tensor")
        assert found["opt_state/0/nu/layers/0/kernel"] == ("fsdp",)
        assert found["opt_state/0/mu/layers/0/bias"] == ("tensor",)
        assert found["opt_state/0/count"] == ()

    def test_everything_wrong_is_reported_at_once(self):
        rules = {
            "params/layers/0/kernel": P("tensr"),
            "params/layers/2/kernel": P(None, None, "tensor"),
            "params/layers/0/bias": P(("data", "data")),
            "kernel": P(),
            "parms/layers/2/bias": P(),
        }
        with pytest.raises(ArgumentError) as caught:
            partition(shapes_of(), self.MESH, rules)
        assert str(caught.value) == (
            "`tree` cannot be partitioned over the mesh {'data': 2, 'fsdp': 2, 'tensor': 2}: "
            "the rule 'params/layers/0/kernel' splits as P('tensr',), and the mesh has no axis 'tensr': "
            "did you mean 'tensor'? (one of size 1 costs nothing); "
            "`params/layers/0/bias` of shape (512,) is split by the rule 'params/layers/0/bias' as "
            "P(('data', 'data'),), which uses an axis twice; "
            "`params/layers/2/kernel` of shape (512, 64) is split by the rule 'params/layers/2/kernel' as "
            "P(None, None, 'tensor'), which has 3 dimensions; a pattern can be narrowed to other paths; "
            "the rule 'kernel' matches no whole path; the nearest are params/layers/0/kernel, "
            "params/layers/2/kernel, opt_state/0/mu/layers/0/kernel; "
            "the rule 'parms/layers/2/bias' matches no whole path; the nearest are params/layers/2/bias, "
            "params/layers/0/bias, params/layers/2/kernel."
        )

    def test_an_axis_that_the_mesh_lacks_is_told_once_a_rule_and_not_once_a_leaf(self):
        with pytest.raises(ArgumentError) as caught:
            partition(shapes_of(), make_mesh({"data": 8}), {".*/kernel": P(("data", "tensor"))})
        assert str(caught.value) == (
            "`tree` cannot be partitioned over the mesh {'data': 8}: the rule '.*/kernel' splits as "
            "P(('data', 'tensor'),), and the mesh has no axis 'tensor': known: data (one of size 1 costs nothing)."
        )

    def test_a_dimension_that_cannot_be_split_is_named(self):
        with pytest.raises(ArgumentError, match=r"dimension 0 of length 511 cannot be split in 4"):
            partition({"x": jnp.zeros((511, 2))}, self.MESH, {"x": P(("data", "fsdp"))})

    def test_a_rule_that_comes_too_late_is_named(self):
        with pytest.raises(ArgumentError, match=r"the rule 'params/layers/0/bias' decides nothing, since names in"):
            partition(shapes_of(), self.MESH, {"params/.*": P(), "params/layers/0/bias": P("tensor")})

    @pytest.mark.parametrize(
        ("rules", "message"),
        [
            ([("params", P())], "`rules` is of type list; it must map patterns to specs"),
            (
                {"params": "tensor"},
                "`rules['params']` is 'tensor' of type str; it must be a jax.sharding.PartitionSpec",
            ),
            ({"(": P()}, "`rules` has the pattern '(', which is no regular expression"),
        ],
    )
    def test_rules_of_another_kind_are_refused(self, rules, message):
        with pytest.raises(ArgumentError, match=re.escape(message)):
            partition(shapes_of(), self.MESH, rules)


NAMED = nnx.with_partitioning(INIT, ("embed", "mlp"))


def named(rngs):
    return Perceptron(rngs, kernel_init=NAMED)


class TestNamesInMetadata:
    MEANING = {"embed": "fsdp", "mlp": "tensor"}
    MESH = property(lambda self: make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))

    def abstract(self, model_fn=named, **how):
        return abstract_state(model_fn, ADAM, rng=jax.random.key(0), mesh=self.MESH, **how)

    def test_names_decide_before_rules_and_the_optimizer_follows(self):
        rules = {".*/kernel": P("fsdp")}
        found = specs(shardings_of(self.abstract(logical_axes=self.MEANING, rules=rules)))
        assert found["params/layers/0/kernel"] == found["opt_state/0/mu/layers/0/kernel"] == ("fsdp", "tensor")
        assert found["params/layers/2/kernel"] == found["opt_state/0/mu/layers/2/kernel"] == ("fsdp",)

    def test_a_name_can_mean_that_a_dimension_stays_whole(self):
        found = specs(shardings_of(self.abstract(logical_axes={"embed": None, "mlp": ("fsdp", "tensor")})))
        assert found["params/layers/0/kernel"] == (None, ("fsdp", "tensor"))

    def test_a_name_of_the_mesh_means_itself(self):
        init = nnx.with_partitioning(INIT, (None, "tensor"))
        found = specs(shardings_of(self.abstract(lambda rngs: Perceptron(rngs, kernel_init=init))))
        assert found["params/layers/0/kernel"] == (None, "tensor")

    def test_the_meaning_that_flax_was_told_holds(self):
        with nnx.logical_axis_rules(tuple(self.MEANING.items())):
            found = specs(shardings_of(self.abstract()))
        assert found["params/layers/0/kernel"] == ("fsdp", "tensor")

    def test_a_name_without_a_meaning_is_refused(self):
        expected = (
            r"by the names \('embed', 'mlp'\) in its metadata as P\('embed', 'tensor'\), and the mesh has no axis"
        )
        with pytest.raises(ArgumentError, match=expected + r".*`with flax.core.spmd.logical_axis_rules\(\.\.\.\):`"):
            self.abstract(logical_axes={"mlp": "tensor"})

    def test_a_rule_that_names_overrule_is_refused(self):
        with pytest.raises(ArgumentError, match="decides nothing, since names in metadata or rules before it"):
            self.abstract(logical_axes=self.MEANING, rules={"params/layers/0/kernel": P()})

    def test_the_state_is_created_as_named_and_trains(self):
        state = create(dict(self.MESH.shape), model_fn=named, logical_axes=self.MEANING)
        assert state.params["layers"][0]["kernel"].sharding.spec == P("fsdp", "tensor")
        _, metrics = jit_step(make_train_step(squared_error, ADAM), state)(state, batch())
        assert np.isfinite(metrics["loss"])


def labels(params):
    return jax.tree.map_with_path(lambda path, _: "a" if "0" in str(path) else "b", params)


def matrices(params):
    return jax.tree.map(lambda leaf: leaf.ndim > 1, params)


AVERAGED = optax.chain(optax.clip_by_global_norm(1.0), optax.scale_by_adam(), optax.ema(0.99), optax.scale(-1e-3))

# With how many copies of a kernel, of its shape, the state holds.
OPTIMIZERS = {
    "adamw": (optax.adamw(1e-3), 2),
    "momentum": (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1, momentum=0.9)), 1),
    "amsgrad": (optax.amsgrad(1e-3), 3),
    "ema": (optax.ema(0.99), 1),
    "ema in a chain": (AVERAGED, 3),
    "ema in multi_steps": (optax.MultiSteps(AVERAGED, every_k_schedule=2), 4),
    "ema in masked": (optax.masked(AVERAGED, matrices), 3),
    "ema in partition": (optax.partition({"a": AVERAGED, "b": AVERAGED}, labels), 3),
    "multi_transform": (optax.multi_transform({"a": optax.adam(1e-3), "b": optax.adamax(1e-3)}, labels), 2),
    "injected number": (optax.inject_hyperparams(optax.adam)(learning_rate=1e-3), 2),
    "injected schedule": (optax.inject_hyperparams(optax.adam)(optax.linear_schedule(1e-3, 0.0, 10)), 2),
    "apply_if_finite": (optax.apply_if_finite(optax.adam(1e-3), 3), 2),
    "schedule_free": (optax.contrib.schedule_free(optax.adam(1e-3), 1e-3), 3),
    "momentum of adafactor": (optax.adafactor(1e-3, min_dim_size_to_factor=8, momentum=0.9), 1),
}


class TestFollowing:
    MESH = property(lambda self: make_mesh({"data": 2, "fsdp": 2, "tensor": 2}))

    @pytest.mark.parametrize("name", OPTIMIZERS)
    @pytest.mark.parametrize("how", [{"rules": TENSOR}, {"min_size": 256}], ids=["rules", "automatic"])
    def test_the_state_of_the_optimizer_lies_as_its_params(self, name, how):
        optimizer, copies = OPTIMIZERS[name]
        shapes = shapes_of(optimizer)
        found = partition(shapes, self.MESH, **how)
        wanted = specs(found.params)
        places = zip(specs(found.opt_state).items(), jax.tree.leaves(shapes.opt_state), strict=True)
        followed = []
        for (path, spec), leaf in places:
            param = path[path.find("layers") :]
            if leaf.shape == {"layers/0/kernel": (64, 512), "layers/2/kernel": (512, 64)}.get(param):
                assert spec == wanted[param], path
                followed.append(param)
            elif leaf.shape == {"layers/0/bias": (512,), "layers/2/bias": (64,)}.get(param):
                assert spec == wanted[param], path
            elif "kernel" not in path:
                assert spec == (), path
        assert followed.count("layers/0/kernel") == followed.count("layers/2/kernel") == copies

    def test_rows_and_columns_lie_as_what_is_left_of_their_param(self):
        optimizer = optax.adafactor(1e-3, min_dim_size_to_factor=8)
        found = specs(partition(shapes_of(optimizer), self.MESH, BOTH).opt_state[0])
        assert {path: spec for path, spec in found.items() if path.startswith("v_") and path.endswith("kernel")} == {
            "v_row/layers/0/kernel": ("fsdp",),  # 64 of (64, 512)
            "v_col/layers/0/kernel": ("tensor",),
            "v_row/layers/2/kernel": ("fsdp",),  # 64 of (512, 64)
            "v_col/layers/2/kernel": ("tensor",),
        }
        assert found["v/layers/0/bias"] == ("tensor",)
        assert found["v/layers/0/kernel"] == ()  # one zero that stands for what is factored

    def test_a_row_that_could_be_a_column_falls_to_the_automatic_rule(self):
        optimizer = optax.adafactor(1e-3, min_dim_size_to_factor=8)
        shapes = shapes_of(optimizer, lambda rngs: Perceptron(rngs, width=64))
        found = specs(partition(shapes, self.MESH, {"params/layers/0/kernel": P("tensor", None)}).opt_state[0])
        assert found["v_row/layers/0/kernel"] == found["v_col/layers/0/kernel"] == ()

    def test_a_memory_of_several_params_keeps_its_first_dimension_whole(self):
        found = specs(partition(shapes_of(optax.lbfgs(memory_size=4)), self.MESH, BOTH).opt_state[0])
        assert found["diff_params_memory/layers/0/kernel"] == (None, "fsdp", "tensor")
        assert found["diff_updates_memory/layers/2/bias"] == (None,)
        assert found["weights_memory"] == ()

    def test_a_longer_path_is_never_taken_for_a_shorter_one(self):
        class Twice(Perceptron):
            def __init__(self, rngs):
                super().__init__(rngs)
                self.kernel = nnx.Param(jnp.zeros(64))

        shapes = shapes_of(optax.adafactor(1e-3, min_dim_size_to_factor=8), Twice)
        found = specs(partition(shapes, self.MESH, {**BOTH, "params/kernel": P("data")}).opt_state[0])
        assert found["v_row/layers/0/kernel"] == ("fsdp",)
        assert found["v/kernel"] == ("data",)

    def test_names_in_metadata_reach_rows_and_columns(self):
        optimizer = optax.adafactor(1e-3, min_dim_size_to_factor=8)
        meaning = {"embed": "fsdp", "mlp": "tensor"}
        abstract = abstract_state(named, optimizer, rng=jax.random.key(0), mesh=self.MESH, logical_axes=meaning)
        found = specs(shardings_of(abstract.opt_state[0]))
        assert found["v_row/layers/0/kernel"] == ("fsdp",)
        assert found["v_col/layers/0/kernel"] == ("tensor",)

    def test_an_average_of_the_params_in_an_extension_lies_as_they_do(self):
        class Average(Extension):
            def __init__(self, rngs):
                super().__init__(rngs=rngs)
                self.average = Perceptron(rngs)

        shapes = shapes_of(extensions={"ema": Average(nnx.Rngs(1))})
        found = specs(partition(shapes, self.MESH, TENSOR))
        assert found["extensions/ema/variables/average/layers/0/kernel"] == (None, "tensor")
        assert found["extensions/ema/weight"] == ()


class TestBirth:
    """Created in parts, equal to the bit, and never whole."""

    @pytest.mark.parametrize(
        ("rng", "axes"),
        slow_unless(
            lambda rng, axes: "fsdp" in axes and (rng.ndim == 0) == ("tensor" not in axes),
            itertools.product(
                [jax.random.key(3), jax.random.PRNGKey(3)],
                [{"data": 8}, {"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2}],
            ),
        ),
    )
    @pytest.mark.few(1)
    def test_it_is_the_state_that_one_device_would_have_created(self, axes, rng):
        rules = TENSOR if "tensor" in axes else None
        state = create(axes, rng=rng, rules=rules, min_size=256)

        @jax.jit
        def alone(rng):
            model_rng, rng = jax.random.split(rng)
            return TrainState.create(Perceptron(nnx.Rngs(model_rng)), ADAM, rng=rng)

        chex.assert_trees_all_equal(state, alone(rng))

    def test_no_device_ever_held_the_whole(self):
        mesh = make_mesh({"fsdp": 8})
        width = 2**14
        whole = 64 * width * 4
        before = jax.live_arrays()

        def wide(rngs):
            return Perceptron(rngs, width=width)

        state = create_sharded(wide, ADAM, rng=jax.random.key(0), mesh=mesh)
        kernel = state.params["layers"][0]["kernel"]
        assert {shard.data.nbytes for shard in kernel.addressable_shards} == {whole // 8}
        born = [array for array in jax.live_arrays() if not any(array is other for other in before)]
        assert max(shard.data.nbytes for array in born for shard in array.addressable_shards) == whole // 8

        # Beside its results the program needs less than one whole leaf: random bits are drawn in parts too.
        def init(rng):
            return TrainState.create(wide(nnx.Rngs(rng)), ADAM, rng=rng)

        compiled = jax.jit(init, out_shardings=shardings_of(state)).lower(jax.random.key(0)).compile()
        assert compiled.memory_analysis().temp_size_in_bytes < whole

    def test_its_abstract_twin_has_its_type_and_computes_nothing(self, compilations):
        mesh = make_mesh({"data": 2, "fsdp": 4})
        abstract = abstract_state(Perceptron, ADAM, rng=jax.random.key(0), mesh=mesh)
        assert not {name for name in compilations if "init" in name}
        state = create({"data": 2, "fsdp": 4})
        assert jax.tree.structure(abstract) == jax.tree.structure(state)
        assert shardings_of(abstract) == shardings_of(state)
        assert bytes_per_device(abstract) == bytes_per_device(state)

    def test_a_module_in_place_of_its_maker_is_refused(self):
        with pytest.raises(ArgumentTypeError, match=r"`model_fn` is of type Perceptron; it must be a callable"):
            create({"data": 8}, model_fn=Perceptron(nnx.Rngs(0)))


class TestDescription:
    def test_it_counts_what_each_device_holds(self):
        state = create({"data": 2, "fsdp": 2, "tensor": 2}, rules=TENSOR)
        held = dict.fromkeys(jax.devices(), 0)
        for leaf in jax.tree.leaves(state):
            data = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
            for shard in data.addressable_shards:
                held[shard.device] += shard.data.nbytes
        assert set(held.values()) == {bytes_per_device(state)}
        lines = describe(state).splitlines()
        assert len(lines) == len(jax.tree.leaves(state)) + 2
        assert lines[2].split() == ["params/layers/0/kernel", "float32[64,512]", "P(None,", "'tensor')", "65,536"]
        assert lines[-1].split()[:2] == ["total", f"{bytes_per_device(state):,}"]

    def test_what_lies_on_no_mesh_is_refused(self):
        with pytest.raises(
            ArgumentTypeError, match=r"`x` has the sharding SingleDeviceSharding.*which is not over a mesh"
        ):
            describe({"x": jnp.zeros(3)})


LAYOUTS = {
    "data": ({"data": 8}, {}),
    "fsdp": ({"fsdp": 8}, {"min_size": 256}),
    "tensor": ({"tensor": 8}, {"rules": TENSOR}),
    "data x fsdp": ({"data": 2, "fsdp": 4}, {"min_size": 256}),
    "data x tensor": ({"data": 4, "tensor": 2}, {"rules": TENSOR}),
    "fsdp x tensor": ({"fsdp": 4, "tensor": 2}, {"rules": BOTH}),
    "data x fsdp x tensor": ({"data": 2, "fsdp": 2, "tensor": 2}, {"rules": BOTH}),
}


def on_host(tree):
    return jax.tree.map(np.asarray, tree)


def train(state, step, steps=20):
    losses = []
    for seed in range(steps):
        state, metrics = step(state, batch(seed))
        losses.append(metrics["loss"])
    return state, np.array(losses)


@pytest.fixture(scope="module")
def alone():
    """The losses and the state of twenty steps on one device."""
    state = create_sharded(Perceptron, ADAM, rng=jax.random.key(0), mesh=make_mesh({"data": 1}, jax.devices()[:1]))
    step = jax.jit(make_train_step(squared_error, ADAM))
    return train(state, step)


class TestTraining:
    @pytest.mark.parametrize("layout", slow_unless({"fsdp", "data x fsdp x tensor"}.__contains__, LAYOUTS))
    @pytest.mark.few(1)
    def test_twenty_steps_are_those_of_one_device(self, layout, alone, compilations):
        axes, how = LAYOUTS[layout]
        state = create(axes, **how)
        before, held = shardings_of(state), bytes_per_device(state)
        leaves = jax.tree.leaves(state)
        state, losses = train(state, jit_step(make_train_step(squared_error, ADAM), state))
        # Sums over the batch and over split dimensions add in another order: some units in the last place of
        # float32 (6e-8) a step. Dropout draws the same masks, or the losses would differ in the third digit.
        np.testing.assert_allclose(losses, alone[1], rtol=2e-6)
        # Adam scales up gradients near zero, rounding included: of the 2e-2 that twenty steps can move a weight a
        # thousandth may differ.
        chex.assert_trees_all_close(on_host(state.params), on_host(alone[0].params), rtol=0, atol=2e-5)
        assert compilations["jit(train_step)"] == 1
        assert all(leaf.is_deleted() for leaf in leaves)
        assert shardings_of(state) == before
        assert bytes_per_device(state) == held

    def test_an_evaluation_needs_nothing_special(self, alone):
        evaluate = jax.jit(make_eval_step(squared_error))
        state = create({"data": 2, "fsdp": 4}, min_size=256)
        placed = jax.device_put(batch(), batch_sharding(make_mesh({"data": 2, "fsdp": 4})))
        one = create_sharded(Perceptron, ADAM, rng=jax.random.key(0), mesh=make_mesh({"data": 1}, jax.devices()[:1]))
        np.testing.assert_allclose(evaluate(state, placed)["loss"], evaluate(one, batch())["loss"], rtol=1e-6)

    @pytest.mark.parametrize(
        ("axes", "parts"), [pytest.param({"fsdp": 8}, 8, marks=pytest.mark.slow), ({"data": 2, "fsdp": 4}, 4)]
    )
    def test_fsdp_holds_its_part_before_and_after_a_step(self, axes, parts):
        state = create(axes, min_size=256)
        after, _ = jit_step(make_train_step(squared_error, ADAM), state)(state.copy(), batch())
        for held_state in (state, after):
            leaves = [x for x in jax.tree.leaves(held_state) if not jnp.issubdtype(x.dtype, jax.dtypes.prng_key)]
            whole = sum(leaf.nbytes for leaf in leaves)
            replicated = sum(leaf.nbytes for leaf in leaves if leaf.sharding.is_fully_replicated)
            held = dict.fromkeys(jax.devices(), 0)
            for leaf in leaves:
                for shard in leaf.addressable_shards:
                    held[shard.device] += shard.data.nbytes
            assert set(held.values()) == {(whole - replicated) // parts + replicated}
            assert replicated < 0.01 * whole

    @pytest.mark.parametrize("name", ["adafactor", pytest.param("ema in multi_steps", marks=pytest.mark.slow)])
    @pytest.mark.slow
    def test_what_an_optimizer_keeps_besides_changes_no_step(self, name):
        optimizer = {**OPTIMIZERS, "adafactor": (optax.adafactor(1e-3, min_dim_size_to_factor=8), 0)}[name][0]
        step = make_train_step(squared_error, optimizer)
        one = create_sharded(
            Perceptron, optimizer, rng=jax.random.key(0), mesh=make_mesh({"data": 1}, jax.devices()[:1])
        )
        _, expected = train(one, jax.jit(step), steps=5)
        state = create({"data": 2, "fsdp": 2, "tensor": 2}, optimizer, rules=BOTH)
        before = shardings_of(state)
        state, losses = train(state, jit_step(step, state), steps=5)
        np.testing.assert_allclose(losses, expected, rtol=2e-6)
        assert shardings_of(state) == before

    def test_left_to_itself_the_compiler_moves_the_state(self):
        """Why `jit_step` exists. Should this fail, JAX may have made it superfluous."""
        state = create({"data": 2, "fsdp": 4}, min_size=2**12)
        placed = jax.device_put(batch(examples=32), batch_sharding(make_mesh({"data": 2, "fsdp": 4})))
        after, _ = jax.jit(make_train_step(squared_error, ADAM))(state, placed)
        moved = jax.tree.map(lambda a, b: not a.sharding.is_equivalent_to(b.sharding, a.ndim), after, state)
        assert any(jax.tree.leaves(moved))

    def test_a_batch_may_lie_otherwise(self):
        mesh = make_mesh({"data": 4, "tensor": 2})
        state = create(dict(mesh.shape), rules=TENSOR)
        step = jit_step(make_train_step(squared_error, ADAM), state, batch_sharding(mesh, "data", "tensor"))
        _, metrics = step(state, jax.device_put(batch(), NamedSharding(mesh, P("data", "tensor"))))
        assert np.isfinite(metrics["loss"])

    def test_over_cpu_devices_a_step_is_done_when_it_returns(self):
        """They share threads, and two calls in flight can deadlock."""
        state = create({"data": 8})
        step = jit_step(make_train_step(squared_error, ADAM), state)
        for _ in range(5):
            state, metrics = step(state, batch())
            assert all(leaf.is_ready() for leaf in jax.tree.leaves([state.params, state.opt_state, metrics]))

    def test_it_can_be_traced(self):
        state, examples = create({"data": 8}), batch()
        step = jit_step(make_train_step(squared_error, ADAM), state)
        _, metrics = jax.jit(lambda state: jax.lax.scan(lambda one, _: step(one, examples), state, length=3))(state)
        assert metrics["step"].tolist() == [1, 2, 3]


class TestBatch:
    MESH = property(lambda self: make_mesh({"data": 2, "fsdp": 2, "sequence": 2}))

    def test_its_dimensions_are_split_over_those_axes_that_there_are(self):
        assert batch_sharding(self.MESH).spec == P(("data", "fsdp"))
        assert batch_sharding(self.MESH, "fsdp", ("sequence", "tensor")).spec == P("fsdp", "sequence")
        assert batch_sharding(self.MESH, "replica", "sequence").spec == P(None, "sequence")
        assert batch_sharding(make_mesh({"tensor": 8}), "data", "sequence").spec == P()

    def test_one_that_fits_is_taken(self):
        check_batch_fits({"input": np.zeros((8, 6)), "label": np.zeros(8)}, batch_sharding(self.MESH))
        check_batch_fits({"input": jax.ShapeDtypeStruct((4, 6), jnp.int32)}, batch_sharding(self.MESH, "data", "fsdp"))

    @pytest.mark.parametrize(
        ("found", "message"),
        [
            (
                {"input": np.zeros((30, 3)), "label": np.zeros(30)},
                "`batch` cannot be split evenly over the mesh {'data': 2, 'fsdp': 2, 'sequence': 2}. "
                "`batch/input`, `batch/label`: dimension 0 of length 30 is split in 4 over data, fsdp; "
                "the nearest lengths are 28 and 32.",
            ),
            (
                {"input": np.zeros((3, 3))},
                "of length 3 is split in 4 over data, fsdp; the nearest length is 4.",
            ),
            (
                {"input": np.zeros((4, 3)), "label": np.zeros(6)},
                "`batch/label`: dimension 0 of length 6 is split in 4 over data, fsdp; the nearest lengths are 4 and",
            ),
            ([1, 2], "`batch` is a list of Python values, not an array"),
        ],
    )
    def test_one_that_does_not_is_refused(self, found, message):
        with pytest.raises(BatchError, match=re.escape(message)):
            check_batch_fits(found, batch_sharding(self.MESH))

    def test_all_that_is_wrong_is_told_at_once(self):
        found = {"token": np.zeros((6, 15)), "label": np.zeros(6)}
        with pytest.raises(BatchError) as caught:
            check_batch_fits(found, batch_sharding(self.MESH, ("data", "fsdp"), "sequence"))
        assert str(caught.value) == (
            "`batch` cannot be split evenly over the mesh {'data': 2, 'fsdp': 2, 'sequence': 2}. "
            "`batch/label`, `batch/token`: dimension 0 of length 6 is split in 4 over data, fsdp; the nearest lengths "
            "are 4 and 8; `batch/label`: no dimension 1 to split over sequence; give it a sharding of its own; "
            "`batch/token`: dimension 1 of length 15 is split in 2 over sequence; the nearest lengths are 14 and 16."
        )

    def test_each_leaf_can_have_a_sharding_of_its_own(self):
        shardings = {
            "token": batch_sharding(self.MESH, "data", "sequence"),
            "label": batch_sharding(self.MESH, "data"),
        }
        check_batch_fits({"token": np.zeros((6, 16)), "label": np.zeros(6)}, shardings)
        with pytest.raises(BatchError, match=r"`batch/token`: dimension 1 of length 15 is split in 2"):
            check_batch_fits({"token": np.zeros((6, 15)), "label": np.zeros(6)}, shardings)

    @pytest.mark.parametrize("use", ["call", "lower", "trace"])
    def test_a_step_says_so_and_leaves_its_state_alive(self, use):
        state = create({"data": 8})
        step = jit_step(make_train_step(squared_error, ADAM), state)
        function = step if use == "call" else getattr(step, use)
        with pytest.raises(BatchError, match="dimension 0 of length 30 is split in 8 over data"):
            function(state, batch(examples=30))
        _, metrics = step(state, batch(examples=32))
        assert np.isfinite(metrics["loss"])

    @pytest.mark.parametrize("error", [TypeError, ValueError])
    def test_an_error_of_the_objective_is_passed_on(self, error):
        def failing(model, batch, rng, step):
            raise error("of the objective")

        state = create({"data": 8})
        with pytest.raises(error, match="of the objective"):
            jit_step(make_train_step(failing, ADAM), state)(state, batch())

    def test_a_number_in_a_batch_is_told_as_what_it_is(self):
        state = create({"data": 8})
        with pytest.raises(BatchError, match=r"`batch/lam`: no dimension 0 to split over data; give it a sharding of"):
            jit_step(make_train_step(squared_error, ADAM), state)(state, {**batch(), "lam": 1.0})
        state.check_alive()
