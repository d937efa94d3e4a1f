"""Calling the objective and the extensions, and checking their results."""

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp

from trainer.batches import summarize
from trainer.core.checks import check_call
from trainer.core.modes import in_training_mode
from trainer.core.module_views import View
from trainer.core.nnx_bridge import Flat, refuse_changed_attributes, static_attributes, variables_of, with_variables
from trainer.core.partial_metrics import Vector, Weighted, partial_metrics
from trainer.errors import ArgumentError, ArgumentTypeError, ObjectiveError
from trainer.state import TrainState
from trainer.types import BATCH_WEIGHT, MODEL_OUTPUTS, Batch, ExtensionLike, LossFn, Metrics

NOT_REPORTED = object()
"""Marks that an objective reported no model outputs; None is a valid value to report."""


def call_objective(
    loss_fn: LossFn, model: Any, batch: Batch, rng: jax.Array, step: jax.Array
) -> tuple[jax.Array, Metrics, Any]:
    """Calls the objective and checks its result.

    Returns:
        The loss, the metrics as scalars, and the reported ``model_outputs`` or `NOT_REPORTED`.

    Raises:
        ObjectiveError: The objective violates the contract of `trainer.LossFn`.
    """
    try:
        result = loss_fn(model, batch, rng, step)
    except Exception as error:
        error.add_note(f"raised in `loss_fn` on a batch of {summarize(batch)}")
        raise
    if not isinstance(result, tuple) or len(result) != 2:
        raise ObjectiveError(
            f"`loss_fn` returned {_describe_result(result)}; it must return a pair (loss, metrics), "
            f"with an empty mapping where there are no metrics."
        )
    loss, metrics = result
    loss = check_loss(loss, "`loss_fn` returned a loss that")
    metrics = as_metrics(metrics, "loss_fn")
    if "step" in metrics:
        raise ObjectiveError(
            "`loss_fn` returned a metric `step`, which is the name of the number of updates finished; use another name."
        )
    outputs = metrics.get(MODEL_OUTPUTS, NOT_REPORTED)
    named = {name: value for name, value in metrics.items() if name not in (MODEL_OUTPUTS, "loss")}
    return loss, check_metrics(named), outputs


def forward(state: TrainState, batch: Batch, view: View) -> Any:
    """Returns ``model(batch["input"])`` if that call is possible, else None.

    It runs on a separate model with the same variables, RNG counts included, so an extension changes no batch
    statistics. It has a cost: if the objective makes the same call, XLA shares most of the forward pass but computes
    the backward pass twice (44 % more operations for a 64-512-1 perceptron). Reporting ``model_outputs`` avoids that.
    """
    model = in_training_mode(state.model())
    if not isinstance(batch, Mapping) or "input" not in batch or not callable(model):
        return None
    try:
        with view(model):
            return model(batch["input"])
    except Exception as error:
        error.add_note(
            'raised in `model(batch["input"])`, called because an extension is enabled and `loss_fn` '
            f"returned no `{MODEL_OUTPUTS}` in its metrics; return them (they may be None) to avoid this call"
        )
        raise


def extension_losses(
    enabled: dict[str, ExtensionLike],
    state: TrainState,
    batch: Batch,
    outputs: Any,
    context: dict[str, Any],
) -> tuple[Metrics, dict[str, Flat]]:
    """Returns the weighted losses, and the variables of each extension after its evaluation."""
    losses: Metrics = {}
    variables: dict[str, Flat] = {}
    for name, extension in enabled.items():
        if name not in state.extensions:
            raise ArgumentError(
                f"`extensions[{name!r}]` is not in the state, which was created with "
                f"{sorted(state.extensions) or 'none'}; pass the same extensions to TrainState.create."
            )
        held = state.extensions[name]
        # Variables come from the state, Python attributes from the caller's object.
        traced = with_variables(extension, held["variables"])
        attributes = static_attributes(traced)
        rng = jax.random.fold_in(context["rng"], crc32(name.encode()))
        loss = traced.loss_fn(batch, outputs, **_taken(traced.loss_fn, {**context, "rng": rng}))
        loss = check_loss(loss, f"`extensions[{name!r}].loss_fn` returned a loss that")
        refuse_changed_attributes(attributes, traced, f"extensions/{name}")
        losses[f"{name}_loss"] = held["weight"].astype(loss.dtype) * loss
        variables[name] = variables_of(traced)
    return losses, variables


