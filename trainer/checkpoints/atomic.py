"""Atomic writes: a path exists only once its contents are complete, even after a power failure.

A file is written under a temporary name in the same directory, flushed to disk, and renamed; then the directory is
flushed. A directory is written and renamed in the same way. The writer holds an ``flock`` on the temporary, so that
the next writer in that directory can recognize and remove what a killed process left behind.

Replacing a directory takes two renames, between which its path is missing. An exchange of two names in one call
(``renameat2``) is not portable, and Python does not offer it; refusing to replace is no way out, since a resumed run
saves a step again.
"""

import contextlib
import errno
import os
import re
import secrets
import shutil
import stat
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from trainer.errors import warn

# Windows has no `flock`, so temporaries of killed writers stay there.
if sys.platform != "win32":
    import fcntl

_TEMPORARY = re.compile(r"\.(.+)\.[0-9a-f]{16}\.nnx-trainer\.(tmp|old)")
"""Names that only this module uses: ``.tmp`` is unfinished or to be deleted, ``.old`` is being replaced."""

_LOCK = ".lock"
"""A lock on this file is the lock of its directory. The file is created first and never removed."""

_LOCK_SECONDS = 0.5

_doomed = threading.local()
"""What this thread has to remove once it has released the lock of a directory: ``paths``, while it is `locked`."""

_SLICE = 16 * 2**20  # Linux writes at most 2 GiB per call, and Python handles signals between calls


@contextlib.contextmanager
def replacing(
    path: Path, size: int, *, durable: bool = True, claim: Callable[[], None] | None = None
) -> Iterator["Writer"]:
    """Opens a temporary file that is renamed to ``path`` when the block ends, or removed if the block raises.

    If ``path`` is a symbolic link, its target is replaced. A replaced file passes its permissions on to the new one.
    Temporaries of killed writers in the same directory are removed.

    Args:
        path: The final path.
        size: Number of bytes to write. The space is reserved first, so that a full disk raises before any write.
        durable: Whether the file must survive a power failure. This takes a flush to disk: milliseconds.
        claim: Called right before the rename, with the directory `locked`: it may move aside what has the name.

    Raises:
        OSError: A system call failed; ``path`` is unchanged.
    """
    path = Path(os.path.realpath(path))
    sweep(path.parent)
    mode = _mode_of(path)
    # The replacement of a private file must not be readable by others while it is being written.
    descriptor, temporary = _create_file(path, 0o666 if mode is None else 0o600)
    try:
        _reserve(descriptor, size)
        yield Writer(descriptor, temporary)
        if durable:
            os.fsync(descriptor)
        if mode is not None:
            os.chmod(temporary, mode)
        with _claimed(path, claim):
            os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    finally:
        # The descriptor holds the lock, so it is closed last. After fsync, an error on close loses nothing.
        with contextlib.suppress(OSError):
            os.close(descriptor)
    if durable:
        _flush_parent(path.parent)


class Writer:
    """Writes whole buffers to a file descriptor, in as many calls as needed.

    Attributes:
        path: The temporary file.
    """

    def __init__(self, descriptor: int, path: Path) -> None:
        self._descriptor = descriptor
        self.path = path

    def write(self, data: Any) -> None:
        """Writes a bytes-like object."""
        view = memoryview(data)
        while len(view):
            view = view[os.write(self._descriptor, view[:_SLICE]) :]


