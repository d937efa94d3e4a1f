"""Gradient accumulation: the update of the whole batch, in the memory of a micro-batch."""

import math
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

from tests.problems import Busy, Counting, Linear, config, regression, squared_error
from tests.test_api import assert_same_bits
from tests.test_transforms import by_pmap, by_shard_map, masked, masked_error, mesh, on_host
from trainer import (
    ArgumentError,
    ArgumentTypeError,
    BatchError,
    Callback,
    Trainer,
    TrainState,
    fuse_steps,
    make_mesh,
    make_train_step,
)
from trainer.core.flops import primitives

SGD = optax.sgd(0.1)
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def create(model=None, optimizer=SGD, **changes):
    return TrainState.create(Linear(4) if model is None else model, optimizer, rng=jax.random.key(0), **changes)


def stepped(steps, batch, loss_fn=squared_error, model=None, optimizer=SGD, **options):
    state = create(model, optimizer, extensions=options.get("extensions"))
    return jax.jit(make_train_step(loss_fn, optimizer, accumulate_steps=steps, **options))(state, batch)


def micro_batches(batch, steps):
    """The rows of each micro-batch, by the definition in the docstring of `accumulated`."""
    rows = len(batch["input"])
    size = math.ceil(rows / steps)
    count = rows // size
    indices = [np.arange(i, count * size, count) for i in range(count)]
    if rows % size:
        indices.append(np.arange(count * size, rows))
    return [jax.tree.map(lambda leaf, index=index: leaf[index], batch) for index in indices]


def noisy(model, batch, rng, step):
    loss, metrics = masked_error(model, batch, rng, step)
    return loss, {"batch_weight": metrics["batch_weight"], "drawn": jax.random.uniform(rng)}


class TestDefinition:
    @pytest.mark.parametrize(("objective", "data"), [(squared_error, regression), (masked_error, masked)])
    @pytest.mark.parametrize(("steps", "examples"), [(2, 16), (16, 16), (3, 16), (4, 9), (4, 10)])
    @pytest.mark.few(6)
    def test_it_is_the_update_of_the_whole_batch(self, objective, data, steps, examples):
        whole, expected = stepped(1, data(examples), objective)
        state, metrics = stepped(steps, data(examples), objective)
        chex.assert_trees_all_close(state.params, whole.params, **CLOSE)
        chex.assert_trees_all_close(metrics, expected, **CLOSE)
        assert metrics.keys() == expected.keys()
        assert int(state.step) == 1

    @pytest.mark.parametrize("steps", [3, 4])
    def test_it_is_the_weighted_average_over_the_micro_batches(self, steps):
        batch, state = masked(14), create()
        step_key = jax.random.fold_in(state.rng, 0)
        plain = make_train_step(noisy, SGD)
        found = [plain(state, one) for one in micro_batches(batch, steps)]
        weights = np.array([float(metrics["batch_weight"]) for _, metrics in found])
        assert len(set(weights)) > 1
        kernels = [np.asarray(after.params["layer"]["kernel"]) for after, _ in found]

        state, metrics = stepped(steps, batch, noisy)
        np.testing.assert_allclose(
            state.params["layer"]["kernel"], np.average(kernels, axis=0, weights=weights), **CLOSE
        )
        losses = [float(metrics["loss"]) for _, metrics in found]
        np.testing.assert_allclose(metrics["loss"], np.average(losses, weights=weights), **CLOSE)
        np.testing.assert_allclose(metrics["batch_weight"], weights.sum(), **CLOSE)
        draws = [jax.random.uniform(jax.random.fold_in(step_key, i)) for i in range(len(found))]
        np.testing.assert_allclose(metrics["drawn"], np.average(draws, weights=weights), **CLOSE)

    def test_one_micro_batch_is_the_program_without(self):
        state, batch = create(Busy()), regression()
        traced = [
            jax.jit(make_train_step(squared_error, SGD, **options)).trace(state, batch)
            for options in ({}, {"accumulate_steps": 1}, {"accumulate_steps": 2})
        ]
        without, one, two = (program.lower().as_text() for program in traced)
        assert without == one != two
        assert ["scan" in primitives(program.jaxpr.jaxpr) for program in traced] == [False, False, True]

    def test_sums_are_float32_where_params_are_not(self):
        """In bfloat16 256 + 1 is 256."""

        class Scale(nnx.Module):
            def __init__(self):
                self.scale = nnx.Param(jnp.ones((), jnp.bfloat16))

        def objective(model, batch, rng, step):
            return (model.scale[...] * batch["input"].astype(jnp.bfloat16)).mean(), {}

        batch = {"input": np.ones(1024, np.float32)}
        state, metrics = stepped(1024, batch, objective, Scale(), optax.sgd(0.5))
        assert state.params["scale"].dtype == metrics["loss"].dtype == jnp.bfloat16
        assert float(state.params["scale"]) == 0.5
        assert float(metrics["loss"]) == 1.0

    def test_a_clip_acts_once_on_the_sum(self):
        optimizer = optax.chain(optax.clip_by_global_norm(0.05), optax.sgd(1.0, momentum=0.9))
        whole, _ = stepped(1, masked(), masked_error, optimizer=optimizer)
        state, _ = stepped(4, masked(), masked_error, optimizer=optimizer)
        chex.assert_trees_all_close(state.params, whole.params, **CLOSE)
        before = create().params
        norm = optax.tree.norm(jax.tree.map(jnp.subtract, state.params, before))
        np.testing.assert_allclose(norm, 0.05, rtol=1e-4)

    def test_an_extension_weighs_like_the_loss(self):
        extensions = {"size": Counting()}
        whole, expected = stepped(1, regression(16), extensions=extensions)
        state, metrics = stepped(4, regression(16), extensions=extensions)
        chex.assert_trees_all_close(state.params, whole.params, **CLOSE)
        np.testing.assert_allclose(metrics["size_loss"], expected["size_loss"], **CLOSE)
        assert int(state.extensions["size"]["variables"]["evaluations"]) == 4


