"""Hashes of functions and plain values, comparable across processes, to detect a changed objective or optimizer."""

import functools
import hashlib
import sys
import types
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import optax

from trainer.run import Run
from trainer.types import ExtensionLike, LossFn, StepFn

_DEEPEST = 12


def fingerprint(value: Any) -> str:
    """Returns a hash of a value's bytecode and plain values, the same in every process of one Python release."""
    text = "\n".join(_parts(value, {}, 0))
    return f"python {sys.version_info[0]}.{sys.version_info[1]} {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def fingerprints_of(
    loss_fn: LossFn | None,
    step_fn: StepFn | None,
    optimizer: optax.GradientTransformation | None,
    extensions: Mapping[str, ExtensionLike],
    run: Run,
    params_average: optax.GradientTransformation | None,
) -> dict[str, str]:
    """Returns hashes by which resume detects another objective, optimizer, extension or model."""
    # Dropout rates and activations are static attributes of the model.
    attributes = run.peek().graphdef.attributes
    told = {
        "loss_fn": fingerprint(loss_fn),
        "model": fingerprint([(name, getattr(attribute, "value", None)) for name, attribute in attributes]),
    }
    if step_fn is not None:
        told["step_fn"] = fingerprint(step_fn)
    for name, transformation in (("optimizer", optimizer), ("params_average", params_average)):
        if transformation is not None:
            told[name] = fingerprint((transformation.init, transformation.update))
    return told | {
        f"extensions.{name}": fingerprint(getattr(type(one), "loss_fn", None)) for name, one in extensions.items()
    }


def _parts(value: Any, seen: dict[int, Any], depth: int) -> Iterator[str]:
    """Yields strings that identify a value, independent of the process."""
    if value is None or isinstance(value, bool | int | float | complex | str | bytes):
        yield repr(value)
        return
    if depth > _DEEPEST or id(value) in seen:
        return
    seen[id(value)] = value  # kept, so that no other object gets its address
    deeper = functools.partial(_parts, seen=seen, depth=depth + 1)
    yield type(value).__qualname__
    if isinstance(value, types.CodeType):
        yield value.co_code.hex()
        yield " ".join(value.co_names)
        yield from deeper(value.co_consts)
    elif isinstance(value, types.FunctionType):
        yield from deeper(value.__code__)
        yield from deeper(value.__defaults__)
        yield from deeper(value.__kwdefaults__)
        for cell in value.__closure__ or ():
            try:
                yield from deeper(cell.cell_contents)
            except ValueError:  # empty
                yield "empty"
        names = [name for name in value.__code__.co_names if name in value.__globals__]
        for name in names:
            used = value.__globals__[name]
            # Only global constants and functions of the same module are hashed; others count by name.
            if isinstance(used, bool | int | float | str) or getattr(used, "__module__", None) == value.__module__:
                yield from deeper(used)
    elif isinstance(value, types.MethodType):
        yield from deeper(value.__func__)
        yield from deeper(_read_in(value.__func__, value.__self__))
    elif isinstance(value, functools.partial):
        yield from deeper((value.func, value.args, value.keywords))
    elif isinstance(value, type):
        yield f"{value.__module__}.{value.__qualname__}"
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield repr(name) if isinstance(name, str | int) else type(name).__qualname__
            yield from deeper(inner)
    elif isinstance(value, set | frozenset):
        yield from sorted("\n".join(_parts(one, seen, depth + 1)) for one in value)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from deeper(one)
    elif isinstance(value, np.ndarray | np.generic):
        yield f"{value.dtype} {value.shape}"
    elif callable(value) and hasattr(value, "__wrapped__"):
        yield from deeper(value.__wrapped__)
    elif callable(value) and isinstance(call := vars(type(value)).get("__call__"), types.FunctionType):
        yield from deeper(call)
        yield from deeper(_read_in(call, value))


def _read_in(function: Any, owner: Any) -> dict[str, Any]:
    """Returns the plain attributes that an object's method reads; others, such as counters, may change in a run."""
    names = getattr(getattr(function, "__code__", None), "co_names", ())
    held = getattr(owner, "__dict__", {})
    return {name: held[name] for name in names if isinstance(held.get(name), bool | int | float | str)}
