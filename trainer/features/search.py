"""Searches for settings: the learning rate range test, and the largest batch size that fits."""

import bisect
import contextlib
import dataclasses
import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
import optax

from trainer.batches import batch_length
from trainer.compile.cost import ProgramCost, cost_of
from trainer.core.checks import check_count, check_number
from trainer.core.optimizer import adapt_optimizer, initial_opt_state
from trainer.errors import ArgumentError, BatchError
from trainer.state import TrainState
from trainer.steps import make_train_step
from trainer.types import Batch, LossFn

_SMOOTHING = 0.9
_DIVERGED = 4.0


@dataclasses.dataclass(frozen=True)
class RateSearch:
    """The result of a range test.

    Attributes:
        rates: The tested learning rates, ascending.
        losses: The loss of each step, before its update.
        suggestion: The rate at which the smoothed loss falls fastest, without the first tenth of the rates, where the
            average covers few batches; None if it never falls.
    """

    rates: np.ndarray[Any, Any]
    losses: np.ndarray[Any, Any]
    suggestion: float | None

    @property
    def smoothed(self) -> np.ndarray[Any, Any]:
        """The exponential moving average of the losses, with bias correction."""
        return _smoothed(self.losses)

    def plot(self, path: str | os.PathLike[str] | None = None) -> Any:
        """Draws the loss over the rates, with the suggestion marked.

        Args:
            path: Where to write it: a ``.png``, ``.svg`` or ``.pdf`` file.

        Returns:
            The ``matplotlib.figure.Figure``, which a notebook shows; None if it was written to ``path``.

        Raises:
            ArgumentError: ``path`` has another extension.
            ImportError: matplotlib is not installed (the extra ``plot``).
        """
        from trainer.metrics.plots import plot_search

        return plot_search(self, path)

    def __str__(self) -> str:
        tried = f"{len(self.rates)} learning rates from {self.rates[0]:.2g} to {self.rates[-1]:.2g}"
        if self.suggestion is None:
            return f"{tried}: the loss falls at none of them"
        return f"{tried}: the loss falls fastest at {self.suggestion:.2g}"


def find_learning_rate(
    loss_fn: LossFn,
    make_optimizer: Callable[..., optax.GradientTransformation],
    state: TrainState,
    batches: Iterable[Batch],
    *,
    low: float = 1e-6,
    high: float = 1.0,
    steps: int = 100,
    **options: Any,
) -> RateSearch:
    """Finds a learning rate: trains a copy of a state for a few steps with increasing rates.

    Step i of n has the rate ``low · (high / low)^(i / (n - 1))``. It stops early if the smoothed loss is not finite,
    or four times its smallest value so far. This is the range test of Smith 2017, "Cyclical Learning Rates for Training
    Neural Networks"; as in fastai, the suggestion is where the loss falls fastest over the logarithm of the rate. It is
    a starting point, not the best rate.

    Args:
        loss_fn: The objective.
        make_optimizer: Makes the optimizer, ``make_optimizer(learning_rate=...)``, such as ``optax.adam``.
        state: The state to start from. It is not modified; its optimizer state is not used.
        batches: An iterable of batches, restarted when it ends.
        low, high: The first and the last learning rate.
        steps: The number of rates to try, at least 10.
        options: Further arguments of `make_train_step`.

    Raises:
        ArgumentError, ArgumentTypeError: An argument cannot be used, or there is no batch.

    Example:
        >>> from flax import nnx
        >>> import jax.numpy as jnp
        >>> state = TrainState.create(nnx.Linear(2, 1, rngs=nnx.Rngs(0)), optax.sgd(0.1), rng=jax.random.key(0))
        >>> def loss_fn(model, batch, rng, step):
        ...     return jnp.mean((model(batch["x"]) - 1.0) ** 2), {}
        >>> found = find_learning_rate(loss_fn, optax.sgd, state, [{"x": jnp.eye(2)}])
        >>> 1e-3 < found.suggestion < 1
        True
    """
    rates = rates_between(low, high, steps)
    optimizer = adapt_optimizer(optax.inject_hyperparams(make_optimizer)(learning_rate=float(rates[0])))
    start = state.copy()
    start = start.replace(opt_state=jax.tree.map(jax.numpy.array, initial_opt_state(optimizer, start.params)))
    return try_rates(make_train_step(loss_fn, optimizer, **options), start, _endless(batches), rates)


def rates_between(low: float, high: float, steps: int) -> np.ndarray[Any, Any]:
    """Returns the learning rates of a range test, in float64; invalid arguments are refused."""
    if check_count(steps, "steps") < 10:
        raise ArgumentError(f"`steps` is {steps}; a range test needs at least 10.")
    if not 0 < check_number(low, "low") < check_number(high, "high") < math.inf:
        raise ArgumentError(f"`low` is {low!r} and `high` {high!r}; they must be positive, finite and ascending.")
    return np.geomspace(float(low), float(high), int(steps))


def try_rates(
    step: Callable[..., Any], state: TrainState, batches: Iterator[Batch], rates: np.ndarray[Any, Any]
) -> RateSearch:
    """Runs the range test with a step and a state whose optimizer keeps its learning rate; it donates the state."""

    def step_at(state: TrainState, batch: Batch, rate: Any) -> tuple[TrainState, jax.Array]:
        state, metrics = step(state.with_learning_rate(rate), batch)
        return state, metrics["loss"]

    compiled = jax.jit(step_at, donate_argnums=0)
    losses: list[float] = []
    for rate, batch in zip(rates, batches, strict=False):
        state, loss = compiled(state, batch, np.float32(rate))
        losses.append(float(loss))
        smoothed = _smoothed(np.array(losses))
        if not math.isfinite(smoothed[-1]) or smoothed[-1] > _DIVERGED * smoothed.min():
            break
    return RateSearch(rates[: len(losses)], np.array(losses), _steepest(rates[: len(losses)], np.array(losses)))


