"""`ModelCheckpoint`: keeps the best checkpoints of a run and the newest, as Orbax directories.

It does not use `orbax.checkpoint.CheckpointManager` with ``BestN`` and ``LatestN``, which (0.12.8) treats every
directory with a numeric name as its own and then silently skips saves at earlier steps, deletes the best
checkpoint once a score is NaN, fails if the monitor changes, and cannot replace the checkpoint of a step that a
resumed run reaches again. (Saving 1,000 floats blocks for 10 ms there and 7 ms here; a whole save takes 40 ms
there and 108 ms here, including a flush to disk.)
"""

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax

from trainer.callbacks.base import flatten
from trainer.callbacks.monitor import Checking, Monitor
from trainer.checkpoints.atomic import locked, remove, restore
from trainer.checkpoints.background import BackgroundSaver
from trainer.checkpoints.listing import aside, keep_aside
from trainer.checkpoints.names import refuse_file_name
from trainer.checkpoints.orbax_directory import OrbaxDirectory, begin_directory
from trainer.core.checks import check_count
from trainer.core.other_names import takes_no
from trainer.distributed.agreement import AllOrNone
from trainer.errors import ArgumentError, CheckpointError, warn
from trainer.paths import in_home

# Only names that this callback would write: "007" is not the checkpoint of step 7.
_NAME = re.compile(r"(0|[1-9]\d*)(\.[0-9a-f]{16})?", re.ASCII)


