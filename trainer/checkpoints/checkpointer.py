"""The checkpoints of a trainer: where they go, how many are kept, and saves beside the training."""

import copy
import functools
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

from trainer.checkpoints.background import BackgroundSaver
from trainer.checkpoints.detach import detach
from trainer.checkpoints.names import refuse_foreign, suffix_of
from trainer.checkpoints.plain_values import to_plain
from trainer.checkpoints.run_record import Restored, restore, snapshot_run
from trainer.checkpoints.snapshot import Snapshot, is_in_host_memory, write_snapshot
from trainer.checkpoints.state_io import default_name, load_latest, load_with_progress, prune
from trainer.run import Run


class Checkpointer:
    """Writes runs into a directory, one at a time, and reads them from it::

        with Checkpointer("runs/mine") as checkpoints:
            run = checkpoints.resume(Run.start(state))
            ...
            checkpoints.save(run, background=True)

    Args:
        directory: Where checkpoints without a path go. It is made at the first save.
        max_checkpoints: How many checkpoints with default names are kept.
    """

    def __init__(self, directory: str | os.PathLike[str], max_checkpoints: int = 5) -> None:
        self.directory = Path(directory)
        self._max_checkpoints = max_checkpoints
        self._saver = BackgroundSaver()

    def save(
        self,
        run: Run,
        path: str | os.PathLike[str] | None = None,
        *,
        background: bool | Literal["if_finite"] = False,
        info: Mapping[str, Any] | None = None,
        listeners: Callable[[], Sequence[Any]] = list,
        loaders: Sequence[Any] | None = None,
    ) -> Path:
        """Writes a run, and returns the path.

        Args:
            run: The run.
            path: The name. Without one it carries the step, and only the latest of these are kept.
            background: Return when a copy of the arrays is dispatched, and write it in a thread. Where the arrays are
                in host memory, the call does not block on steps in flight. "if_finite" writes nothing if the state
                cannot go on (`TrainState.is_finite`); `check`, `wait` or the next save warns then. A pickle or a
                ``.safetensors`` file is always written at once.
            info, listeners, loaders: As for `snapshot_run`.

        Raises:
            ArgumentError: The name promises the format of another program.
            CheckpointError: It could not be written, or the save before failed in the background.
        """
        run = run.with_edits()
        target = self.directory / default_name(run.step, run.leaves) if path is None else Path(path)
        only_finite = background == "if_finite"
        beside: dict[str, Any] = {"info": info, "listeners": listeners, "loaders": loaders}
        write = functools.partial(_write, target, self._max_checkpoints if path is None else None)
        refuse_foreign(target)  # now, not in the background
        suffix = suffix_of(target)
        self.wait()
        if not background or suffix in (".pkl", ".safetensors"):
            write(snapshot_run(run, **beside))
        elif suffix == ".orbax":
            if only_finite and not run.peek().is_finite():
                warn_of_state(run.step)
            else:
                self._saver.start(functools.partial(write, snapshot_run(run, **beside).begin(target)))
        else:
            states = list(listeners())
            for name, values in {"info": info or {}, "callbacks": states}.items():
                to_plain(values, name)  # refused now, not when they are written
            states = copy.deepcopy(states)
            beside["listeners"] = lambda: states
            # On an accelerator the check is dispatched before the copy, after which no device has the arrays.
            finite = run.peek().is_finite() if only_finite and not is_in_host_memory(run.leaves[0]) else None
            detached = detach(run)

            def write_detached() -> int | None:
                if only_finite and not (detached.peek().is_finite() if finite is None else finite):
                    return detached.step
                write(snapshot_run(detached, **beside))
                return None

            self._saver.start(write_detached)
        return target

    def load(self, path: str | os.PathLike[str], current: Run) -> Restored:
        """Reads a checkpoint, after the save in flight has finished.

        Raises:
            CheckpointError: It cannot be used.
        """
        self.wait()
        return restore(load_with_progress(path, current.peek()), current)

    def load_latest(self, current: Run) -> Restored | None:
        """Reads the newest undamaged checkpoint of the directory; None if there is none.

        Raises:
            CheckpointError: There are checkpoints, and none can be used.
        """
        self.wait()
        loaded = load_latest(self.directory, current.peek())
        return None if loaded is None else restore(loaded, current)

    def resume(self, run: Run) -> Run:
        """Returns the newest undamaged run of the directory, or ``run`` if there is none.

        Raises:
            CheckpointError: There are checkpoints, and none can be used.
        """
        restored = self.load_latest(run)
        return run if restored is None else restored.run

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()

    def check(self) -> None:
        """Raises what a finished save in the background raised, once. Does not wait."""
        warn_of_state(self._saver.check())

    def wait(self) -> None:
        """Waits for the save in flight, and raises what it raised, once."""
        warn_of_state(self._saver.wait())


def warn_of_state(step: int | None) -> None:
    """Warns of a state that is not saved; of none where there is no step."""
    if step is not None:
        warnings.warn(
            f"the state is not finite any more at step {step}; it was not saved, and earlier checkpoints stay.",
            stacklevel=3,
        )


def _write(target: Path, keep: int | None, snapshot: Snapshot) -> None:
    write_snapshot(target, snapshot)
    if keep is not None:
        prune(target.parent, keep)
