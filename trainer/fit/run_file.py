"""``run.json``: human-readable information on the runs in a directory, next to their checkpoints.

If a ``workdir`` is given, the trainer adds an entry for each start and each resume of a run, oldest first. The file
also holds the steps per second of each epoch by run id; checkpoints do not, because they differ between repeated runs.
The file is read only by people, ``trainer inspect`` and ``trainer plot``. It is replaced atomically, so a reader sees
either the old or the new content. It is not flushed to disk, so a power failure may lose it.
"""

import contextlib
import datetime
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from trainer.checkpoints.atomic import locked, replacing
from trainer.errors import warn
from trainer.fit.plan import FitPlan
from trainer.fit.setup import Setup
from trainer.fit.surroundings import as_json, surroundings
from trainer.metrics.history import thinned
from trainer.run import Run

RUN_FILE = "run.json"
FORMAT = "nnx-trainer run 1"

_MAX_STARTS = 50
_MAX_BYTES = 32 * 2**20


def write_start(setup: Setup, plan: FitPlan, run: Run, resumed: Path | None) -> None:
    """Adds an entry to ``run.json`` in the run's directory, from the primary process. Warns on failure.

    The latest 50 entries are kept. A file of this name from another program is left unchanged, with a warning.
    """
    if setup.workdir is None or not setup.placement.is_primary_process:
        return
    path = Path(setup.workdir) / RUN_FILE
    try:
        entry = as_json(_entry(setup, plan, run, resumed))
        path.parent.mkdir(parents=True, exist_ok=True)
        _change(path, lambda starts, speeds: ([*starts, entry], {run.id: _until(run.step, speeds.pop(run.id, ()))}))
    except (OSError, ValueError) as error:
        warn(f"`{path}`, which tells people about this run, could not be written: {error}. The run itself continues.")


def write_speeds(setup: Setup, run: Run) -> None:
    """Writes the throughput of a run's epochs next to its entries, if any. Failures are ignored."""
    if setup.workdir is None or not setup.placement.is_primary_process or not run.history.speeds:
        return
    path, own = Path(setup.workdir) / RUN_FILE, run.history.speeds
    before = own[0][0] - 1
    with contextlib.suppress(OSError, ValueError):
        _change(path, lambda starts, speeds: (starts, {run.id: (*_until(before, speeds.pop(run.id, ())), *own)}))


def _until(step: int, speeds: Any) -> tuple[Any, ...]:
    """Returns the throughput of epochs that ended at or before a step."""
    return tuple(speed for speed in speeds if speed[0] <= step)


def _change(path: Path, change: Callable[[list[Any], dict[str, Any]], tuple[list[Any], dict[str, Any]]]) -> None:
    """Atomically replaces the file by one with changed entries and throughput.

    Args:
        path: The file.
        change: Called with the entries and the throughput by run id. It removes its own run from the latter, and
            returns the new entries and the throughput of its own run.
    """
    with locked(path.parent):
        starts, speeds = _read(path) or ([], {})
        starts, own = change(starts, speeds)
        if not starts:  # the file was removed
            return
        starts = starts[-_MAX_STARTS:]
        runs = {entry.get("run") for entry in starts}
        speeds = {name: thinned(tuple(found)) for name, found in {**speeds, **own}.items() if name in runs and found}
        encoded = _as_text(starts, speeds).encode("utf-8", "backslashreplace")
        with replacing(path, len(encoded), durable=False) as file:
            file.write(encoded)


def _as_text(starts: list[dict[str, Any]], speeds: Mapping[str, Any]) -> str:
    """Formats the latest entry with indentation, and earlier ones as a line each: indenting all 50 takes 20 ms."""
    lines = [json.dumps(entry, ensure_ascii=False) for entry in starts[:-1]]
    entries = ",\n".join([*lines, json.dumps(starts[-1], indent=1, ensure_ascii=False)])
    known = ",\n".join(f"{json.dumps(run)}: {json.dumps(found)}" for run, found in speeds.items())
    beside = f', "steps_per_second": {{\n{known}\n}}' if known else ""
    return f'{{"format": {json.dumps(FORMAT)}, "starts": [\n{entries}\n]{beside}}}\n'


def read_starts(path: Path) -> list[dict[str, Any]] | None:
    """Returns the entries of a file, oldest first; None if it does not exist or is empty.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not in this format.
    """
    found = _read(path)
    return None if found is None else found[0]


def read_speeds(path: Path, run: str) -> list[tuple[int, float]]:
    """Returns the steps at which epochs of a run ended, and their steps per second; raises as `read_starts` does."""
    _, speeds = _read(path) or ([], {})
    return [(step, speed) for step, speed in speeds.get(run, ())]


def _read(path: Path) -> tuple[list[dict[str, Any]], dict[str, Any]] | None:
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
    except FileNotFoundError:
        return None
    if not content.strip(b"\0 \n"):  # after a power failure
        return None
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"it is there already, and is no JSON ({error})") from None
    starts = found.get("starts") if isinstance(found, Mapping) and found.get("format") == FORMAT else None
    if not isinstance(starts, list) or not all(isinstance(entry, dict) for entry in starts):
        raise ValueError("it is there already, and another program wrote it")
    speeds = found.get("steps_per_second")
    return starts, {run: own for run, own in speeds.items() if _are_speeds(own)} if isinstance(speeds, dict) else {}


def _are_speeds(found: Any) -> bool:
    """Tells whether these are pairs of a step and a speed, as this module writes them."""
    numbers = isinstance(found, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in found)
    return numbers and all(type(step) is int and type(speed) in (int, float) for step, speed in found)


def _entry(setup: Setup, plan: FitPlan, run: Run, resumed: Path | None) -> dict[str, Any]:
    # The entry already has the whole configuration.
    arguments = {name: text for name, text in plan.arguments.items() if not name.startswith("training_config.")}
    return {
        "event": "start" if resumed is None else "resume",
        "run": run.id,
        "name": setup.config.name,
        "time": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "step": run.step,
        "epoch": run.epoch,
        **({} if resumed is None else {"resumed_from": str(resumed)}),
        "call": {
            "method": plan.caller,
            "about": plan.about,
            "num_epochs": plan.num_epochs,
            "batch_size": plan.batch_size,
            "validate_every": plan.validate_every,
            "save_every": plan.save_every,
        },
        "arguments": arguments,
        "checkpoints": str(setup.checkpointer.directory),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(run.peek().params)),
        **surroundings(run.leaves[0].sharding.device_set),
        "config": setup.config.to_dict(),
    }
