"""Throughput: steps and examples per second, and the time that devices wait for data."""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection, Iterator
from typing import Any

import jax
import jax.numpy as jnp

SPEED = "speed/"
"""The prefix of the names of throughput metrics."""

# Peak dense bfloat16 FLOP/s of one device, from the data sheets of NVIDIA and Google. The keys are complete
# `jax.Device.device_kind` strings: boards with the same base name differ by a quarter (H100 SXM, NVL and PCIe), so a
# prefix would overstate some of them.
PEAK_FLOPS = {
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA H100 NVL": 835e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
    "NVIDIA H200 NVL": 835e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5e": 197e12,
    "TPU v5": 459e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
    "TPU v6e": 918e12,
}


@dataclasses.dataclass(frozen=True)
class Throughput:
    """The speed of an epoch.

    Attributes:
        steps_per_second: Updates per second.
        examples_per_second: Examples per second.
        waiting_for_data: The fraction of time in which the devices were idle because the next batch was not
            ready.
        flops_per_second: Floating-point operations per second of the step as traced, including the
            optimizer and recomputation by `jax.checkpoint`. None if they cannot be counted: if the step calls a Pallas
            or foreign kernel, or if a hook for every batch sees the batches of a loader.
        utilization: ``flops_per_second`` as a fraction of the devices' bfloat16 peak. Because of what it includes, it
            is the hardware FLOPs utilization (HFU), not the model FLOPs utilization (MFU) of papers, which is lower.
            None unless the operands of the matrix products are in bfloat16 (at least 99 % of their operations) and
            the device's peak is known.
    """

    steps_per_second: float
    examples_per_second: float
    waiting_for_data: float
    flops_per_second: float | None = None
    utilization: float | None = None

    def __str__(self) -> str:
        parts = [f"{self.steps_per_second:,.1f} steps/s", f"{self.examples_per_second:,.0f} examples/s"]
        if self.utilization is not None:
            parts.append(f"{self.utilization:.1%} of the bfloat16 peak")
        parts.append(f"waiting for data {self.waiting_for_data:.0%}")
        return ", ".join(parts)


class Meter:
    """Measures the throughput of an epoch. It never waits for a device.

    Args:
        flops: The floating-point operations of a step over all devices. None if they cannot be counted.
        dtype: The dtype of the operands of the step's matrix products. None if unknown or mixed.
        clock: Returns the time in seconds.
    """

    def __init__(self, flops: float | None, dtype: Any = None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._clock = clock
        self.count(flops, dtype)
        self._started = clock()
        self._steps = self._examples = 0
        self._waited = self._paused = self._compiled = 0.0
        self._latest: jax.Array | None = None

    def count(self, flops: float | None, dtype: Any) -> None:
        """Sets the operations of a step, of the earlier ones too, once they are known; arguments as of the class."""
        self._flops = flops
        self._is_bfloat16 = dtype is not None and jnp.dtype(dtype) == jnp.bfloat16

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Times the block, which prepares the next batches.

        The time counts as waiting for data if the last dispatched call has finished by the end of the block. It may
        have finished at any time during the block, so ``waiting_for_data`` is an upper bound.
        """
        started = self._clock()
        yield
        # `is_ready` is a method of JAX's arrays (seen in jax 0.10.2), not of the documented `jax.Array`. It does not
        # wait; block_until_ready would stall the dispatch of the next call.
        if self._latest is not None and self._latest.is_ready():  # type: ignore[attr-defined]
            self._waited += self._clock() - started

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        """Excludes the time inside the block, such as a validation or a checkpoint."""
        started = self._clock()
        yield
        self._paused += self._clock() - started

    def compiled(self, seconds: float) -> None:
        """Counts the seconds of a compilation, which are part of the time; see `compiling`."""
        self._compiled += seconds

    def dispatched(self, result: jax.Array, steps: int, examples: int) -> None:
        """Counts a call.

        Args:
            result: An array from the call that no later call consumes by donation.
            steps: The number of steps in the call.
            examples: The number of examples in the batch of each step.
        """
        self._latest = result
        self._steps += steps
        self._examples += steps * examples

    @property
    def waiting_for_data(self) -> float:
        """The fraction of time so far in which the devices were idle because the next batch was not ready."""
        return min(self._waited / self._seconds, 1.0)

    @property
    def compiling(self) -> float:
        """The fraction of the time so far in which a step was compiled, and none was made."""
        return min(self._compiled / self._seconds, 1.0)

    @property
    def _seconds(self) -> float:
        return max(self._clock() - self._started - self._paused, 1e-9)

    def read(self, devices: Collection[jax.Device]) -> Throughput:
        """Returns the throughput since the meter was created.

        Args:
            devices: All devices that the step runs on, all of the same kind.
        """
        seconds = self._seconds
        flops = None if self._flops is None else self._steps * self._flops / seconds
        peak = PEAK_FLOPS.get(next(iter(devices)).device_kind) if self._is_bfloat16 else None
        return Throughput(
            steps_per_second=self._steps / seconds,
            examples_per_second=self._examples / seconds,
            waiting_for_data=min(self._waited / seconds, 1.0),
            flops_per_second=flops,
            utilization=None if flops is None or peak is None else flops / (peak * len(devices)),
        )
