"""Throughput of epochs: where it is recorded when an epoch ends."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from trainer.fit.plan import FitPlan
from trainer.fit.run_file import write_speeds
from trainer.metrics.throughput import Meter

_COMPILING = 0.1
"""The largest fraction of an epoch's time spent on compilation for which its throughput is kept."""

_WRITE_EVERY = 5.0
"""Minimum seconds between two writes of `run.json` within a call; a write takes milliseconds."""


def note_speed(trainer: Any, meter: Meter) -> None:
    """Records the throughput of the epoch that has just ended, for ``trainer.throughput``, plots and loggers."""
    setup, run = trainer.setup, trainer.run
    setup.live.throughput = speed = meter.read(run.leaves[0].sharding.device_set)
    # Compilation would dominate the curve; an epoch resumed after its last batch has no steps.
    if speed.steps_per_second and meter.compiling <= _COMPILING:
        history = run.history.copy()
        history.know_speed(run.step, speed.steps_per_second)
        trainer.hold(run.replace(history=history))
    setup.fanout.log_throughput(run.step, speed)
    if time.monotonic() - setup.live.speeds_written >= _WRITE_EVERY:
        _write(trainer)


@contextlib.contextmanager
def speeds_written(trainer: Any, plan: FitPlan) -> Iterator[None]:
    """Writes the throughput of a call's epochs to `run.json` during the block and at its end, also if it raises.

    Consecutive calls of ``train_epoch`` write at most once a second.
    """
    live = trainer.setup.live
    if plan.caller == "train":
        live.speeds_written = time.monotonic()
    try:
        yield
    finally:
        if plan.caller == "train" or time.monotonic() - live.speeds_written >= _WRITE_EVERY / 5:
            _write(trainer)


def _write(trainer: Any) -> None:
    write_speeds(trainer.setup, trainer.run)
    trainer.setup.live.speeds_written = time.monotonic()
