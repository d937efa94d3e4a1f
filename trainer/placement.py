"""Where an array read from a file goes: to the devices on which its counterpart is."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def place(value: np.ndarray[Any, Any], like: jax.Array) -> jax.Array:
    """Returns ``value`` as ``like`` is: on its devices, in its sharding, as a key if that is one.

    ``like`` may be a donated array. Memory that is fresh and aligned is taken by the CPU as it is.
    """
    array = jax.device_put(value)
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        array = jax.random.wrap_key_data(array, impl=jax.random.key_impl(like))
    # An uncommitted array must stay so, or the compiled step would see another kind of argument.
    placed: jax.Array = jax.device_put(array, like.sharding) if like.committed else array
    return placed
