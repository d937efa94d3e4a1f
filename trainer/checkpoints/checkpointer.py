"""The checkpoints of a trainer: where they go, how many are kept, and saves beside the training."""

import os
from pathlib import Path
from typing import Self

from trainer.checkpoints.background import BackgroundSaver
from trainer.checkpoints.run_record import Restored, restore, snapshot_run
from trainer.checkpoints.snapshot import Snapshot, write_snapshot
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
        self, run: Run | Snapshot, path: str | os.PathLike[str] | None = None, *, background: bool = False
    ) -> Path:
        """Writes a run, and returns the path.

        Args:
            run: The run; or what `snapshot_run` returned of it, with more beside it.
            path: The name. Without one it carries the step, and only the latest of these are kept.
            background: Return when the arrays are copied to the host. A pickle is always written at once.

        Raises:
            CheckpointError: It could not be written, or the save before failed in the background.
        """
        snapshot = snapshot_run(run) if isinstance(run, Run) else run
        step = int(snapshot.info["step"])
        target = self.directory / default_name(step, snapshot.state) if path is None else Path(path)
        directory, keep = target.parent, self._max_checkpoints if path is None else None
        self._saver.wait()
        if background and target.suffix != ".pkl":
            snapshot = snapshot.on_host(target)
            self._saver.start(lambda: _write(target, snapshot, directory, keep))
        else:
            _write(target, snapshot, directory, keep)
        return target

    def load(self, path: str | os.PathLike[str], current: Run) -> Restored:
        """Reads a checkpoint, after the save in flight has finished.

        Raises:
            CheckpointError: It cannot be used.
        """
        self._saver.wait()
        return restore(load_with_progress(path, current.peek()), current)

    def load_latest(self, current: Run) -> Restored | None:
        """Reads the newest undamaged checkpoint of the directory; None if there is none.

        Raises:
            CheckpointError: There are checkpoints, and none can be used.
        """
        self._saver.wait()
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
        self._saver.check()

    def wait(self) -> None:
        """Waits for the save in flight, and raises what it raised, once."""
        self._saver.wait()


def _write(target: Path, snapshot: Snapshot, directory: Path, keep: int | None) -> None:
    write_snapshot(target, snapshot)
    if keep is not None:
        prune(directory, keep)
