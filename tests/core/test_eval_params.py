"""Params for evaluation that an optimizer keeps: schedule-free, a moving average; slow params are in the table."""

import contextlib

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
    ema_of_params,
    evaluate,
    load_weights,
    make_eval_step,
    make_mesh,
    save_state,
)

CASES = {
    "schedule_free": (lambda: contrib.schedule_free_sgd(0.1), contrib.schedule_free_eval_params),
    "ema": (lambda: optax.chain(optax.sgd(0.1), ema_of_params(0.5)), averaged_params),
}


def build(tmp_path, optimizer, eval_params, *, options=None, **settings):
    given = {"loss_fn": squared_error, "eval_params": eval_params, "workdir": tmp_path}
    return Trainer(Linear(4), config(**settings), optimizer, **given, **(options or {}))


@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.few(2)
def test_everything_that_evaluates_uses_them(name, clip, tmp_path):
    make, eval_params = CASES[name]
    trainer = build(tmp_path, make(), eval_params, gradient_clip_norm=clip)
    held_out = regression(8, seed=1)
    validation = trainer.train(regression(40), 2, 8, held_out)

    own = trainer.opt_state if clip is None else trainer.opt_state[1]
    averaged = eval_params(own, trainer.state.params)
    state = trainer.state.replace(params=averaged, opt_state=())
    wanted = evaluate(jax.jit(make_eval_step(squared_error)), state, [held_out])
    raw = evaluate(jax.jit(make_eval_step(squared_error)), trainer.state, [held_out])
    assert abs(wanted["loss"] - raw["loss"]) > 1e-3  # else the test shows nothing
    assert validation == trainer.evaluate(held_out, 8) == pytest.approx(wanted)
    assert float(trainer.validate_step(held_out)["loss"]) == pytest.approx(wanted["loss"])
    np.testing.assert_allclose(trainer.predict(held_out, 3), state.model()(held_out["input"]), 1e-5, 1e-6)
    jax.tree.map(np.testing.assert_array_equal, nnx.to_pure_dict(nnx.state(trainer.model, nnx.Param)), averaged)


@pytest.mark.parametrize("suffix", ["safetensors", "orbax", "msgpack"])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.few(3)
def test_weights_are_exported_with_and_without_the_average(name, clip, suffix, tmp_path):
    make, eval_params = CASES[name]
    trainer = build(tmp_path, make(), eval_params, gradient_clip_norm=clip)
    trainer.train(regression(40), 2, 8)
    said = pytest.warns(UserWarning, match="nothing to continue a run with")
    with said if suffix == "safetensors" else contextlib.nullcontext():
        save_state(tmp_path / f"evaluated.{suffix}", TrainState.create(trainer.model, optax.identity(), rng=0))
        save_state(tmp_path / f"trained.{suffix}", trainer.state)
    evaluated, trained = (
        load_weights(tmp_path / f"{which}.{suffix}", Linear(4, rngs=nnx.Rngs(1))) for which in ("evaluated", "trained")
    )
    rows = regression(8, seed=1)
    np.testing.assert_array_equal(evaluated.layer.kernel[...], trainer.model.layer.kernel[...])
    np.testing.assert_allclose(evaluated(rows["input"]), trainer.predict(rows, 8), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(trained.layer.kernel[...], trainer.state.params["layer"]["kernel"])
    assert np.any(trained.layer.kernel[...] != evaluated.layer.kernel[...])


def run(tmp_path, name, resume=False, **options):
    make, eval_params = CASES[name]
    trainer = build(tmp_path, make(), eval_params, options=options)
    return trainer, trainer.train(regression(58), 2, 8, regression(10, seed=1), val_interval=4, resume=resume)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.few(1)
def test_killed_and_resumed_it_is_the_same_to_the_bit(name, tmp_path):
    whole, wanted = run(tmp_path / "whole", name)
    with pytest.raises(StoppedError):
        run(tmp_path / "cut", name, callbacks=[Watching(13)], save_interval=3)
    resumed, found = run(tmp_path / "cut", name, resume=True, callbacks=[Watching()], save_interval=3)
    assert found == wanted
    assert_same_bits(resumed.state, whole.state)
    assert_same_bits(nnx.state(resumed.model), nnx.state(whole.model))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.few(1)
def test_on_a_mesh_the_numbers_are_those_of_one_device(name, tmp_path):
    (eight, found), (one, wanted) = (
        run(tmp_path / str(len(options)), name, **options) for options in ({"mesh": make_mesh({"data": 8})}, {})
    )
    assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    models = (nnx.to_pure_dict(nnx.state(trainer.model)) for trainer in (eight, one))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), *models)


def test_training_is_not_changed_by_it(tmp_path):
    make, eval_params = CASES["ema"]
    states = []
    for fn in (None, eval_params):
        trainer = build(tmp_path / str(len(states)), make(), fn)
        trainer.train(regression(40), 2, 8, regression(8))
        states.append(trainer.state.params)
    jax.tree.map(np.testing.assert_array_equal, *states)


def test_the_pure_step_takes_the_same_name():
    make, eval_params = CASES["ema"]
    state = TrainState.create(Busy(), make(), rng=jax.random.key(0))
    state = state.replace(params=jax.tree.map(jnp.zeros_like, state.params))
    batch = regression(8)
    metrics = jax.jit(make_eval_step(squared_error, eval_params=eval_params))(state, batch)
    plain = jax.jit(make_eval_step(squared_error))(state.replace(params=state.opt_state[-1].average), batch)
    assert float(metrics["loss"]) == float(plain["loss"])


@pytest.mark.parametrize(
    ("eval_params", "kind", "message"),
    [
        (
            "ema",
            ArgumentTypeError,
            r"`eval_params` is of type str; it must be a callable eval_params\(opt_state, params",
        ),
        (lambda opt_state, params: {}, ArgumentError, r"`eval_params` returned no `layer/bias`, no `layer/kernel`; it"),
        (
            lambda opt_state, params: jax.tree.map(lambda leaf: leaf[None], params),
            ArgumentError,
            r"`eval_params` returned `layer/bias` of shape \(1, 1\)",
        ),
    ],
)
def test_what_cannot_be_params_is_refused_at_once(eval_params, kind, message, tmp_path):
    with pytest.raises(kind, match=message):
        build(tmp_path, optax.sgd(0.1), eval_params)


def test_an_error_in_it_says_what_it_was_given(tmp_path):
    with pytest.raises(AttributeError) as caught:
        build(tmp_path, optax.chain(optax.sgd(0.1)), lambda opt_state, params: opt_state.average)
    note = "raised in `eval_params(opt_state, params)`, where `opt_state` is of type tuple"
    assert note in caught.value.__notes__
