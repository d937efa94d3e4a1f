"""Hashable tokens for plain Python attributes of modules, which are static parts of compiled programs.

``jax.jit`` identifies programs by hash and equality of their static values. But lists, dicts and configuration objects
have no hash, arrays no plain equality, and ``1 == 1.0 == True``. So each value gets a hashable token, made once and
equal only for values with which a model computes the same. Mutable values are copied first, so edits reach no token.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import functools
import hashlib
import types
from collections.abc import Callable, Hashable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.typing import HashableMapping

_ATOMS = frozenset({str, bytes, int, bool, type(None)})
_SEQUENCES = (list, tuple, collections.deque)
_MAPPINGS = (dict, types.MappingProxyType)


def token(value: Any, parents: tuple[int, ...] = ()) -> Hashable:
    """Returns a hashable token of a static value; tokens are equal if the values have equal type and content.

    Containers, dataclasses with value equality, namespaces and `functools.partial` compare by content; dicts also by
    order, since a model may loop over them. Arrays compare by dtype, shape and bytes, floats by bits, so NaN equals
    itself and -0.0 differs from 0.0. All other values compare by their ``==``, functions by identity.

    Args:
        value: Any Python object.
        parents: The ids of the enclosing containers, for containers that contain themselves.
    """
    kind = type(value)
    if kind in _ATOMS:
        return kind, value
    if isinstance(value, np.generic):
        return kind, str(value.dtype), value.tobytes()
    if kind is float:
        return kind, value.hex()
    if kind is complex:
        return kind, value.real.hex(), value.imag.hex()
    if id(value) in parents:
        return "cycle", parents.index(id(value))
    inner = functools.partial(token, parents=(*parents, id(value)))
    if _is_array(value):
        return kind, *_array_token(value, inner)
    if isinstance(value, HashableMapping):  # Flax's own type for attribute names and metadata, unordered
        return kind, frozenset((inner(key), inner(held)) for key, held in value.items())
    if isinstance(value, _MAPPINGS):
        return kind, tuple((inner(key), inner(held)) for key, held in value.items()), _named(value, inner)
    if isinstance(value, _SEQUENCES):
        return kind, tuple(map(inner, value)), _named(value, inner)
    if isinstance(value, set | frozenset):
        return kind, frozenset(map(inner, value)), _named(value, inner)
    if isinstance(value, functools.partial):
        return kind, inner(value.func), inner(value.args), inner(value.keywords)
    if _compares_by_fields(value):
        return kind, _named(value, inner)
    return _Opaque(value)


def copy_containers(value: Any, memo: dict[int, Any]) -> Any:
    """Returns a copy of a value that later edits of the original do not affect; hashable values are not copied.

    Containers, dataclasses, namespaces and NumPy arrays are copied at any depth. An unhashable object of another class
    is copied by `copy.deepcopy` if the copy equals the original; else it is shared.

    Args:
        value: Any Python object.
        memo: The values copied so far and their copies, by id, so that shared values stay shared.
    """
    if id(value) in memo:
        return memo[id(value)][1]
    if _is_hashable(value) or isinstance(value, jax.Array):
        return value
    inner = functools.partial(copy_containers, memo=memo)
    if isinstance(value, tuple):
        parts = map(inner, value)
        copied: Any = type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    elif isinstance(value, HashableMapping | types.MappingProxyType):
        copied = type(value)({key: inner(held) for key, held in value.items()})
    elif isinstance(value, np.ndarray | list | dict | set | collections.deque) or _compares_by_fields(value):
        copied = copy.copy(value)
    else:
        copied = _deep_copy(value)
    # Before the contents, because a container may contain itself; with the value, so that its id is not reused.
    memo[id(value)] = value, copied
    if isinstance(value, list | collections.deque):
        for index, held in enumerate(value):
            copied[index] = inner(held)
    elif isinstance(value, dict):
        for key, held in value.items():
            copied[key] = inner(held)
    if copied is not value:
        for name, held in _attributes(value).items():
            object.__setattr__(copied, name, inner(held))
    return copied


class _Opaque:
    """A value compared by the ``==`` of its class; if that fails, the value equals only itself."""

    __slots__ = ("value",)

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return hash(self.value) if _is_hashable(self.value) else hash(type(self.value))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, _Opaque) or type(self.value) is not type(other.value):
            return False
        try:
            return self.value is other.value or bool(self.value == other.value)
        except Exception:  # a user's class may raise anything, for example if ``==`` returns an array
            return False


def _is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except Exception:  # TypeError for a list, any error for a user's class
        return False
    return True


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or (isinstance(value, jax.Array) and not isinstance(value, jax.core.Tracer))


def _array_token(array: Any, inner: Callable[[Any], Hashable]) -> tuple[Hashable, ...]:
    dtype = str(array.dtype)
    if isinstance(array, jax.Array) and jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
        with jax.ensure_compile_time_eval():  # a step compares tokens while it is traced
            array = jax.random.key_data(array)
    array = np.asarray(array)
    if array.dtype.hasobject:
        return dtype, array.shape, inner(array.tolist())
    return dtype, array.shape, hashlib.sha256(array.tobytes()).digest()


def _compares_by_fields(value: Any) -> bool:
    if isinstance(value, type):
        return False
    parameters = getattr(type(value), "__dataclass_params__", None)
    return isinstance(value, types.SimpleNamespace) or (parameters is not None and parameters.eq)


def _attributes(value: Any) -> dict[str, Any]:
    """Returns the fields of a dataclass, and the public attributes of any value except cached properties."""
    fields = dataclasses.fields(value) if dataclasses.is_dataclass(value) else ()
    names = [field.name for field in fields if hasattr(value, field.name)]
    for name in getattr(value, "__dict__", ()):
        cached = isinstance(getattr(type(value), name, None), functools.cached_property)
        if name not in names and not name.startswith("_") and not cached:
            names.append(name)
    return {name: getattr(value, name) for name in names}


def _named(value: Any, inner: Callable[[Any], Hashable]) -> tuple[Hashable, ...]:
    return tuple((name, inner(held)) for name, held in sorted(_attributes(value).items()))


def _deep_copy(value: Any) -> Any:
    try:
        copied = copy.deepcopy(value)
    except Exception:  # locks, devices and open files cannot be copied
        return value
    return copied if _Opaque(copied) == _Opaque(value) else value
