"""The cost of agreement: a call of `Trainer.train` in two processes, with and without comparing the state.

Before a run trains, `check_replicas` computes checksums of the arrays that processes share, on the devices, and
exchanges eight bytes. The states are the stack of ``benchmarks/dispatch.py`` and one of 50 MiB. Both processes share
the cores, and collectives use Gloo over 127.0.0.1. Run it with ``python benchmarks/processes.py``.
"""

import os
import socket
import subprocess
import sys
from unittest import mock

PROCESSES = 2


def contenders(workload, steps):
    """Functions by name that train an epoch, and one that only compares the state."""
    from timing import per
    from trainer import make_mesh
    from trainer.distributed import check_replicas
    from trainer.fit import setup

    batch = {name: column[: workload.batch_size // PROCESSES] for name, column in workload.batch.items()}
    trainer = workload.trainer(10**9, mesh=make_mesh({"data": -1}), save_interval=10**9)

    def train():
        trainer.train([batch] * steps, 1, workload.batch_size)

    def without():
        with mock.patch.object(setup, "check_replicas"):
            train()

    return {
        "train, not comparing": per(1, without),
        "train": per(1, train),
        "check_replicas alone": per(1, lambda: check_replicas(trainer.state)),
    }


def work():
    """The program of each process; the first process prints."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    from trainer.distributed import initialize

    initialize()
    from dispatch import stack
    from timing import Report, compared, in_turns
    from workloads import Mlp, Workload, squared_error

    report = Report(__doc__, repeats=7)
    small = stack(2)
    wide = Workload("wide", lambda: Mlp(32, 2048, 2048, 32), squared_error, small.data, 8)
    for workload, name, steps in ((small, "12 arrays", 100), (wide, "50 MiB", 10)):
        steps = 5 if report.quick else steps
        times = in_turns(contenders(workload, steps), report.repeats)
        if jax.process_index() == 0:
            title = f"{PROCESSES} processes, an epoch of {steps} steps, a state of {name}"
            report.table(title, compared(times, "ms", 1e3, {"x not comparing": "train, not comparing"}))
    if jax.process_index() == 0:
        report.close()


def main():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{found.getsockname()[1]}"
    environment = os.environ | {"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": str(PROCESSES)}
    command = [sys.executable, *sys.argv]
    started = [
        subprocess.Popen(command, env=environment | {"JAX_PROCESS_ID": str(process)}) for process in range(PROCESSES)
    ]
    sys.exit(max(process.wait() for process in started))


if __name__ == "__main__":
    work() if "JAX_PROCESS_ID" in os.environ else main()
