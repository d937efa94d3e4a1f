"""Param groups by path: an optimizer, a learning rate and a weight decay for each, and a table of them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from trainer.core.path_patterns import check_pattern, first_match, matches, matches_nothing
from trainer.core.tree_paths import leaf_path
from trainer.errors import ArgumentError, ArgumentTypeError, first_of
from trainer.state import TrainState, check_optimizer

_SHOWN = ("learning_rate", "weight_decay")


def by_group(groups: Mapping[str, optax.GradientTransformation]) -> optax.GradientTransformationExtraArgs:
    """Returns an optimizer that updates each group of params with its own optimizer.

    A param belongs to the first group whose pattern matches its path, as in `trainer.by_path`. It uses
    `optax.partition` (also known as ``multi_transform``): each optimizer sees only its own params, so a
    norm (for clipping, say) is that of its group. `group_table` shows which group has what. A learning rate and a
    weight decay per group::

        by_group(
            {
                "*bias": optax.adamw(1e-3, weight_decay=0.0),
                "encoder/**": optax.adamw(1e-4, weight_decay=0.1),
                "*": optax.adamw(1e-3, weight_decay=0.1),
            }
        )

    A group with ``optax.set_to_zero()`` is frozen, but its gradients are still computed; params excluded by ``wrt``
    have no gradients.

    Args:
        groups: Pattern to optimizer, in the order in which they are tried. ``"*"`` at the end takes the rest.

    Returns:
        A transformation whose state has that of each optimizer under its pattern, ``inner_states["encoder/**"]``.

        A rate can be set during a run (`TrainState.with_learning_rate`) if one optimizer keeps it, through
        `optax.inject_hyperparams`. If several keep one, it is ambiguous which is meant: assign to the ``hyperparams``
        of each, or keep one rate and derive the others as multiples::

            def make(learning_rate):
                encoder, rest = optax.adamw(0.1 * learning_rate), optax.adamw(learning_rate)
                return by_group({"encoder/**": encoder, "*": rest})

            optimizer = optax.inject_hyperparams(make)(learning_rate=1e-3)

    Raises:
        ArgumentTypeError: ``groups`` is not a mapping of patterns to optimizers.
        ArgumentError: It is empty, or a pattern is not a valid regular expression. ``init`` raises it if a param is in
            no group, or a group has no param.

    Example:
        >>> params = {"encoder": {"kernel": jnp.zeros((2, 2))}, "head": {"kernel": jnp.zeros((2, 1))}}
        >>> optimizer = by_group({"encoder/**": optax.sgd(0.1), "*": optax.sgd(1.0)})
        >>> updates, _ = optimizer.update(jax.tree.map(jnp.ones_like, params), optimizer.init(params), params)
        >>> print(updates["encoder"]["kernel"][0], updates["head"]["kernel"][0])
        [-0.1 -0.1] [-1.]
    """
    groups = _check_groups(groups)
    grouped = optax.partition(groups, lambda params: _labels(params, groups))

    def init(params: Any) -> Any:
        _check_labels(params, groups)
        return grouped.init(params)

    return optax.GradientTransformationExtraArgs(init, grouped.update)


def group_table(params: Any, groups: Mapping[str, optax.GradientTransformation]) -> str:
    """Returns a printable table of the groups of `by_group`.

    Args:
        params: A `TrainState`, or its params: nested dicts of arrays or of `jax.ShapeDtypeStruct`.
        groups: As for `by_group`.

    Returns:
        A line for each group, with its number, pattern, arrays, entries and the bytes of its optimizer state, and a
        line with the totals. There are columns "learning_rate" and "weight_decay" if the optimizer of a group keeps
        them in its state, through `optax.inject_hyperparams`: the value in the `TrainState`, or the initial one if only
        params are given. Otherwise a group shows "-": ``optax.adamw(1e-3)`` hides its rate in a closure.

    Raises:
        ArgumentError: As `by_group` and its ``init``.

    Example:
        >>> params = {"encoder": {"kernel": jnp.zeros((8, 8))}, "head": {"kernel": jnp.zeros((8, 1))}}
        >>> adamw = optax.inject_hyperparams(optax.adamw)
        >>> print(group_table(params, {"encoder/**": adamw(1e-4, weight_decay=0.1), "*": optax.sgd(1e-2)}))
        group  pattern     learning_rate  weight_decay  arrays  entries  optimizer bytes
            1  encoder/**         0.0001           0.1       1       64              544
            2  *                       -             -       1        8                0
        total                                            2       72              544
    """
    state = params if isinstance(params, TrainState) else None
    params = params if state is None else state.params
    groups = _check_groups(groups)
    held = jax.eval_shape(by_group(groups).init, params).inner_states
    kept = _hyperparams(groups, params, None if state is None else state.opt_state)
    shown = [name for name in _SHOWN if any(name in found for found in kept.values())]
    rows = [["group", "pattern", *shown, "arrays", "entries", "optimizer bytes"]]
    sums = [0, 0, 0]
    for number, pattern in enumerate(groups, start=1):
        leaves = [leaf for path, leaf in _paths(params) if first_match(groups, path) == pattern]
        counts = [len(leaves), sum(leaf.size for leaf in leaves), _bytes(held[pattern])]
        sums = [before + count for before, count in zip(sums, counts, strict=True)]
        values = [kept[pattern].get(name, "-") for name in shown]
        rows.append([str(number), pattern, *values, *(f"{count:,}" for count in counts)])
    rows.append(["total", "", *("" for _ in shown), *(f"{count:,}" for count in sums)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) if index == 1 else cell.rjust(width) for index, (cell, width) in enumerate(cells))
        for cells in (zip(row, widths, strict=True) for row in rows)
    )


def _hyperparams(groups: Mapping[str, Any], params: Any, opt_state: Any) -> dict[str, dict[str, str]]:
    """Returns the hyperparameters that the optimizers keep in their states, as text, by pattern and name."""
    leaves = jax.tree.leaves(opt_state, is_leaf=lambda node: isinstance(node, optax.PartitionState))
    states = [leaf.inner_states for leaf in leaves if isinstance(leaf, optax.PartitionState)]
    inner = next((found for found in states if found.keys() == groups.keys()), None)
    if inner is None or any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(inner)):

        def begin() -> Any:
            zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
            started = by_group(groups).init(zeros).inner_states
            return {pattern: _kept(state) for pattern, state in started.items()}

        found = jax.jit(begin)()  # XLA eliminates what is not returned, such as the moments
    else:
        found = {pattern: _kept(state) for pattern, state in inner.items()}
    return {
        pattern: {name: ", ".join(map(_as_text, values)) for name, values in named.items()}
        for pattern, named in found.items()
    }


def _kept(opt_state: Any) -> dict[str, list[Any]]:
    kept: dict[str, list[Any]] = {}
    for path, leaf in jax.tree.leaves_with_path(opt_state):
        *_, owner, name = ("", *leaf_path(path).split("/"))
        if owner == "hyperparams" and name in _SHOWN:
            kept.setdefault(name, []).append(leaf)
    return kept


def _as_text(value: Any) -> str:
    low, high = np.min(value), np.max(value)  # of the members of an ensemble
    return f"{low:.4g}" if low == high else f"{low:.4g} to {high:.4g}"


def _check_groups(groups: Any) -> dict[str, optax.GradientTransformation]:
    if not isinstance(groups, Mapping):
        raise ArgumentTypeError(
            f"`groups` is of type {type(groups).__name__}; it must map patterns to optimizers, such as "
            f"{{'encoder/**': optax.adamw(1e-4), '*': optax.adamw(1e-3)}}."
        )
    if not groups:
        raise ArgumentError("`groups` is empty; it must map patterns to optimizers, '*' to that of every param.")
    for pattern, optimizer in groups.items():
        check_pattern(pattern, "groups")
        check_optimizer(optimizer, f"groups[{pattern!r}]")
    return dict(groups)


def _check_labels(params: Any, groups: Mapping[str, Any]) -> None:
    """Checks that every param has a group, and every group a param."""
    paths = [path for path, _ in _paths(params)]
    taken = {path: first_match(groups, path) for path in paths}
    lost = [f"`{path}`" for path, pattern in taken.items() if pattern is None]
    problems = []
    if lost:
        problems.append(f"no group has {first_of(lost)}: add one, such as '*' at the end for all others")
    for pattern in groups:
        if pattern in taken.values():
            continue
        before = {str(taken[path]): None for path in paths if matches(pattern, path)}
        if before:
            problems.append(
                f"the group {pattern!r} is left with no param, since {', '.join(map(repr, before))} before it "
                f"{'have' if len(before) > 1 else 'has'} every match"
            )
        else:
            problems.append(f"the group {pattern!r} {matches_nothing(pattern, paths)}")
    if problems:
        raise ArgumentError(f"`groups` does not fit the params: {'; '.join(problems)}.")


def _labels(params: Any, groups: Mapping[str, Any]) -> Any:
    return jax.tree.map_with_path(lambda path, _: first_match(groups, leaf_path(path)), params)


def _paths(params: Any) -> list[tuple[str, Any]]:
    return [(leaf_path(path), leaf) for path, leaf in jax.tree.leaves_with_path(params)]


def _bytes(tree: Any) -> int:
    return sum(leaf.size * int(leaf.dtype.itemsize) for leaf in jax.tree.leaves(tree))
