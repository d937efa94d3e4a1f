"""Checkpoints of a trainer: where they go, how many are kept, and background saves."""

import collections
import copy
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import jax

from trainer.checkpoints.atomic import locked
from trainer.checkpoints.background import BackgroundSaver
from trainer.checkpoints.detach import detach
from trainer.checkpoints.listing import Written, aside, entries_in, is_of, keep_last_of_another, names_in, run_of
from trainer.checkpoints.names import refuse_foreign, suffix_of
from trainer.checkpoints.plain_values import to_plain
from trainer.checkpoints.run_record import Restored, restore, snapshot_run
from trainer.checkpoints.saving import Snapshot, is_in_host_memory, write_snapshot
from trainer.checkpoints.state_io import Loaded, default_name, load_latest, load_with_progress
from trainer.core.checks import check_count
from trainer.distributed.agreement import AllOrNone
from trainer.errors import CheckpointError, warn
from trainer.paths import in_home
from trainer.run import Run


class Checkpointer:
    """Writes runs to a directory, one at a time, and reads them back::

        with Checkpointer("runs/mine") as checkpoints:
            run = checkpoints.resume(Run.start(state))
            ...
            checkpoints.save(run, background=True)

    Several runs may share a directory, since a script is often run twice; a warning advises a directory for each. A run
    removes none of another's checkpoints, but replaces those of the steps that it saves. The last one of the other run,
    with the result of all its training, is not replaced but renamed to ``checkpoint_<step>.<run>.msgpack``, where it is
    listed and loaded like any other. So each of ten runs of a script leaves its last checkpoint, and only the last run
    all that it keeps: no result is lost, and the disk does not fill with every step of every run.

    Args:
        directory: Where checkpoints without an explicit path go. It is created at the first save.
        max_checkpoints: How many checkpoints with default names to keep per run: the last ones written; None keeps all.

    Raises:
        ArgumentError: ``max_checkpoints`` is neither None nor a positive integer.
    """

    def __init__(self, directory: str | os.PathLike[str], max_checkpoints: int | None = 5) -> None:
        self.directory = Path(in_home(directory))
        self._max_checkpoints = None
        if max_checkpoints is not None:
            self._max_checkpoints = check_count(max_checkpoints, "max_checkpoints", otherwise=", or None for all")
        self._saver = BackgroundSaver()
        self._written = Written(self.directory)
        self._saved: tuple[str, int, Path] | None = None
        self._complete: collections.deque[tuple[Path, int]] = collections.deque(maxlen=100)  # appended to by a thread
        self._has_warned = False

    def save(
        self,
        run: Run,
        path: str | os.PathLike[str] | None = None,
        *,
        background: bool | Literal["if_finite"] = False,
        info: Mapping[str, Any] | None = None,
        callback_states: Callable[[], Sequence[Any]] = list,
        loaders: Sequence[Any] | None = None,
    ) -> Path:
        """Writes a run and returns the path.

        Args:
            run: The run.
            path: The path. The default name contains the step; of those, only the last ones written are kept.
            background: Return once a copy of the arrays is dispatched, and write it in a thread. If the arrays are
                in host memory, the call does not block on steps in flight. "if_finite" skips the write if the state
                is not finite (`TrainState.is_finite`); the next `check`, `wait` or save then warns. A pickle or a
                ``.safetensors`` file is always written synchronously.
            info, callback_states, loaders: As for `snapshot_run`.

        Raises:
            ArgumentError: The suffix is that of another program's format.
            CheckpointError: The write or the previous background save failed, or the default path holds
                something that this library did not write.
        """
        run = run.with_edits()
        target = self.directory / default_name(run.step, run.leaves) if path is None else Path(in_home(path))
        only_finite = background == "if_finite"
        beside: dict[str, Any] = {"info": info, "callback_states": callback_states, "loaders": loaders}
        write = functools.partial(self._write, target, run.step, run.id if path is None else None)

        def snapshot_of(run: Run) -> Snapshot:
            claim = functools.partial(self._free_name, target, run.id) if path is None else None
            return dataclasses.replace(snapshot_run(run, **beside), claim=claim)

        refuse_foreign(target)  # raise here, not in the background
        suffix = suffix_of(target)
        self.wait()
        if path is None:
            self._check_name(target, run)
            self._saved = run.id, run.step, target
        if not background or suffix in (".pkl", ".safetensors"):
            write(snapshot_of(run))
        elif suffix == ".orbax":
            if only_finite and not run.peek().is_finite():
                warn_of_state(run.step)
            else:
                self._saver.start(functools.partial(write, snapshot_of(run).begin(target)))
        else:
            states = list(callback_states())
            for name, values in {"info": info or {}, "callbacks": states}.items():
                to_plain(values, name)  # raises here, not during the write
            states = copy.deepcopy(states)
            beside["callback_states"] = lambda: states
            # On an accelerator, dispatch the check before `detach` copies the arrays to the host.
            finite = run.peek().is_finite() if only_finite and not is_in_host_memory(run.leaves[0]) else None
            detached = detach(run)

            def write_detached() -> int | None:
                if only_finite and not (detached.peek().is_finite() if finite is None else finite):
                    return detached.step
                write(snapshot_of(detached))
                return None

            self._saver.start(write_detached)
        return target

    def load(self, path: str | os.PathLike[str], current: Run) -> Restored:
        """Reads a checkpoint, after the save in flight has finished.

        Raises:
            CheckpointError: The checkpoint cannot be used.
        """
        self.wait()
        return self._restored(load_with_progress(path, current.peek()), current)

    def load_latest(self, current: Run) -> Restored | None:
        """Reads the newest undamaged checkpoint in the directory, or returns None if there is none.

        Raises:
            CheckpointError: There are checkpoints, but none is usable.
        """
        self.wait()
        entries = entries_in(self.directory)
        loaded = load_latest(self.directory, current.peek(), entries)
        if loaded is None:
            return None
        # The last checkpoint of an earlier run, kept under another name, is no other run that saves here too.
        runs = {entry.run for entry in entries if not entry.is_renamed or entry.name == loaded.path.name} - {None}
        if len(runs) > 1:
            warn(
                f"`{self.directory}` holds checkpoints of {len(runs)} runs; `{loaded.path.name}` is of the one that "
                f"saved last. Use a directory of its own for each run, or name the checkpoint to resume from."
            )
        return self._restored(loaded, current)

    def resume(self, run: Run) -> Run:
        """Returns the newest undamaged run in the directory, or ``run`` if there is none.

        Raises:
            CheckpointError: There are checkpoints, but none is usable.
        """
        restored = self.load_latest(run)
        return run if restored is None else restored.run

    def prune(self, run: Run) -> None:
        """Removes what a kill right after the latest save of a run left of its older ones."""
        if self._max_checkpoints is not None and (path := self.saved_path(run)) is not None:
            self._written.add(path.name, run.id)
            self._written.prune(self._max_checkpoints)

    def leave_out(self, run: Run) -> None:
        """Warns that the state is not finite, so it is not saved."""
        self._saved = run.id, run.step, self.directory / default_name(run.step, run.leaves)
        warn_of_state(run.step)

    def saved_step(self, run: Run) -> int | None:
        """Returns the step of the latest checkpoint of the run with a default name, or None if there is none.

        One that was left out counts, or skipped by "if_finite", and so does the checkpoint that the run came from.
        """
        return self._saved[1] if self._saved is not None and self._saved[0] == run.id else None

    def saved_path(self, run: Run) -> Path | None:
        """Returns the path of the checkpoint at `saved_step`, or None if it does not exist."""
        if self._saved is None or self._saved[0] != run.id:
            return None
        path = self._saved[2]
        is_own = self._written.holder(path.name) == run.id
        if not is_own and aside(path, run.id).exists() and not is_of(path, run.id):
            return aside(path, run.id)  # another run has taken the name
        return path if path.exists() else None

    def _restored(self, loaded: Loaded, current: Run) -> Restored:
        restored = restore(loaded, current)
        if loaded.path.parent.absolute() == self.directory.absolute():
            self._saved = restored.run.id, restored.run.step, loaded.path
        return restored

    def warn_of_later(self, run: Run) -> None:
        """Warns, once, if the directory of a starting run holds checkpoints of later steps that it did not write."""
        found = names_in(self.directory).items()
        later = [step for name, step in found if step > run.step and self._written.holder(name) is None]
        if later and not self._has_warned:
            self._has_warned = True
            warn(
                f"`{self.directory}` holds checkpoints up to step {max(later)}, later than this run's step {run.step}. "
                f"They are kept, but where this run saves the same step, only the last one of the earlier run, under "
                f"another name. A run from the start should have its own directory; `resume=True` would continue the "
                f"earlier run."
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.wait()

    def check(self) -> None:
        """Raises the error of a finished background save, once. Does not wait."""
        warn_of_state(self._saver.check())

    def wait(self) -> None:
        """Waits for the save in flight and raises its error, once."""
        warn_of_state(self._saver.wait())

    def add_complete(self, path: Path, step: int) -> None:
        """Reports a checkpoint that another writer completed to `take_complete`. May be called from any thread."""
        self._complete.append((path, step))

    def take_complete(self) -> list[tuple[Path, int]]:
        """Returns the paths and steps of checkpoints completed since the last call. Does not wait.

        Includes ones removed since. Only the latest 100 are remembered.
        """
        return [self._complete.popleft() for _ in range(len(self._complete))]

    def _write(self, target: Path, step: int, run: str | None, snapshot: Snapshot) -> None:
        write_snapshot(target, snapshot)
        if run is not None:
            self._written.add(target.name, run)
            if self._max_checkpoints is not None:
                self._written.prune(self._max_checkpoints)
        self.add_complete(target, step)

    def _free_name(self, target: Path, run: str) -> None:
        # The last file that this process wrote there need not be opened.
        if self._written.holder(target.name) != run:
            keep_last_of_another(target, run)

    def _check_name(self, target: Path, run: Run) -> None:
        """Refuses, in all processes, to replace anything but a checkpoint. Warns, once, if it is another run's."""
        failure: Exception | None = None
        is_of_another = False
        # Of a directory, process 0 decides for all what is there: the others may see its changes later.
        if target.suffix != ".orbax" or jax.process_index() == 0:
            try:
                other = self._written.holder(target.name)
                if other is None and os.path.lexists(target):
                    other = run_of(target)
                is_of_another = other not in (None, run.id)
                if is_of_another and target.is_symlink():
                    with locked(target.parent):  # otherwise, the file that it points to would be replaced
                        self._free_name(target, run.id)
            except (CheckpointError, OSError) as error:
                failure = error
        if target.suffix == ".orbax":
            is_of_another = AllOrNone(f"name {target.name}").sync(failure, is_of_another)
        elif failure is not None:
            raise failure
        if is_of_another and not self._has_warned:
            self._has_warned = True
            warn(
                f"`{target}` is of another run, which may be saving in this directory too. Of the checkpoints whose "
                f"steps this run saves, only the last one of the other run is kept, under another name. Use a "
                f"directory of its own for each run."
            )


def warn_of_state(step: int | None) -> None:
    """Warns that the state of ``step`` was not saved because it is not finite; does nothing for None."""
    if step is not None:
        warn(f"the state is not finite any more at step {step}; it was not saved, and earlier checkpoints stay.")
