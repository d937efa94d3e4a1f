"""Conversion between nnx modules, which are mutable graphs, and plain pytrees of arrays, which JAX can transform.

``nnx.graphlib`` and the fields of ``nnx.GraphDef`` are public names that releases of Flax change; seen in 0.12.8.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable, Hashable, Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx import graphlib
from flax.typing import HashableMapping

from trainer.core.path_patterns import as_filter, check_selects
from trainer.core.static_values import copy_containers, token
from trainer.core.tree_paths import join_path, leaf_path
from trainer.errors import ObjectiveError, first_of

if TYPE_CHECKING:  # importing chex takes a tenth of the time of `import trainer`
    import chex

Path = tuple[Any, ...]
"""The path of a variable in a module: attribute names, dict keys and list indices."""

Flat = dict[Path, Any]
"""The values of variables, by path."""


class GraphDef(nnx.GraphDef[Any]):
    """An interned `nnx.GraphDef` that is hashable whatever it holds: equal graphdefs are one object.

    ``jax.jit`` hashes and compares the static part of its arguments on every call. Flax recomputes the hash each time
    (76 µs for four layers), and fails if an attribute is a list. Here a token of the values is computed once, and
    interning reduces the comparison to identity. It equals the `nnx.GraphDef` it was made from, but has a different
    hash. ``nnx.merge(state.graphdef, state.params, state.model_state)`` works.
    """

    __slots__ = ("__weakref__", "_hash", "_token", "paths")

    _hash: int
    _token: Hashable
    paths: tuple[Path, ...]
    """The path of each variable, in the order in which ``nnx.merge`` takes the values."""

    def __new__(cls, graphdef: nnx.GraphDef[Any], paths: Iterable[Path]) -> GraphDef:
        graphdef = _with_own_values(graphdef)
        identity = _token(graphdef)
        known = interned.get(identity)
        if known is not None:
            return known
        self = object.__new__(cls)
        object.__setattr__(self, "nodes", graphdef.nodes)
        object.__setattr__(self, "attributes", graphdef.attributes)
        object.__setattr__(self, "num_leaves", graphdef.num_leaves)
        object.__setattr__(self, "paths", tuple(paths))
        object.__setattr__(self, "_token", identity)
        object.__setattr__(self, "_hash", hash(identity))
        interned[identity] = self
        return self

    def __init__(self, graphdef: nnx.GraphDef[Any], paths: Iterable[Path]) -> None:
        del graphdef, paths  # the fields of an interned object are set once, in __new__

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if not isinstance(other, nnx.GraphDef):
            return NotImplemented
        return self._token == (other._token if isinstance(other, GraphDef) else _token(other))

    def __deepcopy__(self, memo: Any) -> GraphDef:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        plain: nnx.GraphDef[Any] = nnx.GraphDef(self.nodes, self.attributes, self.num_leaves)
        return GraphDef, (plain, self.paths)

    def merge(self, values: list[Any]) -> Any:
        """Returns a module with ``values``, in the order of `paths`; its lists and other containers are copies."""
        return nnx.merge(_with_own_values(self), values)


interned: weakref.WeakValueDictionary[Hashable, GraphDef] = weakref.WeakValueDictionary()
"""The graphdefs in use, by token."""


def split_module(module: nnx.Module, wrt: nnx.filterlib.Filter) -> tuple[GraphDef, Flat, Flat]:
    """Returns the static structure of a module, the values of its variables under ``wrt``, and all other values."""
    graphdef, flat = _flatten(module)
    selected, rest = _split(flat, wrt)
    return GraphDef(graphdef, flat.paths), _values(selected), _values(rest)


def split_variables(module: nnx.Module, wrt: nnx.filterlib.Filter) -> tuple[Flat, Flat]:
    """Returns the values of the variables under ``wrt``, and those of all others."""
    selected, rest = _split(_flatten(module)[1], wrt)
    return _values(selected), _values(rest)


def variables_of(module: Any) -> Flat:
    """Returns the values of a module's variables by path; empty for an object that is not a module."""
    return _values(_flatten(module)[1]) if isinstance(module, nnx.Module) else {}


def values_of(state: nnx.State[Any, Any]) -> dict[Any, Any]:
    """Returns the arrays in an `nnx.State` as nested plain dicts, as they are: without hooks of its variables."""
    return nest(_values(nnx.to_flat_state(state)))


def with_variables(module: Any, variables: chex.ArrayTree) -> Any:
    """Returns a copy of a module that holds ``variables``; an object that is not a module is returned unchanged."""
    if not isinstance(module, nnx.Module):
        return module
    graphdef, flat = _flatten(module)
    values = lookup(variables, paths=flat.paths)
    return nnx.merge(_with_own_values(graphdef), [values[path] for path in flat.paths])