class NewDirectory:
    """A temporary directory that `commit` renames to ``path``. It takes on the permissions of a directory it replaces.

    Temporaries of killed writers in the same parent directory are removed.

    Args:
        path: The final path. A directory that is already there stays until `commit`.
        claim: As for `replacing`.

    Attributes:
        temporary: The directory to write into.

    Raises:
        OSError: The directory cannot be created.
    """

    def __init__(self, path: Path, claim: Callable[[], None] | None = None) -> None:
        self._path, self._claim = Path(os.path.realpath(path)), claim
        sweep(self._path.parent)
        self._lock: int | None
        self._lock, self.temporary = _create_directory(self._path)

    def commit(self) -> None:
        """Flushes all files to disk and renames the directory, replacing any directory at ``path``.

        Raises:
            OSError: A system call failed; ``path`` is unchanged.
        """
        for directory, _, names in os.walk(self.temporary):
            for name in names:
                _flush(Path(directory) / name)
            _flush(Path(directory))
        with _claimed(self._path, self._claim):
            if self._path.exists():
                self._replace()
            else:
                os.rename(self.temporary, self._path)
        self._unlock()
        _flush_parent(self._path.parent)

    def discard(self) -> None:
        """Removes the temporary directory if it was not committed."""
        self._unlock()
        _remove(self.temporary)

    def _replace(self) -> None:
        # No portable call replaces a non-empty directory, so the old one is renamed first. If the process is killed
        # between the two renames, both are complete, the path is missing, and the next sweep restores the old one.
        # The lock keeps sweeps from doing so while this process is alive.
        os.chmod(self.temporary, stat.S_IMODE(os.stat(self._path).st_mode))
        with _held(self._path / _LOCK):
            while True:
                aside = _temporary_name(self._path, "old")
                os.rename(self._path, aside)
                try:
                    os.rename(self.temporary, self._path)
                except OSError:
                    # Without locks, a reader may have assumed that this process was killed and restored the old one.
                    if not aside.exists():
                        continue
                    os.rename(aside, self._path)
                    raise
                break
            # The new directory is in place, so failing to remove the old one is not an error. The next sweep retries.
            with contextlib.suppress(OSError):
                remove(aside)  # which no sweep restores from then on, whatever becomes of the new one

    def _unlock(self) -> None:
        # The lock file stays: replacing this directory needs its lock again.
        if self._lock is not None:
            with contextlib.suppress(OSError):  # nothing was written through it
                os.close(self._lock)
            self._lock = None


@contextlib.contextmanager
def locked(directory: Path) -> Iterator[None]:
    """Locks a directory against other processes that do the same, for changes that take milliseconds.

    Continues without the lock if it is not free within half a second, or the file system has no locks. What the block
    removes with `remove` is only renamed in the block: the contents of a large checkpoint go once the lock is released.

    Raises:
        OSError: The directory cannot be opened.
    """
    if sys.platform == "win32":
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    before, _doomed.paths = getattr(_doomed, "paths", None), []
    try:
        end = time.monotonic() + _LOCK_SECONDS
        while time.monotonic() < end:
            try:
                _lock(descriptor)
            except BlockingIOError:
                time.sleep(0.01)
            else:
                break
        yield
    finally:
        paths, _doomed.paths = _doomed.paths, before
        with contextlib.suppress(OSError):
            os.close(descriptor)
        for path in paths:
            _remove_unlocked(path)


def remove(path: Path) -> None:
    """Removes a file or directory atomically: its path is either complete or absent. It may already be absent."""
    removed = _temporary_name(path)
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, removed)
        _remove_unlocked(removed)


def _remove_unlocked(path: Path) -> None:
    """Removes a temporary, after the end of the `locked` block if this thread is in one."""
    paths = getattr(_doomed, "paths", None)
    if paths is None:
        _remove(path)
    else:
        paths.append(path)


def sweep(directory: Path) -> None:
    """Removes temporaries of killed writers, and restores directories that they were about to replace.

    Without file locks, a live writer cannot be told from a killed one, so nothing is removed. Directories are still
    restored: if their writer is alive, it moves them aside again.
    """
    _reclaim_all(directory, ("tmp", "old"))


def restore(directory: Path) -> None:
    """Restores directories that killed writers were about to replace, and removes nothing."""
    _reclaim_all(directory, ("old",))


def _reclaim_all(directory: Path, kinds: tuple[str, ...]) -> None:
    names: list[str] = []
    with contextlib.suppress(OSError):  # no such directory, or a shared one that is writable but not readable
        names = os.listdir(directory) if sys.platform != "win32" else []
    for name in names:
        match = _TEMPORARY.fullmatch(name)
        if match and match[2] in kinds:
            # Another process may sweep or finish its write at the same time; then there is nothing left to do.
            with contextlib.suppress(OSError):
                _reclaim(directory / name, directory / match[1] if match[2] == "old" else None)


