"""Checksums on the device: the same for every sharding, and different for every damage to one entry."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from trainer.checkpoints.file_format import DTYPES
from trainer.core.checksums import as_text, bits, digest, digest_on_host, digests_as_text, from_bits

WIDE = {"int64", "uint64", "float64", "complex128"}


@pytest.mark.parametrize("spec", [("a", "b"), ("b", "a"), (None, "a"), (("a", "b"), None)])
def test_it_does_not_depend_on_the_sharding(spec):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    array = jax.random.normal(jax.random.key(0), (16, 24))
    spread = jax.device_put(array, NamedSharding(mesh, PartitionSpec(*spec)))
    assert as_text(digest(spread)) == as_text(digest(array))


def test_no_sharded_array_is_gathered_for_it():
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    array = jax.device_put(jnp.ones((64, 8)), NamedSharding(mesh, PartitionSpec("a")))
    text = jax.jit(digest).lower(array).compile().as_text()
    assert "all-gather" not in text
    assert "all-reduce" in text


@pytest.mark.parametrize("name", sorted(DTYPES.keys() - WIDE))
def test_every_bit_of_every_dtype_counts(name):
    dtype = DTYPES[name]
    width = dtype.itemsize
    raw = np.random.default_rng(0).integers(0, 2 if name in ("bool", "int2", "uint2", "int4") else 4, (3, width))
    before = as_text(digest(jnp.asarray(raw.astype(np.uint8).view(dtype).reshape(3))))
    narrow = 1 if name == "bool" else (jnp.iinfo if "int" in name else jnp.finfo)(dtype).bits
    used = 8 * width if width > 1 else narrow
    seen = {before}
    for entry in range(3):
        for bit in range(used):
            damaged = raw.astype(np.uint8)
            damaged[entry, bit // 8] ^= 1 << (bit % 8)
            seen.add(as_text(digest(jnp.asarray(damaged.view(dtype).reshape(3)))))
    assert len(seen) == 1 + 3 * used


@pytest.mark.parametrize(
    ("name", "shape"),
    [*((name, (3, 5)) for name in sorted(DTYPES)), *(("float32", one) for one in ((), (0,), (2**16,), (2**20 + 3,)))],
)
@pytest.mark.few(4)
def test_the_host_computes_the_same(name, shape):
    high = {"bool": 2, "int2": 2, "uint2": 4, "int4": 8, "uint4": 16, "float4_e2m1fn": 16}.get(name, 256)
    width = DTYPES[name].itemsize
    raw = np.random.default_rng(0).integers(0, high, (*shape, width)).astype(np.uint8)
    array = raw.reshape(-1).view(DTYPES[name]).reshape(shape)
    with jax.enable_x64(name in WIDE):
        assert as_text(digest_on_host(array)) == as_text(digest(jnp.asarray(array)))


def test_the_host_wraps_small_negative_numbers_as_the_device_does():
    array = np.array([-1, -2], DTYPES["int2"])
    assert as_text(digest_on_host(array)) == as_text(digest(jnp.asarray(array)))


@pytest.mark.parametrize("name", ["float32", "bfloat16", "int4", "complex64"])
@pytest.mark.parametrize("spec", [None, (), ("a",), (None, "b"), ("b", "a")])
@pytest.mark.parametrize("rows", [8, 2**17])  # hashed on the host, and above 1 MiB on the devices
@pytest.mark.few(2)
def test_where_it_is_computed_changes_nothing(name, spec, rows):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    array = jnp.asarray(np.random.default_rng(0).integers(0, 8, (rows, 12)).astype(DTYPES[name]))
    place = jax.devices()[3] if spec is None else NamedSharding(mesh, PartitionSpec(*spec))
    assert digests_as_text([jax.device_put(array, place)]) == [as_text(digest(array))]


def test_whole_and_small_arrays_compile_nothing(compilations):
    mesh = jax.make_mesh((8,), ("a",), axis_types=(jax.sharding.AxisType.Auto,))
    on_cpu = [np.ones((size, 3), np.float32) for size in range(1, 300)] + [np.ones(2**19 + 1, np.float32)]
    arrays = [jax.device_put(array) for array in on_cpu]
    arrays += [jax.device_put(array, NamedSharding(mesh, PartitionSpec())) for array in on_cpu[-20:]]
    arrays += [jax.device_put(array, NamedSharding(mesh, PartitionSpec("a"))) for array in on_cpu[7:80:8]]
    compilations.clear()
    digests_as_text(arrays)
    assert compilations == {}


def test_entries_that_change_places_count():
    assert as_text(digest(jnp.array([1.0, 2.0]))) != as_text(digest(jnp.array([2.0, 1.0])))


def test_zero_has_two_signs_and_nan_many_faces():
    patterns = np.array([0x00000000, 0x80000000, 0x7FC00000, 0x7FC00001], np.uint32)
    texts = {as_text(digest(jnp.asarray(pattern.view(np.float32)))) for pattern in patterns}
    assert len(texts) == 4


@pytest.mark.parametrize("name", [name for name, dtype in DTYPES.items() if dtype.itemsize == 1 and name != "bool"])
def test_bits_can_be_undone(name):
    array = jnp.asarray(np.array([[0, 1], [1, 0]], np.uint8).view(DTYPES[name]))
    words = bits(array)
    assert words.dtype == jnp.uint8
    back = from_bits(words, DTYPES[name])
    assert back.dtype == array.dtype
    np.testing.assert_array_equal(np.asarray(back).view(np.uint8), np.asarray(array).view(np.uint8))
