"""The checkpoints of a directory: which there are, whose they are, and which of them a process may remove.

Only default names count, ``checkpoint_<step>.msgpack`` of a file and ``checkpoint_<step>.orbax`` of a directory. The
header of each tells its run and the time it was written; the step in a name says neither.
"""

import contextlib
import datetime
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from trainer.checkpoints.atomic import remove_directory, restore
from trainer.checkpoints.file_format import END, MAGIC, Bundle
from trainer.errors import CheckpointError

if TYPE_CHECKING:
    from trainer.checkpoints.orbax_directory import OrbaxDirectory

_OWN_NAME = re.compile(r"checkpoint_(0|[1-9]\d*)\.(msgpack|orbax)")


class Entry(NamedTuple):
    """A checkpoint: its name, the step in it, the id of its run (None where it has none), and when it was written."""

    name: str
    step: int
    run: str | None
    time: float


def names_in(directory: Path) -> dict[str, int]:
    """Returns the default names in a directory, and the steps in them, in the order of steps. Opens nothing."""
    if not directory.is_dir():
        return {}
    restore(directory)  # a save that was killed while it replaced the latest must not hide it
    matches = filter(None, map(_OWN_NAME.fullmatch, os.listdir(directory)))
    ordered = sorted(matches, key=lambda match: (int(match[1]), match[2]))
    return {match[0]: int(match[1]) for match in ordered if _is_of_its_kind(directory / match[0])}


def entries_in(directory: Path) -> list[Entry]:
    """Returns the checkpoints of a directory; the latest is the last.

    That is the one written last of the run that has written last. Those without a run count as one run, and so do
    unreadable ones, by the time of modification; both are in the order of their steps.
    """
    entries: list[Entry] = []
    groups: dict[Entry, str | None] = {}
    for name, step in names_in(directory).items():
        run, time, is_readable = _run_and_time(directory / name)
        entry = Entry(name, step, run, time)
        groups[entry] = run if is_readable else ""
        entries.append(entry)
    latest: dict[str | None, float] = {}
    for entry in entries:
        latest[groups[entry]] = max(entry.time, latest.get(groups[entry], entry.time))

    def order(entry: Entry) -> tuple[Any, ...]:
        group = groups[entry]
        return latest[group], str(group), entry.time if group else 0.0, entry.step, entry.name

    return sorted(entries, key=order)


class Written:
    """The checkpoints with default names that a run has in a directory, in the order in which they were written.

    What this process wrote is remembered, so that a save opens no file. The first time that a run is named, the
    headers in the directory tell what it wrote before, in other processes.

    Args:
        directory: The directory.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._found: dict[str, tuple[int, int] | None] = {}
        self._runs: set[str] = set()

    def add(self, name: str, run: str) -> None:
        """Counts a checkpoint that a run has just written."""
        if run not in self._runs:
            self._runs.add(run)
            earlier = [entry.name for entry in entries_in(self._directory) if entry.run == run]
            self._found = {known: self._identity(known) for known in earlier} | self._found
        self._found.pop(name, None)
        self._found[name] = self._identity(name)

    def prune(self, keep: int) -> None:
        """Removes all but the ``keep`` that were written last, and nothing that another run has replaced since.

        Directories of Orbax belong to all processes, and process 0 alone removes them, each as a whole.
        """
        for name in list(self._found)[:-keep]:
            is_same = self.holds(name)
            del self._found[name]
            if not is_same:
                continue
            if name.endswith(".msgpack"):
                (self._directory / name).unlink(missing_ok=True)
            elif jax.process_index() == 0:
                remove_directory(self._directory / name)

    def holds(self, name: str) -> bool:
        """Tells whether what has the name now is what was counted under it."""
        known = self._found.get(name)
        return known is not None and known == self._identity(name)

    def _identity(self, name: str) -> tuple[int, int] | None:
        try:
            status = os.stat(self._directory / name)
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns


def run_of(path: Path) -> str | None:
    """Returns the id of the run that wrote a checkpoint, None if that cannot be told.

    Raises:
        CheckpointError: It is something else under the name of a checkpoint, and not to be replaced.
    """
    if not _is_of_its_kind(path) or _is_foreign(path):
        raise CheckpointError(
            f"`{path}` was not written by this library, and is not replaced; use another directory, or move it away."
        )
    return _run_and_time(path)[0]


def info_of(path: Path) -> Mapping[str, Any]:
    """Returns the plain values about the state in a checkpoint with a default name.

    Raises:
        UnreadableError: It cannot be read.
    """
    with open_named(path) as source:
        return source.info


def open_named(path: Path) -> "Bundle | OrbaxDirectory":
    """Opens a checkpoint with a default name, whose ending tells the format.

    Raises:
        UnreadableError: It cannot be read.
    """
    if path.suffix != ".orbax":
        return Bundle(path)
    from trainer.checkpoints.orbax_directory import OrbaxDirectory  # here, since few runs need it

    return OrbaxDirectory(path)


def _run_and_time(path: Path) -> tuple[str | None, float, bool]:
    """Returns run and time of a checkpoint, and whether its header can be read."""
    try:
        info = info_of(path)
    except CheckpointError:
        return None, _modified(path), False
    run, time = info.get("run"), info.get("time")
    written = None
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        written = datetime.datetime.fromisoformat(time).timestamp() if isinstance(time, str) else None
    return run if isinstance(run, str) else None, _modified(path) if written is None else written, True


def _modified(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _is_of_its_kind(path: Path) -> bool:
    return path.is_dir() if path.suffix == ".orbax" else path.is_file()


def _is_foreign(path: Path) -> bool:
    """Tells something else from a checkpoint that is damaged."""
    if path.suffix == ".orbax":
        names = set(os.listdir(path))
        return bool(names) and not names & {"about", "state"}
    with path.open("rb") as file:
        begin = file.read(len(MAGIC))
        file.seek(-min(len(END), path.stat().st_size), os.SEEK_END)
        return begin != MAGIC and bool(begin.strip(b"\0")) and file.read() != END