class TestWeightZero:
    def stepped(self, weights):
        batch = masked(16)
        batch["mask"] = np.tile(np.float32(weights), 4)  # micro-batch i is every fourth row from i on
        return batch, stepped(4, batch, masked_error)

    def test_a_micro_batch_of_padding_adds_nothing(self):
        batch, (state, metrics) = self.stepped([1, 0, 2, 0])
        counted = {name: leaf[batch["mask"] > 0] for name, leaf in batch.items()}
        expected, alone = stepped(1, counted, masked_error)
        chex.assert_trees_all_close(state.params, expected.params, **CLOSE)
        np.testing.assert_allclose(metrics["loss"], alone["loss"], **CLOSE)

    def test_where_nothing_counts_nothing_is_nan(self):
        _, (state, metrics) = self.stepped([0, 0, 0, 0])
        chex.assert_trees_all_equal(state.params, create().params)
        assert float(metrics["loss"]) == float(metrics["batch_weight"]) == 0

    def test_a_weight_of_integers_is_summed_exactly(self):
        def counted(model, batch, rng, step):
            return squared_error(model, batch, rng, step)[0], {"batch_weight": jnp.int32(2**24 + 1)}

        _, metrics = stepped(2, regression(16), counted)
        assert int(metrics["batch_weight"]) == 2**25 + 2


class TestModelState:
    @pytest.mark.slow
    def test_it_passes_through_the_micro_batches_in_order(self):
        batch = regression(14)
        still = optax.sgd(0.0)
        expected, step = create(Busy(), still), make_train_step(squared_error, still)
        for one in micro_batches(batch, 4):
            expected, _ = step(expected, one)
        state, _ = stepped(4, batch, model=Busy(), optimizer=still)
        assert int(state.model_state["calls"]) == int(state.model_state["dropout"]["rngs"]["count"]) == 4
        chex.assert_trees_all_close(state.model_state["norm"], expected.model_state["norm"], **CLOSE)
        assert (int(state.step), int(expected.step)) == (1, 4)


