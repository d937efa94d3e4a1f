"""What one may ask a trainer: it answers, and is as it was."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from tests.fit.test_resume import StoppedError, Watching
from tests.problems import Busy, Linear, config, regression, squared_error
from tests.test_api import assert_same_bits
from trainer import (
    ArgumentError,
    ArgumentTypeError,
    BatchError,
    Callback,
    Trainer,
    TrainState,
    batch_sharding,
    find_batch_size,
    find_learning_rate,
    make_mesh,
    make_train_step,
    summarize,
)
from trainer.compile.dispatch import Program


class Forbidden(Callback):
    """Hears of no event."""

    def on_compile_begin(self, trainer, name):
        raise AssertionError(name)

    def on_batch_end(self, trainer, step, logs):
        raise AssertionError(step)


def build(optimizer=None, **options):
    settings = config(gradient_clip_norm=1.0)
    return Trainer(Busy(), settings, optimizer, loss_fn=squared_error, callbacks=[Forbidden()], **options)


def unchanged(trainer, ask):
    before, record = trainer.state.copy(), (trainer.step, trainer.epoch, len(trainer.history))
    answer = ask(trainer)
    assert_same_bits(trainer.state, before)
    assert (trainer.step, trainer.epoch, len(trainer.history)) == record
    return answer


class Counted:
    """An endless iterator that reports its position under the names of Grain or of torchdata."""

    def __init__(self, names):
        self.position = 0
        get, put = names
        setattr(self, get, lambda: {"position": self.position})
        setattr(self, put, lambda state: vars(self).update(state))

    def __iter__(self):
        return self

    def __next__(self):
        self.position += 1
        return regression(8, seed=self.position)


class TestSummary:
    def test_it_adds_up(self):
        trainer = build(wrt="outer/**")
        lines = [line.split() for line in unchanged(trainer, lambda trainer: trainer.summary()).splitlines()]
        rows = {row[0]: row[1:] for row in lines[1:]}
        assert rows["."][:2] == ["Busy", "9"]
        assert rows["outer"][:5] == ["Linear", "9", "36", "0", "0"]
        assert rows["inner"][:4] == ["Linear", "0", "0", "40"]
        frozen = sum(leaf.size for leaf in jax.tree.leaves(trainer.state.model_state))
        assert int(rows["."][3].replace(",", "")) == frozen

    def test_on_a_mesh_it_is_the_same(self):
        eight, one = build(mesh=make_mesh({"data": 2, "fsdp": 4})), build()
        assert unchanged(eight, lambda trainer: trainer.summary()) == one.summary()
        tables = [unchanged(trainer, lambda trainer: trainer.summary(batch=regression(8))) for trainer in (eight, one)]
        # Of the draws of dropout JAX makes more operations over a mesh.
        rows = [[line for line in table.splitlines() if line.split()[0] not in (".", "dropout")] for table in tables]
        assert rows[0] == rows[1]

    def test_it_counts_moments_by_their_param(self):
        state = TrainState.create(Linear(4), optax.adam(0.1), rng=jax.random.key(0))
        *_, layer = (line.split() for line in summarize(state).splitlines())
        assert layer == ["layer", "Linear", "5", "20", "0", "0", "40"]

    def test_it_is_cut_and_takes_shapes(self):
        state = TrainState.create(Busy(), optax.adam(0.1), rng=jax.random.key(0))
        assert summarize(jax.eval_shape(lambda: state)) == summarize(state)
        assert len(summarize(state, depth=1).splitlines()) == 2
        with pytest.raises(ArgumentError, match="`depth` is 0; it must be a positive integer"):
            summarize(state, depth=0)


class TestLearningRate:
    @pytest.mark.parametrize("layout", [None, {"data": 4, "fsdp": 2}])
    @pytest.mark.few(1)
    def test_it_suggests_a_rate_on_one_device_and_on_a_mesh(self, layout):
        options = {} if layout is None else {"mesh": make_mesh(layout)}
        trainer = build(**options)
        found = unchanged(trainer, lambda trainer: trainer.find_learning_rate(regression(64), 16, high=10.0))
        assert 1e-4 < found.suggestion < 5
        assert len(found.rates) == len(found.losses) <= 100
        assert np.all(np.diff(found.rates) > 0)
        assert "the loss falls fastest at" in str(found)

    def test_each_step_has_its_rate(self):
        """The losses are those of a loop by hand."""
        data = [regression(8, seed=seed) for seed in range(3)]
        state = TrainState.create(Linear(4), optax.sgd(0.1), rng=jax.random.key(0))
        found = find_learning_rate(squared_error, optax.sgd, state, data, low=1e-3, high=1e-1, steps=10)
        rates, losses, params = np.geomspace(1e-3, 1e-1, 10), [], state.params
        for index, rate in enumerate(rates):
            batch = data[index % 3]

            def loss_of(params, batch=batch):
                return squared_error(state.replace(params=params).model(), batch, None, 0)[0]

            loss, grads = jax.value_and_grad(loss_of)(params)
            params = jax.tree.map(lambda param, grad, rate=rate: param - np.float32(rate) * grad, params, grads)
            losses.append(float(loss))
        np.testing.assert_allclose(found.losses, losses, rtol=1e-4)
        np.testing.assert_allclose(found.rates, rates)

    def test_it_ends_where_the_loss_diverges(self):
        state = TrainState.create(Linear(4), optax.sgd(0.1), rng=jax.random.key(0))
        found = find_learning_rate(squared_error, optax.sgd, state, [regression(32)], low=1e-3, high=1e6)
        assert len(found.losses) < 100
        assert found.suggestion < 10

    @pytest.mark.parametrize("layout", [None, {"data": 4, "fsdp": 2}])
    def test_of_its_own_loader_it_takes_passes_until_there_are_enough(self, layout):
        calls, batches = [], [regression(16, seed=seed) for seed in range(4)]

        def loader(batch_size):
            calls.append(batch_size)
            return iter(batches)

        options = {} if layout is None else {"mesh": make_mesh(layout)}
        trainer = build(train_data_loader=loader, **options)
        found = unchanged(trainer, lambda trainer: trainer.find_learning_rate(high=10.0, steps=10))
        assert calls == [trainer.training_config.batch_size] * 3
        given = build(**options).find_learning_rate(lambda size: batches, 16, high=10.0, steps=10)
        np.testing.assert_array_equal(found.losses, given.losses)
        rows = jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches)
        in_memory = build(**options).find_learning_rate(rows, 16, high=10.0, steps=10)
        assert len(in_memory.losses) == len(found.losses) == 10

    def test_every_step_gets_the_next_batch(self):
        seen = []

        def loss_fn(model, batch, rng, step):
            jax.debug.callback(lambda number: seen.append(int(number)), batch["number"][0])
            return squared_error(model, batch, rng, step)

        batches = [{**regression(8), "number": np.full(8, number)} for number in range(4)]
        settings = config(steps_per_epoch=3)
        Trainer(Busy(), settings, loss_fn=loss_fn).find_learning_rate(lambda: batches, high=1e-4, steps=10)
        jax.effects_barrier()
        assert seen == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]

    @pytest.mark.parametrize("names", [("get_state", "set_state"), ("state_dict", "load_state_dict")])
    def test_an_iterator_that_reports_its_position_is_put_back(self, names):
        trainer = build(train_data_loader=Counted(names))
        unchanged(trainer, lambda trainer: trainer.find_learning_rate(steps=10))
        assert trainer.train_data_loader.position == 0
        trainer.train_data_loader.position = 7
        with pytest.raises(ArgumentError, match="`low` is 2"):
            trainer.find_learning_rate(low=2.0)
        unchanged(trainer, lambda trainer: trainer.find_learning_rate(steps=10))
        assert trainer.train_data_loader.position == 7

    def test_what_is_drawn_from_an_iterator_is_gone_and_that_is_said(self):
        batches = (regression(8) for _ in range(12))
        with pytest.warns(UserWarning, match="`train_data` is an iterator of type generator, which cannot be taken"):
            build().find_learning_rate(batches, 8, high=1e-4, steps=10)
        assert len(list(batches)) == 2
        with pytest.warns(UserWarning, match="cannot"), pytest.raises(ArgumentError, match="`train_data` yielded"):
            build().find_learning_rate(iter([regression(8)]), 8, steps=10)

    def test_without_data_there_is_nothing_to_search(self):
        with pytest.raises(ArgumentError, match="`train_data` is missing, and the Trainer has no `train_data_loader`"):
            build().find_learning_rate()

    def test_short_batches_of_a_loader_are_padded(self):
        def masked(model, batch, rng, step):
            assert batch["input"].shape == (8, 4)
            error = jnp.square(model(batch["input"]) - batch["target"])
            weight = batch["mask"].sum()
            return (error * batch["mask"]).sum() / weight, {"batch_weight": weight}

        trainer = Trainer(Busy(), config(), loss_fn=masked, pad_to="batch")
        found = trainer.find_learning_rate([regression(8), regression(5)], 8, steps=10)
        assert np.isfinite(found.losses).all()

    def test_an_optimizer_of_the_callers_keeps_its_rate(self):
        trainer = build(optax.inject_hyperparams(optax.sgd)(learning_rate=0.1))
        found = unchanged(trainer, lambda trainer: trainer.find_learning_rate(regression(64), 16, steps=20))
        assert len(found.rates) == 20
        with pytest.raises(ArgumentError, match="no learning rate can be set, because the optimizer keeps none"):
            build(optax.sgd(0.1)).find_learning_rate(regression(64), 16)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"steps": 5}, "`steps` is 5; a range test needs at least 10"),
            ({"low": 1.0, "high": 0.1}, "`low` is 1.0 and `high` 0.1; they must be positive, finite and ascending"),
            ({"low": -1.0}, "`low` is -1.0 and `high` 1.0; they must be positive, finite and ascending"),
            ({"high": np.inf}, "`low` is 1e-06 and `high` inf; they must be positive, finite and ascending"),
        ],
    )
    def test_rates_that_cannot_be_tested(self, options, message):
        state = TrainState.create(Linear(4), optax.sgd(0.1), rng=jax.random.key(0))
        with pytest.raises(ArgumentError, match=message):
            build().find_learning_rate(regression(64), 16, **options)
        with pytest.raises(ArgumentError, match=message):
            find_learning_rate(squared_error, optax.sgd, state, [regression(8)], **options)

    @pytest.mark.parametrize("name", ["low", "high"])
    @pytest.mark.parametrize("value", ["0.1", None, True, np.ones(2)])
    def test_what_is_no_rate(self, name, value):
        state = TrainState.create(Linear(4), optax.sgd(0.1), rng=jax.random.key(0))
        message = rf"`{name}` is .* of type {type(value).__name__}; it must be a number"
        with pytest.raises(ArgumentTypeError, match=message):
            build().find_learning_rate(regression(64), 16, **{name: value})
        with pytest.raises(ArgumentTypeError, match=message):
            find_learning_rate(squared_error, optax.sgd, state, [regression(8)], **{name: value})

    def test_no_batch(self):
        state = TrainState.create(Linear(4), optax.sgd(0.1), rng=jax.random.key(0))
        with pytest.raises(ArgumentError, match="`batches` has no batch, or is an iterator with fewer than `steps`"):
            find_learning_rate(squared_error, optax.sgd, state, iter([regression(8)]))


class TestBatchSize:
    @pytest.mark.slow
    def test_it_is_the_largest_that_fits(self):
        costs = [Trainer(Busy(), config(), loss_fn=squared_error).compile(regression(size)).total for size in (64, 128)]
        trainer = Trainer(Busy(), config(), loss_fn=squared_error)
        memory = sum(costs) // 2
        assert unchanged(trainer, lambda trainer: trainer.find_batch_size(regression(3), memory=memory)) == 64
        assert unchanged(trainer, lambda trainer: trainer.find_batch_size(regression(3), high=100)) == 64

    def test_it_is_that_of_the_pure_step(self):
        optimizer, example = optax.adam(1e-2), regression(3)
        state = TrainState.create(Busy(), optimizer, rng=jax.random.key(0))
        step, before = make_train_step(squared_error, optimizer), state.copy()
        sizes = (64, 128)
        plans = [jax.jit(step, donate_argnums=0).lower(state, regression(size)).compile() for size in sizes]
        needed = [plan.memory_analysis() for plan in plans]
        totals = [
            found.argument_size_in_bytes
            + found.output_size_in_bytes
            - found.alias_size_in_bytes
            + found.temp_size_in_bytes
            for found in needed
        ]
        assert find_batch_size(step, state, example, memory=totals[1]) == 128
        assert find_batch_size(step, state, example, memory=totals[1] - 1) == 64
        assert find_batch_size(step, state, jax.eval_shape(lambda: example), high=70) == 64
        assert_same_bits(state, before)

    def test_of_a_pure_step_over_a_mesh_the_example_says_how_it_is_split(self):
        mesh, optimizer = make_mesh({"data": 8}), optax.adam(1e-2)
        state = jax.device_put(
            TrainState.create(Linear(4), optimizer, rng=jax.random.key(0)), NamedSharding(mesh, PartitionSpec())
        )
        example = jax.device_put(regression(8), batch_sharding(mesh))
        step = make_train_step(squared_error, optimizer)
        assert find_batch_size(step, state, example, high=20) == 16
        with pytest.raises(ArgumentError, match="no size of a batch fits: `high` is 4"):
            find_batch_size(step, state, example, high=4)
        with pytest.raises(ArgumentError, match="no size of a batch fits: a step of 8 needs more memory"):
            find_batch_size(step, state, example, memory=10)

    def test_fewer_examples_than_micro_batches_are_no_size(self):
        trainer = build(accumulate_steps=4)
        assert unchanged(trainer, lambda trainer: trainer.find_batch_size(regression(3), high=10)) == 8
        with pytest.raises(BatchError, match=r"`batch` has 2 examples .*, fewer than `accumulate_steps` = 4"):
            trainer.find_batch_size(regression(3), high=3)

    def test_no_size_fits(self):
        with pytest.raises(ArgumentError, match="no size of a batch fits: a step of 1 needs more memory than there is"):
            build().find_batch_size(regression(3), memory=10)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"memory": "16G"}, "`memory` is '16G' of type str; it must be a number"),
            ({"high": 1e3}, "`high` is 1000.0 of type float; it must be a positive integer"),
        ],
    )
    def test_arguments(self, options, message):
        with pytest.raises(ArgumentTypeError, match=message):
            build().find_batch_size(regression(3), **options)
        state = TrainState.create(Busy(), optax.sgd(0.1), rng=jax.random.key(0))
        with pytest.raises(ArgumentTypeError, match=message):
            find_batch_size(make_train_step(squared_error, optax.sgd(0.1)), state, regression(3), **options)

    @pytest.mark.parametrize(("text", "found"), [("RESOURCE_EXHAUSTED: Out of memory while trying to", 16), ("", None)])
    def test_a_compiler_may_refuse_what_does_not_fit(self, text, found, monkeypatch):
        compile_traced = Program.compile

        def refuse(program, traced):
            if any(aval.shape[:1] == (32,) for aval in traced.jaxpr.in_avals):
                raise jax.errors.JaxRuntimeError(text)
            return compile_traced(program, traced)

        monkeypatch.setattr(Program, "compile", refuse)
        trainer = Trainer(Linear(4), config(), loss_fn=squared_error)
        with contextlib.nullcontext() if found else pytest.raises(jax.errors.JaxRuntimeError):
            assert trainer.find_batch_size(regression(3), high=32) == found

    @pytest.mark.slow
    def test_over_a_mesh_devices_can_share_it(self):
        trainer = build(mesh=make_mesh({"data": 8}))
        assert unchanged(trainer, lambda trainer: trainer.find_batch_size(regression(3), high=20)) == 16
        with pytest.raises(ArgumentError, match="no size of a batch fits: `high` is 4"):
            trainer.find_batch_size(regression(3), high=4)

    @pytest.mark.slow
    def test_it_trains_afterwards_without_a_warning(self, tmp_path):
        trainer = Trainer(Busy(), config(), loss_fn=squared_error, workdir=tmp_path)
        trainer.find_batch_size(regression(3), high=64)
        trainer.train(regression(20), 2, 8)


class TestResumed:
    """Between a kill and the end of the resumed run everything is asked, and answers as if there had been no kill."""

    def ask(self, trainer):
        rates = unchanged(trainer, lambda trainer: trainer.find_learning_rate(regression(64), 16, steps=10))
        return trainer.summary(), trainer.find_batch_size(regression(3), high=16), rates.losses.tolist()

    @pytest.mark.parametrize("axes", [None, {"data": 8}])
    @pytest.mark.few(1)
    def test_questions_change_nothing_and_answers_are_the_same(self, axes, tmp_path):
        def trainer(directory, **options):
            mesh = axes and make_mesh(axes)
            return Trainer(
                Busy(), config(), loss_fn=squared_error, workdir=directory, save_interval=2, mesh=mesh, **options
            )

        whole = trainer(tmp_path / "whole")
        whole.train(regression(40), 2, 8)
        with pytest.raises(StoppedError):
            trainer(tmp_path / "cut", callbacks=[Watching(7)]).train(regression(40), 2, 8)
        resumed = trainer(tmp_path / "cut", callbacks=[Watching()])
        fresh = self.ask(resumed)
        resumed.train(regression(40), 2, 8, resume=True)
        assert_same_bits(resumed.state, whole.state)
        assert self.ask(resumed) == self.ask(whole) != fresh


class TestFlops:
    def net(self):
        class Net(nnx.Module):
            def __init__(self, rngs):
                self.conv = nnx.Conv(1, 4, (3, 3), rngs=rngs)
                self.layers = nnx.List([nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)])
                self.entry, self.head = nnx.Linear(256, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)

            def __call__(self, x):
                x = self.entry(self.conv(x).reshape(len(x), -1))
                for layer in self.layers:
                    x = jax.nn.relu(layer(x))
                return self.head(x)

        return Net(nnx.Rngs(0))

    def loss_fn(self, model, batch, rng, step):
        return jnp.mean(model(batch["x"]) ** 2), {}

    def counted(self, table):
        lines = [line.split() for line in table.splitlines()]
        assert lines[0][-1] == "flops"
        return {line[0]: int(line[-1].replace(",", "")) for line in lines[1:]}

    @pytest.mark.parametrize("abstract", [False, True])
    def test_products_of_every_module(self, abstract):
        trainer = Trainer(self.net(), config(), loss_fn=self.loss_fn)
        batch = {"x": jnp.ones((5, 8, 8, 1))}
        batch = jax.eval_shape(lambda: batch) if abstract else batch
        flops = self.counted(trainer.summary(batch=batch))
        for name, product in {"layers/0": 2 * 5 * 8 * 8, "entry": 2 * 5 * 256 * 8, "head": 2 * 5 * 8 * 2}.items():
            assert product <= flops[name] <= product + 2 * 5 * 8  # and the bias
        assert 2 * 5 * 64 * 4 * 9 <= flops["conv"] <= 2 * 5 * 64 * 4 * 9 + 2 * 5 * 64 * 4
        parts = sum(flops[name] for name in ("conv", "entry", "layers/0", "layers/1", "head"))
        assert parts < flops["."] < parts + 1500  # what stands between the modules: reshape, relu, mean
        assert "flops" not in trainer.summary()

    def test_a_batch_without_an_objective(self):
        state = TrainState.create(self.net(), optax.sgd(0.1), rng=jax.random.key(0))
        with pytest.raises(ArgumentError, match="pass both, or neither"):
            summarize(state, batch={"x": jnp.ones((5, 8, 8, 1))})
