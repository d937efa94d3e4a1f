"""Warnings name the line of the caller's code, wherever in the library the reason was found."""

import jax.numpy as jnp
import optax
import pytest

from tests.problems import Busy, Linear, config, regression, squared_error
from trainer import OptimizerConfig, SchedulerConfig, Trainer, TrainingConfig, save_state


def diverging(model, batch, rng, step):
    loss, metrics = squared_error(model, batch, rng, step)
    return loss * jnp.inf, metrics


def of_construction(tmp_path):
    model = Busy()
    model.eval()
    Trainer(model, config(), loss_fn=squared_error, workdir=tmp_path)


def of_a_configuration(tmp_path):
    settings = TrainingConfig(
        optimizer=OptimizerConfig(optimizer_type="adam", learning_rate=1e-3),
        scheduler=SchedulerConfig(scheduler_type="cosine"),
    )
    Trainer(Linear(4), settings, optax.sgd(0.1), loss_fn=squared_error)


def of_a_run(tmp_path):
    Trainer(Linear(4), config(), loss_fn=diverging).train(regression(8), 1, 4)


def of_a_save(tmp_path):
    Trainer(Linear(4), config(), loss_fn=squared_error).save_checkpoint(tmp_path / "weights.safetensors")


def of_a_function(tmp_path):
    save_state(tmp_path / "weights.safetensors", Trainer(Linear(4), config(), loss_fn=squared_error).state)


@pytest.mark.parametrize("call", [of_construction, of_a_configuration, of_a_run, of_a_save, of_a_function])
def test_the_line_is_the_callers(call, tmp_path):
    with pytest.warns(UserWarning, match=".") as said:
        call(tmp_path)
    lines = range(call.__code__.co_firstlineno, call.__code__.co_firstlineno + 6)
    assert [(one.filename, one.lineno in lines) for one in said] == [(__file__, True)]
