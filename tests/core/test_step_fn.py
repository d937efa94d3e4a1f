"""A trainer runs any step `(state, batch) -> (state, metrics)`, with everything around it."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.problems import Busy, Linear, config, regression, squared_error
from tests.test_api import assert_same_bits
from trainer import (
    ArgumentError,
    ArgumentTypeError,
    Callback,
    InMemoryData,
    ObjectiveError,
    SchedulerConfig,
    Trainer,
    TrainState,
    make_mesh,
    make_train_step,
    vector,
)

SGD, ADAM = optax.sgd(0.05), optax.adam(0.01)


def two_optimizers():
    """A state whose layers have optimizers of their own, and a step that updates one layer twice."""
    state = TrainState.create(Busy(), SGD, rng=jax.random.key(3))
    inner, outer = state.params["inner"], state.params["outer"]
    state = state.replace(opt_state={"inner": SGD.init(inner), "outer": ADAM.init(outer)})

    def loss_of(params, state, batch, rng):
        loss, _ = squared_error(state.replace(params=params).model(), batch, rng, state.step)
        return loss

    def step_fn(state, batch):
        rng = jax.random.fold_in(state.rng, state.step)
        params, opt_state = dict(state.params), dict(state.opt_state)
        for name, optimizer in (("inner", SGD), ("outer", ADAM), ("outer", ADAM)):
            loss, grads = jax.value_and_grad(loss_of)(params, state, batch, rng)
            updates, opt_state[name] = optimizer.update(grads[name], opt_state[name], params[name])
            params[name] = optax.apply_updates(params[name], updates)
        return state.replace(params=params, opt_state=opt_state, step=state.step + 1), {"loss": loss}

    return state, step_fn


def with_buffer(capacity=16):
    """A state with a buffer of examples, and a step that adds its batch and trains on what it draws from it."""
    rows = regression(capacity)
    buffer = {"rows": jax.tree.map(np.zeros_like, rows), "written": jnp.zeros((), jnp.int32)}
    state = TrainState.create(Linear(4), ADAM, rng=jax.random.key(3))
    state = state.replace(extensions={"buffer": jax.tree.map(jnp.asarray, buffer)})
    learn = make_train_step(squared_error, ADAM)

    def step_fn(state, batch):
        held = state.extensions["buffer"]
        size = batch["target"].shape[0]
        where = (held["written"] + jnp.arange(size)) % capacity
        held = {
            "rows": jax.tree.map(lambda kept, new: kept.at[where].set(new), held["rows"], batch),
            "written": held["written"] + size,
        }
        key = jax.random.fold_in(state.rng, ~state.step)
        drawn = jax.random.randint(key, (size,), 0, jnp.minimum(held["written"], capacity))
        batch = jax.tree.map(lambda kept: kept[drawn], held["rows"])
        return learn(state.replace(extensions={"buffer": held}), batch)

    return state, step_fn


STEPS = {"two optimizers": two_optimizers, "a buffer": with_buffer}


def build(tmp_path, name, callbacks=(), **options):
    state, step_fn = STEPS[name]()
    options = {"loss_fn": squared_error, "workdir": tmp_path, **options}
    return Trainer(state, config(log_frequency=1), step_fn=step_fn, callbacks=list(callbacks), **options)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("steps_per_call", [1, 4])
@pytest.mark.few(2)
def test_it_is_the_loop_by_hand(name, steps_per_call, tmp_path):
    given, step_fn = STEPS[name]()
    seen, losses = [], []

    class Order(Callback):
        def on_call_end(self, trainer, step, logs):
            seen.append(step)

    trainer = build(tmp_path, name, [Order()], steps_per_call=steps_per_call)
    trainer.train(regression(32), 2, 4, regression(8, seed=1))
    data, state, step = InMemoryData(regression(32), 4), given, jax.jit(step_fn)
    for epoch in range(2):
        for batch in data.shuffled(trainer.setup.seed, epoch):
            state, metrics = step(state, batch)
            losses.append(float(metrics["loss"]))
    assert len(seen) == 16 // steps_per_call
    assert_same_bits(trainer.state, state)
    assert trainer.history.series("loss")[1] == losses
    assert len(trainer.val_metrics) == 2


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.few(1)
def test_it_resumes_to_the_bit(name, tmp_path):
    class Stops(Callback):
        def on_batch_end(self, trainer, step, logs):
            if step == 7:
                raise KeyboardInterrupt

    whole = build(tmp_path / "whole", name)
    whole.train(regression(32), 2, 4)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path / "part", name, [Stops()], save_interval=3).train(regression(32), 2, 4)
    resumed = build(tmp_path / "part", name, save_interval=3)
    resumed.train(regression(32), 2, 4, resume=True)
    assert_same_bits(resumed.state, whole.state)


@pytest.mark.parametrize("name", STEPS)
@pytest.mark.few(1)
def test_on_a_mesh(name, tmp_path):
    trainers = [build(tmp_path / "one", name), build(tmp_path / "mesh", name, mesh=make_mesh({"data": 8}))]
    one, other = (trainer.train(regression(64), 2, 8) for trainer in trainers)
    assert other == pytest.approx(one, rel=1e-5)


def test_its_metrics_may_be_what_merges(tmp_path):
    """A step that is composed of ours returns what the objective reports, a pair of value and weight, or an array."""

    def loss_fn(model, batch, rng, step):
        loss, _ = squared_error(model, batch, rng, step)
        weight = batch["target"][0] ** 2
        return loss, {"pair": (batch["target"][0], weight), "array": vector(batch["input"][0])}

    state, learn = TrainState.create(Linear(4), SGD, rng=jax.random.key(3)), make_train_step(loss_fn, SGD)

    def step_fn(state, batch):
        state, metrics = learn(state, batch)
        return state, {**metrics, "own": (metrics["loss"], 2.0)}

    own = Trainer(state, config(), loss_fn=None, step_fn=step_fn, workdir=tmp_path)
    ours = Trainer(state, config(), SGD, loss_fn=loss_fn)
    averages, wanted = (trainer.train(regression(30), 1, 8) for trainer in (own, ours))
    assert len(wanted["array"]) == 4
    assert {name: averages[name] for name in wanted} == wanted
    losses = own.history.series("loss")[1]
    assert averages["own"] == pytest.approx(np.mean(losses), rel=1e-6)


def test_the_state_that_was_given_stays_alive_and_its_key_counts(tmp_path):
    state, step_fn = two_optimizers()
    trainer = Trainer(state, config(), loss_fn=None, step_fn=step_fn, workdir=tmp_path)
    trainer.train_step(regression(8))
    state.check_alive()
    assert_same_bits(trainer.rng, state.rng)


def test_a_state_is_taken_without_a_step_of_ones_own(tmp_path):
    """It continues from there, with the trainer's own step."""
    first = Trainer(Busy(), config(), ADAM, loss_fn=squared_error, rng=jax.random.key(3))
    first.train_step(regression(8))
    second = Trainer(first.state, config(), ADAM, loss_fn=squared_error)
    assert second.step == 1
    for trainer in (first, second):
        trainer.train_step(regression(8, seed=1))
    assert_same_bits(second.state, first.state)


