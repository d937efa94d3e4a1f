"""How an array comes to lie where it shall: where its counterpart is, if it was read; over a mesh, if all have it."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding


def place_like(value: np.ndarray[Any, Any], like: jax.Array) -> jax.Array:
    """Returns ``value`` as ``like`` is: on its devices, in its sharding, as a key if that is one.

    ``like`` may be a donated array, and may lie on devices of other processes: each process then places
    what its own devices hold. Memory that is fresh and aligned is taken by the CPU as it is.
    """
    if is_multiprocess(like):
        return as_key(jax.make_array_from_callback(value.shape, sharding_of(like), lambda index: value[index]), like)
    array = as_key(jax.device_put(value), like)
    # An uncommitted array must stay so, or the compiled step would see another kind of argument.
    placed: jax.Array = jax.device_put(array, like.sharding) if like.committed else array
    return placed


def to_global(array: jax.Array, sharding: Sharding) -> jax.Array:
    """Returns an array, which every process has, as they shall hold it together; keys stay keys."""
    if sharding.is_fully_addressable:
        placed: jax.Array = jax.device_put(array, sharding)
        return placed
    words = np.asarray(jax.random.key_data(array) if _is_key(array) else array)
    return as_key(jax.make_array_from_callback(words.shape, sharding, lambda index: words[index]), array)


def as_key(array: jax.Array, like: jax.Array) -> jax.Array:
    """Returns words as keys if ``like`` is one, and any other array as it is."""
    if not _is_key(like):
        return array
    keys: jax.Array = jax.random.wrap_key_data(array, impl=jax.random.key_impl(like))
    return keys


def sharding_of(like: jax.Array) -> Sharding:
    """Returns the sharding of an array, and of its words if it is a key; it may be donated."""
    sharding: Sharding = like.sharding
    if not _is_key(like):
        return sharding
    # The words of a key are its last dimension, which is never split.
    return NamedSharding(sharding.mesh, sharding.spec) if isinstance(sharding, NamedSharding) else sharding


def is_multiprocess(array: Any) -> bool:
    """Tells whether an array lies on devices of several processes; it may be donated."""
    return isinstance(array, jax.Array) and not array.sharding.is_fully_addressable


def _is_key(like: jax.Array) -> bool:
    return bool(jnp.issubdtype(like.dtype, jax.dtypes.prng_key))
