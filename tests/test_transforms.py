"""One step under every transformation: jit with donation, scan, vmap, pmap, shard_map, sharded jit."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from tests.problems import Busy, Linear, regression, squared_error
from trainer import Extension, TrainState, fuse_steps, make_eval_step, make_train_step

ADAM = optax.adam(1e-2)


def create(model, optimizer=ADAM, seed=0):
    return TrainState.create(model, optimizer, rng=jax.random.key(seed))


def mesh(devices=8):
    return jax.make_mesh(
        (devices,), ("data",), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
    )


def masked_error(model, batch, rng, step):
    """A mean over the examples that count, which says how many those are."""
    del rng, step
    error = (model(batch["input"]) - batch["target"]) ** 2
    weight = batch["mask"].sum()
    return (error * batch["mask"]).sum() / weight, {"batch_weight": weight, "count": jnp.int32(1)}


def masked(num_examples=16):
    data = regression(num_examples)
    return {**data, "mask": np.arange(num_examples, dtype=np.float32) % 4 + 0.5}


def on_host(tree):
    return jax.tree.map(np.asarray, tree)


class TestWeightZero:
    """Devices whose part of the batch is padding alone: the weighted mean of nothing is 0 / 0 there."""

    def stepped(self, weights):
        batch = jax.tree.map(lambda leaf: leaf.reshape(4, 4, *leaf.shape[1:]), masked())
        batch["mask"] = np.broadcast_to(np.float32(weights)[:, None], (4, 4))
        state = create(Linear(4))
        step = make_train_step(masked_error, ADAM, axis_name="parts")
        evaluate = make_eval_step(masked_error, axis_name="parts")
        after, metrics = jax.jit(jax.vmap(step, (None, 0), axis_name="parts"))(state, batch)
        evaluated = jax.jit(jax.vmap(evaluate, (None, 0), axis_name="parts"))(state, batch)
        return state, batch, on_host((after.params, metrics, evaluated))

    def test_they_change_nothing(self):
        state, batch, (params, metrics, evaluated) = self.stepped([1, 0, 2, 0])
        counted = jax.tree.map(lambda leaf: np.concatenate([leaf[0], leaf[2]]), batch)
        expected, alone = jax.jit(make_train_step(masked_error, ADAM))(state, counted)
        for part in range(4):
            chex.assert_trees_all_close(
                jax.tree.map(lambda leaf, part=part: leaf[part], params), on_host(expected.params), rtol=1e-6
            )
        np.testing.assert_allclose(metrics["loss"], alone["loss"], rtol=1e-6)
        np.testing.assert_allclose(evaluated["loss"], alone["loss"], rtol=1e-6)
        assert metrics["batch_weight"].tolist() == [12] * 4

    def test_where_nothing_counts_nothing_is_nan(self):
        state, _, (params, metrics, evaluated) = self.stepped([0, 0, 0, 0])
        before = on_host(state.params)
        chex.assert_trees_all_equal(jax.tree.map(lambda leaf: leaf[0], params), before)
        assert metrics["loss"].tolist() == evaluated["loss"].tolist() == [0] * 4
        assert metrics["batch_weight"].tolist() == [0] * 4


class TestNothingCountsOnOneDevice:
    """As over an axis, a batch of which nothing counts is an update of zero gradients."""

    def stepped(self, optimizer, masks, model=None):
        state = create(model or Linear(4), optimizer)
        batches = [{**masked(), "mask": np.full(16, mask, np.float32)} for mask in masks]
        step = make_train_step(masked_error, optimizer)
        return state, *jax.jit(fuse_steps(step, len(masks)))(state, jax.tree.map(lambda *x: np.stack(x), *batches))

    def test_params_stay_and_no_metric_is_nan(self):
        before, after, metrics = self.stepped(optax.sgd(0.1), [0])
        chex.assert_trees_all_equal(after.params, before.params)
        assert metrics["loss"].tolist() == metrics["batch_weight"].tolist() == metrics["count"].tolist() == [0]
        evaluated = jax.jit(make_eval_step(masked_error))(before, {**masked(), "mask": np.zeros(16, np.float32)})
        assert float(evaluated["loss"]) == float(evaluated["batch_weight"]) == 0

    def test_momentum_goes_on_as_over_an_axis(self):
        _, after, _ = self.stepped(ADAM, [1, 0, 1])
        state = create(Linear(4))
        step = jax.jit(jax.vmap(make_train_step(masked_error, ADAM, axis_name="one"), (None, 0), axis_name="one"))
        for mask in (1, 0, 1):
            batch = {**masked(), "mask": np.full(16, mask, np.float32)}
            states, _ = step(state, jax.tree.map(lambda leaf: leaf[None], batch))
            state = jax.tree.map(lambda leaf: leaf[0], states)
        chex.assert_trees_all_close(after.params, state.params, rtol=1e-5)
        chex.assert_trees_all_close(after.opt_state, state.opt_state, rtol=1e-5)

    def test_the_statistics_of_a_model_are_those_of_its_forward_pass_as_over_an_axis(self):
        before, after, _ = self.stepped(optax.sgd(0.1), [0], Normalizing())
        step = make_train_step(masked_error, optax.sgd(0.1), axis_name="data")
        batch = {**masked(), "mask": np.zeros(16, np.float32)}
        mapped, _ = by_shard_map(step, create(Normalizing("data"), optax.sgd(0.1)), [batch])
        chex.assert_trees_all_equal(on_host(after.params), on_host(before.params))
        assert np.any(on_host(after.model_state["norm"]["mean"] != before.model_state["norm"]["mean"]))
        chex.assert_trees_all_close(on_host(after.model_state), on_host(mapped.model_state), rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize(
        "options",
        [{"nonfinite": "skip"}, {"precision": "float16"}, {"accumulate_steps": 4}, {"report": ["gradient_norm"]}],
        ids=str,
    )
    @pytest.mark.few(2)
    def test_beside_other_features(self, options):
        held = {name: value for name, value in options.items() if name in ("nonfinite", "precision")}
        state = TrainState.create(Linear(4), optax.sgd(0.1), rng=jax.random.key(0), **held)
        step = jax.jit(make_train_step(masked_error, optax.sgd(0.1), **options))
        after, metrics = step(state, {**masked(), "mask": np.zeros(16, np.float32)})
        chex.assert_trees_all_equal(after.params, state.params)
        assert {metrics.get(name, 0.0).item() for name in ("skipped", "gradient_norm") if name in metrics} <= {0.0}
        if "precision" in options:
            assert after.extensions["loss_scale"]["good_steps"] == 1

    @pytest.mark.parametrize(
        "optimizer",
        [optax.lbfgs(), optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.01), sync_period=2, opaque_mode=True)],
        ids=["lbfgs", "sam"],
    )
    @pytest.mark.few(1)
    def test_functions_that_an_optimizer_is_given_are_finite_too(self, optimizer):
        _, after, _ = self.stepped(optimizer, [1, 0, 1])
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(after.params))

    def test_both_modes_of_differentiation_give_zeros(self):
        def derivatives(updates, opt_state, params, *, value_fn, **extra):
            ones = jax.tree.map(jnp.ones_like, params)
            value, forward = jax.jvp(value_fn, (params,), (ones,))
            backward = jax.grad(value_fn)(params)
            return jax.tree.map(lambda leaf: leaf + value + forward, backward), opt_state

        optimizer = optax.GradientTransformationExtraArgs(lambda params: (), derivatives)
        before, after, _ = self.stepped(optimizer, [0])
        chex.assert_trees_all_equal(after.params, before.params)
        before, after, _ = self.stepped(optimizer, [1])
        assert np.any(on_host(after.params)["layer"]["kernel"] != on_host(before.params)["layer"]["kernel"])

    def test_without_a_weight_there_is_nothing_to_select(self):
        def unweighted(model, batch, rng, step):
            return masked_error(model, batch, rng, step)[0], {}

        sgd, counts = optax.sgd(0.1), []
        for loss_fn in (unweighted, masked_error):
            lowered = jax.jit(make_train_step(loss_fn, sgd)).lower(create(Linear(4), sgd), masked())
            counts.append(lowered.as_text().count("stablehlo.select"))
        assert counts[0] == 0 < counts[1]


class TestJit:
    def test_every_buffer_of_a_donated_state_is_given_away(self):
        state = create(Busy())
        leaves = jax.tree.leaves(state)
        jax.jit(make_train_step(squared_error, ADAM), donate_argnums=0)(state, regression())
        assert all(leaf.is_deleted() for leaf in leaves)

    def test_metrics_outlive_the_donation_of_the_state_they_came_with(self):
        def reporting(model, batch, rng, step):
            loss, _ = squared_error(model, batch, rng, step)
            return loss, {"calls": model.calls[...], "bias": model.outer.bias[0], "scale": model.scale[...]}

        model = Busy()
        model.scale = nnx.Param(jnp.float32(3))
        step = jax.jit(make_train_step(reporting, ADAM), donate_argnums=0)
        state, metrics = step(create(model), regression())
        for _ in range(2):
            state, _ = step(state, regression())
        assert {name: int(value) for name, value in metrics.items() if name != "loss"} == {
            "calls": 1,
            "bias": 0,
            "scale": 3,
            "step": 1,
        }

    def test_a_state_that_was_not_donated_lives_on(self):
        state = create(Busy())
        step = jax.jit(make_train_step(squared_error, ADAM))
        chex.assert_trees_all_equal(step(state, regression())[1], step(state, regression())[1])

    def test_steps_of_one_shape_compile_once(self, compilations):
        step = jax.jit(make_train_step(squared_error, ADAM), donate_argnums=0)
        state = create(Busy())
        for _ in range(5):
            state, _ = step(state, regression())
        assert compilations["jit(train_step)"] == 1


class TestScan:
    def test_a_scan_is_a_loop(self):
        step = make_train_step(squared_error, ADAM)
        batches = [regression(seed=seed) for seed in range(5)]
        scanned, metrics = jax.jit(lambda s, b: jax.lax.scan(step, s, b))(
            create(Busy()), jax.tree.map(lambda *x: np.stack(x), *batches)
        )
        looped, losses = create(Busy()), []
        for batch in batches:
            looped, one = jax.jit(step)(looped, batch)
            losses.append(one["loss"])
        # XLA may fuse the body of a loop differently, so these agree to rounding and not to the bit.
        np.testing.assert_allclose(metrics["loss"], jnp.stack(losses), rtol=1e-5)
        chex.assert_trees_all_close(scanned.params, looped.params, rtol=1e-4, atol=1e-6)
        assert metrics["step"].tolist() == [1, 2, 3, 4, 5]


class TestVmap:
    def test_an_ensemble_of_eight_equals_eight_runs(self):
        step = make_train_step(squared_error, optax.sgd(0.05, 0.9))
        alone = [create(Busy(rngs=nnx.Rngs(seed)), optax.sgd(0.05, 0.9), seed) for seed in range(8)]
        together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
        run_together = jax.jit(jax.vmap(step, in_axes=(0, None)))
        run_alone = jax.jit(step)
        for seed in range(20):
            batch = regression(seed=seed)
            together, metrics = run_together(together, batch)
            alone, losses = zip(*(run_alone(state, batch) for state in alone), strict=True)
        # Batched matrix products round differently from single ones. (Not with Adam: batch normalization
        # makes the gradient of the bias before it zero but for rounding, and Adam scales that up.)
        np.testing.assert_allclose(metrics["loss"], [m["loss"] for m in losses], rtol=1e-4)
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
        chex.assert_trees_all_close(together.params, stacked.params, rtol=1e-3, atol=1e-5)
        chex.assert_trees_all_equal(jax.random.key_data(together.rng), jax.random.key_data(stacked.rng))

    @pytest.mark.slow
    def test_an_axis_name_averages_gradients_over_the_mapped_axis(self):
        step = make_train_step(squared_error, optax.sgd(0.1), axis_name="data")
        state = create(Linear(features=4), optax.sgd(0.1))
        shards = jax.tree.map(lambda x: x.reshape(4, 4, *x.shape[1:]), regression(16))
        after, metrics = jax.jit(jax.vmap(step, in_axes=(None, 0), axis_name="data"))(state, shards)
        whole, expected = make_train_step(squared_error, optax.sgd(0.1))(state, regression(16))
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf: leaf[3], after.params), whole.params, rtol=1e-5, atol=1e-7
        )
        np.testing.assert_allclose(metrics["loss"], np.repeat(expected["loss"], 4), rtol=1e-5)


class Complex(Busy):
    """Its statistics include a complex one."""

    def __init__(self):
        super().__init__()
        self.spectrum = nnx.BatchStat(jnp.zeros((), jnp.complex64))

    def __call__(self, x):
        self.spectrum[...] = x.mean() + 1j * x.std()
        return super().__call__(x)


class Normalizing(nnx.Module):
    """Batch normalization whose statistics, where ``axis_name`` is given, are those of all devices together."""

    def __init__(self, axis_name=None):
        rngs = nnx.Rngs(0)
        self.inner = nnx.Linear(4, 8, use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, axis_name=axis_name, rngs=rngs)
        self.outer = nnx.Linear(8, 1, rngs=rngs)

    def __call__(self, x):
        return self.outer(jax.nn.relu(self.norm(self.inner(x))))[:, 0]


def by_pmap(step, state, batches):
    """Runs a step with ``axis_name`` "data" on eight devices; the state and metrics are those of the last device."""
    mapped = jax.pmap(step, axis_name="data", donate_argnums=0)
    state = jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), state)
    for batch in batches:
        state, metrics = mapped(state, jax.tree.map(lambda x: x.reshape(8, -1, *x.shape[1:]), batch))
    return jax.tree.map(lambda leaf: leaf[7], (state, metrics))


def by_shard_map(step, state, batches):
    mapped = jax.jit(
        jax.shard_map(step, mesh=mesh(), in_specs=(P(), P("data")), out_specs=(P(), P())), donate_argnums=0
    )
    for batch in batches:
        state, metrics = mapped(state, batch)
    return state, metrics


class TestDevices:
    """Eight devices on eighths of a batch equal one device on all of it.

    A mean of eight means rounds differently from one mean: float32 agrees to about 1e-6 a step.
    """

    tolerance = {"rtol": 1e-4, "atol": 1e-6}

    @pytest.mark.parametrize("run", [by_pmap, by_shard_map])
    @pytest.mark.parametrize(("objective", "data"), [(squared_error, regression), (masked_error, masked)])
    def test_a_gradient_is_averaged_and_not_summed(self, run, objective, data):
        # Plain gradient descent: Adam would divide a factor of eight away.
        optimizer = optax.sgd(0.1)
        one, expected = jax.jit(make_train_step(objective, optimizer))(create(Linear(4), optimizer), data(16))
        step = make_train_step(objective, optimizer, axis_name="data")
        state, metrics = run(step, create(Linear(4), optimizer), [data(16)])
        chex.assert_trees_all_close(on_host(state.params), on_host(one.params), rtol=1e-5, atol=1e-7)
        assert metrics.keys() == expected.keys()
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, rtol=1e-5, atol=1e-7)

    @pytest.mark.parametrize("run", [by_pmap, by_shard_map])
    def test_a_model_that_normalizes_over_the_axis_is_that_of_one_device(self, run):
        optimizer = optax.sgd(0.05, momentum=0.9)
        batches = [regression(32, seed=seed) for seed in range(10)]
        one, step = create(Normalizing(), optimizer), jax.jit(make_train_step(squared_error, optimizer))
        for batch in batches:
            one, expected = step(one, batch)
        mapped = make_train_step(squared_error, optimizer, axis_name="data")
        state, metrics = run(mapped, create(Normalizing("data"), optimizer), batches)
        np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-4)
        chex.assert_trees_all_close(on_host(state.params), on_host(one.params), **self.tolerance)
        chex.assert_trees_all_close(on_host(state.model_state), on_host(one.model_state), **self.tolerance)

    def test_under_jit_a_model_normalizes_over_all_devices_by_itself(self):
        optimizer = optax.sgd(0.05, momentum=0.9)
        step = jax.jit(make_train_step(squared_error, optimizer))
        one, expected = step(create(Normalizing(), optimizer), regression(32))
        state = jax.device_put(create(Normalizing(), optimizer), NamedSharding(mesh(), P()))
        state, metrics = step(state, jax.device_put(regression(32), NamedSharding(mesh(), P("data"))))
        np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
        chex.assert_trees_all_close(on_host(state.model_state), on_host(one.model_state), **self.tolerance)

    def test_several_axes_are_averaged_over_together(self):
        optimizer = optax.sgd(0.1)
        grid = jax.make_mesh((4, 2), ("data", "replica"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        step = make_train_step(masked_error, optimizer, axis_name=("data", "replica"))
        both = P(("data", "replica"))
        mapped = jax.jit(jax.shard_map(step, mesh=grid, in_specs=(P(), both), out_specs=(P(), P())))
        state, metrics = mapped(create(Linear(4), optimizer), masked())
        one, expected = jax.jit(make_train_step(masked_error, optimizer))(create(Linear(4), optimizer), masked())
        chex.assert_trees_all_close(on_host(state.params), on_host(one.params), rtol=1e-5, atol=1e-7)
        np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)

    def run_on_one(self, objective, batch, steps=10):
        state, step = create(Linear(features=4)), jax.jit(make_train_step(objective, ADAM))
        for _ in range(steps):
            state, metrics = step(state, batch)
        return state, metrics

    @pytest.mark.parametrize(("objective", "batch"), [(squared_error, regression(16)), (masked_error, masked())])
    def test_pmap(self, objective, batch):
        step = jax.pmap(make_train_step(objective, ADAM, axis_name="data"), axis_name="data", donate_argnums=0)
        state = jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), create(Linear(features=4)))
        shards = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), batch)
        for _ in range(10):
            state, metrics = step(state, shards)
        expected_state, expected = self.run_on_one(objective, batch)
        for device in (0, 7):
            on_device = jax.tree.map(lambda leaf, i=device: np.asarray(leaf)[i], state.params)
            chex.assert_trees_all_close(on_device, expected_state.params, **self.tolerance)
        np.testing.assert_allclose(metrics["loss"], np.repeat(expected["loss"], 8), rtol=1e-4)

    @pytest.mark.parametrize("check_vma", [True, False])
    @pytest.mark.parametrize(("objective", "batch"), [(squared_error, regression(16)), (masked_error, masked())])
    def test_shard_map(self, objective, batch, check_vma):
        step = jax.jit(
            jax.shard_map(
                make_train_step(objective, ADAM, axis_name="data"),
                mesh=mesh(),
                in_specs=(P(), P("data")),
                out_specs=(P(), P()),
                check_vma=check_vma,
            )
        )
        state = create(Linear(features=4))
        for _ in range(10):
            state, metrics = step(state, batch)
        expected_state, expected = self.run_on_one(objective, batch)
        chex.assert_trees_all_close(
            jax.tree.map(np.asarray, state.params), jax.tree.map(np.asarray, expected_state.params), **self.tolerance
        )
        np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-4)
        if "batch_weight" in metrics:
            np.testing.assert_allclose(metrics["batch_weight"], batch["mask"].sum())
            assert metrics["count"] == 1.0

    def test_shard_map_over_a_state_that_each_device_has_for_itself(self):
        step = make_train_step(squared_error, ADAM, axis_name="data")

        def on_device(state, batch):
            state, metrics = step(jax.tree.map(lambda leaf: leaf[0], state), batch)
            return jax.tree.map(lambda leaf: leaf[None], (state, metrics))

        mapped = jax.jit(jax.shard_map(on_device, mesh=mesh(), in_specs=P("data"), out_specs=P("data")))
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), create(Linear(features=4)))
        after, _ = mapped(stacked, regression(16))
        expected, _ = self.run_on_one(squared_error, regression(16), steps=1)
        on_last = jax.tree.map(lambda leaf: np.asarray(leaf)[7], after.params)
        chex.assert_trees_all_close(on_last, expected.params, **self.tolerance)

    def test_jit_over_sharded_arrays(self):
        step = jax.jit(make_train_step(squared_error, ADAM), donate_argnums=0)
        sharded = NamedSharding(mesh(), P("data"))
        state = jax.device_put(create(Linear(features=4)), NamedSharding(mesh(), P()))
        batch = jax.device_put(regression(16), sharded)
        for _ in range(10):
            state, metrics = step(state, batch)
        expected_state, expected = self.run_on_one(squared_error, regression(16))
        chex.assert_trees_all_close(
            jax.tree.map(np.asarray, state.params), jax.tree.map(np.asarray, expected_state.params), **self.tolerance
        )
        np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-4)

    def test_batch_statistics_are_averaged_and_frozen_variables_untouched(self):
        model = Complex()
        model.frozen = nnx.BatchStat(jnp.full(3, 0.1))
        step = make_train_step(squared_error, ADAM, axis_name="data")
        state = create(model)
        mapped = jax.jit(jax.shard_map(step, mesh=mesh(6), in_specs=(P(), P("data")), out_specs=(P(), P())))
        data = regression(12)
        after, _ = mapped(state, data)
        each = [
            make_train_step(squared_error, ADAM)(state, jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], data))[0]
            for i in range(6)
        ]
        for statistic in (lambda held: held["norm"]["mean"], lambda held: held["spectrum"]):
            mean = np.mean([np.asarray(statistic(one.model_state)) for one in each], axis=0)
            np.testing.assert_allclose(statistic(after.model_state), mean, rtol=1e-5, atol=1e-7)
        # An average of six equal numbers need not be that number; so what did not change is not averaged.
        np.testing.assert_array_equal(after.model_state["frozen"], state.model_state["frozen"])
        assert int(after.model_state["dropout"]["rngs"]["count"]) == 1

    def test_extension_variables_are_averaged(self):
        class Averaging(Extension):
            def __init__(self):
                super().__init__()
                self.mean = nnx.BatchStat({"target": jnp.zeros(())})

            def loss_fn(self, batch, model_outputs, **kwargs):
                self.mean.set_value({"target": jnp.mean(batch["target"])})
                return jnp.zeros(())

        extensions = {"mean": Averaging()}
        step = make_train_step(squared_error, ADAM, extensions=extensions, axis_name="data")
        state = TrainState.create(Linear(features=4), ADAM, rng=jax.random.key(0), extensions=extensions)
        mapped = jax.jit(jax.shard_map(step, mesh=mesh(), in_specs=(P(), P("data")), out_specs=(P(), P())))
        after, _ = mapped(state, regression(16))
        mean = after.extensions["mean"]["variables"]["mean"]["target"]
        np.testing.assert_allclose(mean, regression(16)["target"].mean(), rtol=1e-5)

    def test_every_device_draws_from_a_key_of_its_own(self):
        def drawing(model, batch, rng, step):
            return jnp.mean(model(batch["input"])), {
                "square": jax.random.uniform(rng) ** 2,
                "draw": jax.random.uniform(rng),
            }

        step = make_train_step(drawing, ADAM, axis_name="data")
        mapped = jax.shard_map(step, mesh=mesh(), in_specs=(P(), P("data")), out_specs=(P(), P()))
        after, metrics = jax.jit(mapped)(create(Linear(features=4)), regression(16))
        # Equal draws would make the mean of squares the square of the mean.
        assert metrics["square"] > metrics["draw"] ** 2 + 1e-3
        assert after.rng.sharding.is_fully_replicated

    def test_evaluation_averages_over_the_axis(self):
        evaluate = make_eval_step(masked_error, axis_name="data")
        mapped = jax.jit(jax.shard_map(evaluate, mesh=mesh(), in_specs=(P(), P("data")), out_specs=P()))
        state = create(Linear(features=4))
        metrics, expected = mapped(state, masked()), make_eval_step(masked_error)(state, masked())
        np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-5)
        np.testing.assert_allclose(metrics["batch_weight"], expected["batch_weight"])
