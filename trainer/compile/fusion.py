"""`FusionPolicy`: how many steps to fuse into one call, decided from a step's operations and never by timing.

A call from Python costs about as much as ten million floating-point operations on a CPU, plus a little for every
array of the state; steps that compute little more than that are worth fusing. The decision depends only on the traced
step, so it is the same in every run. A decision by timing could differ between machines, and XLA rounds some
programs differently inside a loop: the trained bits would depend on the machine's load.

`jax.extend.core` is not part of JAX's stable API; checked with 0.10, 0.11 and 0.12.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.extend import core

from trainer.core.checks import check_count
from trainer.core.flops import flops, primitives
from trainer.errors import ArgumentTypeError


@dataclasses.dataclass(frozen=True)
class FusionPolicy:
    """The limits of ``steps_per_call="auto"``; pass one in its place to change them: ``FusionPolicy(max_steps=16)``.

    Attributes:
        flops_per_call: By platform, the floating-point operations of one call, which take less than a second, so
            that Ctrl-C works promptly. (A fused CPU loop also avoids page faults on new buffers at each dispatch.)
        max_steps: The maximum number of steps in a call.
        max_bytes: The maximum size of stacked batches in bytes: small enough to stay in cache from creation to use.
        slow_in_loops: By platform, operations that prevent fusion: XLA's CPU backend runs convolutions
            several times slower inside a loop, where it cannot use multiple threads for them.
        advise_at: Advise fusion if a callback prevents a call of at least this many steps.
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

    def __post_init__(self) -> None:
        for name in ("max_steps", "max_bytes", "advise_at"):
            check_count(getattr(self, name), name)
        for name in ("flops_per_call", "slow_in_loops"):
            if not isinstance(getattr(self, name), Mapping):
                raise ArgumentTypeError(
                    f"`{name}` is {getattr(self, name)!r}; it must be a mapping from platforms, such as 'cpu' or 'gpu'."
                )

    def fusable_steps(self, step: core.ClosedJaxpr, batch_bytes: int, platform: str) -> int:
        """Returns the number of steps one call should run if nothing else limits it.

        Args:
            step: The traced step.
            batch_bytes: The size of a batch; all batches of a call are in memory at once.
            platform: The platform of the state's devices: "cpu", "gpu" or "tpu".
        """
        if primitives(step.jaxpr) & self.slow_in_loops.get(platform, frozenset()):
            return 1
        by_work = self.flops_per_call.get(platform, 1e12) / max(flops(step.jaxpr), 1.0)
        by_memory = self.max_bytes / max(batch_bytes, 1)
        return max(1, int(min(by_work, by_memory, self.max_steps)))


def as_function(traced: Any) -> Callable[..., Any]:
    """Returns the result of ``jax.jit(function).trace(...)`` as a function, to avoid tracing again."""
    run = core.jaxpr_as_fun(traced.jaxpr)
    structure = jax.tree.structure(traced.out_info)
    return lambda *args: jax.tree.unflatten(structure, run(*jax.tree.leaves(args)))
