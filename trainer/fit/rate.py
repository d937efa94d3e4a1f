"""The learning rate of the latest update, as a metric and for the progress display."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from trainer.config import TrainingConfig, make_schedule
from trainer.config.schedules import needs_horizon
from trainer.core.learning_rate import has_plateau, learning_rate_of, plateau_scale
from trainer.core.report import Update
from trainer.errors import ArgumentError
from trainer.run import Layout, Run

Rate = float | jax.Array | None


def configured_rate(config: TrainingConfig, horizon: Any, update: Update) -> jax.Array:
    """Returns the learning rate of an update of a configured optimizer."""
    return _rate(config, horizon, update.opt_state, update.step)


def _rate(config: TrainingConfig, horizon: Any, opt_state: Any, updates_before: Any) -> jax.Array:
    rate: Any = config.optimizer.learning_rate
    if config.scheduler is not None:
        # The optimizer counts the updates that it made; the step counts those as well that ``nonfinite`` left out.
        counts = optax.tree_utils.tree_get_all_with_path(opt_state, "count")
        made = counts[0][1] - 1 if counts else updates_before
        rate = make_schedule(config.scheduler, rate, horizon)(made)
    return jnp.asarray(rate * plateau_scale(opt_state), jnp.float32)


class RateInForce:
    """Computes the learning rate of the latest update from the state of a run, without changing the step.

    The value is what ``report=["learning_rate"]`` reports. A call dispatches one small program on one device, behind
    the step whose state it reads, and does not wait: the result is ready when that step is. A constant rate is returned
    as a number, and nothing is dispatched. The result is None if the rate is unknown: the caller's optimizer keeps no
    learning rate in its state, or several.

    Args:
        config: The configuration.
        is_configured: Whether the optimizer was built from the configuration.
    """

    def __init__(self, config: TrainingConfig, *, is_configured: bool) -> None:
        self._config, self._is_configured = config, is_configured
        self._made_for: Layout | None = None
        self._of_leaves: Callable[[list[Any], int | None], Rate] = lambda leaves, horizon: None

    def __call__(self, run: Run) -> Rate:
        """Returns the rate: a scalar on the device that may still be in flight, a number, or None if unknown."""
        before, self._made_for = self._made_for, run.layout
        # Comparing is slow for a large model, and needed only after an assignment to the state, which replaces layout.
        if before is not run.layout and (before is None or before.treedef != run.layout.treedef):
            self._of_leaves = self._make(run.layout.treedef, run.leaves)
        return self._of_leaves(run.leaves, run.horizon)

    def _make(self, treedef: Any, leaves: list[Any]) -> Callable[[list[Any], int | None], Rate]:
        opt_state = jax.tree.unflatten(treedef, leaves).opt_state
        scheduler = self._config.scheduler
        if self._is_configured and scheduler is None and not has_plateau(opt_state):
            constant = float(self._config.optimizer.learning_rate)
            return lambda leaves, horizon: constant
        # Only scalars are passed, so that a call costs the same for a model with thousands of arrays.
        scalars = [index for index, leaf in enumerate(leaves) if leaf.ndim == 0]
        count = len(leaves)  # the function must not keep the arrays

        def rate_in_force(given: list[Any], horizon: Any) -> jax.Array:
            held: list[Any] = [None] * count
            for index, leaf in zip(scalars, given, strict=True):
                held[index] = leaf
            state = jax.tree.unflatten(treedef, held)
            if not self._is_configured:
                return jnp.asarray(learning_rate_of(state.opt_state), jnp.float32)
            until = horizon if scheduler is not None and needs_horizon(scheduler) else None
            return _rate(self._config, until, state.opt_state, state.step - 1)

        compiled = jax.jit(rate_in_force)

        def of_leaves(leaves: list[Any], horizon: int | None) -> Rate:
            # A scalar is replicated, so any shard holds its value.
            given = [leaves[index].addressable_data(0) for index in scalars]
            rate: jax.Array = compiled(given, jax.device_put(np.int32(horizon or 0)))
            return rate

        try:
            jax.eval_shape(rate_in_force, [leaves[index] for index in scalars], np.int32(1))
        except ArgumentError:
            return lambda leaves, horizon: None
        return of_leaves
