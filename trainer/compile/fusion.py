"""`FusionPolicy`: how many steps to fuse into one call, decided by the operations of a step and never by timing.

A call from Python costs about as much as ten million floating-point operations on a CPU, and a little more for every
array of the state; steps that compute not much more are worth fusing. The decision depends on the traced step alone, so
it is the same in every run. A decision by timing could fuse on one machine and not on another, and XLA rounds some
programs differently inside a loop: the trained bits would depend on the load of the machine.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.extend import core

from trainer.core.flops import flops, primitives


@dataclasses.dataclass(frozen=True)
class FusionPolicy:
    """The limits of ``steps_per_call="auto"``.

    Attributes:
        flops_per_call: By platform, the floating-point operations of one call. They take less than a second, so that
            Ctrl-C is obeyed soon. (A fused loop on the CPU also avoids page-faulting fresh buffers at each dispatch.)
        max_steps: The most steps in a call.
        max_bytes: The most bytes of stacked batches, few enough to stay in a cache while they are made and used.
        slow_in_loops: By platform, operations that keep a step from being fused: XLA's CPU backend runs convolutions
            several times slower inside a loop, where it has no threads for them.
        advise_at: Advise fusing where a callback prevents a call of at least this many steps.
    """

    flops_per_call: Mapping[str, float] = dataclasses.field(
        default_factory=lambda: {"cpu": 2e10, "gpu": 1e12, "tpu": 1e12}
    )
    max_steps: int = 128
    max_bytes: int = 8 * 2**20
    slow_in_loops: Mapping[str, frozenset[str]] = dataclasses.field(
        default_factory=lambda: {"cpu": frozenset({"conv_general_dilated"})}
    )
    advise_at: int = 10

    def fusable_steps(self, step: core.ClosedJaxpr, batch_bytes: int, platform: str) -> int:
        """Returns how many steps one call should run where nothing else limits it.

        Args:
            step: The traced step.
            batch_bytes: The size of a batch; all batches of a call are in memory at once.
            platform: "cpu", "gpu" or "tpu": that of the devices of the state.
        """
        if primitives(step.jaxpr) & self.slow_in_loops.get(platform, frozenset()):
            return 1
        by_work = self.flops_per_call.get(platform, 1e12) / max(flops(step.jaxpr), 1.0)
        by_memory = self.max_bytes / max(batch_bytes, 1)
        return max(1, int(min(by_work, by_memory, self.max_steps)))


def as_function(traced: Any) -> Callable[..., Any]:
    """Returns what ``jax.jit(function).trace(...)`` traced as a function, so that it need not be traced again."""
    run = core.jaxpr_as_fun(traced.jaxpr)
    structure = jax.tree.structure(traced.out_info)
    return lambda *args: jax.tree.unflatten(structure, run(*jax.tree.leaves(args)))
