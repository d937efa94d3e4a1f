"""Compiling a step ahead of its first batch, and reporting a compilation to callbacks and loggers."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING

from trainer.compile.cost import ProgramCost, cost_of
from trainer.compile.dispatch import CompileReport
from trainer.errors import warn
from trainer.fit.running import check_opt_state
from trainer.metrics.throughput import Meter
from trainer.types import Batch

if TYPE_CHECKING:
    from trainer.api import Trainer


def tell_compilation(trainer: Trainer, report: CompileReport, step: int, meter: Meter | None = None) -> None:
    """Reports a compilation at ``step`` to callbacks, loggers, and the meter of the epoch if its steps waited."""
    setup = trainer.setup
    if meter is not None:
        meter.compiled(report.seconds)
    setup.events.emit("on_compile_end", trainer, report.name, report.seconds)
    setup.fanout.log_text("compilation", f"{report.name} took {report.seconds:.1f} s to compile", step)
    if report.warning is not None:
        warn(report.warning)


def compile_step(trainer: Trainer, batch: Batch, without_remat: bool) -> ProgramCost:
    """Compiles the step for batches like this one; see `Trainer.compile`."""
    setup = trainer.setup
    check_opt_state(setup, trainer.run)
    batch, _ = setup.placement.abstract_batch(setup.with_mask(batch))
    if not setup.live.is_running:  # within an epoch they stay as they are
        setup.constants.update()
    run = setup.with_weights(trainer.run).with_edits()
    run.peek().check_alive()
    start = time.perf_counter()
    program, traced = setup.step.trace(run, batch)
    compiled = program.compile(traced)
    seconds = time.perf_counter() - start
    trainer.hold(run)
    cost = cost_of(compiled, run.leaves, seconds)
    if without_remat and setup.step_without_remat is not None:
        program, traced = setup.step_without_remat.trace(run, batch)
        start = time.perf_counter()
        compared = cost_of(program.compile(traced), run.leaves, time.perf_counter() - start)
        cost = dataclasses.replace(cost, without_remat=compared)
    tell_compilation(trainer, CompileReport(program.name, seconds, None), run.step, setup.live.meter)
    if not cost.fits:
        warn(
            f"a step needs {cost.total:,} bytes and the device has {cost.available:,}: it will not "
            f"fit. Smaller batches, `remat`, or more devices (trainer.sharding) help."
        )
    return cost