class TestArgumentsOfOptax:
    """`value_fn` and `grad_fn` are those of the whole batch."""

    @pytest.mark.parametrize(
        "optimizer",
        [
            optax.lbfgs(),
            optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15)),
            optax.contrib.momo(),
            optax.contrib.sam(optax.sgd(0.1), optax.sgd(0.01), sync_period=2, opaque_mode=True),
        ],
        ids=["lbfgs", "backtracking", "momo", "sam"],
    )
    @pytest.mark.few(1)
    def test_a_run_is_that_of_the_whole_batch(self, optimizer):
        runs = []
        for steps in (1, 4):
            step = jax.jit(make_train_step(masked_error, optimizer, accumulate_steps=steps))
            state = create(optimizer=optimizer)
            for seed in range(4):
                batch = {**masked(14), **regression(14, seed=seed)}
                state, _ = step(state, batch)
            runs.append(state.params)
        chex.assert_trees_all_close(*runs, rtol=1e-3, atol=1e-4)

    def test_a_function_of_two_derivatives_is_that_of_the_whole_batch(self):
        """Sophia and other second-order methods take Hessian-vector products of the loss."""

        def product(updates, opt_state, params, *, value_fn, **extra):
            ones = jax.tree.map(jnp.ones_like, params)
            return jax.jvp(jax.grad(value_fn), (params,), (ones,))[1], opt_state

        optimizer = optax.GradientTransformationExtraArgs(lambda params: (), product)
        whole, _ = stepped(1, masked(14), masked_error, optimizer=optimizer)
        state, _ = stepped(4, masked(14), masked_error, optimizer=optimizer)
        chex.assert_trees_all_close(state.params, whole.params, **CLOSE)


class TestLeavesWithoutRows:
    def objective(self, model, batch, rng, step):
        assert batch["table"].shape == (3,)
        assert batch["input"].shape[0] == len(batch["target"])
        prediction = model(batch["input"]) * batch["scale"] + batch["table"].sum()
        return jnp.mean((prediction - batch["target"]) ** 2), {}

    @pytest.mark.parametrize("steps", [3, 4])
    def test_a_scalar_and_a_table_are_handed_over_whole(self, steps):
        batch = {**regression(14), "scale": 0.5, "table": np.float32([1, 2, 3])}
        whole, expected = stepped(1, batch, self.objective)
        state, metrics = stepped(steps, batch, self.objective)
        chex.assert_trees_all_close(state.params, whole.params, **CLOSE)
        np.testing.assert_allclose(metrics["loss"], expected["loss"], **CLOSE)

    def test_a_batch_of_which_nobody_can_tell_the_rows_is_refused(self):
        batch = {"inside": np.ones((8, 4), np.float32), "edge": np.ones((6, 4), np.float32)}
        with pytest.raises(BatchError, match="no leading dimension that most of its arrays have") as refused:
            stepped(2, batch)
        assert "inside: float32(8, 4)" in str(refused.value)

    def test_keys_are_rows_like_any_other(self):
        def drawing(model, batch, rng, step):
            draws = jax.vmap(jax.random.uniform)(batch["key"])
            return squared_error(model, batch, rng, step)[0], {"draw": draws.mean()}

        batch = {**regression(8), "key": jax.random.split(jax.random.key(1), 8)}
        np.testing.assert_allclose(
            stepped(4, batch, drawing)[1]["draw"], stepped(1, batch, drawing)[1]["draw"], **CLOSE
        )


class TestRefused:
    @pytest.mark.parametrize("steps", [2.0, "2", True, None, np.ones(2, int)])
    def test_no_integer(self, steps):
        with pytest.raises(ArgumentTypeError, match="`accumulate_steps` is"):
            make_train_step(squared_error, SGD, accumulate_steps=steps)

    @pytest.mark.parametrize("steps", [0, -1])
    def test_no_micro_batch(self, steps):
        with pytest.raises(ArgumentError, match=f"`accumulate_steps` is {steps}; it must be a positive integer"):
            make_train_step(squared_error, SGD, accumulate_steps=steps)

    def test_more_micro_batches_than_examples_before_the_model_is_traced(self):
        def untouched(model, batch, rng, step):
            raise AssertionError

        with pytest.raises(BatchError, match=r"`batch` has 4 examples .*, fewer than `accumulate_steps` = 5"):
            stepped(5, regression(4), untouched)


