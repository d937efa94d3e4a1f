"""Sweeps: a `Trainer` that trains many models of the same structure at once, in one program."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, Self

import jax
import jax.numpy as jnp

from trainer.batches import batch_length
from trainer.core.checks import check_count
from trainer.core.own_step import check_own_step, own_step
from trainer.core.partial_metrics import Histogram, PartialMetric, vector
from trainer.core.tree_paths import leaf_path
from trainer.errors import ArgumentError, ArgumentTypeError, ObjectiveError
from trainer.state import TrainState
from trainer.types import BATCH_WEIGHT, MEMBERS, SKIPPED, Batch, Metrics, StepFn


@functools.partial(jax.tree_util.register_dataclass, data_fields=["metric"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class _Each(PartialMetric):
    """A mergeable metric of each member, stacked."""

    metric: Any

    def compute(self) -> Any:
        return jax.vmap(lambda one: one.compute())(self.metric)

    def merge(self, other: Self) -> Self:
        return dataclasses.replace(self, metric=jax.vmap(lambda a, b: a.merge(b))(self.metric, other.metric))


def make_sweep(
    step_fn: StepFn, members: TrainState
) -> tuple[TrainState, Callable[[TrainState, Batch], tuple[TrainState, Metrics]]]:
    """Returns a state and a ``step_fn`` with which a `Trainer` trains many models at once, on the same batches.

    In your own loop, ``jax.vmap(step_fn, in_axes=(0, None))(members, batch)`` is all you need. A `Trainer` has one step
    count and one key, but stacked states have one per member; the returned state has both, and the step is, for each
    member i::

        member_i', metrics_i = step_fn(member_i, batch)

    so each learns what it would learn alone, within rounding. All features of a run work for the sweep: shuffled
    epochs, fused steps, saves, exact resume, callbacks, and a mesh, over which
    ``partition_rules={"step": P(), "rng": P(), "**": P("tensor")}`` shards the members.

    Args:
        step_fn: A pure step of one member, such as `make_train_step` returns.
        members: Their states, stacked: ``jax.vmap(create)(keys, rates)``, where ``create`` makes a `TrainState`. They
            may differ in any value of a state: the key, the params, what `optax.inject_hyperparams` keeps.

    Returns:
        The state, whose arrays have a leading member axis except ``step`` and ``rng``, and the step. Its metrics are
        arrays with one entry per member, averaged like `trainer.vector`, or merged; but ``loss`` is the smallest one,
        and ``losses`` are those of the members. ``skipped`` is counted per member.

        If a member diverges, the state is not finite and `Trainer.train` does not save it: make the step and the
        members with ``nonfinite="skip"`` if a rate may be too large.

    Raises:
        ArgumentTypeError: ``step_fn`` is not callable, or ``members`` is not a `TrainState`.
        ArgumentError: ``members`` is not stacked.

    Example:
        >>> import optax
        >>> from flax import nnx
        >>> from trainer import make_train_step
        >>> optimizer = optax.inject_hyperparams(optax.sgd)(0.1)
        >>> def create(key, rate):
        ...     model = nnx.Linear(2, 1, rngs=nnx.Rngs(key))
        ...     return TrainState.create(model, optimizer, rng=key).with_learning_rate(rate)
        >>> def loss_fn(model, batch, rng, step):
        ...     return jnp.mean((model(batch["x"]) - 1.0) ** 2), {}
        >>> members = jax.vmap(create)(jax.random.split(jax.random.key(0), 3), jnp.array([0.0, 0.1, 1.0]))
        >>> state, step = make_sweep(make_train_step(loss_fn, optimizer), members)
        >>> state, metrics = jax.jit(step)(state, {"x": jnp.eye(2)})
        >>> metrics["losses"].compute().shape, sweep_members(state, 2).params["kernel"].shape
        ((3,), (2, 1))
    """
    check_own_step(step_fn, None, {})
    _check_stacked(members)
    each = jax.vmap(own_step(step_fn), in_axes=(0, None))

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        after, metrics = each(sweep_members(state), batch)
        weights = jnp.full(after.step.shape, batch_length(batch, "batch"), jnp.float32)
        return _joined(after, state.step + 1, state.rng), _by_member(dict(metrics), weights)

    return _joined(members, members.step[0], members.rng[0]), step


def sweep_members(state: TrainState, index: int | None = None) -> TrainState:
    """Returns members of a sweep from its state: one as an ordinary state, or all of them, stacked.

    Args:
        state: The state from `make_sweep`, or of a `Trainer` made with it.
        index: The member, from 0; all if left out, as for ``jax.vmap(make_eval_step(loss_fn), in_axes=(0, None))``.

    Raises:
        ArgumentTypeError: ``index`` is not an integer.
        ArgumentError: ``state`` is not that of a sweep, or has no such member.
    """
    held = state.extensions.get(MEMBERS)
    if held is None or held.keys() != {"step", "rng"}:
        raise ArgumentError("`state` is that of no sweep; pass one that make_sweep returned, or its step.")
    others = {name: entry for name, entry in state.extensions.items() if name != MEMBERS}
    members = state.replace(step=held["step"], rng=held["rng"], extensions=others)
    if index is None:
        return members
    count, index = members.step.shape[0], check_count(index, "index", least=0)
    if index >= count:
        raise ArgumentError(f"`index` is {index}; the sweep has the members 0 to {count - 1}.")
    member: TrainState = jax.tree.map(lambda leaf: leaf[index], members)
    return member


def _joined(members: TrainState, step: Any, rng: Any) -> TrainState:
    held = {"step": members.step, "rng": members.rng}
    return members.replace(step=step, rng=rng, extensions={**members.extensions, MEMBERS: held})


def _by_member(metrics: dict[str, Any], weights: jax.Array) -> Metrics:
    """Returns the stacked metrics of members as metrics of one step; ``weights`` has the batch weight of each."""
    del metrics["step"]
    named: Metrics = {}
    if BATCH_WEIGHT in metrics:
        weights = metrics.pop(BATCH_WEIGHT)
        named[BATCH_WEIGHT] = jnp.max(weights)
    if SKIPPED in metrics:
        skipped = metrics.pop(SKIPPED)
        weights, named[SKIPPED] = jnp.where(skipped, 0, weights), Histogram(skipped.astype(jnp.int32))
    if "loss" in metrics:
        if "losses" in metrics:
            raise ObjectiveError("`step_fn` returned a metric `losses`, which is that of all members; rename it.")
        loss = metrics["losses"] = metrics.pop("loss")
        loss = _Each(loss).compute() if isinstance(loss, PartialMetric) else loss
        named["loss"] = jnp.nanmin(loss)
    for name, value in metrics.items():
        named[name] = _Each(value) if isinstance(value, PartialMetric) else vector(value, weights)
    return named


def _check_stacked(members: Any) -> None:
    if not isinstance(members, TrainState):
        raise ArgumentTypeError(
            f"`members` is of type {type(members).__name__}; it must be a TrainState, that of all members, stacked: "
            f"jax.vmap(create)(keys)."
        )
    if jnp.ndim(members.step) != 1:
        raise ArgumentError(
            "`members` is the state of one model; it must be that of all members, stacked: jax.vmap(create)(keys)."
        )
    if MEMBERS in members.extensions:
        raise ArgumentError(f"`members.extensions` has the name {MEMBERS!r}, under which a sweep keeps its own.")
    count = members.step.shape[0]
    wrong = [
        f"`{leaf_path(path)}` of shape {leaf.shape}"
        for path, leaf in jax.tree.leaves_with_path(members)
        if leaf.shape[:1] != (count,)
    ]
    if wrong:
        raise ArgumentError(
            f"`members` has {count} members by `step`, but not by {', '.join(wrong[:5])}; stack all arrays."
        )
