"""Encodes loader positions (plain values, arrays, torch tensors) as bytes for checkpoints. Decoding runs no code."""

import re
import sys
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import msgpack
import numpy as np

# MessagePack extension types, for values that MessagePack cannot hold or would return as another type.
_TUPLE, _INTEGER, _SCALAR, _ARRAY, _TENSOR = range(5)

# Each nested unpacker uses much of the C stack, which a hostile file must not exhaust.
_MAX_DEPTH = 32

_DTYPE = re.compile(r"[<>|][biufcmMSU]\d+(\[\w+\])?")


def encode(position: Any) -> bytes:
    """Encodes a tree of plain values, arrays and torch tensors as bytes, for `decode`.

    JAX arrays come back as NumPy arrays, and mappings as dicts.

    Raises:
        TypeError: The tree holds something else.
        ValueError: Tuples are nested more than 32 deep.
    """
    return _encode(position, 0)


def decode(data: bytes) -> Any:
    """Returns the tree that `encode` encoded. Runs no code from the bytes.

    Raises:
        ValueError: The bytes are damaged or not from `encode`.
    """
    try:
        return _decode(data, 0)
    except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
        raise ValueError(f"the position of the loader cannot be understood: {error}") from error


def _encode(value: Any, depth: int) -> bytes:
    if depth > _MAX_DEPTH:
        raise ValueError("tuples nested too deeply")
    return bytes(msgpack.packb(value, default=partial(_to_plain, depth + 1), strict_types=True))


def _decode(data: bytes, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise ValueError("it is nested too deeply")
    return msgpack.unpackb(data, ext_hook=partial(_from_plain, depth + 1), strict_map_key=False)


def _to_plain(depth: int, value: Any) -> Any:
    if type(value) is tuple:
        return msgpack.ExtType(_TUPLE, _encode(list(value), depth))
    if type(value) is int:  # more than 64 bits, as in the states of random number generators
        return msgpack.ExtType(_INTEGER, value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))
    if isinstance(value, Mapping):
        return dict(value)
    code = _SCALAR if isinstance(value, np.generic) else _ARRAY
    if "torch" in sys.modules and isinstance(value, sys.modules["torch"].Tensor):
        code, value = _TENSOR, value.numpy(force=True)
    if not isinstance(value, np.generic | np.ndarray | jax.Array):
        raise TypeError(f"an object of type {type(value).__qualname__}")
    array = np.asarray(value)
    if not _DTYPE.fullmatch(array.dtype.str):
        raise TypeError(f"an array of dtype {array.dtype}")
    return msgpack.ExtType(code, msgpack.packb([array.dtype.str, list(array.shape), array.tobytes()]))


def _from_plain(depth: int, code: int, data: bytes) -> Any:
    if code == _TUPLE:
        return tuple(_decode(data, depth))
    if code == _INTEGER:
        return int.from_bytes(data, "little", signed=True)
    dtype, shape, raw = msgpack.unpackb(data)
    if code not in (_SCALAR, _ARRAY, _TENSOR) or not _DTYPE.fullmatch(dtype):
        raise ValueError(f"an extension of type {code} and dtype {dtype!r}")
    array = np.frombuffer(bytearray(raw), dtype).reshape(shape)
    if code == _TENSOR:
        if "torch" not in sys.modules:
            raise ValueError("it holds torch tensors, and torch is not imported")
        return sys.modules["torch"].from_numpy(array)
    return array[()] if code == _SCALAR else array
