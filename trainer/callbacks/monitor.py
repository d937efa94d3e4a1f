"""`Monitor`: the metric that a callback watches, and how its values rank; `Checking`: when it is read."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from trainer.callbacks.base import Callback, flatten, handles
from trainer.core.checks import did_you_mean
from trainer.errors import ArgumentError
from trainer.loggers.base import prefixed


class Monitor:
    """Reads a metric from the logs of an event, and ranks its values.

    A name that begins with ``val_`` is a validation average. It is read when the validation ends, so that the
    value belongs to the current state. Any other name is an average over an epoch.

    Args:
        name: The metric.
        mode: "min" or "max": whether smaller or larger values are better.

    Attributes:
        of_validation: Whether the metric is a validation average.
        latest: The value read last in this run; None before the first.

    Raises:
        ArgumentError: ``mode`` is invalid.
    """

    def __init__(self, name: str, mode: Literal["min", "max"]) -> None:
        if mode not in ("min", "max"):
            raise ArgumentError(f"`mode` is {mode!r}; it must be 'min' or 'max', whichever is better of {name!r}.")
        self.name = name
        self.mode = mode
        self.of_validation = name.startswith("val_")
        self.latest: float | None = None
        self._is_known = self.of_validation

    def check_run(self, trainer: Any) -> None:
        """Checks before a run trains that it can measure the metric.

        Raises:
            ArgumentError: The metric comes from validation, but the run has no validation data.
        """
        self.latest = None
        if self.of_validation and not getattr(trainer, "validates", True):
            raise ArgumentError(
                f"`monitor` is {self.name!r}, but this run validates on nothing; pass `val_data`, or watch "
                f"an average of training."
            )

    def check_call(self, trainer: Any, logs: Mapping[str, Any]) -> None:
        """Checks at the first ``on_call_end``, rather than after an epoch, that a training metric is measured.

        Raises:
            ArgumentError: The step does not report it, and no callback might add it to the logs of the epoch.
        """
        if self._is_known:
            return
        self._is_known = True
        if self.name not in logs and not _adds_to_logs(trainer):
            raise self._unknown(logs)

    def read(self, logs: Mapping[str, Any]) -> float:
        """Returns the value, from the logs of ``on_validation_end`` or ``on_epoch_end``.

        Raises:
            ArgumentError: The metric is not in the logs.
        """
        known = prefixed("val_", logs) if self.of_validation else logs
        if self.name not in known:
            raise self._unknown(known)
        if isinstance(known[self.name], list):
            raise ArgumentError(f"`monitor` is {self.name!r}, which is an array; watch a metric that is a number.")
        self.latest = float(known[self.name])
        return self.latest

    def rank(self, value: float) -> float:
        """Returns a number that is larger for a better value, and smallest for NaN."""
        if math.isnan(value):
            return -math.inf
        return -value if self.mode == "min" else value

    def _unknown(self, known: Mapping[str, Any]) -> ArgumentError:
        near = did_you_mean(self.name, set(known) - {"step"})
        return ArgumentError(f"`monitor` is {self.name!r}, which nothing measured; {near}")


class Checking(Callback):
    """A callback that checks a metric whenever it is measured: at every validation, or at the end of every epoch."""

    _monitor: Monitor

    def on_call_end(self, trainer: Any, step: int, logs: Mapping[str, Any]) -> None:
        del step
        self._monitor.check_call(trainer, logs)

    def on_validation_end(self, trainer: Any, logs: dict[str, float]) -> None:
        if self._monitor.of_validation:
            self._check(trainer, logs)

    def on_epoch_end(self, trainer: Any, epoch: int, logs: dict[str, float]) -> None:
        del epoch
        if not self._monitor.of_validation:
            self._check(trainer, logs)

    def _check(self, trainer: Any, logs: Mapping[str, float]) -> None:
        """Called with the logs that hold the metric."""


def _adds_to_logs(trainer: Any) -> bool:
    given = (getattr(trainer, "callbacks", ()), *getattr(trainer, "extensions", {}).values())
    ours = __name__.rpartition(".")[0]
    return any(handles(one, "on_epoch_end") and not type(one).__module__.startswith(ours) for one in flatten(given))
