"""`CSVLogger`: a table with one row per step."""

from __future__ import annotations

import contextlib
import csv
import io
import os
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Literal

from trainer.core.other_names import takes_no
from trainer.errors import ArgumentError, warn
from trainer.loggers.base import Logger, as_directory
from trainer.loggers.jsonl import FileLogger
from trainer.metrics.whole_files import named_when_whole

Row = tuple[int | None, dict[str, str]]
"""The step, and the non-empty cells by column."""


class CSVLogger(Logger):
    """Writes a row for each step, readable with ``pandas.read_csv``::

        trainer = Trainer(model, config, loss_fn=loss_fn, logger=CSVLogger("runs/mine"))

    writes ``runs/mine/metrics.csv``. Its first column is ``step``. Training, validation and epoch averages of the same
    step share a row; missing values are empty. A new column is added by replacing the file atomically, so the file is
    always one table with one header. A row is in the file when the call returns.
    Texts, histograms, hyperparameters and images go to ``events.jsonl`` and ``events_images`` beside it, as
    `FileLogger` writes them.

    No step is in the file twice. A resumed run drops the rows after its checkpoint and writes them again; in your own
    loop call `rewind`. Without it, a repeated step overwrites the cells of its row. A new run in a directory that
    already has a table keeps the old table as ``metrics.1.csv``, with a warning. The format:
    https://www.rfc-editor.org/rfc/rfc4180.

    Attributes:
        directory: The directory of the files.
        path: The path of the table.
    """

    @takes_no("CSVLogger")
    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Makes a logger that writes into a directory. Nothing is created before the first call.

        Raises:
            ArgumentTypeError: ``directory`` is not a path.
            ArgumentError: It is a file, or holds a ``metrics.csv`` that this class did not write, which is not touched.
        """
        self.directory = as_directory(directory, "CSVLogger")
        self.path = self.directory / "metrics.csv"
        self._events = FileLogger(self.directory / "events.jsonl")
        self._table: _Table | None = None
        self._may_be_new = True
        if self.path.exists():
            # Refuses a foreign table. Opened for reading only, since every process makes a logger but only one writes.
            _Table(self.path, mode="rb").close()

    def log_scalars(self, scalars: Mapping[str, float], step: int | None = None) -> None:
        if "step" in scalars:
            raise ArgumentError("a scalar is called `step`, which is the name of the first column; rename it.")
        step = None if step is None else int(step)
        cells = {re.sub(r"[\r\n]+", " ", name): repr(float(value)) for name, value in scalars.items()}
        if not cells:
            return
        table = self._opened()
        if self._may_be_new and step is not None:
            self._may_be_new = False
            if table.first is not None and step <= table.first:
                table = self._begin_again(table)
        table.write(step, cells)

    def log_text(self, name: str, text: str, step: int | None = None) -> None:
        self._events.log_text(name, text, step)

    def log_image(self, name: str, image: Any, step: int | None = None) -> None:
        self._events.log_image(name, image, step)

    def log_histogram(self, name: str, values: Any, step: int | None = None) -> None:
        self._events.log_histogram(name, values, step)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        self._may_be_new = True
        self._events.log_hyperparams(params)

    def rewind(self, step: int) -> None:
        self._may_be_new = False
        if self.path.exists():
            table = self._opened()
            if table.last is not None and step < table.last:
                table.keep(lambda known: known is None or known <= step)

    def close(self) -> None:
        self._events.close()
        if self._table is not None:
            self._table.close()
            self._table = None

    def _opened(self) -> _Table:
        if self._table is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            self._table = _Table(self.path)
        return self._table

    def _begin_again(self, table: _Table) -> _Table:
        """Moves aside the table of another run: the first row of this run is not after the table's first row."""
        last = table.last
        self.close()
        number = 1
        while (kept := self.path.with_name(f"metrics.{number}.csv")).exists():
            number += 1
        os.rename(self.path, kept)
        warn(
            f"`{self.path}` held rows of an earlier run up to step {last}, which are kept in `{kept.name}`. A run from "
            f"the start should have a directory of its own."
        )
        return self._opened()


