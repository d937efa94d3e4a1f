"""Files and directories that are there as a whole or not at all, also after a power failure.

The bytes go to a temporary file in the same directory, whose space is reserved first; they are
flushed to the disk, the file takes the name, and the directory is flushed. At every instant the
name refers to the old contents or to the new ones. A directory is made beside its name likewise.
"""

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Windows has no advisory locks, so debris stays there until somebody removes it.
if sys.platform != "win32":
    import fcntl

_DEBRIS = re.compile(r"\..+\.[0-9a-f]{16}\.tmp")
_LOCK = ".lock"
_ASIDE, _GOING = ".old", ".gone"
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


class NewDirectory:
    """A directory in the making, which takes the name ``path`` when all that is in it is written.

    What earlier makers left behind in the directory above when they were killed is removed.

    Args:
        path: The name. What it refers to stays until `commit`.

    Attributes:
        temporary: Where to write.

    Raises:
        OSError: It cannot be made.
    """

    def __init__(self, path: Path) -> None:
        self._path = Path(os.path.realpath(path))
        sweep(self._path.parent)
        self._lock: int | None
        self._lock, self.temporary = _create_directory(self._path)

    def commit(self) -> None:
        """Flushes everything to the disk and gives it the name; what had the name before is removed.

        Raises:
            OSError: Something failed; the name still refers to what it did before.
        """
        for directory, _, names in os.walk(self.temporary):
            for name in names:
                _flush(Path(directory) / name)
            _flush(Path(directory))
        replaced = _give_name(self.temporary, self._path)
        self._unlock()
        _flush_directory(self._path.parent)
        if replaced is not None:
            # An error would say that the new one is not there; the next sweep tries again.
            with contextlib.suppress(OSError):
                remove_directory(replaced)

    def discard(self) -> None:
        """Removes what was written, if it has not got its name."""
        self._unlock()
        with contextlib.suppress(OSError):
            remove_directory(self.temporary)

    def _unlock(self) -> None:
        # The file stays in the directory, so that a sweep knows it again when it is replaced some day.
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def remove_directory(path: Path) -> None:
    """Removes a directory, which is there as a whole or not at all under its name; it may be gone already."""
    going = Path(f"{_temporary(path)}{_GOING}")
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, going)
        _remove(going)


def sweep(directory: Path) -> None:
    """Removes temporary files and directories that no living process is writing."""
    if sys.platform == "win32":
        return
    for name in os.listdir(directory):
        # Where names cannot be exchanged, a process was killed between taking the old one away and giving it anew.
        if name.endswith(_ASIDE) and _DEBRIS.fullmatch(name.removesuffix(_ASIDE)):
            original = directory / name[1:].removesuffix(_ASIDE).rsplit(".", 2)[0]
            with contextlib.suppress(OSError):
                os.rename(directory / name, original) if not original.exists() else _remove(directory / name)
        elif name.endswith(_GOING) and _DEBRIS.fullmatch(name.removesuffix(_GOING)):
            _remove(directory / name)
        if not _DEBRIS.fullmatch(name):
            continue
        # Somebody else may sweep as well, or finish; then there is nothing left to do.
        with contextlib.suppress(OSError):
            whole = directory / name
            if whole.is_dir() and not (whole / _LOCK).exists():
                os.rmdir(whole)  # nothing is in it, or it is in use by now
                continue
            descriptor = os.open(whole / _LOCK if whole.is_dir() else whole, os.O_WRONLY)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(whole)
            finally:
                os.close(descriptor)


def _create(path: Path) -> tuple[int, Path]:
    """Makes a temporary file and holds its lock for as long as it is open."""
    while True:
        temporary = _temporary(path)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o666)
        if sys.platform == "win32":
            return descriptor, temporary
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # A sweep may have come between the two calls and taken the file for debris.
            if os.fstat(descriptor).st_nlink:
                return descriptor, temporary
        os.close(descriptor)


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")


def _create_directory(path: Path) -> tuple[int, Path]:
    """Makes a temporary directory and holds the lock of a file in it until it has its name."""
    while True:
        temporary = _temporary(path)
        temporary.mkdir()
        # A sweep may have come between the calls and taken the directory for debris.
        with contextlib.suppress(OSError):
            descriptor = os.open(temporary / _LOCK, os.O_WRONLY | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o666)
            if sys.platform == "win32":
                return descriptor, temporary
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.fstat(descriptor).st_nlink:
                return descriptor, temporary
            os.close(descriptor)


def _give_name(temporary: Path, path: Path) -> Path | None:
    """Renames, and returns where that is now which had the name before, if anything had."""
    if not path.exists():
        os.rename(temporary, path)
        return None
    if _exchange_names(temporary, path):
        return temporary
    aside = Path(f"{_temporary(path)}{_ASIDE}")
    os.rename(path, aside)
    try:
        os.rename(temporary, path)
    except OSError:
        os.rename(aside, path)
        raise
    return aside


def _exchange_names(one: Path, other: Path) -> bool:
    """Exchanges two names in one instant, where the system and the file system can."""
    exchange, here = 2, -100  # RENAME_EXCHANGE, AT_FDCWD
    rename = getattr(ctypes.CDLL(None), "renameat2", None) if sys.platform == "linux" else None
    return rename is not None and rename(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):  # Windows cannot open one
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
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
