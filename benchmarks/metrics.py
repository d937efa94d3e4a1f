"""The cost of writing metrics to a file, at every step or every 100, beside a step with real computation.

Run it with ``python benchmarks/metrics.py``.
"""

import tempfile
from pathlib import Path

import workloads
from timing import Report, compared, in_turns, per
from trainer import FileLogger


def main():
    report = Report(__doc__, repeats=9)
    workload = workloads.digits(2000 if report.quick else 60_000)
    with tempfile.TemporaryDirectory() as directory:
        frequencies = {"never": None, "every 100 steps": 100, "every step": 1}
        contenders, loggers = {}, []
        for name, every in frequencies.items():
            if every is not None:
                loggers.append(FileLogger(Path(directory) / f"{every}.jsonl"))
            workdir = Path(directory) / name
            logger = loggers[-1] if every else None
            trainer = workload.trainer(every or 10**9, logger=logger, workdir=workdir, save_interval=10**9)
            contenders[name] = per(
                workload.steps, lambda trainer=trainer: trainer.train(workload.data, 1, workload.batch_size)
            )
        times = in_turns(contenders, report.repeats)
        for logger in loggers:
            logger.close()
    report.table(f"FileLogger, {workload.name}", compared(times, "µs a step", 1e6, {"x never": "never"}))
    report.close()


if __name__ == "__main__":
    main()
