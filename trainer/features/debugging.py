"""Locates errors in a step: the caller's own checks, and the origin of NaN."""

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import checkify

from trainer.core.accumulation import accumulated, micro_batches
from trainer.core.checks import check_count
from trainer.core.gradient import GradientFn, Objective, gradient_of, make_objective
from trainer.core.mapped_axes import average_over_axis
from trainer.core.module_views import called_through, combined, modules_of
from trainer.core.objective import check_extensions, check_loss_fn, with_losses
from trainer.core.precision import Precision, as_precision, in_precision, objective_in
from trainer.core.remat import in_parts, plan_of, rematerialized
from trainer.core.tree_paths import leaf_path
from trainer.errors import NonFiniteError
from trainer.state import TrainState
from trainer.types import Batch, ExtensionLike, LossFn, Remat

_CHECKS = checkify.user_checks


def make_check_step(
    loss_fn: LossFn,
    *,
    wrt: nnx.filterlib.Filter = nnx.Param,
    extensions: Mapping[str, ExtensionLike] | None = None,
    precision: str | Precision | None = None,
    accumulate_steps: int = 1,
    remat: Remat = None,
) -> Callable[[TrainState, Batch], None]:
    """Makes a function that checks a step before it is applied; ``debug=True`` of a `Trainer` uses it.

    It computes the loss and the gradient of a batch, as a step does, with the checks of ``jax.experimental.checkify``
    compiled in. It waits for the result and changes nothing. With it, a step takes two to three times as long, a small
    step up to five. It needs the memory of a step; to name the origin it runs the micro-batch that is not finite again,
    one operation at a time and without ``remat``.

    Args:
        loss_fn, wrt, extensions, precision, accumulate_steps, remat: As for `make_train_step`.

    Returns:
        ``check(state, batch)``, to be called directly, not inside ``jit``.

        * A failed ``checkify.check`` or ``checkify.debug_check`` in the objective or the model raises the error of
          checkify, with the step number. Without this function ``debug_check`` does nothing and costs nothing.
          (checkify's index checks are left out: they also fire where ``mode="fill"`` or ``"drop"`` is intended.)
        * If the loss or a gradient is NaN or infinite it raises `NonFiniteError`, which names the origin: a batch leaf
          and its row, a param, the path of the module that produced it in the forward or backward pass, or the
          objective itself; the micro-batch; and for NaN also the operation and its line.

    Example:
        >>> import optax
        >>> class Net(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.head = Head(rngs)
        ...     def __call__(self, x):
        ...         return self.head(x)
        >>> class Head(nnx.Module):
        ...     def __init__(self, rngs):
        ...         self.out = nnx.Linear(2, 1, rngs=rngs)
        ...     def __call__(self, x):
        ...         return jnp.log(self.out(x) - 1e6)
        >>> def loss_fn(model, batch, rng, step):
        ...     return model(batch["x"]).mean(), {}
        >>> state = TrainState.create(Net(nnx.Rngs(0)), optax.sgd(0.1), rng=jax.random.key(0))
        >>> check = make_check_step(loss_fn)
        >>> check(state, {"x": jnp.ones((3, 2))})
        Traceback (most recent call last):
        trainer.errors.NonFiniteError: step 1 is not finite: `head` (Head) made it of finite inputs. ...
    """
    check_loss_fn(loss_fn)
    precision, plan = as_precision(precision), plan_of(remat)
    steps = check_count(accumulate_steps, "accumulate_steps")
    losses = with_losses(check_extensions(extensions))
    loss_fn = objective_in(precision, loss_fn)
    has_scale = precision is not None and precision.has_loss_scale

    def made(*views: Any) -> Objective:
        return make_objective(loss_fn, wrt, losses, None, combined(in_precision(precision), *views))

    def evaluated(
        gradient: GradientFn, state: TrainState, batch: Batch, rng: jax.Array
    ) -> tuple[dict[str, jax.Array], TrainState]:
        """Returns what has to be finite, by name, and the state after the forward pass."""
        found = gradient(state, batch, rng)
        grads, metrics = average_over_axis(found.grads, found.metrics, None)
        # With a loss scale a gradient may overflow: then the step is skipped and the scale adapted.
        named = [] if has_scale else jax.tree.leaves_with_path(grads)
        return {"loss": metrics["loss"], **{f"grads/{leaf_path(path)}": leaf for path, leaf in named}}, found.state

    objective = rematerialized(plan, made(in_parts(plan)))
    _, of_the_step = accumulated(objective, gradient_of(objective, None), steps)

    @jax.jit
    @functools.partial(checkify.checkify, errors=_CHECKS)
    def checked(state: TrainState, batch: Batch) -> dict[str, jax.Array]:
        return evaluated(of_the_step, state, batch, jax.random.fold_in(state.rng, state.step))[0]

    plain = functools.partial(evaluated, gradient_of(made(), None))
    nan_checked = jax.jit(checkify.checkify(plain, errors=checkify.nan_checks))

    def located(state: TrainState, batch: Batch) -> str:
        """Returns where the step is not finite: in which micro-batch, and its origin, as sentences."""
        key = jax.random.fold_in(state.rng, state.step)
        parts = [(batch, None)] if steps == 1 else micro_batches(batch, steps)
        for index, (part, rows) in enumerate(parts):
            rng = key if rows is None else jax.random.fold_in(key, index)
            recording = _Recording()
            token = _RECORDING.set(recording)
            try:
                named, after = evaluated(gradient_of(made(_probing), None), state, part, rng)
            finally:
                _RECORDING.reset(token)
            if rows is None or not all(map(_is_finite, named.values())):
                operation = nan_checked(state, part, rng)[0].get()
                which = "" if rows is None else f" in micro-batch {index + 1}"
                said = "" if operation is None else f" {_sentence(operation)}"
                return f"{which}: {_origin(state, batch, part, rows, recording)}.{said}"
            state = state.replace(model_state=after.model_state, extensions=after.extensions)
        return ": the sum over the micro-batches overflows; each of them is finite."

    def check(state: TrainState, batch: Batch) -> None:
        step = int(state.step) + 1
        error, named = checked(state, batch)
        _throw(error, step)
        leaves = tuple(name for name in sorted(named, key="loss".__ne__) if not _is_finite(named[name]))
        if leaves:
            raise NonFiniteError(f"step {step} is not finite{located(state, batch)}", step, leaves, state)

    return check


