"""Evaluation with params other than the trained ones: averages kept by an optimizer."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from trainer.core.tree_paths import leaf_path
from trainer.errors import ArgumentError, ArgumentTypeError
from trainer.state import TrainState
from trainer.types import EvalParams


def with_eval_params(state: TrainState, eval_params: EvalParams | None) -> TrainState:
    """Returns the state with the params to evaluate, ``eval_params(state.opt_state, state.params)``.

    Raises:
        ArgumentError: Their tree structure or shapes differ from those of the params.
    """
    if eval_params is None:
        return state
    try:
        params = eval_params(state.opt_state, state.params)
    except Exception as error:
        kind = type(state.opt_state).__name__
        error.add_note(f"raised in `eval_params(opt_state, params)`, where `opt_state` is of type {kind}")
        raise
    _check_same_shapes(state.params, params)
    return state.replace(params=params)


def check_eval_params(eval_params: Any) -> None:
    """Raises `ArgumentTypeError` unless ``eval_params`` is callable or None."""
    if eval_params is not None and not callable(eval_params):
        raise ArgumentTypeError(
            f"`eval_params` is of type {type(eval_params).__name__}; it must be a callable "
            f"eval_params(opt_state, params) -> params, such as optax.contrib.schedule_free_eval_params."
        )


def resolve_eval_params(
    eval_params: EvalParams | None, state: TrainState, own_state: Callable[[Any], Any]
) -> EvalParams | None:
    """Returns ``eval_params`` as a function of the trainer's optimizer state, after checking that it works.

    Args:
        eval_params: The caller's function, which takes the state of the caller's optimizer.
        state: The initial state; nothing is computed.
        own_state: Extracts the state of the caller's optimizer from that of the trainer's optimizer.

    Raises:
        ArgumentTypeError: It is not callable.
        ArgumentError: It does not return params.
    """
    check_eval_params(eval_params)
    if eval_params is None:
        return None

    def resolved(opt_state: Any, params: Any) -> Any:
        return eval_params(own_state(opt_state), params)

    jax.eval_shape(lambda state: with_eval_params(state, resolved).params, state)
    return resolved


def _check_same_shapes(wanted: Any, came: Any) -> None:
    want, have = (
        {leaf_path(path): jnp.shape(leaf) for path, leaf in jax.tree.leaves_with_path(tree)} for tree in (wanted, came)
    )
    wrong = [f"`{path}` of shape {shape}" for path, shape in have.items() if want.get(path) != shape]
    wrong += [f"no `{path}`" for path in want if path not in have]
    structures: list[Any] = [jax.tree.structure(tree) for tree in (wanted, came)]
    if wrong or structures[0] != structures[1]:
        listed = ", ".join(wrong[:5]) or f"a tree of another kind ({type(came).__name__})"
        raise ArgumentError(
            f"`eval_params` returned {listed}; it must return a tree like the params, nested plain dicts with arrays "
            f"of the same shapes."
        )
