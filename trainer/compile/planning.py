"""`plan`: the cost of a step on a mesh that this machine does not have, by compiling it and running nothing.

XLA compiles for any number of CPU devices, which is enough to read off memory and collectives. Set their number
before JAX starts, and place no arrays on them::

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 64)
    mesh = make_mesh({"data": -1, "fsdp": 8})
    state = abstract_state(model_fn, optimizer, rng=jax.random.key(0), mesh=mesh)
    print(plan(make_train_step(loss_fn, optimizer), state, batch_shapes))
"""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax

from trainer.compile.cost import ProgramCost, cost_of
from trainer.sharding import jit_step


def plan(step: Callable[..., Any], state: Any, batch: Any, batch_sharding: Any = None) -> ProgramCost:
    """Compiles a train step and returns what it costs, without running it.

    The compiler for CPUs schedules and fuses differently from those for GPUs and TPUs: compare plans with plans, and
    do not expect the memory of an accelerator to the last percent.

    Args:
        step: ``(state, batch) -> (state, metrics)``, see `trainer.make_train_step`.
        state: A state with shardings, usually `trainer.sharding.abstract_state`.
        batch: The global batch, of arrays or `jax.ShapeDtypeStruct`.
        batch_sharding: See `trainer.sharding.jit_step`, which compiles the step.

    Returns:
        The cost on each device of the mesh; ``available`` is None, since the devices stand for others.

    Raises:
        ArgumentTypeError: A leaf of ``state`` is on no mesh.
        BatchError: The batch cannot be split evenly, see `trainer.sharding.check_batch_fits`.
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch)
    start = time.perf_counter()
    compiled = jit_step(step, state, batch_sharding).lower(state, shapes).compile()
    return dataclasses.replace(cost_of(compiled, state, time.perf_counter() - start), available=None)
