"""Paths of leaves in a pytree, as tuples and as text such as ``params/layers/0/kernel``."""

from collections.abc import Iterable
from typing import Any

import jax

LeafPath = tuple[str | int, ...]
"""Attribute names, dict keys and indices from the root to a leaf: ``("params", "layers", 0, "kernel")``."""


def parts_of(keys: Iterable[Any]) -> LeafPath:
    """Returns the attribute names, dict keys and indices of a JAX key path."""
    names = ("name", "key", "idx")
    parts = [next(getattr(key, name) for name in names if hasattr(key, name)) for key in keys]
    return tuple(part if isinstance(part, int) else str(part) for part in parts)


def leaf_path(keys: Iterable[Any]) -> str:
    """Returns a JAX key path as text, such as ``params/layers/0/kernel``."""
    return jax.tree_util.keystr(tuple(keys), simple=True, separator="/")


def join_path(root: str, path: Iterable[Any]) -> str:
    """Returns the path of a variable below ``root`` as text, such as ``model_state/layers/0/mean``."""
    return "/".join([root, *map(str, path)])
