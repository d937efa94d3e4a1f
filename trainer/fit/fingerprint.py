"""Hashes of the functions of a trainer, compared on resume to detect what has changed in the program."""

import contextlib
import functools
import weakref
from collections.abc import Mapping
from typing import Any

import optax

from trainer.core.fingerprint import MethodsOf, fingerprint, fingerprint_and_reads
from trainer.run import Run
from trainer.types import ExtensionLike, LossFn, StepFn


def fingerprints_of(
    loss_fn: LossFn | None,
    step_fn: StepFn | None,
    optimizer: optax.GradientTransformation | None,
    extensions: Mapping[str, ExtensionLike],
    run: Run,
    params_average: optax.GradientTransformation | None,
) -> dict[str, str]:
    """Returns hashes by which resume detects another objective, optimizer, extension or model."""
    graphdef = run.peek().graphdef
    told, called = {}, {"__call__"}
    for name, function in (("loss_fn", loss_fn), ("step_fn", step_fn)):
        if function is not None or name == "loss_fn":
            told[name], reads = fingerprint_and_reads(function)
            called |= reads.names
    # Dropout rates and activations are static attributes of the model.
    attributes = [{name: getattr(attribute, "value", None)} for name, attribute in graphdef.attributes]
    kinds = {kind for node in graphdef.nodes if isinstance(kind := getattr(node, "type", None), type)}
    methods = [MethodsOf(kind) for kind in sorted(kinds, key=lambda kind: (kind.__module__, kind.__qualname__))]
    told["model"] = fingerprint([attributes, methods], called)
    for name, transformation in (("optimizer", optimizer), ("params_average", params_average)):
        if transformation is not None:
            told[name] = fingerprint((transformation.init, transformation.update))
    for name, one in extensions.items():
        told |= {f"extensions.{name}{more}": text for more, text in _as_constructed(one).items()}
    return told


_constructed: dict[int, tuple[weakref.ref[Any], dict[str, str]]] = {}
"""The hashes of extensions by id: a run changes weights and attributes, and another trainer may get the same object."""


def _as_constructed(extension: Any) -> dict[str, str]:
    """Returns what identifies an extension, as it was when a trainer first got it."""
    known = _constructed.get(id(extension))
    if known is not None and known[0]() is extension:
        return known[1]
    told = {"": fingerprint(extension, ["loss_fn"]), ".weight": repr(float(extension.weight))}
    with contextlib.suppress(TypeError):  # a class without weak references
        _constructed[id(extension)] = weakref.ref(extension, functools.partial(_forget, id(extension))), told
    return told


def _forget(key: int, reference: Any) -> None:
    if key in _constructed and _constructed[key][0] is reference:
        del _constructed[key]
