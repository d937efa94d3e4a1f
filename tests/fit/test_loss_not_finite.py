"""A loss that is not finite is said once, with its step, and without reading a step that is in flight."""

import warnings

import jax.numpy as jnp
import optax
import pytest

from tests.problems import Linear, config, regression, squared_error
from trainer import Trainer, WeightedAverage
from trainer.metrics.average import MAX_PENDING_ON_HOST

MESSAGE = r"the loss is nan at step 4, and training continues"


def nan_from_step_four(model, batch, rng, step):
    loss, metrics = squared_error(model, batch, rng, step)
    return jnp.where(step >= 3, jnp.nan, loss), metrics


def build(tmp_path, **options):
    return Trainer(Linear(4), config(), loss_fn=nan_from_step_four, workdir=tmp_path, **options)


@pytest.mark.parametrize("val_data", [None, regression(8)])
@pytest.mark.parametrize("steps_per_call", [1, "auto"])
def test_it_is_said_once(steps_per_call, val_data, tmp_path):
    trainer = build(tmp_path, steps_per_call=steps_per_call)
    with pytest.warns(UserWarning, match=MESSAGE) as said:
        trainer.train(regression(40), 2, 4, val_data)
    assert len(said) == 1
    trainer.train(regression(40), 1, 4, val_data)  # warnings are errors here


def test_short_epochs_say_it_an_epoch_later(tmp_path):
    """Nothing waits for the device at the end of an epoch, so each reads the losses of the epoch before."""
    trainer = build(tmp_path)
    with pytest.raises(UserWarning, match=MESSAGE):  # warnings are errors here
        trainer.train(regression(40), 9, 4)
    assert trainer.step == 20


def test_a_loss_that_recovers_within_its_epoch_is_said_too(tmp_path):
    """As behind `optax.apply_if_finite`, which leaves the step out."""

    def nan_at_step_four(model, batch, rng, step):
        loss, metrics = squared_error(model, batch, rng, step)
        return jnp.where(step == 3, jnp.nan, loss), metrics

    optimizer = optax.apply_if_finite(optax.sgd(0.1), 5)
    trainer = Trainer(Linear(4), config(), optimizer, loss_fn=nan_at_step_four, workdir=tmp_path)
    with pytest.warns(UserWarning, match=MESSAGE):
        trainer.train(regression(40), 3, 4)
    assert trainer.state.is_finite()


def test_train_epoch_says_it(tmp_path):
    batches = [regression(4, seed=seed) for seed in range(5)]
    trainer = build(tmp_path, train_data_loader=batches)
    with pytest.warns(UserWarning, match=MESSAGE) as said:
        trainer.train_epoch()
    assert len(said) == 1
    trainer.train_epoch()


def test_a_long_epoch_says_it_before_its_end(tmp_path):
    """After as many calls as may stay unread."""
    trainer = build(tmp_path, steps_per_call=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match=MESSAGE):
            trainer.train(regression(2000), 1, 4)
    assert MAX_PENDING_ON_HOST <= trainer.step <= MAX_PENDING_ON_HOST + 16


@pytest.mark.parametrize("steps_per_call", [1, "auto"])
def test_after_a_batch_of_padding_the_step_is_the_right_one(steps_per_call, tmp_path):
    """Whose mean is 0 / 0 on one device as well."""

    def weighted(model, batch, rng, step):
        weight = batch["mask"].sum()
        loss = (optax.squared_error(model(batch["input"]), batch["target"]) * batch["mask"]).sum() / weight
        return jnp.where(step >= 3, jnp.nan, loss), {"batch_weight": weight}

    batches = [{**regression(4, seed=seed), "mask": jnp.full(4, float(seed != 1))} for seed in range(10)]
    trainer = Trainer(Linear(4), config(), loss_fn=weighted, workdir=tmp_path, steps_per_call=steps_per_call)
    with pytest.warns(UserWarning, match=MESSAGE):
        trainer.train(batches, 1, 4)


def test_a_batch_of_padding_is_no_news():
    average = WeightedAverage()
    average.add({"loss": jnp.nan, "step": 1, "batch_weight": 0.0}, 4)
    average.add({"loss": 1.0, "step": 2, "batch_weight": 1.0}, 4)
    average.compute()
    assert average.not_finite is None
    average.add({"loss": jnp.array([1.0, jnp.inf, jnp.nan]), "step": jnp.array([3, 4, 5])}, 4, 2)
    average.compute()
    assert average.not_finite == (4, float("inf"))
