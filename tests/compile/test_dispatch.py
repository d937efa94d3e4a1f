"""The programs of a step that are kept: those of its last variants."""

import gc
import weakref

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

from tests.fit.test_constants import Compilations
from tests.problems import Busy, Counting, Linear, config, regression, squared_error
from trainer import ArgumentError, Extension, Trainer
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


class TestCountedCompilations:
    def test_a_step_that_was_only_planned_for_is_not_counted(self):
        trainer = Trainer(Busy(), config(), loss_fn=squared_error)
        for size in (16, 8, 32, 24):  # the last has a short batch, the first that runs alone
            trainer.train(regression(64), 1, size)

    def test_without_jit_none_is(self):
        compilations = Compilations()
        trainer = Trainer(Linear(4), config(), loss_fn=squared_error, callbacks=[compilations])
        with jax.disable_jit():
            for size in (8, 7, 6, 5, 4):
                trainer.train_step(regression(size))
        assert compilations.names == ["train_step"]


def test_a_state_that_grows_is_told_by_five_paths():
    def update(updates, state, params=None):
        return updates, {**state, "moments": updates}

    model = nnx.Sequential(*[nnx.Linear(4, 4, rngs=nnx.Rngs(0)) for _ in range(5)], lambda y: y[:, 0])
    trainer = Trainer(model, config(), optax.GradientTransformation(lambda params: {}, update), loss_fn=squared_error)
    with pytest.raises(ArgumentError, match=r"`opt_state/moments/layers/0/bias`, .* and 5 more are new") as caught:
        trainer.train_step(regression(4))
    assert len(str(caught.value)) < 500


def test_a_state_that_shrinks_is_told_too():
    optimizer = optax.GradientTransformation(
        lambda params: {"count": jnp.zeros(())}, lambda updates, state, params=None: (updates, {})
    )
    with pytest.raises(ArgumentError, match=r"started with: `opt_state/count` is missing\. A step must be able to"):
        Trainer(Linear(4), config(), optimizer, loss_fn=squared_error).train_step(regression(4))
