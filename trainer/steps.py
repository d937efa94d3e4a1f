"""Pure step functions: no files, no clocks, traceable by every JAX transformation.

Steps are not compiled here: the caller applies ``jax.jit``, ``scan``, ``vmap``, ``pmap`` or
``shard_map``, and the same function works under each.
"""

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any
from zlib import crc32

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from trainer.batches import batch_length, check_batch
from trainer.core.accumulation import accumulated
from trainer.core.averaged_params import check_eval_params, with_eval_params
from trainer.core.checks import check_count
from trainer.core.gradient import gradient_of, make_objective
from trainer.core.loss_scale import adapt_scale, as_it_is, scaled_gradient_of
from trainer.core.mapped_axes import AxisName, average_over_axis, fold_in_device
from trainer.core.modes import in_evaluation_mode
from trainer.core.module_views import combined
from trainer.core.nnx_bridge import lookup, split_variables
from trainer.core.nonfinite import make_guard
from trainer.core.objective import call_objective, check_extensions, check_loss_fn, with_losses
from trainer.core.optimizer import adapt_optimizer, extra_arguments
from trainer.core.precision import Precision, as_precision, batch_in, in_precision, objective_in
from trainer.core.prediction import call_on_input, check_outputs
from trainer.core.remat import in_parts, plan_of, rematerialized
from trainer.core.report import Measure, Update, make_report
from trainer.errors import ArgumentError, ArgumentTypeError, BatchError
from trainer.state import TrainState, check_optimizer
from trainer.types import Batch, EvalParams, ExtensionLike, LossFn, Metrics, NonFinite, Remat

_EVALUATION = crc32(b"evaluation")


