"""The checkpoints in a directory: which exist, which run wrote each, and which a process may remove.

Only default names count: ``checkpoint_<step>.msgpack`` for a file and ``checkpoint_<step>.orbax`` for a directory, and
``checkpoint_<step>.<run>.…`` for one that `keep_aside` renamed. The run and the time of writing come from each header;
the name tells neither.
"""

import contextlib
import datetime
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import xxhash

from trainer.checkpoints.atomic import locked, remove, restore
from trainer.checkpoints.file_format import END, MAGIC, Bundle
from trainer.errors import CheckpointError

if TYPE_CHECKING:
    from trainer.checkpoints.orbax_directory import OrbaxDirectory

_OWN_NAME = re.compile(r"checkpoint_(0|[1-9]\d*)(?:\.[0-9a-f]{16})?\.(msgpack|orbax)")
_RUN = re.compile("[0-9a-f]{16}")


class Entry(NamedTuple):
    """A checkpoint: its name, its step, the id of its run (None if it has none), and when it was written."""

    name: str
    step: int
    run: str | None
    time: float

    @property
    def is_renamed(self) -> bool:
        """Whether `keep_aside` renamed it, since another run needed its name."""
        return self.name.count(".") > 1


def names_in(directory: Path) -> dict[str, int]:
    """Returns the default names in a directory with their steps, sorted by step. Opens no file."""
    if not directory.is_dir():
        return {}
    restore(directory)  # otherwise, a save killed while replacing the latest checkpoint would hide it
    matches = filter(None, map(_OWN_NAME.fullmatch, os.listdir(directory)))
    ordered = sorted(matches, key=lambda match: (int(match[1]), match[2], match[0]))
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
        self._found: dict[str, tuple[str, tuple[int, int] | None]] = {}  # by name: the run, and which file it was
        self._runs: set[str] = set()

    def add(self, name: str, run: str) -> None:
        """Records a checkpoint that a run has just written."""
        if run not in self._runs:
            self._runs.add(run)
            earlier = [entry.name for entry in entries_in(self._directory) if entry.run == run]
            self._found = {known: (run, self._identity(known)) for known in earlier} | self._found
        other, known = self._found.pop(name, (run, None))
        renamed = aside(self._directory / name, other).name
        if other != run and known is not None and known == self._identity(renamed):
            self._found[renamed] = other, known
        self._found[name] = run, self._identity(name)

    def prune(self, keep: int) -> None:
        """Removes all but the last ``keep`` written of each run, sparing any that another run has replaced since.

        Orbax directories belong to all processes; only process 0 removes them, atomically.
        """
        written: dict[str, list[str]] = {}
        for name, (run, _) in self._found.items():
            written.setdefault(run, []).append(name)
        names = [name for own in written.values() for name in own[:-keep]]
        # Locked, so that no other run takes the name between the comparison and the removal.
        with locked(self._directory) if names else contextlib.nullcontext():
            for name in names:
                run, known = self._found.pop(name)
                for path in (self._directory / name, aside(self._directory / name, run)):
                    if known is not None and known == self._identity(path.name):
                        _remove(path)

    def holder(self, name: str) -> str | None:
        """Returns the run that wrote the file with this name, if it is still the one that was recorded."""
        run, known = self._found.get(name, (None, None))
        return run if known is not None and known == self._identity(name) else None

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


def is_of(path: Path, run: str) -> bool:
    """Tells whether there is a checkpoint that the named run wrote."""
    return _run_and_time(path)[0] == run


def aside(path: Path, run: str) -> Path:
    """Returns where `keep_aside` keeps the checkpoint of a run: ``checkpoint_7.<run>.msgpack``, or ``7.<run>``."""
    name = run if _RUN.fullmatch(run) else xxhash.xxh3_64_hexdigest(run.encode("utf-8", "backslashreplace"))
    return path.with_name(f"{path.stem}.{name}{path.suffix}")


def keep_aside(path: Path, run: str) -> None:
    """Renames a checkpoint of the named run, since another run needs its name.

    Raises:
        CheckpointError: It cannot be renamed.
    """
    target = aside(path, run)
    try:
        if target.is_dir():
            remove(target)  # what the same run saved at the same step before
        os.replace(path, target)
    except FileNotFoundError:  # another process was faster
        pass
    except OSError as error:
        raise CheckpointError(f"`{path}` of another run could not be renamed to `{target.name}`: {error}") from error


def keep_last_of_another(path: Path, run: str) -> None:
    """Frees a default name for a run: another run's checkpoint is kept aside if it is the last one of that run.

    Raises:
        CheckpointError: It cannot be renamed.
    """
    other = _run_and_time(path)[0] if os.path.lexists(path) else None
    if other not in (None, run):
        last = [entry.name for entry in entries_in(path.parent) if entry.run == other][-1:]
        if last == [path.name]:
            keep_aside(path, other)


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


def _remove(path: Path) -> None:
    if path.suffix == ".msgpack" or jax.process_index() == 0:
        remove(path)


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
