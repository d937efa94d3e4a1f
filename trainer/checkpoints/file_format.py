r"""The checkpoint file format: a MessagePack header, then arrays as raw bytes, all covered by checksums.

Integers are little-endian::

    0   8   \x89 N N T \r \n \x1a \n       broken by a text-mode copy, as in PNG
    8   2+2+4   major and minor version, flags (0)
    16  8+8+8   length of the header, offset of the data, length of the file
    40  8   checksum of the header
    48  8   name of the checksum, ASCII, padded with zeros: "xxh3-64"
    56  8   checksum of the 56 bytes before
    64      the header: {"info": {...}, "leaves": [{"path", "dtype", "shape", "key", "offset", "size"}, ...]}
    data    each array in C order at a multiple of 64 (offsets count from here), ascending, zeros between
    end     8 bytes per leaf: its checksum; 8: checksum of these; 8: N N T . E N D \n

A reader accepts files of its own major version; a newer minor version adds only what it may ignore
(keys of ``info``). XXH3 detects accidents, as CRC does, at memory speed; it is not a signature.
"""

import dataclasses
import functools
import math
import os
import reprlib
import stat
import struct
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import ml_dtypes
import msgpack
import numpy as np
import xxhash

from trainer.checkpoints.atomic import replacing
from trainer.checkpoints.plain_values import to_plain, unpack
from trainer.core.tree_paths import LeafPath
from trainer.errors import UnreadableError

MAGIC = b"\x89NNT\r\n\x1a\n"
END = b"NNT.END\n"
MAJOR, MINOR = 1, 0
CHECKSUM = "xxh3-64"

_PREFIX = struct.Struct("<8sHHIQQQQ8s")
_SUM = struct.Struct("<Q")
_DATA_START = _PREFIX.size + _SUM.size
_ALIGNMENT = 64
_MAX_HEADER = 16 * 2**20
_MAX_DIMENSIONS = 32
_MAX_PARTS = 128  # of a path; deeper trees overflow the stack of code that traverses them
_WINDOW = 2**13
_SLICE = 4 * 2**20  # hashed while still in cache

_NUMPY_DTYPES = """
    bool int8 int16 int32 int64 uint8 uint16 uint32 uint64 float16 float32 float64 complex64 complex128
"""
_ML_DTYPES = """
    bfloat16 int2 int4 uint2 uint4 float4_e2m1fn float8_e3m4 float8_e4m3 float8_e4m3b11fnuz float8_e4m3fn
    float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz float8_e8m0fnu
"""
DTYPES: dict[str, np.dtype[Any]] = {name: np.dtype(name) for name in _NUMPY_DTYPES.split()}
DTYPES |= {name: np.dtype(getattr(ml_dtypes, name)) for name in _ML_DTYPES.split()}
"""Every dtype that a file may name. No other name is looked up."""


@dataclasses.dataclass(frozen=True)
class Leaf:
    """The header's record of one array.

    Attributes:
        path: Its path in the state: ``("params", "layers", 0, "kernel")``.
        dtype: A name from `DTYPES`.
        shape: Its shape; for a key, the shape of its key data.
        key: The PRNG implementation if it is a typed key, else None.
        offset: Where its bytes begin, from the start of the data.
        size: Its number of bytes.
    """

    path: LeafPath
    dtype: str
    shape: tuple[int, ...]
    key: str | None = None
    offset: int = 0
    size: int = 0

    @property
    def name(self) -> str:
        """The path as a string for messages."""
        return "/".join(map(str, self.path))

    @property
    def bytes(self) -> int:
        """The number of bytes its entries take in memory."""
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def write_bundle(
    path: Path,
    info: Mapping[str, Any],
    leaves: Sequence[tuple[Leaf, Callable[[], np.ndarray[Any, Any]]]],
    claim: Callable[[], None] | None = None,
) -> None:
    """Writes a file, one array at a time.

    Args:
        path: The file; it is replaced atomically.
        info: Plain values for the header, see `trainer.checkpoints.plain_values`.
        leaves: Descriptions, each with a callable that returns the array when it is about to be written, so that
            no two need to be in memory at once.
        claim: As for `trainer.checkpoints.atomic.replacing`.

    Raises:
        OSError: The file could not be written; any existing file is unchanged.
        ValueError: The header would be too long or not read back equal, or two leaves have the same path. It is a
            `CheckpointError` if ``info`` holds a value that no file can hold.
    """
    placed, data_length = _lay_out([leaf for leaf, _ in leaves])
    if len({leaf.path for leaf in placed}) != len(placed):
        raise ValueError("two arrays of the state have the same path")
    packer = msgpack.Packer()
    records = [packer.pack_array_header(len(placed)), *map(_packed_record, placed)]
    header = b"".join(
        [
            packer.pack_map_header(2),
            packer.pack("info"),
            packer.pack(to_plain(info, "info")),
            packer.pack("leaves"),
            *records,
        ]
    )
    if len(header) > _MAX_HEADER:
        raise ValueError(f"the header takes {len(header)} bytes, more than 16 MiB")
    data_start = _aligned(_DATA_START + len(header))
    length = data_start + data_length + _trailer_length(len(placed))
    prefix = _PREFIX.pack(
        MAGIC, MAJOR, MINOR, 0, len(header), data_start, length, _sum(header), CHECKSUM.encode("ascii")
    )
    with replacing(path, length, claim=claim) as file:
        file.write(prefix + _SUM.pack(_sum(prefix)) + header + bytes(data_start - _DATA_START - len(header)))
        position, table = 0, b""
        for leaf, (_, get) in zip(placed, leaves, strict=True):
            file.write(bytes(leaf.offset - position))
            hasher = xxhash.xxh3_64()
            for piece in _pieces(get(), leaf):
                hasher.update(piece)
                file.write(piece)
            table += _SUM.pack(hasher.intdigest())
            position = leaf.offset + leaf.size
        file.write(bytes(data_length - position) + table + _SUM.pack(_sum(table)) + END)
        _check_readable(file.path, info, placed)


