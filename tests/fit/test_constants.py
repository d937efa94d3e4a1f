"""Attributes of extensions that their losses read: a new value takes effect when an epoch begins, and is said."""

import collections
import dataclasses
import operator
import tracemalloc
import types
import warnings
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from tests.problems import Linear, config, regression, squared_error
from trainer import Callback, Extension, ExtensionConfig, Trainer

SAID = r"`extensions\['heat'\].temperature` changed, which a compiled step holds as a constant: each new value takes"


class Heat(Extension):
    """Its loss is its temperature, which a hook halves."""

    def __init__(self, event="on_epoch_end"):
        super().__init__()
        self.temperature, self.calls, self._event = 1.0, 0, event

    def loss_fn(self, batch, model_outputs, **kwargs):
        return jnp.float32(self.temperature) + 0 * jnp.mean(model_outputs)

    def _cool(self, event):
        self.calls += 1
        if event == self._event:
            self.temperature *= 0.5

    def on_epoch_end(self, trainer, epoch, logs):
        self._cool("on_epoch_end")

    def on_call_end(self, trainer, step, logs):
        self._cool("on_call_end")


class Compilations(Callback):
    def __init__(self):
        self.names = []

    def on_compile_end(self, trainer, name, seconds):
        self.names.append(name)


def build(heat, **options):
    return Trainer(Linear(4), config(log_frequency=1), loss_fn=squared_error, extensions={"heat": heat}, **options)


def heats(trainer):
    return [row["heat_loss"] for row in trainer.history if "heat_loss" in row]


def test_a_value_of_the_end_of_an_epoch_holds_in_the_next_and_is_said_once():
    compilations = Compilations()
    trainer = build(Heat(), steps_per_call=1, callbacks=[compilations])
    with pytest.warns(UserWarning, match=SAID) as said:
        trainer.train(regression(10), 3, 4)
    assert len([one for one in said if "constant" in str(one.message)]) == 1
    assert heats(trainer) == [1.0] * 3 + [0.5] * 3 + [0.25] * 3
    assert compilations.names == ["train_step"] * 6  # two shapes for each value


@pytest.mark.parametrize("steps_per_call", [1, 2])
def test_all_batches_of_an_epoch_have_the_same_the_short_last_one_too(steps_per_call):
    heat = Heat("on_call_end")
    trainer = build(heat, steps_per_call=steps_per_call)
    with pytest.warns(UserWarning, match=SAID):
        trainer.train(regression(10), 2, 4)
    calls = 3 if steps_per_call == 1 else 2
    assert heats(trainer) == [1.0] * 3 + [0.5**calls] * 3
    assert heat.temperature == 0.25**calls


class Asking(Callback):
    def on_batch_end(self, trainer, step, logs):
        trainer.compile(regression(4))


def test_a_callback_that_compiles_changes_none_within_an_epoch():
    trainer = build(Heat("on_call_end"), callbacks=[Asking()])
    with pytest.warns(UserWarning, match=SAID):
        trainer.train(regression(10), 2, 4)
    assert heats(trainer) == [1.0] * 3 + [0.125] * 3


def test_compiling_before_a_step_takes_the_current_value():
    heat, compilations = Heat("never"), Compilations()
    trainer = build(heat, callbacks=[compilations], steps_per_call=1)
    heat.temperature = 2.0
    trainer.compile(regression(4))
    trainer.train(regression(8), 1, 4)
    assert heats(trainer) == [2.0] * 2
    assert compilations.names == ["train_step"]


def test_a_step_by_itself_has_the_current_value():
    heat, batch = Heat("never"), regression(4)
    trainer = build(heat)
    assert float(trainer.train_step(batch)["heat_loss"]) == 1.0
    heat.temperature = 3.0
    with pytest.warns(UserWarning, match=SAID):
        assert float(trainer.train_step(batch)["heat_loss"]) == 3.0


def test_what_no_loss_reads_and_what_was_set_before_the_first_step_compiles_nothing():
    heat, compilations = Heat("never"), Compilations()
    trainer = build(heat, steps_per_call=1, callbacks=[compilations])
    heat.temperature = 2.0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trainer.train(regression(8), 3, 4)
    assert heats(trainer) == [2.0] * 6
    assert heat.calls > 6
    assert compilations.names == ["train_step"]


class Counted(Extension):
    """Its hook sets an attribute of the name of what the loss reads of other objects."""

    def __init__(self):
        super().__init__()
        self.step = self.input = 0

    def loss_fn(self, batch, model_outputs, **kwargs):
        assert kwargs["step"].shape == ()
        return jnp.mean(batch["input"]) * self.weight * self.enabled

    def on_call_end(self, trainer, step, logs):
        self.step = self.input = step
        self.weight *= 0.5


