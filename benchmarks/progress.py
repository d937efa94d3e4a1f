"""What the display of progress costs a run, beside the same run without it: redirected, and on a pseudo-terminal.

The model is the smallest one, so that the display has next to nothing to hide behind. Runs are of one long epoch, of a
thousand tiny ones, and of five tiny ones, where opening the display counts too. The terminal is read by a process of
its own, as a real one is. Run it with ``python benchmarks/progress.py``.
"""

import contextlib
import os
import subprocess
import tempfile

import workloads
from timing import Report, compared, in_turns, per
from trainer import Progress

SILENT = "progress=False"


@contextlib.contextmanager
def pseudo_terminal():
    """Yields a terminal to write to, of 80 columns, and somebody who reads it."""
    reading, writing = os.openpty()
    with (
        os.fdopen(reading, "rb") as screen,
        subprocess.Popen(["cat"], stdin=screen, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as reader,
        os.fdopen(writing, "w", encoding="utf-8") as terminal,
    ):
        yield terminal
        reader.terminate()


def contenders(workload, epochs, displays):
    """By name, functions that train for so many epochs and return when the last step is done."""
    runs = {}
    for name, progress in displays.items():
        trainer = workload.trainer(progress=progress, save_interval=10**9)
        runs[name] = lambda trainer=trainer: trainer.train(workload.data, epochs, workload.batch_size)
    return {name: per(epochs * workload.steps, run) for name, run in runs.items()}


def workloads_of(report):
    """What to train, and for how many epochs."""
    long, tiny = workloads.dispatch_bound(400 if report.quick else 20_000), workloads.dispatch_bound(64)
    return [(long, 1), (tiny, 5), (tiny, 10 if report.quick else 1000)]


def main():
    report = Report(__doc__, repeats=15)
    with tempfile.TemporaryFile("w") as file, pseudo_terminal() as terminal:
        displays = {
            SILENT: False,
            "progress=False, again": False,
            "redirected": Progress(file),
            "on a terminal": Progress(terminal),
        }
        for workload, epochs in workloads_of(report):
            times = in_turns(contenders(workload, epochs, displays), report.repeats)
            title = f"{workload.name}: {epochs} x {workload.steps} steps, batch size {workload.batch_size}"
            report.table(title, compared(times, "µs a step", 1e6, {"x silent": SILENT}))
    report.close()


if __name__ == "__main__":
    main()
