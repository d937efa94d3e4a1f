"""``run.json``: human-readable information on the runs in a directory, next to their checkpoints.

If a ``workdir`` is given, the trainer adds an entry for each start and each resume of a run, oldest first. The file
also holds the steps per second and the learning rate of each epoch by run id; checkpoints do not, because speeds differ
between repeated runs.
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
from trainer.metrics.history import Figures, thinned
from trainer.run import Run

RUN_FILE = "run.json"
FORMAT = "nnx-trainer run 1"

_FIGURES = ("steps_per_second", "learning_rate")

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
        _change(path, lambda starts, before: ([*starts, entry], run.id, _until(run.step, before.get(run.id, {}))))
    except (OSError, ValueError) as error:
        warn(f"`{path}`, which tells people about this run, could not be written: {error}. The run itself continues.")


def write_figures(setup: Setup, run: Run) -> None:
    """Writes the figures of a run's epochs next to its entries, if any. Failures are ignored."""
    if setup.workdir is None or not setup.placement.is_primary_process:
        return

    def change(starts: list[Any], before: dict[str, Figures]) -> tuple[list[Any], str, Figures]:
        # A resumed run continues those of the process before it; each name by itself, since an epoch may have only one.
        joined = before.get(run.id, {})
        for name, pairs in own.items():
            joined = {**joined, name: (*(pair for pair in joined.get(name, ()) if pair[0] < pairs[0][0]), *pairs)}
        return starts, run.id, joined

    # A RuntimeError, if the step that a learning rate is read from has failed: the call raises that itself.
    with contextlib.suppress(OSError, ValueError, RuntimeError):
        if own := run.history.figures:
            _change(Path(setup.workdir) / RUN_FILE, change)


def _until(step: int, figures: Figures) -> Figures:
    """Returns the figures of epochs that ended at or before a step."""
    return {name: tuple(pair for pair in pairs if pair[0] <= step) for name, pairs in figures.items()}


def _change(path: Path, change: Callable[[list[Any], dict[str, Figures]], tuple[list[Any], str, Figures]]) -> None:
    """Atomically replaces the file by one with changed entries and figures.

    Args:
        path: The file.
        change: Called with the entries and the figures by run id. Returns the new entries, its own run, and that run's
            figures.
    """
    with locked(path.parent):
        starts, before = _read(path) or ([], {})
        starts, changed, own = change(starts, before)
        if not starts:  # the file was removed
            return
        starts = starts[-_MAX_STARTS:]
        runs = {entry.get("run") for entry in starts}
        # The latest run last.
        figures = {run: found for run, found in before.items() if run != changed} | {changed: own}
        kept = {run: found for run, found in figures.items() if run in runs}
        encoded = _as_text(starts, kept).encode("utf-8", "backslashreplace")
        with replacing(path, len(encoded), durable=False) as file:
            file.write(encoded)


def _as_text(starts: list[dict[str, Any]], figures: Mapping[str, Figures]) -> str:
    """Formats the latest entry with indentation, and earlier ones as a line each: indenting all 50 takes 20 ms."""
    lines = [json.dumps(entry, ensure_ascii=False) for entry in starts[:-1]]
    entries = ",\n".join([*lines, json.dumps(starts[-1], indent=1, ensure_ascii=False)])
    text = f'{{"format": {json.dumps(FORMAT)}, "starts": [\n{entries}\n]'
    for name in _FIGURES:
        pairs = {run: thinned(tuple(found[name])) for run, found in figures.items() if found.get(name)}
        known = ",\n".join(f"{json.dumps(run)}: {json.dumps(own)}" for run, own in pairs.items())
        text += f', "{name}": {{\n{known}\n}}' if known else ""
    return text + "}\n"


def read_starts(path: Path) -> list[dict[str, Any]] | None:
    """Returns the entries of a file, oldest first; None if it does not exist or is empty.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not in this format.
    """
    found = _read(path)
    return None if found is None else found[0]


def read_figures(path: Path, run: str) -> Figures:
    """Returns the figures of the epochs of a run, as `trainer.History.figures`; raises as `read_starts` does."""
    _, figures = _read(path) or ([], {})
    return figures.get(run, {})


def _read(path: Path) -> tuple[list[dict[str, Any]], dict[str, Figures]] | None:
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
    figures: dict[str, Figures] = {}
    for name in _FIGURES:
        runs = found.get(name)
        for run, pairs in runs.items() if isinstance(runs, dict) else ():
            if _are_figures(pairs):
                figures.setdefault(run, {})[name] = tuple((step, value) for step, value in pairs)
    return starts, figures


def _are_figures(found: Any) -> bool:
    """Tells whether these are pairs of a step and a value, as this module writes them."""
    numbers = isinstance(found, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in found)
    return numbers and all(type(step) is int and type(value) in (int, float) for step, value in found)


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