class ModelCheckpoint(Checking):
    """Saves whole states to a directory, in Orbax format: the best by a metric, and the newest.

    Each checkpoint is an atomic directory ``dirpath/<step>``, for ``load_checkpoint(path)`` and
    ``train(..., resume=path)``. Arrays sharded over devices or processes are saved from their devices and
    never gathered. For a metric named ``val_<name>``, the state is saved when a validation ends, so the score belongs
    to exactly this state; for any other metric, it is saved at the end of an epoch. With several processes, each has
    a callback with the same ``dirpath``, and all decide alike.

    The callback deletes only checkpoints that a ModelCheckpoint with the same ``monitor`` wrote in the same run,
    resumed or not. Everything else in ``dirpath`` is kept and ignored, whatever its name. Where this run saves a step
    of which another run, such as an earlier one of the same script, has a checkpoint, it replaces that, except the best
    and the last one of the other run: these are what that run was for, and are renamed to ``dirpath/<step>.<run>``.

    If a run is killed after the trainer saved a step but before this callback did, the callback decides on that step
    when the run is resumed.

    A state that is not finite is not saved. A NaN score is worse than any number.

    Args:
        dirpath: The directory. It is created at the first save.
        monitor: The metric.
        mode: "min" or "max": whether smaller or larger values are better.
        save_top_k: How many of the best to keep; -1 keeps all, 0 none.
        save_last: Whether to also keep the newest. It is saved at the end of an epoch even if the metric was not
            measured there.
        every_n_epochs: Save only in every n-th epoch.
        background: Whether training continues once the arrays are copied. If such a save fails, the callback's next
            event raises, or the end of the run.

    Raises:
        ArgumentError: An argument is invalid; at the start of a run, if it has no validation data but the
            metric comes from validation, or another ModelCheckpoint saves to ``dirpath``; during a run, if the
            metric does not exist.
        CheckpointError: A save failed, or would replace something that is not this callback's. Earlier checkpoints
            are still there.

    Example::

        best = ModelCheckpoint("runs/best", monitor="val_accuracy", mode="max", save_top_k=1)
        Trainer(..., callbacks=[best]).train(data, 10, 128, val_data=held_out)
        other.load_checkpoint(best.best_model_path)
    """

    # It saves the states of all other callbacks, so they must have handled the event first.
    runs_last = True

    @takes_no("ModelCheckpoint")
    def __init__(
        self,
        dirpath: str | os.PathLike[str],
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        save_top_k: int = 3,
        save_last: bool = True,
        every_n_epochs: int = 1,
        *,
        background: bool = True,
    ) -> None:
        if isinstance(save_top_k, bool) or not isinstance(save_top_k, int) or save_top_k < -1:
            raise ArgumentError(f"`save_top_k` is {save_top_k!r:.60}; it must be -1 for all, 0, or a positive integer.")
        self.dirpath = Path(in_home(dirpath)).absolute()
        refuse_file_name(self.dirpath)
        self._monitor = Monitor(monitor, mode)
        self._save_top_k = save_top_k
        self._save_last = save_last
        self._every_n_epochs = check_count(every_n_epochs, "every_n_epochs")
        self._background = background
        self._saver = BackgroundSaver()
        # The scores of this callback's checkpoints by name; None for one saved as the newest without a score.
        # Without a dict, the scores are unknown until the directory is read.
        self._scores: dict[str, float | None] | None = None
        self._run: str | None = None  # before the first run, checkpoints of all runs count
        self._has_warned = False
        self._epoch = 0
        self._judged_step = -1
        self._last_is_due = False

    @property
    def best_model_path(self) -> Path | None:
        """The checkpoint with the best score, or None. Waits for a save in flight."""
        best = self._best(self._finished())
        return None if best is None else self._path(best)

    def best_by(self, monitor: Monitor, run: str) -> "Best | None":
        """Returns the best checkpoint of a run. Waits for a save in flight.

        None if this callback has another metric or mode, keeps no best, or has not heard of the run.
        """
        is_same = (monitor.name, monitor.mode) == (self._monitor.name, self._monitor.mode)
        if not is_same or not self._save_top_k or self._run != run:
            return None
        scores = self._finished()
        best = self._best(scores)
        return None if best is None else Best(self._path(best), _number(scores[best]), _step(best))

    @property
    def best_model_score(self) -> float | None:
        """The score of the best checkpoint, or None. Waits for a save in flight."""
        scores = self._finished()
        best = self._best(scores)
        return None if best is None else scores[best]

    @property
    def last_model_path(self) -> Path | None:
        """The checkpoint that was written last, or None. Waits for a save in flight.

        Before this callback's first run, it is the one with the highest step.
        """
        names = list(self._finished())
        return self._path(names[-1]) if names else None

    def on_train_begin(self, trainer: Any) -> None:
        self._monitor.check_run(trainer)
        judged_step = self._judged_step
        self._judged_step, self._last_is_due = -1, False
        self.wait()
        self._run = getattr(getattr(trainer, "run", None), "id", None)
        self._check_alone(trainer)
        found = self._list()
        self._scores = self._own(found)
        others = [one.step for one in found if one.monitor != self._monitor.name and one.step > trainer.step]
        if others:
            raise ArgumentError(
                f"`dirpath` `{self.dirpath}` holds checkpoints by another metric than {self._monitor.name!r} up to "
                f"step {max(others)}, and this run starts at step {trainer.step}, so it might replace them. Use a "
                f"directory of its own for each metric."
            )
        later = [step for step in map(_step, self._scores) if step > trainer.step]
        if later and getattr(trainer, "is_new_run", True):  # a resumed run reaches the same steps again
            warn(
                f"`dirpath` `{self.dirpath}` holds checkpoints up to step {max(later)}, later than this run's step "
                f"{trainer.step}: they count among the best until this run replaces them. Use a directory of its own "
                f"for a run from the start."
            )
        elsewhere = [one.step for one in found if one.step > trainer.step and not self._is_same(one.run)]
        if elsewhere:
            self._has_warned = True
            warn(
                f"`dirpath` `{self.dirpath}` holds checkpoints of another run up to step {max(elsewhere)}, later than "
                f"this run's step {trainer.step}. They do not count and are kept, but where this run saves the same "
                f"step, only the best and the last of the other run, under another name. A run from the start should "
                f"have its own directory."
            )
        if judged_step != trainer.step:
            self._judge_restored(trainer)

    def on_epoch_begin(self, trainer: Any, epoch: int) -> None:
        self._save_as_last(trainer)
        self._epoch = epoch

    def on_epoch_end(self, trainer: Any, epoch: int, logs: dict[str, float]) -> None:
        del epoch
        if self._monitor.of_validation:
            # Deferred to the next epoch or the end of the run: a validation of this very step may still come, and
            # then the state is saved with its score.
            self._last_is_due = self._save_last and self._is_due() and self._judged_step != trainer.step
        else:
            self._check(trainer, logs)

    def on_train_end(self, trainer: Any) -> None:
        self._save_as_last(trainer)
        self.wait()

    def wait(self) -> None:
        """Waits for a save in flight.

        Raises:
            CheckpointError: The save failed.
        """
        try:
            self._saver.wait()
        except Exception:
            self._scores = None
            raise

    def _check(self, trainer: Any, logs: Mapping[str, float]) -> None:
        score = self._monitor.read(logs)
        if self._is_due():
            self._judged_step, self._last_is_due = trainer.step, False
            self._save(trainer, score)

    def _judge_restored(self, trainer: Any) -> None:
        """Decides on the state that a run resumes from, if it was measured and no checkpoint here holds its score."""
        run = getattr(trainer, "run", None)
        if run is None or run.is_new:
            return
        if any(_step(name) == run.step and score is not None for name, score in self._known().items()):
            self._judged_step = run.step
            return
        is_over = run.batch == 0  # the epoch is already counted
        self._epoch = run.epoch - is_over
        if not self._monitor.of_validation:
            if is_over:
                self._check(trainer, run.average.compute())
        elif run.validation is not None and run.validation.step == run.step:
            self._check(trainer, dict(run.validation.averages))

    def _save_as_last(self, trainer: Any) -> None:
        if self._last_is_due:
            self._last_is_due = False
            self._save(trainer, None)

    def _is_due(self) -> bool:
        return (self._epoch + 1) % self._every_n_epochs == 0

    def _save(self, trainer: Any, score: float | None) -> None:
        self.wait()
        step, name = trainer.step, str(trainer.step)
        scores = {known: judged for known, judged in self._known().items() if _step(known) != step}
        scores[name] = score
        kept = self._kept(scores)
        if name not in kept:
            return
        if not bool(trainer.state.is_finite()):
            warn(f"the state is not finite at step {step}; `{self.dirpath}` keeps what it has.")
            return
        self._check_name(name)
        snapshot = trainer.snapshot()
        info = {**snapshot.info, "monitor": self._monitor.name, "score": score}
        finish = begin_directory(self.dirpath / name, info, snapshot.leaves, lambda: self._free_name(name))
        setup = getattr(trainer, "setup", None)

        def write() -> None:
            finish()  # before deleting anything, so that a failed save loses nothing
            if setup is not None:
                setup.checkpointer.add_complete(self.dirpath / name, step)
            if jax.process_index() == 0:
                # With what this run saved at the same step before, and another run has renamed.
                dropped = [path for known in scores.keys() - kept for path in self._places(known)]
                self._remove([*dropped, *self._places(name)[1:]])

        self._scores = {known: scores[known] for known in scores if known in kept}
        self._saver.start(write)
        if not self._background:
            self.wait()

    def _remove(self, paths: Iterable[Path]) -> None:
        with locked(self.dirpath):  # so that no other run takes the name between the comparison and the removal
            for path in paths:
                # Another run in the same directory may have replaced it.
                found = _read(path) if path.exists() else None
                if found is not None and found.monitor == self._monitor.name and self._is_same(found.run):
                    remove(path)

    def _check_alone(self, trainer: Any) -> None:
        """Refuses a run in which two such callbacks would replace each other's checkpoints."""
        callbacks = flatten([getattr(trainer, "callbacks", None)])
        same = [one for one in callbacks if isinstance(one, ModelCheckpoint) and one.dirpath == self.dirpath]
        if any(one is not self for one in same):
            raise ArgumentError(
                f"`dirpath` `{self.dirpath}` is that of two callbacks; use a directory of its own for each."
            )

    def _check_name(self, name: str) -> None:
        """Refuses, in all processes, to replace a directory that is not a checkpoint of this callback."""
        path = self.dirpath / name
        failure: Exception | None = None
        if jax.process_index() == 0 and os.path.lexists(path):
            found = _read(path)
            if found is None or found.monitor != self._monitor.name:
                failure = CheckpointError(
                    f"`{path}` is no checkpoint that a ModelCheckpoint with monitor {self._monitor.name!r} wrote, and "
                    f"is not replaced; use another `dirpath`, or move it away."
                )
            elif not self._is_same(found.run) and not self._has_warned:
                self._has_warned = True
                warn(
                    f"`{path}` is of another run, which may be saving in `dirpath` too. Of the checkpoints whose steps "
                    f"this run saves, only the best and the last of the other run are kept, under another name. Use a "
                    f"directory of its own for each run."
                )
            if failure is None and path.is_symlink():  # otherwise, the directory that it points to would be replaced
                try:
                    with locked(self.dirpath):
                        self._free_name(name)
                except (CheckpointError, OSError) as error:
                    failure = error
        AllOrNone(f"name {path.name}").sync(failure)

    def _free_name(self, name: str) -> None:
        """Keeps another run's checkpoint of this name aside if it is the best or the last of that run."""
        found = _read(self.dirpath / name)
        if found is None or found.run is None or self._is_same(found.run):
            return
        scores = {one.name: one.score for one in self._on_disk() if one[1:3] == (found.monitor, found.run)}
        if name in (self._best(scores), *list(scores)[-1:]):
            keep_aside(self.dirpath / name, found.run)

    def _path(self, name: str) -> Path:
        """Returns the path of a checkpoint of this run, which another run may have renamed."""
        path, *renamed = self._places(name)
        is_taken = bool(renamed) and renamed[0].exists() and ((found := _read(path)) is None or found.run != self._run)
        return renamed[0] if is_taken else path

    def _places(self, name: str) -> list[Path]:
        """Returns where a checkpoint of this run may be: under its name, or where another run has renamed it to."""
        path = self.dirpath / name
        return [path] if self._run is None else [path, aside(path, self._run)]

    def _known(self) -> dict[str, float | None]:
        """Returns the scores of this callback's checkpoints, in step order, the same in all processes."""
        if self._scores is None:
            self._scores = self._own(self._list())
        return self._scores

    def _finished(self) -> dict[str, float | None]:
        self.wait()
        return self._own(self._on_disk()) if self._scores is None else self._scores

    def _own(self, found: Sequence["_Found"]) -> dict[str, float | None]:
        return {one.name: one.score for one in found if one.monitor == self._monitor.name and self._is_same(one.run)}

    def _is_same(self, run: str | None) -> bool:
        """Tells whether a checkpoint is from this run; checkpoints older than run ids count as such."""
        return self._run is None or run is None or run == self._run

    def _list(self) -> list["_Found"]:
        # Process 0 decides what exists: on a shared file system, the others may see changes later.
        agreement = AllOrNone(f"list {self.dirpath.name}")
        found = agreement.sync(None, self._on_disk() if jax.process_index() == 0 else None)
        return [_Found(*one) for one in found]

    def _on_disk(self) -> list["_Found"]:
        """Returns the checkpoints of every ModelCheckpoint, in step order; of one step, a renamed one is first.

        Of a run that saved a step again after another run had renamed its checkpoint of that step, only the new one
        counts.
        """
        restore(self.dirpath)  # otherwise, a save killed while replacing a checkpoint would hide it
        names = os.listdir(self.dirpath) if self.dirpath.is_dir() else []
        names = sorted(filter(_NAME.fullmatch, names), key=lambda name: (_step(name), -len(name), name))
        found = [one for one in (_read(self.dirpath / name) for name in names) if one is not None]
        latest = {(one.step, one.run, one.monitor): one for one in found}
        return [one for one in found if one is latest[one.step, one.run, one.monitor]]

    def _kept(self, scores: Mapping[str, float | None]) -> set[str]:
        """Returns the names to keep: the best, and the last one in the mapping."""
        if self._save_top_k < 0:
            return set(scores)
        judged = [name for name in scores if scores[name] is not None]
        best = sorted(judged, key=lambda name: self._order(name, scores), reverse=True)[: self._save_top_k]
        return {*best, *list(scores)[-1:]} if self._save_last else set(best)

    def _best(self, scores: Mapping[str, float | None]) -> str | None:
        """Returns the name with the best score that is a number, or None."""
        names = [name for name in scores if not math.isnan(_number(scores[name]))]
        return max(names, key=lambda name: self._order(name, scores), default=None)

    def _order(self, name: str, scores: Mapping[str, float | None]) -> tuple[float, int]:
        # Of equal scores, the earlier one wins: its checkpoint exists, and training longer gained nothing.
        return self._monitor.rank(_number(scores[name])), -_step(name)


class Best(NamedTuple):
    """The best checkpoint of a run: its path, score and step."""

    path: Path
    score: float
    step: int


class _Found(NamedTuple):
    """A checkpoint of a ModelCheckpoint: its name in the directory, and what it says of itself."""

    name: str
    monitor: str
    run: str | None
    score: float | None

    @property
    def step(self) -> int:
        return _step(self.name)


def _read(path: Path) -> _Found | None:
    """Returns what a checkpoint says of itself; None if unreadable or not written by a ModelCheckpoint."""
    try:
        with OrbaxDirectory(path) as directory:
            monitor, score, run = directory.info["monitor"], directory.info["score"], directory.info.get("run")
    except (CheckpointError, KeyError):
        return None
    if not isinstance(monitor, str) or not isinstance(score, int | float | None):
        return None
    return _Found(path.name, monitor, run if isinstance(run, str) else None, None if score is None else float(score))


def _step(name: str) -> int:
    return int(name.partition(".")[0])


def _number(score: float | None) -> float:
    return math.nan if score is None else score