class TestTransforms:
    @pytest.mark.parametrize("run", [by_pmap, by_shard_map])
    @pytest.mark.parametrize(("objective", "data"), [(squared_error, regression), (masked_error, masked)])
    @pytest.mark.few(2)
    def test_each_device_accumulates_its_own_part(self, run, objective, data):
        one, expected = stepped(1, data(48), objective)
        step = make_train_step(objective, SGD, axis_name="data", accumulate_steps=4)  # of six rows: 2, 2 and 2
        state, metrics = run(step, create(), [data(48)])
        chex.assert_trees_all_close(on_host(state.params), on_host(one.params), **CLOSE)
        for name, value in expected.items():
            np.testing.assert_allclose(metrics[name], value, **CLOSE)

    @pytest.mark.parametrize("check_vma", [True, False])
    @pytest.mark.slow
    def test_batch_statistics_and_line_searches_under_shard_map(self, check_vma):
        optimizer = optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15))
        step = make_train_step(squared_error, optimizer, axis_name="data", accumulate_steps=2)
        mapped = jax.shard_map(step, mesh=mesh(), in_specs=(P(), P("data")), out_specs=(P(), P()), check_vma=check_vma)
        state, _ = jax.jit(mapped)(create(Busy(), optimizer), regression(32))
        assert state.params["inner"]["kernel"].sharding.is_fully_replicated
        assert int(state.model_state["calls"]) == 2
        assert all(bool(jnp.isfinite(leaf).all()) for leaf in jax.tree.leaves(state.params))

    def test_under_shard_map_over_a_state_that_each_device_has_for_itself(self):
        step = make_train_step(squared_error, SGD, accumulate_steps=2)

        def on_device(state, batch):
            state, metrics = step(jax.tree.map(lambda leaf: leaf[0], state), batch)
            return jax.tree.map(lambda leaf: leaf[None], (state, metrics))

        mapped = jax.jit(jax.shard_map(on_device, mesh=mesh(), in_specs=P("data"), out_specs=P("data")))
        stacked = jax.tree.map(lambda leaf: jnp.stack([leaf] * 8), create())
        after, _ = mapped(stacked, regression(32))
        expected, _ = stepped(1, {name: leaf[28:] for name, leaf in regression(32).items()})
        on_last = jax.tree.map(lambda leaf: np.asarray(leaf)[7], after.params)
        chex.assert_trees_all_close(on_last, on_host(expected.params), **CLOSE)

    def test_an_ensemble_under_vmap(self):
        step = make_train_step(masked_error, SGD, accumulate_steps=3)
        alone = [create(Linear(4, rngs=nnx.Rngs(seed))) for seed in range(4)]
        together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *alone)
        after, _ = jax.jit(jax.vmap(step, in_axes=(0, None)))(together, masked(14))
        each = [jax.jit(step)(state, masked(14))[0].params for state in alone]
        chex.assert_trees_all_close(after.params, jax.tree.map(lambda *leaves: jnp.stack(leaves), *each), **CLOSE)

    def test_fused_steps_are_single_ones(self):
        step = make_train_step(masked_error, SGD, accumulate_steps=3)
        batches = [masked(14), {**masked(14), **regression(14, seed=1)}]
        fused, metrics = jax.jit(fuse_steps(step, 2))(create(), jax.tree.map(lambda *x: np.stack(x), *batches))
        state, losses = create(), []
        for batch in batches:
            state, one = jax.jit(step)(state, batch)
            losses.append(one["loss"])
        np.testing.assert_allclose(metrics["loss"], jnp.stack(losses), **CLOSE)
        chex.assert_trees_all_close(fused.params, state.params, **CLOSE)