def make_check_own_step(step_fn: Callable[[TrainState, Batch], Any]) -> Callable[[TrainState, Batch], None]:
    """Makes the same for the caller's own step: its objective is unknown, so only the operation can be named."""
    checked = jax.jit(checkify.checkify(step_fn, errors=_CHECKS))
    nan_checked = jax.jit(checkify.checkify(step_fn, errors=checkify.nan_checks))

    def check(state: TrainState, batch: Batch) -> None:
        step = int(state.step) + 1
        error, (after, metrics) = checked(state, batch)
        _throw(error, step)
        named = {leaf_path(path): leaf for path, leaf in jax.tree.leaves_with_path(after)}
        named = {name: leaf for name, leaf in named.items() if name.startswith(("params/", "model_state/"))}
        leaves = tuple(name for name, leaf in {**metrics, **named}.items() if not _is_finite(leaf))
        if leaves:
            operation = nan_checked(state, batch)[0].get() or "No operation made NaN, so it is an overflow."
            raise NonFiniteError(
                f"step {step} is not finite in `{leaves[0]}`. {_sentence(operation)}",
                step,
                leaves,
                state,
            )

    return check


def _throw(error: Any, step: int) -> None:
    """Raises the error that checkify found, with the step number."""
    try:
        error.throw()
    except Exception as failure:
        failure.add_note(f"in step {step}")
        raise


@dataclasses.dataclass(frozen=True)
class _Call:
    """A call of a module; calls are ordered by when they end."""

    path: str
    kind: str
    makes_it: bool
    """Whether an output is not finite while all inputs are."""


class _Recording:
    """The finiteness of module inputs, outputs and cotangents in one forward and backward pass."""

    def __init__(self) -> None:
        self.paths: dict[int, str] = {}
        self.forward: list[_Call] = []
        self.backward: dict[int, list[Any]] = {}
        """By call number: its path, its class, and whether the cotangents of its outputs and of its inputs are finite;
        cotangents that were never computed count as finite."""


_RECORDING: contextvars.ContextVar[_Recording] = contextvars.ContextVar("recording")


@contextlib.contextmanager
def _probing(model: Any) -> Iterator[None]:
    """A context in which every module call is recorded."""
    modules = modules_of(model)
    recording = _RECORDING.get()
    recording.paths = {id(module): "/".join(map(str, path)) for path, module in modules.items()}
    with called_through((module, _recorded) for module in modules.values()):
        yield


