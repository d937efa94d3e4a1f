"""`plan`: the cost of a step on a mesh that this machine does not have, from compiling without running.

XLA can compile for any number of CPU devices, which is enough to determine memory and collectives. Set their number
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
    """Compiles a train step and returns its cost, without running it.

    The CPU compiler schedules and fuses differently from those for GPUs and TPUs: compare plans only with plans, and
    do not expect exact memory figures for an accelerator.

    Args:
        step: ``(state, batch) -> (state, metrics)``, see `trainer.make_train_step`.
        state: A state with shardings, usually `trainer.sharding.abstract_state`.
        batch: The global batch, of arrays or `jax.ShapeDtypeStruct`.
        batch_sharding: See `trainer.sharding.jit_step`, which compiles the step.

    Returns:
        The cost per device of the mesh; ``available`` is None, since the devices stand in for others.

    Raises:
        ArgumentTypeError: A leaf of ``state`` is not on a mesh.
        BatchError: The batch cannot be split evenly, see `trainer.sharding.check_batch_fits`.
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch)
    start = time.perf_counter()
    compiled = jit_step(step, state, batch_sharding).lower(state, shapes).compile()
    return dataclasses.replace(cost_of(compiled, state, time.perf_counter() - start), available=None)
