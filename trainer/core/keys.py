"""The PRNG implementation of keys, or of their shapes."""

import functools
from typing import Any

import jax
import jax.numpy as jnp


def is_key(leaf: Any) -> bool:
    """Returns whether a leaf holds typed PRNG keys: an array, a `jax.ShapeDtypeStruct`, or anything with a dtype."""
    return hasattr(leaf, "dtype") and bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def key_impl(leaf: Any) -> Any:
    """Returns the implementation of typed keys, as `jax.random.key_impl` does, also of a `jax.ShapeDtypeStruct`."""
    return jax.random.key_impl(leaf) if isinstance(leaf, jax.Array) else _impl_of(leaf.dtype)


@functools.cache
def _impl_of(dtype: Any) -> Any:
    found: list[Any] = []
    jax.eval_shape(lambda key: found.append(jax.random.key_impl(key)), jax.ShapeDtypeStruct((), dtype))
    return found[0]
