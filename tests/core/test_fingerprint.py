"""Hashes of code and the plain values that it reads: equal for the same program, other ones for an edited one."""

import argparse
import collections
import dataclasses
import enum
import functools
import os
import subprocess
import sys
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from trainer.core.fingerprint import MethodsOf, are_comparable, fingerprint


@dataclasses.dataclass
class Settings:
    alpha: float = 0.5
    resume: bool = False

    def smoothed(self):
        return self.alpha * 2

    @property
    def doubled(self):
        return self.alpha * 2


@dataclasses.dataclass(slots=True)
class Slotted:
    alpha: float = 0.5
    resume: bool = False


class Mode(enum.Enum):
    MEAN = 1
    SUM = 2


def namespace(alpha=0.5, resume=False):
    return argparse.Namespace(alpha=alpha, resume=resume)


def simple(alpha=0.5, resume=False):
    return types.SimpleNamespace(alpha=alpha, resume=resume)


def by_attribute(held):
    return lambda x: x * held.alpha


def by_key(held):
    return lambda x: x * held["alpha"]


def by_get(held):
    return lambda x: x * held.get("alpha", 1.0)


def by_getattr(held):
    return lambda x: x * getattr(held, "alpha", 1.0)


def by_method(held):
    return lambda x: x * held.smoothed()


def by_property(held):
    return lambda x: x * held.doubled


def nested(held):
    outer = types.SimpleNamespace(loss=held, resume=held.resume)
    return lambda x: x * outer.loss.alpha


def passed_on(held):
    def scale(settings):
        return settings.alpha

    return lambda x: x * scale(held)


def in_partial(held):
    return functools.partial(lambda settings, x: x * settings.alpha, held)


@pytest.mark.parametrize(
    ("objective", "settings"),
    [
        *[(by_attribute, make) for make in (Settings, Slotted, namespace, simple)],
        *[(read, dict) for read in (by_key, by_get)],
        *[(read, Settings) for read in (by_getattr, by_method, by_property, nested, passed_on, in_partial)],
    ],
)
def test_what_an_objective_reads_of_its_settings_counts_and_nothing_else(objective, settings):
    base = fingerprint(objective(settings(alpha=0.5, resume=False)))
    assert fingerprint(objective(settings(alpha=0.5, resume=True))) == base
    assert fingerprint(objective(settings(alpha=0.25, resume=False))) != base


VALUES = {
    "dict that is looped over": ({"kl": 1.0, "recon": 2.0}, {"kl": 1.0, "recon": 3.0}),
    "list": ([1, 2], [1, 3]),
    "tuple": ((1, "a"), (1, "b")),
    "set": ({"a", "b"}, {"a", "c"}),
    "deque": (collections.deque([1]), collections.deque([2])),
    "enum": (Mode.MEAN, Mode.SUM),
    "array": (np.array([1.0, 2.0]), np.array([1.0, 3.0])),
    "integers": (np.array([1, 2]), np.array([1, 3])),
    "scalar": (np.float32(1), np.float32(2)),
    "on a device": (jnp.array([1.0, 2.0]), jnp.array([1.0, 3.0])),
    "bfloat16": (jnp.ones(2, jnp.bfloat16), jnp.zeros(2, jnp.bfloat16)),
    "complex": (np.array([1j]), np.array([2j])),
    "dtype": (np.dtype("f4"), np.dtype("f2")),
    "type": (jnp.float32, jnp.bfloat16),
    "function": (jax.nn.relu, jax.nn.gelu),
    "ufunc": (jnp.add, jnp.multiply),
    "builtin": (max, min),
    "jitted": (jax.jit(lambda x: x + 1), jax.jit(lambda x: x + 2)),
    "mapped": (jax.vmap(lambda x: x + 1), jax.vmap(lambda x: x + 2)),
    "rate": (optax.sgd(0.1), optax.sgd(0.2)),
    "schedule": (optax.cosine_decay_schedule(0.1, 100), optax.cosine_decay_schedule(0.1, 200)),
    "several optimizers": tuple(
        optax.multi_transform({"a": optax.sgd(0.1), "b": optax.adam(rate)}, {"a": "a"}) for rate in (0.1, 0.2)
    ),
    "module": (nnx.Dropout(0.1), nnx.Dropout(0.2)),
}