def _check_readable(path: Path, info: Mapping[str, Any], leaves: list[Leaf]) -> None:
    """Opens a file as a reader does, and checks that its header is the intended one."""
    with Bundle(path) as written:
        plain = [msgpack.packb(to_plain(one, "info")) for one in (written.info, info)]
        if list(written.leaves) != leaves or plain[0] != plain[1]:
            raise ValueError("its header does not come back equal")


@functools.lru_cache(maxsize=10_000)
def _packed_record(leaf: Leaf) -> bytes:
    """Returns the record of a leaf, cached for the next save of the run.

    Raises:
        ValueError: No reader would accept it.
    """
    record = leaf_to_record(leaf)
    leaf_from_record(record)
    return bytes(msgpack.packb(record))


class Bundle:
    """An open file with a verified header. Arrays are read, and their checksums verified, on demand.

    Reads are thread-safe.

    Attributes:
        info: Plain values about the state.
        leaves: The arrays in the file, in file order.

    Raises:
        UnreadableError: The file cannot be read, is damaged, has a newer format, or is not a bundle.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._lock = threading.Lock()
        try:
            self._file = open(self.path, "rb", buffering=0, opener=_open_without_waiting)  # noqa: SIM115
        except OSError as error:
            raise UnreadableError(f"`{self.path}` could not be read: {error}") from error
        try:
            about = os.fstat(self._file.fileno())
            if not stat.S_ISREG(about.st_mode):
                raise UnreadableError(f"`{self.path}` is no regular file.")
            self._length = about.st_size
            header_length, header_sum = self._read_prefix()
            self.info, self.leaves = self._read_header(header_length, header_sum)
            self._data_start = _aligned(_DATA_START + header_length)
            self._require_zeros((_DATA_START + header_length, self._data_start))
            self._sums = self._read_sums(self._check_places())
        except OSError as error:
            self.close()
            raise UnreadableError(f"`{self.path}` could not be read: {error}") from error
        except BaseException:
            self.close()
            raise

    def read(self, leaf: Leaf) -> np.ndarray[Any, Any]:
        """Returns an array in its own memory, aligned for XLA.

        Raises:
            UnreadableError: The checksum does not match.
        """
        # The header was checked: `size` agrees with shape and dtype, and is within the file.
        memory = np.empty(leaf.size + _ALIGNMENT, np.uint8)
        start = -memory.ctypes.data % _ALIGNMENT
        data = memory[start : start + leaf.size]
        self._stream(leaf, memoryview(data.data))
        return data.view(DTYPES[leaf.dtype]).reshape(leaf.shape)

    def verify(self) -> None:
        """Reads and checks everything, without keeping it.

        Raises:
            UnreadableError: A checksum does not match.
        """
        memory = memoryview(bytearray(_SLICE))
        for leaf in self.leaves:
            self._stream(leaf, memory)

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _stream(self, leaf: Leaf, into: memoryview) -> None:
        """Reads and checks a leaf. A buffer shorter than the leaf is refilled from its start."""
        hasher = xxhash.xxh3_64()
        done = 0
        while done < leaf.size:
            start = done % len(into)
            target = into[start : start + min(_SLICE, leaf.size - done)]
            count = self._read_into(target, self._data_start + leaf.offset + done)
            if not count:
                raise self._damaged(f"it became shorter while `{leaf.name}` was read")
            hasher.update(target[:count])
            done += count
        found, stored = hasher.intdigest(), self._sums[leaf.path]
        if found != stored:
            raise self._damaged(f"the checksum of `{leaf.name}` is {found:016x} where {stored:016x} was written")

    def _read_into(self, memory: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), [memory], offset)
        with self._lock:  # threads share the file position
            self._file.seek(offset)
            return self._file.readinto(memory) or 0

    def _read_prefix(self) -> tuple[int, int]:
        raw = self._read_at(0, _DATA_START)
        if raw[: len(MAGIC)] != MAGIC:
            raise UnreadableError(f"`{self.path}` is no checkpoint of this library.")
        if len(raw) < _DATA_START:
            raise self._damaged("it ends within its first bytes")
        if _SUM.unpack_from(raw, _PREFIX.size)[0] != _sum(raw[: _PREFIX.size]):
            raise self._damaged("its first bytes do not have the checksum that was written")
        _, major, minor, flags, header_length, data_start, length, header_sum, checksum = _PREFIX.unpack_from(raw)
        name = checksum.rstrip(b"\0").decode("ascii", "replace")
        if (major, flags, name) != (MAJOR, 0, CHECKSUM):
            raise UnreadableError(
                f"`{self.path}` has format version {major}.{minor} (flags {flags}, checksum {name!r}); this release "
                f"reads {MAJOR}.x with {CHECKSUM!r}. It was written by a newer release of nnx-trainer."
            )
        if length != self._length:
            raise self._damaged(f"it has {self._length} bytes where {length} were written")
        if header_length > _MAX_HEADER or data_start != _aligned(_DATA_START + header_length):
            raise self._damaged("its header is not where it should be")
        return header_length, header_sum

    def _read_header(self, length: int, expected_sum: int) -> tuple[dict[str, Any], tuple[Leaf, ...]]:
        raw = self._read_at(_DATA_START, length)
        if len(raw) != length or _sum(raw) != expected_sum:
            raise self._damaged("its header does not have the checksum that was written")
        try:
            header = unpack(raw, object_pairs_hook=_unique, ext_hook=_refuse_extension)
            info, records = _fields(header, info=dict, leaves=list)
            leaves = tuple(map(leaf_from_record, records))
        except (ValueError, TypeError, RecursionError, msgpack.exceptions.UnpackException) as error:
            raise self._damaged(f"its header cannot be understood: {error}") from error
        if len({leaf.path for leaf in leaves}) != len(leaves):
            raise self._damaged("its header has two arrays of one path")
        return info, leaves

    def _check_places(self) -> int:
        """Checks that the arrays fill the file without gaps or overlaps; returns where they end."""
        expected, data_length = _lay_out(self.leaves)
        if list(self.leaves) != expected:
            raise self._damaged("its arrays are not where they should be")
        end = self._data_start + data_length
        if end + _trailer_length(len(expected)) != self._length:
            raise self._damaged("its arrays do not fill it")
        gaps, position = [], self._data_start
        for leaf in expected:
            gaps.append((position, self._data_start + leaf.offset))
            position = self._data_start + leaf.offset + leaf.size
        self._require_zeros(*gaps, (position, end))
        return end

    def _read_sums(self, start: int) -> dict[LeafPath, int]:
        raw = self._read_at(start, _trailer_length(len(self.leaves)))
        table, table_sum, end = raw[: -_SUM.size - len(END)], raw[-_SUM.size - len(END) : -len(END)], raw[-len(END) :]
        if end != END or _SUM.unpack(table_sum)[0] != _sum(table):
            raise self._damaged("its last bytes are not those that were written")
        return {leaf.path: value for leaf, (value,) in zip(self.leaves, _SUM.iter_unpack(table), strict=True)}

    def _require_zeros(self, *gaps: tuple[int, int]) -> None:
        """Checks that the bytes between arrays are zero. Gaps are ascending and shorter than `_ALIGNMENT`."""
        window_start, window = 0, b""
        for start, end in gaps:
            if end > window_start + len(window) and end > start:
                # Small arrays are close together, so one read covers the gaps between many of them.
                window_start, window = start, self._read_at(start, _WINDOW)
            if any(window[start - window_start : end - window_start]):
                raise self._damaged("there are bytes between its arrays")

    def _read_at(self, offset: int, length: int) -> bytes:
        self._file.seek(offset)
        pieces = []
        while length and (piece := self._file.read(length)):
            pieces.append(piece)
            length -= len(piece)
        return b"".join(pieces)

    def _damaged(self, how: str) -> UnreadableError:
        return UnreadableError(f"`{self.path}` is damaged: {how}.")


def _open_without_waiting(path: str, flags: int) -> int:
    # Otherwise, opening a named pipe would block until it has a writer.
    return os.open(path, flags | getattr(os, "O_NONBLOCK", 0))


def _lay_out(leaves: Sequence[Leaf]) -> tuple[list[Leaf], int]:
    """Returns the leaves with their offsets, and the length of the data; Python's integers cannot overflow."""
    placed, position = [], 0
    for leaf in leaves:
        size = leaf.bytes
        placed.append(Leaf(leaf.path, leaf.dtype, leaf.shape, leaf.key, position, size))
        position = _aligned(position + size)
    return placed, position


