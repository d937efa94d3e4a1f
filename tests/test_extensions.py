"""The base of extensions: what it has, what may be changed on it, and what it refuses."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from tests.problems import Busy, Linear, config, regression, squared_error
from trainer import ArgumentError, ArgumentTypeError, ConfigError, Extension, ExtensionConfig, Trainer


def test_it_is_enabled_with_weight_one_and_no_loss():
    extension = Extension()
    assert extension.is_enabled() is extension.enabled is True
    assert extension.weight == 1.0
    assert extension.loss_fn({}, None, model=None, rng=None, step=None) == 0.0


def test_weight_and_enabled_may_be_assigned_and_are_checked():
    extension = Extension(ExtensionConfig(name="a", weight=0.5), rngs=nnx.Rngs(0))
    extension.weight, extension.enabled = 2, False
    assert extension.config == ExtensionConfig(name="a", weight=2.0, enabled=False)
    with pytest.raises(ConfigError, match=r"`ExtensionConfig.weight` is 'big' of type str; it must be float"):
        extension.weight = "big"


def test_a_configuration_of_another_type_is_refused():
    with pytest.raises(ArgumentTypeError, match=r"`config` is of type dict; it must be a trainer.ExtensionConfig"):
        Extension({"weight": 1.0})


def test_one_that_only_watches_adds_nothing():
    class Watching(Extension):
        def __init__(self):
            super().__init__()
            self.losses = []
            self.epochs = 0

        def on_batch_end(self, trainer, step, logs):
            self.losses.append(logs["loss"])

        def on_epoch_end(self, trainer, epoch, logs):
            self.epochs += 1

    watching = Watching()
    trainer = Trainer(Busy(), config(), loss_fn=squared_error, extensions={"watch": watching})
    trainer.train(regression(16), 3, 8)
    assert (len(watching.losses), watching.epochs) == (6, 3)
    assert trainer.state.extensions["watch"]["variables"] == {}


def test_random_variables_of_an_extension_advance_in_the_state():
    class Noisy(Extension):
        def __init__(self, rngs):
            super().__init__(rngs=rngs)
            self.rngs = rngs

        def loss_fn(self, batch, model_outputs, **kwargs):
            return jax.random.uniform(self.rngs.noise(), ())

    trainer = Trainer(Busy(), config(), loss_fn=squared_error, extensions={"noise": Noisy(nnx.Rngs(noise=1))})
    draws = [float(trainer.train_step(regression())["noise_loss"]) for _ in range(3)]
    assert len(set(draws)) == 3
    assert trainer.state.extensions["noise"]["variables"]["rngs"]["noise"]["count"] == jnp.uint32(3)


def test_a_bonus_has_a_negative_weight():
    class Bonus(Extension):
        def loss_fn(self, batch, model_outputs, **kwargs):
            return jnp.float32(3.0)

    bonus = Bonus(ExtensionConfig(weight=-2.0))
    trainer = Trainer(Linear(4), config(), loss_fn=squared_error, extensions={"bonus": bonus})
    metrics = trainer.train_step(regression(4))
    assert metrics["bonus_loss"] == -6.0


@pytest.mark.parametrize("weight", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_no_weight_is_refused(weight, tmp_path):
    with pytest.raises(ConfigError, match=r"`ExtensionConfig.weight` is .*; it must be finite"):
        ExtensionConfig(weight=weight)

    class Plain:
        def __init__(self, weight):
            self.weight = weight

        def is_enabled(self):
            return True

        def loss_fn(self, batch, model_outputs, **kwargs):
            return jnp.zeros(())

    with pytest.raises(ArgumentError, match=r"`extensions\['e'\].weight` is .*; it must be finite"):
        Trainer(Linear(4), config(), loss_fn=squared_error, extensions={"e": Plain(weight)}, workdir=tmp_path)
    extension = Plain(1.0)
    trainer = Trainer(Linear(4), config(), loss_fn=squared_error, extensions={"e": extension}, workdir=tmp_path)
    trainer.train_step(regression(4))
    extension.weight = weight
    with pytest.raises(ArgumentError, match=r"`extensions\['e'\].weight` is"):
        trainer.train_step(regression(4))
    assert trainer.step == 1