def merge_updated(
    before: chex.ArrayTree, after: Flat, where: str, reduce: Callable[[Any, Any], Any] = lambda old, new: new
) -> chex.ArrayTree:
    """Returns the variables of the next state: the values ``after`` the forward pass, in the structure ``before`` it.

    Creating or removing a variable, or changing its shape or dtype, would change the type of the state: ``jit`` would
    compile every step again, and ``scan`` could not carry it.

    Args:
        before: The nested variables at the start of the step.
        after: The values after the forward pass, by path.
        where: Their root in error messages, such as ``model_state``.
        reduce: Computes the array of the next state from the old and the new one.

    Raises:
        ObjectiveError: A variable was created, removed or changed in shape or dtype; the message lists all of them.
    """
    flat = lookup(before, paths=after.keys(), missing=_ABSENT)
    problems: list[str] = []
    carried: Flat = {}
    for path, value in after.items():
        if flat[path] is _ABSENT:
            problems.append(f"`{join_path(where, path)}` was created; create it in the module's constructor")
            continue
        kept = value
        if _same_tree(flat[path], value):
            kept = jax.tree.map(lambda old, new: reduce(old, _as_before(old, new)), flat[path], value)
        if not _same_type(flat[path], kept):
            problems.append(
                f"`{join_path(where, path)}` was {_types(flat[path])} and became {_types(kept)}; a variable keeps "
                f"its shape and dtype"
            )
        carried[path] = kept
    result = nest(carried)
    if not problems:
        problems = [f"`{where}/{name}` was removed" for name in sorted(_names(before) - _names(result))]
    if problems:
        raise ObjectiveError(f"The forward pass changed the structure of the state: {'; '.join(problems)}.")
    return result


def static_attributes(module: Any) -> Flat:
    """Returns copies of a module's plain Python attributes by path, without the flags of `nnx.Module.train`."""
    if not isinstance(module, nnx.Module):
        return {}
    graphdef = _with_own_values(_flatten(module)[0])
    return {
        path: attribute.value
        for path, (_, attribute) in zip(_attribute_paths(graphdef), graphdef.attributes, strict=True)
        if isinstance(attribute, graphlib.Static) and path[-1] not in _MODES and "_pytree__nodes" not in path
    }


def refuse_changed_attributes(before: Flat, module: Any, where: str) -> None:
    """Checks that a forward pass did not change the plain Python attributes of a module.

    They are part of the compiled program, so every change would need a new compilation, as in ``nnx.jit``. Attributes
    that are arrays count as values, like variables, and are carried over.

    Args:
        before: The result of `static_attributes` before the forward pass.
        module: The module after it.
        where: The name of the module in error messages, such as ``model``.

    Raises:
        ObjectiveError: An attribute was set, changed or deleted; the message lists them.
    """
    after = static_attributes(module)
    changed = [
        f"`{join_path(where, path)}` {_change(before.get(path, _ABSENT), after.get(path, _ABSENT))}"
        for path in {**before, **after}
        if path not in before or path not in after or token(before[path]) != token(after[path])
    ]
    if changed:
        raise ObjectiveError(
            f"The forward pass changed plain Python attributes: {first_of(changed, separator='; ')}. They are part of "
            f"the compiled program, so the change would be lost. Hold what a step changes in an nnx.Variable "
            f"(`self.calls = nnx.Variable(jnp.array(0))`, `self.calls[...] += 1`), and set the rest in the constructor."
        )


def _change(before: Any, after: Any) -> str:
    if before is _ABSENT:
        return f"was set to {after!r:.60}"
    return "was deleted" if after is _ABSENT else f"was {before!r:.60} and became {after!r:.60}"


def nest(flat: Flat) -> dict[Any, Any]:
    """Turns ``{("a", 0): x}`` into ``{"a": {0: x}}``."""
    tree: dict[Any, Any] = {}
    for path, value in flat.items():
        *parents, last = path
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


_ABSENT = object()
_MODES = ("deterministic", "use_running_average")


def lookup(*trees: Any, paths: Iterable[Path], missing: Any = None) -> Flat:
    """Returns the value at each path in nested dicts, from the first tree that has it, else ``missing``."""

    def look_up(path: Path) -> Any:
        for tree in trees:
            try:
                return functools.reduce(lambda node, key: node[key], path, tree)
            except (KeyError, TypeError, IndexError):
                continue
        return missing

    return {path: look_up(path) for path in paths}


