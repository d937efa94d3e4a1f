"""Reads the history of a run from its directory, a checkpoint or a log, without the model."""

import contextlib
import csv
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trainer.checkpoints.listing import entries_in
from trainer.checkpoints.open import open_source, read_progress
from trainer.errors import ArgumentError, CheckpointError
from trainer.fit.run_file import RUN_FILE, read_figures
from trainer.metrics.plots import STEPS_PER_SECOND, figure_rows, with_weights
from trainer.metrics.throughput import SPEED

_SIZES = ("first_step", "num_examples", "batch_size")

Row = dict[str, Any]

_JSON_LINES = (".jsonl", ".ndjson", ".json")
_LOGS = (*_JSON_LINES, ".csv")


def read_rows(path: Path) -> list[Row]:
    """Returns the rows of a history, each with its ``step``.

    For a directory, this is the history in the newest readable checkpoint, with the figures of epochs from ``run.json``
    and the speeds from a log beside it; without such a checkpoint, the rows of the newest log. Logs are those of
    `trainer.FileLogger`, or CSV with a column ``step``: ``train/loss`` becomes ``loss``, and ``val/loss`` becomes
    ``val_loss``.

    Raises:
        ArgumentError: The path has no history.
        CheckpointError: A checkpoint cannot be read.
    """
    if path.suffix.lower() in _LOGS and path.is_file():
        return _rows_of_log(path)
    if not path.is_dir() or (path / "about").exists():
        return _rows_of_checkpoint(path)
    rows: list[Row] = []
    problems: list[str] = []
    run = ""
    for entry in reversed(entries_in(path)):
        try:
            rows, run = _rows_of_checkpoint(path / entry.name), entry.run or ""
        except CheckpointError as error:
            problems.append(str(error))
        else:
            break
    logged = _rows_of_newest_log(path, problems)
    if rows:
        speeds = [
            {"step": row["step"], **{name: value for name, value in row.items() if name.startswith(SPEED)}}
            for row in logged
            if any(name.startswith(SPEED) for name in row)
        ]
        with contextlib.suppress(OSError, ValueError):  # a file of another kind; `trainer inspect` reports it
            known = figure_rows(read_figures(path / RUN_FILE, run), rows)
            if any(STEPS_PER_SECOND in row for row in known):
                # The speeds in a log include epochs with compilations.
                speeds = [{key: row[key] for key in row if key != STEPS_PER_SECOND} for row in speeds]
            speeds += [dict(row) for row in known]
        last = rows[-1]["step"]
        return [*rows, *(row for row in speeds if row["step"] <= last)]
    if not logged:
        why = f" ({' '.join(problems)})" if problems else ""
        raise ArgumentError(
            f"`{path}` has no history: no checkpoint that can be read, and no log that ends in {', '.join(_LOGS)}{why}."
        )
    return logged


def labelled(paths: Sequence[Path]) -> dict[str, Path]:
    """Returns paths by label: the shortest suffixes of the paths that are unique.

    Raises:
        ArgumentError: Two paths are the same.
    """
    whole = [path.absolute().parts for path in paths]
    if len(set(whole)) < len(whole):
        raise ArgumentError(f"`{next(path for path in paths if paths.count(path) > 1)}` is named twice.")
    for length in range(1, max(map(len, whole)) + 1):
        labels = ["/".join(parts[-length:]) for parts in whole]
        if len(set(labels)) == len(labels):
            break
    return dict(zip(labels, paths, strict=True))


def _rows_of_checkpoint(path: Path) -> list[Row]:
    with open_source(path) as source:
        progress = read_progress(source) or {}
    rows = progress.get("history") or []
    if not isinstance(rows, list) or not all(isinstance(row, dict) and "step" in row for row in rows):
        raise CheckpointError(f"`{path}` holds a history that cannot be understood.")
    if not rows:
        raise CheckpointError(f"`{path}` holds no history.")
    run = progress.get("run")
    found = [run.get(name) for name in _SIZES] if isinstance(run, dict) else []
    sizes = [size for size in found if isinstance(size, int)]
    if len(sizes) < len(_SIZES) or min(sizes[1:]) < 1:  # data of a loader
        return rows
    first_step, num_examples, batch_size = sizes
    return [dict(row) for row in with_weights(rows, first_step, num_examples, batch_size)]


def _rows_of_newest_log(directory: Path, problems: list[str]) -> list[Row]:
    logs = [path for path in directory.iterdir() if path.suffix.lower() in _LOGS and path.is_file()]
    for path in sorted(logs, key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            return _rows_of_log(path)
        except ArgumentError as error:
            if path.name != "run.json":
                problems.append(str(error))
    return []


def _rows_of_log(path: Path) -> list[Row]:
    with path.open(encoding="utf-8", errors="replace", newline="") as file:
        found = _objects(file) if path.suffix.lower() in _JSON_LINES else csv.DictReader(file)
        try:
            rows = [row for row in map(_row, found) if len(row) > 1 and "step" in row]
        except csv.Error as error:
            raise ArgumentError(f"`{path}` is no CSV: {error}.") from error
    if not rows:
        raise ArgumentError(f"`{path}` is no log of a run: no row in it has a `step` and a number.")
    return rows


def _objects(lines: Iterable[str]) -> Iterable[Row]:
    for line in lines:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):  # the last line, while it is being written
            continue
        if isinstance(found, dict):
            yield found


def _row(found: Row) -> Row:
    row: Row = {}
    for key, value in found.items():
        number = _number(value)
        name = str(key)
        if number is None or name.startswith("test/"):
            continue
        for prefix, instead in (("train/", ""), ("val/", "val_")):
            if name.startswith(prefix):
                name = instead + name.removeprefix(prefix)
        row[name] = number
    if "step" in row and math.isfinite(row["step"]):
        return row
    return {}


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None
