"""The gain of prefetching (`trainer.prefetched`) with a loader that takes as long as a step.

The loader sleeps (as if it waited for a disk), computes (it needs the CPU too), or sleeps eight times as long at every
eighth batch. The loop runs ahead of the device, as `Trainer.train` does, or reads the loss after every step. A turn is
a pass of `run_epoch` or of `evaluate`: on one device, and on a mesh, where the host waits for every step of an
evaluation on the CPU. Run it with ``python benchmarks/prefetch.py``.
"""

import functools
import itertools
import time

import jax
import numpy as np
import optax
from flax import nnx

from timing import Report, compared, in_turns, per
from trainer import (
    CompiledStep,
    Run,
    TrainState,
    evaluate,
    make_eval_step,
    make_mesh,
    make_train_step,
    prefetched,
    run_epoch,
)
from trainer.sharding.placement import placement_of

BATCH_SIZE = 128
AHEAD = {"no prefetching": 0, "2 ahead": 2, "8 ahead": 8}


def loss_fn(model, batch, rng, step):
    return (model(batch["x"]) ** 2).mean(), {}


def sleeping(batch, seconds, count):
    for _ in range(count):
        time.sleep(seconds)
        yield batch


def computing(batch, seconds, count):
    for _ in range(count):
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            np.sort(batch["x"][:64])
        yield batch


def uneven(batch, seconds, count):
    for number in range(count):
        if number % 8 == 7:
            time.sleep(8 * seconds)
        yield batch


def slow_loaders(width, steps):
    """Yields the name of a table, and its contenders."""
    optimizer = optax.sgd(1e-3)
    step = CompiledStep(make_train_step(loss_fn, optimizer))
    model = nnx.Sequential(*[nnx.Linear(width, width, rngs=nnx.Rngs(layer)) for layer in range(4)])
    held = [Run.start(TrainState.create(model, optimizer, rng=jax.random.key(0)))]
    batch = {"x": np.random.default_rng(0).standard_normal((BATCH_SIZE, width), np.float32)}

    def run(batches, reads):
        for tick in run_epoch(step, held[0], batches):
            held[0] = tick.run
            if reads:
                float(tick.metrics["loss"])
        jax.block_until_ready(held[0].leaves)

    run([batch] * 3, reads=False)
    times = in_turns({"step": per(steps, lambda: run([batch] * steps, reads=False))}, 5)
    seconds = float(np.median(times["step"]))

    def contender(loader, ahead, reads):
        batches = loader(batch, seconds, steps)
        if not ahead:
            return run(batches, reads)
        with prefetched(batches, ahead) as drawn:
            return run(drawn, reads)

    for loader in (sleeping, computing, uneven):
        for reads in (False, True):
            yield (
                f"a loader {loader.__name__} as long as a step of {seconds * 1e3:.1f} ms, "
                f"{'the loss read after every step' if reads else 'as `train` runs'}",
                {name: per(steps, functools.partial(contender, loader, ahead, reads)) for name, ahead in AHEAD.items()},
            )


def slow_evaluations(width, steps):
    """Yields the name of a table, and its contenders: evaluations, where `slow_loaders` has training."""
    model = nnx.Sequential(*[nnx.Linear(width, width, rngs=nnx.Rngs(layer)) for layer in range(8)])
    state = TrainState.create(model, optax.sgd(1e-3), rng=jax.random.key(0))
    batch = {"x": np.random.default_rng(0).standard_normal((BATCH_SIZE, width), np.float32)}
    step = jax.jit(make_eval_step(loss_fn))
    for devices in (None, 2):
        placement = placement_of(devices and make_mesh({"data": devices}, devices=jax.devices()[:devices]), None)
        placed = placement.adopt(state)

        def run(batches, placement=placement, placed=placed):
            evaluate(step, placed, batches, placement=placement)

        run([batch] * 3)
        times = in_turns({"step": per(steps, functools.partial(run, [batch] * steps))}, 5)
        seconds = float(np.median(times["step"]))

        def contender(loader, ahead, run=run, placement=placement, seconds=seconds):
            batches = loader(batch, seconds, steps)
            if not ahead:
                return run(batches)
            with prefetched(batches, ahead, placement=placement) as drawn:
                return run(drawn)

        for loader in (sleeping, computing, uneven):
            yield (
                f"a loader {loader.__name__} as long as a step of {seconds * 1e3:.1f} ms, an evaluation on "
                f"{devices or 1} device{'s' * (devices is not None)}",
                {name: per(steps, functools.partial(contender, loader, ahead)) for name, ahead in AHEAD.items()},
            )


def main():
    jax.config.update("jax_num_cpu_devices", 2)
    report = Report(__doc__, repeats=7)
    size = (64, 16) if report.quick else (512, 32)
    for title, rivals in itertools.chain(slow_loaders(*size), slow_evaluations(*size)):
        times = in_turns(rivals, report.repeats)
        report.table(title, compared(times, "ms a step", 1e3, {"x none": "no prefetching"}))
    report.close()


if __name__ == "__main__":
    main()
