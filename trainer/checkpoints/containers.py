"""What a tree is made of where its paths do not tell: tuples and named tuples, such as optax is full of.

A path has the name of a field but not which fields came before it, and an empty state leaves no path at
all. Pickles in the reference's layout know fields by their number, so whoever converts has to know.
"""

import collections
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from trainer.errors import CheckpointError
from trainer.tree_paths import LeafPath, parts_of

Container = tuple[list[str | int], str, list[str | int]]
"""Where it is, the name of its class, and what is in it."""


def containers(tree: Any, path: LeafPath = ()) -> list[Container]:
    """Describes every inner node of a tree, from the root on, but for dicts that hold something."""
    below = jax.tree.leaves_with_path(tree, is_leaf=lambda node: node is not tree)
    if any(not keys for keys, _ in below):
        return []
    children = {parts_of(keys)[0]: child for keys, child in below}
    evident = isinstance(tree, dict) and children
    found: list[Container] = [] if evident else [(list(path), type(tree).__name__, list(children))]
    for name, child in children.items():
        found += containers(child, (*path, name))
    return found


def rebuild(leaves: Mapping[LeafPath, Any], described: Sequence[Container]) -> dict[str, Any]:
    """Makes a tree of dicts from its leaves, tuples where they were described, named ones where they were named.

    The classes of named tuples are made up: they have the fields and the name, and nothing else.

    Raises:
        CheckpointError: The description does not fit the leaves.
    """
    tree: dict[Any, Any] = {}
    try:
        for path, leaf in leaves.items():
            _node(tree, path[:-1])[path[-1]] = leaf
        for place, kind, names in sorted(described, key=lambda one: -len(one[0])):
            parent = _node(tree, tuple(place[:-1]))
            children = parent.get(place[-1], {})
            values = [children.get(name) for name in names]
            if kind == "dict":
                parent[place[-1]] = {}
                continue
            named = any(isinstance(name, str) for name in names) or kind not in ("tuple", "list")
            kept: Any = collections.namedtuple(kind, names) if named else None  # type: ignore[arg-type]
            parent[place[-1]] = kept(*values) if named else tuple(values)
    except (AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
        raise CheckpointError(f"its containers are not described as its arrays are: {error!r}") from error
    return tree


def _node(tree: dict[Any, Any], path: LeafPath) -> dict[Any, Any]:
    for part in path:
        tree = tree.setdefault(part, {})
    return tree
