"""Rematerialization: the backward pass recomputes activations instead of keeping them in memory."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import nnx

from trainer.core.gradient import Objective
from trainer.core.module_views import View, called_through, is_of_nnx, modules_of, no_view, raw_value, refuse_unmatched
from trainer.core.nnx_bridge import Path
from trainer.core.path_patterns import check_pattern, matches
from trainer.errors import ArgumentError, ArgumentTypeError
from trainer.types import Remat

BLOCKS = "blocks"
"""The name for recomputing every block of a model, that is the outermost modules held in lists."""

_NAMES = (
    "everything_saveable",
    "nothing_saveable",
    "dots_saveable",
    "checkpoint_dots",
    "dots_with_no_batch_dims_saveable",
    "checkpoint_dots_with_no_batch_dims",
)

Policy = Callable[..., Any]
"""A policy of `jax.checkpoint`."""


@dataclasses.dataclass(frozen=True)
class RematPlan:
    """The meaning of a ``remat`` argument.

    Attributes:
        whole: The policy for the whole objective, or None.
        parts: Policies by path pattern of modules; `BLOCKS` means all blocks.
    """

    whole: Policy | None = None
    parts: Mapping[str, Policy] = dataclasses.field(default_factory=dict)


def plan_of(remat: Remat) -> RematPlan:
    """Returns the plan of a ``remat`` argument; see `trainer.make_train_step`.

    Raises:
        ArgumentError: It has an unknown policy or an invalid pattern; if it is of another type, `ArgumentTypeError`.
    """
    if remat is None:
        return RematPlan()
    if isinstance(remat, Mapping):
        if not remat:
            raise ArgumentError("`remat` is empty; map patterns of paths to policies, such as {'layers/*': ...}.")
        return RematPlan(parts={check_pattern(key, "remat"): _policy(value, key) for key, value in remat.items()})
    # Over the whole objective, a policy that saves nothing does not reduce memory: all is recomputed at once.
    if remat in (BLOCKS, "nothing_saveable"):
        return RematPlan(parts={BLOCKS: jax.checkpoint_policies.nothing_saveable})
    return RematPlan(whole=_policy(remat))


def rematerialized(plan: RematPlan, objective: Objective) -> Objective:
    """Returns an objective that recomputes all activations except those that the policy saves."""
    if plan.whole is None:
        return objective

    def again(*args: Any) -> Any:
        # A new function per trace, since JAX caches traces by function and an extension may have been switched.
        return jax.checkpoint(lambda *traced: objective(*traced), policy=plan.whole)(*args)

    return again


def in_parts(plan: RematPlan) -> View:
    """Returns the view of a model that recomputes modules matched by a pattern in the backward pass."""
    if not plan.parts:
        return no_view

    @contextlib.contextmanager
    def enter(model: Any) -> Iterator[None]:
        modules = {path: module for path, module in modules_of(model).items() if callable(module)}
        chosen: dict[Path, tuple[Any, Policy]] = {}
        for pattern, policy in plan.parts.items():
            found = _blocks(modules) if pattern == BLOCKS else _matching(pattern, modules)
            if not found:
                _refuse(pattern, modules)
            chosen = {path: (modules[path], policy) for path in found} | chosen  # the first pattern decides
        with called_through((module, _Rematerialize(policy)) for module, policy in chosen.values()):
            yield

    return enter


@dataclasses.dataclass(frozen=True)
class _Rematerialize:
    """The wrapper that calls a module under `jax.checkpoint` and carries its batch statistics and RNG counts over."""

    policy: Policy

    def __call__(self, call: Callable[..., Any], module: Any, args: Any, kwargs: Any) -> Any:
        # Arguments and outputs that are not arrays, such as flags, are constants of the traced call.
        leaves, treedef = jax.tree.flatten((args, kwargs), is_leaf=is_of_nnx)
        traced = [leaf if _is_traced(leaf) else None for leaf in leaves]
        before = dict(nnx.flatten(module, graph=True)[1])
        values = {path: raw_value(leaf) for path, leaf in before.items()}
        assigned: set[Path] = set()
        constants: list[Any] = []
        structure: Any = None

        def run(module: Any, traced: list[Any]) -> list[Any]:
            nonlocal structure
            args, kwargs = jax.tree.unflatten(
                treedef, [leaf if arg is None else arg for leaf, arg in zip(leaves, traced, strict=True)]
            )
            held = {path: raw_value(leaf) for path, leaf in nnx.flatten(module, graph=True)[1]}
            outputs, structure = jax.tree.flatten(call(module, *args, **kwargs), is_leaf=is_of_nnx)
            after = {path: raw_value(leaf) for path, leaf in nnx.flatten(module, graph=True)[1]}
            assigned.update(path for path, value in after.items() if path not in held or value is not held[path])
            constants[:] = [None if _is_traced(leaf) else leaf for leaf in outputs]
            return [leaf if _is_traced(leaf) else None for leaf in outputs]

        outputs = nnx.remat(run, policy=self.policy)(module, traced)
        # Flax returns all variables as results of the call; restore the original arrays of those not assigned.
        for path, leaf in before.items():
            if path not in assigned and isinstance(leaf, nnx.Variable):
                leaf.set_raw_value(values[path])
        return jax.tree.unflatten(structure, [constants[i] if leaf is None else leaf for i, leaf in enumerate(outputs)])


def _blocks(modules: Mapping[Path, Any]) -> list[Path]:
    return _outermost([path for path in modules if path and isinstance(path[-1], int)])


def _matching(pattern: str, modules: Mapping[Path, Any]) -> list[Path]:
    found = [path for path in modules if path and matches(pattern, "/".join(map(str, path)))]
    return _outermost(found)


def _outermost(paths: list[Path]) -> list[Path]:
    held = set(paths)
    return [path for path in paths if not any(path[:end] in held for end in range(1, len(path)))]


def _refuse(pattern: str, modules: Mapping[Path, Any]) -> None:
    if pattern != BLOCKS:
        refuse_unmatched("remat", pattern, modules)
    listed = ", ".join(repr("/".join(map(str, path))) for path in list(modules)[1:6]) or "none"
    raise ArgumentError(
        f"`remat` asks for every block, and no list of `model` holds modules; name those to compute again by path, "
        f"such as {{'encoder': 'nothing_saveable'}} (modules: {listed})."
    )


def _policy(policy: Any, pattern: str | None = None) -> Policy:
    argument = "remat" if pattern is None else f"remat[{pattern!r}]"
    if callable(policy):
        given: Policy = policy
        return given
    if not isinstance(policy, str):
        raise ArgumentTypeError(
            f"`{argument}` is of type {type(policy).__name__}; it must be the name of a policy, a policy of "
            f"jax.checkpoint, or a mapping of paths to policies."
        )
    if policy in _NAMES:
        found: Policy = getattr(jax.checkpoint_policies, policy)
        return found
    known = _NAMES if pattern is not None else (BLOCKS, *_NAMES)
    if hasattr(jax.checkpoint_policies, policy):
        raise ArgumentError(
            f"`{argument}` is {policy!r}, which takes arguments; pass what it returns, "
            f"jax.checkpoint_policies.{policy}(...)."
        )
    raise ArgumentError(
        f"`{argument}` is {policy!r}, which is no policy; known are {', '.join(map(repr, known))}, and what other "
        f"functions of jax.checkpoint_policies return."
    )


def _is_traced(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray) or is_of_nnx(leaf)
