"""`SingleDevice`: the placement on JAX's default device."""

import functools
from collections.abc import Callable, Mapping
from typing import Any, final

import jax
import numpy as np
import optax
from jax.sharding import NamedSharding

from trainer.batches import checked_batch
from trainer.data.host_arrays import flat_copy, private_copy
from trainer.data.memory import Epoch
from trainer.sharding.arrays import to_global
from trainer.state import TrainState
from trainer.types import Batch

_CACHED_INTS = 256


@final
class SingleDevice:
    """JAX's default device.

    Batches stay uncommitted, so a compiled step moves them to wherever its state is.
    """

    num_processes = 1
    one_call_at_a_time = False
    is_primary_process = True
    replicated: NamedSharding | None = None

    def __init__(self) -> None:
        self._ints = cached_ints(None)

    def create(
        self,
        model: Any,
        optimizer: optax.GradientTransformation,
        rng: jax.Array,
        held: Mapping[str, Any],
    ) -> TrainState:
        return TrainState.create(model, optimizer, rng=rng, **held)

    def adopt(self, state: TrainState) -> TrainState:
        return state

    def check_batch_size(self, batch_size: int) -> None:
        del batch_size

    def own_examples(self, examples: int) -> int:
        return examples

    def check_context(self) -> None:
        pass

    def place_batch(
        self, batch: Any, *, may_be_short: bool = True, at_once: bool = False, is_private: bool = False
    ) -> tuple[Batch, int]:
        del may_be_short
        known = None if is_private else flat_copy(batch)
        if known is not None:
            return known if at_once else (jax.device_put(known[0]), known[1])
        batch, length = checked_batch(batch)
        batch = batch if is_private else private_copy(batch)
        return batch if at_once else jax.device_put(batch), number_of_examples(length)

    def abstract_batch(self, batch: Any) -> tuple[Any, int]:
        batch, length = checked_batch(batch)
        return batch, number_of_examples(length)

    def next_batch(self, epoch: Epoch, *, at_once: bool = False) -> tuple[Batch, int] | None:
        batch = next(epoch, None)
        return None if batch is None else (batch if at_once else jax.device_put(batch), epoch.drawn)

    def next_batches(self, epoch: Epoch, count: int, capacity: int) -> Batch:
        batches: Batch = jax.device_put(epoch.stacked(count, capacity))
        return batches

    def abstract_batch_of(self, epoch: Epoch) -> Any:
        return epoch.specification()

    def replicated_int(self, value: int) -> jax.Array:
        return self._ints(value)


def number_of_examples(length: int | None) -> int:
    """Returns the examples of a batch of this length; a batch without a common length counts as one."""
    return 1 if length is None else length


def cached_ints(sharding: NamedSharding | None) -> Callable[[int], jax.Array]:
    """Returns a function from an int to an int32 array on every device, with a bounded cache.

    The values are the number of steps in a call, which repeats, and the index of an evaluation batch, which is
    unbounded.
    """

    @functools.lru_cache(maxsize=_CACHED_INTS)
    def replicated_int(value: int) -> jax.Array:
        array = jax.device_put(np.int32(value))
        return array if sharding is None else to_global(array, sharding)

    return replicated_int
