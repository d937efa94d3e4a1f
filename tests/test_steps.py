"""The pure steps: what they compute, what they carry on, and what they refuse."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.problems import Busy, Counting, Linear, regression, squared_error
from tests.test_api import assert_same_bits
from trainer import (
    ArgumentError,
    ArgumentTypeError,
    BatchError,
    ExtensionConfig,
    ObjectiveError,
    TrainState,
    fuse_steps,
    make_eval_step,
    make_train_step,
)

SGD = optax.sgd(0.1)


def create(model, optimizer=SGD, **changes):
    return TrainState.create(model, optimizer, **{"rng": jax.random.key(0), **changes})


def one_step(loss_fn, model=None, batch=None, **options):
    model = Linear(features=4) if model is None else model
    state = create(model, extensions=options.get("extensions"))
    return make_train_step(loss_fn, SGD, **options)(state, regression() if batch is None else batch)


class TestUpdate:
    def test_one_step_is_what_flax_and_optax_do_by_hand(self):
        model, batch, optimizer = Linear(features=4), regression(), optax.adam(0.1)
        next_state, metrics = make_train_step(squared_error, optimizer)(create(model, optimizer), batch)

        graphdef, params = nnx.split(model, nnx.Param)
        loss, grads = jax.value_and_grad(lambda p: squared_error(nnx.merge(graphdef, p), batch, None, None)[0])(params)
        updates, _ = optimizer.update(grads, optimizer.init(params), params)
        expected = nnx.to_pure_dict(optax.apply_updates(params, updates))

        chex.assert_trees_all_equal(next_state.params, expected)
        assert metrics["loss"] == loss
        assert int(metrics["step"]) == int(next_state.step) == 1

    def test_least_squares_reaches_the_closed_form_optimum(self):
        data = regression(num_examples=40)
        state, step = create(Linear(features=4)), make_train_step(squared_error, SGD)
        state, _ = jax.jit(lambda s: jax.lax.scan(lambda c, _: step(c, data), s, None, length=2000))(state)

        design = np.concatenate([data["input"], np.ones((40, 1))], axis=1).astype(np.float64)
        optimum, *_ = np.linalg.lstsq(design, data["target"].astype(np.float64), rcond=None)
        found = np.append(state.params["layer"]["kernel"][:, 0], state.params["layer"]["bias"])
        np.testing.assert_allclose(found, optimum, rtol=0, atol=2e-6)

    def test_only_what_wrt_selects_is_changed(self):
        wrt = nnx.All(nnx.Param, nnx.PathContains("outer"))
        state = create(Busy(), wrt=wrt)
        after, _ = make_train_step(squared_error, SGD, wrt=wrt)(state, regression())
        chex.assert_trees_all_equal(after.model_state["inner"], state.model_state["inner"])
        assert not np.array_equal(after.params["outer"]["kernel"], state.params["outer"]["kernel"])

    def test_tied_parameters_get_the_sum_of_their_gradients(self):
        class Tied(nnx.Module):
            def __init__(self):
                self.first = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
                self.second = self.first

        def objective(model, batch, rng, step):
            return jnp.mean(model.second(model.first(batch["input"])) ** 2), {}

        state, batch = create(Tied()), regression()
        after, _ = make_train_step(objective, SGD)(state, batch)

        def twice(p):
            hidden = batch["input"] @ p["kernel"] + p["bias"][None]
            return jnp.mean((hidden @ p["kernel"] + p["bias"][None]) ** 2)

        tied = state.params["first"]
        expected = jax.tree.map(lambda p, g: p - 0.1 * g, tied, jax.grad(twice)(tied))
        chex.assert_trees_all_close(after.params["first"], expected, rtol=1e-5, atol=1e-6)

    def test_assignments_to_parameters_last_for_the_forward_pass_only(self):
        def doubling(model, batch, rng, step):
            model.layer.bias[...] = model.layer.bias[...] + 100.0
            return jnp.mean(model.layer.kernel[...] ** 2), {}

        after, _ = one_step(doubling)
        np.testing.assert_array_equal(after.params["layer"]["bias"], 0.0)


class TestCarrying:
    def test_batch_statistics_random_counts_and_counters_advance(self):
        state = create(Busy())
        after, _ = make_train_step(squared_error, SGD)(state, regression())
        assert not np.array_equal(after.model_state["norm"]["mean"], state.model_state["norm"]["mean"])
        assert int(after.model_state["dropout"]["rngs"]["count"]) == 1
        assert int(after.model_state["calls"]) == 1

    def test_sown_values_are_dropped(self):
        def sowing(model, batch, rng, step):
            model.seen = nnx.Intermediate(batch["input"])
            return squared_error(model, batch, rng, step)

        after, _ = one_step(sowing)
        assert after.model_state == {}

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda m: setattr(m, "new", nnx.BatchStat(jnp.ones(2))), "`model_state/new` was created; create it in"),
            (lambda m: delattr(m, "calls"), "`model_state/calls` was removed"),
            (
                lambda m: m.norm.mean.set_value(jnp.zeros(3)),
                r"`model_state/norm/mean` was float32\(8,\) and became float32\(3,\)",
            ),
            (
                lambda m: m.norm.mean.set_value(jnp.zeros(8, jnp.bfloat16)),
                r"was float32\(8,\) and became bfloat16\(8,\)",
            ),
            (
                lambda m: m.norm.mean.set_value((jnp.zeros(8), jnp.zeros(8))),
                r"and became \(float32\(8,\), float32\(8,\)\); a variable keeps its shape and dtype",
            ),
        ],
        ids=["created", "removed", "shape", "dtype", "tree"],
    )
    def test_a_changed_structure_is_refused_by_name(self, change, message):
        def changing(model, batch, rng, step):
            result = squared_error(model, batch, rng, step)
            change(model)
            return result

        with pytest.raises(ObjectiveError, match=message):
            one_step(changing, Busy())

    def test_a_python_number_takes_the_dtype_of_its_variable(self):
        def assigning(model, batch, rng, step):
            result = squared_error(model, batch, rng, step)
            model.calls.set_value(5)
            model.norm.mean.set_value(model.norm.mean[...] * 0 + 1)
            return result

        after, _ = one_step(assigning, Busy())
        assert after.model_state["calls"].dtype == jnp.int32
        assert int(after.model_state["calls"]) == 5


class TestRandomness:
    def test_every_step_draws_a_key_by_its_number(self):
        def drawing(model, batch, rng, step):
            return jnp.sum(model.layer.kernel[...]), {"draw": jax.random.uniform(rng)}

        state, step = create(Linear(features=4)), make_train_step(drawing, SGD)
        first, metrics = step(state, regression())
        _, later = step(first, regression())
        assert metrics["draw"] == jax.random.uniform(jax.random.fold_in(state.rng, 0))
        assert later["draw"] == jax.random.uniform(jax.random.fold_in(state.rng, 1))
        assert_same_bits(first.rng, state.rng)
        assert metrics["draw"] != later["draw"]

    def test_the_objective_gets_the_number_of_updates_before_this_one(self):
        def asking(model, batch, rng, step):
            return jnp.sum(model.layer.kernel[...]), {"before": step}

        state, step = create(Linear(features=4)), make_train_step(asking, SGD)
        for expected in range(3):
            state, metrics = step(state, regression())
            assert (int(metrics["before"]), int(metrics["step"])) == (expected, expected + 1)

    def test_evaluation_is_repeatable_and_tells_its_batches_apart(self):
        def drawing(model, batch, rng, step):
            return jax.random.uniform(rng), {}

        state, evaluate = create(Linear(features=4)), make_eval_step(drawing)
        draws = [float(evaluate(state, regression(), index)["loss"]) for index in (0, 1, 0)]
        assert draws[0] == draws[2] != draws[1]
        assert float(evaluate(state, regression())["loss"]) == draws[0]


class TestEvaluation:
    def test_the_model_is_in_evaluation_mode(self):
        model, batch = Busy(), regression()
        metrics = make_eval_step(squared_error)(create(model), batch)
        model.eval()
        loss, _ = squared_error(model, batch, None, None)
        assert metrics["loss"] == loss
        assert int(metrics["step"]) == 0
        assert set(metrics) == {"loss", "mean_error", "step"}


class TestMetrics:
    def test_they_are_scalars_on_the_device(self):
        def reporting(model, batch, rng, step):
            loss, _ = squared_error(model, batch, rng, step)
            return loss, {"number": 3, "flag": True, "loss": loss * 2, "bf16": jnp.bfloat16(1)}

        _, metrics = one_step(reporting)
        chex.assert_rank(list(metrics.values()), 0)
        assert all(isinstance(value, jax.Array) for value in metrics.values())
        assert set(metrics) == {"number", "flag", "loss", "bf16", "step"}

    def test_a_loss_that_is_not_a_number_is_visible(self):
        def nan(model, batch, rng, step):
            return jnp.sum(model.layer.kernel[...]) * jnp.nan, {}

        assert np.isnan(one_step(nan)[1]["loss"])

    @pytest.mark.parametrize(
        ("result", "message"),
        [
            (lambda loss: loss, r"returned a bare loss; it must return a pair \(loss, metrics\)"),
            (lambda loss: None, "returned NoneType; it must return a pair"),
            (lambda loss: (loss, {}, {}), "returned a tuple of 3; it must return a pair"),
            (lambda loss: (loss[None], {}), r"returned a loss that has shape \(1,\); it must be a scalar. Average"),
            (lambda loss: (loss.astype(int), {}), "returned a loss that has dtype int32; it must be floating"),
            (lambda loss: ("low", {}), "returned a loss that is of type str; it must be a scalar"),
            (lambda loss: (loss, [loss]), "returned metrics of type list; they must be a mapping"),
            (lambda loss: (loss, {"step": 1}), "returned a metric `step`, which is the name of the number"),
            (lambda loss: (loss, {"a": jnp.ones(3)}), r"returned a metric `a` of shape \(3,\); metrics are scalars"),
            (lambda loss: (loss, {"a": "high"}), "returned a metric `a` of type str; it must be a scalar"),
            (lambda loss: (loss, {0: loss}), "returned a metric named 0; names must be strings"),
        ],
    )
    def test_an_objective_that_breaks_its_contract_is_told_how(self, result, message):
        def objective(model, batch, rng, step):
            return result(squared_error(model, batch, rng, step)[0])

        with pytest.raises(ObjectiveError, match="`loss_fn` " + message):
            one_step(objective)

    @pytest.mark.parametrize("precision", [None, "bfloat16"])
    def test_the_returned_loss_is_reported_as_loss(self, precision):
        def regularized(model, batch, rng, step):
            data_loss, _ = squared_error(model, batch, rng, step)
            return data_loss + 1.0, {"loss": data_loss}

        step = make_train_step(regularized, SGD, precision=precision)
        _, metrics = jax.jit(step)(create(Linear(4)), regression())
        bare = make_train_step(squared_error, SGD, precision=precision)(create(Linear(4)), regression())[1]
        np.testing.assert_allclose(metrics["loss"], bare["loss"] + 1, rtol=1e-3)

    @pytest.mark.parametrize("precision", [None, "bfloat16"])
    @pytest.mark.parametrize("report", [lambda loss: loss, jax.lax.stop_gradient, lambda loss: loss.astype(float)])
    def test_the_loss_itself_among_the_metrics_is_no_news(self, precision, report):
        def twice(model, batch, rng, step):
            loss, _ = squared_error(model, batch, rng, step)
            loss = loss.astype(jnp.bfloat16) if precision else loss
            return loss, {"loss": report(loss)}

        for options in ({}, {"accumulate_steps": 2}, {"remat": "dots_saveable"}):
            step = make_train_step(twice, SGD, precision=precision, **options)
            assert jax.jit(step)(create(Linear(4)), regression())[1]["loss"].dtype == jnp.float32
        make_eval_step(twice, precision=precision)(create(Linear(4)), regression())

    def test_an_error_in_the_objective_is_the_users_with_the_batch_beside_it(self):
        def failing(model, batch, rng, step):
            raise KeyError("label")

        with pytest.raises(KeyError) as caught:
            one_step(failing)
        note = "raised in `loss_fn` on a batch of input: float32(64, 4), target: float32(64,)"
        assert caught.value.__notes__[0] == note


class TestExtensions:
    def test_the_weighted_loss_is_added_and_reported(self):
        extension = Counting(ExtensionConfig(weight=0.5))
        after, metrics = one_step(squared_error, extensions={"size": extension})
        _, bare = one_step(squared_error)
        expected = 0.5 * jnp.mean(Linear(features=4)(regression()["input"]) ** 2)
        np.testing.assert_allclose(metrics["size_loss"], expected, rtol=1e-6)
        np.testing.assert_allclose(metrics["loss"], bare["loss"] + expected, rtol=1e-6)
        assert int(after.extensions["size"]["variables"]["evaluations"]) == 1
        assert int(extension.evaluations[...]) == 0

    def test_its_loss_takes_part_in_the_gradient(self):
        extension = Counting(ExtensionConfig(weight=2.0))
        with_it, _ = one_step(squared_error, extensions={"size": extension})

        def by_hand(model, batch, rng, step):
            loss, metrics = squared_error(model, batch, rng, step)
            return loss + 2.0 * jnp.mean(metrics["model_outputs"] ** 2), {}

        chex.assert_trees_all_close(with_it.params, one_step(by_hand)[0].params, rtol=1e-6)

    def test_a_disabled_one_is_left_out(self):
        extension = Counting(ExtensionConfig(enabled=False))
        after, metrics = one_step(squared_error, extensions={"size": extension})
        assert "size_loss" not in metrics
        assert int(after.extensions["size"]["variables"]["evaluations"]) == 0

    def test_a_duck_with_the_same_methods_works(self):
        class Duck:
            weight = 0.5

            def is_enabled(self):
                return True

            def loss_fn(self, batch, model_outputs, **kwargs):
                return jnp.mean(jnp.abs(model_outputs))

        after, metrics = one_step(squared_error, extensions={"duck": Duck()})
        assert metrics["duck_loss"] > 0
        assert after.extensions["duck"]["variables"] == {}

    def test_model_outputs_come_from_the_objective_first(self):
        seen = []

        class Looking(Counting):
            def loss_fn(self, batch, model_outputs, **kwargs):
                seen.append((model_outputs, set(kwargs)))
                return jnp.zeros(())

        def objective(model, batch, rng, step):
            return jnp.sum(model.layer.kernel[...]), {"model_outputs": {"a": 1}}

        _, metrics = one_step(objective, extensions={"look": Looking()})
        assert seen == [({"a": 1}, {"model", "rng", "step"})]
        assert "model_outputs" not in metrics

    def test_else_the_model_is_called_once_and_leaves_no_trace(self):
        def objective(model, batch, rng, step):
            return jnp.mean((model(batch["input"]) - batch["target"]) ** 2), {}

        seen = []

        class Looking(Counting):
            def loss_fn(self, batch, model_outputs, **kwargs):
                seen.append(model_outputs)
                return jnp.mean(model_outputs**2) * 0

        with_it, _ = one_step(objective, Busy(), extensions={"look": Looking()})
        without, _ = one_step(objective, Busy())
        assert seen[0].shape == (64,)
        chex.assert_trees_all_equal(
            jax.tree.map(np.asarray, with_it.model_state["norm"]), jax.tree.map(np.asarray, without.model_state["norm"])
        )
        assert int(with_it.model_state["calls"]) == 1
        chex.assert_trees_all_close(with_it.params, without.params, rtol=1e-6, atol=1e-7)

    def test_outputs_reported_as_none_are_none(self):
        seen = []

        class Looking(Counting):
            def loss_fn(self, batch, model_outputs, **kwargs):
                seen.append(model_outputs)
                return jnp.zeros(())

        def objective(model, batch, rng, step):
            return jnp.mean(model(batch["input"])), {"model_outputs": None}

        one_step(objective, extensions={"look": Looking()})
        assert seen == [None]

    @pytest.mark.parametrize("case", ["no input", "not callable"])
    def test_else_they_get_none(self, case):
        class Bare(nnx.Module):
            def __init__(self):
                self.weight = nnx.Param(jnp.ones(4))

        seen = []

        class Looking(Counting):
            def loss_fn(self, batch, model_outputs, **kwargs):
                seen.append(model_outputs)
                return jnp.zeros(())

        def objective(model, batch, rng, step):
            return jnp.sum(jax.tree.leaves(nnx.state(model))[0]), {}

        batch = {"x": regression()["input"]} if case == "no input" else regression()
        one_step(objective, Linear(features=4) if case == "no input" else Bare(), batch, extensions={"l": Looking()})
        assert seen == [None]

    def test_a_model_that_cannot_be_called_like_that_is_explained(self):
        def objective(model, batch, rng, step):
            return jnp.sum(model.layer.kernel[...]), {}

        batch = {"input": jnp.ones((2, 9))}
        with pytest.raises(TypeError) as caught:
            one_step(objective, batch=batch, extensions={"size": Counting()})
        assert "returned no `model_outputs` in its metrics" in caught.value.__notes__[0]

    def test_adding_one_leaves_the_draws_of_the_objective_alone(self):
        def drawing(model, batch, rng, step):
            return jnp.sum(model.layer.kernel[...]), {"draw": jax.random.uniform(rng), "model_outputs": jnp.ones(2)}

        class Drawing(Counting):
            def loss_fn(self, batch, model_outputs, *, rng, **kwargs):
                return jax.random.uniform(rng)

        one, two = Drawing(), Drawing()
        one.config, two.config = ExtensionConfig(name="one"), ExtensionConfig(name="two")
        _, metrics = one_step(drawing, extensions={"one": one, "two": two})
        assert metrics["draw"] == one_step(drawing)[1]["draw"]
        assert len({float(metrics[name]) for name in ("draw", "one_loss", "two_loss")}) == 3

    def test_changing_a_weight_compiles_nothing(self, compilations):
        extension = Counting()
        state = create(Linear(features=4), extensions={"size": extension})
        step = jax.jit(make_train_step(squared_error, SGD, extensions={"size": extension}))
        for weight in (0.0, 0.5, 2.0):
            held = {**state.extensions["size"], "weight": jnp.float32(weight)}
            _, metrics = step(state.replace(extensions={"size": held}), regression())
        assert metrics["size_loss"] > 0
        assert compilations["jit(train_step)"] == 1

    @pytest.mark.parametrize(
        ("extensions", "message"),
        [
            ([Counting()], "`extensions` is of type list; it must be a mapping of names"),
            (
                {"odd": object()},
                r"`extensions\['odd'\]` is of type object and has no is_enabled\(\), no weight, no loss_fn",
            ),
        ],
    )
    def test_what_is_no_extension_is_refused(self, extensions, message):
        with pytest.raises(ArgumentTypeError, match=message):
            make_train_step(squared_error, SGD, extensions=extensions)

    def test_two_with_one_name_are_refused(self):
        twins = {key: Counting(ExtensionConfig(name="same")) for key in "ab"}
        with pytest.raises(ArgumentError, match=r"`extensions\['a'\]` and `extensions\['b'\]` are both named 'same'"):
            make_train_step(squared_error, SGD, extensions=twins)

    def test_a_metric_with_the_name_of_its_loss_is_refused(self):
        def objective(model, batch, rng, step):
            loss, metrics = squared_error(model, batch, rng, step)
            return loss, {**metrics, "size_loss": loss}

        with pytest.raises(ObjectiveError, match="metric `size_loss`, which is also the loss of the extension 'size'"):
            one_step(objective, extensions={"size": Counting()})

    def test_a_loss_that_is_no_scalar_is_refused(self):
        class Wide(Counting):
            def loss_fn(self, batch, model_outputs, **kwargs):
                return model_outputs

        with pytest.raises(ObjectiveError, match=r"`extensions\['w'\].loss_fn` returned a loss that has shape \(64,\)"):
            one_step(squared_error, extensions={"w": Wide()})

    def test_one_that_the_state_does_not_know_is_refused(self):
        state = create(Linear(features=4))
        step = make_train_step(squared_error, SGD, extensions={"size": Counting()})
        with pytest.raises(ArgumentError, match=r"`extensions\['size'\]` is not in the state, .* created with none"):
            step(state, regression())


class TestBadCalls:
    @pytest.mark.parametrize("make", [lambda f: make_train_step(f, SGD), make_eval_step])
    def test_an_objective_that_cannot_be_called(self, make):
        with pytest.raises(ArgumentTypeError, match="`loss_fn` is of type str; it must be a callable loss_fn"):
            make("mse")

    def test_a_state_that_is_none(self):
        with pytest.raises(ArgumentTypeError, match=r"`state` is of type dict; it must be a trainer.TrainState"):
            make_train_step(squared_error, SGD)({}, regression())

    def test_a_batch_that_is_none(self):
        with pytest.raises(BatchError, match="`batch` is a list of Python values, not an array"):
            one_step(squared_error, batch=[1, 2])

    def test_a_filter_other_than_that_of_the_state(self):
        state = create(Busy(), wrt=nnx.All(nnx.Param, nnx.PathContains("outer")))
        with pytest.raises(ArgumentError, match="selects other variables than the filter that the state was created"):
            make_train_step(squared_error, SGD)(state, regression())

    def test_a_model_without_parameters(self):
        class Empty(nnx.Module):
            pass

        with pytest.raises(ArgumentError, match=r"the model has no parameters: `wrt` = .* selects none"):
            one_step(lambda *_: (jnp.zeros(()), {}), Empty())


class TestFusedSteps:
    def batches(self, n, size=8):
        data = regression(n * size)
        return {name: column.reshape(n, size, *column.shape[1:]) for name, column in data.items()}

    def state_and_step(self):
        optimizer = optax.adam(1e-2)
        extensions = {"size": Counting()}
        state = TrainState.create(Busy(), optimizer, rng=jax.random.key(0), extensions=extensions)
        return state, make_train_step(squared_error, optimizer, extensions=extensions)

    @pytest.mark.parametrize("count", [None, 0, 1, 3, 5])
    @pytest.mark.few(1)
    def test_it_is_so_many_single_steps_to_the_bit(self, count):
        state, step = self.state_and_step()
        batches = self.batches(5)
        fused = jax.jit(fuse_steps(step, 5))
        found, metrics = fused(state, batches) if count is None else fused(state, batches, count)
        single = jax.jit(step)
        steps = 5 if count is None else count
        for index in range(steps):
            state, one = single(state, {name: column[index] for name, column in batches.items()})
            chex.assert_trees_all_equal({name: value[index] for name, value in metrics.items()}, dict(one))
        assert_same_bits(found, state)
        assert all(value.shape == (5,) for value in metrics.values())
        assert all(not np.any(value[steps:]) for value in metrics.values())

    def test_one_program_serves_every_count_and_its_size_does_not_depend_on_n(self, compilations):
        state, step = self.state_and_step()
        fused = jax.jit(fuse_steps(step, 5))
        for count in (1, 5, 2):
            state, _ = fused(state, self.batches(5), count)
        assert compilations["jit(fused)"] == 1
        texts = [jax.jit(fuse_steps(step, n)).lower(state, self.batches(n), 1).as_text() for n in (5, 50)]
        assert texts[0].count("stablehlo.while") == texts[1].count("stablehlo.while") >= 1
        assert len(texts[1]) - len(texts[0]) < 1000

    def test_every_buffer_is_donated(self):
        state, step = self.state_and_step()
        lowered = jax.jit(fuse_steps(step, 5), donate_argnums=0).lower(state, self.batches(5), 5)
        assert lowered.compile().memory_analysis().alias_size_in_bytes >= sum(x.nbytes for x in jax.tree.leaves(state))

    def test_an_ensemble_is_fused_as_well(self):
        optimizer = optax.sgd(0.1)
        states = jax.vmap(lambda key: TrainState.create(Linear(4, rngs=nnx.Rngs(key)), optimizer, rng=key))(
            jax.random.split(jax.random.key(0), 3)
        )
        fused = jax.jit(jax.vmap(fuse_steps(make_train_step(squared_error, optimizer), 5), in_axes=(0, None)))
        _, metrics = fused(states, self.batches(5))
        assert metrics["loss"].shape == (3, 5)
        assert (metrics["loss"][:, -1] < metrics["loss"][:, 0]).all()

    def test_hyperparameters_in_the_state_differ_in_the_last_place_at_most(self):
        """XLA's CPU backend may round the other product of ``(1 - b1) * gradient + b1 * moment`` in a loop."""
        optimizer = optax.inject_hyperparams(optax.adamw)(1e-2)
        state = TrainState.create(Linear(4), optimizer, rng=jax.random.key(0))
        step = make_train_step(squared_error, optimizer)
        single, fused = jax.jit(step), jax.jit(fuse_steps(step, 20))
        batches = self.batches(20)
        for index in range(20):
            batch = {name: column[index] for name, column in batches.items()}
            after, _ = single(state, batch)
            found, _ = fused(
                state, {name: np.broadcast_to(column, (20, *column.shape)) for name, column in batch.items()}, 1
            )
            chex.assert_trees_all_equal(after.opt_state.hyperparams, found.opt_state.hyperparams)
            moments = [one.opt_state.inner_state[0] for one in (after, found)]
            chex.assert_trees_all_close(*moments, rtol=0, atol=2 * np.finfo(np.float32).eps)
            chex.assert_trees_all_close(after.params, found.params, rtol=0, atol=2 * np.finfo(np.float32).eps)
            state = after

    @pytest.mark.slow
    def test_a_convolution_differs_in_rounding_only(self):
        """XLA's CPU backend has other code for it inside of loops."""

        class Convolutional(nnx.Module):
            def __init__(self):
                self.conv = nnx.Conv(1, 8, (3, 3), rngs=nnx.Rngs(0))
                self.out = nnx.Linear(8, 1, rngs=nnx.Rngs(1))

            def __call__(self, x):
                return self.out(nnx.relu(self.conv(x)).mean((1, 2)))[:, 0]

        optimizer = optax.sgd(0.1)
        state = TrainState.create(Convolutional(), optimizer, rng=jax.random.key(0))
        step = make_train_step(squared_error, optimizer)
        draw = np.random.default_rng(0)
        batches = {
            "input": draw.normal(size=(5, 16, 14, 14, 1)).astype(np.float32),
            "target": draw.normal(size=(5, 16)).astype(np.float32),
        }
        fused, _ = jax.jit(fuse_steps(step, 5))(state, batches)
        for index in range(5):
            state, _ = jax.jit(step)(state, {name: column[index] for name, column in batches.items()})
        chex.assert_trees_all_close(fused.params, state.params, rtol=1e-5, atol=1e-6)

    def test_refusals(self):
        state, step = self.state_and_step()
        with pytest.raises(ArgumentError, match="`n` is 0; it must be a positive integer"):
            fuse_steps(step, 0)
        with pytest.raises(BatchError, match="`batches` holds 4 steps, but `n` is 5; every array must be of"):
            fuse_steps(step, 5)(state, self.batches(4))

    @pytest.mark.parametrize("count", [-1, 6, np.int32(6), np.array(7)], ids=repr)
    def test_a_count_that_the_batches_do_not_have_is_refused(self, count):
        state, step = self.state_and_step()
        with pytest.raises(ArgumentError, match=rf"`count` is {count}, but `n` is 5; it must be from 0 to 5\."):
            fuse_steps(step, 5)(state, self.batches(5), count)

    @pytest.mark.parametrize("count", [0, np.int32(5)], ids=repr)
    @pytest.mark.few(1)
    def test_the_first_and_the_last_count_are_taken(self, count):
        state, step = self.state_and_step()
        after, metrics = fuse_steps(step, 5)(state, self.batches(5), count)
        assert int(after.step) == int(count)
        assert np.count_nonzero(metrics["step"]) == int(count)
