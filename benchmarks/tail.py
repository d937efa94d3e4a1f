"""How long the slowest of 10,000 steps take: percentiles of the time from the end of one step to the end of the next.

Every contender waits for each step, as timing a step requires, and the garbage collector keeps its settings. The first
steps of epochs are included. Run it with ``python benchmarks/tail.py``.
"""

import time

import jax
import numpy as np

import by_hand
import workloads
from timing import Report, compared, in_turns
from trainer import Callback

PERCENTILES = (50, 99, 99.9)


class Ends(Callback):
    """Records when each step is finished."""

    def __init__(self):
        self.times = []

    def on_batch_end(self, trainer, step, logs):
        jax.block_until_ready(logs["loss"])
        self.times.append(time.perf_counter())


def ours(workload, epochs):
    ends = Ends()
    trainer = workload.trainer(10**9, callbacks=[ends], save_interval=10**9, steps_per_call=1)

    def run():
        ends.times.clear()
        trainer.train(workload.data, epochs, workload.batch_size)
        return np.percentile(np.diff(ends.times), PERCENTILES)

    return run


def hand_written(workload, epochs):
    state, step = by_hand.make_step(workload.make_model(), workload.loss_fn, workload.optimizer())
    compiled = jax.jit(step, donate_argnums=0)
    draws = np.random.default_rng(0)

    def run():
        nonlocal state
        ends = []
        for _ in range(epochs):
            for batch in by_hand.batches(workload.data, workload.batch_size, draws):
                state, metrics = compiled(state, batch)
                jax.block_until_ready(metrics["loss"])
                ends.append(time.perf_counter())
        return np.percentile(np.diff(ends), PERCENTILES)

    return run


def main():
    report = Report(__doc__, repeats=7)
    workload = workloads.dispatch_bound(400 if report.quick else 4000)
    epochs = 2 if report.quick else 20
    contenders = {"by hand": hand_written(workload, epochs), "Trainer.train": ours(workload, epochs)}
    turns = in_turns(contenders, report.repeats)
    for index, percentile in enumerate(PERCENTILES):
        times = {name: [float(values[index]) for values in found] for name, found in turns.items()}
        title = f"percentile {percentile} of {epochs * workload.steps:,} steps"
        report.table(title, compared(times, "µs a step", 1e6, {"x by hand": "by hand"}))
    report.close()


if __name__ == "__main__":
    main()
