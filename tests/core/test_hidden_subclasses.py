"""The subclasses that precision, remat, summaries and LoRA make are hidden from what a user's classes do about them."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.problems import regression, squared_error
from trainer import TrainState, add_lora, make_train_step, summarize

ADAM = optax.adam(1e-2)


def by_class_keyword(registry):
    class Listing(nnx.Module):
        def __init_subclass__(cls, *, key, **keywords):
            super().__init_subclass__(**keywords)
            registry[key] = cls

    class Net(Listing, key="net"):
        pass

    return Net


def by_mixin_behind(registry):
    class Listing:
        def __init_subclass__(cls, **keywords):
            super().__init_subclass__(**keywords)
            registry[cls.__name__] = cls

    class Net(nnx.Module, Listing):
        pass

    return Net


def by_metaclass(registry):
    class Meta(type(nnx.Module)):
        def __new__(mcs, name, bases, namespace, *, key):
            return super().__new__(mcs, name, bases, namespace)

        def __init__(cls, name, bases, namespace, *, key):
            super().__init__(name, bases, namespace)
            registry[key] = cls

    class Net(nnx.Module, metaclass=Meta, key="net"):
        pass

    return Net


def with_plain_lists(registry):
    class Listing(nnx.Module, pytree=False):
        def __init_subclass__(cls, **keywords):
            super().__init_subclass__(**{"pytree": False, **keywords})
            registry[cls.__name__] = cls

    class Net(Listing):
        widths = None

    return Net


def filled(kind):
    """The model that is trained: an instance of the class, whose attributes and call are those of any."""

    def make(self):
        self.widths = [4] if not getattr(kind, "_pytree__is_pytree", True) else 4
        self.part = nnx.Linear(4, 1, rngs=nnx.Rngs(0))

    kind.__init__ = make
    kind.__call__ = lambda self, x: self.part(x)[:, 0]
    return kind()


KINDS = [by_class_keyword, by_mixin_behind, by_metaclass, with_plain_lists]


@pytest.mark.parametrize("make", KINDS, ids=lambda make: make.__name__)
@pytest.mark.parametrize("options", [{"precision": "bfloat16"}, {"remat": {"**": "nothing_saveable"}}], ids=min)
def test_a_registry_of_classes_is_as_it_was(make, options):
    registry = {}
    kind = make(registry)
    before = dict(registry)
    model = filled(kind)
    data = regression(8, 4)
    plain = model(data["input"])
    state = TrainState.create(model, ADAM, rng=jax.random.key(0))
    state, metrics = jax.jit(make_train_step(squared_error, ADAM, **options))(state, data)
    summarize(state, loss_fn=squared_error, batch=data)
    assert np.isfinite(metrics["loss"])
    assert registry == before
    assert set(map(type, (model, state.model()))) == {kind}
    np.testing.assert_array_equal(next(iter(registry.values()))()(data["input"]), plain)


def test_factors_of_a_layer_are_hidden_too():
    registry = {}

    class Base(nnx.Linear):
        def __init_subclass__(cls, *, key, **keywords):
            super().__init_subclass__(**keywords)
            registry[key] = cls

    class Layer(Base, key="layer"):
        pass

    adapted = add_lora(nnx.Sequential(Layer(4, 1, rngs=nnx.Rngs(0))), 2, rngs=nnx.Rngs(1))
    assert registry == {"layer": Layer}
    layer = adapted.layers[0]
    assert isinstance(layer, Layer)
    assert layer.lora_a.shape == (4, 2)
    assert nnx.clone(adapted)(jnp.ones((3, 4))).shape == (3, 1)
