"""Files that are there as a whole or not at all, also after a power failure.

The bytes go to a temporary file in the same directory, whose space is reserved first; they are
flushed to the disk, the file takes the name, and the directory is flushed. At every instant the
name refers to the old contents or to the new ones.
"""

import contextlib
import errno
import os
import re
import secrets
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Windows has no advisory locks, so debris stays there until somebody removes it.
if sys.platform != "win32":
    import fcntl

_DEBRIS = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
_SLICE = 16 * 2**20  # Linux writes at most 2 GiB in a call, and a signal is noticed between two


@contextlib.contextmanager
def replacing(path: Path, size: int) -> Iterator["Writer"]:
    """Opens a file that takes the name ``path`` when the block ends, and vanishes if it raises.

    A symbolic link stays and what it refers to is replaced. What earlier writers of this directory
    left behind when they were killed is removed.

    Args:
        path: The name.
        size: How many bytes will be written. They are reserved now, so that a full disk is found out
            before a byte is written.

    Raises:
        OSError: Something failed; the name still refers to what it did before.
    """
    path = Path(os.path.realpath(path))
    sweep(path.parent)
    descriptor, temporary = _create(path)
    try:
        _reserve(descriptor, size)
        yield Writer(descriptor)
        os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        # Open until now, for its lock; and after the flush there is nothing that closing could lose.
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _flush_directory(path.parent)


class Writer:
    """Writes bytes to a descriptor until all are written."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def write(self, data: Any) -> None:
        """Writes a buffer of bytes."""
        view = memoryview(data)
        while len(view):
            view = view[os.write(self._descriptor, view[:_SLICE]) :]


def sweep(directory: Path) -> None:
    """Removes temporary files that no living process is writing."""
    if sys.platform == "win32":
        return
    for name in os.listdir(directory):
        if not _DEBRIS.fullmatch(name):
            continue
        # Somebody else may sweep as well, or finish; then there is nothing left to do.
        with contextlib.suppress(OSError):
            descriptor = os.open(directory / name, os.O_WRONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.unlink(directory / name)
            finally:
                os.close(descriptor)


def _create(path: Path) -> tuple[int, Path]:
    """Makes a temporary file and holds its lock for as long as it is open."""
    while True:
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
        if sys.platform == "win32":
            return descriptor, temporary
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A sweep may have come between the two calls and taken the file for debris.
            if os.fstat(descriptor).st_nlink:
                return descriptor, temporary
        os.close(descriptor)


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            # Some file systems cannot reserve; then a full disk is found out while writing.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


def _flush_directory(directory: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open one
        return
    try:
        descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # The new file is in place; an error would say that it is not.
        warnings.warn(
            f"`{directory}` could not be flushed to the disk ({error}); the file in it is written, but "
            f"may be lost in a power failure.",
            RuntimeWarning,
            stacklevel=4,
        )
