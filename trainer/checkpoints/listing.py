"""The checkpoints in a directory: which exist, which run wrote each, and which a process may remove.

Only default names count: ``checkpoint_<step>.msgpack`` for a file and ``checkpoint_<step>.orbax`` for a directory. The
run and the time of writing come from each header; the step in the name tells neither.
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
    """A checkpoint: its name, its step, the id of its run (None if it has none), and when it was written."""

    name: str
    step: int
    run: str | None
    time: float


def names_in(directory: Path) -> dict[str, int]:
    """Returns the default names in a directory with their steps, sorted by step. Opens no file."""
    if not directory.is_dir():
        return {}
    restore(directory)  # otherwise, a save killed while replacing the latest checkpoint would hide it
    matches = filter(None, map(_OWN_NAME.fullmatch, os.listdir(directory)))
    ordered = sorted(matches, key=lambda match: (int(match[1]), match[2]))
    return {match[0]: int(match[1]) for match in ordered if _is_of_its_kind(directory / match[0])}


def entries_in(directory: Path) -> list[Entry]:
    """Returns the checkpoints in a directory; the latest is the last.

    The latest is the last one written by the run that wrote last. Checkpoints without a run count as one run, and so
    do unreadable ones, dated by modification time; within both, the order is by step.
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
    """The checkpoints with default names that a run has in a directory, in the order they were written.

    Remembers what this process wrote, so that a save opens no file. The first time a run is named, the headers in the
    directory tell which checkpoints it wrote before, in other processes.

    Args:
        directory: The directory.
    """

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._found: dict[str, tuple[int, int] | None] = {}
        self._runs: set[str] = set()

    def add(self, name: str, run: str) -> None:
        """Records a checkpoint that a run has just written."""
        if run not in self._runs:
            self._runs.add(run)
            earlier = [entry.name for entry in entries_in(self._directory) if entry.run == run]
            self._found = {known: self._identity(known) for known in earlier} | self._found
        self._found.pop(name, None)
        self._found[name] = self._identity(name)

    def prune(self, keep: int) -> None:
        """Removes all but the last ``keep`` written, sparing any that another run has replaced since.

        Orbax directories belong to all processes; only process 0 removes them, atomically.
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
        """Tells whether the file with this name is still the one that was recorded."""
        known = self._found.get(name)
        return known is not None and known == self._identity(name)

    def _identity(self, name: str) -> tuple[int, int] | None:
        try:
            status = os.stat(self._directory / name)
        except OSError:
            return None
        return status.st_ino, status.st_mtime_ns


def run_of(path: Path) -> str | None:
    """Returns the id of the run that wrote a checkpoint, or None if it is unknown.

    Raises:
        CheckpointError: It is not a checkpoint despite its name, and must not be replaced.
    """
    if not _is_of_its_kind(path) or _is_foreign(path):
        raise CheckpointError(
            f"`{path}` was not written by this library, and is not replaced; use another directory, or move it away."
        )
    return _run_and_time(path)[0]


def info_of(path: Path) -> Mapping[str, Any]:
    """Returns the plain values stored about the state in a checkpoint with a default name.

    Raises:
        UnreadableError: It cannot be read.
    """
    with open_named(path) as source:
        return source.info


def open_named(path: Path) -> "Bundle | OrbaxDirectory":
    """Opens a checkpoint with a default name; the suffix decides the format.

    Raises:
        UnreadableError: It cannot be read.
    """
    if path.suffix != ".orbax":
        return Bundle(path)
    from trainer.checkpoints.orbax_directory import OrbaxDirectory  # lazy, since few runs need it

    return OrbaxDirectory(path)


def _run_and_time(path: Path) -> tuple[str | None, float, bool]:
    """Returns the run and the time of a checkpoint, and whether its header can be read."""
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
    """Tells a file or directory of another program from a damaged checkpoint."""
    if path.suffix == ".orbax":
        names = set(os.listdir(path))
        return bool(names) and not names & {"about", "state"}
    with path.open("rb") as file:
        begin = file.read(len(MAGIC))
        file.seek(-min(len(END), path.stat().st_size), os.SEEK_END)
        return begin != MAGIC and bool(begin.strip(b"\0")) and file.read() != END
