"""The cost of the progress display, beside the same run without it: redirected, and on a pseudo-terminal.

The model is the smallest one, so that computation hides almost nothing of the display. Runs have one long epoch, a
thousand tiny ones, or five tiny ones, where opening the display counts too. A separate process reads the terminal, as
with a real one. Run it with ``python benchmarks/progress.py``.
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
    """Yields a terminal of 80 columns to write to, with a process that reads it."""
    reading, writing = os.openpty()
    with (
        os.fdopen(reading, "rb") as screen,
        subprocess.Popen(["cat"], stdin=screen, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as reader,
        os.fdopen(writing, "w", encoding="utf-8") as terminal,
    ):
        yield terminal
        reader.terminate()


def contenders(workload, epochs, displays):
    """Functions by name that train for a number of epochs and return when the last step is done."""
    runs = {}
    for name, progress in displays.items():
        trainer = workload.trainer(progress=progress, save_interval=10**9)
        runs[name] = lambda trainer=trainer: trainer.train(workload.data, epochs, workload.batch_size)
    return {name: per(epochs * workload.steps, run) for name, run in runs.items()}


def workloads_of(report):
    """What to train, and the number of epochs."""
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
