"""Pure step functions. They open no files, read no clocks, and run wherever JAX can trace.

A step is not compiled here: ``jax.jit``, ``scan``, ``vmap``, ``pmap`` and ``shard_map`` are the
caller's to choose, and the same function works under each.
"""

from collections.abc import Callable, Mapping
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from trainer.batches import batch_length, describe
from trainer.errors import ArgumentError, ArgumentTypeError, BatchError, ObjectiveError, check_count
from trainer.nnx_bridge import Flat, lookup, merge_updated, split_variables, variables_of, with_variables
from trainer.state import TrainState, check_optimizer
from trainer.types import Batch, ExtensionLike, LossFn, Metrics

AxisName = str | tuple[str, ...]

# Names under which an objective may report something that is more than a metric.
BATCH_WEIGHT = "batch_weight"
MODEL_OUTPUTS = "model_outputs"

_NOT_REPORTED = object()

_EVALUATION = crc32(b"evaluation")


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    wrt: nnx.filterlib.Filter = nnx.Param,
    extensions: Mapping[str, ExtensionLike] | None = None,
    axis_name: AxisName | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Makes the function that draws a key, differentiates the objective, updates, and carries on.

    With objective L, params θ, key k, extensions e of weight w_e, and the optimizer's update u::

        k_step = fold_in(k, step)
        g  = ∇_θ [ L(θ, batch, k_step, step) + Σ_e w_e · L_e(batch, model_outputs) ]
        θ' = θ + u(g, opt_state, θ),   step' = step + 1

    Assignments that the forward pass makes to variables under ``wrt`` last for that pass only;
    every other variable (batch statistics, random counts, extension state) is carried into the
    next state. An extension whose ``is_enabled()`` is false when the step is traced is left out.

    Args:
        loss_fn: The objective, see `trainer.LossFn`.
        optimizer: The optax transformation with which the state was created.
        wrt: The filter with which the state was created.
        extensions: The extensions with which the state was created, by name. A key of its own is
            folded from the step's key, so that adding one leaves the objective's draws alone.
        axis_name: The mapped axis (or axes) under ``pmap``, ``vmap`` or ``shard_map``. Gradients,
            metrics and the variables that the forward pass changed (those of floating dtype) are averaged
            over it, gradients and metrics by ``batch_weight`` where the objective reports one, which itself
            is summed; each device draws from a key of its own. The forward pass sees its own part of the
            batch only: to normalize over all parts, give ``nnx.BatchNorm`` the same axis. None, also for
            ``jit`` over sharded arrays, where the program is that of one device and JAX does all this.

    Returns:
        A pure ``(state, batch) -> (state, metrics)``. ``metrics`` holds scalars on the device: what
        the objective reports, ``<name>_loss`` for each enabled extension (weighted), ``loss`` (the
        total) and ``step`` (the updates finished, this one included).

    Raises:
        ArgumentTypeError: ``loss_fn``, ``optimizer`` or an extension is something else. The
            returned function raises `ObjectiveError`, `BatchError`, `ArgumentError` or `StateError`
            while it is traced, never while it runs compiled.

    Example:
        >>> model, optimizer = nnx.Linear(2, 1, rngs=nnx.Rngs(0)), optax.sgd(0.5)
        >>> state = TrainState.create(model, optimizer, rng=jax.random.key(0))
        >>> def loss_fn(model, batch, rng, step):
        ...     return jnp.mean((model(batch["x"]) - batch["y"]) ** 2), {}
        >>> step = jax.jit(make_train_step(loss_fn, optimizer), donate_argnums=0)
        >>> batch = {"x": jnp.eye(2), "y": jnp.array([[1.0], [2.0]])}
        >>> for _ in range(100):
        ...     state, metrics = step(state, batch)
        >>> print(f"{metrics['step']} steps, loss {metrics['loss']:.4f}")
        100 steps, loss 0.0000
    """
    check_loss_fn(loss_fn)
    check_optimizer(optimizer)
    extensions = check_extensions(extensions)
    reduce = _average_if_changed(axis_name)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        _check_call(state, batch)
        _check_wrt(state, wrt)
        # Not split: a key that nobody draws from costs nothing then, and it is a third of a tiny step.
        step_rng = jax.random.fold_in(state.rng, state.step)
        step_rng = _fold_in_device(step_rng, axis_name)

        def objective(params: Any) -> tuple[jax.Array, tuple[Metrics, Flat, dict[str, Flat]]]:
            before = state.replace(params=params)
            model = _training(before.model())
            loss, metrics, outputs = call_objective(loss_fn, model, batch, step_rng, state.step)
            enabled = {name: e for name, e in extensions.items() if e.is_enabled()}
            if enabled and outputs is _NOT_REPORTED:
                outputs = _forward(before, batch)
            context = {"model": model, "rng": step_rng, "step": state.step}
            losses, extension_variables = _extension_losses(enabled, state, batch, outputs, context)
            _refuse_shadowing(metrics, losses)
            _, variables = split_variables(model, wrt)
            return sum(losses.values(), start=loss), ({**metrics, **losses}, variables, extension_variables)

        evaluate = jax.value_and_grad(objective, has_aux=True)
        (loss, (metrics, variables, extension_variables)), grads = evaluate(_per_device(state.params, axis_name))
        grads, metrics = _average(grads, {**metrics, "loss": loss}, axis_name)

        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        next_state = state.replace(
            params=optax.apply_updates(state.params, updates),
            model_state=merge_updated(state.model_state, variables, "model_state", reduce),
            opt_state=opt_state,
            step=state.step + 1,
            extensions={
                name: {**held, "variables": merge_updated(held["variables"], after, f"extensions/{name}", reduce)}
                if (after := extension_variables.get(name)) is not None
                else held
                for name, held in state.extensions.items()
            },
        )
        return next_state, {**metrics, "step": next_state.step}

    return train_step


def fuse_steps(
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]], n: int
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Makes one function of up to ``n`` steps, for one call where nothing on the host looks between them.

    The steps run in a loop that is compiled once, whatever ``n`` is, and whatever part of it is used.
    They are the same operations as outside of it, so XLA mostly gives the same bits; on the CPU it
    does not for convolutions, for which it has other code inside of loops, several times slower.

    Args:
        step: A step of `make_train_step`, or any other ``(state, batch) -> (state, metrics)``.
        n: How many steps there is room for.

    Returns:
        A pure ``(state, batches, count=n) -> (state, metrics)``. Every array of ``batches`` has shape
        ``(n, batch_size, ...)``; the first ``count`` batches are used, which may be traced, so that
        a shorter stretch compiles nothing. Metrics have shape ``(n,)``, those beyond ``count`` are zero.

    Raises:
        ArgumentError: ``n`` is no positive integer. The returned function raises `BatchError` while it
            is traced if ``batches`` is not of that shape.

    Example:
        >>> optimizer = optax.sgd(0.5)
        >>> state = TrainState.create(nnx.Linear(2, 1, rngs=nnx.Rngs(0)), optimizer, rng=jax.random.key(0))
        >>> def loss_fn(model, batch, rng, step):
        ...     return jnp.mean((model(batch["x"]) - 1.0) ** 2), {}
        >>> steps = jax.jit(fuse_steps(make_train_step(loss_fn, optimizer), 100), donate_argnums=0)
        >>> state, metrics = steps(state, {"x": jnp.ones((100, 4, 2))})
        >>> print(state.step, metrics["loss"].shape)
        100 (100,)
    """
    n = check_count(n, "n")

    def fused(state: TrainState, batches: Batch, count: jax.typing.ArrayLike = n) -> tuple[TrainState, Metrics]:
        if batch_length(batches, "batches") != n:
            raise BatchError(
                f"`batches` has room for {batch_length(batches, 'batches')} steps, but `n` is {n}; every array must "
                f"be of shape ({n}, batch_size, ...)."
            )

        def batch_at(index: jax.typing.ArrayLike) -> Batch:
            batch: Batch = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), batches)
            return batch

        def advance(index: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, collected = carry
            state, metrics = step(state, batch_at(index))
            return state, {name: collected[name].at[index].set(value) for name, value in metrics.items()}

        _, shapes = jax.eval_shape(step, state, jax.eval_shape(batch_at, 0))
        collected = {name: jnp.zeros((n, *shape.shape), shape.dtype) for name, shape in shapes.items()}
        result: tuple[TrainState, Metrics] = jax.lax.fori_loop(0, count, advance, (state, collected))
        return result

    return fused


def make_eval_step(loss_fn: LossFn, *, axis_name: AxisName | None = None) -> Callable[..., Metrics]:
    """Makes the function that evaluates the objective with the model in evaluation mode.

    Args:
        loss_fn: The objective, as for `make_train_step`. Extensions take no part in evaluation.
        axis_name: The mapped axis over which metrics are averaged, as for `make_train_step`.

    Returns:
        A pure ``(state, batch, index=0) -> metrics``. The key that the objective gets is a function
        of ``state.rng`` and ``index``, which tells the batches of one evaluation apart; two evaluations
        of one run draw alike, so that they compare. The state itself stays as it is, its random counts
        included. ``metrics`` holds scalars on
        the device: what the objective reports, ``loss``, and ``step`` (the updates finished).

    Raises:
        ArgumentTypeError: ``loss_fn`` is something else.
    """
    check_loss_fn(loss_fn)

    def eval_step(state: TrainState, batch: Batch, index: jax.typing.ArrayLike = 0) -> Metrics:
        _check_call(state, batch)
        rng = jax.random.fold_in(jax.random.fold_in(state.rng, _EVALUATION), index)
        rng = _fold_in_device(rng, axis_name)
        model = state.model()
        model.eval()
        loss, metrics, _ = call_objective(loss_fn, model, batch, rng, state.step)
        _, metrics = _average((), {**metrics, "loss": loss}, axis_name)
        return {**metrics, "step": state.step}

    return eval_step


def call_objective(
    loss_fn: LossFn, model: Any, batch: Batch, rng: jax.Array, step: jax.Array
) -> tuple[jax.Array, Metrics, Any]:
    """Calls the objective and checks what it returns.

    Returns:
        The loss, the metrics as scalars, and what was reported as ``model_outputs``, if anything.

    Raises:
        ObjectiveError: The objective breaks the contract of `trainer.LossFn`.
    """
    try:
        result = loss_fn(model, batch, rng, step)
    except Exception as error:
        error.add_note(f"raised in `loss_fn` on a batch of {describe(batch)}")
        raise
    if not isinstance(result, tuple) or len(result) != 2:
        raise ObjectiveError(
            f"`loss_fn` returned {_describe_result(result)}; it must return a pair (loss, metrics), "
            f"with an empty mapping where there are no metrics."
        )
    loss, metrics = result
    loss = check_loss(loss, "`loss_fn` returned a loss that")
    if not isinstance(metrics, Mapping):
        raise ObjectiveError(
            f"`loss_fn` returned metrics of type {type(metrics).__name__}; they must be a mapping of names to scalars."
        )
    if "step" in metrics:
        raise ObjectiveError(
            "`loss_fn` returned a metric `step`, which is the name of the number of updates finished; use another name."
        )
    outputs = metrics.get(MODEL_OUTPUTS, _NOT_REPORTED)
    named = {name: value for name, value in metrics.items() if name not in (MODEL_OUTPUTS, "loss")}
    return loss, {name: _metric(name, value) for name, value in named.items()}, outputs


def check_loss(loss: Any, subject: str) -> jax.Array:
    """Returns ``loss`` as an array, if it is a floating scalar."""
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


def check_loss_fn(loss_fn: Any) -> None:
    """Refuses what cannot be called."""
    if not callable(loss_fn):
        raise ArgumentTypeError(
            f"`loss_fn` is of type {type(loss_fn).__name__}; it must be a callable "
            f"loss_fn(model, batch, rng, step) -> (loss, metrics)."
        )


def check_extensions(extensions: Mapping[str, ExtensionLike] | None) -> dict[str, ExtensionLike]:
    """Returns the extensions as a dict, if each has what a step needs and a name of its own."""
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
        if lacks:
            raise ArgumentTypeError(
                f"`extensions[{key!r}]` is of type {type(extension).__name__} and has no "
                f"{', no '.join(lacks)}; derive it from trainer.Extension or add what is missing."
            )
        name = getattr(getattr(extension, "config", None), "name", None) or key
        if name in names:
            raise ArgumentError(
                f"`extensions[{names[name]!r}]` and `extensions[{key!r}]` are both named {name!r}; "
                f"give each a name of its own."
            )
        names[name] = key
    return dict(extensions)


def _check_call(state: Any, batch: Any) -> None:
    if not isinstance(state, TrainState):
        raise ArgumentTypeError(f"`state` is of type {type(state).__name__}; it must be a trainer.TrainState.")
    state.check_alive()
    batch_length(batch)


def _check_wrt(state: TrainState, wrt: nnx.filterlib.Filter) -> None:
    selected, _ = split_variables(state.model(), wrt)
    if not selected or not jax.tree.leaves(state.params):
        raise ArgumentError(
            f"the model has no parameters: `wrt` = {wrt!r} selects none of its variables, so there is nothing to train."
        )
    absent = object()
    if any(v is absent for v in lookup(state.params, paths=selected, missing=absent).values()) or len(
        jax.tree.leaves(selected)
    ) != len(jax.tree.leaves(state.params)):
        raise ArgumentError(
            f"`wrt` = {wrt!r} selects other variables than the filter that the state was created with; "
            f"pass the same one to TrainState.create and make_train_step."
        )


def _training(model: Any) -> Any:
    model.train()
    return model


def _forward(state: TrainState, batch: Batch) -> Any:
    """Returns ``model(batch["input"])`` where that can be called, else None.

    It runs on a model of its own that starts from the same variables, random counts included. So
    an extension that looks on changes no batch statistics. It costs, though: where the objective made
    the very same call XLA shares most of the forward pass, but the backward pass is computed again
    (44 % more operations for a perceptron 64-512-1). Reporting ``model_outputs`` spares that.
    """
    model = _training(state.model())
    if "input" not in batch or not callable(model):
        return None
    try:
        return model(batch["input"])
    except Exception as error:
        error.add_note(
            'raised in `model(batch["input"])`, called because an extension is enabled and `loss_fn` '
            f"returned no `{MODEL_OUTPUTS}` in its metrics; return them (they may be None) to avoid this call"
        )
        raise


def _extension_losses(
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
        # The variables come from the state; Python attributes are those of the caller's object.
        traced = with_variables(extension, held["variables"])
        rng = jax.random.fold_in(context["rng"], crc32(name.encode()))
        loss = traced.loss_fn(batch, outputs, **{**context, "rng": rng})
        loss = check_loss(loss, f"`extensions[{name!r}].loss_fn` returned a loss that")
        losses[f"{name}_loss"] = held["weight"].astype(loss.dtype) * loss
        variables[name] = variables_of(traced)
    return losses, variables


def _refuse_shadowing(metrics: Metrics, losses: Metrics) -> None:
    for name in losses:
        if name in metrics:
            raise ObjectiveError(
                f"`loss_fn` returned a metric `{name}`, which is also the loss of the extension "
                f"{name.removesuffix('_loss')!r}; rename one of the two."
            )


def _metric(name: Any, value: Any) -> jax.Array:
    if not isinstance(name, str):
        raise ObjectiveError(f"`loss_fn` returned a metric named {name!r}; names must be strings.")
    try:
        array = jnp.asarray(value)
    except (TypeError, ValueError) as error:
        raise ObjectiveError(
            f"`loss_fn` returned a metric `{name}` of type {type(value).__name__}; it must be a scalar."
        ) from error
    if array.shape != ():
        raise ObjectiveError(
            f"`loss_fn` returned a metric `{name}` of shape {array.shape}; metrics are scalars. Average it, "
            f"or report it as `{MODEL_OUTPUTS}`."
        )
    return array


def _describe_result(result: Any) -> str:
    if isinstance(result, tuple):
        return f"a tuple of {len(result)}"
    return "a bare loss" if getattr(result, "shape", None) == () else type(result).__name__


def _fold_in_device(rng: jax.Array, axis_name: AxisName | None) -> jax.Array:
    return rng if axis_name is None else jax.random.fold_in(rng, jax.lax.axis_index(axis_name))


def _per_device(params: Any, axis_name: AxisName | None) -> Any:
    """Marks replicated params as differing by device, so that each device gets its own gradient.

    Under ``shard_map`` JAX sums the gradient of a replicated value over the devices by itself,
    without weights; under ``pmap`` and ``vmap`` it does not. After this it never does.
    """
    if axis_name is None:
        return params
    axes = (axis_name,) if isinstance(axis_name, str) else axis_name
    mapped_by_shard_map = jax.sharding.get_abstract_mesh().manual_axes

    def mark(leaf: jax.Array) -> jax.Array:
        varying = jax.typeof(leaf).manual_axis_type.varying
        missing = tuple(axis for axis in axes if axis in mapped_by_shard_map and axis not in varying)
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(mark, params)


def _average(grads: Any, metrics: Metrics, axis_name: AxisName | None) -> tuple[Any, Metrics]:
    """Averages over the mapped axis, by ``batch_weight`` where there is one; that itself is summed."""
    if axis_name is None:
        return grads, metrics
    weight = metrics.get(BATCH_WEIGHT)
    metrics = jax.tree.map(_floating, metrics)
    if weight is None:
        averaged: tuple[Any, Metrics] = jax.lax.pmean((grads, metrics), axis_name)
        return averaged
    total = jax.lax.psum(weight, axis_name)
    share = weight / total
    grads, metrics = jax.lax.psum(
        jax.tree.map(lambda leaf: leaf * share.astype(leaf.dtype), (grads, metrics)),
        axis_name,
    )
    return grads, {**metrics, BATCH_WEIGHT: total}


def _average_if_changed(axis_name: AxisName | None) -> Callable[[Any, Any], Any]:
    """Returns how variables are carried on: averaged over the mapped axis if the forward pass assigned them.

    The others are equal on all devices already, and an average of equal numbers may round.
    """

    def reduce(old: Any, new: Any) -> Any:
        changed = axis_name is not None and new is not old and jnp.issubdtype(new.dtype, jnp.floating)
        return jax.lax.pmean(new, axis_name) if changed else new

    return reduce


def _floating(metric: jax.Array) -> jax.Array:
    return metric if jnp.issubdtype(metric.dtype, jnp.inexact) else metric.astype(jnp.float32)
