"""The Python attributes of extensions that their losses read, which are constants of the compiled step."""

import collections
import contextlib
import dataclasses
import marshal
import operator
import types
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from trainer.core.fingerprint import fingerprint_and_reads
from trainer.core.static_values import copy_containers, token
from trainer.errors import warn

_NO_CONSTANTS = {"weight", "enabled"}
"""Attributes of extensions that a step takes as an argument, or that select its program."""

_PLAIN = (bool, int, float, complex, str, bytes, type(None))
_CONTAINERS = (list, tuple, dict, set, frozenset, collections.deque)
_MOST_BYTES, _MOST_LEAVES = 2**13, 1000
"""Of larger arrays and containers, also in a dataclass, only another object is noticed, not a change in place: reading
them costs time."""


@dataclasses.dataclass(frozen=True)
class _Constant:
    """The value of an attribute.

    Attributes:
        given: The object that the attribute held.
        value: A copy that later changes in place do not affect.
        token: Equal to another's if a step computes the same with both.
        is_fixed: Whether the object cannot change, so that it need not be read again.
        content: The content of a container of numbers and texts, which takes less time to compare than a token.
    """

    given: Any
    value: Any
    token: Hashable
    is_fixed: bool
    content: bytes | None = None

    def is_still(self, value: Any) -> bool:
        """Returns whether an attribute is known to hold the same as before."""
        return value is self.given and (self.is_fixed or (self.content is not None and _content(value) == self.content))


_Values = dict[tuple[str, str], _Constant]
"""By the names of extensions and attributes."""


class Constants:
    """The attributes that the losses of extensions read, as they were when `update` was last called.

    Numbers, texts, arrays, containers and dataclasses of these. Every program of an epoch must have the same: also one
    that is compiled for a short last batch, after a hook has changed an attribute. So `update` is called when an epoch
    begins, and steps are traced within `in_force`.

    Args:
        extensions: The extensions with a loss, by name. Empty with several processes, which may differ in an
            attribute and would not compile together: their steps keep the values with which they were traced first.

    Attributes:
        token: Identifies the values; part of the variant of a step.
    """

    def __init__(self, extensions: Mapping[str, Any]) -> None:
        self._extensions = extensions
        self._read: dict[str, tuple[list[str], set[str]]] | None = None
        self._values: _Values = {}
        self._in_state: _Values = {}
        self._is_traced = self._has_warned = self._has_warned_of_state = False
        self.token: Hashable = ()
        if extensions:
            self.update()

    def update(self) -> None:
        """Takes the current values. Warns, once, if they are not those that a step was compiled with."""
        if not self._extensions:
            return
        before, (self._values, arrays) = self._values, self._current()
        self._check_state(arrays)
        if len(before) == len(self._values) and all(map(operator.is_, before.values(), self._values.values())):
            return
        self.token = tuple((key, constant.token) for key, constant in self._values.items())
        if not self._is_traced or self._has_warned:
            return
        changed = [key for key, constant in self._values.items() if _differs(before.get(key), constant)]
        if changed:
            self._has_warned = True
            warn(
                f"{_listed(changed)} changed, which a compiled step holds as a constant: each new value takes effect "
                f"when an epoch begins, and compiles the step again. Changing `weight`, or computing the value from "
                f"the `step` that `loss_fn` may take, compiles nothing."
            )

    def _check_state(self, now: _Values) -> None:
        """Warns, once, if an array that is part of the training state is another on the extension than at first."""
        if self._has_warned_of_state or not now:
            return
        before = self._in_state
        self._in_state = {**now, **before}
        changed = [key for key, constant in now.items() if _differs(before.get(key, constant), constant)]
        if changed:
            self._has_warned_of_state = True
            name, attribute = changed[0]
            warn(
                f"{_listed(changed)} changed, which does nothing: the arrays of an extension are part of the training "
                f"state, and `loss_fn` reads them there. Assign "
                f"`trainer.state.extensions[{name!r}]['variables'][{attribute!r}]`."
            )

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Gives the extensions the values of `update` while a step is traced."""
        self._is_traced = True
        now, _ = self._current()
        others = {key: one for key, one in self._values.items() if key in now and _differs(now[key], one)}
        try:
            for (name, attribute), constant in others.items():
                # nnx refuses `setattr` within a trace
                vars(self._extensions[name])[attribute] = _in_place_of(now[name, attribute].given, constant.value)
            yield
        finally:
            for name, attribute in others:
                vars(self._extensions[name])[attribute] = now[name, attribute].given

    def traced(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a step, not jitted, that is traced with the values of `update`."""
        if not self._extensions:
            return step

        def with_constants(*args: Any) -> Any:
            with self.in_force():
                return step(*args)

        return with_constants

    def _current(self) -> tuple[_Values, _Values]:
        """Returns the current values, and those of arrays that are part of the training state."""
        if self._read is None:
            self._read = {name: _reads(extension) for name, extension in self._extensions.items()}
        values: _Values = {}
        arrays: _Values = {}
        for name, extension in self._extensions.items():
            read, changed = self._read[name]
            held = getattr(extension, "__dict__", {})
            for attribute in read:
                if attribute not in held:
                    continue
                key, value = (name, attribute), held[attribute]
                is_state = isinstance(value, np.ndarray | jax.Array) and isinstance(extension, nnx.Module)
                known = (self._in_state if is_state else self._values).get(key)
                if known is not None and known.is_still(value):
                    (arrays if is_state else values)[key] = known
                elif type(value) in _PLAIN or (attribute not in changed and _is_compared(value)):
                    (arrays if is_state else values)[key] = _constant(value)
        return values, arrays


