"""Converts the plain values beside a state to values that both MessagePack and JSON can hold, and back.

Strings, numbers, ``None``, bytes, lists and mappings with string keys stay as they are. Other types become a
readable mapping with a single key that begins with ``$``::

    (1, 2)                    {"$tuple": [1, 2]}
    {0: "cat", None: "dog"}   {"$pairs": [[0, "cat"], [null, "dog"]]}
    date(2026, 11, 2)         {"$date": "2026-11-02"}      a datetime likewise, as "$datetime"
    Path("runs")              {"$path": "runs"}
    b"\\x00"                   {"$bytes": "AA=="}           in JSON only
    np.ones(2, np.int8)       {"$array": ["|i1", [2], b"\\x01\\x01"]}

An array without dimensions, or a NumPy scalar, becomes an equal number. Any other type is refused on saving.
"""

import base64
import datetime
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import msgpack
import numpy as np

from trainer.errors import CheckpointError

_MAX_DEPTH = 100
_FREE_CONTAINERS = 2**18
_BYTES_OF_CONTAINER = 16

# The dtypes of arrays: NumPy's by their `str`, those of ml_dtypes by name. No other name is looked up.
_DTYPE = re.compile(r"[<>|][biufcmMSU][1-9]\d*(\[\w+\])?|bfloat16|float\d+_\w+|u?int\d")


def to_plain(value: Any, name: str) -> Any:
    """Returns a value in a form that MessagePack can hold, and JSON too with `bytes_to_json`.

    Everything comes back equal. Arrays, also those on a device, come back as NumPy arrays in memory of their own.

    Args:
        value: Numbers, strings, bytes, dates, paths, None, arrays, and lists, tuples and mappings of these.
        name: Its name in messages; the path within the value is appended, as ``callbacks[0].best[(1, 2)]``.

    Raises:
        CheckpointError: A part of it would not read back equal. The message names the part.
    """
    return _to_plain(value, name, 0)


def unpack(data: Any, *, free: int = _FREE_CONTAINERS, **options: Any) -> Any:
    """Returns the value in MessagePack bytes, with `to_plain` undone.

    Lists and mappings take up to a hundred times their bytes in memory, so their number is limited in proportion to
    the data; nothing else takes more than about twenty times its bytes.

    Args:
        data: The bytes.
        free: How many lists and mappings are allowed regardless of the size of the data.
        options: More arguments for `msgpack.unpackb`.

    Raises:
        ValueError: The bytes are invalid, or hold too many lists and mappings.
        msgpack.exceptions.UnpackException: The bytes are invalid.
    """
    left = free + len(data) // _BYTES_OF_CONTAINER

    def counted(container: Any) -> Any:
        nonlocal left
        left -= 1
        if left < 0:
            raise ValueError(f"it holds too many lists and mappings for its {len(data)} bytes")
        return container

    hook = options.pop("object_pairs_hook", dict)
    return msgpack.unpackb(
        data, object_pairs_hook=lambda pairs: from_plain(counted(hook(pairs))), list_hook=counted, **options
    )


