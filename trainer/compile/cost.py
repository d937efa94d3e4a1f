"""`ProgramCost`: the cost of a compiled step, from XLA's own analyses."""

import dataclasses
import math
import os
from typing import Any

import jax

from trainer.compile.hlo import Traffic, collectives
from trainer.core.private_api import memory_limit, operations_and_bytes


@dataclasses.dataclass(frozen=True)
class ProgramCost:
    """The compiler's estimate for a step before it runs. Operations and bytes are per device.

    Attributes:
        seconds: The time for tracing and compiling.
        flops: Floating-point operations of a step, by XLA's count; None if it has none.
        bytes_accessed: Bytes that a step reads and writes, by XLA's count; None if it has none.
        mesh: Names and sizes of the mesh axes; empty for a single-device program without a mesh.
        state: Bytes of the training state.
        arguments: Bytes of all arguments: the state, and this device's part of the batch.
        outputs: Bytes of all results. Those that reuse a donated argument's memory also count in ``aliased``.
        aliased: Bytes of results that reuse the memory of arguments.
        temporary: Bytes of everything in between, mainly activations and gathered params.
        available: Bytes of memory on the device; None if unknown.
        collectives: Communication with other devices, by kind of collective.
        without_remat: The same for the step without ``remat``, if requested, see `trainer.Trainer.compile`.
            XLA's CPU backend runs whatever is ready first, recomputation too, and by default saves almost nothing; with
            ``XLA_FLAGS=--xla_cpu_enable_concurrency_optimized_scheduler=false`` it orders operations for memory.
    """

    seconds: float
    flops: float | None
    bytes_accessed: float | None
    mesh: dict[str, int]
    state: int
    arguments: int
    outputs: int
    aliased: int
    temporary: int
    available: int | None
    collectives: dict[str, Traffic]
    without_remat: "ProgramCost | None" = None

    @property
    def total(self) -> int:
        """Bytes that a device needs while a step runs."""
        return self.arguments + self.outputs - self.aliased + self.temporary

    @property
    def fits(self) -> bool:
        """Whether the total is at most the device's memory; True if that is unknown."""
        return self.available is None or self.total <= self.available

    def __str__(self) -> str:
        sizes = {name: getattr(self, name) for name in ("state", "arguments", "temporary", "total", "available")}
        rows = [(name, f"{size:,}", "bytes") for name, size in sizes.items() if size is not None]
        rows += [(kind, f"{found.bytes:,}", f"bytes in {found.count}") for kind, found in self.collectives.items()]
        if self.without_remat is not None:
            rows.append(("saved by remat", f"{self.without_remat.temporary - self.temporary:,}", "bytes"))
        if self.flops is not None:
            rows.append(("operations", f"{self.flops:,.0f}", ""))
        rows.append(("compiled in", f"{self.seconds:.1f}", "s"))
        names, numbers, _ = (max(map(len, column)) for column in zip(*rows, strict=True))
        axes = " x ".join(f"{name} {size}" for name, size in self.mesh.items())
        title = f"on each of {math.prod(self.mesh.values())} devices ({axes})" if self.mesh else "on one device"
        return "\n".join(
            [title, *(f"{name:<{names}}  {number:>{numbers}} {unit}".rstrip() for name, number, unit in rows)]
        )


def cost_of(compiled: Any, state: Any, seconds: float) -> ProgramCost:
    """Reads XLA's analyses of a compiled step.

    Args:
        compiled: ``jax.jit(step).lower(state, batch).compile()``.
        state: The state, or its leaves; arrays or `jax.ShapeDtypeStruct` with shardings.
        seconds: The time for tracing and compiling.
    """
    operations, accessed = operations_and_bytes(compiled)
    memory = compiled.memory_analysis()  # the names of its attributes are not documented; seen in jax 0.10.2
    leaves = jax.tree.leaves(state)
    sharding = leaves[0].sharding
    return ProgramCost(
        seconds=seconds,
        flops=operations,
        bytes_accessed=accessed,
        mesh=dict(sharding.mesh.shape) if isinstance(sharding, jax.sharding.NamedSharding) else {},
        state=sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * int(leaf.dtype.itemsize) for leaf in leaves),
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        available=_memory_of(next(iter(sharding.addressable_devices))),
        # A single-device program has no communication, and the text of a large program takes long to produce.
        collectives=collectives(compiled.as_text()) if sharding.num_devices > 1 else {},
    )


def _memory_of(device: jax.Device) -> int | None:
    if (limit := memory_limit(device)) is not None:
        return limit
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
