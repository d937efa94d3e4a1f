"""What a batch is, in one place: the step asks when it is traced, the shell before it calls."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from trainer.core.tree_paths import leaf_path
from trainer.errors import BatchError


def batch_length(batch: Any, name: str = "batch") -> int:
    """Returns the number of examples in ``batch`` after checking that it is one.

    Args:
        batch: A mapping of arrays (or of trees of arrays) that share their leading dimension.
        name: What to call it in an error.

    Raises:
        BatchError: It is not a mapping, is empty, holds something that is no numeric array, or its
            leading dimensions differ; all offending leaves are named at once.
    """
    if not isinstance(batch, Mapping):
        raise BatchError(
            f"`{name}` is of type {type(batch).__name__}; it must be a mapping of names to arrays, "
            f'such as {{"input": images, "label": labels}}.'
        )
    leaves = jax.tree.leaves(batch)
    lengths = set()
    for leaf in leaves:
        shape = getattr(leaf, "shape", None)
        if not shape or not _is_numeric(leaf):
            raise BatchError(_explain(batch, name))
        lengths.add(shape[0])
    if len(lengths) != 1 or 0 in lengths:
        raise BatchError(_explain(batch, name))
    return int(lengths.pop())


def checked_batch(batch: Any, name: str = "batch") -> tuple[Any, int]:
    """Returns the batch as JAX can take it, see `as_batch`, and the number of examples in it.

    Raises:
        BatchError: As for `batch_length`.
    """
    # What nearly every batch is, told in a microsecond.
    if type(batch) is dict and all(map(_is_plain, batch.values())):
        lengths = {leaf.shape[0] for leaf in batch.values()}
        if len(lengths) == 1 and 0 not in lengths:
            return batch, lengths.pop()
    batch = as_batch(batch)
    return batch, batch_length(batch, name)


def as_batch(batch: Any) -> Any:
    """Returns the batch as JAX can take it, itself where that is possible.

    A mapping of another kind becomes a dict, and a leaf of another framework (a torch tensor on the
    CPU, say) a NumPy array over the same memory. What is no batch stays what it is.
    """
    if isinstance(batch, Mapping) and not isinstance(batch, dict):
        batch = dict(batch)
    if all(isinstance(leaf, np.ndarray | jax.Array) for leaf in jax.tree.leaves(batch)):
        return batch
    return jax.tree.map(lambda leaf: np.asarray(leaf) if _is_foreign(leaf) else leaf, batch)


def describe(tree: Any) -> str:
    """Writes a tree of arrays as ``image: float32(32, 8, 8, 1), label: int32(32,)``."""
    return ", ".join(f"{leaf_path(path)}: {_short(leaf)}" for path, leaf in jax.tree.leaves_with_path(tree))


def _is_plain(leaf: Any) -> bool:
    return ((type(leaf) is np.ndarray and leaf.dtype.kind in "fiub") or isinstance(leaf, jax.Array)) and leaf.ndim > 0


def _is_numeric(leaf: Any) -> bool:
    # Extended dtypes (keys, bfloat16, fp8) have a kind of their own; only these cannot be computed with.
    # A data frame has a shape but no dtype.
    return hasattr(leaf, "dtype") and getattr(leaf.dtype, "kind", "") not in ("O", "U", "S", "T", "M", "m")


def _is_foreign(leaf: Any) -> bool:
    known = isinstance(leaf, np.ndarray | np.generic | jax.Array)
    return not known and all(hasattr(leaf, name) for name in ("__array__", "shape", "dtype"))


def _short(leaf: Any) -> str:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return f"{leaf.dtype}{tuple(leaf.shape)}"
    return type(leaf).__name__


def _explain(batch: Mapping[Any, Any], name: str) -> str:
    leaves = jax.tree.leaves_with_path(batch)
    if not leaves:
        return f"`{name}` is empty; it must hold at least one array of shape (batch_size, ...)."
    wrong = []
    for path, leaf in leaves:
        where = f"`{name}/{leaf_path(path)}`"
        if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
            wrong.append(f"{where} is of type {type(leaf).__name__}, not an array")
        elif not _is_numeric(leaf):
            wrong.append(f"{where} has dtype {leaf.dtype}, which no model can take")
        elif np.ndim(leaf) == 0:
            wrong.append(f"{where} is a scalar; pass constants to the objective another way")
    if wrong:
        return "; ".join(wrong) + ". Every leaf must be a numeric array of shape (batch_size, ...)."
    if any(leaf.shape[0] == 0 for _, leaf in leaves):
        return f"`{name}` holds no examples: {describe(batch)}."
    return f"`{name}` has leading dimensions that differ: {describe(batch)}. They must be one number."
