"""``run.json``: human-readable information on the runs in a directory, next to their checkpoints.

If a ``workdir`` is given, the trainer adds an entry for each start and each resume of a run, oldest first. The file is
read only by people and by ``trainer inspect``. It is replaced atomically, so a reader sees either the old or the new
entries. It is not flushed to disk, so a power failure may lose it.
"""

import contextlib
import datetime
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from trainer.checkpoints.atomic import replacing
from trainer.errors import warn
from trainer.fit.plan import FitPlan
from trainer.fit.setup import Setup
from trainer.fit.surroundings import as_json, surroundings
from trainer.run import Run

RUN_FILE = "run.json"
FORMAT = "nnx-trainer run 1"

_MAX_STARTS = 50
_MAX_BYTES = 32 * 2**20
_LOCK_SECONDS = 0.5


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
        with _locked(path.parent):
            starts = [*(read_starts(path) or []), entry][-_MAX_STARTS:]
            encoded = _as_text(starts).encode("utf-8", "backslashreplace")
            with replacing(path, len(encoded), durable=False) as file:
                file.write(encoded)
    except (OSError, ValueError) as error:
        warn(f"`{path}`, which tells people about this run, could not be written: {error}. The run itself continues.")


def _as_text(starts: list[dict[str, Any]]) -> str:
    """Formats the latest entry with indentation, and earlier ones as a line each: indenting all 50 takes 20 ms."""
    lines = [json.dumps(entry, ensure_ascii=False) for entry in starts[:-1]]
    entries = ",\n".join([*lines, json.dumps(starts[-1], indent=1, ensure_ascii=False)])
    return f'{{"format": {json.dumps(FORMAT)}, "starts": [\n{entries}\n]}}\n'


def read_starts(path: Path) -> list[dict[str, Any]] | None:
    """Returns the entries of a file, oldest first; None if it does not exist or is empty.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not in this format.
    """
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
    return starts


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


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Locks the directory against other starting runs, if the system has such locks; waits half a second at most."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(directory, os.O_RDONLY)
    try:
        end = time.monotonic() + _LOCK_SECONDS
        while time.monotonic() < end:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.01)
            except OSError:  # no locks on this file system
                break
            else:
                break
        yield
    finally:
        os.close(descriptor)
