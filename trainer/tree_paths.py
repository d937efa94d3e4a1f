"""Where a leaf is in a tree, as plain values."""

from typing import Any

LeafPath = tuple[str | int, ...]
"""Attribute names, dict keys and indices, from the root on: ``("params", "layers", 0, "kernel")``."""


def parts_of(keys: Any) -> LeafPath:
    """Turns a JAX key path into attribute names, dict keys and indices."""
    names = ("name", "key", "idx")
    parts = [next(getattr(key, name) for name in names if hasattr(key, name)) for key in keys]
    return tuple(part if isinstance(part, int) else str(part) for part in parts)