def _taken(function: Callable[..., Any], offered: dict[str, Any]) -> dict[str, Any]:
    """Returns the offered keyword arguments that a function accepts, besides its first two parameters."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # a function without a signature
        return offered
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return offered
    named = {one.name for one in parameters[2:] if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    return {name: value for name, value in offered.items() if name in named}


def refuse_shadowing(metrics: Metrics, losses: Metrics) -> None:
    """Raises `ObjectiveError` if the objective reports a metric under the name of an extension's loss."""
    for name in losses:
        if name in metrics:
            raise ObjectiveError(
                f"`loss_fn` returned a metric `{name}`, which is also the loss of the extension "
                f"{name.removesuffix('_loss')!r}; rename one of the two."
            )


def check_loss(loss: Any, subject: str) -> jax.Array:
    """Returns ``loss`` as an array; raises `ObjectiveError` unless it is a floating scalar."""
    try:
        array = jnp.asarray(loss)
    except (TypeError, ValueError) as error:
        raise ObjectiveError(f"{subject} is of type {type(loss).__name__}; it must be a scalar.") from error
    if array.shape != ():
        raise ObjectiveError(
            f"{subject} has shape {array.shape}; it must be a scalar. Average or sum over the examples."
        )
    if not jnp.issubdtype(array.dtype, jnp.floating):
        raise ObjectiveError(f"{subject} has dtype {array.dtype}; it must be floating to be differentiated.")
    return array


def as_metrics(metrics: Any, source: str) -> Mapping[Any, Any]:
    """Returns what ``source`` returned as metrics; None is none.

    Raises:
        ObjectiveError: They are not a mapping.
    """
    if metrics is None:
        return {}
    if not isinstance(metrics, Mapping):
        raise ObjectiveError(
            f"`{source}` returned metrics of type {type(metrics).__name__}; they must be a mapping of names to scalars."
        )
    return metrics


