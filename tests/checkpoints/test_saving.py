"""Snapshots: copies that outlive the state, each made once."""

import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec, SingleDeviceSharding

from trainer.checkpoints.saving import copied_to_host

MESH = jax.make_mesh((4,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
PLACES = {
    "one device": SingleDeviceSharding(jax.devices()[0]),
    "every device": NamedSharding(MESH, PartitionSpec()),
    "split": NamedSharding(MESH, PartitionSpec("a")),
}


@pytest.mark.parametrize("place", PLACES.values(), ids=PLACES)
def test_a_copy_outlives_the_array_and_is_made_once(place):
    values = np.arange(2**20, dtype=np.float32)
    array = jax.device_put(jnp.asarray(values), place)
    jax.block_until_ready(array)
    tracemalloc.start()
    try:
        copy = copied_to_host(array)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 1.5 * values.nbytes
    donated = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)(array)
    jax.block_until_ready(donated)
    assert array.is_deleted()
    np.testing.assert_array_equal(copy, values)


def test_arrays_that_are_on_the_host_already_stay_as_they_are():
    packed = np.arange(5, dtype=np.uint8)
    assert copied_to_host(packed) is packed