@pytest.mark.parametrize("name", VALUES)
def test_a_value_in_a_closure_counts(name):
    def closed(value):
        return lambda x: value

    first, second = VALUES[name]
    assert fingerprint(closed(first)) == fingerprint(closed(first)) != fingerprint(closed(second))


def test_arrays_count_up_to_the_precision_of_another_device():
    weights = np.linspace(0.1, 7, 64, dtype=np.float32)
    assert fingerprint([weights + 1e-7]) != fingerprint([weights * 1.01]) != fingerprint([weights[:-1]])
    assert fingerprint([np.float32([0.1, 3.0])]) == fingerprint([np.nextafter(np.float32([0.1, 3.0]), 4)])


@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.complex64])
def test_of_many_floats_rounding_says_nothing(dtype):
    table = np.sin(np.arange(500)).astype(dtype)
    assert fingerprint([table]) == fingerprint([table * dtype(1 + 1e-3)])
    assert len({fingerprint([one]) for one in (table, table[:-1], table.reshape(50, 10), table.real > 0)}) == 4
    order = np.arange(500)
    assert fingerprint([order]) != fingerprint([order[::-1]])


def test_large_arrays_keys_and_objects_count_by_type_only():
    assert fingerprint([np.zeros(10_000)]) == fingerprint([np.ones(10_000)]) != fingerprint([np.zeros(9_999)])
    assert fingerprint([jax.random.key(0)]) == fingerprint([jax.random.key(1)])
    assert fingerprint([np.array([object()])]) == fingerprint([np.array([object()])])
    assert fingerprint([object()]) == fingerprint([object()])
    assert fingerprint([nnx.Param(jnp.zeros(2))]) == fingerprint([nnx.Param(jnp.ones(2))])


class Counting:
    """Changes itself when it is called, as many objectives do that count their traces."""

    def __init__(self, rate=0.1):
        self.rate, self.calls, self.seen, self.cache, self.total = rate, 0, [], {}, [0]

    def __call__(self, x):
        self.calls += 1
        self.seen.append(x)
        self.cache[x] = x
        self.total[0] += 1
        return x * self.rate


def test_what_code_changes_itself_does_not_count():
    used, fresh = Counting(), Counting()
    used(2.0)
    assert fingerprint(used) == fingerprint(fresh) != fingerprint(Counting(0.2))
    counted, seen = 0, []

    def objective(x):
        nonlocal counted
        counted += 1
        seen.append(x)
        return x

    before = fingerprint(objective)
    objective(1)
    assert (counted, seen, fingerprint(objective)) == (1, [1], before)


def made_of(source, name="objective"):
    module = types.ModuleType("edited")
    exec(compile(source, "edited.py", "exec"), vars(module))
    return getattr(module, name)


OBJECTIVE = """
import types
import jax
WEIGHT, WEIGHTS, OTHER, count, SETTINGS = 0.5, {"a": 1.0}, 1.0, 0, types.SimpleNamespace(alpha=1.0, resume=False)
def helper(x):
    return x + 1
def objective(x):
    '''What it does.'''
    global count
    count += 1
    inner = lambda y: y * WEIGHT
    return helper(inner(x)) + WEIGHTS["a"] * SETTINGS.alpha
"""


