"""Throughput and learning rate of epochs: where they are recorded when an epoch ends."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

from trainer.fit.plan import FitPlan
from trainer.fit.run_file import write_figures
from trainer.metrics.throughput import Meter

_COMPILING = 0.1
"""The largest fraction of an epoch's time spent on compilation for which its throughput is kept."""

_RATE_EVERY = 0.02
"""Minimum seconds between two computations of the learning rate, which dispatch a small program."""

_WRITE_EVERY = 5.0
"""Minimum seconds between two writes of `run.json` within a call; a write takes milliseconds."""


def note_epoch(trainer: Any, meter: Meter) -> None:
    """Records the throughput of the epoch that has just ended, for ``trainer.throughput``, plots and loggers.

    For plots also the learning rate of its last update, if known. It does not wait for steps of this epoch.
    """
    # The learning rate of this epoch is still being computed, so only those before it are written.
    if time.monotonic() - trainer.setup.live.figures_written >= _WRITE_EVERY:
        _write(trainer)
    setup, run = trainer.setup, trainer.run
    figures: dict[str, Any] = {}
    setup.live.throughput = speed = meter.read(run.leaves[0].sharding.device_set)
    # Compilation would dominate the curve; an epoch resumed after its last batch has no steps.
    if speed.steps_per_second and meter.compiling <= _COMPILING:
        figures["steps_per_second"] = speed.steps_per_second
    now = time.monotonic()
    if now - setup.live.rate_asked >= _RATE_EVERY:
        setup.live.rate_asked = now
        if (rate := setup.rate(run)) is not None:
            figures["learning_rate"] = rate
    if figures:
        history = run.history.copy()
        history.know_epoch(run.step, **figures)
        trainer.hold(run.replace(history=history))
    setup.fanout.log_throughput(run.step, speed)


@contextlib.contextmanager
def figures_written(trainer: Any, plan: FitPlan) -> Iterator[None]:
    """Writes the figures of a call's epochs to `run.json` during the block and at its end, also if it raises.

    Consecutive calls of ``train_epoch`` write at most once a second.
    """
    live = trainer.setup.live
    if plan.caller == "train":
        live.figures_written = time.monotonic()
    try:
        yield
    finally:
        if plan.caller == "train" or time.monotonic() - live.figures_written >= _WRITE_EVERY / 5:
            _write(trainer)


def _write(trainer: Any) -> None:
    write_figures(trainer.setup, trainer.run)
    trainer.setup.live.figures_written = time.monotonic()
