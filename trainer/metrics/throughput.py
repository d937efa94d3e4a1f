"""How fast a run is: steps and examples in a second, and what it waits for."""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Callable, Collection, Iterator

import jax

# Dense bfloat16 peaks of one device in floating-point operations a second, from the vendors' data sheets.
PEAK_FLOPS = {
    "NVIDIA A100": 312e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,
}


@dataclasses.dataclass(frozen=True)
class Throughput:
    """The speed of an epoch.

    Attributes:
        steps_per_second: Updates.
        examples_per_second: Examples.
        waiting_for_data: The fraction of the time in which the device had nothing to do because the
            next batches were still being made.
        flops_per_second: What the model needs, counted on the traced step; None where that is not known.
        utilization: The fraction of the peak of the devices; None where the peak is not known.
    """

    steps_per_second: float
    examples_per_second: float
    waiting_for_data: float
    flops_per_second: float | None = None
    utilization: float | None = None

    def __str__(self) -> str:
        parts = [f"{self.steps_per_second:,.1f} steps/s", f"{self.examples_per_second:,.0f} examples/s"]
        if self.utilization is not None:
            parts.append(f"{self.utilization:.1%} of peak")
        parts.append(f"waiting for data {self.waiting_for_data:.0%}")
        return ", ".join(parts)


class Meter:
    """Adds up what an epoch does and how long that takes, and lets no more than two calls wait for the device.

    Args:
        flops: The floating-point operations of a step, None where that is not known.
        clock: Tells the time in seconds.
    """

    def __init__(self, flops: float | None, clock: Callable[[], float] = time.perf_counter) -> None:
        self._flops, self._clock = flops, clock
        self._started = clock()
        self._steps = self._examples = 0
        self._waited = self._paused = 0.0
        self._in_flight: collections.deque[jax.Array] = collections.deque()

    @contextlib.contextmanager
    def preparing(self) -> Iterator[None]:
        """Batches are made inside: if the device has finished before they are, it waits for them."""
        started = self._clock()
        yield
        if self._in_flight and self._in_flight[-1].is_ready():  # type: ignore[attr-defined]
            self._waited += self._clock() - started

    @contextlib.contextmanager
    def pausing(self) -> Iterator[None]:
        """Something else is done inside, which is not to be counted."""
        started = self._clock()
        yield
        self._paused += self._clock() - started

    def dispatched(self, result: jax.Array, steps: int, examples: int) -> None:
        """Counts a call of several steps on so many examples each; waits for the one before the last."""
        self._in_flight.append(result)
        self._steps += steps
        self._examples += steps * examples
        if len(self._in_flight) > 2:
            self._in_flight.popleft().block_until_ready()

    def read(self, devices: Collection[jax.Device]) -> Throughput:
        """Returns the speed since the start, on these devices."""
        seconds = max(self._clock() - self._started - self._paused, 1e-9)
        flops = None if self._flops is None else self._steps * self._flops / seconds
        kind = next(iter(devices)).device_kind
        peak = next((peak for name, peak in PEAK_FLOPS.items() if kind.startswith(name)), None)
        return Throughput(
            steps_per_second=self._steps / seconds,
            examples_per_second=self._examples / seconds,
            waiting_for_data=min(self._waited / seconds, 1.0),
            flops_per_second=flops,
            utilization=None if flops is None or peak is None else flops / (peak * len(devices)),
        )
