"""Ending a run that has stopped improving."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from trainer.callbacks.base import Callback
from trainer.callbacks.monitor import Monitor
from trainer.errors import ArgumentError, check_count


class EarlyStopping(Callback):
    """Ends the run after the epoch in which a metric has not improved ``patience`` times in a row.

    A metric named ``val_…`` is judged at every validation, any other at the end of every epoch. What
    it has seen travels with checkpoints, so a resumed run stops where it would have. Another call of
    ``train`` starts anew.

    Args:
        monitor: The metric.
        mode: "min" or "max", whichever is better.
        patience: How many judgements in a row without an improvement end the run. NaN is none.
        min_delta: By how much more than this a value must be better to be an improvement.

    Attributes:
        best_score: The best value so far, None before the first that is a number.
        stopped_step: The updates finished when it decided to end the run, None if it did not.

    Raises:
        ArgumentError: An argument cannot be used; during a run, when nothing measures the metric.
    """

    best_score: float | None
    stopped_step: int | None

    def __init__(
        self,
        monitor: str = "val_loss",
        mode: Literal["min", "max"] = "min",
        patience: int = 3,
        min_delta: float = 0.0,
    ) -> None:
        self._monitor = Monitor(monitor, mode)
        self._patience = check_count(patience, "patience")
        if not 0 <= min_delta < math.inf:
            raise ArgumentError(f"`min_delta` is {min_delta!r}; it must be zero or more, and finite.")
        self._min_delta = float(min_delta)
        self._restored = False
        self._start()

    def on_train_begin(self, trainer: Any) -> None:
        del trainer
        if not self._restored:
            self._start()
        self._restored = False

    def on_validation_end(self, trainer: Any, logs: dict[str, float]) -> None:
        if self._monitor.of_validation:
            self._judge(trainer, logs)

    def on_epoch_end(self, trainer: Any, epoch: int, logs: dict[str, float]) -> None:
        del epoch
        if not self._monitor.of_validation:
            self._judge(trainer, logs)

    def state_dict(self) -> dict[str, Any]:
        """Returns what it has seen, as plain values."""
        return {"best_score": self.best_score, "waited": self._waited, "stopped_step": self.stopped_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from what another has seen."""
        self.best_score, self._waited = state["best_score"], state["waited"]
        self.stopped_step = state["stopped_step"]
        self.should_stop = self.stopped_step is not None
        self._restored = True

    def _start(self) -> None:
        self.best_score = self.stopped_step = None
        self.should_stop = False
        self._waited = 0

    def _judge(self, trainer: Any, logs: Mapping[str, float]) -> None:
        score = self._monitor.read(logs)
        rank = self._monitor.rank
        best = -math.inf if self.best_score is None else rank(self.best_score)
        if rank(score) > best + (self._min_delta if best > -math.inf else 0.0):
            self.best_score, self._waited = score, 0
            return
        self._waited += 1
        if self._waited >= self._patience and not self.should_stop:
            self.should_stop, self.stopped_step = True, trainer.step
