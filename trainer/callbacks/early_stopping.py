"""`EarlyStopping`: ends a run when a metric stops improving."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from trainer.callbacks.base import flatten
from trainer.callbacks.monitor import Checking, Monitor
from trainer.checkpoints import load_state
from trainer.core.checks import check_count
from trainer.core.other_names import takes_no
from trainer.errors import ArgumentError, warn
from trainer.state import TrainState


class EarlyStopping(Checking):
    """Ends the run when a metric has not improved for ``patience`` checks in a row, or reaches a threshold.

    A metric named ``val_<name>`` is checked at every validation, any other metric at the end of every epoch. The run
    ends after the epoch of the deciding check. The best score and the count are saved in checkpoints, so a
    resumed run stops where the interrupted run would have stopped. A new run starts without them.

    Args:
        monitor: The metric.
        mode: "min" or "max": whether a smaller or a larger value is better.
        patience: The number of checks in a row without an improvement that ends the run.
        min_delta: A value counts as an improvement if it is better than the best score by more than this.
        check_finite: Whether NaN or infinity ends the run. If not, NaN does not count as an improvement.
        stopping_threshold: A value at least as good as this ends the run.
        divergence_threshold: A value worse than this ends the run.
        restore_best: Whether to restore the params and the model state of the best score at the end of the run, early
            or not; with ``eval_params`` also the optimizer state, from which those are computed. Calls to
            ``train_epoch`` end a run after ``TrainingConfig.num_epochs`` epochs; a loop of another length ends, and
            restores them, in ``trainer.close()`` or at the end of ``with Trainer(...)``, unless an exception leaves
            it or the params have changed since the last call. Everything else stays the latest, including the result
            of `train` and the checkpoint at the end of the run. The callback keeps a copy of the best parts, which is
            not in checkpoints: a resumed run that finds nothing better takes them from a `ModelCheckpoint` of the
            same metric; without one it warns and restores nothing.

    Attributes:
        best_score: The best value so far; None before the first value that is not NaN.
        best_step: The number of updates at the best value, or None.
        stopped_step: The number of updates when it decided to end the run; None if it has not.
        stopped_epoch: The number of the epoch in which it decided that, from 0, or None.
        reason: A text with the reason and the best score, or None. It is sent to the trainer's loggers.

    Raises:
        ArgumentError: An argument cannot be used; at the start of a run, if it monitors a validation metric and the
            run has no validation data; during a run, if the metric does not exist.
    """

    best_score: float | None
    best_step: int | None
    stopped_step: int | None
    stopped_epoch: int | None
    reason: str | None
    _best: dict[str, Any] | None  # the parts of the state to restore

    @takes_no("EarlyStopping")
    def __init__(
        self,
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        patience: int = 10,
        min_delta: float = 0.0,
        *,
        check_finite: bool = True,
        stopping_threshold: float | None = None,
        divergence_threshold: float | None = None,
        restore_best: bool = False,
    ) -> None:
        self._monitor = Monitor(monitor, mode)
        self._patience = check_count(
            patience, "patience", otherwise="; 1 ends at the first check without an improvement"
        )
        if not 0 <= min_delta < math.inf:
            raise ArgumentError(f"`min_delta` is {min_delta!r}; it must be zero or more, and finite.")
        self._min_delta = float(min_delta)
        self._check_finite = check_finite
        self._stopping_threshold = _threshold(stopping_threshold, "stopping_threshold")
        self._divergence_threshold = _threshold(divergence_threshold, "divergence_threshold")
        self._restore_best = restore_best
        self._is_restored = False
        self._epoch: int | None = None
        self._start()

    def on_train_begin(self, trainer: Any) -> None:
        self._monitor.check_run(trainer)
        # A resumed run continues the count, and so does a new run right after a checkpoint was loaded.
        if getattr(trainer, "is_new_run", True) and not self._is_restored:
            self._start()
        self._is_restored = False

    def on_epoch_begin(self, trainer: Any, epoch: int) -> None:
        del trainer
        self._epoch = epoch

    def on_train_end(self, trainer: Any) -> None:
        # Not if a signal or an exception ends a call: the run may be resumed from the trainer's current state.
        if getattr(trainer, "has_ended", self.should_stop):
            self.restore(trainer)

    def restore(self, trainer: Any, *, from_disk: bool = True) -> None:
        """Restores the best params if ``restore_best`` is set; at the end of a run the trainer has done so.

        Args:
            trainer: The trainer.
            from_disk: Whether to read the checkpoint of a `ModelCheckpoint` if the callback keeps no copy. Of several
                processes, all must call it then.
        """
        if not self._restore_best:
            return
        best, self._best = self._best, None
        if best is None and self.best_score is not None and from_disk:
            best = self._kept_on_disk(trainer)
        if best is not None:
            trainer.state = trainer.state.replace(**best)
        elif not from_disk and self.best_score is not None:
            warn(
                f"EarlyStopping does not restore the best params, those of step {self.best_step}: it keeps no copy of "
                f"them, and one of several processes may close alone. Call restore(trainer) of it in all of them."
            )
        elif self.best_score is not None:
            warn(
                f"EarlyStopping cannot restore the best params, those of step {self.best_step}: the run was resumed "
                f"after them, and checkpoints do not hold them. A trainer.ModelCheckpoint of {self._monitor.name!r} "
                f"keeps them on disk."
            )

    def _kept_on_disk(self, trainer: Any) -> dict[str, Any] | None:
        """Returns the parts to restore, from the best checkpoint of a `ModelCheckpoint` of the same metric."""
        from trainer.callbacks.model_checkpoint import ModelCheckpoint  # here, since few runs need it

        for callback in flatten([trainer.callbacks]):
            best = callback.best_by(self._monitor, trainer.run.id) if isinstance(callback, ModelCheckpoint) else None
            if best is not None:
                return _evaluated_parts(trainer, load_state(best.path, trainer.state))
        return None

    @property
    def state_key(self) -> str:
        """The name of its state in a checkpoint, the same for every callback of this class, metric and mode."""
        return f"EarlyStopping({self._monitor.name}{', max' * (self._monitor.mode == 'max')})"

    def state_dict(self) -> dict[str, Any]:
        """Returns the best score, the number of checks since then, and where it stopped, as plain values."""
        stopped = {"stopped_step": self.stopped_step, "stopped_epoch": self.stopped_epoch, "reason": self.reason}
        return {"best_score": self.best_score, "best_step": self.best_step, "waited": self._waited, **stopped}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from what `state_dict` returned."""
        self.best_score, self._waited = state["best_score"], state["waited"]
        self.stopped_step = state["stopped_step"]
        # Checkpoints of earlier versions lack these.
        self.best_step, self.stopped_epoch = state.get("best_step"), state.get("stopped_epoch")
        self.reason = state.get("reason")
        self._best = None
        self.should_stop = self.stopped_step is not None
        self._is_restored = True

    def _start(self) -> None:
        self.best_score = self.best_step = self.stopped_step = self.stopped_epoch = self.reason = None
        self.should_stop = False
        self._best = None
        self._waited = 0

    def _check(self, trainer: Any, logs: Mapping[str, float]) -> None:
        score = self._monitor.read(logs)
        rank = self._monitor.rank(score)
        best = -math.inf if self.best_score is None else self._monitor.rank(self.best_score)
        why = None
        if self._check_finite and not math.isfinite(score):
            why = "is not finite"
        elif rank > best + (self._min_delta if best > -math.inf else 0.0):
            self.best_score, self.best_step, self._waited = score, trainer.step, 0
            if self._restore_best:
                self._best = jax.tree.map(jnp.copy, _evaluated_parts(trainer, trainer.state))
        else:
            self._waited += 1
            if self._waited >= self._patience:
                why = f"has not improved in {self._waited} checks"
        if self._stopping_threshold is not None and rank >= self._monitor.rank(self._stopping_threshold):
            why = f"has reached {self._stopping_threshold:g}"
        if self._divergence_threshold is not None and rank < self._monitor.rank(self._divergence_threshold):
            why = f"is worse than {self._divergence_threshold:g}"
        if why is not None and not self.should_stop:
            self.should_stop = True
            self.stopped_step, self.stopped_epoch = trainer.step, self._epoch
            best_of_all = "none" if self.best_score is None else f"{self.best_score:.6g} at step {self.best_step}"
            self.reason = f"{self._monitor.name} = {score:.6g} {why}; best: {best_of_all}"


def _evaluated_parts(trainer: Any, state: TrainState) -> dict[str, Any]:
    """Returns the parts of a state that a validation depends on, by name."""
    parts = {"params": state.params, "model_state": state.model_state}
    return parts if trainer.setup.eval_params is None else {**parts, "opt_state": state.opt_state}


def _threshold(value: float | None, name: str) -> float | None:
    if value is not None and not math.isfinite(value):
        raise ArgumentError(f"`{name}` is {value!r}; it must be a finite number, or None for no threshold.")
    return None if value is None else float(value)
