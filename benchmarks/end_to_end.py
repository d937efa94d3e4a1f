"""What a whole epoch of `Trainer.train` costs, with nothing but defaults, beside the loops that one writes by hand.

"A loop" is a compiled and donated step, called from Python on batches indexed out of NumPy arrays; "scan" is one
call an epoch with the data on the device, shuffled within or before it. "Best" is the fastest of these three on the
workload at hand. By default `train` saves a checkpoint every 1,000 steps, which no hand-written loop
does here; it is shown with and without. Run it with ``python benchmarks/end_to_end.py``.
"""

import tempfile
from pathlib import Path

import by_hand
import workloads
from timing import Report, compared, fastest, in_turns, per

BY_HAND = ("by hand, a loop", "by hand, scan", "by hand, shuffle and scan")


def contenders(workload, epochs, directory):
    """By name, functions that train for so many epochs and return when the last step is done."""
    runs = {
        BY_HAND[0]: by_hand.loop(workload),
        BY_HAND[1]: by_hand.scan(workload, gather_first=False),
        BY_HAND[2]: by_hand.scan(workload, gather_first=True),
    }
    for name, options in {"Trainer.train": {}, "Trainer.train, saving nothing": {"save_interval": 10**9}}.items():
        trainer = workload.trainer(workdir=directory / name, **options)
        runs[name] = lambda epochs, trainer=trainer: trainer.train(workload.data, epochs, workload.batch_size)
    return {name: per(epochs * workload.steps, lambda run=run: run(epochs)) for name, run in runs.items()}


def main():
    report = Report(__doc__, repeats=7)
    full = ((workloads.dispatch_bound(), 8), (workloads.digits(), 1), (workloads.images(), 1), (workloads.text(), 1))
    quick = (
        (workloads.dispatch_bound(400), 2),
        (workloads.digits(1000), 1),
        (workloads.images(128), 1),
        (workloads.text(64), 1),
    )
    for workload, epochs in quick if report.quick else full:
        with tempfile.TemporaryDirectory() as directory:
            times = in_turns(contenders(workload, epochs, Path(directory)), report.repeats)
        baselines = {"x best": fastest(times, BY_HAND), "x loop": BY_HAND[0]}
        title = f"{workload.name}: {epochs} epochs of {workload.steps} steps, batch size {workload.batch_size}"
        report.table(title, compared(times, "µs a step", 1e6, baselines))
    report.close()


if __name__ == "__main__":
    main()
