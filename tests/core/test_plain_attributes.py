"""Plain Python attributes: what `nnx.jit` takes trains, and no two models that differ share a program."""

import collections
import dataclasses
import enum
import functools
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.problems import Counting, Linear, regression, squared_error
from trainer import ObjectiveError, TrainState, fuse_steps, make_eval_step, make_train_step


@dataclasses.dataclass
class Config:
    widths: list
    table: object = None


@dataclasses.dataclass(frozen=True)
class Frozen:
    factors: object


@dataclasses.dataclass(eq=False)
class ByIdentity:
    factor: int


class Pair(collections.namedtuple("Pair", "a b")):
    pass


class Named(dict):
    """A dict whose entries are attributes too, as many configuration packages have it."""

    def __init__(self, **entries):
        super().__init__(**entries)
        self.__dict__ = self


class Comparable:
    """Equal by value, and with no hash, as Python has it for every class with `__eq__` alone."""

    def __init__(self, factor):
        self.factor = factor

    def __eq__(self, other):
        return self.factor == other.factor

    __hash__ = None


class Uncopyable(Comparable):
    def __deepcopy__(self, memo):
        raise TypeError("cannot be copied")

    __hash__ = None


class Act(enum.Enum):
    RELU = 1
    GELU = 2


class Inheriting(Config):
    """Derived from a dataclass, and no dataclass itself."""

    def __init__(self, factor, extra):
        super().__init__([factor])
        self.extra = extra


def holds_itself(factor):
    loop = [factor]
    loop.append(loop)
    return loop


def scaled(x, factor):
    return x * factor


# Makes a value, from a number by which two of them differ.
VALUES = {
    "list": lambda n: [8, n],
    "nested": lambda n: {"blocks": [{"width": 8, "names": ("a", [n])}]},
    "dict": lambda n: {"act": "relu", "factor": n},
    "order": lambda n: dict(sorted({"a": 1, "b": 2}.items(), reverse=n == 3)),
    "set": lambda n: {"a", n},
    "tuple": lambda n: (1, [n]),
    "namedtuple": lambda n: Pair(1, [n]),
    "deque": lambda n: collections.deque([1, n], maxlen=5),
    "ordered": lambda n: collections.OrderedDict(a=[n]),
    "default": lambda n: collections.defaultdict(list, a=[n]),
    "proxy": lambda n: types.MappingProxyType({"a": [n]}),
    "attribute dict": lambda n: Named(factor=n),
    "namespace": lambda n: types.SimpleNamespace(factor=[n]),
    "dataclass": lambda n: Config([1, n]),
    "array in a dataclass": lambda n: Config([], np.array([n, 1.5])),
    "jax array in a dataclass": lambda n: Config([], jnp.array([n, 1.5])),
    "keys in a dataclass": lambda n: Config([], jax.random.key(n)),
    "names in an array": lambda n: Config([], np.array(["a", n], dtype=object)),
    "dtype in an array": lambda n: Config([], np.zeros(2, {2: np.float32, 3: np.int32}[n])),
    "names": lambda n: np.array(["a", str(n)]),
    "dates": lambda n: np.array([n], dtype="datetime64[D]"),
    "objects": lambda n: np.array([None, [n]], dtype=object),
    "records": lambda n: np.array([(n, 1.5)], dtype=[("a", int), ("b", float)]),
    "frozen": lambda n: Frozen([n]),
    "inherits": lambda n: Inheriting(1, n),
    "partial": lambda n: functools.partial(scaled, factor=[n]),
    "comparable": Comparable,
    "uncopyable": Uncopyable,
    "enum": lambda n: [Act(n - 1)],
    "types": lambda n: [nnx.Linear, {2: nnx.BatchNorm, 3: nnx.LayerNorm}[n]],
    "dtypes": lambda n: {"dtype": {2: jnp.bfloat16, 3: jnp.float32}[n]},
    "sharding": lambda n: {"kernel": [jax.P("data", None), jax.P({2: "model", 3: "data"}[n])]},
    "cycle": holds_itself,
    "nan": lambda n: [float("nan"), n],
    "scalar": np.float32,
    "zero": lambda n: [{2: 0.0, 3: -0.0}[n]],
    "kind of number": lambda n: [{2: 1, 3: 1.0}[n]],
    "truth": lambda n: {"bias": {2: 1, 3: True}[n]},
}


