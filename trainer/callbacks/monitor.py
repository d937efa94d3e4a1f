"""A metric that somebody watches: which one, and which way is better."""

import math
from collections.abc import Mapping
from typing import Any, Literal

from trainer.errors import ArgumentError, did_you_mean
from trainer.loggers.base import prefixed


class Monitor:
    """Reads a metric where it is measured, and tells which of two values is better.

    A name that begins with ``val_`` is that of a validation average and is read when a validation
    ends, so that it belongs to the state of that moment; any other is an average of an epoch.

    Args:
        name: The metric.
        mode: "min" or "max", whichever is better.

    Raises:
        ArgumentError: ``mode`` is something else.
    """

    def __init__(self, name: str, mode: Literal["min", "max"]) -> None:
        if mode not in ("min", "max"):
            raise ArgumentError(f"`mode` is {mode!r}; it must be 'min' or 'max', whichever is better of {name!r}.")
        self.name = name
        self.mode = mode
        self.of_validation = name.startswith("val_")

    def read(self, logs: Mapping[str, Any]) -> float:
        """Returns the value, from the logs of ``on_validation_end`` or ``on_epoch_end``.

        Raises:
            ArgumentError: There is no such metric.
        """
        known = prefixed("val_", logs) if self.of_validation else logs
        if self.name not in known:
            raise ArgumentError(
                f"`monitor` is {self.name!r}, which nothing measured; {did_you_mean(self.name, set(known) - {'step'})}"
            )
        return float(known[self.name])

    def rank(self, value: float) -> float:
        """Returns a number that is larger for a better value. NaN is worst: it is no improvement on anything."""
        if math.isnan(value):
            return -math.inf
        return -value if self.mode == "min" else value
