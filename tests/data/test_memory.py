"""Where batches come from: every example exactly once, in an order that can be told in advance."""

import itertools
from types import SimpleNamespace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from trainer import ArgumentError, ArgumentTypeError, BatchError, InMemoryData
from trainer.core.checks import check_count
from trainer.data import memory
from trainer.data.memory import seed_from_key


def numbered(num_examples):
    """A nested data set in which every leaf of example i holds i."""
    i = np.arange(num_examples)
    return {
        "input": {"image": np.broadcast_to(i[:, None, None], (num_examples, 2, 3)).astype(np.float32), "id": i},
        "target": [i.astype(np.int8), (i + 0.5).astype(np.float64)],
    }


def ids(batches):
    """Returns the numbers of the examples, batch by batch."""
    return [batch["input"]["id"].tolist() for batch in batches]


def order_of(batches):
    return list(itertools.chain.from_iterable(ids(batches)))


SIZES = [(12, 4), (10, 4), (3, 4), (4, 4), (1, 1), (5, 1)]


@pytest.mark.parametrize(("num_examples", "batch_size"), SIZES)
def test_in_order_gives_every_example_once(num_examples, batch_size):
    data = InMemoryData(numbered(num_examples), batch_size)
    batches = list(data.in_order())
    assert order_of(batches) == list(range(num_examples))
    assert len(batches) == len(data)
    assert all(len(batch) == batch_size for batch in ids(batches)[:-1])
    chex.assert_trees_all_equal(
        jax.tree.map(lambda *leaves: np.concatenate(leaves), *batches), numbered(num_examples), strict=True
    )


@pytest.mark.parametrize(("num_examples", "batch_size"), SIZES)
def test_shuffled_gives_every_example_once(num_examples, batch_size):
    data = InMemoryData(numbered(num_examples), batch_size)
    batches = list(data.shuffled((1, 2), epoch=3))
    assert sorted(order_of(batches)) == list(range(num_examples))
    assert len(batches) == len(data)
    assert all(len(batch) == batch_size for batch in ids(batches)[:-1])


def test_the_leaves_of_an_example_stay_together():
    for batch in InMemoryData(numbered(10), 4).shuffled((0,), epoch=0):
        i = batch["input"]["id"]
        np.testing.assert_array_equal(batch["input"]["image"], np.broadcast_to(i[:, None, None], (len(i), 2, 3)))
        np.testing.assert_array_equal(batch["target"][0], i)
        np.testing.assert_array_equal(batch["target"][1], i + 0.5)
        assert [leaf.dtype for leaf in jax.tree.leaves(batch)] == [np.int64, np.float32, np.int8, np.float64]


def test_the_order_is_a_function_of_seed_and_epoch_only():
    first, second = InMemoryData(numbered(50), 7), InMemoryData(numbered(50), 50)
    order = order_of(first.shuffled((1, 2), epoch=5))
    list(first.shuffled((1, 2), epoch=9))
    assert order_of(first.shuffled((1, 2), epoch=5)) == order
    assert order_of(second.shuffled((1, 2), epoch=5)) == order
    assert order == np.random.default_rng([1, 2, 5]).permutation(50).tolist()


@pytest.mark.parametrize(("seed", "epoch"), [((1, 2), 1), ((1, 3), 0), ((2, 1), 0)])
def test_another_seed_or_epoch_gives_another_order(seed, epoch):
    data = InMemoryData(numbered(50), 50)
    assert ids(data.shuffled(seed, epoch)) != ids(data.shuffled((1, 2), epoch=0))


def test_data_is_neither_copied_nor_changed():
    given = numbered(10)
    before = jax.tree.map(np.copy, given)
    data = InMemoryData(given, 4)
    list(data.shuffled((0,), epoch=0))
    assert np.shares_memory(next(data.in_order())["input"]["id"], given["input"]["id"])
    chex.assert_trees_all_equal(given, before)


@pytest.mark.parametrize(("batches", "examples"), [(1, 4), (2, 8), (3, 10), (9, 10)])
def test_the_head_is_the_examples_of_the_first_batches(batches, examples):
    head = InMemoryData(numbered(10), 4).head(batches)
    assert order_of(head.in_order()) == list(range(examples))
    assert sorted(order_of(head.shuffled((3,), epoch=5))) == list(range(examples))


