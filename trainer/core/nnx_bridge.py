"""Conversion between nnx modules, which are mutable graphs, and plain trees of arrays, which JAX can transform."""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from flax import nnx

from trainer.core.tree_paths import join_path, leaf_path
from trainer.errors import ArgumentError, ObjectiveError

if TYPE_CHECKING:  # for annotations only: importing chex takes a tenth of the time of `import trainer`
    import chex

Path = tuple[Any, ...]
"""The path of a variable in a module: attribute names, dict keys and list indices."""

Flat = dict[Path, Any]
"""The values of variables, by path."""


class GraphDef(nnx.GraphDef[Any]):
    """An interned `nnx.GraphDef` with a cached hash: equal graphdefs are one object.

    ``jax.jit`` hashes and compares the static part of its arguments on every call. Flax recomputes
    the hash each time (76 µs for four layers); here it is computed once, and interning makes the
    comparison an identity. ``nnx.merge(state.graphdef, state.params, state.model_state)`` works.
    """

    __slots__ = ("__weakref__", "_hash", "paths")

    _hash: int
    paths: tuple[Path, ...]
    """The path of each variable, in the order in which ``nnx.merge`` takes their values."""

    def __new__(cls, graphdef: nnx.GraphDef[Any], paths: Iterable[Path]) -> GraphDef:
        code = _hash(graphdef)
        known = _interned.get(code)
        if known is not None and known == graphdef:
            return known
        self = object.__new__(cls)
        object.__setattr__(self, "nodes", graphdef.nodes)
        object.__setattr__(self, "attributes", graphdef.attributes)
        object.__setattr__(self, "num_leaves", graphdef.num_leaves)
        object.__setattr__(self, "paths", tuple(paths))
        object.__setattr__(self, "_hash", code)
        _interned[code] = self
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
        same = self.nodes == other.nodes and self.attributes == other.attributes
        # In Python 1 == 1.0 == True, but modules with one or the other need not compute the same.
        return same and self.num_leaves == other.num_leaves and _kinds(self) == _kinds(other)

    def __reduce__(self) -> tuple[Any, ...]:
        plain: nnx.GraphDef[Any] = nnx.GraphDef(self.nodes, self.attributes, self.num_leaves)
        return GraphDef, (plain, self.paths)


_interned: weakref.WeakValueDictionary[int, GraphDef] = weakref.WeakValueDictionary()


def split_module(module: nnx.Module, wrt: nnx.filterlib.Filter) -> tuple[GraphDef, Flat, Flat]:
    """Returns the static structure of a module, the values of its variables under ``wrt``, and those of all others.

    Raises:
        ArgumentError: It has an attribute that cannot be hashed, named.
    """
    graphdef, flat = _flatten(module)
    selected, rest = flat.split(wrt, ...)
    return GraphDef(graphdef, flat.paths), _values(selected), _values(rest)


def split_variables(module: nnx.Module, wrt: nnx.filterlib.Filter) -> tuple[Flat, Flat]:
    """Returns the values of the variables under ``wrt``, and those of all others."""
    selected, rest = _flatten(module)[1].split(wrt, ...)
    return _values(selected), _values(rest)


def variables_of(module: Any) -> Flat:
    """Returns the values of a module's variables by path; an object that is not a module has none."""
    return _values(_flatten(module)[1]) if isinstance(module, nnx.Module) else {}


def with_variables(module: Any, variables: chex.ArrayTree) -> Any:
    """Returns a copy of a module that holds ``variables``; an object that is not a module is returned as it is."""
    if not isinstance(module, nnx.Module):
        return module
    graphdef, flat = _flatten(module)
    values = lookup(variables, paths=flat.paths)
    return nnx.merge(graphdef, [values[path] for path in flat.paths])


def merge_updated(
    before: chex.ArrayTree, after: Flat, where: str, reduce: Callable[[Any, Any], Any] = lambda old, new: new
) -> chex.ArrayTree:
    """Returns the variables of the next state: the values ``after`` the forward pass, in the structure ``before`` it.

    A variable that is created, removed or changes shape or dtype would change the type of the state: ``jit`` would
    compile every step again, and ``scan`` cannot carry it.

    Args:
        before: The nested variables that the step started from.
        after: The values after the forward pass, by path.
        where: Their root in error messages, such as ``model_state``.
        reduce: Returns the array of the next state from the old and the new one.

    Raises:
        ObjectiveError: Naming every variable that appeared, vanished or changed shape or dtype.
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

    Sown values grow with every call, so a state that keeps its type cannot hold them. Flattening takes half as long as
    copying all arrays, so each caller flattens once.
    """
    graphdef, flat = nnx.flatten(module)
    if any(isinstance(leaf, nnx.Intermediate) for leaf in flat.leaves):
        module = nnx.clone(module)  # the caller's module keeps them
        nnx.pop(module, nnx.Intermediate)
        graphdef, flat = nnx.flatten(module)
    return graphdef, flat


def _kinds(graphdef: nnx.GraphDef[Any]) -> list[type]:
    return [type(getattr(attribute, "value", None)) for _, attribute in graphdef.attributes]


def _hash(graphdef: nnx.GraphDef[Any]) -> int:
    try:
        return hash(graphdef)
    except TypeError as error:
        for name, attribute in graphdef.attributes:
            value = getattr(attribute, "value", None)
            try:
                hash(value)
            except TypeError:
                raise ArgumentError(
                    f"`model` has the attribute `{name}` = {value!r:.60}, a plain Python {type(value).__name__} "
                    f"that cannot be part of a compiled program's identity. Use a tuple, nnx.List or "
                    f"nnx.Dict, or keep it outside the module."
                ) from None
        raise ArgumentError(
            f"`model` has a variable whose metadata cannot be hashed ({error}); use tuples and names there."
        ) from error


def _values(variables: Iterable[tuple[Path, Any]]) -> Flat:
    return {path: leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf for path, leaf in variables}


def _names(tree: chex.ArrayTree) -> set[str]:
    return {leaf_path(path) for path, _ in jax.tree.leaves_with_path(tree)}


def _same_tree(before: Any, after: Any) -> bool:
    structure: Any = jax.tree.structure(before)
    return bool(structure == jax.tree.structure(after))


def _as_before(before: Any, after: Any) -> Any:
    # A Python number, or the weakly typed result of one, takes the dtype of the variable.
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