def _reclaim(temporary: Path, original: Path | None) -> None:
    """Removes a temporary that no live process has locked, or restores its original name if that is free.

    Raises:
        OSError: A live process has locked it, or it cannot be locked or removed.
    """
    if not stat.S_ISDIR(os.lstat(temporary).st_mode) and not _is_file(temporary):
        return  # not made by this module
    lock = temporary / _LOCK if temporary.is_dir() else temporary
    if temporary.is_dir() and not _is_file(lock):
        try:
            os.rmdir(temporary)
        except OSError:
            # Writers create the lock first, so a directory with files but no lock is a partial removal.
            if not os.path.lexists(lock):
                _remove(temporary)
        return
    descriptor = os.open(lock, os.O_WRONLY)  # for writing: NFS grants no exclusive lock otherwise
    try:
        has_lock = _lock(descriptor)
        if original is not None and not original.exists():
            os.rename(temporary, original)
        elif has_lock or original is not None:  # its replacement is in place
            _remove(temporary)
    finally:
        os.close(descriptor)


def _create_file(path: Path, mode: int) -> tuple[int, Path]:
    """Creates a temporary file, locked until its descriptor is closed."""
    while True:
        temporary = _temporary_name(path)
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
        if _lock_new(descriptor):
            return descriptor, temporary
        os.close(descriptor)
        temporary.unlink(missing_ok=True)


def _create_directory(path: Path) -> tuple[int, Path]:
    """Creates a temporary directory, locked until the descriptor of its lock file is closed."""
    while True:
        temporary = _temporary_name(path)
        temporary.mkdir()
        try:
            descriptor = os.open(temporary / _LOCK, os.O_WRONLY | os.O_CREAT, 0o666)
        except FileNotFoundError:  # a sweep removed the empty directory
            continue
        except OSError:
            _remove(temporary)
            raise
        if _lock_new(descriptor):
            return descriptor, temporary
        os.close(descriptor)
        _remove(temporary)


def _lock_new(descriptor: int) -> bool:
    """Locks a newly created file; returns False if a sweep meanwhile mistook it for one of a killed writer."""
    if sys.platform == "win32":
        return True
    try:
        has_lock = _lock(descriptor)
    except BlockingIOError:  # a sweep holds the lock and is about to remove the file
        return False
    return not has_lock or os.fstat(descriptor).st_nlink > 0


def _lock(descriptor: int) -> bool:
    """Locks an open file; returns False if the file system has no locks (ENOSYS, ENOLCK, 524 on Cray DVS, …).

    Raises:
        BlockingIOError: Another process has locked it.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True


@contextlib.contextmanager
def _held(lock: Path) -> Iterator[None]:
    """Holds a lock during the block, if the lock file exists and the file system has locks."""
    descriptor = None
    with contextlib.suppress(OSError):
        descriptor = os.open(lock, os.O_WRONLY)
        _lock_new(descriptor)
    try:
        yield
    finally:
        if descriptor is not None:
            with contextlib.suppress(OSError):
                os.close(descriptor)


@contextlib.contextmanager
def _claimed(path: Path, claim: Callable[[], None] | None) -> Iterator[None]:
    """Calls ``claim``, if any, and holds the lock of the directory from then to the end of the block."""
    with contextlib.nullcontext() if claim is None else locked(path.parent):
        if claim is not None:
            claim()
        yield


def _temporary_name(path: Path, kind: str = "tmp") -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(8)}.nnx-trainer.{kind}")


def _mode_of(path: Path) -> int | None:
    try:
        return stat.S_IMODE(os.stat(path).st_mode)
    except OSError:
        return None


def _is_file(path: Path) -> bool:
    """Tells whether a regular file exists. Opening anything else may block or have side effects."""
    try:
        return stat.S_ISREG(os.lstat(path).st_mode)
    except OSError:
        return False


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        with contextlib.suppress(OSError):  # `ignore_errors` does not cover closing a directory
            shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):  # Windows cannot open a directory
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _flush_parent(directory: Path) -> None:
    try:
        _flush(directory)
    except OSError as error:
        # The new file is in place, so raising would be wrong.
        warn(
            f"`{directory}` could not be flushed to the disk ({error}); the file in it is written, but "
            f"may be lost in a power failure.",
            RuntimeWarning,
        )


def _reserve(descriptor: int, size: int) -> None:
    if hasattr(os, "posix_fallocate") and size:
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            # Some file systems cannot reserve space. There, a full disk raises during the write.
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise
