"""A custom step in place of one from `make_train_step`."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from trainer.core.objective import as_metrics, check_loss_fn, check_metrics
from trainer.core.tree_paths import leaf_path
from trainer.errors import ArgumentError, ArgumentTypeError, ObjectiveError
from trainer.state import TrainState
from trainer.types import Batch, Metrics, StepFn


def own_step(step_fn: StepFn) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """Returns a step that checks the result of ``step_fn`` while it is traced."""

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        result = step_fn(state, batch)
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[0], TrainState):
            raise ObjectiveError(
                f"`step_fn` returned {_described(result)}; it must return a pair (state, metrics), with the state as "
                f"state.replace(…) makes it."
            )
        after, metrics = result[0], as_metrics(result[1], "step_fn")
        after = _as_before(state, after)
        named = {name: value for name, value in metrics.items() if name != "step"}
        return after, {**check_metrics(named, "step_fn"), "step": after.step}

    return train_step


_DEFAULTS: dict[str, Any] = {
    "nonfinite": "ignore",
    "accumulate_steps": 1,
    "extensions": {},
    "report": (),
    "remat": None,
}


def check_own_step(step_fn: Any, loss_fn: Any, settings: Mapping[str, Any]) -> None:
    """Checks a ``step_fn``, its optional ``loss_fn``, and settings that must have their defaults.

    Args:
        step_fn, loss_fn: The arguments.
        settings: The values of the settings by name.

    Raises:
        ArgumentTypeError: One is not callable.
        ArgumentError: A setting was passed that only `make_train_step` has.
    """
    if not callable(step_fn):
        raise ArgumentTypeError(
            f"`step_fn` is of type {type(step_fn).__name__}; it must be a callable step_fn(state, batch) -> "
            f"(state, metrics)."
        )
    if loss_fn is not None:
        check_loss_fn(loss_fn)
    for name, value in settings.items():
        if value != _DEFAULTS[name]:
            raise ArgumentError(
                f"`{name}` is {value!r:.60}, but the step is a `step_fn`, which it cannot change; pass it to "
                f"make_train_step if the step is composed of that one."
            )


def no_loss_fn(*arguments: Any) -> Any:
    """The objective of a trainer without one; raises when called."""
    raise ArgumentError("`loss_fn` is None, so there is nothing to validate or to evaluate; pass one beside `step_fn`.")


def _as_before(before: TrainState, after: TrainState) -> TrainState:
    """Returns the state ``after`` a step with the dtypes ``before`` it.

    Raises:
        ObjectiveError: The structure changed; the message lists the first differences.
    """
    held, new = ({leaf_path(path): leaf for path, leaf in jax.tree.leaves_with_path(one)} for one in (before, after))
    wrong = [f"`{name}` was removed" for name in held.keys() - new.keys()]
    wrong += [f"`{name}` was added" for name in new.keys() - held.keys()]
    for name in held.keys() & new.keys():
        was, now = held[name], jax.numpy.asarray(new[name])
        is_kept = was.dtype == now.dtype or (now.weak_type and jax.numpy.result_type(was, now) == was.dtype)
        if was.shape != now.shape or not is_kept:
            wrong.append(f"`{name}` was {was.dtype}{was.shape} and became {now.dtype}{now.shape}")
    structures: list[Any] = [jax.tree.structure(one) for one in (before, after)]
    if wrong or structures[0] != structures[1]:
        listed = "; ".join(sorted(wrong)[:5]) or "a container is of another type"
        raise ObjectiveError(f"`step_fn` changed the structure of the state: {listed}.")
    kept: TrainState = jax.tree.map(
        lambda was, now: now if getattr(now, "dtype", None) == was.dtype else jax.numpy.asarray(now, was.dtype),
        before,
        after,
    )
    return kept


def _described(result: Any) -> str:
    if isinstance(result, tuple):
        return f"a tuple of {', '.join(type(one).__name__ for one in result)}"
    return f"a value of type {type(result).__name__}"
