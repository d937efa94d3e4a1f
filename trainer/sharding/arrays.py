"""Placing host arrays on devices: like a template array, or as a global array over a mesh."""

import functools
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding, Sharding

from trainer.core.keys import is_key, key_impl
from trainer.data.memory import rows_of


def place_like(value: np.ndarray[Any, Any], like: Any) -> jax.Array:
    """Places ``value`` with the devices and sharding of ``like``; as PRNG keys if ``like`` holds keys.

    Args:
        value: The whole array, or the key data of keys. The CPU uses fresh, aligned memory without a copy.
        like: The template: an array, which may be donated, a `jax.ShapeDtypeStruct`, or a NumPy array. If it has no
            sharding, ``value`` goes to the default device. If it spans several processes, each process places the part
            that its own devices hold.
    """
    if is_multiprocess(like):
        return as_key(jax.make_array_from_callback(value.shape, sharding_of(like), lambda index: value[index]), like)
    array = as_key(jax.device_put(value), like)
    # The jit cache distinguishes committed from uncommitted arguments, so an uncommitted array must stay so.
    placed: jax.Array = jax.device_put(array, like.sharding) if is_committed(like) else array
    return placed


def is_committed(like: Any) -> bool:
    """Tells whether a template decides where its array is placed: one that is committed, or a shape with a sharding."""
    return bool(like.committed) if isinstance(like, jax.Array) else getattr(like, "sharding", None) is not None


def to_global(array: jax.Array, sharding: Sharding) -> jax.Array:
    """Returns a global array, given an array that every process has in full; keys stay keys."""
    if sharding.is_fully_addressable:
        placed: jax.Array = jax.device_put(array, sharding)
        return placed
    data = np.asarray(jax.random.key_data(array) if is_key(array) else array)
    return as_key(jax.make_array_from_callback(data.shape, sharding, lambda index: data[index]), array)


def as_key(array: jax.Array, like: Any) -> jax.Array:
    """Returns key data as PRNG keys if ``like`` holds keys; any other array is returned unchanged."""
    if not is_key(like):
        return array
    keys: jax.Array = jax.random.wrap_key_data(array, impl=key_impl(like))
    return keys


def sharding_of(like: Any) -> Sharding:
    """Returns the sharding of an array, or that of the key data if it holds keys. It may be donated."""
    sharding: Sharding = like.sharding
    if not is_key(like):
        return sharding
    # Key data has one more dimension than the keys: the last, which is never split.
    return NamedSharding(sharding.mesh, sharding.spec) if isinstance(sharding, NamedSharding) else sharding


def is_multiprocess(array: Any) -> bool:
    """Tells whether an array, or a shape with a sharding, spans several processes. An array may be donated."""
    sharding = getattr(array, "sharding", None) if isinstance(array, jax.Array | jax.ShapeDtypeStruct) else None
    return sharding is not None and not sharding.is_fully_addressable


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
