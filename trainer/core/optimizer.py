"""Calling optax transformations: their initial state, and the extra arguments beyond gradients and params."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from trainer.core.assigned_values import widened
from trainer.core.learning_rate import with_floating_rates
from trainer.core.mapped_axes import AxisName, average_over_axis, per_device, zero_unless
from trainer.errors import ArgumentError
from trainer.types import BATCH_WEIGHT, Metrics

if TYPE_CHECKING:  # importing chex takes a tenth of the time of `import trainer`
    import chex

_REFUSALS = ("unexpected keyword argument", "multiple values for argument")


class LookaheadOptState(NamedTuple):
    """The state of an optimizer that contains ``optax.lookahead``.

    Attributes:
        inner: The state of the optax transformation.
        slow: The slow params, a tree like ``state.params``. The params of the training state are the fast ones.
    """

    inner: Any
    slow: Any


def extra_arguments(
    objective: Callable[[chex.ArrayTree], tuple[jax.Array, Any]],
    metrics: Metrics,
    grads: chex.ArrayTree,
    axis_name: AxisName | None,
) -> dict[str, Any]:
    """Returns the extra keyword arguments that a transformation may accept, under the names that optax uses.

    Args:
        objective: Maps params to the total loss and a pair of metrics and other values, with the batch, key and model
            state of the step.
        metrics: The metrics of the step, averaged over the axis, with its ``loss``.
        grads: The gradient of the loss, averaged over the axis.
        axis_name: The mapped axis. The functions average over it as the step does.

    Returns:
        ``value`` (Polyak steps, Momo, reduce-on-plateau), ``grad``, ``value_fn`` (line searches, L-BFGS: params to
        the loss), ``obj_fn`` (Sophia: the same) and ``grad_fn`` (opaque SAM: params and an index to the gradient).
    """

    # Line searches reject an argument that neither they nor their `value_fn` name, hence the two names here.
    def value_fn(params: chex.ArrayTree, *, obj_fn: Any = None, grad_fn: Any = None) -> jax.Array:
        del obj_fn, grad_fn
        return value_at(params)

    def grad_fn(params: chex.ArrayTree, index: Any = 0) -> chex.ArrayTree:
        del index
        return jax.grad(value_at)(params)

    value_at = _averaged(objective, axis_name, metrics.get(BATCH_WEIGHT))
    return {"value": metrics["loss"], "grad": grads, "value_fn": value_fn, "obj_fn": value_at, "grad_fn": grad_fn}


def initial_opt_state(optimizer: optax.GradientTransformation, params: chex.ArrayTree) -> Any:
    """Returns the initial state of an optimizer, in the dtypes that its updates return.

    They may differ from those of ``init``: with params of several dtypes, the float32 hyperparameters of
    `optax.inject_hyperparams` turn bfloat16 moments into float32 ones. The second step would be compiled again, steps
    could not be fused, and a checkpoint would not fit a new state. An integer learning rate becomes a float.

    Raises:
        ArgumentError: ``init`` fails.
    """
    adapted = adapt_optimizer(optimizer)
    opt_state = with_floating_rates(adapted.init(params), params)
    # Tracing an update takes as long as ten times `init`, and in one dtype nothing can change.
    dtypes = {leaf.dtype for leaf in jax.tree.leaves((opt_state, params)) if hasattr(leaf, "dtype")}
    if sum(jnp.issubdtype(dtype, jnp.inexact) for dtype in dtypes) < 2:
        return opt_state

    def objective(params: chex.ArrayTree) -> tuple[jax.Array, Any]:
        return sum((jnp.sum(jnp.abs(leaf)).astype(jnp.float32) for leaf in jax.tree.leaves(params)), jnp.zeros(())), {}

    def update(opt_state: Any, params: chex.ArrayTree) -> Any:
        extra = extra_arguments(objective, {"loss": objective(params)[0]}, params, None)
        return adapted.update(params, opt_state, params, **extra)[1]

    structure: Any = jax.tree.structure(opt_state)
    for _ in range(3):  # a wider leaf may widen another
        try:
            after = jax.eval_shape(update, opt_state, params)
        except Exception:  # an update that needs a mapped axis, or that fails; then the step says so
            return opt_state
        if jax.tree.structure(after) != structure:
            return opt_state
        before, opt_state = opt_state, jax.tree.map(lambda leaf, like: widened(leaf, like.dtype), opt_state, after)
        if all(map(operator.is_, jax.tree.leaves(before), jax.tree.leaves(opt_state))):
            break
    return opt_state


def adapt_optimizer(optimizer: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    """Returns a transformation that takes any extra arguments and plain params.

    It forwards the extra arguments that the transformation accepts: those named in the signature of its ``update``, or
    all if that has ``**extra_args``, as in ``optax.chain`` and ``MultiSteps``. Arguments rejected by a member of a
    chain are left out.

    ``optax.lookahead`` needs its params as a pair of fast and slow ones. It gets that pair; the slow params are kept
    next to the transformation's own state, in `LookaheadOptState`.
    """
    accepted = _accepted(optimizer.update)

    def init(params: chex.ArrayTree) -> Any:
        try:
            opt_state = optimizer.init(params)
            if not _has_lookahead(opt_state):
                return opt_state
            return LookaheadOptState(optimizer.init(optax.LookaheadParams.init_synced(params)), params)
        except ArgumentError:  # its message is already clear
            raise
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ArgumentError(
                f"`optimizer` cannot be initialized: {type(error).__name__}: {error!s:.600} — it is given the params "
                f"as nested plain dicts of arrays, along the attributes of the module. A mask or labels made from an "
                f"nnx.State become such dicts by `flax.nnx.to_pure_dict(mask)`; a function of params is called "
                f"with them."
            ) from error

    def update(
        updates: chex.ArrayTree, opt_state: Any, params: chex.ArrayTree | None = None, **extra: Any
    ) -> tuple[Any, Any]:
        given = {name: value for name, value in extra.items() if accepted is None or name in accepted}
        if not isinstance(opt_state, LookaheadOptState):
            result: tuple[Any, Any] = _call(optimizer.update, (updates, opt_state, params), given)
            return result
        pair = optax.LookaheadParams(params, opt_state.slow)
        updates, inner = _call(optimizer.update, (updates, opt_state.inner, pair), given)
        return updates.fast, LookaheadOptState(inner, optax.apply_updates(opt_state.slow, updates.slow))

    return optax.GradientTransformationExtraArgs(init, update)


def _call(update: Callable[..., Any], arguments: tuple[Any, ...], extra: dict[str, Any]) -> Any:
    """Calls ``update`` without the extra arguments that a member rejects."""
    while True:
        try:
            return update(*arguments, **extra)
        except TypeError as error:
            # A chain passes every argument to every member, but a member may have no `**extra_args`
            # (`optax.contrib.sam`), or name its first parameter `grad`. Its signature is not available:
            # `inject_hyperparams` creates its members inside `update`.
            text = str(error)
            is_refusal = any(refusal in text.lower() for refusal in _REFUSALS)
            refused = [name for name in extra if is_refusal and f"'{name}'" in text]
            if not refused:
                if extra:
                    error.add_note(f"raised in `optimizer.update`, which was given {', '.join(sorted(extra))}")
                raise
            extra = {name: value for name, value in extra.items() if name not in refused}


def _accepted(update: Callable[..., Any]) -> frozenset[str] | None:
    """Returns the parameter names of a function; None if it accepts any keyword."""
    try:
        parameters = inspect.signature(update).parameters.values()
    except (TypeError, ValueError):  # a callable without a signature
        return frozenset()
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
        return None
    return frozenset(parameter.name for parameter in parameters)


def _has_lookahead(opt_state: Any) -> bool:
    def stops(node: Any) -> bool:
        return isinstance(node, optax.LookaheadState | LookaheadOptState)

    return any(isinstance(node, optax.LookaheadState) for node in jax.tree.leaves(opt_state, is_leaf=stops))


def _averaged(
    objective: Callable[[chex.ArrayTree], tuple[jax.Array, Any]], axis_name: AxisName | None, weight: jax.Array | None
) -> Callable[[chex.ArrayTree], jax.Array]:
    """Returns the loss as a function of params, with loss and gradient averaged over the mapped axis.

    Both are zero for a batch of weight zero, as those of the step are.
    """
    if axis_name is None and weight is None:
        return lambda params: objective(params)[0]
    if axis_name is None:

        def counted(params: chex.ArrayTree) -> jax.Array:
            # Derivatives of 0 / 0 are not finite: the loss passes none in forward mode, the params none in backward.
            fixed = jax.lax.stop_gradient(params)
            params = jax.tree.map(lambda leaf, held: jnp.where(weight == 0, held, leaf), params, fixed)
            loss: jax.Array = zero_unless(weight, objective(params)[0])
            return loss

        return counted

    def forward(params: chex.ArrayTree) -> tuple[jax.Array, chex.ArrayTree]:
        (loss, (metrics, *_)), grads = jax.value_and_grad(objective, has_aux=True)(per_device(params, axis_name))
        grads, metrics = average_over_axis(grads, {**metrics, "loss": loss}, axis_name)
        return metrics["loss"], grads

    def backward(grads: chex.ArrayTree, cotangent: jax.Array) -> tuple[chex.ArrayTree]:
        return (jax.tree.map(lambda leaf: cotangent.astype(leaf.dtype) * leaf, grads),)

    # Differentiating an average over an axis in JAX gives the gradient of the device's own part only.
    averaged = jax.custom_vjp(lambda params: forward(params)[0])
    averaged.defvjp(forward, backward)
    return averaged
