"""The memory of a step and of a run: what XLA plans for the compiled step, and the peak of a process that trains.

"Planned" is arguments, outputs and scratch, less the reused memory; the successor of the state should reuse every byte
of it (donation). Each contender has its own process. Run it with ``python benchmarks/memory.py``.
"""

import dataclasses
import json
import resource
import subprocess
import sys
import tempfile

import jax

import by_hand
import workloads
from timing import Report, ratio

MEBIBYTE = 2**20


def state_and_step(workload, contender):
    if contender == "by hand":
        return by_hand.make_step(workload.make_model(), workload.loss_fn, workload.optimizer())
    from trainer import TrainState, make_train_step

    optimizer = workload.optimizer()
    state = TrainState.create(workload.make_model(), optimizer, rng=jax.random.PRNGKey(0))
    return state, make_train_step(workload.loss_fn, optimizer)


def measure(workload, contender):
    """Trains for an epoch in this process, which must be new, and prints the measurements as JSON."""
    if contender == "by hand":
        by_hand.loop(workload)(1)
    else:
        with tempfile.TemporaryDirectory() as directory:
            workload.trainer(workdir=directory).train(workload.data, 1, workload.batch_size)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    state, step = state_and_step(workload, contender)
    plan = jax.jit(step, donate_argnums=0).lower(state, workload.batch).compile().memory_analysis()
    found = {
        "state": sum(leaf.nbytes for leaf in jax.tree.leaves(state)),
        "reused": plan.alias_size_in_bytes,
        "scratch": plan.temp_size_in_bytes,
        "planned": plan.argument_size_in_bytes
        + plan.output_size_in_bytes
        + plan.temp_size_in_bytes
        - plan.alias_size_in_bytes,
        "peak of process": peak,
    }
    print(json.dumps(found))


def in_a_process(contender, quick):
    command = [sys.executable, __file__, "--child", contender, *(["--quick"] if quick else [])]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(printed.splitlines()[-1])


def main():
    report = Report(__doc__, repeats=3, options={"--child": {"help": "measure this contender in this very process"}})
    width, rows = (64, 1000) if report.quick else (2048, 10_000)
    workload = dataclasses.replace(
        workloads.digits(rows),
        name=f"MLP 784-{width}-{width}-10",
        make_model=lambda: workloads.Mlp(784, width, width, 10),
    )
    if report.options.child:
        measure(workload, report.options.child)
        return
    names = ("by hand", "Trainer.train")
    turns = [{name: in_a_process(name, report.quick) for name in names} for _ in range(report.repeats)]
    rows = []
    for name in names:
        first = turns[0][name]
        peaks = {other: [turn[other]["peak of process"] for turn in turns] for other in names}
        rows.append(
            {
                "what": name,
                "not reused of the state, bytes": first["state"] - first["reused"],
                **{f"{what}, MiB": first[what] / MEBIBYTE for what in ("state", "scratch", "planned")},
                "peak of process, MiB": sorted(peaks[name])[len(turns) // 2] / MEBIBYTE,
                "x by hand": ratio(peaks[name], peaks["by hand"]),
            }
        )
    report.table(f"{workload.name}, an epoch of {workload.steps} steps at batch 128", rows)
    report.close()


if __name__ == "__main__":
    main()