@pytest.mark.parametrize(
    ("before", "after", "counts"),
    [
        ("WEIGHT, WEIGHTS, OTHER, count, SETTINGS = 0.5", "WEIGHT, WEIGHTS, OTHER, count, SETTINGS = 0.25", True),
        ('{"a": 1.0}', '{"a": 2.0}', True),
        ("alpha=1.0", "alpha=2.0", True),
        ("x + 1", "x + 2", True),
        ("1.0, 0, types", "2.0, 7, types", False),
        ("resume=False", "resume=True", False),
        ("What it does", "What it does and why", False),
        ("import jax\n", "import jax  # a comment\n\n\n", False),
    ],
)
def test_globals_and_code_count_as_far_as_they_are_used(before, after, counts):
    assert OBJECTIVE.count(before) == 1
    edited = OBJECTIVE.replace(before, after)
    assert (fingerprint(made_of(edited)) != fingerprint(made_of(OBJECTIVE))) == counts


MODEL = """
import jax
from flax import nnx
class Model(nnx.Module):
    rate = 0.5
    def __init__(self, rngs):
        self.layer = nnx.Linear(2, 2, rngs=rngs)
    def __call__(self, x):
        return self.block(x)
    def block(self, x):
        return jax.nn.relu(self.layer(x)) * self.rate
    def summary(self):
        return "first"
"""


@pytest.mark.parametrize(
    ("before", "after", "counts"),
    [("relu", "gelu", True), ("rate = 0.5", "rate = 0.25", True), ("first", "second", False)],
)
def test_methods_of_a_class_count_if_the_forward_calls_them(before, after, counts):
    first, second = MethodsOf(made_of(MODEL, "Model")), MethodsOf(made_of(MODEL.replace(before, after), "Model"))
    assert (fingerprint(first) != fingerprint(second)) == counts
    assert fingerprint(second, ["summary"]) != fingerprint(first, ["summary"])


def test_it_never_raises_and_ends():
    class Hostile:
        def __call__(self):
            return self.a

        def __getattr__(self, name):
            raise RuntimeError(name)

    class Unequal(dict):
        def __iter__(self):
            raise RuntimeError("no")

    cyclic = [1]
    cyclic.append(cyclic)
    deep = []
    for _ in range(10_000):
        deep = [deep]
    wide = [[index] * 50 for index in range(5_000)]
    large = {str(index): object() for index in range(100_000)}
    for value in (Hostile(), Unequal(a=1), cyclic, deep, wide, large, "\ud800", type, sys, jax.random.key(0)):
        assert fingerprint([value]) == fingerprint([value])


def test_hashes_of_other_versions_are_not_compared():
    assert are_comparable(fingerprint(1), fingerprint(2))
    assert not are_comparable("python 3.11 0123456789abcdef", fingerprint(1))
    assert are_comparable("100", "200")


PROGRAM = """
import argparse, functools
import jax, jax.numpy as jnp, numpy as np, optax
from flax import nnx
from trainer.core.fingerprint import MethodsOf, fingerprint
from tests.core.test_fingerprint import Counting, Mode, Settings, VALUES
settings = argparse.Namespace(**{name: name for name in {"alpha", "beta", "gamma", "delta"}})
names = {name: name for name in {"kl", "recon", "size"}}
def objective(x):
    known = {"one", "two", "three"}
    return x in {"a", "b", "c"}, settings.alpha, settings.beta, names, known, Mode.MEAN, Counting
class Model(nnx.Module):
    def __call__(self, x):
        return jax.nn.relu(objective(x))
print(fingerprint([objective, MethodsOf(Model), Counting(), optax.adamw(1e-3), Settings(), list(VALUES.values())]))
"""


@pytest.mark.few(1)
@pytest.mark.parametrize("seed", ["0", "1", "random"])
def test_they_are_equal_in_all_processes(seed, tmp_path):
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(map(str, sys.path))}
    (tmp_path / "program.py").write_text(PROGRAM)
    root = Path(__file__).parents[2]
    found = [
        subprocess.run(
            [sys.executable, str(tmp_path / "program.py")],
            env={**environment, "PYTHONHASHSEED": one, "PYTHONPATH": f"{root}{os.pathsep}{environment['PYTHONPATH']}"},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for one in ("12", seed)
    ]
    assert found[0] == found[1]
