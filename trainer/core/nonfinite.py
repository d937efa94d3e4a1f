"""The guard: how a step handles a loss, gradients or results that are not finite.

The decision is part of the compiled step, so it does not wait for the device and works in fused steps: if anything is
NaN or infinite, the step returns its input arrays. The event is recorded in the state, under
``extensions["nonfinite"]``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from trainer.core.checks import check_choice
from trainer.core.tree_paths import leaf_path
from trainer.errors import ArgumentError, NonFiniteError, ObjectiveError, first_of
from trainer.types import NONFINITE, RECORDS, SKIPPED, Metrics

if TYPE_CHECKING:
    from trainer.state import TrainState

Guard = Callable[["TrainState", "TrainState", Any, Metrics], tuple["TrainState", Metrics]]
"""Maps the states before and after an update, its gradients and its metrics to the result of the step."""


def check_policy(policy: Any) -> str:
    """Raises `ArgumentError` unless ``policy`` is one of the values of ``nonfinite``."""
    return check_choice(policy, ("ignore", "skip", "raise"), "nonfinite")


def make_guard(policy: str, *, watches_gradient: bool = True) -> Guard:
    """Returns the guard applied after the update of a step, for the ``nonfinite`` of `make_train_step`.

    With ``finite = all(isfinite(loss, gradients, params', model_state'))``::

        "skip":  state'' = where(finite, state', state),  step + 1 in any case
        "raise": state'' = where(finite and all earlier steps were, state', state),  step included

    With a loss scale the gradient is not checked, since it may overflow and the scale then adapts.
    """
    if check_policy(policy) == "ignore":
        return lambda before, after, grads, metrics: (after, metrics)

    def guard(before: TrainState, after: TrainState, grads: Any, metrics: Metrics) -> tuple[TrainState, Metrics]:
        if NONFINITE not in before.extensions:
            raise ArgumentError(
                f"`nonfinite` = {policy!r} needs a record in the state; pass it to TrainState.create as well."
            )
        if SKIPPED in metrics:
            raise ObjectiveError(
                f"`loss_fn` returned a metric `{SKIPPED}`, which is the name under which `nonfinite` = {policy!r} "
                f"reports steps that were left out; use another name."
            )
        record = before.extensions[NONFINITE]
        watched = grads if watches_gradient else before.params
        bad = jnp.stack([~jnp.all(jnp.isfinite(leaf)) for _, leaf in _checked(after, watched, metrics["loss"])])
        halted = (record["step"] > 0) if policy == "raise" else jnp.zeros((), bool)
        left_out = halted | jnp.any(bad)
        kept = jax.tree.map(lambda old, new: new if old is new else jnp.where(left_out, old, new), before, after)
        step = kept.step if policy == "raise" else after.step
        noted = {
            "skipped": record["skipped"] + left_out,
            "step": jnp.where(left_out & ~halted, before.step + 1, record["step"]),
            "leaves": jnp.where(left_out & ~halted, bad, record["leaves"]),
        }
        records = {name: after.extensions[name] for name in RECORDS if name in after.extensions}
        kept = kept.replace(step=step, extensions={**kept.extensions, **records, NONFINITE: noted})
        return kept, {**metrics, SKIPPED: left_out.astype(jnp.float32)}

    return guard


def check_finite(state: TrainState) -> None:
    """Raises `NonFiniteError` if a step with ``nonfinite="raise"`` met NaN or infinity. Waits for the device.

    In a custom loop, call it as often as you can afford to wait. From the bad step on, all steps return the state from
    before that step, so a late check loses nothing; ``error.state`` is that state, ready to train on.

    Args:
        state: A state created with ``nonfinite="raise"``; any other state passes.

    Raises:
        NonFiniteError: With the step, and the first arrays that were not finite.
    """
    record = state.extensions.get(NONFINITE)
    if record is None or not int(record["step"]):
        return
    step, bad = int(record["step"]), np.asarray(record["leaves"])
    names = [name for (name, _), is_bad in zip(_checked(state, state.params, state.step), bad, strict=True) if is_bad]
    # Gradients say more than the params that they make non-finite.
    spoilt = {name.replace("grads/", "params/", 1) for name in names if name.startswith("grads/")}
    leaves = tuple(name for name in names if name not in spoilt)
    listed = first_of([f"`{name}`" for name in leaves])
    raise NonFiniteError(
        f"step {step} is not finite: {listed} {'is' if len(leaves) == 1 else 'are'} NaN or infinite. The state "
        f"is that before the step. A smaller learning rate or `gradient_clip_norm` may help; `nonfinite` = 'skip' "
        f"leaves such steps out; `debug` = True (trainer.make_check_step) finds where it begins.",
        step,
        leaves,
        state.replace(extensions={**state.extensions, NONFINITE: jax.tree.map(jnp.zeros_like, record)}),
    )


def record_of(params: Any, model_state: Any) -> dict[str, jax.Array]:
    """Returns an empty record for a new state.

    Its entries are ``skipped`` (the number of skipped steps), ``step`` (the number of the latest one; with "raise" of
    the first) and ``leaves`` (which arrays were not finite in that step, in the order of `check_finite`).
    """
    count = 1 + 2 * len(jax.tree.leaves(params)) + len(_floating(model_state))
    return {
        "skipped": jnp.zeros((), jnp.int32),
        "step": jnp.zeros((), jnp.int32),
        "leaves": jnp.zeros(count, bool),
    }


def _checked(state: TrainState, grads: Any, loss: jax.Array) -> list[tuple[str, jax.Array]]:
    named = [("loss", loss)]
    for name, tree in {"grads": grads, "params": state.params, "model_state": state.model_state}.items():
        named += [(f"{name}/{leaf_path(path)}", leaf) for path, leaf in _floating(tree)]
    return named


def _floating(tree: Any) -> list[tuple[Any, jax.Array]]:
    return [(path, leaf) for path, leaf in jax.tree.leaves_with_path(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
