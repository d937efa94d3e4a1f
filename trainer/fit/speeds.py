"""The speed of an epoch: where it goes when the epoch has ended."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from trainer.fit.plan import FitPlan
from trainer.fit.run_file import write_speeds
from trainer.metrics.throughput import Meter

_COMPILING = 0.1
"""The most of an epoch's time that compilations may take, for its speed to be one of the steps."""

_WRITE_EVERY = 5.0
"""The seconds from one writing of `run.json` within a call to the next, at least; a writing takes milliseconds."""


def note_speed(trainer: Any, meter: Meter) -> None:
    """Reads the speed of the epoch that has ended: for ``trainer.throughput``, the pictures and the loggers."""
    setup, run = trainer.setup, trainer.run
    setup.live.throughput = speed = meter.read(run.leaves[0].sharding.device_set)
    # A curve has no place for the speed of the compiler, nor for epochs that were resumed behind their last batch.
    if speed.steps_per_second and meter.compiling <= _COMPILING:
        history = run.history.copy()
        history.know_speed(run.step, speed.steps_per_second)
        trainer.hold(run.replace(history=history))
    setup.fanout.log_throughput(run.step, speed)
    if time.monotonic() - setup.live.speeds_written >= _WRITE_EVERY:
        _write(trainer)


@contextlib.contextmanager
def speeds_written(trainer: Any, plan: FitPlan) -> Iterator[None]:
    """Writes the speeds of a call's epochs while it runs and at its end, however it ends.

    Calls of ``train_epoch`` come one after the other: of those, as often as it costs little.
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