class _Table:
    """A CSV file whose last row is kept in memory. The file is created with the first row.

    Args:
        path: The file.
        mode: "rb" opens it for reading only. Opening it for writing drops an incomplete row of a killed process.

    Attributes:
        first: The smallest step of a row, or None if the table is empty.
        last: The largest step.

    Raises:
        ArgumentError: The file exists and is not a table of this class; it is not touched.
    """

    def __init__(self, path: Path, mode: Literal["rb", "r+b"] = "r+b") -> None:
        self._path, self._mode = path, mode
        self._columns: list[str] = []
        self.first: int | None = None
        self.last: int | None = None
        self._tail: Row | None = None
        self._tail_at = self._end = 0
        self._file: IO[bytes] | None = None
        if path.exists():
            self._open()

    def write(self, step: int | None, cells: dict[str, str]) -> None:
        """Writes the cells of a step: into its existing row, or into a new one."""
        is_tail = self._tail is not None and step is not None and self._tail[0] == step
        if is_tail:
            assert self._tail is not None
            cells = {**self._tail[1], **cells}
        missing = [name for name in cells if name not in self._columns]
        is_late = not is_tail and step is not None and self.last is not None and step <= self.last
        start = self._tail_at if is_tail else self._end
        line = self._line(step, cells)
        # If the process were killed while a shorter row overwrites a longer one, the end of the longer one would stay.
        if missing or is_late or start + len(line) < self._end:
            self._replace(self._merged(step, cells), [*self._columns, *missing])
            return
        try:
            self._put(start, line)
        except OSError:
            # A full disk: complete rows stay intact, and the next row does not continue an incomplete line.
            with contextlib.suppress(OSError):
                self._put(start, self._line(*self._tail) if is_tail and self._tail else b"")
            raise
        self._count((step, cells), start, start + len(line))

    def keep(self, wanted: Callable[[int | None], bool]) -> None:
        """Keeps only the rows whose step is wanted."""
        self._replace((row for row in self._rows() if wanted(row[0])), self._columns)

    def close(self) -> None:
        """Closes the file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _open(self) -> None:
        self._file = self._path.open(self._mode)
        try:
            self._columns, self.first, self.last, self._tail, self._end = [], None, None, None, 0
            for _, entries, start, end in self._lines():
                if start == 0:
                    self._columns, self._end = entries[1:], end
                else:
                    self._count(self._row(entries), start, end)
            if self._mode != "rb":
                self._file.truncate(self._end)
        except BaseException:
            self.close()
            raise

    def _put(self, start: int, line: bytes) -> None:
        assert self._file is not None, "the first row comes with a new column, so the file is there"
        self._file.seek(start)
        self._file.write(line)
        self._file.flush()
        self._file.truncate(start + len(line))

    def _merged(self, step: int | None, cells: dict[str, str]) -> Iterator[Row]:
        """Yields all rows, with the cells of a step merged in, ordered by step."""
        is_due = True
        for known, held in self._rows():
            if is_due and step is not None and known is not None and known >= step:
                is_due = False
                yield step, {**held, **cells} if known == step else cells
                if known == step:
                    continue
            yield known, held
        if is_due:
            yield step, cells

    def _replace(self, rows: Iterator[Row], columns: list[str]) -> None:
        """Replaces the file by a new one with the given rows, which may be read from the old file meanwhile."""
        try:
            with named_when_whole(self._path) as temporary:
                with temporary.open("wb") as file:
                    file.write(_encoded(["step", *columns]))
                    for step, cells in rows:
                        file.write(_encoded([_text(step), *(cells.get(name, "") for name in columns)]))
                    file.flush()
                    os.fsync(file.fileno())
                self.close()
            self._open()
        except BaseException:
            # Also after Ctrl-C between two lines: the open file is the one with this name.
            self.close()
            if self._path.exists():
                self._open()
            raise

    def _rows(self) -> Iterator[Row]:
        return (self._row(entries) for _, entries, start, _ in self._lines() if start > 0)

    def _lines(self) -> Iterator[tuple[int, list[str], int, int]]:
        """Yields number, entries, start and end of each complete line, the header first."""
        if self._file is None:
            return
        self._file.seek(0)
        end, width = 0, None
        for number, line in enumerate(self._file, start=1):
            start, end = end, end + len(line)
            try:
                entries = next(csv.reader([line.decode("utf-8")], strict=True), [])
                if not line.endswith(b"\n"):
                    if number == 1:
                        raise ValueError
                    return
                if number == 1 and (entries[:1] != ["step"] or len(set(entries)) != len(entries)):
                    raise ValueError
                width = len(entries) if width is None else width
                if len(entries) != width or (number > 1 and entries[0] and not entries[0].isdecimal()):
                    raise ValueError
            except (ValueError, csv.Error) as error:
                raise ArgumentError(
                    f"`{self._path}` is no table of CSVLogger: line {number} is {line[:60]!r}. It is not touched; use "
                    f"another `directory`, or move it away."
                ) from error
            yield number, entries, start, end

    def _row(self, entries: list[str]) -> Row:
        cells = {name: cell for name, cell in zip(self._columns, entries[1:], strict=True) if cell}
        return int(entries[0]) if entries[0] else None, cells

    def _count(self, row: Row, start: int, end: int) -> None:
        self._tail, self._tail_at, self._end = row, start, end
        if row[0] is not None:
            self.first = row[0] if self.first is None else min(self.first, row[0])
            self.last = row[0] if self.last is None else max(self.last, row[0])

    def _line(self, step: int | None, cells: Mapping[str, str]) -> bytes:
        return _encoded([_text(step), *(cells.get(name, "") for name in self._columns)])


def _text(step: int | None) -> str:
    return "" if step is None else str(step)


def _encoded(entries: list[str]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(entries)
    return text.getvalue().encode("utf-8")
