"""Checks of an Orbax directory before its arrays are read.

Orbax and TensorStore trust the metadata they find: a named pipe in place of a file blocks them, and a chunk of 2⁴⁰
entries aborts the process, since the allocation fails in a C++ thread. These checks run first.
"""

import json
import os
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

_MANIFEST = struct.Struct(">I")
_MANIFEST_MAGIC = 0x0CDB3A2A
_LENGTH = struct.Struct("<Q")
_MAX_MANIFEST = 16 * 2**20

# For each array, Orbax describes its path in up to eight times the bytes of our description.
_TREE = "_METADATA"
_MAX_TREE_RATIO, _MIN_TREE = 16, 64 * 2**10

# Zstandard stores 128 KiB of equal bytes in 4, its best ratio.
_MAX_RATIO = 2**15


def check_files(directory: Path, described: int = 0) -> int:
    """Checks that a directory contains only files and directories, and that manifests have their stated length.

    Args:
        directory: The directory.
        described: The size of our description of its arrays in bytes. Orbax parses its own, in up to 30 times the bytes
            in memory, so that must be in proportion.

    Returns:
        The total size of all files in bytes.

    Raises:
        ValueError: A check failed.
        OSError: A file or directory cannot be accessed.
    """
    size = 0
    for parent, _, names in os.walk(directory, onerror=_raise):
        for name in names:
            path = Path(parent) / name
            about = os.stat(path)
            if not stat.S_ISREG(about.st_mode):
                raise ValueError(f"`{path.relative_to(directory)}` is no regular file")
            if name == "manifest.ocdbt":
                _check_manifest(path, about.st_size)
            if name == _TREE and about.st_size > max(_MIN_TREE, _MAX_TREE_RATIO * described):
                raise ValueError(f"`{name}` has {about.st_size} bytes, more than its arrays can need")
            size += about.st_size
    return size


def check_stored(directory: Path, wanted: Mapping[str, tuple[tuple[int, ...], np.dtype[Any]]], size: int) -> None:
    """Checks the stored metadata of the arrays in a directory.

    Args:
        directory: The directory of the arrays.
        wanted: The shape and dtype of each array, by its name in Orbax.
        size: The total size of its files in bytes.

    Raises:
        ValueError: The stored shape or dtype of an array differs, its chunks are impossible, or it exceeds the files.
        Exception: Whatever TensorStore raises if it cannot read the directory.
    """
    import tensorstore

    total = sum(int(np.prod(shape, dtype=object)) * dtype.itemsize for shape, dtype in wanted.values())
    if total > _MAX_RATIO * size:
        raise ValueError(f"its files of {size} bytes cannot hold arrays of {total} bytes")
    base = {"driver": "file", "path": f"{directory}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    found = {name: store.read(f"{name}/.zarray") for name in wanted}  # all reads in flight at once
    for name, (shape, dtype) in wanted.items():
        stored = json.loads(found[name].result().value)
        if not isinstance(stored, dict):
            raise ValueError(f"`{name}` is described by no mapping")
        chunks = stored.get("chunks")
        if stored.get("shape") != list(shape) or _itemsize(stored.get("dtype")) != dtype.itemsize:
            raise ValueError(f"`{name}` is stored as {str(stored)[:200]}, not as {dtype}{shape}")
        if not isinstance(chunks, list) or len(chunks) != len(shape):
            raise ValueError(f"`{name}` has chunks {str(chunks)[:100]}")
        for chunk, length in zip(chunks, shape, strict=True):
            if type(chunk) is not int or not 1 <= chunk <= length:
                raise ValueError(f"`{name}` has chunks {str(chunks)[:100]} in an array of shape {shape}")


def _check_manifest(path: Path, size: int) -> None:
    """Checks the header of a manifest: 4 bytes of magic, big-endian, then its length in 8, little-endian."""
    with path.open("rb") as file:
        head = file.read(_MANIFEST.size + _LENGTH.size)
    if len(head) < _MANIFEST.size + _LENGTH.size or _MANIFEST.unpack_from(head)[0] != _MANIFEST_MAGIC:
        raise ValueError(f"`{path.name}` is no manifest")
    if size > _MAX_MANIFEST or _LENGTH.unpack_from(head, _MANIFEST.size)[0] != size:
        raise ValueError(f"`{path.name}` has {size} bytes, which is not what it says")


def _itemsize(dtype: Any) -> int | None:
    if dtype == "bfloat16":
        return 2
    try:
        return np.dtype(dtype).itemsize if isinstance(dtype, str) and len(dtype) <= 16 else None
    except TypeError:
        return None


def _raise(error: OSError) -> None:
    raise error
