"""Hashes of functions and of the plain values that they read, to detect on resume what has changed in a program.

The same program must have the same hashes in every process, so an address, the order of a set and anything that a run
changes is left out. What code does not read is left out too: a flag ``args.resume`` beside the ``args.alpha`` of an
objective says nothing about it. Code of this library, of JAX and of Python counts by its names.
"""

import argparse
import collections
import dataclasses
import enum
import functools
import hashlib
import sys
import types
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from trainer.core.code_reads import Reads, reads_of

_SCHEME = 3
"""Hashes of another number are not compared; raise it if the hash of an unchanged program changes."""

_DEEPEST, _MOST_VALUES, _MOST_ITEMS, _MOST_BYTES = 12, 20_000, 1000, 2**13
_MOST_FLOATS = 64
"""The entries of an array of floats that counts by its values; of many, some are rounded otherwise on other devices."""

_ROUNDS = 10

_ATOMS = (type(None), bool, int, float, complex, str, bytes)
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)
_CONSTANTS = (*_ATOMS, list, tuple, dict, set, frozenset, enum.Enum, np.ndarray, np.generic, jax.Array, *_NAMESPACES)
_LIBRARIES = sys.stdlib_module_names | {"chex", "flax", "jax", "jaxlib", "numpy", "optax", "orbax", "scipy", "trainer"}


@dataclasses.dataclass(frozen=True)
class MethodsOf:
    """Stands for the methods, properties and constants of a class that code reads."""

    kind: type


def fingerprint(value: Any, reads: Iterable[str] = ()) -> str:
    """Returns a hash of a value's bytecode and plain values, after the versions in which it can be compared.

    Args:
        value: Functions, objects with methods, plain values, and containers of these. Nothing in it raises.
        reads: More names of attributes and methods that count.
    """
    return fingerprint_and_reads(value, reads)[0]


def fingerprint_and_reads(value: Any, reads: Iterable[str] = ()) -> tuple[str, Reads]:
    """Returns the `fingerprint`, and what the code in it reads."""
    found, cache = Reads(names={"__call__", *reads}), {}  # type: Reads, dict[int, Any]
    for _ in range(_ROUNDS):  # a method that is found reads attributes, which may have methods
        size, text = found.size, _Walk(found, cache).digest(value, 0, "self")
        if found.size == size:
            break
    python, versions = sys.version_info, f"jax {jax.__version__}, flax {flax.__version__}, optax {optax.__version__}"
    about = f"python {python[0]}.{python[1]}, {versions}, scheme {_SCHEME}"
    return f"{about}: {hashlib.sha256(text.encode(errors='replace')).hexdigest()[:16]}", found


def are_comparable(before: str, now: str) -> bool:
    """Tells whether two texts are no hashes, or hashes that the same versions have made."""
    return not before.startswith("python ") or before.rpartition(" ")[0] == now.rpartition(" ")[0]


