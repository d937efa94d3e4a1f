"""Batches over a mesh are those of one device, and every device holds its own part of them."""

import jax
import numpy as np
import pytest

from trainer import BatchError, InMemoryData, make_mesh
from trainer.sharding.placement import placement_of

MESHES = {
    "data": {"data": 8},
    "data, fsdp": {"data": 2, "fsdp": 4},
    "data, tensor": {"data": 4, "tensor": 2},
    "tensor": {"tensor": 8},
    "one device": {"data": 1},
}


def made(axes, examples=43, batch_size=16):
    placement = placement_of(make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))]), None)
    columns = {"id": np.arange(examples), "image": np.arange(examples * 6.0).reshape(examples, 2, 3).astype(np.float32)}
    return placement, InMemoryData(columns, batch_size)


def assert_same(batch, expected):
    assert batch.keys() == expected.keys()
    for name, column in expected.items():
        np.testing.assert_array_equal(np.asarray(batch[name]), column)


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
@pytest.mark.parametrize("shuffled", [True, False])
def test_what_is_drawn_is_what_one_device_would_draw(axes, shuffled):
    placement, data = made(axes)
    ours, theirs = (data.shuffled((1, 2), 3) if shuffled else data.in_order() for _ in range(2))
    drawn = list(iter(lambda: placement.next_batch(ours), None))
    expected = list(theirs)
    assert [examples for _, examples in drawn] == [16, 16, 11]
    for (batch, _), other in zip(drawn, expected, strict=True):
        assert_same(batch, other)
    seen = np.concatenate([np.asarray(batch["id"]) for batch, _ in drawn])
    assert sorted(seen) == list(range(43))


@pytest.mark.parametrize("axes", MESHES.values(), ids=MESHES)
def test_several_at_once_are_the_same_batches(axes):
    placement, data = made(axes)
    several = placement.next_batches(data.shuffled((1, 2), 3), 2, 4)
    for index, expected in zip(range(2), data.shuffled((1, 2), 3), strict=False):
        assert_same({name: leaf[index] for name, leaf in several.items()}, expected)
    assert several["image"].shape == (4, 16, 2, 3)


def test_each_device_holds_its_part():
    placement, data = made({"data": 4, "tensor": 2})
    batch, _ = placement.next_batch(data.in_order())
    held = sorted(tuple(np.asarray(shard.data).tolist()) for shard in batch["id"].addressable_shards)
    assert held == [tuple(range(start, start + 4)) for start in (0, 4, 8, 12) for _ in range(2)]
    several = placement.next_batches(data.in_order(), 2, 2)
    assert {shard.data.shape for shard in several["image"].addressable_shards} == {(2, 4, 2, 3)}


def test_a_short_batch_is_split_over_the_axes_that_can():
    placement, _ = made({"data": 2, "fsdp": 4})
    for examples, held in ((8, 1), (6, 3), (5, 5)):
        batch, found = placement.place_batch({"x": np.zeros((examples, 2), np.float32)})
        assert found == examples
        assert {shard.data.shape for shard in batch["x"].addressable_shards} == {(held, 2)}
    with pytest.raises(BatchError, match="make it a multiple of 8"):
        placement.place_batch({"x": np.zeros((6, 2), np.float32)}, may_be_short=False)


def test_a_batch_keeps_its_tree_and_its_dtypes():
    placement, _ = made({"data": 8})
    batch, _ = placement.place_batch({"x": {"a": np.ones((8, 1), np.float16)}, "y": np.ones(8, np.int32)})
    abstract, _ = placement.abstract_batch({"x": {"a": np.ones((8, 1), np.float16)}, "y": np.ones(8, np.int32)})
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), batch) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding), abstract
    )


@pytest.mark.parametrize("axes", [None, {"data": 1}, {"data": 8}], ids=str)
def test_integers_are_on_every_device_and_few_are_kept(axes):
    placement = placement_of(axes and make_mesh(axes, jax.devices()[: axes["data"]]), None)
    assert placement.replicated_int(3) is placement.replicated_int(3)
    before = len(jax.live_arrays())
    for value in range(1000):
        array = placement.replicated_int(value)
        assert array.dtype == np.int32
        assert array.sharding.num_devices == (axes["data"] if axes else 1)
    assert int(array) == 999
    del array
    assert len(jax.live_arrays()) - before <= 256