class TestRefusals:
    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            (lambda state: (state,), "`step_fn` returned a tuple of TrainState; it must return a pair"),
            (lambda state: (state.params, {}), "`step_fn` returned a tuple of dict, dict; it must return a pair"),
            (lambda state: (state, [1.0]), "`step_fn` returned metrics of type list; they must be a mapping"),
            (lambda state: (state, {"loss": jnp.ones(3)}), r"`step_fn` returned a metric `loss` of shape \(3,\); metr"),
            (
                lambda state: (state, {"pair": (jnp.ones(3), 1.0)}),
                r"`step_fn` returned a metric `pair` of shapes \(3,\) and \(\); a pair is a scalar and its weight",
            ),
            (
                lambda state: (state.replace(opt_state=()), {}),
                "`step_fn` changed the structure of the state: `opt_state/outer/0/count` was removed",
            ),
            (
                lambda state: (state.replace(step=state.step + 1.5), {}),
                r"`step_fn` changed the structure of the state: `step` was int32\(\) and became float32\(\)",
            ),
        ],
    )
    def test_what_it_returns(self, changed, message, tmp_path):
        state, _ = two_optimizers()
        trainer = Trainer(state, config(), loss_fn=None, step_fn=lambda state, batch: changed(state), workdir=tmp_path)
        with pytest.raises(ObjectiveError, match=message):
            trainer.train(regression(8), 1, 4)
        trainer.state.check_alive()

    def test_a_step_that_does_not_count(self, tmp_path):
        state, _ = two_optimizers()
        trainer = Trainer(state, config(), loss_fn=None, step_fn=lambda state, batch: (state, {}), workdir=tmp_path)
        with pytest.raises(ObjectiveError, match="`step_fn` returned a state with `step` 0 where 2 was due"):
            trainer.train(regression(8), 1, 4)

    def test_without_an_objective_there_is_nothing_to_evaluate(self, tmp_path):
        trainer = build(tmp_path, "a buffer", loss_fn=None)
        with pytest.raises(ArgumentError, match="`loss_fn` is None, so there is nothing to validate or to evaluate"):
            trainer.evaluate(regression(8), 4)
        with pytest.raises(ArgumentTypeError, match="`loss_fn` is of type NoneType; it must be a callable"):
            Trainer(Linear(4), config(), loss_fn=None)

    def test_what_it_cannot_be_combined_with(self, tmp_path):
        with pytest.raises(ArgumentError, match="`nonfinite` is 'skip', but the step is a `step_fn`, which it cannot"):
            build(tmp_path, "a buffer", nonfinite="skip")
        with pytest.raises(ArgumentTypeError, match="`step_fn` is of type int; it must be a callable step_fn"):
            Trainer(Linear(4), config(), loss_fn=None, step_fn=3)

    @pytest.mark.parametrize(
        ("settings", "options", "names"),
        [
            ({}, {"optimizer": ADAM}, "`optimizer` does nothing"),
            ({}, {"wrt": "inner/**"}, "`wrt` does nothing"),
            ({"gradient_clip_norm": 1.0}, {}, "`training_config.gradient_clip_norm` does nothing"),
            (
                {"scheduler": SchedulerConfig(scheduler_type="exponential"), "gradient_clip_norm": 1.0},
                {"optimizer": ADAM, "wrt": "inner/**"},
                "`optimizer`, `wrt`, `training_config.scheduler`, `training_config.gradient_clip_norm` do nothing",
            ),
        ],
    )
    def test_what_a_step_and_a_state_replace_is_said(self, settings, options, names):
        state, step_fn = two_optimizers()
        with pytest.warns(UserWarning, match=f"^{re.escape(names)}, because `model` is a state"):
            trainer = Trainer(state, config(**settings), step_fn=step_fn, loss_fn=None, **options)
        trainer.train(regression(16), 1, 8)  # it does nothing, and hinders nothing
        assert trainer.step == 2


@pytest.mark.parametrize("as_loader", [False, True])
def test_validation_without_an_objective_is_refused_before_the_first_step(as_loader, tmp_path):
    trainer = build(tmp_path, "a buffer", loss_fn=None)
    held_out = [regression(8)] if as_loader else regression(8)
    with pytest.raises(ArgumentError, match="`loss_fn` is None, so there is nothing to validate"):
        trainer.train(regression(8), 1, 8, val_data=held_out)
    assert trainer.step == 0
