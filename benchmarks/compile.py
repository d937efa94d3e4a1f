"""The time to the first finished step, and the number of XLA compilations, in a new process.

The clock starts once JAX, Flax and optax are imported. It includes importing this library (and datarax, which
`Trainer.train` imports), creating the model, tracing and compiling. "Again" is a second process that looks up every
program in JAX's cache on disk. "A run" continues from there: two epochs with a short last batch.
Run it with ``python benchmarks/compile.py``.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import jax

import by_hand
import workloads
from timing import Report, ratio

BASELINE = "by hand, a loop"
COMPILED = "/jax/core/compile/backend_compile_duration"
FOUND = "/jax/compilation_cache/cache_hits"


def hand_written(workload, directory):
    del directory
    return by_hand.loop(workload)


def beside_datarax(workload, directory):
    """The same, with the import that `Trainer.train` needs, which imports Grain and Orbax too."""
    import datarax.sources  # noqa: F401

    return hand_written(workload, directory)


def train(workload, directory):
    trainer = workload.trainer(workdir=directory)
    return lambda epochs, data=workload.data: trainer.train(data, epochs, workload.batch_size)


CONTENDERS = {BASELINE: hand_written, "  importing datarax": beside_datarax, "Trainer.train": train}


def measure(contender, rows, directory):
    """Prints the cost of starting a run in this process, as JSON."""
    counts = {COMPILED: 0, FOUND: 0}

    def count(event, *_, **about):
        if event in counts:
            counts[event] += 1

    jax.monitoring.register_event_duration_secs_listener(count)
    jax.monitoring.register_event_listener(count)
    workload = workloads.text(rows)
    start = time.perf_counter()
    run = CONTENDERS[contender](workload, directory)
    run(1, workload.batch)
    found = {"seconds": time.perf_counter() - start, "asked": counts[COMPILED], "found": counts[FOUND]}
    run(2)
    print(json.dumps({**found, "asked in a run": counts[COMPILED] - found["asked"]}))


def in_a_process(contender, rows, cache):
    """Measures in a separate process that keeps its compilations in ``cache``."""
    settings = {
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, __file__, "--child", contender, str(rows), directory]
        environment = {**os.environ, **settings}
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def main():
    report = Report(__doc__, repeats=3, options={"--child": {"nargs": 3, "help": "contender, rows, directory"}})
    if report.options.child:
        contender, rows, directory = report.options.child
        measure(contender, int(rows), directory)
        return
    rows = 40 if report.quick else 136
    first, again = ({name: [] for name in CONTENDERS} for _ in range(2))
    for _ in range(report.repeats):
        for name in CONTENDERS:
            with tempfile.TemporaryDirectory() as cache:
                first[name].append(in_a_process(name, rows, cache))
                again[name].append(in_a_process(name, rows, cache))
    for title, found in {"a first process": first, "again, with JAX's compilation cache": again}.items():
        seconds = {name: [turn["seconds"] for turn in turns] for name, turns in found.items()}
        report.table(
            f"transformer, {title}",
            [
                {
                    "what": name,
                    "s to the first step": statistics.median(seconds[name]),
                    "x by hand": ratio(seconds[name], seconds[BASELINE]),
                    "compiled to there": turns[0]["asked"] - turns[0]["found"],
                    "found in the cache": turns[0]["found"],
                    "compiled or found in a run": turns[0]["asked in a run"],
                    "turns": seconds[name],
                }
                for name, turns in found.items()
            ],
        )
    report.close()


if __name__ == "__main__":
    main()
