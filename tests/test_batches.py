"""What a batch is: any pytree of numeric arrays; whatever else is refused in one message."""

import dataclasses
import enum
import time
from collections import namedtuple
from types import MappingProxyType, SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import sparse

from trainer import BatchError, InMemoryData
from trainer.batches import batch_length, check_batch, checked_batch, checked_data, describe, summarize


@dataclasses.dataclass
class Unregistered:
    x: object


class Frame:
    """Has a shape and no dtype, like a data frame."""

    shape = (3, 2)


ONES = np.ones((3, 2), np.float32)
IS_A_LIST = (
    "is a list of Python values, not an array; pass numpy.asarray(...) of it (a data set of Hugging Face gives arrays "
    "after .with_format('numpy'))"
)
EVERY_LEAF = " Every leaf must be a numeric array of shape (batch_size, ...)."


def refused(leaf, why):
    """A case: a leaf ``y`` beside a good one, and what is said of it whatever takes the batch."""
    return pytest.param({"x": ONES, "y": leaf}, f"`batch/y` {why}.{EVERY_LEAF}", id=why[:40])


UNUSABLE = [
    refused([1, 2], IS_A_LIST),
    refused(["a", "b"], IS_A_LIST),
    refused([[[0.5]]], IS_A_LIST),
    refused([np.float32(0.5), np.float32(1)], IS_A_LIST),
    refused("abc", "is of type str, not an array"),
    refused(Frame(), "is of type Frame, not an array"),
    refused(
        Unregistered(ONES),
        "is of type Unregistered, not an array; make a tree of it with @jax.tree_util.register_dataclass, above its "
        "@dataclasses.dataclass",
    ),
    refused(np.array(["u", "v", "w"]), "has dtype <U1, which no model can take"),
    refused(np.array([None, 1, "x"]), "has dtype object, which no model can take"),
    refused(np.zeros(3, "datetime64[D]"), "has dtype datetime64[D], which no model can take"),
    refused(np.zeros(3, "V8"), "has dtype |V8, which no model can take"),
    refused(np.zeros(3, np.longdouble), "has dtype float128, which no model can take"),
    refused(
        np.zeros(3, [("a", "f4")]), "has the structured dtype [('a', '<f4')]; pass its fields as leaves of their own"
    ),
    refused(np.zeros(3, ">f4"), "has dtype >f4, a byte order that JAX cannot take; pass .astype('f4') of it"),
    refused(
        np.ma.masked_array(ONES),
        "is a masked array, whose mask JAX drops; pass .filled(...) of it, and the mask as a leaf of its own",
    ),
    refused(
        SimpleNamespace(shape=(3, 2), dtype=np.dtype("f4"), todense=None),
        "is a sparse matrix of type SimpleNamespace; pass .todense() of it, or its parts as arrays",
    ),
    ({}, "`batch` is empty; it must hold at least one array of shape (batch_size, ...)."),
    ({"x": None}, "`batch` is empty; it must hold at least one array of shape (batch_size, ...)."),
    (None, "`batch` is None; it must hold at least one array of shape (batch_size, ...)."),
    ("abc", "`batch` is of type str, not an array." + EVERY_LEAF),
    ({"x": ONES[:0]}, "`batch` holds no examples: x: float32(0, 2)."),
    (ONES[:0], "`batch` holds no examples: float32(0, 2)."),
]