def find_batch_size(
    step: Callable[[TrainState, Batch], tuple[TrainState, Any]],
    state: TrainState,
    example: Batch,
    *,
    high: int = 65536,
    memory: int | None = None,
) -> int:
    """Returns the largest power-of-two batch size whose step fits into device memory.

    It compiles the step for some sizes, with its state donated, and runs nothing. The required memory comes from XLA's
    own analysis: arguments + outputs - outputs aliased to arguments + temporaries. Other memory use on the device is
    unknown, so leave some headroom.

    Args:
        step: A pure step, such as `make_train_step` returns.
        state: A state for it. It is not modified.
        example: A batch of any size: arrays, or ``jax.ShapeDtypeStruct``. Only the shapes after the first dimension,
            the dtypes, and the sharding over a mesh, if any, are used; the state has its own sharding.
        high: The largest size to try.
        memory: The bytes available; by default those of the device.

    Raises:
        ArgumentError: Not even the smallest batch that can be split over the devices fits.
        ArgumentTypeError: ``high`` is not an integer, or ``memory`` is not a number.
        BatchError: ``example`` is not a batch, or its arrays have no common first dimension.

    Example:
        >>> from flax import nnx
        >>> state = TrainState.create(nnx.Linear(256, 1, rngs=nnx.Rngs(0)), optax.sgd(0.1), rng=jax.random.key(0))
        >>> def loss_fn(model, batch, rng, step):
        ...     return jax.numpy.mean(model(batch["x"]) ** 2), {}
        >>> example = {"x": jax.ShapeDtypeStruct((1, 256), "float32")}
        >>> find_batch_size(make_train_step(loss_fn, optax.sgd(0.1)), state, example, memory=2**20)
        512
    """
    batch_length(example, "example")
    jitted = jax.jit(step, donate_argnums=0)

    def cost(size: int) -> ProgramCost:
        return cost_of(jitted.lower(state, _rows(example, size)).compile(), state, 0.0)

    def can_be_shared(size: int) -> bool:
        with contextlib.suppress(ValueError):
            for leaf in jax.tree.leaves(_rows(example, size)):
                if leaf.sharding is not None:
                    leaf.sharding.shard_shape(leaf.shape)
            return True
        return False

    return largest_that_fits(cost, can_be_shared, high, memory)


def largest_that_fits(
    cost: Callable[[int], ProgramCost], can_be_shared: Callable[[int], bool], high: int, memory: int | None
) -> int:
    """Returns the largest power of two up to ``high`` whose step fits into the available memory."""
    high, limit = check_count(high, "high"), None if memory is None else check_number(memory, "memory")
    sizes = [size for size in (1 << exponent for exponent in range(high.bit_length())) if can_be_shared(size)]
    too_few: dict[int, BatchError] = {}

    def is_too_large(size: int) -> bool:
        try:
            found = cost(size)
        except BatchError as error:  # too few examples for a step, such as for its micro-batches
            too_few[size] = error
            return False
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            return True  # XLA for GPUs refuses to compile what can never fit
        available = found.available if limit is None else limit
        return available is not None and found.total > available

    count = bisect.bisect_left(sizes, True, key=is_too_large)
    if not count:
        smallest = f"a step of {sizes[0]} needs more memory than there is" if sizes else f"`high` is {high}"
        raise ArgumentError(f"no size of a batch fits: {smallest}.")
    if sizes[count - 1] in too_few:
        raise too_few[sizes[count - 1]]
    return sizes[count - 1]


def _rows(example: Batch, size: int) -> Any:
    """Returns the shapes of a batch of this size, with the shardings of the example's arrays over a mesh."""

    def rows(leaf: Any) -> jax.ShapeDtypeStruct:
        sharding = getattr(leaf, "sharding", None)
        over_mesh = sharding if isinstance(sharding, jax.sharding.NamedSharding) else None
        return jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype, sharding=over_mesh)

    return jax.tree.map(rows, example)


def _endless(batches: Iterable[Batch]) -> Iterator[Batch]:
    for _ in itertools.count():
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise ArgumentError("`batches` has no batch, or is an iterator with fewer than `steps`.")


def _smoothed(losses: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    total, averages = 0.0, []
    for count, loss in enumerate(losses, start=1):
        total = _SMOOTHING * total + (1 - _SMOOTHING) * loss
        averages.append(total / (1 - _SMOOTHING**count))
    return np.array(averages)


def _steepest(rates: np.ndarray[Any, Any], losses: np.ndarray[Any, Any]) -> float | None:
    smoothed = _smoothed(losses)
    known = np.isfinite(smoothed)
    # After the smallest loss, the run is diverging.
    end = int(np.argmin(np.where(known, smoothed, np.inf))) + 1
    # The first averages cover few batches, whose differences look like a steep fall. Between two batches the noise is
    # larger than the fall, so the fall is measured over a tenth of the rates.
    start, width = len(losses) // 10, max(1, len(losses) // 20)
    if end - start <= 2 * width:
        return None
    falls = smoothed[start + 2 * width : end] - smoothed[start : end - 2 * width]
    return float(rates[start + width + int(np.argmin(falls))]) if falls.min() < 0 else None
