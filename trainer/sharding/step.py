"""Compiles a train step for a sharded state."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from trainer.sharding.mesh import batch_sharding, check_batch_fits, shares_threads
from trainer.sharding.partition import shardings_of


def jit_step(step: Callable[..., Any], state: Any, batch: Any = None) -> Any:
    """Compiles a train step that donates its state and returns it with the same shardings.

    Without explicit output shardings, the compiler may return a leaf with a different sharding than its
    argument had. The next step would then recompile, and devices would hold different parts.
    Equivalent to::

        shardings = shardings_of(state)
        jax.jit(
            step,
            in_shardings=(shardings, batch_sharding(mesh)),
            out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
            donate_argnums=0,
        )

    Args:
        step: ``(state, batch) -> (state, metrics)``, see `trainer.make_train_step` without ``axis_name``.
        state: The sharded state, or its shapes with shardings. It is never modified.
        batch: The sharding of the batch, or a tree of shardings; by default `batch_sharding`. NumPy arrays
            are placed accordingly. With several processes, make global arrays first
            (``jax.make_array_from_process_local_data``).

    Returns:
        The compiled ``(state, batch) -> (state, metrics)``, with ``lower`` and ``trace`` like a ``jax.jit``
        function. For a batch that cannot be split evenly, it raises `BatchError` from `check_batch_fits`
        instead of JAX's error, and does not donate the state. Over several CPU devices it returns when the step is
        done, since two calls in flight can deadlock there.

    Raises:
        ArgumentTypeError: The sharding of a leaf of ``state`` is not over a mesh.
    """
    shardings = shardings_of(state)
    mesh = jax.tree.leaves(shardings)[0].mesh
    split = batch_sharding(mesh) if batch is None else batch
    compiled = jax.jit(
        step,
        in_shardings=(shardings, split),
        out_shardings=(shardings, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
    )
    return _ShardedStep(compiled, split, waits=shares_threads(mesh))


class _ShardedStep:
    """A compiled step that explains why JAX rejects a batch. It checks only after a failure: a good batch is free."""

    def __init__(self, compiled: Any, batch_sharding: Any, *, waits: bool) -> None:
        self._compiled = compiled
        self._batch_sharding = batch_sharding
        self._waits = waits
        functools.update_wrapper(self, compiled)

    def __call__(self, state: Any, batch: Any) -> Any:
        result = self._explaining(self._compiled, state, batch)
        return jax.block_until_ready(result) if self._waits else result

    def lower(self, state: Any, batch: Any) -> Any:
        return self._explaining(self._compiled.lower, state, batch)

    def trace(self, state: Any, batch: Any) -> Any:
        return self._explaining(self._compiled.trace, state, batch)

    def _explaining(self, function: Callable[..., Any], state: Any, batch: Any) -> Any:
        try:
            return function(state, batch)
        except (TypeError, ValueError):
            check_batch_fits(batch, self._batch_sharding)
            raise
