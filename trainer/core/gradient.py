"""The objective as a function of the params, and its gradient: the building blocks of a step."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
from flax import nnx

from trainer.core.mapped_axes import AxisName, average_if_changed, per_device
from trainer.core.modes import in_training_mode
from trainer.core.module_views import View, no_view
from trainer.core.nnx_bridge import merge_updated, refuse_changed_attributes, split_variables, static_attributes
from trainer.core.objective import NOT_REPORTED, call_objective, extension_losses, forward, refuse_shadowing
from trainer.state import TrainState
from trainer.types import Batch, ExtensionLike, LossFn, Metrics

Objective = Callable[[Any, TrainState, Batch, jax.Array], tuple[jax.Array, tuple[Metrics, TrainState]]]
"""Maps params, state, batch and key to the total loss, the metrics, and the state after the forward pass."""


class Gradient(NamedTuple):
    """The gradient of a batch, with metrics and state.

    Attributes:
        grads: A tree like the params.
        metrics: The metrics of the objective, and the total ``loss``.
        state: The state after the forward pass: its batch statistics, RNG counts and extension variables.
    """

    grads: Any
    metrics: Metrics
    state: TrainState


GradientFn = Callable[[TrainState, Batch, jax.Array], Gradient]
"""Maps a state, a batch and a key to the gradient at the params of the state."""


def make_objective(
    loss_fn: LossFn,
    wrt: nnx.filterlib.Filter,
    extensions: Mapping[str, ExtensionLike],
    axis_name: AxisName | None,
    view: View = no_view,
) -> Objective:
    """Returns the objective plus the losses of the extensions, as a function of the params; see `make_train_step`.

    ``view`` changes how the model computes, such as its precision.
    """
    reduce = average_if_changed(axis_name)

    def objective(
        params: Any, state: TrainState, batch: Batch, rng: jax.Array
    ) -> tuple[jax.Array, tuple[Metrics, TrainState]]:
        before = state.replace(params=params)
        model = in_training_mode(before.model())
        attributes = static_attributes(model)
        with view(model):
            loss, metrics, outputs = call_objective(loss_fn, model, batch, rng, state.step)
            enabled = {name: e for name, e in extensions.items() if e.is_enabled()}
            if enabled and outputs is NOT_REPORTED:
                outputs = forward(before, batch, view)
            context = {"model": model, "rng": rng, "step": state.step}
            losses, extension_variables = extension_losses(enabled, state, batch, outputs, context)
        refuse_shadowing(metrics, losses)
        refuse_changed_attributes(attributes, model, "model")
        _, variables = split_variables(model, wrt)
        after = state.replace(
            model_state=merge_updated(state.model_state, variables, "model_state", reduce),
            extensions={
                name: {**held, "variables": merge_updated(held["variables"], after, f"extensions/{name}", reduce)}
                if (after := extension_variables.get(name)) is not None
                else held
                for name, held in state.extensions.items()
            },
        )
        return sum(losses.values(), start=loss), ({**metrics, **losses}, after)

    return objective


def gradient_of(objective: Objective, axis_name: AxisName | None) -> GradientFn:
    """Returns the gradient of an objective; each device computes it on its own part of the batch."""

    def gradient(state: TrainState, batch: Batch, rng: jax.Array) -> Gradient:
        evaluate = jax.value_and_grad(objective, has_aux=True)
        params = per_device(state.params, axis_name)
        (loss, (metrics, after)), grads = evaluate(params, state, batch, rng)
        return Gradient(grads, {"loss": loss, **metrics}, after)

    return gradient