class Bare:
    """The same with attributes in place of the properties of `Extension`."""

    def __init__(self):
        self.weight, self.enabled, self.step = 1.0, True, 0

    def is_enabled(self):
        return self.enabled

    loss_fn, on_call_end = Counted.loss_fn, Counted.on_call_end


@pytest.mark.parametrize("kind", [Counted, Bare])
def test_what_is_read_of_something_else_is_no_constant(kind):
    compilations = Compilations()
    trainer = build(kind(), steps_per_call=1, callbacks=[compilations])
    trainer.train(regression(8), 3, 4)  # warnings are errors
    for _ in range(3):
        trainer.train_step(regression(4))
    assert compilations.names == ["train_step"]


class Frozen:
    """An extension of a class of its own, with slots."""

    __slots__ = ("temperature",)
    weight = 1.0

    def __init__(self):
        self.temperature = 2.0

    def is_enabled(self):
        return True

    def loss_fn(self, batch, model_outputs, **kwargs):
        return jnp.float32(self.temperature)


def test_an_object_with_slots_trains():
    trainer = build(Frozen())
    trainer.train(regression(8), 2, 4)
    assert heats(trainer) == [2.0] * 4


@dataclasses.dataclass
class Settings:
    at: float = 1.0


@dataclasses.dataclass(frozen=True)
class FrozenSettings:
    at: Any = 1.0


@dataclasses.dataclass
class Tabled:
    table: np.ndarray
    at: float = 1.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeatConfig(ExtensionConfig):
    at: float = 1.0


def halve_item(extension):
    extension.held[0] *= 0.5


def halve_value(extension):
    extension.held["at"] *= 0.5


def halve_attribute(extension):
    extension.held.at *= 0.5


def halve_listed(extension):
    extension.held.at[0] *= 0.5


def halve(extension):
    extension.held = extension.held * np.float32(0.5)


def halve_in_place(extension):
    extension.held *= 0.5


class Holding(Extension):
    """Its first parameter has another name, as in some code bases."""

    def __init__(this, held, read, change, config=None):  # noqa: N805
        super().__init__(config)
        this.held, this._read, this._change = held, read, change

    def loss_fn(this, batch, model_outputs, **kwargs):  # noqa: N805
        return jnp.float32(this._read(this.held) if this.held is not None else this.config.at)

    def on_epoch_end(this, trainer, epoch, logs):  # noqa: N805
        this._change(this)


class NoModule:
    weight = 1.0

    def __init__(self, held, read, change):
        self.held, self._read, self._change = held, read, change

    def is_enabled(self):
        return True

    loss_fn, on_epoch_end = Holding.loss_fn, Holding.on_epoch_end


def itself(held):
    return held


HELD = {
    "float": lambda kind: kind(1.0, itself, halve),
    "scalar of NumPy": lambda kind: kind(np.float32(1), itself, halve),
    "list": lambda kind: kind([1.0], lambda held: held[0], halve_item),
    "deque": lambda kind: kind(collections.deque([1.0]), lambda held: held[0], halve_item),
    "dict": lambda kind: kind({"at": 1.0}, lambda held: held["at"], halve_value),
    "dict of arrays": lambda kind: kind({"at": np.ones(2)}, lambda held: held["at"].mean(), halve_value),
    "namespace": lambda kind: kind(types.SimpleNamespace(at=1.0), lambda held: held.at, halve_attribute),
    "dataclass": lambda kind: kind(Settings(), lambda held: held.at, halve_attribute),
    "frozen dataclass of a list": lambda kind: kind(FrozenSettings([1.0]), lambda held: held.at[0], halve_listed),
    "frozen dataclass of a dict": lambda kind: kind(FrozenSettings({0: 1.0}), lambda held: held.at[0], halve_listed),
    "frozen dataclass of a NumPy value": lambda kind: kind(
        FrozenSettings(np.ones(2, np.float32)), lambda held: held.at[0], halve_listed
    ),
    "two frozen dataclasses": lambda kind: kind(
        FrozenSettings((FrozenSettings([1.0]),)),
        lambda held: held.at[0].at[0],
        lambda extension: operator.setitem(extension.held.at[0].at, 0, extension.held.at[0].at[0] * 0.5),
    ),
    "dataclass with a large table": lambda kind: kind(
        Tabled(np.ones(9999, np.float32)), lambda held: held.at * held.table[0], halve_attribute
    ),
    "namespace with a large table": lambda kind: kind(
        types.SimpleNamespace(table=np.ones(9999, np.float32), at=1.0), lambda held: held.at, halve_attribute
    ),
    "array": lambda kind: kind(np.ones(3, np.float32), lambda held: held.mean(), halve),
    "array in place": lambda kind: kind(np.ones(3, np.float32), lambda held: held.mean(), halve_in_place),
    "array of JAX": lambda kind: kind(jnp.float32(1), itself, halve),
    "large array": lambda kind: kind(np.ones(9999, np.float32), lambda held: held.mean(), halve),
}


