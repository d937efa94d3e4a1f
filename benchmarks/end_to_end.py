"""The cost of a whole epoch of `Trainer.train` with all defaults, beside loops written by hand.

"A loop" is a compiled and donated step, called from Python on batches indexed from NumPy arrays; "scan" is one call per
epoch with the data on the device, shuffled within the scan or before it. "Best" is the fastest of these three on the
workload. Their times do not include copying the data to the device, which is shown separately: each call of `train`
would pay for it. By default `train` saves a checkpoint every 1,000 steps, which no loop by hand does here; times are
shown with and without. Run it with ``python benchmarks/end_to_end.py``.
"""

import tempfile
from pathlib import Path

import by_hand
import workloads
from timing import Report, compared, fastest, in_turns, per

BY_HAND = ("by hand, a loop", "by hand, scan", "by hand, shuffle and scan")
COPYING = "by hand, copy and scan"


def contenders(workload, epochs, directory):
    """Functions by name that train for a number of epochs and return when the last step is done."""
    runs = {
        BY_HAND[0]: by_hand.loop(workload),
        BY_HAND[1]: by_hand.scan(workload, gather_first=False),
        BY_HAND[2]: by_hand.scan(workload, gather_first=True),
        COPYING: by_hand.scan(workload, gather_first=False, keep=False),
    }
    for name, options in {"Trainer.train": {}, "Trainer.train, saving nothing": {"save_interval": 10**9}}.items():
        trainer = workload.trainer(workdir=directory / name, **options)
        runs[name] = lambda epochs, trainer=trainer: trainer.train(workload.data, epochs, workload.batch_size)
    return {name: per(epochs * workload.steps, lambda run=run: run(epochs)) for name, run in runs.items()}


def workloads_of(report):
    """What to train, and the number of epochs per turn."""
    if report.quick:
        small = workloads.dispatch_bound(400), workloads.digits(1000), workloads.images(256), workloads.text(128)
        return [(workload, 1) for workload in small]
    return [(workloads.dispatch_bound(), 8), (workloads.digits(), 1), (workloads.images(), 1), (workloads.text(), 1)]


def title(workload, epochs):
    return f"{workload.name}: {epochs} x {workload.steps} steps, batch size {workload.batch_size}"


def main():
    report = Report(__doc__, repeats=7)
    for workload, epochs in workloads_of(report):
        with tempfile.TemporaryDirectory() as directory:
            times = in_turns(contenders(workload, epochs, Path(directory)), report.repeats)
        baselines = {"x best": fastest(times, BY_HAND), "x loop": BY_HAND[0]}
        report.table(title(workload, epochs), compared(times, "µs a step", 1e6, baselines))
    report.close()


if __name__ == "__main__":
    main()