def _reads(extension: Any) -> tuple[list[str], set[str]]:
    """Returns the attributes that a loss reads of the extension itself, and the names that it changes, as caches."""
    reads = fingerprint_and_reads(extension, ["loss_fn"])[1]
    members = (member for kind in type(extension).__mro__ for member in vars(kind).values())
    functions = (getattr(member, "__func__", None) or getattr(member, "fget", None) or member for member in members)
    codes = (function.__code__ for function in functions if isinstance(function, types.FunctionType))
    # The first parameter of a method has any name.
    names = {"self", *(code.co_varnames[0] for code in codes if code.co_argcount)}
    return sorted(set().union(*(reads.of.get(name, set()) for name in names)) - _NO_CONSTANTS), reads.changed


def _is_compared(value: Any) -> bool:
    if isinstance(value, np.ndarray | np.generic | jax.Array):
        return not isinstance(value, jax.core.Tracer)
    if type(value) in _CONTAINERS:
        leaves = jax.tree.leaves(value, is_leaf=_is_of_nnx)
        return not any(map(_is_of_nnx, leaves))
    is_record = dataclasses.is_dataclass(value) or isinstance(value, types.SimpleNamespace)
    return is_record and not isinstance(value, type) and not _is_of_nnx(value)


def _is_of_nnx(value: Any) -> bool:
    return isinstance(value, nnx.Module | nnx.Variable)  # these are part of the state


def _constant(value: Any) -> _Constant:
    parts = _parts(value)
    is_record = parts is not value
    large = {id(part): part for part in (parts.values() if is_record else [value]) if _is_large(part)}
    if is_record or not large:
        with contextlib.suppress(Exception):  # a donated array, or whatever the methods of an object raise
            read = parts
            if large:  # the other fields are still compared
                read = {name: _Same(part) if id(part) in large else part for name, part in parts.items()}
            is_plain = all(type(leaf) in _PLAIN for leaf in jax.tree.leaves(read))
            copied = copy_containers(value, {key: (part, part) for key, part in large.items()})
            content = _content(value) if is_plain else None
            return _Constant(value, copied, (type(value), token(read)), _cannot_change(value), content)
    return _Constant(value, value, (type(value), _Same(value)), is_fixed=True)


class _Same:
    """Equal only for the same object, which it keeps alive, so that no other object gets its id."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value


def _is_large(value: Any) -> bool:
    """Returns whether reading a value whenever an epoch begins, at any depth, would take long."""
    count, size = 0, 0
    seen: set[int] = set()
    left = [value]
    while left and count + len(left) <= _MOST_LEAVES and size <= _MOST_BYTES:
        whole = left.pop()
        part = _parts(whole)
        if isinstance(part, (Mapping, *_CONTAINERS)):
            if id(whole) not in seen:
                seen.add(id(whole))
                left.extend(part.values() if isinstance(part, Mapping) else part)
        else:
            count, size = count + 1, size + getattr(part, "nbytes", 0)
    return bool(left) or size > _MOST_BYTES


def _cannot_change(value: Any) -> bool:
    """Returns whether the same object always gives the same token."""
    if isinstance(value, jax.Array | np.generic):
        return True
    if isinstance(value, tuple | frozenset):
        return all(map(_cannot_change, value))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        is_frozen = type(value).__dataclass_params__.frozen  # type: ignore[attr-defined]
        return is_frozen and all(_cannot_change(getattr(value, field.name)) for field in dataclasses.fields(value))
    try:
        hash(value)
    except Exception:  # as for a list
        return False
    return True


def _content(value: Any) -> bytes | None:
    try:
        return marshal.dumps(_parts(value), 2)  # of this version: later ones depend on the number of references
    except ValueError:
        return None


def _parts(value: Any) -> Any:
    """Returns a value, or the fields of a dataclass or namespace that a step holds as constants."""
    if isinstance(value, types.SimpleNamespace):
        return dict(vars(value))
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return value
    names = {field.name for field in dataclasses.fields(value)} - _NO_CONSTANTS
    return {name: getattr(value, name) for name in sorted(names)}


def _in_place_of(now: Any, value: Any) -> Any:
    """Returns a value to trace with; of the configuration of an extension, weight and setting stay the current ones."""
    if not dataclasses.is_dataclass(value) or type(now) is not type(value) or isinstance(value, type):
        return value
    current = {one.name: getattr(now, one.name) for one in dataclasses.fields(value) if one.name in _NO_CONSTANTS}
    return dataclasses.replace(value, **current) if current else value


def _listed(changed: list[tuple[str, str]]) -> str:
    return ", ".join(f"`extensions[{name!r}].{attribute}`" for name, attribute in changed[:3])


def _differs(one: _Constant | None, other: _Constant) -> bool:
    return one is None or one.token != other.token