class Zoo(Linear):
    """A model with one attribute more, in itself and two levels down."""

    def __init__(self, make, n=2, *, rngs=None):
        super().__init__(features=4, rngs=rngs)
        self.value = make(n)
        self.blocks = nnx.List([nnx.Linear(1, 1, rngs=nnx.Rngs(0))])
        self.blocks[0].value = make(n)


def create(model, optimizer=None, **changes):
    return TrainState.create(model, optimizer or optax.adam(1e-2), **{"rng": jax.random.key(0), **changes})


def step_of(loss_fn=squared_error, **changes):
    return jax.jit(make_train_step(loss_fn, optax.adam(1e-2), **changes))


@pytest.mark.parametrize("name", VALUES)
def test_equal_values_are_one_architecture_and_others_are_not(name):
    make = VALUES[name]
    state = create(Zoo(make))
    assert create(Zoo(make)).graphdef is state.graphdef
    other = create(Zoo(make, 3)).graphdef
    assert other != state.graphdef
    assert create(Zoo(make)).graphdef is state.graphdef  # also where two that differ have one hash
    assert type(state.model().value) is type(make(2))


def test_each_of_them_trains_and_compiles_once(compilations):
    class Everything(Linear):
        def __init__(self, rngs):
            super().__init__(features=4, rngs=rngs)
            for name, make in VALUES.items():
                setattr(self, name.replace(" ", "_"), make(2))

        def __call__(self, x):
            return super().__call__(x) * self.list[1] + self.partial(0.0 * x[:, 0], factor=self.dataclass.widths[0])

    step, batch = step_of(), regression()
    for seed in range(2):
        state = create(Everything(nnx.Rngs(seed)))
        for _ in range(3):
            state, metrics = step(state, batch)
    assert compilations["jit(train_step)"] == 1
    assert jnp.isfinite(metrics["loss"])


@pytest.mark.parametrize("make", [lambda n: [n], lambda n: Config([n]), Comparable, ByIdentity])
def test_models_that_differ_in_an_attribute_do_not_share_a_step(make):
    class Scaled(Linear):
        def __init__(self, n):
            super().__init__(features=4)
            self.value = make(n)

        def __call__(self, x):
            value = self.value
            factor = (
                value[0] if isinstance(value, list) else value.widths[0] if isinstance(value, Config) else value.factor
            )
            return super().__call__(x) * factor

    batch = regression()
    step, models = step_of(), [Scaled(n) for n in (1, 2)]
    losses = [float(step(create(model), batch)[1]["loss"]) for model in models * 2]
    expected = [float(squared_error(model, batch, None, 0)[0]) for model in models * 2]
    np.testing.assert_allclose(losses, expected, rtol=1e-5)
    assert losses[0] != losses[1]


def test_an_edit_of_the_callers_value_makes_another_architecture():
    model = Zoo(VALUES["nested"])
    state = create(model)
    model.value["blocks"][0]["width"] = 16
    assert state.model().value["blocks"][0]["width"] == 8
    assert create(model).graphdef != state.graphdef
    assert create(Zoo(VALUES["nested"])).graphdef is state.graphdef


def test_an_edit_of_a_models_value_stays_in_that_model():
    state = create(Zoo(VALUES["list"]))
    state.model().value.append("x")
    assert state.model().value == [8, 2]


def test_values_that_are_shared_stay_shared():
    class Sharing(nnx.Module):
        def __init__(self):
            self.a = [1]
            self.b = self.a
            self.c = [1]

    model = create(Sharing()).model()
    assert model.a is model.b
    assert model.a is not model.c


def test_a_vmapped_ensemble_has_lists(compilations):
    def member(key):
        return create(Zoo(VALUES["dataclass"], rngs=nnx.Rngs(key)), rng=key)

    states = jax.vmap(member)(jax.random.split(jax.random.key(0), 3))
    step = jax.jit(jax.vmap(make_train_step(squared_error, optax.adam(1e-2)), in_axes=(0, None)))
    for _ in range(2):
        states, metrics = step(states, regression())
    assert metrics["loss"].shape == (3,)
    assert compilations["jit(train_step)"] == 1