class _Walk:
    """One pass over a value.

    Args:
        reads: What the code reads that was found before; what is found now is added.
        cache: What code reads, by its id.
    """

    def __init__(self, reads: Reads, cache: dict[int, tuple[types.CodeType, Reads]]) -> None:
        self._reads, self._cache = reads, cache
        self._known: dict[int, tuple[Any, str]] = {}  # with the values, so that no other gets the id
        self._left = _MOST_VALUES

    def digest(self, value: Any, depth: int, name: str = "") -> str:
        """Returns a text that identifies a value; ``name`` is that of the variable or attribute that holds it."""
        if type(value) in _ATOMS:
            return repr(value)
        if id(value) in self._known:
            return self._known[id(value)][1]
        if depth > _DEEPEST or not self._left:
            return "…"
        self._left -= 1
        self._known[id(value)] = value, "cycle"
        try:
            text = "\n".join(self._parts(value, name, functools.partial(self.digest, depth=depth + 1)))
        except Exception:  # whatever an object's own methods raise
            text = "unreadable"
        found = f"{type(value).__qualname__} {hashlib.sha256(text.encode(errors='replace')).hexdigest()[:16]}"
        self._known[id(value)] = value, found
        return found

    def _parts(self, value: Any, name: str, deeper: Callable[..., str]) -> Iterator[str]:
        if isinstance(value, MethodsOf):
            yield from self._methods(value.kind, deeper)
        elif isinstance(value, enum.Enum):
            yield value.name
        elif isinstance(value, np.ndarray | np.generic | jax.Array):
            yield from _array(value)
        elif isinstance(value, _ATOMS):  # a subclass, whose `repr` may hold an address
            base: Any = next(base for base in _ATOMS if isinstance(value, base))
            yield base.__repr__(value)
        elif isinstance(value, types.CodeType):
            yield from self._code(value, None, deeper)
        elif isinstance(value, types.FunctionType):
            yield from self._function(value, deeper)
        elif isinstance(value, types.MethodType):
            yield deeper(value.__func__)
            yield deeper(value.__self__, name="self")
        elif isinstance(value, functools.partial):
            yield from map(deeper, (value.func, value.args, value.keywords))
        elif isinstance(value, type):
            yield value.__qualname__
        elif isinstance(value, Mapping):
            yield str(len(value))
            # Of a mapping that code reads by its keys, such as a configuration, only these.
            keys = self._reads.of.get(name, set()) if name != "self" else set()
            read = [key for key in _few(value) if type(key) is str and key in keys]
            for key in sorted(read or _few(value), key=_key):
                yield f"{_key(key)} {deeper(value[key], name=_key(key))}"
        elif isinstance(value, set | frozenset):
            yield str(len(value))
            yield from sorted(map(deeper, _few(value)))
        elif isinstance(value, list | tuple | collections.deque):
            yield str(len(value))
            yield from (deeper(one) for one, _ in zip(value, range(_MOST_ITEMS), strict=False))
        elif isinstance(value, np.dtype):
            yield str(value)
        elif not isinstance(value, nnx.Variable):
            yield from self._object(value, name, deeper)

    def _function(self, function: types.FunctionType, deeper: Callable[..., str]) -> Iterator[str]:
        code, reads = function.__code__, Reads()
        module = function.__globals__.get("__name__")  # `functools.wraps` changes `__module__`
        if _is_library(module):
            yield f"{module}.{code.co_qualname}"
        else:
            if id(code) not in self._cache:
                self._cache[id(code)] = code, reads_of(code)
            reads = self._cache[id(code)][1]
            self._reads.add(reads)
            yield from self._code(code, function.__doc__, deeper)
        yield deeper(function.__defaults__)
        yield deeper(function.__kwdefaults__)
        for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=False):
            if name not in self._reads.changed:
                try:
                    yield deeper(cell.cell_contents, name=name)
                except ValueError:
                    yield "empty"
        for name in sorted(reads.globals - self._reads.changed):
            if name in function.__globals__ and not name.startswith("__"):
                used = function.__globals__[name]
                # Of other modules, functions and objects count by name: they are in the code.
                if _is_constant(used) or getattr(used, "__module__", None) == module:
                    yield f"{name} {deeper(used, name=name)}"

    def _code(self, code: types.CodeType, doc: str | None, deeper: Callable[..., str]) -> Iterator[str]:
        yield code.co_code.hex()
        yield " ".join(code.co_names)
        constants = code.co_consts
        yield from map(deeper, constants[1:] if doc is not None and constants[:1] == (doc,) else constants)

    def _methods(self, kind: type, deeper: Callable[..., str]) -> Iterator[str]:
        """Yields what identifies the methods, properties and constants of a class that code reads."""
        for parent in kind.__mro__:
            if _is_library(parent.__module__):
                continue
            for name, member in sorted(vars(parent).items(), key=lambda item: item[0]):
                if name in self._reads.names and name not in self._reads.changed:
                    function = getattr(member, "__func__", None) or getattr(member, "fget", None) or member
                    if callable(function) or _is_constant(function):
                        yield f"{parent.__qualname__}.{name} {deeper(function, name=name)}"

    def _object(self, value: Any, name: str, deeper: Callable[..., str]) -> Iterator[str]:
        kind, of = type(value), self._reads.of
        named = getattr(value, "__name__", None) if callable(value) else None
        yield named if isinstance(named, str) else ""
        wrapped = getattr(value, "__wrapped__", None) if callable(value) else None
        if wrapped is not None:
            yield deeper(wrapped)
        elif dataclasses.is_dataclass(value) or isinstance(value, _NAMESPACES) or not _is_library(kind.__module__):
            yield from self._methods(kind, deeper)
            read = of[name] | of.get("self", set()) if name in of else self._reads.names
            for key in sorted((read & _attributes(value)) - self._reads.changed):
                yield f"{key} {deeper(getattr(value, key), name=key)}"
        elif isinstance(call := vars(kind).get("__call__"), types.FunctionType):
            held = getattr(value, "__dict__", {})
            plain = [key for key in sorted(call.__code__.co_names) if type(held.get(key)) in (bool, int, float, str)]
            yield from (f"{key} {held[key]!r}" for key in plain)


def _attributes(value: Any) -> set[str]:
    """Returns the names of the attributes that an object holds itself; no property is evaluated."""
    names = set(getattr(value, "__dict__", ()))
    if dataclasses.is_dataclass(value):
        names |= {field.name for field in dataclasses.fields(value) if hasattr(value, field.name)}
    return names


def _is_library(module: str | None) -> bool:
    return module is not None and module.partition(".")[0] in _LIBRARIES


def _is_constant(value: Any) -> bool:
    return isinstance(value, _CONSTANTS) or (dataclasses.is_dataclass(value) and not isinstance(value, type))


def _few(values: Any) -> Any:
    """Returns the values if they are not too many to sort."""
    return values if len(values) <= _MOST_ITEMS else ()


def _key(key: Any) -> str:
    return key if type(key) is str else repr(key) if type(key) in _ATOMS else type(key).__qualname__


def _array(value: Any) -> Iterator[str]:
    yield f"{value.dtype} {value.shape}"
    if isinstance(value, jax.Array):
        is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
        if is_key or isinstance(value, jax.core.Tracer) or not value.is_fully_addressable:
            return
    is_inexact = jnp.issubdtype(value.dtype, np.inexact)
    if value.nbytes > _MOST_BYTES or value.dtype.hasobject or (is_inexact and value.size > _MOST_FLOATS):
        return
    array = np.asarray(jax.device_get(value))
    if jnp.issubdtype(array.dtype, np.floating):
        # To 12 bits: another device may compute other class weights in the last ones.
        with np.errstate(all="ignore"):
            mantissa, exponent = np.frexp(array.astype(np.float64))
            array = np.ldexp(np.round(mantissa * 2**12) / 2**12, exponent) + 0.0
    yield hashlib.sha256(array.tobytes()).hexdigest()[:16]