@pytest.mark.parametrize(("batch", "message"), UNUSABLE)
@pytest.mark.parametrize("check", [check_batch, checked_batch, batch_length, lambda data: checked_data(data, "batch")])
def test_what_no_step_can_take_is_refused(check, batch, message):
    for _ in range(2):  # the first time by its structure, the second as one that is known
        with pytest.raises(BatchError) as caught:
            check(batch)
        assert str(caught.value) == message


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (
            {"x": ONES, "rate": np.float32(1.0)},
            "`batch/rate` is a scalar, without examples; pass constants to the objective another way." + EVERY_LEAF,
        ),
        ({"x": ONES, "rate": 1.0}, "`batch/rate` is of type float, not an array." + EVERY_LEAF),
        (
            {"x": ONES, "y": [np.zeros(4, np.int32)]},
            "`batch` has leading dimensions that differ: x: float32(3, 2), y/0: int32(4,). They must be one number, "
            "the examples.",
        ),
        (
            {"x": sparse.BCOO.fromdense(jnp.ones((3, 2)))},
            "`batch/x` is a sparse matrix of type BCOO; pass .todense() of it, or its parts as arrays." + EVERY_LEAF,
        ),
    ],
)
def test_what_has_no_common_length_is_refused_as_data_only(data, message):
    for check in (batch_length, lambda data: checked_data(data, "batch")):
        with pytest.raises(BatchError) as caught:
            check(data)
        assert str(caught.value) == message
    check_batch(data)


Pair = namedtuple("Pair", "x y")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Graph:
    nodes: np.ndarray
    edges: np.ndarray


@pytest.mark.parametrize(
    ("batch", "length"),
    [
        ({"x": ONES}, 3),
        (ONES, 3),
        ((ONES, np.zeros(3)), 3),
        ([ONES, np.zeros(3)], 3),
        (Pair(ONES, ONES), 3),
        (Graph(ONES, ONES), 3),
        ({"x": ONES, "nothing": None, "deep": {"y": (jnp.zeros(3, jnp.int8), np.zeros((3, 1), bool))}}, 3),
        ({"x": ONES, "key": jax.random.split(jax.random.key(0), 3), "half": jnp.zeros(3, jnp.bfloat16)}, 3),
        ({"x": jax.ShapeDtypeStruct((3, 5), jnp.float32)}, 3),
        ({"x": ONES + 1j}, 3),
        ({"x": ONES, "rate": np.float32(0.5)}, 3),
        ({"x": ONES, "rate": 0.5, "flag": True, "count": 2}, 3),
        ({"x": ONES, "edge": ONES[:2]}, None),
        ({"x": ONES, "edge": ONES[:0]}, None),
        (Graph(ONES, np.zeros((7, 2), np.int32)), None),
        ({"rate": 0.5}, None),
    ],
)
def test_the_length_of_a_batch(batch, length):
    for _ in range(2):
        assert check_batch(batch) == length
        usable, found = checked_batch(batch)
        assert found == length
        assert jax.tree.structure(usable) == jax.tree.structure(batch)


@pytest.mark.parametrize(
    ("leaf", "fits"),
    [
        (np.array([-(2**31), 2**31 - 1]), True),
        (np.array([0, 2**31]), False),
        (np.array([-(2**31) - 1, 0]), False),
        (np.array([0, 2**32 - 1], np.uint64), True),
        (np.array([0, 2**32], np.uint64), False),
        (np.zeros((2, 0), np.int64), True),
        (np.int64(2**31), False),
        (2**31 - 1, True),
        (2**31, False),
    ],
)
@pytest.mark.parametrize("deep", [False, True])
def test_64_bit_integers_must_fit_into_32_bits(leaf, fits, deep):
    batch = {"x": ONES[:2], "y": (leaf,) if deep else leaf}
    for _ in range(2):
        if fits:
            checked_batch(batch)
        else:
            with pytest.raises(BatchError, match=r"^`batch/y(/0)?` holds .* keep the lower half only: renumber"):
                checked_batch(batch)
    with jax.enable_x64(True):
        checked_batch(batch)


def test_values_that_do_not_fit_are_said():
    with pytest.raises(
        BatchError, match=r"^`ids` holds -1 to 1099511627776 as int64, the first of them in row 1\. JAX"
    ):
        checked_data(np.array([-1, 2**40]), "ids")


def test_a_known_structure_with_other_values_is_read_again():
    nested = {"deep": {"y": np.arange(3)}}
    checked_batch(nested)
    nested["deep"]["y"] = np.arange(3) + 2**31
    with pytest.raises(BatchError, match="`batch/deep/y` holds 2147483648 to 2147483650 as int64"):
        checked_batch(nested)


