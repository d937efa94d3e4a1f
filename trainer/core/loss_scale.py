"""Dynamic loss scaling, which keeps gradients within the range of float16."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainer.core.gradient import Gradient, GradientFn, Objective, gradient_of
from trainer.core.mapped_axes import AxisName
from trainer.errors import ObjectiveError, StateError
from trainer.state import TrainState
from trainer.types import LOSS_SCALE, Batch, Metrics

Finish = Callable[[TrainState, TrainState, Any, Metrics], tuple[TrainState, Metrics]]
"""Maps the states before and after an update, its gradient and its metrics to the result of the step."""


def as_it_is(before: TrainState, after: TrainState, grads: Any, metrics: Metrics) -> tuple[TrainState, Metrics]:
    """The `Finish` of a step without a loss scale."""
    del before, grads
    return after, metrics


def scaled_gradient_of(objective: Objective, axis_name: AxisName | None) -> GradientFn:
    """Returns `gradient_of`, computed with the loss L multiplied by the scale s: ``g = ∇_θ(s · L) / s``, in float32.

    Numbers below 6e-8 underflow to zero in float16; scaling avoids that. On overflow, g is not finite.
    """

    def scaled(params: Any, state: TrainState, batch: Batch, rng: jax.Array) -> Any:
        loss, (metrics, after) = objective(params, state, batch, rng)
        if LOSS_SCALE in metrics:
            raise ObjectiveError(
                f"`loss_fn` returned a metric `{LOSS_SCALE}`, which a float16 step reports; use another name."
            )
        return loss * _entry(state)["scale"], ({**metrics, "loss": loss}, after)

    inner = gradient_of(scaled, axis_name)

    def gradient(state: TrainState, batch: Batch, rng: jax.Array) -> Gradient:
        grads, metrics, after = inner(state, batch, rng)
        scale = _entry(state)["scale"]
        return Gradient(jax.tree.map(lambda leaf: leaf / scale.astype(leaf.dtype), grads), metrics, after)

    return gradient


def adapt_scale(growth_interval: int) -> Finish:
    """Returns the `Finish` that skips an update if it is not finite, and adapts the scale s.

    With n finite steps in a row since the scale last changed, this one included, and N the ``growth_interval``::

        s' = s / 2  if the gradient is not finite: the update is skipped, and the state changes only in s and the step
        s' = 2 s    if n = N; n restarts at 0
        s' = s      else

    s is clipped to the range of normal float32 numbers. This is the algorithm of ``flax.training.dynamic_scale`` and
    of section 3.2 of Micikevicius et al. 2018, "Mixed Precision Training". Nothing waits for the device. A skipped
    step counts as a step, since the host counts calls, but does not advance the optimizer's schedules. The gradient is
    averaged over the mapped axis, so all devices make the same decision.
    """

    def finish(before: TrainState, after: TrainState, grads: Any, metrics: Metrics) -> tuple[TrainState, Metrics]:
        entry = _entry(before)
        scale, limits = entry["scale"], np.finfo(np.float32)
        is_finite = jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(grads)]))
        count = entry["good_steps"] + 1
        grows = count >= growth_interval
        larger = jnp.where(grows, jnp.minimum(2 * scale, limits.max), scale)
        adapted = {
            "scale": jnp.where(is_finite, larger, jnp.maximum(scale / 2, limits.tiny)),
            "good_steps": jnp.where(is_finite & ~grows, count, 0),
        }
        kept = before.replace(step=after.step)
        chosen = jax.tree.map(lambda new, old: new if new is old else jnp.where(is_finite, new, old), after, kept)
        return chosen.replace(extensions={**chosen.extensions, LOSS_SCALE: adapted}), {**metrics, LOSS_SCALE: scale}

    return finish


def _entry(state: TrainState) -> dict[str, Any]:
    entry = state.extensions.get(LOSS_SCALE, {})
    if entry.keys() != {"scale", "good_steps"}:
        raise StateError(
            "`state` holds no loss scale, which a float16 step adapts; create it with "
            "TrainState.create(..., precision=...), or pass state.with_precision(...)."
        )
    return entry
