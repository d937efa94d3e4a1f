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
    # Nearly every batch is a flat dict, for which `jax.tree.map` takes ten times as long.
    if type(batch) is dict and all(type(leaf) is np.ndarray for leaf in batch.values()):
        return {name: _copied(leaf) for name, leaf in batch.items()}
    return jax.tree.map(lambda leaf: _copied(leaf) if isinstance(leaf, np.ndarray) else leaf, batch)


def _copied(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    if array.nbytes < _COPIED_BY_JAX:
        return array.copy()
    # Aligned memory spares the copy that JAX makes of any other, so this one costs next to nothing.
    copied = aligned_empty(array.shape, array.dtype)
    np.copyto(copied, array)
    return copied


def aligned_empty(shape: tuple[int, ...], dtype: np.dtype[Any]) -> np.ndarray[Any, Any]:
    """Returns uninitialized memory with the alignment of XLA, so that the CPU takes it without a copy."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)
