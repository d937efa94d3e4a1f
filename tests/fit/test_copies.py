"""A changed copy of the model is said when training begins, once, and only if the caller keeps it."""

import gc
import warnings
import weakref

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.problems import Busy, Linear, config, regression, squared_error
from trainer import Callback, Trainer
from trainer.fit import copies

SAID = r"the params of a module from `trainer.model` were changed \(`layer/kernel`\). It is a copy, so the run trains"


def build(model=None, **options):
    return Trainer(model or Linear(4), config(), loss_fn=squared_error, **options)


def train(trainer):
    trainer.train(regression(8), 1, 4)


def epoch(trainer):
    trainer.train_epoch()


def step(trainer):
    trainer.train_step(regression(4))


def edit(model):
    model.layer.kernel[...] = jnp.zeros_like(model.layer.kernel[...])


def update(model):
    nnx.update(model, {"layer": {"kernel": jnp.zeros((4, 1))}})


@pytest.mark.parametrize("begin", [train, epoch, step])
@pytest.mark.parametrize("change", [edit, update])
def test_a_changed_copy_is_said_once(change, begin):
    trainer = build(train_data_loader=[regression(4)] * 2)
    copy = trainer.model
    change(copy)
    with pytest.warns(UserWarning, match=SAID):
        begin(trainer)
    copy = trainer.model
    change(copy)
    begin(trainer)


@nnx.jit
def predict(model, x):
    return model(x)


def evaluated(trainer, model):
    predict(model, regression(4)["input"])


def retrained(trainer, model):
    step(trainer)
    edit(model)


def adopted(trainer, model):
    edit(model)
    trainer.state = trainer.state.replace(params=jax.tree.map(jnp.asarray, build(model).state.params))


def other_state(trainer, model):
    model.layer.extra = nnx.Variable(jnp.ones(1))


def dropped(trainer, model):
    edit(trainer.model)


def halved(trainer, model):
    half = jax.tree.map(lambda array: array.astype(jnp.bfloat16), nnx.state(model))
    nnx.update(model, half)


def widened(trainer, model):
    model.layer.kernel = nnx.Param(jnp.zeros((4, 3)))


@pytest.mark.parametrize("use", [evaluated, retrained, adopted, other_state, dropped, halved, widened])
def test_what_is_no_lost_change_is_not_said(use):
    trainer = build()
    copy = trainer.model
    use(trainer, copy)
    train(trainer)


class Perturbing(Callback):
    def on_epoch_end(self, trainer, epoch, logs):
        self.model = trainer.model
        self.model.layer.kernel[...] += 1


def test_a_callback_may_change_its_copy():
    trainer = build(callbacks=[Perturbing()])
    trainer.train(regression(8), 3, 4)


def test_batch_statistics_and_counters_are_no_params():
    trainer = build(Busy())
    copy = trainer.model
    copy.train()
    copy(regression(4)["input"])
    train(trainer)


def test_it_keeps_no_copy_alive():
    trainer = build()
    arrays = weakref.ref(trainer.model.layer.kernel[...])
    gc.collect()
    assert arrays() is None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(trainer)


class Far:
    is_fully_addressable = False


def test_of_arrays_of_several_processes_nothing_is_computed(monkeypatch):
    trainer = build()
    copy = trainer.model
    edit(copy)
    computed = []
    monkeypatch.setattr(copies, "with_eval_params", lambda *given: computed.append(given))

    class Spread:
        step, leaves = trainer.step, [Far()]

    trainer.setup.latest_copy.check(Spread())
    assert not computed