def make_train_step(
    loss_fn: LossFn,
    optimizer: optax.GradientTransformation,
    *,
    wrt: nnx.filterlib.Filter = nnx.Param,
    extensions: Mapping[str, ExtensionLike] | None = None,
    axis_name: AxisName | None = None,
    accumulate_steps: int = 1,
    nonfinite: NonFinite = "ignore",
    report: Iterable[str] | Mapping[str, Measure] = (),
    precision: str | Precision | None = None,
    remat: Remat = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Makes a train step: derive a key, differentiate the objective, update the params, carry the model state over.

    With objective L, params θ, key k, extensions e of weight w_e, and the optimizer's update u::

        k_step = fold_in(k, step)
        g  = ∇_θ [ L(θ, batch, k_step, step) + Σ_e w_e · L_e(batch, model_outputs) ]
        θ' = θ + u(g, opt_state, θ),   step' = step + 1

    Assignments in the forward pass to variables under ``wrt`` last for that pass only; every other
    variable (batch statistics, RNG counts, extension state) is carried into the next state. Values
    stored by `nnx.Module.sow` are dropped. Plain Python attributes are part of the compiled program, so
    changing one in the forward pass is an error, except for the flags of `nnx.Module.train`. An
    extension whose ``is_enabled()`` is false when the step is traced is left out.

    The model is in training mode, except for modules that were in evaluation mode when the state was created: they
    apply no dropout, and their batch statistics do not change.

    Args:
        loss_fn: The objective, see `trainer.LossFn`.
        optimizer: The optax transformation with which the state was created. Its ``update`` receives those extra
            arguments that it accepts: ``value`` (the total loss), ``grad``, ``value_fn`` and ``obj_fn`` (params to the
            loss of this batch, with the step's key and model state), ``grad_fn`` (params and an index to the gradient).
        wrt: The filter with which the state was created.
        extensions: The extensions by name, the same as for the state. Each gets its own key, folded
            from the step's key, so adding an extension does not change the objective's random draws.
        axis_name: The mapped axis (or axes) under ``pmap``, ``vmap`` or ``shard_map``. Gradients, metrics and
            floating variables changed by the forward pass are averaged over it. Gradients and metrics are
            weighted by ``batch_weight`` if the objective reports one, which itself is summed. Each device has
            its own key. The forward pass sees its own part of the batch only: to normalize over all parts, pass
            the same axis to ``nnx.BatchNorm``. Leave it None under ``jit`` over sharded arrays: the program is
            that of one device, and JAX does all this.
        accumulate_steps: The number of micro-batches per batch, processed in a loop, so that memory holds the
            activations of one. Gradients and metrics are averaged by ``batch_weight`` if the objective reports one,
            else by examples: g = Σ w_i g_i / Σ w_i, the gradient of the whole batch if the loss is an average.
            It is one update: clipping acts on g, and ``step`` counts it once. Batch normalization and dropout see one
            micro-batch at a time. See `trainer.core.accumulation.accumulated` for which rows form a micro-batch.
        nonfinite: How to handle NaN or infinity in the loss, gradients, new params or new model state of a step; create
            the state with the same value. "ignore" continues. "skip" counts the step and leaves the rest of the state
            bit-identical; the metric ``skipped`` is then 1, else 0, and averages exclude the batch. With "raise" this
            step and all later ones return the state from before it, and `check_finite`, which a `Trainer` calls, raises
            `NonFiniteError` with the step and the arrays. Both cost a pass over these arrays, but no wait for the
            device.
        report: Further metrics of each update: any of "gradient_norm" (before clipping), "update_ratio" (norm of the
            update / norm of the params) and "learning_rate" (if the optimizer keeps it in its state, as with
            ``optax.inject_hyperparams``), or a mapping of names to functions of a `trainer.Update`.
        precision: The dtype that the model computes in: "bfloat16", "float16", or a `trainer.Precision`, which has the
            details; None and "float32" change nothing. The state stays in float32. "float16" uses loss scaling, see
            `trainer.core.loss_scale.adapt_scale`: ``metrics`` then includes the ``loss_scale`` of the step, and the
            state must come from ``TrainState.create(..., precision=precision)``.
        remat: What to recompute in the backward pass instead of storing (Chen et al. 2016, "Training Deep Nets with
            Sublinear Memory Cost"; `jax.checkpoint`). "blocks" or "nothing_saveable" recomputes all activations
            within each block, where blocks are the outermost modules in lists. Any other policy of
            ``jax.checkpoint_policies``, by name ("dots_saveable", "dots_with_no_batch_dims_saveable") or as a function,
            applies to the whole objective. A mapping sets policies for modules by path, such as
            ``{"encoder/layers/*": "nothing_saveable"}``, with patterns as in `trainer.by_path`. Gradients, batch
            statistics and random draws are the same, within rounding.

    Returns:
        A pure function ``(state, batch) -> (state, metrics)``. ``metrics`` holds scalars on the device: the
        metrics of the objective, ``<name>_loss`` for each enabled extension (weighted), ``loss`` (the
        total) and ``step`` (the updates finished, this one included).

    Raises:
        ArgumentTypeError: ``loss_fn``, ``optimizer``, an extension or ``accumulate_steps`` has the wrong type.
        ArgumentError: ``accumulate_steps`` is not positive, or ``precision`` or ``remat`` is invalid. The returned
            function raises `ObjectiveError`, `BatchError`, `ArgumentError` or `StateError` while it is traced, never
            when compiled.

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
    optimizer = adapt_optimizer(optimizer)
    precision, plan = as_precision(precision), plan_of(remat)
    view = combined(in_precision(precision), in_parts(plan))
    loss_fn = objective_in(precision, loss_fn)
    objective = make_objective(loss_fn, wrt, with_losses(check_extensions(extensions)), axis_name, view)
    objective = rematerialized(plan, objective)
    is_scaled = precision is not None and precision.has_loss_scale
    gradient = (scaled_gradient_of if is_scaled else gradient_of)(objective, axis_name)
    steps = check_count(accumulate_steps, "accumulate_steps")
    objective, gradient = accumulated(objective, gradient, steps, axis_name)
    finish = adapt_scale(precision.growth_interval) if precision is not None and is_scaled else as_it_is
    guard = make_guard(nonfinite, watches_gradient=not is_scaled)
    reported = make_report(report)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        _check_call(state, batch)
        _check_wrt(state, wrt)
        # Not `split`, which also computes the next key and takes a third of a tiny step: XLA eliminates a `fold_in` if
        # the objective does not use the key.
        rng = fold_in_device(jax.random.fold_in(state.rng, state.step), axis_name)
        grads, metrics, after = gradient(state, batch, rng)
        grads, metrics = average_over_axis(grads, metrics, axis_name)

        def at(params: Any) -> tuple[jax.Array, tuple[Metrics, TrainState]]:
            return objective(params, state, batch, rng)

        extra = extra_arguments(at, metrics, grads, axis_name)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params, **extra)
        params = optax.apply_updates(state.params, updates)
        next_state = after.replace(params=params, opt_state=opt_state, step=state.step + 1)
        metrics = reported(Update(state.step, grads, updates, state.params, opt_state), metrics)
        next_state, metrics = finish(state, next_state, grads, metrics)
        next_state, metrics = guard(state, next_state, grads, metrics)
        return next_state, {**metrics, "step": next_state.step}

    return train_step


def fuse_steps(
    step: Callable[[TrainState, Batch], tuple[TrainState, Metrics]], n: int
) -> Callable[..., tuple[TrainState, Metrics]]:
    """Makes a function that runs up to ``n`` steps in one call, if the host needs no state in between.

    The steps run in a loop whose body is compiled once, for any ``n`` and any ``count``. Operations and their order are
    those of single steps. Results are bit-identical too, except where the compiler rounds differently in the loop. XLA
    on the CPU does so in two cases:

    * In ``a * b + c * d`` it leaves one of the products unrounded (a fused multiply-add), but not always the same one.
      Entries then differ in the last place, such as moments of ``optax.inject_hyperparams(optax.adamw)``.
      With ``XLA_FLAGS=--xla_cpu_max_isa=AVX``, which has no such instruction, they are equal.
    * Convolutions use different code inside loops, several times slower.

    Args:
        step: A step of `make_train_step`, or any other ``(state, batch) -> (state, metrics)``.
        n: The capacity, the maximum number of steps per call.

    Returns:
        A pure function ``(state, batches, count=n) -> (state, metrics)``. Every array of ``batches`` has
        shape ``(n, batch_size, ...)``; the first ``count`` batches are used. ``count`` may be traced, so
        fewer steps need no recompilation. Metrics have shape ``(n,)``, with zeros beyond ``count``.

    Raises:
        ArgumentError: ``n`` is not a positive integer. The returned function raises it if ``count`` is concrete and
            not in 0..n, and `BatchError` while it is traced if ``batches`` does not have that shape.

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
                f"`batches` holds {batch_length(batches, 'batches')} steps, but `n` is {n}; every array must "
                f"be of shape ({n}, batch_size, ...)."
            )

        concrete: Any = None if isinstance(count, jax.core.Tracer) else count
        if concrete is not None and not 0 <= operator.index(concrete) <= n:
            # JAX clamps indices, so steps beyond `n` would silently train on the last batch again.
            raise ArgumentError(f"`count` is {concrete}, but `n` is {n}; it must be from 0 to {n}.")

        def batch_at(index: jax.typing.ArrayLike) -> Batch:
            batch: Batch = jax.tree.map(lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), batches)
            return batch

        def advance(index: jax.Array, carry: tuple[TrainState, Metrics]) -> tuple[TrainState, Metrics]:
            state, collected = carry
            state, metrics = step(state, batch_at(index))
            return state, jax.tree.map(lambda rows, row: rows.at[index].set(row), collected, metrics)

        _, shapes = jax.eval_shape(step, state, jax.eval_shape(batch_at, 0))
        collected = jax.tree.map(lambda shape: jnp.zeros((n, *shape.shape), shape.dtype), shapes)
        result: tuple[TrainState, Metrics] = jax.lax.fori_loop(0, count, advance, (state, collected))
        return result

    return fused


def make_eval_step(
    loss_fn: LossFn,
    *,
    eval_params: EvalParams | None = None,
    axis_name: AxisName | None = None,
    precision: str | Precision | None = None,
) -> Callable[..., Metrics]:
    """Makes an eval step: evaluates the objective with the model in evaluation mode.

    All modules are in evaluation mode, whatever their mode when the state was created, since an explicit training mode
    cannot be told from the default. For dropout in evaluation (Monte Carlo dropout), set the mode in the call:
    ``self.dropout(x, deterministic=False)``.

    Args:
        loss_fn: The objective, as for `make_train_step`. Extensions are ignored.
        eval_params: A function of the optimizer state and the params that returns the params to evaluate, see
            `trainer.types.EvalParams`; by default the params themselves. The other variables of the model, such as
            batch statistics, are those of training.
        axis_name: The mapped axis over which metrics are averaged, as for `make_train_step`.
        precision: The dtype that the model computes in, as for `make_train_step`.

    Returns:
        A pure function ``(state, batch, index=0) -> metrics``. The objective's key depends only on ``state.rng``
        and ``index``, the number of the batch in its evaluation, so all evaluations of a run use the same random
        draws and can be compared. The state does not change, RNG counts included. ``metrics`` holds scalars on the
        device: the metrics of the objective, ``loss``, and ``step`` (the updates finished).

    Raises:
        ArgumentTypeError: ``loss_fn`` or ``eval_params`` has the wrong type.
    """
    check_loss_fn(loss_fn)
    check_eval_params(eval_params)
    precision = as_precision(precision)
    view, loss_fn = in_precision(precision), objective_in(precision, loss_fn)

    def eval_step(state: TrainState, batch: Batch, index: jax.typing.ArrayLike = 0) -> Metrics:
        _check_call(state, batch)
        rng = jax.random.fold_in(jax.random.fold_in(state.rng, _EVALUATION), index)
        rng = fold_in_device(rng, axis_name)
        model = in_evaluation_mode(with_eval_params(state, eval_params).model())
        with view(model):
            loss, metrics, _ = call_objective(loss_fn, model, batch, rng, state.step)
        _, metrics = average_over_axis((), {**metrics, "loss": loss}, axis_name)
        return {**metrics, "step": state.step}

    return eval_step


def make_predict_step(
    fn: Callable[[Any, Batch], Any] | None = None,
    *,
    eval_params: EvalParams | None = None,
    precision: str | Precision | None = None,
) -> Callable[[TrainState, Batch], Any]:
    """Makes a predict step: computes the predictions of the model, in evaluation mode, for a batch.

    Args:
        fn: ``fn(model, batch) -> outputs``, a pytree of arrays of shape ``(batch_size, ...)``. By default the model is
            called on the batch if it is an array, on its only entry, or on the entry ``input`` or ``x`` of a mapping
            whose other entries have target names (``y``, ``label``, ``target``, and their plurals).
        eval_params: As for `make_eval_step`.
        precision: The dtype that the model computes in, as for `make_train_step`. Outputs have its ``output`` dtype.

    Returns:
        A pure function ``(state, batch) -> outputs``. The state does not change, RNG counts included, so a model that
        is random in evaluation mode makes the same draws for every batch; if that matters, add a key per example to
        the data.

    Raises:
        ArgumentTypeError: ``fn`` is not callable. The returned function raises `ArgumentError` while it is traced, if
            an output lacks one row per example, or if ``fn`` was left out and the model's input is ambiguous.

    Example:
        >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> state = TrainState.create(model, optax.sgd(0.5), rng=jax.random.key(0))
        >>> jax.jit(make_predict_step())(state, jnp.ones((4, 2))).shape
        (4, 1)
    """
    if fn is not None and not callable(fn):
        raise ArgumentTypeError(
            f"`fn` is of type {type(fn).__name__}; it must be a callable fn(model, batch) -> outputs."
        )
    check_eval_params(eval_params)
    precision = as_precision(precision)
    view = in_precision(precision)

    def predict_step(state: TrainState, batch: Batch) -> Any:
        _check_call(state, batch)
        model = in_evaluation_mode(with_eval_params(state, eval_params).model())
        with view(model):
            outputs = (call_on_input if fn is None else fn)(model, batch_in(precision, batch))
        check_outputs(outputs, batch)
        return outputs

    return predict_step


def _check_call(state: Any, batch: Any) -> None:
    if not isinstance(state, TrainState):
        raise ArgumentTypeError(f"`state` is of type {type(state).__name__}; it must be a trainer.TrainState.")
    state.check_alive()
    check_batch(batch)


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