class Deep(nnx.Module):
    """Has many more activations than params."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.layers = nnx.List([nnx.Linear(24, 24, rngs=rngs) for _ in range(4)])
        self.last = nnx.Linear(24, 1, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = jax.nn.relu(layer(x))
        return self.last(x)[:, 0]


class TestMemory:
    def scratch(self, steps, examples, optimizer=SGD):
        step = jax.jit(make_train_step(squared_error, optimizer, accumulate_steps=steps), donate_argnums=0)
        compiled = step.lower(create(Deep(), optimizer), regression(examples, 24)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    def test_it_is_flat_for_micro_batches_of_one_size(self):
        one, four, sixteen = (self.scratch(steps, 256 * steps) for steps in (1, 4, 16))
        assert sixteen == four
        assert four < 1.5 * one

    @pytest.mark.parametrize(
        "optimizer",
        [SGD, optax.chain(optax.sgd(1.0), optax.scale_by_backtracking_linesearch(15))],
        ids=["sgd", "line search"],
    )
    @pytest.mark.slow
    def test_it_falls_with_the_number_of_micro_batches(self, optimizer):
        one, four, sixteen = (self.scratch(steps, 4096, optimizer) for steps in (1, 4, 16))
        assert sixteen < four < one / 2
        assert sixteen < one / 5


class TestShardedJit:
    @pytest.mark.parametrize("steps", [2, 4])
    def test_no_row_is_moved_and_every_device_has_its_part(self, steps):
        state = jax.device_put(create(Deep()), NamedSharding(mesh(), P()))
        batch = jax.device_put(regression(64, 24), NamedSharding(mesh(), P("data")))
        step = jax.jit(make_train_step(squared_error, SGD, accumulate_steps=steps))
        text = step.lower(state, batch).compile().as_text()
        assert not re.search(r"\b(all-gather|all-to-all|collective-permute)(-start)?\(", text)
        # Each device multiplies its eighth of a micro-batch.
        assert re.search(rf"f32\[{64 // steps // 8},24\]", text)
        assert not re.search(rf"f32\[{64 // steps},24\]", text)
        after, metrics = step(state, batch)
        whole, expected = stepped(1, regression(64, 24), model=Deep())
        chex.assert_trees_all_close(on_host(after.params), on_host(whole.params), **CLOSE)
        np.testing.assert_allclose(metrics["loss"], expected["loss"], **CLOSE)

    def test_a_batch_that_devices_cannot_share_is_exact_too(self):
        state = jax.device_put(create(), NamedSharding(mesh(), P()))
        batch = jax.device_put(masked(24), NamedSharding(mesh(), P("data")))
        after, _ = jax.jit(make_train_step(masked_error, SGD, accumulate_steps=4))(state, batch)
        whole, _ = stepped(1, masked(24), masked_error)
        chex.assert_trees_all_close(on_host(after.params), on_host(whole.params), **CLOSE)


class Stopping(Callback):
    def __init__(self, step=None):
        self.step = step

    def on_batch_begin(self, trainer, step):
        if step == self.step:
            raise InterruptedError


def build(directory, steps=4, **options):
    settings = config(gradient_clip_norm=1.0, log_frequency=1)
    options = {"loss_fn": squared_error, "save_interval": 3, "handle_signals": False, **options}
    return Trainer(Busy(), settings, workdir=directory, rng=jax.random.key(3), accumulate_steps=steps, **options)


class TestTrainer:
    def test_it_is_the_pure_step(self, tmp_path):
        trainer = build(tmp_path, loss_fn=masked_error)
        state = trainer.state.copy()
        for seed in range(3):
            batch = {**masked(14), **regression(14, seed=seed)}
            metrics = trainer.train_step(batch)
            optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
            state, expected = jax.jit(make_train_step(masked_error, optimizer, accumulate_steps=4))(state, batch)
        assert_same_bits(trainer.state.params, state.params)
        assert float(metrics["loss"]) == float(expected["loss"])
        assert trainer.step == 3

    @pytest.mark.slow
    def test_fusing_changes_nothing(self, tmp_path):
        fused, single = (build(tmp_path / str(n), save_interval=10**9, steps_per_call=n) for n in (4, 1))
        for trainer in (fused, single):
            trainer.train(regression(60), 2, 16)
        chex.assert_trees_all_close(fused.state.params, single.state.params, rtol=1e-4, atol=1e-6)
        assert fused.history.to_dict()["step"] == single.history.to_dict()["step"] == list(range(1, 9))

    @pytest.mark.parametrize("axes", [{"data": 8}, None])
    @pytest.mark.slow
    def test_an_interrupted_run_resumes_to_the_same_bits(self, axes, tmp_path):
        devices = None if axes is None else make_mesh(axes)
        never, broken = (
            build(tmp_path / name, 2, mesh=devices, callbacks=[Stopping(at)])
            for name, at in (("never", None), ("broken", 5))
        )
        never.train(regression(56), 2, 16)
        with pytest.raises(InterruptedError):
            broken.train(regression(56), 2, 16)
        broken.close()
        again = build(tmp_path / "broken", 2, mesh=devices, callbacks=[Stopping()])
        again.train(regression(56), 2, 16, resume=True)
        assert_same_bits(again.state, never.state)
        assert again.history.to_dict() == never.history.to_dict()

    @pytest.mark.slow
    def test_over_a_mesh_it_learns_what_it_learns_on_one_device(self, tmp_path):
        runs = [
            build(tmp_path / name, 2, mesh=devices, save_interval=10**9)
            for name, devices in (("one", None), ("mesh", make_mesh({"data": 8})))
        ]
        for trainer in runs:
            trainer.train(regression(56), 2, 16)
        one, other = (np.array(trainer.history.to_dict()["loss"]) for trainer in runs)
        np.testing.assert_allclose(other, one, rtol=1e-4)

    @pytest.mark.slow
    def test_resuming_with_another_number_says_so(self, tmp_path):
        first = build(tmp_path, callbacks=[Stopping(5)])
        with pytest.raises(InterruptedError):
            first.train(regression(64), 2, 16)
        first.close()
        with pytest.warns(UserWarning, match="`accumulate_steps` was 4 and is 2"):
            build(tmp_path, 2).train(regression(64), 2, 16, resume=True)

    @pytest.mark.parametrize(("steps", "error"), [(0, ArgumentError), (1.5, ArgumentTypeError)])
    def test_what_is_no_count_is_refused(self, steps, error, tmp_path):
        with pytest.raises(error, match="`accumulate_steps` is"):
            build(tmp_path, steps)

    def test_a_last_batch_of_too_few_examples_is_refused_before_anything_happens(self, tmp_path):
        trainer = build(tmp_path)
        with pytest.raises(
            ArgumentError, match=r"`accumulate_steps` is 4, and the last batch has 2 examples .*`pad_to`"
        ):
            trainer.train(regression(50), 1, 16)
        with pytest.raises(ArgumentError, match="`accumulate_steps` is 4, and a batch has 3 examples"):
            trainer.train(regression(48), 1, 3)
        assert trainer.step == 0
        assert not list(tmp_path.glob("checkpoint*"))

    def test_a_batch_of_a_loader_of_too_few_examples_leaves_the_run_as_it_was(self, tmp_path):
        trainer = build(tmp_path)
        with pytest.raises(BatchError, match="fewer than `accumulate_steps` = 4"):
            trainer.train([regression(16), regression(2)], 1, 16)
        assert trainer.step == 1
        trainer.train_step(regression(16))
        assert trainer.step == 2

    def test_devices_that_cannot_share_a_micro_batch_are_said(self, tmp_path):
        trainer = build(tmp_path, mesh=make_mesh({"data": 8}))
        with pytest.warns(UserWarning, match="`accumulate_steps` = 4 makes micro-batches of 4 examples"):
            trainer.train(regression(32), 1, 16)