def test_fused_steps_equal_single_ones():
    single = fused = create(Zoo(VALUES["nested"]))
    batches = regression(num_examples=64)
    stacked = jax.tree.map(lambda leaf: leaf.reshape(4, 16, *leaf.shape[1:]), batches)
    step = make_train_step(squared_error, optax.adam(1e-2))
    fused, _ = jax.jit(fuse_steps(step, 4))(fused, stacked)
    for index in range(4):
        single, _ = jax.jit(step)(single, jax.tree.map(lambda leaf: leaf[index], stacked))  # noqa: B023 - called at once
    chex.assert_trees_all_close(single.params, fused.params, rtol=1e-6)


class Changing(Linear):
    def __init__(self, change, **attributes):
        super().__init__(features=4)
        self.change = change
        for name, value in attributes.items():
            setattr(self.layer, name, value)

    def __call__(self, x):
        self.change(self.layer)
        return super().__call__(x)


def count(layer):
    layer.calls += 1


def append(layer):
    layer.calls.append(1)


def put(layer):
    layer.calls["seen"]["x"] = 1


def fill(layer):
    layer.calls.table[0] = 7.0


def name_it(layer):
    layer.calls = "seen"


def delete(layer):
    del layer.calls


CHANGES = [
    (count, {"calls": 0}, "`model/layer/calls` was 0 and became 1"),
    (append, {"calls": []}, r"`model/layer/calls` was \[\] and became \[1\]"),
    (put, {"calls": {"seen": {}}}, r"`model/layer/calls` was {'seen': {}} and became {'seen': {'x': 1}}"),
    (fill, {"calls": Config([], np.zeros(2))}, "`model/layer/calls` was Config"),
    (name_it, {}, "`model/layer/calls` was set to 'seen'"),
    (delete, {"calls": 1}, "`model/layer/calls` was deleted"),
]


@pytest.mark.parametrize(("change", "attributes", "message"), CHANGES, ids=lambda part: getattr(part, "__name__", ""))
def test_an_attribute_that_the_forward_pass_changes_is_refused(change, attributes, message):
    model = Changing(change, **attributes)
    before = repr(attributes)
    with pytest.raises(ObjectiveError, match=f"{message}.*Hold what a step changes in an nnx.Variable"):
        step_of()(create(model), regression())
    assert repr({name: getattr(model.layer, name) for name in attributes}) == before


def test_evaluation_changes_nothing_and_refuses_nothing():
    state = create(Changing(count, calls=0))
    assert jnp.isfinite(jax.jit(make_eval_step(squared_error))(state, regression())["loss"])


def test_many_changes_cost_one_message_of_bounded_length():
    def change(layer):
        for index in range(50):
            setattr(layer, f"a{index:02}", "x" * 500)

    with pytest.raises(ObjectiveError, match="and 45 more") as caught:
        step_of()(create(Changing(change)), regression())
    assert len(str(caught.value)) < 1000


def test_an_extension_that_changes_an_attribute_is_refused():
    class Forgetful(Counting):
        def loss_fn(self, batch, model_outputs, **kwargs):
            self.batches += 1
            return super().loss_fn(batch, model_outputs, **kwargs)

    extensions = {"forgetful": Forgetful()}
    with pytest.raises(ObjectiveError, match="`extensions/forgetful/batches` was 0 and became 1"):
        step_of(extensions=extensions)(create(Linear(4), extensions=extensions), regression())


def test_arrays_and_numbers_marked_as_data_are_carried():
    class Carrying(Linear):
        def __init__(self):
            super().__init__(features=4)
            self.array, self.host, self.number = jnp.zeros(()), np.zeros(2), nnx.data(0)

        def __call__(self, x):
            self.array, self.host, self.number = self.array + 1.0, self.host + 1.0, self.number + 1
            return super().__call__(x)

    state, step = create(Carrying()), step_of()
    for _ in range(3):
        state, _ = step(state, regression())
    model = state.model()
    assert (float(model.array), model.host.tolist(), int(model.number)) == (3.0, [3.0, 3.0], 3)


def test_modes_that_the_forward_pass_sets_are_no_change():
    def freeze(layer):
        layer.deterministic = True

    state, _ = step_of()(create(Changing(freeze, deterministic=False)), regression())
    assert state.model().layer.deterministic is False
