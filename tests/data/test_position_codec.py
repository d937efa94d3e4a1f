"""Positions of loaders as bytes, and back."""

import collections
import contextlib
import random

import jax.numpy as jnp
import msgpack
import numpy as np
import pytest

from trainer.data.position_codec import decode, encode

POSITION = {
    "next": 3,
    "seed": -(2**127) + 1,
    "most": 2**64,
    "scalar": np.int64(7),
    "half": np.float16(0.5),
    "flag": np.bool_(True),
    "nested": [{"deep": (1, (2, None), b"\x00\xff", "é", True, 0.1)}],
    "array": np.arange(6, dtype=np.uint32).reshape(2, 3)[:, ::2],
    "empty": np.zeros((0, 4), ">f8"),
    "scalar array": np.array(5, np.int8),
    "names": np.array(["a", "bc"]),
    "since": np.array(["2020-01-01"], "datetime64[D]"),
    7: "a key that is no string",
    (1, 2): "another",
}


def assert_same(one, other):
    assert type(one) is type(other)
    if isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for left, right in zip(one, other, strict=True):
            assert_same(left, right)
    elif isinstance(one, np.ndarray | np.generic):
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())
    else:
        assert one == other


def test_a_position_comes_back_as_it_was():
    assert_same(decode(encode(POSITION)), POSITION)


@pytest.mark.parametrize("position", [None, True, 0, -1, 2.5, "", b"\xff", (), [], {}, np.int32(1)])
def test_whatever_it_is(position):
    assert_same(decode(encode(position)), position)


def test_states_of_generators_of_random_numbers():
    for generator in (np.random.PCG64(1), np.random.MT19937(1), np.random.Philox(1)):
        state = generator.state
        assert_same(decode(encode(state)), state)
    expected = random.Random(2)
    state = expected.getstate()
    draws = random.Random()
    draws.setstate(decode(encode(state)))
    assert draws.random() == expected.random()


def test_arrays_that_come_back_may_be_written_to():
    array = decode(encode(np.zeros(3)))
    array[0] = 1


def test_jax_arrays_and_other_mappings_come_back_plain():
    assert_same(decode(encode(jnp.arange(3))), np.arange(3, dtype=np.int32))
    assert_same(decode(encode(collections.OrderedDict(b=1, a=2))), {"b": 1, "a": 2})


Named = collections.namedtuple("Named", "field")


@pytest.mark.parametrize("position", [object(), {1}, np.array([None]), [range(3)], Named(1)])
def test_what_would_not_come_back_is_refused(position):
    with pytest.raises(TypeError, match=r"an object of type|an array of dtype object"):
        encode(position)


def test_bytes_that_are_none_of_ours_are_refused():
    draw = random.Random(0)
    whole = encode(POSITION)
    refused = 0
    for _ in range(5000):
        changed = bytearray(whole)
        for _ in range(draw.randint(1, 4)):
            changed[draw.randrange(len(changed))] = draw.randrange(256)
        with contextlib.suppress(ValueError):
            decode(bytes(changed[: draw.choice([None, draw.randrange(len(changed))])]))
            continue
        refused += 1
    assert 2500 < refused < 5000


def test_objects_are_never_read():
    for dtype in ("|O8", "O", "<V4", "f4,O", "<f4\n", 5, None):
        with pytest.raises(ValueError, match="cannot be understood"):
            decode(encode_array(dtype))


def encode_array(dtype):
    return msgpack.packb(msgpack.ExtType(3, encode([dtype, [1], b"\0" * 8])))


def test_depth_is_no_way_to_break_the_interpreter():
    data = b"\x90"
    for _ in range(5000):
        data = b"\xc9" + len(data).to_bytes(4, "big") + b"\x00" + data
    with pytest.raises(ValueError, match="it is nested too deeply"):
        decode(data)
    position = ()
    for _ in range(31):
        position = (position,)
    assert decode(encode(position)) == position
    with pytest.raises(ValueError, match="tuples nested too deeply"):
        encode((((position,),),))
