"""The programs of a step that are kept: those of its last variants."""

import gc
import weakref

import jax
import jax.numpy as jnp
import pytest

from tests.fit.test_constants import Compilations
from tests.problems import Counting, Linear, config, regression, squared_error
from trainer import Extension, Trainer
from trainer.compile import dispatch


class Heat(Extension):
    """Its loss is its temperature, which every epoch halves."""

    def __init__(self):
        super().__init__()
        self.temperature = 1.0

    def loss_fn(self, batch, model_outputs, **kwargs):
        return jnp.float32(self.temperature) + 0 * jnp.mean(model_outputs)

    def on_epoch_end(self, trainer, epoch, logs):
        self.temperature *= 0.5


@pytest.fixture
def programs(monkeypatch):
    """The programs of train steps that are alive."""
    made = weakref.WeakSet()

    class Noted(dispatch.Program):
        def __init__(self, function, name, *args, **options):
            super().__init__(function, name, *args, **options)
            if name.startswith("train_step"):
                made.add(self)

    monkeypatch.setattr(dispatch, "Program", Noted)
    return made


@pytest.mark.filterwarnings("ignore:.*holds as a constant")
@pytest.mark.parametrize("steps_per_call", [1, 2])
def test_programs_of_old_constants_are_dropped(steps_per_call, programs):
    trainer = Trainer(
        Linear(4), config(log_frequency=1), loss_fn=squared_error, extensions={"heat": Heat()},
        steps_per_call=steps_per_call,
    )  # fmt: skip
    trainer.train(regression(8), 9, 4)
    gc.collect()
    assert 1 <= len(programs) <= 4 * steps_per_call  # with two, one is traced to be fused
    assert [row["heat_loss"] for row in trainer.history if "heat_loss" in row][1::2] == [0.5**n for n in range(9)]


def test_variants_in_turn_are_compiled_once_each(programs):
    extension, told = Counting(), Compilations()
    trainer = Trainer(
        Linear(4), config(), loss_fn=squared_error, extensions={"size": extension}, steps_per_call=1, callbacks=[told]
    )
    for number in range(12):
        extension.enabled = bool(number % 2)
        trainer.train_step(regression(4))
    assert told.names == ["train_step"] * 2
    assert len(programs) == 2


def test_only_a_batch_that_compiles_is_described(monkeypatch):
    described = []

    def describe(batch):
        described.append(batch)
        return str(jax.tree.map(jnp.shape, batch))

    trainer = Trainer(Linear(4), config(), loss_fn=squared_error)
    monkeypatch.setattr(dispatch, "describe", describe)
    for _ in range(3):
        trainer.validate_step(regression(4))
    trainer.evaluate(regression(30), 4)
    assert len(described) == 2  # the last batch has two rows
