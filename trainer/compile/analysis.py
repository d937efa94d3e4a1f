"""What a compiled step needs, and keeping compiled programs for the next process."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Compilation:
    """What the compiler says of a step, before one has run.

    Attributes:
        seconds: How long tracing and compiling took.
        flops: Floating-point operations of a step, by XLA's count; None where it counts none.
        bytes_accessed: Bytes that a step reads and writes, by XLA's count.
        arguments: Bytes of the state and the batch on one device.
        outputs: Bytes of the results. Those that take over the memory of the state count in ``aliased`` too.
        aliased: Bytes of the results that are in the memory of the state.
        temporary: Bytes of everything in between.
        available: Bytes that the device has, None where it does not tell.
    """

    seconds: float
    flops: float | None
    bytes_accessed: float | None
    arguments: int
    outputs: int
    aliased: int
    temporary: int
    available: int | None

    @property
    def total(self) -> int:
        """Bytes that one device needs while a step runs."""
        return self.arguments + self.outputs - self.aliased + self.temporary

    @property
    def fits(self) -> bool:
        """Whether that is no more than the device has, or nobody knows."""
        return self.available is None or self.total <= self.available

    def __str__(self) -> str:
        rows = {
            "compiled in": f"{self.seconds:.1f} s",
            "operations": "unknown" if self.flops is None else f"{self.flops:,.0f}",
            "arguments": f"{self.arguments:,} bytes",
            "temporary": f"{self.temporary:,} bytes",
            "total": f"{self.total:,} bytes",
            "available": "unknown" if self.available is None else f"{self.available:,} bytes",
        }
        return "\n".join(f"{name:<12} {value}" for name, value in rows.items())


def read_compilation(compiled: Any, seconds: float, device: jax.Device) -> Compilation:
    """Reads XLA's own analyses of a program, ``jax.jit(f).lower(...).compile()``."""
    cost, memory = compiled.cost_analysis() or {}, compiled.memory_analysis()
    return Compilation(
        seconds=seconds,
        flops=cost.get("flops"),
        bytes_accessed=cost.get("bytes accessed"),
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        available=_memory_of(device),
    )


def keep_compilations(directory: str | os.PathLike[str]) -> None:
    """Keeps every compiled program in a directory, from which later processes take it.

    It switches on JAX's persistent compilation cache, for the whole process and for programs of any
    size. Call it before anything is compiled; a directory serves one version of jax and one kind of device,
    and any number of processes. Deleting it costs nothing but time.

    Args:
        directory: Usually one below the ``workdir`` of a run. It is made if it is missing.
    """
    Path(directory).mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_compilation_cache_dir", str(Path(directory).absolute()))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


def _memory_of(device: jax.Device) -> int | None:
    statistics = device.memory_stats() or {}
    if "bytes_limit" in statistics:
        return int(statistics["bytes_limit"])
    if device.platform == "cpu" and hasattr(os, "sysconf"):
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return None
