"""Placing host arrays on devices: like a template array, or as a global array over a mesh."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, Sharding

from trainer.data.memory import rows_of


def place_like(value: np.ndarray[Any, Any], like: jax.Array) -> jax.Array:
    """Places ``value`` with the devices and sharding of ``like``; as PRNG keys if ``like`` holds keys.

    Args:
        value: The whole array, or the key data of keys. The CPU uses fresh, aligned memory without a copy.
        like: The template. It may be donated. If it spans several processes, each process places the
            part that its own devices hold.
    """
    if is_multiprocess(like):
        return as_key(jax.make_array_from_callback(value.shape, sharding_of(like), lambda index: value[index]), like)
    array = as_key(jax.device_put(value), like)
    # The jit cache distinguishes committed from uncommitted arguments, so an uncommitted array must stay so.
    placed: jax.Array = jax.device_put(array, like.sharding) if like.committed else array
    return placed


def to_global(array: jax.Array, sharding: Sharding) -> jax.Array:
    """Returns a global array, given an array that every process has in full; keys stay keys."""
    if sharding.is_fully_addressable:
        placed: jax.Array = jax.device_put(array, sharding)
        return placed
    data = np.asarray(jax.random.key_data(array) if _is_key(array) else array)
    return as_key(jax.make_array_from_callback(data.shape, sharding, lambda index: data[index]), array)


def as_key(array: jax.Array, like: jax.Array) -> jax.Array:
    """Returns key data as PRNG keys if ``like`` holds keys; any other array is returned unchanged."""
    if not _is_key(like):
        return array
    keys: jax.Array = jax.random.wrap_key_data(array, impl=jax.random.key_impl(like))
    return keys


def sharding_of(like: jax.Array) -> Sharding:
    """Returns the sharding of an array, or that of the key data if it holds keys. It may be donated."""
    sharding: Sharding = like.sharding
    if not _is_key(like):
        return sharding
    # Key data has one more dimension than the keys: the last, which is never split.
    return NamedSharding(sharding.mesh, sharding.spec) if isinstance(sharding, NamedSharding) else sharding


def is_multiprocess(array: Any) -> bool:
    """Tells whether an array spans several processes. It may be donated."""
    return isinstance(array, jax.Array) and not array.sharding.is_fully_addressable


def _is_key(like: jax.Array) -> bool:
    return bool(jnp.issubdtype(like.dtype, jax.dtypes.prng_key))


def gather_rows(index: np.ndarray[Any, Any], sharding: NamedSharding, column: Any) -> jax.Array:
    """Returns ``column[index]`` with a sharding; each process reads only the rows that its devices hold."""

    # Devices along an axis that does not split the batch hold the same rows, so read those only once.
    @functools.cache
    def rows(*bounds: tuple[int | None, int | None]) -> Any:
        part = index[tuple(slice(*bound) for bound in bounds[: index.ndim])]
        return rows_of(column, part.ravel()).reshape(*part.shape, *column.shape[1:])

    shape = (*index.shape, *column.shape[1:])
    return jax.make_array_from_callback(
        shape, sharding, lambda slices: rows(*((part.start, part.stop) for part in slices or ()))
    )