def test_an_error_is_short_whatever_the_batch_is():
    name = "a rather long name of a column " * 20
    many = {f"{name}{index}": np.array([None]) for index in range(300)}
    uneven = {f"{name}{index}": np.zeros(index + 1) for index in range(300)}
    wide = {f"{name}{index}": np.array([2**40]) for index in range(300)}
    for check, batch in ((check_batch, many), (batch_length, uneven), (checked_batch, wide)):
        with pytest.raises(BatchError) as caught:
            check(batch)
        assert len(str(caught.value)) <= 1000
    with pytest.raises(BatchError, match="; and 295 more leaves"):
        check_batch(many)


def test_nothing_is_read_before_everything_is_checked():
    class Lazy:
        """An array on a disk, say."""

        shape, dtype = (3,), np.dtype("f4")

        def __array__(self, dtype=None, copy=None):
            raise AssertionError("read")

    with pytest.raises(BatchError, match="`data/y` is of type str"):
        checked_data({"x": Lazy(), "y": "abc"}, "data")
    lists = [[0.0] * 100] * 100_000
    start = time.perf_counter()
    with pytest.raises(BatchError, match="`data/x` is a list of Python values"):
        checked_data({"x": lists, "y": ONES}, "data")
    assert time.perf_counter() - start < 0.5  # ten million numbers


def test_the_length_of_a_batch_is_known_while_tracing():
    assert jax.jit(lambda batch: jnp.zeros(batch_length(batch)))({"x": ONES}).shape == (3,)


def test_a_mapping_that_jax_does_not_know_becomes_a_dict():
    assert checked_batch(MappingProxyType({"x": ONES})) == ({"x": ONES}, 3)
    with pytest.raises(BatchError, match=r"is of type mappingproxy, not an array"):
        batch_length(MappingProxyType({"x": ONES}))


def test_describe_names_every_leaf():
    tree = {"image": ONES, "meta": {"id": jnp.zeros(3, jnp.int32), "note": "text"}, "keys": (jax.random.key(0),)}
    assert describe(tree) == "image: float32(3, 2), keys/0: key<fry>(), meta/id: int32(3,), meta/note: str"
    assert describe({}) == ""


def test_a_summary_names_five_leaves():
    assert summarize({str(index): ONES for index in range(7)}).endswith("4: float32(3, 2), and 2 more")
    assert summarize((ONES,)) == "0: float32(3, 2)"


def test_data_in_memory_may_be_any_tree():
    for data in ((ONES, np.arange(3)), Pair(ONES, np.arange(3)), Graph(ONES, np.arange(3)), ONES):
        held = InMemoryData(data, 2)
        first, last = held.in_order()
        assert jax.tree.structure(first) == jax.tree.structure(data)
        assert (len(jax.tree.leaves(first)[0]), len(jax.tree.leaves(last)[0])) == (2, 1)


class Field(enum.Enum):
    X = 1
    Y = 2


@pytest.mark.parametrize(
    ("keys", "kinds"), [(("x", 1), "int, str"), ((Field.X, Field.Y), "Field")], ids=["mixed", "enum"]
)
def test_keys_that_cannot_be_sorted(keys, kinds):
    data = dict.fromkeys(keys, np.ones(4))
    with pytest.raises(BatchError, match=f"`train_data` has keys of {kinds}, which cannot be sorted"):
        InMemoryData(data, 2, "train_data")


def test_abstract_arrays_are_no_data():
    with pytest.raises(BatchError, match=r"`data` has leaves of jax.ShapeDtypeStruct, which has no values"):
        InMemoryData({"x": jax.ShapeDtypeStruct((4, 2), np.float32)}, 2)


def test_a_table_says_how_it_becomes_an_array():
    class Table:
        def to_numpy(self):
            return np.ones((4, 2))

    with pytest.raises(BatchError, match=r"`data/x` is of type Table, not an array; pass .to_numpy\(\) of it"):
        InMemoryData({"x": Table()}, 2)