def flat_metrics(metrics: Mapping[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """Yields the name and value of every metric; in a nested mapping the name is the path, ``"eval/accuracy"``."""
    for name, value in metrics.items():
        if isinstance(value, Mapping) and isinstance(name, str):
            yield from ((f"{name}/{inner}", one) for inner, one in flat_metrics(value))
        else:
            yield name, value


def check_metrics(named: Mapping[str, Any], source: str = "loss_fn") -> Metrics:
    """Returns the metrics that ``source`` returned, as scalars and as what merges."""
    metrics: Metrics = {}
    for name, value in flat_metrics(named):
        found: Metrics = {**(partial_metrics(name, value, source) or {name: check_metric(name, value, source)})}
        means = [one for one in found.values() if isinstance(one, jax.Array | Weighted | Vector)]
        for leaf in jax.tree.leaves(means):  # of what has a merge of its own, the parts may be complex
            if not _is_real(dtype := leaf.dtype):
                raise ObjectiveError(
                    f"`{source}` returned a metric `{name}` of dtype {dtype}; metrics are real numbers. Report its "
                    f"parts, such as .real and .imag, or its absolute value."
                )
        for twice in metrics.keys() & found.keys():
            raise ObjectiveError(f"`{source}` returned two metrics `{twice}`; rename one of them.")
        metrics |= found
    return metrics


def _is_real(dtype: Any) -> bool:
    return not jnp.issubdtype(dtype, jnp.complexfloating) and not jnp.issubdtype(dtype, jax.dtypes.extended)


def check_metric(name: Any, value: Any, source: str = "loss_fn") -> jax.Array:
    """Returns a metric from ``source`` as an array; raises `ObjectiveError` unless it is a scalar with a name."""
    if not isinstance(name, str):
        raise ObjectiveError(f"`{source}` returned a metric named {name!r}; names must be strings.")
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise ObjectiveError(
            f"`{source}` returned a metric `{name}` of type {type(value).__name__}; it must be a scalar."
        ) from error
    if array.shape != ():
        reported = f", or report it as `{MODEL_OUTPUTS}`" if source == "loss_fn" else ""
        raise ObjectiveError(
            f"`{source}` returned a metric `{name}` of shape {array.shape}; metrics are scalars. Average it{reported}. "
            f"Means by entry are trainer.vector(values, weights)."
        )
    return array


def _describe_result(result: Any) -> str:
    if isinstance(result, tuple):
        return f"a tuple of {len(result)}"
    return "a bare loss" if getattr(result, "shape", None) == () else type(result).__name__


def _handles_events_only(extension: Any) -> bool:
    kind = type(extension)  # the class, so that no property is evaluated
    names = {name for name in dir(kind) if callable(getattr(kind, name, None))}
    hooks = {name for name in names if name.startswith("on_")}
    # A loss under another name, such as `compute_loss(batch, outputs)`, is a mistake.
    losses = (name for name in names - hooks if "loss" in name.lower())
    return bool(hooks) and not any(_takes_two(getattr(extension, name)) for name in losses)


def _takes_two(function: Callable[..., Any]) -> bool:
    try:
        inspect.signature(function).bind(None, None)
    except (TypeError, ValueError):
        return False
    return True


def requiring_weight(loss_fn: LossFn) -> LossFn:
    """Wraps an objective for padded batches: raises `ObjectiveError` if it reports no ``batch_weight``."""

    def weighted(model: Any, batch: Any, rng: jax.Array, step: jax.Array) -> tuple[jax.Array, Mapping[str, Any]]:
        result = loss_fn(model, batch, rng, step)
        if isinstance(result, tuple) and isinstance(result[-1], Mapping) and BATCH_WEIGHT not in result[-1]:
            raise ObjectiveError(
                f"`loss_fn` reports no `{BATCH_WEIGHT}`, so the rows with which `pad_to`='batch' pads a short batch "
                f"would count. Average each example's loss by the mask, and report its sum:\n"
                f"    weight = batch['mask'].sum()\n"
                f"    loss = (losses * batch['mask']).sum() / weight\n"
                f"    return loss, {{'{BATCH_WEIGHT}': weight}}"
            )
        return result

    return weighted


def check_loss_fn(loss_fn: Any) -> None:
    """Raises `ArgumentTypeError` unless ``loss_fn`` can be called with its four arguments."""
    if not callable(loss_fn):
        raise ArgumentTypeError(
            f"`loss_fn` is of type {type(loss_fn).__name__}; it must be a callable "
            f"loss_fn(model, batch, rng, step) -> (loss, metrics)."
        )
    check_call(loss_fn, "loss_fn", "loss_fn(model, batch, rng, step), by position", None, None, None, None)


def with_losses(extensions: Mapping[str, Any]) -> dict[str, ExtensionLike]:
    """Returns the extensions that have a loss; the others only handle events, and are not in the state."""
    return {name: extension for name, extension in extensions.items() if hasattr(extension, "loss_fn")}


def check_extensions(extensions: Mapping[str, ExtensionLike] | None) -> dict[str, ExtensionLike]:
    """Returns the extensions as a dict. An extension that handles events needs no loss.

    Raises:
        ArgumentTypeError: An extension lacks methods or attributes of `trainer.types.ExtensionLike`; all are listed.
        ArgumentError: Two have the same name, or a weight is not finite.
    """
    if extensions is None:
        return {}
    if not isinstance(extensions, Mapping):
        raise ArgumentTypeError(
            f"`extensions` is of type {type(extensions).__name__}; it must be a mapping of names to extensions."
        )
    names: dict[str, str] = {}
    for key, extension in extensions.items():
        lacks = [
            what
            for what, present in (
                ("is_enabled()", callable(getattr(extension, "is_enabled", None))),
                ("weight", hasattr(extension, "weight")),
                ("loss_fn(batch, model_outputs, **kwargs)", callable(getattr(extension, "loss_fn", None))),
            )
            if not present
        ]
        if isinstance(extension, type) and (lacks or isinstance(getattr(extension, "weight", None), property)):
            raise ArgumentTypeError(
                f"`extensions[{key!r}]` is the class {extension.__name__}; it must be an object of it, such as "
                f"{extension.__name__}()."
            )
        if lacks and not _handles_events_only(extension):
            raise ArgumentTypeError(
                f"`extensions[{key!r}]` is of type {type(extension).__name__} and has no "
                f"{', no '.join(lacks)}; derive it from trainer.Extension or add what is missing."
            )
        if hasattr(extension, "weight"):
            check_weight(extension.weight, key)
        name = getattr(getattr(extension, "config", None), "name", None) or key
        if name in names:
            raise ArgumentError(
                f"`extensions[{names[name]!r}]` and `extensions[{key!r}]` are both named {name!r}; "
                f"give each a name of its own."
            )
        names[name] = key
    return dict(extensions)


def check_weight(weight: Any, key: str) -> None:
    """Raises `ArgumentError` if the weight of an extension is known and not finite; it may be negative (a bonus)."""
    if not isinstance(weight, jax.core.Tracer) and not abs(float(weight)) < float("inf"):
        raise ArgumentError(f"`extensions[{key!r}].weight` is {weight!r}; it must be finite.")