ARRAYS = [name for name in HELD if "array" in name and "dict" not in name]
CASES = [(NoModule, name) for name in HELD] + [(Holding, name) for name in HELD if "array" not in name]


@pytest.mark.parametrize(("kind", "held"), CASES, ids=[f"{kind.__name__}-{held}" for kind, held in CASES])
def test_values_of_many_types_take_effect_at_the_next_epoch(kind, held):
    trainer = build(HELD[held](kind))
    with pytest.warns(UserWarning, match=r"`extensions\['heat'\].held` changed, which a compiled step holds") as said:
        trainer.train(regression(8), 3, 4)
    assert len(said) == 1
    assert heats(trainer) == [1.0, 1.0, 0.5, 0.5, 0.25, 0.25]


@pytest.mark.parametrize("held", ARRAYS)
def test_an_array_that_is_part_of_the_state_is_not_and_it_is_said_where_to_assign_it(held):
    trainer = build(HELD[held](Holding))
    with pytest.warns(UserWarning, match="does nothing") as said:
        trainer.train(regression(8), 3, 4)
    assert [str(one.message) for one in said] == [
        "`extensions['heat'].held` changed, which does nothing: the arrays of an extension are part of the training "
        "state, and `loss_fn` reads them there. Assign `trainer.state.extensions['heat']['variables']['held']`."
    ]
    assert heats(trainer) == [1.0] * 6
    variables = trainer.state.extensions["heat"]["variables"]
    variables["held"] = variables["held"] * 0.5
    assert float(trainer.train_step(regression(4))["heat_loss"]) == 0.5


def test_a_field_of_its_configuration_takes_effect_beside_its_weight():
    def change(extension):
        extension.config = extension.config.replace(at=extension.config.at * 0.5, weight=extension.weight * 2)

    trainer = build(Holding(None, None, change, HeatConfig()))
    with pytest.warns(UserWarning, match=r"`extensions\['heat'\].config` changed, which a compiled step holds"):
        trainer.train(regression(10), 3, 4)
    assert heats(trainer) == [1.0] * 9


def test_another_object_of_the_same_value_compiles_nothing():
    def same(extension):
        extension.held = [np.float32(1), jnp.ones(2)]

    compilations = Compilations()
    heat = NoModule([np.float32(1), jnp.ones(2)], lambda held: held[0], same)
    trainer = build(heat, callbacks=[compilations], steps_per_call=1)
    trainer.train(regression(8), 3, 4)  # warnings are errors
    assert compilations.names == ["train_step"]


TABLES = {
    "dataclass": Tabled,
    "frozen dataclass": FrozenSettings,
    "namespace": lambda table: types.SimpleNamespace(table=table),
    "dataclass of a list": lambda table: FrozenSettings([table]),
    "list of dataclasses": lambda table: [Tabled(table)],
    "dict of namespaces": lambda table: {"a": types.SimpleNamespace(table=table)},
}


@pytest.mark.parametrize("kind", TABLES)
def test_large_arrays_at_any_depth_are_neither_copied_nor_hashed(kind):
    held = TABLES[kind](np.ones(2**20, np.float32))
    tracemalloc.start()
    try:
        trainer = build(NoModule(held, lambda held: 1.0, lambda extension: None))
        trainer.setup.constants.update()
        assert tracemalloc.get_traced_memory()[1] < 2**21
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", TABLES)
def test_another_large_array_takes_effect(kind):
    def other(extension):
        extension.held = TABLES[kind](np.full(9999, len(held) + 1.0, np.float32))
        held.append(extension.held)

    def read(value):
        while not isinstance(value, np.ndarray):
            value = vars(value) if hasattr(value, "__dict__") else value
            value = next(iter(value.values() if isinstance(value, dict) else value))
        return value[0]

    held = []
    trainer = build(NoModule(TABLES[kind](np.zeros(9999, np.float32)), read, other))
    with pytest.warns(UserWarning, match="changed, which a compiled step holds"):
        trainer.train(regression(8), 3, 4)
    assert heats(trainer) == [0.0, 0.0, 1.0, 1.0, 2.0, 2.0]