def _recorded(call: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    recording = _RECORDING.get()
    number, path = len(recording.backward), recording.paths.get(id(module), "")
    kind = type(module).__name__
    recording.backward[number] = [path, kind, True, True]
    inputs: list[bool] = []
    outputs: list[bool] = []
    args, kwargs = _watched((args, kwargs), inputs.append, functools.partial(_note, recording, number, 3))
    result = call(module, *args, **kwargs)
    result = _watched(result, outputs.append, functools.partial(_note, recording, number, 2))
    recording.forward.append(_Call(path, kind, all(inputs) and not all(outputs)))
    return result


def _note(recording: _Recording, number: int, place: int, is_finite: bool) -> None:
    recording.backward[number][place] &= is_finite


def _watched(tree: Any, forward: Callable[[bool], None], backward: Callable[[bool], None]) -> Any:
    """Returns a pytree whose floating-point arrays report whether they, and later their cotangents, are finite."""

    @jax.custom_vjp
    def told(array: jax.Array) -> jax.Array:
        return told_forward(array)[0]

    def told_forward(array: jax.Array) -> tuple[jax.Array, None]:
        forward(_is_finite(array))
        return array, None

    def told_backward(residual: None, cotangent: jax.Array) -> tuple[jax.Array]:
        del residual
        backward(_is_finite(cotangent))
        return (cotangent,)

    told.defvjp(told_forward, told_backward)
    return jax.tree.map(lambda leaf: told(leaf) if _is_floating(leaf) else leaf, tree, is_leaf=_is_of_nnx)


def _sentence(operation: str) -> str:
    """Returns checkify's message about an operation as one sentence: "nan generated by primitive: log."."""
    said = operation.splitlines()[0].strip().rstrip(".")
    return said[:1].upper() + said[1:].replace("primitive:", "the operation") + "."


def _is_of_nnx(node: Any) -> bool:
    return isinstance(node, nnx.Module | nnx.Variable | nnx.State)


def _is_floating(leaf: Any) -> bool:
    return isinstance(leaf, jax.Array | np.ndarray) and bool(jnp.issubdtype(leaf.dtype, jnp.inexact))


def _is_finite(leaf: Any) -> bool:
    """Returns whether an array is finite; a traced one, as inside `jax.lax.scan`, counts as finite."""
    return isinstance(leaf, jax.core.Tracer) or bool(jnp.all(jnp.isfinite(leaf)))


def _is_below(path: str, other: str) -> bool:
    return path != other and (not other or path.startswith(f"{other}/"))


def _origin(state: TrainState, batch: Batch, part: Batch, rows: Sequence[int] | None, recording: _Recording) -> str:
    """Returns a description of where the first non-finite value was produced.

    Args:
        state: The state before the micro-batch.
        batch: The whole batch.
        part: The micro-batch.
        rows: Its rows in the batch; None if it is the whole batch.
        recording: The calls of modules on the micro-batch.
    """
    for (path, whole), leaf in zip(jax.tree.leaves_with_path(batch), jax.tree.leaves(part), strict=True):
        if _is_floating(leaf) and not _is_finite(leaf):
            first = np.argwhere(~np.isfinite(np.asarray(leaf, np.float32)))[0].tolist()
            if rows is not None and np.shape(leaf) != np.shape(whole):
                first = [rows[first[0]]]
            row = f", first in row {first[0]}" if len(first) else ""
            return f"`{leaf_path(path) or 'the batch'}` of the batch holds NaN or infinity{row}"
    for name, tree in {"params": state.params, "model_state": state.model_state}.items():
        for path, leaf in jax.tree.leaves_with_path(tree):
            if _is_floating(leaf) and not _is_finite(leaf):
                return f"`{name}/{leaf_path(path)}` was NaN or infinite before"
    # Calls of inner modules end before the calls that contain them, so the first one is the innermost.
    for call in recording.forward:
        if call.makes_it:
            return f"`{call.path or 'model'}` ({call.kind}) made it of finite inputs"
    spoilt = [(path, kind) for path, kind, outputs, inputs in recording.backward.values() if outputs and not inputs]
    for path, kind in spoilt:
        if not any(_is_below(inner, path) for inner, _ in spoilt):
            return f"`{path or 'model'}` ({kind}) made it in the backward pass; its outputs are finite"
    return "the objective made it of what the model returned, which is finite"
