"""Checksums of arrays where they lie: on their devices, however they are spread over them.

A digest is a sum over the entries, modulo 2³², of a hash of the entry's bits and its place. So each
device adds up what it holds, a few bytes travel, and the result does not depend on the sharding: what
was saved from eight devices is verified on two. Hashing one entry is a bijection, hence damage to a
single one always changes the sum; that of many goes unnoticed once in 2⁶⁴, two sums being taken.
"""

import functools
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_SEEDS = (0x9E3779B9, 0x7F4A7C15)
_SLICE = 2**20


def digest(array: jax.Array) -> jax.Array:
    """Returns the digest of an array of any dtype but keys, as uint32 of shape ``(2,)``; does not wait."""
    result: jax.Array = _digest(array)
    return result


def digests_as_text(arrays: Sequence[jax.Array | np.ndarray[Any, Any]]) -> list[str]:
    """Returns the digest of each array as text, computed where it lies, and waits for them.

    Digests of arrays on devices of several processes are the same in all; every process must call this.
    """
    found: list[Any] = []
    for array in arrays:
        if not isinstance(array, jax.Array):
            found.append(digest_on_host(array))
        elif len(array.sharding.device_set) == 1:
            found.append(digest(array))
        else:
            mesh = array.sharding.mesh if isinstance(array.sharding, NamedSharding) else None
            found.append(_digest_over(mesh)(array))
            # Devices of a CPU share threads: of many programs that communicate they may take up different ones first,
            # and then wait for each other.
            device: Any = next(iter(array.sharding.device_set))
            if device.platform == "cpu":
                jax.block_until_ready(found[-1])
    return [as_text(one) for one in found]


def digest_on_host(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Returns the same digest of an array in NumPy, without compiling anything, a few MiB at a time."""
    size = min(array.dtype.itemsize, 4)
    words = np.ascontiguousarray(array).reshape(-1).view(f"u{size}")
    mask = (
        np.uint32(2 ** _bit_width(array.dtype) - 1) if size == 1 and array.dtype != np.bool_ else np.uint32(2**32 - 1)
    )
    sums = np.zeros(2, np.uint32)
    for start in range(0, len(words), _SLICE):
        word = words[start : start + _SLICE].astype(np.uint32) & mask
        place = np.arange(start + 1, start + 1 + len(word), dtype=np.uint64).astype(np.uint32)
        for lane, seed in enumerate(_SEEDS):
            sums[lane : lane + 1] += np.sum(_mixed(word + place * np.uint32(seed)), dtype=np.uint32)
    return sums


def as_text(digest: Any) -> str:
    """Writes a digest as 16 hexadecimal digits, waiting for it."""
    return "".join(f"{word:08x}" for word in np.asarray(digest).tolist())


def bits(array: jax.Array) -> jax.Array:
    """Returns the bits of an array as unsigned integers of one, two or four bytes.

    Entries narrower than a byte take one; wider than four bytes, or complex, the last dimension of the
    result counts their parts.
    """
    dtype = array.dtype
    if dtype == jnp.bool_:
        return array.astype(jnp.uint8)
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return bits(jnp.stack([array.real, array.imag], axis=-1))
    width = _bit_width(dtype)
    if width < 8:
        unsigned = jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{width}"))
        return unsigned.astype(jnp.uint8)
    return jax.lax.bitcast_convert_type(array, jnp.dtype(f"uint{min(width, 32)}"))


def from_bits(words: jax.Array, dtype: Any) -> jax.Array:
    """Undoes `bits` for dtypes of at most one byte."""
    width = _bit_width(dtype)
    narrow = words.astype(jnp.dtype(f"uint{width}")) if width < 8 else words
    array: jax.Array = jax.lax.bitcast_convert_type(narrow, dtype)
    return array


def _bit_width(dtype: Any) -> int:
    limits: Any = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
    return int(limits(dtype).bits)


@functools.cache
def _digest_over(mesh: Mesh | None) -> Any:
    """Returns the compiled digest whose result every device of a mesh holds."""
    return jax.jit(_digest, out_shardings=None if mesh is None else NamedSharding(mesh, PartitionSpec()))


@jax.jit
def _digest(array: jax.Array) -> jax.Array:
    words = bits(array).astype(jnp.uint32)
    strides = [int(np.prod(words.shape[axis + 1 :], dtype=object)) % 2**32 for axis in range(words.ndim)]
    places = (
        jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis) * jnp.uint32(stride)
        for axis, stride in enumerate(strides)
    )
    place = functools.reduce(operator.add, places, jnp.zeros(words.shape, jnp.uint32))
    return jnp.stack([jnp.sum(_mixed(words + (place + 1) * jnp.uint32(seed)), dtype=jnp.uint32) for seed in _SEEDS])


def _mixed(word: Any) -> Any:
    """The finalizer of MurmurHash3 (Appleby 2011), a bijection of 32 bits."""
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return word ^ (word >> 16)