def _flatten(module: nnx.Module) -> tuple[nnx.GraphDef[Any], Any]:
    """Returns the static structure of a module and its variables by path, without those of `nnx.Module.sow`.

    Sown values grow with every call, so a state of fixed type cannot hold them. Flattening takes half as long as
    copying all arrays, so each caller flattens only once.
    """
    graphdef, flat = nnx.flatten(module, graph=True)
    if any(isinstance(leaf, nnx.Intermediate) for leaf in flat.leaves):
        module = nnx.clone(module, graph=True)  # the caller's module keeps them
        nnx.pop(module, nnx.Intermediate)
        graphdef, flat = nnx.flatten(module, graph=True)
    return _with_static_constants(_with_ordinary_variables(graphdef), flat)


def _split(flat: Any, wrt: nnx.filterlib.Filter) -> Any:
    """Returns the variables under a filter, which may hold path patterns, and all others."""
    wrt = as_filter(wrt)
    check_selects(wrt, dict(flat))
    return flat.split(wrt, ...)


def _with_static_constants(graphdef: nnx.GraphDef[Any], flat: Any) -> tuple[nnx.GraphDef[Any], Any]:
    """Moves NumPy arrays that JAX does not support (strings, dates, objects) from values to the static structure."""
    constants = {path: leaf for path, leaf in flat if isinstance(leaf, np.ndarray) and leaf.dtype.kind in "OSTUMmV"}
    constants = {path: leaf for path, leaf in constants.items() if not jnp.issubdtype(leaf.dtype, jnp.number)}
    if not constants:
        return graphdef, flat
    attributes = [
        (name, graphlib.Static(constants[path]) if path in constants else attribute)
        for path, (name, attribute) in zip(_attribute_paths(graphdef), graphdef.attributes, strict=True)
    ]
    values = nnx.FlatState(((path, leaf) for path, leaf in flat if path not in constants), sort=False)
    return nnx.GraphDef(graphdef.nodes, attributes, len(values)), values


def _with_ordinary_variables(graphdef: nnx.GraphDef[Any]) -> nnx.GraphDef[Any]:
    """Returns the graphdef of the same module with ordinary variables in place of hijax ones.

    JAX cannot differentiate the creation of a hijax variable, and a step creates the module inside the gradient.
    Ordinary variables give the same results.
    """

    def ordinary(node: Any) -> Any:
        metadata = getattr(node, "metadata", None)
        if not isinstance(metadata, HashableMapping) or not metadata.get("hijax"):
            return node
        return dataclasses.replace(node, metadata=metadata.update(HashableMapping({"hijax": False})))

    return nnx.GraphDef([ordinary(node) for node in graphdef.nodes], graphdef.attributes, graphdef.num_leaves)


def _attribute_paths(graphdef: nnx.GraphDef[Any]) -> list[Path]:
    """Returns the path of each attribute, in the order of ``graphdef.attributes``: depth first."""
    nodes, attributes = iter(graphdef.nodes), iter(graphdef.attributes)
    paths: list[Path] = []

    def visit(node: Any, path: Path) -> None:
        for _ in range(getattr(node, "num_attributes", 0)):  # variables, and modules seen before, have none
            name, attribute = next(attributes)
            paths.append((*path, name))
            if isinstance(attribute, graphlib.NodeAttr):
                visit(next(nodes), (*path, name))

    visit(next(nodes), ())
    return paths


def _token(graphdef: nnx.GraphDef[Any]) -> Hashable:
    return token((graphdef.nodes, graphdef.attributes, graphdef.num_leaves))


def _with_own_values(graphdef: nnx.GraphDef[Any]) -> nnx.GraphDef[Any]:
    """Returns an equal graphdef whose static values are copies, unaffected by edits of the originals."""
    memo: dict[int, Any] = {}
    nodes = copy_containers(graphdef.nodes, memo)
    return nnx.GraphDef(nodes, copy_containers(graphdef.attributes, memo), graphdef.num_leaves)


def _values(variables: Iterable[tuple[Path, Any]]) -> Flat:
    return {path: leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf for path, leaf in variables}


def _names(tree: chex.ArrayTree) -> set[str]:
    return {leaf_path(path) for path, _ in jax.tree.leaves_with_path(tree)}


def _same_tree(before: Any, after: Any) -> bool:
    structure: Any = jax.tree.structure(before)
    return bool(structure == jax.tree.structure(after))


def _as_before(before: Any, after: Any) -> Any:
    # A Python number or a weakly typed array takes the dtype of the variable.
    if isinstance(after, bool | int | float | complex) or getattr(after, "weak_type", False):
        return jnp.asarray(after, before.dtype)
    return after


def _same_type(before: Any, after: Any) -> bool:
    return _same_tree(before, after) and all(
        jnp.shape(a) == jnp.shape(b) and _dtype(a) == _dtype(b)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    )


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def _types(value: Any) -> str:
    leaves = [f"{_dtype(leaf)}{jnp.shape(leaf)}" for leaf in jax.tree.leaves(value)]
    return leaves[0] if len(leaves) == 1 else f"({', '.join(leaves)})"