def test_device_arrays_and_keys_are_accepted():
    given = {"x": jnp.arange(6.0), "key": jax.random.split(jax.random.key(0), 6), "half": jnp.ones(6, jnp.bfloat16)}
    data = InMemoryData(given, 4)
    first, last = data.in_order()
    np.testing.assert_array_equal(first["x"], [0, 1, 2, 3])
    assert type(first["x"]) is np.ndarray
    assert (last["half"].dtype, last["half"].shape) == (jnp.bfloat16, (2,))
    order = np.random.default_rng([0, 0]).permutation(6)
    shuffled = next(data.shuffled((0,), epoch=0))
    chex.assert_trees_all_equal(shuffled["key"], given["key"][order[:4]])


def test_arrays_of_another_device_stay_there(monkeypatch):
    array = jnp.arange(4.0)
    monkeypatch.setattr(type(array), "devices", lambda self: [SimpleNamespace(platform="gpu")])
    first = next(InMemoryData({"x": array}, 2).in_order())
    assert isinstance(first["x"], jax.Array)


@pytest.mark.parametrize("pad_to", [None, "batch"])
def test_their_batches_are_those_of_the_host(pad_to, monkeypatch):
    given = {"x": np.arange(21.0, dtype=np.float32).reshape(7, 3), "label": np.arange(7, dtype=np.int32)}
    host = InMemoryData(given, 2, pad_to=pad_to)
    monkeypatch.setattr(memory, "_on_host", lambda leaf: leaf)
    device = InMemoryData(jax.device_put(given), 2, pad_to=pad_to)
    for make in (InMemoryData.in_order, lambda data: data.shuffled((3,), 1)):
        expected, found = list(make(host)), list(make(device))
        chex.assert_trees_all_equal(found, expected)
        assert all(isinstance(batch["x"], jax.Array) for batch in found)
        stacks = [make(data).stacked(2, 3) for data in (host, device)]
        assert stacks[0]["x"].shape == stacks[1]["x"].shape == (3, 2, 3)
        chex.assert_trees_all_equal(*({name: stack[name][:2] for name in given} for stack in stacks))


@pytest.mark.parametrize(("batch_size", "error"), [(0, ArgumentError), (-1, ArgumentError), (2.0, ArgumentTypeError)])
def test_a_batch_size_must_be_a_positive_integer(batch_size, error):
    with pytest.raises(error) as caught:
        InMemoryData(numbered(4), batch_size)
    assert str(caught.value).startswith(f"`batch_size` is {batch_size!r}")


@pytest.mark.parametrize("value", [3, np.int64(3), np.array(3), jnp.array(3)])
def test_check_count_takes_every_kind_of_integer(value):
    count = check_count(value, "count")
    assert (count, type(count)) == (3, int)


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (0, ArgumentError, "`count` is 0; it must be a positive integer."),
        (True, ArgumentTypeError, "`count` is True of type bool; it must be a positive integer."),
        ("3", ArgumentTypeError, "`count` is '3' of type str; it must be a positive integer."),
        (None, ArgumentTypeError, "`count` is None of type NoneType; it must be a positive integer."),
    ],
)
def test_check_count_refuses(value, error, message):
    with pytest.raises(error) as caught:
        check_count(value, "count")
    assert (type(caught.value), str(caught.value)) == (error, message)


def test_errors_name_the_data_as_the_caller_does():
    with pytest.raises(BatchError, match=r"^`train_data` is a list of Python values, not an array"):
        InMemoryData([1, 2], 1, "train_data")


def test_the_seed_is_the_words_of_the_key():
    raw, typed = jax.random.PRNGKey(2**32 + 7), jax.random.key(7)
    assert seed_from_key(typed) == (0, 7)
    assert seed_from_key(raw) == tuple(np.asarray(raw).tolist())
    assert seed_from_key(jax.random.key_data(typed)) == seed_from_key(typed)
    assert all(type(word) is int for word in seed_from_key(raw))


def test_keys_of_other_generators_have_seeds_too():
    assert len(seed_from_key(jax.random.key(7, impl="rbg"))) == 4
