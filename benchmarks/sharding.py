"""The cost of the sharded path: on a mesh of one device beside the plain step, on eight beside GSPMD by hand.

The model and the batch are those of ``benchmarks/dispatch.py``, with almost no computation, so that the cost of a call
shows. The eight devices are simulated on the CPU, whatever else the machine has: they share its cores, and their times
say nothing about eight real ones. Run it with ``python benchmarks/sharding.py``.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import by_hand
from dispatch import facade, stack, stepping
from timing import Report, compared, in_turns, per
from trainer import TrainState, jit_step, make_mesh, make_train_step, partition

DEVICES = 8
RULES = {"params/layers/.*/kernel": P(None, "fsdp")}


def created(workload):
    optimizer = workload.optimizer()
    state = TrainState.create(workload.make_model(), optimizer, rng=jax.random.key(0))
    return state, make_train_step(workload.loss_fn, optimizer)


def plain(workload):
    state, step = created(workload)
    return stepping(jax.jit(step, donate_argnums=0), state)


def on_mesh(mesh, rules=None):
    """The sharded path of this library."""

    def make(workload):
        state, step = created(workload)
        state = jax.device_put(state, partition(state, mesh, rules))
        return stepping(jit_step(step, state), state)

    return make


def gspmd(axis):
    """By hand: a spec for each leaf and for the batch, and the compiler does the rest."""

    def make(workload):
        mesh = Mesh(np.array(jax.devices("cpu")), (axis,), axis_types=(AxisType.Auto,))
        state, step = by_hand.make_step(workload.make_model(), workload.loss_fn, workload.optimizer())

        def place(leaf):
            is_split = axis == "fsdp" and jnp.ndim(leaf) == 2
            return NamedSharding(mesh, P(None, axis) if is_split else P())

        shardings = jax.tree.map(place, state)
        compiled = jax.jit(
            step,
            in_shardings=(shardings, NamedSharding(mesh, P(axis))),
            out_shardings=(shardings, NamedSharding(mesh, P())),
            donate_argnums=0,
        )
        return stepping(compiled, jax.device_put(state, shardings))

    return make


def contender(make, workload, steps, *, waits):
    """Makes a contender that takes a number of steps.

    Args:
        make: Makes a function of a batch from the workload.
        workload: What to train.
        steps: The number of steps per turn.
        waits: Whether to wait for every step, not only for the last. On simulated devices, collectives of two steps
            in flight would wait for each other.
    """
    step, batch = make(workload), workload.batch

    def run():
        for _ in range(steps):
            metrics = step(batch)
            if waits:
                jax.block_until_ready(metrics)
        jax.block_until_ready(metrics)

    return per(steps, run)


def compare(report, title, contenders, baseline, sizes, *, waits):
    """Prints a table for each size of the state, given as layers and steps per turn."""
    for layers, steps in sizes:
        workload = stack(layers)
        runs = {name: contender(make, workload, steps, waits=waits) for name, make in contenders.items()}
        times = in_turns(runs, report.repeats)
        rows = compared(times, "µs a step", 1e6, {f"x {baseline}": baseline})
        report.table(f"{title}, {6 * layers:,} arrays", rows)


def main():
    jax.config.update("jax_num_cpu_devices", DEVICES)
    report = Report(__doc__, repeats=9)
    one = make_mesh({"data": 1}, jax.devices()[:1])
    sizes = ((2, 20), (10, 10)) if report.quick else ((2, 1000), (50, 200))
    contenders = {"made first": plain, "plain": plain, "sharded": on_mesh(one)}
    compare(report, "one device", contenders, "plain", sizes, waits=False)
    contenders = {"Trainer.train_step": facade(), "  over a mesh": facade(mesh=one)}
    compare(report, "one device", contenders, "Trainer.train_step", sizes, waits=False)
    sizes = ((2, 5),) if report.quick else ((2, 200), (50, 20))
    for axis, rules in (("data", None), ("fsdp", RULES)):
        mesh = make_mesh({axis: DEVICES}, jax.devices("cpu"))
        contenders = {"by hand": gspmd(axis), "sharded": on_mesh(mesh, rules)}
        compare(report, f"{DEVICES} devices, {axis}", contenders, "by hand", sizes, waits=True)
    report.close()


if __name__ == "__main__":
    main()