def leaf_to_record(leaf: Leaf) -> dict[str, Any]:
    """Returns the description of a leaf as plain values."""
    # Spelled out: `dataclasses.asdict` takes 30 times as long, most of the time of a small save.
    return {
        "path": list(leaf.path),
        "dtype": leaf.dtype,
        "shape": list(leaf.shape),
        "key": leaf.key,
        "offset": leaf.offset,
        "size": leaf.size,
    }


def leaf_from_record(record: Any) -> Leaf:
    """Rebuilds the `Leaf` that `leaf_to_record` described.

    Raises:
        ValueError: The record is invalid.
    """
    path, dtype, shape, key, offset, size = _fields(
        record, path=list, dtype=str, shape=list, key=str | None, offset=int, size=int
    )
    if not path or any(type(part) not in (str, int) for part in path):
        raise ValueError(f"{reprlib.repr(path)} is no path")
    if len(path) > _MAX_PARTS:
        raise ValueError(f"{reprlib.repr(path)} has {len(path)} parts, more than {_MAX_PARTS}")
    if dtype not in DTYPES:
        raise ValueError(f"{reprlib.repr(dtype)} is no dtype")
    if len(shape) > _MAX_DIMENSIONS or any(type(length) is not int or length < 0 for length in shape):
        raise ValueError(f"{reprlib.repr(shape)} is no shape")
    return Leaf(tuple(path), dtype, tuple(shape), key, offset, size)


