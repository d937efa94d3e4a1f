"""Averages of params: equal to their definitions, found wherever they are, and part of a run like everything else."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from optax import contrib

from tests.fit.test_resume import StoppedError, Watching
from tests.problems import Busy, Linear, config, regression, squared_error
from tests.test_api import assert_same_bits
from trainer import (
    ArgumentError,
    ArgumentTypeError,
    Trainer,
    TrainState,
    averaged_params,
    by_group,
    ema_of_params,
    fuse_steps,
    load_state,
    make_eval_step,
    make_mesh,
    make_train_step,
    polyak_average,
    save_state,
    with_averaged_params,
)

PARAMS = {"kernel": jnp.arange(6.0).reshape(3, 2) - 2, "bias": jnp.array([0.5, -1.0])}


def iterates(optimizer, steps=12, params=PARAMS):
    """The params after each update of a loop by hand, and the last state of the optimizer."""
    update, opt_state, visited = jax.jit(optimizer.update), optimizer.init(params), []
    for seed in range(steps):
        grads = jax.tree.map(lambda leaf, key=seed: jnp.cos(leaf + key).astype(leaf.dtype), params)
        updates, opt_state = update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        visited.append(params)
    return visited, opt_state


def ema_by_definition(visited, decay, warmup=0, start=None):
    """m_t and its bias correction, in float64; from ``start`` there is nothing to correct."""
    mean, forgotten = 0.0 if start is None else np.float64(start), 1.0
    for t, leaf in enumerate(visited, start=1):
        beta = min(decay, t / max(warmup + t - 1, 1e-30))
        mean = beta * mean + (1 - beta) * np.float64(leaf)
        forgotten *= beta
    return mean / (1 - forgotten) if start is None else mean


@pytest.mark.few(3)
@pytest.mark.parametrize("warmup", [0, 1, 10])
@pytest.mark.parametrize("decay", [0.0, 0.9, 0.9999])
def test_ema_equals_its_definition(decay, warmup):
    visited, opt_state = iterates(optax.chain(optax.adam(0.1), ema_of_params(decay, warmup=warmup)))
    for name, leaf in averaged_params(opt_state, visited[-1]).items():
        wanted = ema_by_definition([params[name] for params in visited], decay, warmup)
        np.testing.assert_allclose(leaf, wanted, rtol=2e-6, atol=2e-6)


def test_ema_without_correction_starts_from_the_initial_params():
    optimizer = optax.chain(optax.adam(0.1), ema_of_params(0.8, debias=False))
    jax.tree.map(np.testing.assert_array_equal, averaged_params(optimizer.init(PARAMS), PARAMS), PARAMS)
    visited, opt_state = iterates(optimizer)
    for name, leaf in averaged_params(opt_state, visited[-1]).items():
        wanted = ema_by_definition([params[name] for params in visited], 0.8, start=PARAMS[name])
        np.testing.assert_allclose(leaf, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.few(3)
@pytest.mark.parametrize("start", [0, 5, 11, 12, 40])
def test_polyak_equals_its_definition(start):
    visited, opt_state = iterates(optax.chain(optax.adam(0.1), polyak_average(start)))
    averaged = visited[start:] or visited[-1:]
    for name, leaf in averaged_params(opt_state, visited[-1]).items():
        wanted = np.mean([np.float64(params[name]) for params in averaged], axis=0)
        np.testing.assert_allclose(leaf, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("average", [ema_of_params(0.999), polyak_average()])
def test_params_that_stand_still_are_their_average_to_the_bit(average):
    _, opt_state = iterates(optax.chain(optax.set_to_zero(), average), steps=50)
    jax.tree.map(np.testing.assert_array_equal, averaged_params(opt_state, PARAMS), PARAMS)


@pytest.mark.parametrize("average", [ema_of_params(0.999), polyak_average()])
def test_the_updates_are_left_alone(average):
    alone, _ = iterates(optax.adam(0.1))
    beside, _ = iterates(optax.chain(optax.adam(0.1), average))
    jax.tree.map(np.testing.assert_array_equal, alone, beside)


def test_the_average_of_bfloat16_params_is_kept_in_float32():
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    visited, opt_state = iterates(optax.chain(optax.sgd(0.1), ema_of_params(0.999)), 300, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(opt_state[1].average)} == {jnp.dtype("float32")}
    averaged = averaged_params(opt_state, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(averaged)} == {jnp.dtype("bfloat16")}
    wanted = ema_by_definition([params["kernel"] for params in visited], 0.999)
    np.testing.assert_allclose(opt_state[1].average["kernel"], wanted, rtol=1e-5, atol=1e-5)


def test_a_step_averages_the_params_that_it_returns_to_the_bit():
    """XLA may leave out the rounding to bfloat16 of a sum that is widened at once."""

    class Half(nnx.Module):
        def __init__(self):
            self.layer = nnx.Linear(4, 1, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))

        def __call__(self, x):
            return self.layer(x)[:, 0]

    optimizer = optax.chain(optax.adam(1e-2), ema_of_params(0.9))
    state = TrainState.create(Half(), optimizer, rng=jax.random.key(0))
    state, _ = jax.jit(make_train_step(squared_error, optimizer))(state, regression(8))
    averaged, wanted = state.opt_state[1].average, jax.tree.map(lambda leaf: np.asarray(leaf, np.float32), state.params)
    jax.tree.map(np.testing.assert_array_equal, averaged, wanted)


def test_behind_multi_steps_every_micro_batch_counts():
    optimizer = optax.chain(optax.MultiSteps(optax.adam(0.1), 3).gradient_transformation(), ema_of_params(0.7))
    visited, opt_state = iterates(optimizer)
    for name, leaf in averaged_params(opt_state, visited[-1]).items():
        np.testing.assert_allclose(leaf, ema_by_definition([params[name] for params in visited], 0.7), rtol=2e-6)


def test_inside_multi_steps_only_real_updates_count():
    visited, opt_state = iterates(optax.MultiSteps(optax.chain(optax.adam(0.1), ema_of_params(0.7)), 3))
    real = visited[2::3]
    assert int(opt_state.inner_opt_state[1].num_updates) == 4
    for name, leaf in averaged_params(opt_state, visited[-1]).items():
        np.testing.assert_allclose(
            leaf, ema_by_definition([params[name] for params in real], 0.7), rtol=2e-6, atol=2e-6
        )


def test_a_decay_may_follow_a_schedule():
    average = optax.inject_hyperparams(ema_of_params)(decay=lambda count: jnp.where(count < 6, 0.0, 0.5))
    visited, opt_state = iterates(optax.chain(optax.adam(0.1), average))
    last = 0.5 ** len(visited[6:])
    wanted = last * np.float64(visited[5]["bias"]) + sum(
        0.5 * 0.5 ** (len(visited) - 1 - index) * np.float64(visited[index]["bias"]) for index in range(6, len(visited))
    )
    np.testing.assert_allclose(averaged_params(opt_state, visited[-1])["bias"], wanted, rtol=2e-6, atol=2e-6)


def adam_and_ema(rate=0.1):
    return optax.chain(optax.adam(rate), ema_of_params(0.9))


WHERE = {
    "alone": lambda: ema_of_params(0.9),
    "chain": adam_and_ema,
    "chain of chains": lambda: optax.chain(optax.clip(1.0), optax.chain(adam_and_ema())),
    "inject_hyperparams": lambda: optax.inject_hyperparams(adam_and_ema)(rate=0.1),
    "MultiSteps": lambda: optax.MultiSteps(adam_and_ema(), 2).gradient_transformation(),
    "apply_if_finite": lambda: optax.apply_if_finite(adam_and_ema(), 3),
    "behind lookahead": lambda: optax.chain(optax.lookahead(optax.adam(0.1), 2, 0.5), ema_of_params(0.9)),
    "group of all": lambda: by_group({"*": adam_and_ema()}),
}


@pytest.mark.few(4)
@pytest.mark.parametrize("where", WHERE)
def test_it_is_found_wherever_it_is(where):
    optimizer = WHERE[where]()
    state = TrainState.create(Linear(4), optimizer, rng=jax.random.key(0))
    step, visited = jax.jit(make_train_step(squared_error, optimizer)), []
    for seed in range(4):
        state, _ = step(state, regression(8, seed=seed))
        visited.append(state.params)
    if where == "MultiSteps":
        visited = visited[1::2]
    kernels = [params["layer"]["kernel"] for params in visited]
    found = averaged_params(state.opt_state, state.params)
    assert jax.tree.structure(found) == jax.tree.structure(state.params)
    np.testing.assert_allclose(found["layer"]["kernel"], ema_by_definition(kernels, 0.9), rtol=1e-5, atol=1e-6)


def test_params_of_other_groups_are_returned_as_they_are():
    optimizer = by_group({"*/kernel": adam_and_ema(), "*": optax.sgd(0.1)})
    state = TrainState.create(Linear(4), optimizer, rng=jax.random.key(0))
    step = jax.jit(make_train_step(squared_error, optimizer))
    for seed in range(3):
        state, _ = step(state, regression(8, seed=seed))
    found = averaged_params(state.opt_state, state.params)
    np.testing.assert_array_equal(found["layer"]["bias"], state.params["layer"]["bias"])
    assert np.abs(found["layer"]["kernel"] - state.params["layer"]["kernel"]).max() > 1e-3


PREFIXES = {
    "labels": lambda chain: optax.multi_transform(
        {"train": chain, "frozen": optax.set_to_zero()}, {"inner": "frozen", "norm": "frozen", "outer": "train"}
    ),
    "mask": lambda chain: optax.masked(chain, {"inner": False, "norm": False, "outer": True}),
}


@pytest.mark.parametrize("name", PREFIXES)
def test_a_mask_may_be_a_prefix_of_the_params(name):
    state = TrainState.create(Busy(), PREFIXES[name](adam_and_ema()), rng=jax.random.key(0))
    zeros = jax.tree.map(jnp.zeros_like, state.params)
    found = averaged_params(state.opt_state, zeros)
    assert_same_bits(found, {**zeros, "outer": state.params["outer"]})


@pytest.mark.parametrize(
    ("optimizer", "message"),
    [
        (optax.adam(0.1), "`opt_state` holds no averages of params; it must hold one: put ema_of_params or polyak"),
        (
            optax.chain(adam_and_ema(), polyak_average()),
            "`opt_state` holds 2 averages of params, `0/1`, `1`; it must hold one",
        ),
    ],
)
def test_none_and_two_are_refused_by_name(optimizer, message):
    with pytest.raises(ArgumentError, match=re.escape(message)):
        averaged_params(optimizer.init(PARAMS), PARAMS)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: ema_of_params(1.0), ArgumentError, "`decay` is 1.0; it must be at least 0 and less than 1."),
        (lambda: ema_of_params(-0.1), ArgumentError, "`decay` is -0.1; it must be at least 0 and less than 1."),
        (lambda: ema_of_params("0.9"), ArgumentTypeError, "`decay` is '0.9' of type str; it must be a number."),
        (lambda: ema_of_params(True), ArgumentTypeError, "`decay` is True of type bool; it must be a number."),
        (lambda: ema_of_params(0.9, warmup=-1), ArgumentError, "`warmup` is -1; it must be zero or more."),
        (lambda: ema_of_params(0.9, debias=1), ArgumentTypeError, "`debias` is 1 of type int; it must be True or"),
        (lambda: polyak_average(-1), ArgumentError, "`start_step` is -1; it must be zero or more."),
        (lambda: polyak_average(1.5), ArgumentTypeError, "`start_step` is 1.5 of type float; it must be an integer."),
        (
            lambda: ema_of_params(0.9).update(PARAMS, ema_of_params(0.9).init(PARAMS)),
            ArgumentError,
            "`params` were not given to ema_of_params: it averages them",
        ),
    ],
)
def test_arguments_that_cannot_be_used_are_refused_by_name(make, kind, message):
    with pytest.raises(kind, match=re.escape(message)):
        make()


class TestTransformations:
    def test_it_averages_for_every_member_of_an_ensemble(self):
        optimizer, keys = adam_and_ema(), jax.random.split(jax.random.key(0), 3)

        def create(key):
            return TrainState.create(Linear(4, rngs=nnx.Rngs(key)), optimizer, rng=key)

        step = make_train_step(squared_error, optimizer)
        batch = regression(8)
        together, alone = jax.vmap(create)(keys), [create(key) for key in keys]
        for _ in range(3):
            together, _ = jax.jit(jax.vmap(step, in_axes=(0, None)))(together, batch)
            alone = [jax.jit(step)(state, batch)[0] for state in alone]
        found = averaged_params(together.opt_state, together.params)
        for index, state in enumerate(alone):
            one = averaged_params(state.opt_state, state.params)
            jax.tree.map(lambda a, b, i=index: np.testing.assert_allclose(a[i], b, rtol=1e-5, atol=1e-6), found, one)

    def test_fused_steps_average_as_single_ones_do(self):
        optimizer = optax.chain(optax.sgd(0.1), polyak_average())
        state = TrainState.create(Linear(4), optimizer, rng=jax.random.key(0))
        step = make_train_step(squared_error, optimizer)
        batches = [regression(8, seed=seed) for seed in range(5)]
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batches)
        fused, _ = jax.jit(fuse_steps(step, 5))(state, stacked)
        for batch in batches:
            state, _ = jax.jit(step)(state, batch)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), fused.opt_state, state.opt_state)


def build(directory, average, *, model=None, optimizer=None, **options):
    settings = config(gradient_clip_norm=options.pop("clip", None))
    return Trainer(
        Busy() if model is None else model,
        settings,
        optimizer,
        loss_fn=squared_error,
        workdir=directory,
        params_average=average,
        **options,
    )


class TestTrainer:
    @pytest.mark.parametrize("clip", [None, 0.5])
    def test_it_equals_the_chain_and_evaluates_the_average(self, clip, tmp_path):
        trainer = build(tmp_path, ema_of_params(0.9), optimizer=optax.adam(0.05), clip=clip)
        validation = trainer.train(regression(40), 2, 8, regression(8, seed=1))
        by_hand = optax.adam(0.05) if clip is None else optax.chain(optax.clip_by_global_norm(clip), optax.adam(0.05))
        by_hand = optax.chain(by_hand, ema_of_params(0.9))
        other = Trainer(
            Busy(), config(), by_hand, loss_fn=squared_error, eval_params=averaged_params, workdir=tmp_path / "other"
        )
        assert other.train(regression(40), 2, 8, regression(8, seed=1)) == validation
        assert_same_bits(trainer.state, other.state)
        averaged = averaged_params(trainer.opt_state, trainer.state.params)
        jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(trainer.model, nnx.Param)), averaged)
        rows = regression(8, seed=1)["input"]
        np.testing.assert_allclose(trainer.predict(rows, 3), trainer.model(rows), rtol=1e-5, atol=1e-6)
        raw = jax.jit(make_eval_step(squared_error))(trainer.state, regression(8, seed=1))
        assert abs(float(raw["loss"]) - validation["loss"]) > 1e-4  # else the test shows nothing

    @pytest.mark.few(2)
    @pytest.mark.parametrize(
        "make",
        [
            lambda: optax.lookahead(optax.sgd(0.1), 2, 0.5),
            optax.lbfgs,
            lambda: optax.inject_hyperparams(optax.adam)(learning_rate=0.1),
            lambda: contrib.schedule_free_sgd(0.1),
            lambda: by_group({"*/kernel": optax.sgd(0.1), "*": optax.adam(0.1)}),
        ],
    )
    def test_it_averages_what_any_optimizer_trains(self, make, tmp_path):
        trainer = build(tmp_path, polyak_average(), model=Linear(4), optimizer=make())
        visited = []
        for seed in range(4):
            trainer.train_step(regression(8, seed=seed))
            visited.append(np.float64(trainer.state.params["layer"]["kernel"]))
        found = nnx.to_pure_dict(nnx.state(trainer.model, nnx.Param))["layer"]["kernel"]
        np.testing.assert_allclose(found, np.mean(visited, axis=0), rtol=1e-5, atol=1e-6)

    def test_the_trained_params_are_those_without_an_average(self, tmp_path):
        states = []
        for name, average in (("with", polyak_average()), ("without", None)):
            trainer = build(tmp_path / name, average)
            trainer.train(regression(40), 2, 8)
            states.append(trainer.state.params)
        jax.tree.map(np.testing.assert_array_equal, *states)

    def test_without_one_the_optimizer_is_the_one_that_was_given(self, tmp_path):
        optimizer = optax.adam(0.1)
        trainer = build(tmp_path, None, optimizer=optimizer)
        assert trainer.optimizer is optimizer
        plain = TrainState.create(Busy(), optimizer, rng=jax.random.PRNGKey(0))
        assert jax.tree.structure(trainer.state) == jax.tree.structure(plain)

    @pytest.mark.parametrize("clip", [None, 0.5])
    def test_the_callers_eval_params_come_first_and_see_the_callers_optimizer(self, clip, tmp_path):
        seen = []

        def eval_params(opt_state, params):
            seen.append(jax.tree.structure(opt_state))
            return contrib.schedule_free_eval_params(opt_state, params)

        optimizer = contrib.schedule_free_sgd(0.1)
        options = {"optimizer": optimizer, "eval_params": eval_params, "clip": clip}
        trainer = build(tmp_path, polyak_average(), model=Linear(4), **options)
        trainer.train(regression(40), 1, 8)
        own = trainer.opt_state[0] if clip is None else trainer.opt_state[0][1]
        wanted = contrib.schedule_free_eval_params(own, trainer.state.params)
        jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(trainer.model, nnx.Param)), wanted)
        assert set(seen) == {jax.tree.structure(optimizer.init(trainer.state.params))}

    def test_averaged_params_as_eval_params_says_the_same(self, tmp_path):
        trainer, other = (
            build(tmp_path / str(index), ema_of_params(0.5), **options)
            for index, options in enumerate(({}, {"eval_params": averaged_params}))
        )
        for each in (trainer, other):
            each.train(regression(40), 1, 8)
        assert_same_bits(nnx.state(trainer.model), nnx.state(other.model))

    def test_a_function_that_looks_for_the_average_is_told_where_it_is(self, tmp_path):
        look = lambda opt_state, params: averaged_params(opt_state, params)  # noqa: E731
        with pytest.raises(ArgumentError, match="holds no averages of params") as caught:
            build(tmp_path, ema_of_params(0.5), eval_params=look)
        assert "leave it out, and that average is evaluated" in caught.value.__notes__[-1]

    @pytest.mark.parametrize("average", [ema_of_params(0.9, warmup=10), polyak_average(4)])
    @pytest.mark.few(1)
    def test_killed_and_resumed_it_is_the_same_to_the_bit(self, average, tmp_path):
        def run(trainer, **options):
            return trainer.train(regression(58), 2, 4, regression(10, seed=1), val_interval=4, **options)

        whole = build(tmp_path / "whole", average)
        wanted = run(whole)
        with pytest.raises(StoppedError):
            run(build(tmp_path / "cut", average, callbacks=[Watching(17)], save_interval=3))
        resumed = build(tmp_path / "cut", average, callbacks=[Watching()], save_interval=3)
        assert run(resumed, resume=True) == wanted
        assert_same_bits(resumed.state, whole.state)

    def test_another_decay_is_noticed_when_a_run_is_resumed(self, tmp_path):
        with pytest.raises(StoppedError):
            build(tmp_path, ema_of_params(0.9), callbacks=[Watching(5)], save_interval=2).train(regression(40), 2, 8)
        other = build(tmp_path, ema_of_params(0.99), callbacks=[Watching()], save_interval=2)
        with pytest.warns(UserWarning, match="`params_average` differs"):
            other.train(regression(40), 2, 8, resume=True)

    @pytest.mark.parametrize("average_of", [ema_of_params(0.9), polyak_average(2)], ids=["ema", "polyak"])
    @pytest.mark.slow
    def test_on_a_mesh_it_is_sharded_as_the_params_and_the_numbers_are_those_of_one_device(self, average_of, tmp_path):
        class Wide(nnx.Module):
            def __init__(self, rngs):
                self.inner = nnx.Linear(4, 2**15, rngs=rngs)
                self.outer = nnx.Linear(2**15, 1, rngs=rngs)

            def __call__(self, x):
                return self.outer(nnx.tanh(self.inner(x)))[:, 0]

        # A large epsilon: where a gradient is next to nothing, Adam would scale its rounding up.
        averages, optimizer = [], optax.adam(1e-2, eps=1e-2)
        for name, mesh in (("eight", make_mesh({"data": 2, "fsdp": 4})), ("one", None)):
            trainer = build(tmp_path / name, average_of, model=Wide(nnx.Rngs(0)), optimizer=optimizer, mesh=mesh)
            trainer.train(regression(16), 2, 8)
            average = trainer.opt_state[-1].average
            averages.append(jax.device_get(averaged_params(trainer.opt_state, trainer.state.params)))
            if mesh is not None:
                assert average["inner"]["kernel"].sharding == trainer.state.params["inner"]["kernel"].sharding
                assert not average["inner"]["kernel"].sharding.is_fully_replicated
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), *averages)

    def test_something_else_is_refused_by_name(self, tmp_path):
        with pytest.raises(
            ArgumentTypeError, match=re.escape("`params_average` is of type float; it must be an optax")
        ):
            build(tmp_path, 0.99)
        with pytest.raises(ArgumentError, match="`opt_state` holds no averages of params"):
            build(tmp_path, optax.identity())


class TestExport:
    @pytest.mark.filterwarnings("ignore:.* holds (the params and the model state|weights only)")
    @pytest.mark.parametrize("suffix", ["safetensors", "msgpack"])
    def test_either_is_written_and_read(self, suffix, tmp_path):
        trainer = build(tmp_path, ema_of_params(0.9))
        trainer.train(regression(40), 1, 8)
        averaged = with_averaged_params(trainer.state)
        for name, state in (("trained", trainer.state), ("averaged", averaged)):
            path = tmp_path / f"{name}.{suffix}"
            save_state(path, state)
            loaded = load_state(path, TrainState.create(Busy(), trainer.optimizer, rng=jax.random.PRNGKey(0)))
            assert_same_bits((loaded.params, loaded.model_state), (state.params, state.model_state))
        assert np.abs(averaged.params["inner"]["kernel"] - trainer.state.params["inner"]["kernel"]).max() > 1e-3

    def test_training_goes_on_from_the_average(self, tmp_path):
        trainer = build(tmp_path, ema_of_params(0.9))
        trainer.train(regression(40), 1, 8)
        average = jax.device_get(averaged_params(trainer.opt_state, trainer.state.params))
        trainer.state = with_averaged_params(trainer.state)
        assert_same_bits(trainer.state.params, average)
        trainer.train(regression(40), 1, 8)
        assert trainer.step == 10
