"""The contents of a pickle in the reference's layout, shared by the reader and the writer.

A pickle is a dict with the keys ``step`` (an int), ``opt_state``, ``model_state``, ``rng`` and ``extensions_state``.
The reference does not continue a run from a pickle of ours. It needs optax's named tuples and nnx variables, pickled
by reference to the installed versions of their classes. Ours have plain tuples and dicts, which any program of any
version reads. We can resume from the reference's pickles.

We write only dicts, tuples, lists, strings, ints, None and NumPy arrays, so that ``pickle.load`` needs nothing
but NumPy. An array whose dtype NumPy lacks is written as a dict:

- ``{"dtype": "bfloat16", "bits": <uint16 array>}`` for the dtypes of ``ml_dtypes``. Dtypes of less than a byte take
  one byte per entry. With ``ml_dtypes``, ``bits.view(dtype)`` is the array.
- ``{"key_impl": "threefry2x32", "key_data": <uint32 array>}`` for typed keys.
"""

from typing import Any

import jax
import ml_dtypes
import numpy as np

from trainer.core.tree_paths import leaf_path

KEYS = ("step", "opt_state", "model_state", "rng", "extensions_state")
"""The keys of the dict, in the order they are written."""

EXTENDED_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for name, kind in vars(ml_dtypes).items()
    if isinstance(kind, type) and issubclass(kind, np.generic)
}
"""The ``ml_dtypes`` dtypes, by name."""

KEY_WIDTHS = {"threefry2x32": 2, "rbg": 4, "unsafe_rbg": 4}
"""Key implementations, and the number of uint32 words in one key's data."""


def bits_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """Returns the unsigned integer dtype of the same width in bytes."""
    return np.dtype(f"u{dtype.itemsize}")


def merged(params: Any, model_state: Any) -> Any:
    """Returns the nested dicts ``params`` and ``model_state`` merged into one tree of module attributes."""
    if not (isinstance(params, dict) and isinstance(model_state, dict)):
        return params
    return {**model_state, **{key: merged(value, model_state.get(key)) for key, value in params.items()}}


def children_of(tree: Any) -> dict[str, Any]:
    """Returns the children of a node, by their names in a path, in field order."""
    below = jax.tree.leaves_with_path(tree, is_leaf=lambda node: node is not tree)
    return {leaf_path(keys): child for keys, child in below if keys}