def _fields(record: Any, **kinds: Any) -> list[Any]:
    """Returns the values of a mapping with exactly these keys and types."""
    if not isinstance(record, dict) or record.keys() != kinds.keys():
        raise ValueError(f"it lacks one of {', '.join(kinds)}, or has more")
    for name, kind in kinds.items():
        if not isinstance(record[name], kind) or isinstance(record[name], bool):
            raise ValueError(f"`{name}` is of type {type(record[name]).__name__}")
    return [record[name] for name in kinds]


def _unique(pairs: list[tuple[Any, Any]]) -> dict[Any, Any]:
    mapping = dict(pairs)
    if len(mapping) != len(pairs):
        raise ValueError("a mapping has one key twice")
    return mapping


def _refuse_extension(code: int, data: bytes) -> Any:
    del data
    raise ValueError(f"an extension type {code}")


def _pieces(array: np.ndarray[Any, Any], leaf: Leaf) -> Iterator[memoryview]:
    """Yields the bytes of an array in C order, little-endian, a few MiB at a time."""
    contiguous = np.ascontiguousarray(array, DTYPES[leaf.dtype]).reshape(-1).view(np.uint8)
    if contiguous.size != leaf.size:
        raise ValueError(f"`{leaf.name}` has {contiguous.size} bytes where {leaf.size} were announced")
    data = memoryview(contiguous.data)
    for start in range(0, leaf.size, _SLICE):
        yield data[start : start + _SLICE]


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT


def _trailer_length(count: int) -> int:
    return (count + 1) * _SUM.size + len(END)


def _sum(data: bytes) -> int:
    return xxhash.xxh3_64_intdigest(data)
