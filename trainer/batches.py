"""Checks of batches: a step runs them while it is traced, the host before it calls the step.

A batch is any pytree of numeric arrays and numbers. Its arrays usually share their leading dimension, the examples. If
they do not (for example points inside a domain and on its boundary), the batch has weight 1 in averages, unless the
objective reports a ``batch_weight``.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from trainer.core.tree_paths import leaf_path
from trainer.errors import BatchError

_MOST_LEAVES = 5
_MOST_CHARACTERS = 1000

GIVES_EXAMPLES = (
    "which gives examples by their index; pass a loader of batches, such as torch.utils.data.DataLoader(...) or "
    "grain.MapDataset.source(...).shuffle(seed=0).batch(...)"
)
"""What is wrong with an object that `is_indexed` and gives no batches, for messages."""

# Structures already checked: (tree, types, shapes, dtypes) -> (length, positions of leaves with 64-bit integers).
_checked: dict[Any, tuple[int | None, tuple[int, ...]]] = {}
_MAX_CHECKED = 256
_MAX_LEAVES_OF_A_KEY = 1000

_MOST_BYTES_AT_ONCE = 64 * 2**20

# NumPy type codes: those that need no check, and those of 64-bit integers.
_PLAIN = "?bhilqBHILQefdFD"
_WIDE = "".join(code for code in "ilqILQ" if np.dtype(code).itemsize == 8)


def check_batch(batch: Any, name: str = "batch") -> int | None:
    """Checks that a step can take a batch, by its structure, shapes and dtypes; no values are read.

    Args:
        batch: A pytree of arrays, abstract arrays and numbers.
        name: Its name in error messages.

    Returns:
        The leading dimension shared by all arrays that have one; None if they differ, or if no array has one.

    Raises:
        BatchError: It has no leaves, no examples, or a leaf that JAX cannot convert to a numeric array.
    """
    return _checked_length(batch, name, is_data=False)


def batch_length(batch: Any, name: str = "batch") -> int:
    """Returns the leading dimension that all leaves share.

    Args:
        batch: A pytree of arrays, each of shape ``(length, ...)``.
        name: Its name in error messages.

    Raises:
        BatchError: As for `check_batch`; or a leaf is a scalar, or leading dimensions differ.
    """
    length = _checked_length(batch, name, is_data=True)
    assert length is not None
    return length


def checked_batch(batch: Any, name: str = "batch") -> tuple[Any, int | None]:
    """Returns a batch in a form that JAX accepts, and its length as from `check_batch`.

    A mapping that is not a pytree node becomes a dict, and an array of another framework (such as a torch tensor on the
    CPU) becomes a NumPy array over the same memory. Checks of structures are cached; only 64-bit integers are read
    from every batch.

    Raises:
        BatchError: As for `check_batch`; or 64-bit integers do not fit into 32 bits.
    """
    # Nearly every batch is a flat dict of NumPy arrays; this path takes a few microseconds.
    if type(batch) is dict and all(map(_is_plain, batch.values())):
        lengths = {leaf.shape[0] for leaf in batch.values()}
        if len(lengths) == 1 and 0 not in lengths:
            if large := [leaf for leaf in batch.values() if _is_wide(leaf)]:
                _check_range(batch, large, name)
            return batch, lengths.pop()
    batch = _as_known_to_jax(batch)
    leaves, structure = jax.tree.flatten(batch)
    if any(map(_is_foreign, leaves)):
        leaves = [np.asarray(leaf) if _is_foreign(leaf) else leaf for leaf in leaves]
        batch = jax.tree.unflatten(structure, leaves)
    if len(leaves) > _MAX_LEAVES_OF_A_KEY:
        length, wide = check_batch(batch, name), _wide(leaves)
    else:
        key = structure, *((type(one), getattr(one, "shape", None), getattr(one, "dtype", None)) for one in leaves)
        known = _checked.get(key)
        if known is None:
            if len(_checked) >= _MAX_CHECKED:
                _checked.clear()
            known = _checked[key] = check_batch(batch, name), _wide(leaves)
        length, wide = known
    if wide:
        _check_range(batch, [leaves[index] for index in wide], name)
    return batch, length


def checked_data(data: Any, name: str) -> tuple[Any, int]:
    """Returns data in memory in a form that JAX accepts, and the number of examples.

    Args:
        data: A pytree of arrays, each of shape ``(num_examples, ...)``; converted as by `checked_batch`.
        name: Its name in error messages.

    Raises:
        BatchError: As for `batch_length`; or 64-bit integers do not fit into 32 bits.
    """
    data = _as_known_to_jax(data)
    _check_keys(data, name)
    # Check everything before converting or reading, so that errors come at once.
    length = batch_length(data, name)
    leaves, structure = jax.tree.flatten(data)
    if any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in leaves):
        raise BatchError(f"`{name}` has leaves of jax.ShapeDtypeStruct, which has no values; pass arrays.")
    if any(map(_is_foreign, leaves)):
        leaves = [np.asarray(leaf) if _is_foreign(leaf) else leaf for leaf in leaves]
        data = jax.tree.unflatten(structure, leaves)
        length = batch_length(data, name)
    _check_range(data, [leaves[index] for index in _wide(leaves)], name)
    return data, length


def is_indexed(data: Any) -> bool:
    """Tells whether an object has a length and gives items by their index, and no other way to loop over them."""
    kind = type(data)
    has_items = hasattr(kind, "__getitem__") and hasattr(kind, "__len__")
    return has_items and not hasattr(kind, "__iter__") and not hasattr(data, "__array__")


def describe(tree: Any) -> str:
    """Formats a tree of arrays as ``image: float32(32, 8, 8, 1), label: int32(32,)``."""
    return ", ".join(map(_entry, jax.tree.leaves_with_path(tree)))


def summarize(tree: Any) -> str:
    """Formats a tree of arrays like `describe`, but at most its first five leaves, for a message."""
    leaves = jax.tree.leaves_with_path(tree)
    text = ", ".join(_entry(leaf)[:160] for leaf in leaves[:_MOST_LEAVES])
    return text + (f", and {len(leaves) - _MOST_LEAVES} more" if len(leaves) > _MOST_LEAVES else "")


def _check_keys(data: Any, name: str) -> None:
    """Checks that JAX can sort the keys of a mapping, which it does by comparing them."""
    if isinstance(data, Mapping):
        try:
            sorted(data)
        except TypeError:
            kinds = ", ".join(sorted({type(key).__name__ for key in data}))
            raise BatchError(
                f"`{name}` has keys of {kinds}, which cannot be sorted; name its entries by str."
            ) from None


def _checked_length(batch: Any, name: str, *, is_data: bool) -> int | None:
    leaves = jax.tree.leaves_with_path(batch, is_leaf=_is_unusable_node)
    if not leaves:
        what = "None" if batch is None else "empty"
        raise BatchError(f"`{name}` is {what}; it must hold at least one array of shape (batch_size, ...).")
    problems = [(path, problem) for path, leaf in leaves if (problem := _problem(leaf, is_data=is_data)) is not None]
    if problems:
        raise BatchError(_listed(problems, name, "Every leaf must be a numeric array of shape (batch_size, ...)."))
    lengths = {leaf.shape[0] for _, leaf in leaves if getattr(leaf, "shape", ())}
    if lengths == {0}:
        raise BatchError(f"`{name}` holds no examples: {summarize(batch)}.")
    if len(lengths) == 1:
        (length,) = lengths
        return int(length) if isinstance(length, int | np.integer) else length  # symbolic when a step is exported
    if is_data:
        raise BatchError(
            f"`{name}` has leading dimensions that differ: {_differing(leaves)}. They must be one number, the examples."
        )
    return None


def _problem(leaf: Any, *, is_data: bool) -> str | None:
    """Returns why a leaf cannot be used, or None. ``is_data``: whether it must hold examples."""
    if isinstance(leaf, bool | int | float | complex) and not isinstance(leaf, np.generic):
        return f"is of type {type(leaf).__name__}, not an array" if is_data else None
    if type(leaf) is list:
        return (
            "is a list of Python values, not an array; pass numpy.asarray(...) of it (a data set of Hugging Face gives "
            "arrays after .with_format('numpy'))"
        )
    if isinstance(leaf, np.ma.MaskedArray):
        return "is a masked array, whose mask JAX drops; pass .filled(...) of it, and the mask as a leaf of its own"
    # JAX's own sparse matrices are pytrees: a step can take them, but their leaves have no rows to sample.
    if hasattr(leaf, "todense") and (is_data or jax.tree_util.all_leaves([leaf])):
        return f"is a sparse matrix of type {type(leaf).__name__}; pass .todense() of it, or its parts as arrays"
    if not hasattr(leaf, "shape") or not hasattr(leaf, "dtype"):
        if is_data and is_indexed(leaf):
            return f"is a {type(leaf).__name__}, {GIVES_EXAMPLES}"
        hint = "; pass .to_numpy() of it" if hasattr(leaf, "to_numpy") else ""
        if dataclasses.is_dataclass(leaf):
            hint = "; make a tree of it with @jax.tree_util.register_dataclass, above its @dataclasses.dataclass"
        return f"is of type {type(leaf).__name__}, not an array{hint}"
    if (why := _problem_of_dtype(leaf.dtype)) is not None:
        return why
    if is_data and not leaf.shape:
        return "is a scalar, without examples; pass constants to the objective another way"
    return None


def _problem_of_dtype(dtype: Any) -> str | None:
    # Extended dtypes (keys, bfloat16, fp8) have a different kind. The dtype of a key is not a `numpy.dtype`.
    if not isinstance(dtype, np.dtype):
        return None
    if dtype.names is not None:
        return f"has the structured dtype {str(dtype)[:60]}; pass its fields as leaves of their own"
    if dtype.kind in "OUSTMm" or dtype.type is np.void or dtype.char in "gG":
        return f"has dtype {str(dtype)[:60]}, which no model can take"
    if not dtype.isnative:
        return f"has dtype {dtype.str}, a byte order that JAX cannot take; pass .astype('{dtype.str[1:]}') of it"
    return None


def _check_range(batch: Any, wide: list[Any], name: str) -> None:
    """Checks that 64-bit integers fit into 32 bits, to which JAX converts them when x64 is off."""
    if all(map(_fits, wide)) or jax.dtypes.canonicalize_dtype(np.int64) == np.int64:
        return
    problems = [
        (path, f"holds {leaf if isinstance(leaf, int) else _extremes(leaf)}")
        for path, leaf in jax.tree.leaves_with_path(batch)
        if _is_wide(leaf) and not _fits(leaf)
    ]
    advice = (
        "JAX computes with 32-bit integers and would keep the lower half only: renumber the values, or switch on "
        "jax_enable_x64."
    )
    raise BatchError(_listed(problems, name, advice))


def _fits(leaf: Any) -> bool:
    if not isinstance(leaf, np.ndarray):
        low, high = (0, 2**32) if isinstance(leaf, np.unsignedinteger) else (-(2**31), 2**31)
        return low <= int(leaf) < high
    return _first_too_wide(leaf) is None


def _first_too_wide(leaf: np.ndarray[Any, Any]) -> int | None:
    """Returns the first row that does not fit into 32 bits. Reads in chunks, as data may be larger than memory."""
    if leaf.nbytes > _MOST_BYTES_AT_ONCE and leaf.ndim:
        rows = max(1, _MOST_BYTES_AT_ONCE * len(leaf) // leaf.nbytes)
        parts = ((start, leaf[start : start + rows]) for start in range(0, len(leaf), rows))
        return next((start + row for start, part in parts if (row := _row_too_wide(part)) is not None), None)
    return _row_too_wide(leaf)


def _row_too_wide(leaf: np.ndarray[Any, Any]) -> int | None:
    # All upper halves must be zero; this check takes a third of the time of a minimum and a maximum.
    upper = (leaf if leaf.dtype.kind == "u" else leaf + 2**31) >> 32
    if not np.count_nonzero(upper):
        return None
    return int(np.flatnonzero(upper)[0]) // max(1, upper.size // (len(upper) if upper.ndim else 1))


def _extremes(leaf: np.ndarray[Any, Any]) -> str:
    where = f", the first of them in row {_first_too_wide(leaf)}" if np.ndim(leaf) else ""
    return f"{leaf.min()} to {leaf.max()} as {leaf.dtype}{where}"


def _wide(leaves: list[Any]) -> tuple[int, ...]:
    return tuple(index for index, leaf in enumerate(leaves) if _is_wide(leaf))


def _is_wide(leaf: Any) -> bool:
    return type(leaf) is int or (isinstance(leaf, np.ndarray | np.generic) and leaf.dtype.char in _WIDE)


def _is_plain(leaf: Any) -> bool:
    if type(leaf) is np.ndarray:
        return leaf.dtype.char in _PLAIN and leaf.dtype.isnative and leaf.ndim > 0
    return isinstance(leaf, jax.Array) and leaf.ndim > 0


def _is_foreign(leaf: Any) -> bool:
    known = isinstance(leaf, np.ndarray | np.generic | jax.Array)
    return not known and all(hasattr(leaf, name) for name in ("__array__", "shape", "dtype"))


def _is_unusable_node(node: Any) -> bool:
    """Whether to treat a node as a leaf: a nested list of numbers (else a leaf per number), or a sparse matrix."""
    if type(node) is not list:
        return hasattr(node, "todense")
    first: Any = node
    while type(first) is list and first:
        first = first[0]
    return isinstance(first, bool | int | float | complex | str | np.generic)


def _as_known_to_jax(batch: Any) -> Any:
    is_unknown = isinstance(batch, Mapping) and type(batch) is not dict and jax.tree_util.all_leaves([batch])
    return dict(batch) if is_unknown else batch


def _listed(problems: list[tuple[Any, str]], name: str, advice: str) -> str:
    """Formats at most five problems of leaves, in at most a thousand characters."""
    listed = "; ".join(f"{_named(name, path)} {problem}" for path, problem in problems[:_MOST_LEAVES])
    more = f"; and {len(problems) - _MOST_LEAVES} more leaves" if len(problems) > _MOST_LEAVES else ""
    room = _MOST_CHARACTERS - len(more) - len(advice) - 2
    return f"{listed if len(listed) <= room else listed[: room - 1] + '…'}{more}. {advice}"


def _differing(leaves: list[tuple[Any, Any]]) -> str:
    """Formats one leaf for each leading dimension, at most five, so that the odd one shows."""
    first: dict[int, Any] = {}
    for path, leaf in leaves:
        first.setdefault(leaf.shape[0], (path, leaf))
    text = ", ".join(_entry(leaf)[:160] for leaf in list(first.values())[:_MOST_LEAVES])
    return text + (", …" if len(first) > _MOST_LEAVES else "")


def _named(name: str, path: Any) -> str:
    text = leaf_path(path)
    text = text if len(text) <= 60 else f"{text[:29]}…{text[-30:]}"
    return f"`{name}/{text}`" if text else f"`{name}`"


def _entry(found: tuple[Any, Any]) -> str:
    path, leaf = found
    text, where = type(leaf).__name__, leaf_path(path)
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        text = f"{leaf.dtype}{tuple(leaf.shape)}"
    return f"{where}: {text}" if where else text