def pack(value: Any, name: str) -> bytes:
    """Returns the MessagePack bytes of a value, for `unpack`; arguments and errors as for `to_plain`."""
    data = bytes(msgpack.packb(to_plain(value, name)))
    try:
        unpack(data, free=_FREE_CONTAINERS // 2)  # the other half is for the rest of the file
    except ValueError as error:
        raise CheckpointError(f"`{name}` cannot be saved: {error}.") from error
    return data


def from_plain(mapping: dict[Any, Any]) -> Any:
    """Undoes `to_plain` for one mapping whose values are already undone: an ``object_hook`` for MessagePack and JSON.

    A mapping that `to_plain` did not write stays as it is.
    """
    if len(mapping) == 1:
        ((tag, content),) = mapping.items()
        if tag in _READERS:
            try:
                return _READERS[tag](content)
            except (ValueError, TypeError, OverflowError):
                return mapping
    return mapping


def bytes_to_json(value: Any) -> Any:
    """Returns bytes in their JSON form; the ``default`` of `json.dumps`."""
    if isinstance(value, bytes):
        return {"$bytes": base64.b64encode(value).decode("ascii")}
    raise TypeError(f"an object of type {type(value).__qualname__}")


_READERS: dict[str, Callable[[Any], Any]] = {
    "$tuple": lambda content: tuple(content) if type(content) is list else _refuse(),
    "$pairs": dict,
    "$path": Path,
    "$date": datetime.date.fromisoformat,
    "$datetime": datetime.datetime.fromisoformat,
    "$bytes": lambda content: base64.b64decode(content, validate=True),
    "$array": lambda content: _array(*content),
}


def _refuse() -> Any:
    raise ValueError("not what `to_plain` writes")


def _to_plain(value: Any, name: str, depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise CheckpointError(f"`{name[:80]}…` is nested more than {_MAX_DEPTH} deep, which no checkpoint holds.")
    match value:
        case None | bool():
            return value
        case np.generic() | np.ndarray() | jax.Array():
            return _array_to_plain(value, name, depth)
        case int():
            if not -(2**63) <= value < 2**64:
                raise CheckpointError(f"`{name}` is an integer of more than 64 bits, which no checkpoint holds.")
            return int(value)
        case float():
            return float(value)
        case str():
            if not value.isascii() and any("\ud800" <= character <= "\udfff" for character in value):
                raise CheckpointError(f"`{name}` is a string that UTF-8 lacks, which no checkpoint holds: {value!r}.")
            return str.__str__(value)
        case bytes() | bytearray():
            return bytes(value)
        case datetime.datetime():
            return {"$datetime": value.isoformat()}
        case datetime.date():
            return {"$date": value.isoformat()}
        case Path():
            return {"$path": str(value)}
        case list() | tuple():
            items = [_to_plain(item, f"{name}[{index}]", depth + 1) for index, item in enumerate(value)]
            return items if isinstance(value, list) else {"$tuple": items}
        case Mapping():
            pairs = [
                (_key_to_plain(key, name, depth), _to_plain(item, _below(name, key), depth + 1))
                for key, item in value.items()
            ]
            needs_pairs = any(type(key) is not str for key, _ in pairs) or (len(pairs) == 1 and pairs[0][0][:1] == "$")
            return {"$pairs": [list(pair) for pair in pairs]} if needs_pairs else dict(pairs)
    raise _refused(value, name)


def _key_to_plain(key: Any, name: str, depth: int) -> Any:
    return _to_plain(key, f"{name}, key {str(key)[:80]!r}", depth + 1)


def _array_to_plain(value: Any, name: str, depth: int) -> Any:
    try:
        array = np.asarray(value)
    except TypeError:  # keys
        raise _refused(value, name) from None
    if isinstance(value, np.ma.MaskedArray):  # `asarray` drops the mask
        raise _refused(value, name)
    dtype = array.dtype.name if hasattr(ml_dtypes, array.dtype.name) else array.dtype.str
    if _DTYPE.fullmatch(dtype):
        if array.ndim:
            return {"$array": [dtype, list(array.shape), array.tobytes()]}
        number = array.tolist()
        if isinstance(number, bool | int | float | str | bytes) and not isinstance(number, np.generic):
            return _to_plain(number, name, depth)
    raise CheckpointError(f"`{name}` is an array of dtype {array.dtype}, which no checkpoint holds.")


def _array(dtype: str, shape: list[int], data: bytes) -> np.ndarray[Any, Any]:
    if type(dtype) is not str or not _DTYPE.fullmatch(dtype) or type(shape) is not list or type(data) is not bytes:
        _refuse()
    # `bytearray`, so that the array can be written to.
    array = np.frombuffer(bytearray(data), getattr(ml_dtypes, dtype, dtype)).reshape(shape)
    return array if shape else _refuse()


def _refused(value: Any, name: str) -> CheckpointError:
    return CheckpointError(
        f"`{name}` is an object of type {type(value).__qualname__}, which no checkpoint holds; "
        f"take numbers, strings, lists, tuples and mappings of these."
    )


def _below(name: str, key: Any) -> str:
    return f"{name}.{key}" if isinstance(key, str) and key.isidentifier() else f"{name}[{repr(key)[:80]}]"
