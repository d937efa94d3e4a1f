"""Checksums of arrays, computed on the device that holds them and independent of their sharding.

A digest is a pair of sums modulo 2³². Each sums a hash of a word's bits and position over the words of an array. A word
is an entry of up to four bytes; a wider entry is two words, or four for complex128. Each device sums its own shard and
only a few bytes are communicated. The result does not depend on the sharding: an array saved from eight devices can be
verified on two. The hash of one word is a bijection, so damage within one word always changes both sums. Damage to
several words, in one wide entry or in many, goes undetected with probability 2⁻⁶⁴.

A device program is compiled for every shape. So NumPy, at least as fast, hashes whole arrays in CPU memory, and arrays
of up to 1 MiB unless they are sharded over processes.
"""

import functools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_SEEDS = (0x9E3779B9, 0x7F4A7C15)
_SLICE = 2**16  # words at a time, so that intermediate results stay in the cache
_LARGEST_ON_HOST = 2**20  # bytes; larger arrays are not copied from their device


def digest(array: jax.Array) -> jax.Array:
    """Returns the digest of an array, of any dtype except keys, as uint32 of shape ``(2,)``; does not wait."""
    result: jax.Array = _digest(array)
    return result


def digests_as_text(arrays: Sequence[jax.Array | np.ndarray[Any, Any]]) -> list[str]:
    """Returns the digest of each array as text, and waits for all of them.

    The digest of an array sharded over processes is the same in all of them; every process must call this.
    """
    return prepare_digests(arrays)()


def prepare_digests(arrays: Sequence[jax.Array | np.ndarray[Any, Any]]) -> Callable[[], list[str]]:
    """Does everything of `digests_as_text` in which processes do not wait for each other: copies, hashes, compiles.

    Returns:
        A function that does the rest, with the digests of the arrays sharded over several devices, which it computes
        in collectives. If they are devices of several processes, let all of these agree that none has failed before
        they call it: a process that calls it alone waits forever.
    """
    found: list[Any] = []
    for array in arrays:
        if not isinstance(array, jax.Array):
            found.append(digest_on_host(array))
        elif _is_for_host(array):
            found.append(digest_on_host(_assembled(array)))
        elif len(array.sharding.device_set) == 1:
            found.append(digest(array))
        else:
            mesh = array.sharding.mesh if isinstance(array.sharding, NamedSharding) else None
            program = _digest_over(mesh)
            program.lower(array).compile()  # JAX keeps it for the call, and for the next save
            found.append(functools.partial(program, array))

    def compute() -> list[str]:
        for index, computed in enumerate(found):
            if isinstance(computed, functools.partial):
                found[index] = computed()
                # CPU devices share threads. With several communicating programs in flight, two devices may start
                # different ones first, and deadlock.
                if _is_on_cpu(found[index]):
                    jax.block_until_ready(found[index])
        return [as_text(one) for one in found]

    return compute


def digest_on_host(array: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Returns the same digest as `digest`, computed by NumPy: uint32 of shape ``(2,)``. Compiles nothing."""
    size = min(array.dtype.itemsize, 4)
    words = np.ascontiguousarray(array).reshape(-1).view(f"u{size}")
    if size == 1 and array.dtype != np.bool_ and _bit_width(array.dtype) < 8:
        words = words & np.uint8(2 ** _bit_width(array.dtype) - 1)
    places = np.arange(1, 1 + min(_SLICE, len(words)), dtype=np.uint32)
    sums = np.zeros(2, np.uint32)
    for start in range(0, len(words), _SLICE):
        piece = words[start : start + _SLICE]
        for lane, seed in enumerate(_SEEDS):
            word = places[: len(piece)] * np.uint32(seed)
            word += np.uint32(start * seed % 2**32)
            word += piece
            sums[lane : lane + 1] += np.sum(_mix_in_place(word), dtype=np.uint32)
    return sums


def as_text(digest: Any) -> str:
    """Returns a digest as 16 hexadecimal digits; waits for it."""
    return "".join(f"{word:08x}" for word in np.asarray(digest).tolist())


def bits(array: jax.Array) -> jax.Array:
    """Returns the bits of an array as unsigned integers of one, two or four bytes.

    Entries narrower than a byte take one byte. Entries that are complex or wider than four bytes are
    split into parts along a new last dimension.
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
    """The inverse of `bits`, for dtypes of at most one byte."""
    width = _bit_width(dtype)
    narrow = words.astype(jnp.dtype(f"uint{width}")) if width < 8 else words
    array: jax.Array = jax.lax.bitcast_convert_type(narrow, dtype)
    return array


def _is_for_host(array: jax.Array) -> bool:
    """Returns whether NumPy hashes an array; the same in all processes."""
    if array.nbytes <= _LARGEST_ON_HOST:
        return array.is_fully_replicated or array.is_fully_addressable
    return array.is_fully_replicated and _is_on_cpu(array)


def _is_on_cpu(array: jax.Array) -> bool:
    device: Any = next(iter(array.sharding.device_set))
    return bool(device.platform == "cpu")


def _assembled(array: jax.Array) -> np.ndarray[Any, Any]:
    """Returns the whole array in NumPy. Unlike ``np.asarray(array)``, it caches no host copy in ``array``."""
    if array.is_fully_replicated:
        return np.asarray(array.addressable_data(0))
    whole = np.empty(array.shape, array.dtype)
    for shard in array.addressable_shards:
        whole[shard.index] = np.asarray(shard.data)
    return whole


def _bit_width(dtype: Any) -> int:
    limits: Any = jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo
    return int(limits(dtype).bits)


@functools.cache
def _digest_over(mesh: Mesh | None) -> Any:
    """Returns the compiled digest, with its result replicated over a mesh."""
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
    """The finalizer of MurmurHash3 (Appleby 2011), a bijection on 32 bits."""
    word = (word ^ (word >> 16)) * np.uint32(0x85EBCA6B)
    word = (word ^ (word >> 13)) * np.uint32(0xC2B2AE35)
    return word ^ (word >> 16)


def _mix_in_place(word: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The same as `_mixed`, in place, which is several times faster."""
    shifted = np.empty_like(word)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
        np.right_shift(word, np.uint32(shift), out=shifted)
        word ^= shifted
        if factor != 1:
            word *= np.uint32(factor)
    return word
