"""NumPy arrays that a step can read safely and without another copy."""

import math
from typing import Any

import jax
import numpy as np

# JAX copies a smaller array during the call in any case, whatever its alignment.
_COPIED_BY_JAX = 100 * 1024


def private_copy(batch: Any) -> Any:
    """Returns a batch with a copy of every NumPy array in it; other leaves stay as they are.

    JAX reads a NumPy argument after the call has returned, and on the CPU may compute on its very memory. A loader
    that fills one buffer again and again would change a batch that a step is still reading.
    """
    if type(batch) is dict:  # `jax.tree.map` takes ten times as long
        return {name: _copied(leaf) for name, leaf in batch.items()}
    return jax.tree.map(_copied, batch)


def _copied(leaf: Any) -> Any:
    if not isinstance(leaf, np.ndarray):
        return leaf if isinstance(leaf, jax.Array) or jax.tree_util.all_leaves([leaf]) else private_copy(leaf)
    if leaf.nbytes < _COPIED_BY_JAX:
        return leaf.copy()
    # Aligned memory spares the copy that JAX makes of any other, so this one costs next to nothing.
    copied = aligned_empty(leaf.shape, leaf.dtype)
    np.copyto(copied, leaf)
    return copied


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Returns uninitialized memory with the alignment of XLA, so that the CPU takes it without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
