"""The best checkpoints of a run, and its newest, kept by Orbax."""

import functools
import math
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from trainer.callbacks import Callback
from trainer.errors import ArgumentError, CheckpointError, check_count
from trainer.monitors import Monitor
from trainer.orbax_format import OrbaxDirectory, save_args


class ModelCheckpoint(Callback):
    """Saves whole states in a directory that Orbax manages: the best by a metric, and the newest.

    Each is a directory ``dirpath/<step>``, whole or not there, for ``load_checkpoint(path)`` and
    ``train(..., resume=path)``; arrays that are sharded over devices or processes are saved from
    where they are, and never gathered. A metric named ``val_…`` is judged, and the state saved, when
    a validation ends, so the score is that of the very state it is saved with; any other at the end
    of an epoch. It hears of an event after all other callbacks, whose states it saves.

    A state that is not finite is not saved. A score that is NaN is worse than any number.

    Args:
        dirpath: The directory. It is made at the first save.
        monitor: The metric.
        mode: "min" or "max", whichever is better.
        save_top_k: How many of the best to keep; -1 keeps all, 0 none.
        save_last: Whether to keep the newest as well. It is saved at the end of an epoch even where
            nothing was judged.
        every_n_epochs: Save in every n-th epoch only.
        background: Whether training goes on as soon as the arrays are copied. A save that fails
            raises at the next event here, or at the end of the run.

    Raises:
        ArgumentError: An argument cannot be used; during a run, when nothing measures the metric.
        CheckpointError: A save failed, this one or the one before; what was saved earlier is there.

    Example::

        best = ModelCheckpoint("runs/best", monitor="val_accuracy", mode="max", save_top_k=1)
        Trainer(..., callbacks=[best]).train(data, 10, 128, val_data=held_out)
        other.load_checkpoint(best.best_model_path)
    """

    comes_last = True

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
            raise ArgumentError(f"`save_top_k` is {save_top_k!r}; it must be -1 for all, 0, or a positive integer.")
        self.dirpath = Path(dirpath).absolute()  # Orbax takes no other
        self._monitor = Monitor(monitor, mode)
        self._save_top_k = save_top_k
        self._save_last = save_last
        self._every_n_epochs = check_count(every_n_epochs, "every_n_epochs")
        self._background = background
        self._manager: Any = None
        self._scores: dict[int, float | None] = {}
        self._epoch = 0
        self._judged_step = -1
        self._last_is_due = False

    @property
    def best_model_path(self) -> Path | None:
        """The checkpoint with the best score, None while there is none. Waits for a save under way."""
        steps = [step for step in self._finished() if not math.isnan(self._score(step))]
        return self.dirpath / str(max(steps, key=self._order)) if steps else None

    @property
    def best_model_score(self) -> float | None:
        """The score of the best checkpoint, None while there is none. Waits for a save under way."""
        best = self.best_model_path
        return None if best is None else self._scores[int(best.name)]

    @property
    def last_model_path(self) -> Path | None:
        """The newest checkpoint, None while there is none. Waits for a save under way."""
        steps = self._finished()
        return self.dirpath / str(max(steps)) if steps else None

    def on_train_begin(self, trainer: Any) -> None:
        self._judged_step, self._last_is_due = -1, False
        later = [step for step in self._open().all_steps() if step > trainer.step]
        if later:
            warnings.warn(
                f"`dirpath` `{self.dirpath}` holds checkpoints up to step {max(later)}, later than this run's step "
                f"{trainer.step}: they count among the best until this run replaces them. Give a run from the start "
                f"a directory of its own.",
                stacklevel=2,
            )

    def on_epoch_begin(self, trainer: Any, epoch: int) -> None:
        self._save_as_last(trainer)
        self._epoch = epoch

    def on_validation_end(self, trainer: Any, logs: dict[str, float]) -> None:
        if self._monitor.of_validation:
            self._judge(trainer, logs)

    def on_epoch_end(self, trainer: Any, epoch: int, logs: dict[str, float]) -> None:
        del epoch
        if self._monitor.of_validation:
            # The validation at the end of a run is still to come, and would save this state with its score.
            self._last_is_due = self._save_last and self._is_due() and self._judged_step != trainer.step
            self._refuse_a_run_without_validation(trainer)
        else:
            self._judge(trainer, logs)

    def on_train_end(self, trainer: Any) -> None:
        self._save_as_last(trainer)
        self.wait()

    def wait(self) -> None:
        """Waits for a save under way.

        Raises:
            CheckpointError: It failed.
        """
        if self._manager is not None:
            self._calling_orbax(self._manager.wait_until_finished)

    def _judge(self, trainer: Any, logs: dict[str, float]) -> None:
        score = self._monitor.read(logs)
        if self._is_due():
            self._judged_step, self._last_is_due = trainer.step, False
            self._save(trainer, score)

    def _save_as_last(self, trainer: Any) -> None:
        if self._last_is_due:
            self._last_is_due = False
            self._save(trainer, None)

    def _is_due(self) -> bool:
        return (self._epoch + 1) % self._every_n_epochs == 0

    def _refuse_a_run_without_validation(self, trainer: Any) -> None:
        if not trainer.validates:
            raise ArgumentError(
                f"`monitor` is {self._monitor.name!r}, but this run validates on nothing; pass `val_data`, or watch "
                f"an average of training."
            )

    def _save(self, trainer: Any, score: float | None) -> None:
        manager, step = self._open(), trainer.step
        after = [*(known for known in manager.all_steps() if known != step), step]
        self._scores[step] = score
        if not self._kept(after)[-1]:
            return
        if not bool(trainer.state.is_finite()):
            warnings.warn(f"the state is not finite at step {step}; `{self.dirpath}` keeps what it has.", stacklevel=3)
            return
        snapshot = trainer.snapshot()
        arguments = save_args({**snapshot.info, "monitor": self._monitor.name, "score": score}, snapshot.leaves)
        if step in manager.all_steps():
            self.wait()  # it may be the one that is under way
            self._calling_orbax(functools.partial(manager.delete, step))
        self._calling_orbax(functools.partial(manager.save, step, args=arguments, force=True))
        if not self._background:
            self.wait()

    def _calling_orbax(self, call: Any) -> None:
        try:
            call()
        except Exception as error:  # anything at all that went wrong on the disk
            # What Orbax believes to be there is not; it is asked again when next needed.
            self._manager = None
            reason = " ".join(str(error).split())[:300]
            raise CheckpointError(
                f"a checkpoint in `{self.dirpath}` could not be written ({type(error).__name__}: {reason}); earlier "
                f"ones are as they were."
            ) from error

    def _open(self) -> Any:
        if self._manager is None:
            import orbax.checkpoint as ocp

            options = ocp.CheckpointManagerOptions(preservation_policy=self, cleanup_tmp_directories=True)
            self._manager = ocp.CheckpointManager(self.dirpath, options=options)
            self._scores = {step: self._score_on_disk(step) for step in self._manager.all_steps()}
        return self._manager

    def _score_on_disk(self, step: int) -> float | None:
        try:
            with OrbaxDirectory(self.dirpath / str(step)) as directory:
                score = directory.info.get("score")
                same = directory.info.get("monitor") == self._monitor.name
        except CheckpointError:  # to be found out by whoever loads it
            return None
        return float(score) if same and isinstance(score, int | float) else None

    def _finished(self) -> list[int]:
        if self._manager is None and not self.dirpath.is_dir():
            return []
        self.wait()
        return list(self._open().all_steps())

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Tells Orbax what to keep, see ``orbax.checkpoint.checkpoint_managers.PreservationPolicy``."""
        del context
        return self._kept([checkpoint.step for checkpoint in checkpoints])

    def _kept(self, steps: Sequence[int]) -> list[bool]:
        """Tells of each step whether it stays: the best, and the last of the list."""
        judged = sorted((step for step in steps if self._scores.get(step) is not None), key=self._order, reverse=True)
        best = set(steps if self._save_top_k < 0 else judged[: self._save_top_k])
        return [step in best or (self._save_last and step == steps[-1]) for step in steps]

    def _order(self, step: int) -> tuple[float, int]:
        # Of two that are equally good the earlier one is better: it was there, and cost less.
        return self._monitor.rank(self._score(step)), -step

    def _score(self, step: int) -> float:
        score = self._scores.get(step)
        return math.nan if score is None else score
