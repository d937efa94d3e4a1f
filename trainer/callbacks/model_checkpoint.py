"""The best checkpoints of a run, and its newest, as directories of Orbax."""

import math
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import jax

from trainer.callbacks.base import Callback
from trainer.callbacks.monitor import Monitor
from trainer.checkpoints.atomic import remove_directory
from trainer.checkpoints.background import BackgroundSaver
from trainer.checkpoints.orbax_directory import OrbaxDirectory, begin_directory
from trainer.distributed.start import AllOrNone
from trainer.errors import ArgumentError, CheckpointError, check_count


class ModelCheckpoint(Callback):
    """Saves whole states in a directory, in the format of Orbax: the best by a metric, and the newest.

    Each is a directory ``dirpath/<step>``, whole or not there, for ``load_checkpoint(path)`` and
    ``train(..., resume=path)``; arrays that are sharded over devices or processes are saved from
    where they are, and never gathered. A metric named ``val_…`` is judged, and the state saved, when
    a validation ends, so the score is that of the very state it is saved with; any other at the end
    of an epoch. It hears of an event after all other callbacks, whose states it saves. Where there are
    several processes, each has one, with the same ``dirpath``, and all decide alike.

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

    runs_last = True

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
        self.dirpath = Path(dirpath).absolute()
        self._monitor = Monitor(monitor, mode)
        self._save_top_k = save_top_k
        self._save_last = save_last
        self._every_n_epochs = check_count(every_n_epochs, "every_n_epochs")
        self._background = background
        self._saver = BackgroundSaver()
        self._scores: dict[int, float | None] | None = None  # of what is there, None where that is not known
        self._epoch = 0
        self._judged_step = -1
        self._last_is_due = False

    @property
    def best_model_path(self) -> Path | None:
        """The checkpoint with the best score, None while there is none. Waits for a save under way."""
        scores = self._finished()
        steps = [step for step in scores if not math.isnan(_number(scores[step]))]
        return self.dirpath / str(max(steps, key=lambda step: self._order(step, scores))) if steps else None

    @property
    def best_model_score(self) -> float | None:
        """The score of the best checkpoint, None while there is none. Waits for a save under way."""
        best = self.best_model_path
        return None if best is None else self._finished()[int(best.name)]

    @property
    def last_model_path(self) -> Path | None:
        """The newest checkpoint, None while there is none. Waits for a save under way."""
        steps = self._finished()
        return self.dirpath / str(max(steps)) if steps else None

    def on_train_begin(self, trainer: Any) -> None:
        self._monitor.check_run(trainer)
        self._judged_step, self._last_is_due = -1, False
        self.wait()
        self._scores = None
        later = [step for step in self._known() if step > trainer.step]
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
        try:
            self._saver.wait()
        except Exception:
            self._scores = None
            raise

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

    def _save(self, trainer: Any, score: float | None) -> None:
        self.wait()
        step = trainer.step
        scores = {known: judged for known, judged in self._known().items() if known != step}
        scores[step] = score
        kept = self._kept(scores)
        if step not in kept:
            return
        if not bool(trainer.state.is_finite()):
            warnings.warn(f"the state is not finite at step {step}; `{self.dirpath}` keeps what it has.", stacklevel=3)
            return
        snapshot = trainer.snapshot()
        info = {**snapshot.info, "monitor": self._monitor.name, "score": score}
        finish = begin_directory(self.dirpath / str(step), info, snapshot.leaves)

        def write() -> None:
            finish()
            for known in scores.keys() - kept if jax.process_index() == 0 else ():
                remove_directory(self.dirpath / str(known))

        self._scores = {known: scores[known] for known in scores if known in kept}
        self._saver.start(write)
        if not self._background:
            self.wait()

    def _known(self) -> dict[int, float | None]:
        """Returns the scores of the checkpoints that are there, of which process 0 tells the others."""
        if self._scores is None:
            self._scores = {
                int(step): score for step, score in AllOrNone("list").sync(None, list(self._on_disk().items()))
            }
        return self._scores

    def _finished(self) -> dict[int, float | None]:
        self.wait()
        return self._on_disk() if self._scores is None else self._scores

    def _on_disk(self) -> dict[int, float | None]:
        names = os.listdir(self.dirpath) if self.dirpath.is_dir() else []
        return {int(name): self._score_on_disk(name) for name in sorted(filter(str.isdecimal, names), key=int)}

    def _score_on_disk(self, name: str) -> float | None:
        try:
            with OrbaxDirectory(self.dirpath / name) as directory:
                score = directory.info.get("score")
                same = directory.info.get("monitor") == self._monitor.name
        except CheckpointError:  # to be found out by whoever loads it
            return None
        return float(score) if same and isinstance(score, int | float) else None

    def _kept(self, scores: Mapping[int, float | None]) -> set[int]:
        """Returns the steps that stay: the best, and the last of the mapping."""
        if self._save_top_k < 0:
            return set(scores)
        judged = [step for step in scores if scores[step] is not None]
        best = sorted(judged, key=lambda step: self._order(step, scores), reverse=True)[: self._save_top_k]
        return {*best, *list(scores)[-1:]} if self._save_last else set(best)

    def _order(self, step: int, scores: Mapping[int, float | None]) -> tuple[float, int]:
        # Of two that are equally good the earlier one is better: it was there, and cost less.
        return self._monitor.rank(_number(scores[step])), -step


def _number(score: float | None) -> float:
    return math.nan if score is None else score
