"""Values that a caller assigns to a training state, as arrays of the types that the step was compiled for."""

import re
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from trainer.core.tree_paths import leaf_path
from trainer.errors import StateError

_HYPERPARAMETER = re.compile(r"(?P<before>(?:.*/)?)hyperparams/(?P<name>.+)")


def with_edits_as_arrays(state: Any, recorded: list[Any], held: list[Any], treedef: Any) -> Any:
    """Returns a state whose containers were edited, with arrays of the shapes and dtypes that it had.

    Args:
        state: The edited state.
        recorded: Its leaves at the last comparison.
        held: The arrays of the run for these leaves. They differ where an earlier edit was converted.
        treedef: The structure that it must have.

    Raises:
        StateError: The structure or a shape differs, an array of integers cannot hold its new value, or another value
            is set where a schedule overwrites it. The last is raised once for each edit, since the state keeps its own
            value.
    """
    if jax.tree.structure(state) != treedef:
        raise StateError(
            "the state was changed to another structure than it had, which the next step cannot take; assign "
            "`trainer.state` of a new trainer, or change values only."
        )
    paths, given = _paths(state), jax.tree.leaves(state)
    changed = [index for index, (new, before) in enumerate(zip(given, recorded, strict=True)) if new is not before]
    for index in changed:
        if _is_overwritten(index, paths, changed, given[index], held[index]):
            recorded[index] = given[index]
            raise StateError(_scheduled(paths[index]))
    arrays = list(held)
    for index in changed:
        new, old = given[index], held[index]
        if jnp.shape(new) != old.shape:
            raise StateError(f"`{paths[index]}` of shape {old.shape} was given a value of shape {jnp.shape(new)}.")
        is_extended = jnp.issubdtype(old.dtype, jax.dtypes.extended)
        array = jnp.asarray(new) if is_extended else _in_dtype(paths[index], new, old.dtype)
        # Copied: the step donates it, and the caller's array must survive that.
        array = jnp.array(array, copy=True) if array is new else array
        # An uncommitted array must stay uncommitted, or the step would be compiled again.
        arrays[index] = jax.device_put(array, old.sharding) if old.committed else array
    return jax.tree.unflatten(treedef, arrays)


def as_arrays(state: Any, held: Any) -> Any:
    """Returns a state that was assigned, with arrays in place of numbers and NumPy arrays.

    These take the dtype and the sharding that the run holds, if it has the same structure. A JAX array keeps its dtype,
    except in ``opt_state`` where it has fewer bits than the run holds, as moments of a new `optax` state may.

    Args:
        state: The state.
        held: The state of the run.

    Raises:
        StateError: A number takes the place of an array, an array of integers cannot hold its new value, or another
            value is set where a schedule overwrites it.
    """
    leaves, old_leaves = jax.tree.leaves(state), jax.tree.leaves(held)
    treedef: Any = jax.tree.structure(state)
    if treedef != jax.tree.structure(held):
        leaves = [leaf if isinstance(leaf, jax.Array) else jnp.array(leaf) for leaf in leaves]
    else:
        changed = [index for index, (new, old) in enumerate(zip(leaves, old_leaves, strict=True)) if new is not old]
        paths = _paths(state) if changed else []
        for index in changed:
            if _is_overwritten(index, paths, changed, leaves[index], old_leaves[index]):
                raise StateError(_scheduled(paths[index]))
            leaves[index] = _as_array(paths[index], leaves[index], old_leaves[index])
    return jax.tree.unflatten(treedef, leaves)


def widened(leaf: Any, dtype: Any) -> Any:
    """Returns an array in another dtype if that holds all its values, and unchanged otherwise."""
    now = jnp.result_type(leaf)
    if now == dtype or any(jnp.issubdtype(each, jax.dtypes.extended) for each in (now, dtype)):
        return leaf
    return jnp.asarray(leaf, dtype) if jnp.promote_types(now, dtype) == dtype else leaf


def _as_array(path: str, leaf: Any, held: jax.Array) -> Any:
    if isinstance(leaf, jax.Array):
        return widened(leaf, held.dtype) if path.startswith("opt_state/") else leaf
    is_number = not hasattr(leaf, "dtype")
    if (is_number and held.shape) or jnp.issubdtype(held.dtype, jax.dtypes.extended):
        given = f"the number {leaf!r}" if is_number else f"{leaf.dtype}{leaf.shape}"
        raise StateError(f"`{path}` of {held.dtype}{held.shape} was given {given}.")
    if is_number or not held.committed or jnp.shape(leaf) != held.shape:
        return jnp.array(_in_dtype(path, leaf, held.dtype))
    host = np.array(_in_dtype(path, np.asarray(leaf), held.dtype))
    return jax.make_array_from_callback(host.shape, held.sharding, lambda index: host[index])


def _in_dtype(path: str, value: Any, dtype: Any) -> Any:
    """Returns a value in a dtype: on the host if it is a NumPy array, else on the device."""
    convert = np.asarray if isinstance(value, np.ndarray) else jnp.asarray
    if jnp.issubdtype(dtype, jnp.inexact) or getattr(value, "dtype", None) == dtype:
        return convert(value, dtype)
    given = value if isinstance(value, jax.Array) else np.asarray(value)
    with np.errstate(invalid="ignore"):  # of NaN
        exact = given.astype(dtype)
    if not (exact == given).all():
        raise StateError(
            f"`{path}` of {dtype}{exact.shape} was given {value!r:.60}, which it cannot hold; make the optimizer with "
            f"a float there (1.0 for 1), or assign an integer."
        )
    return convert(exact)


def _paths(tree: Any) -> list[str]:
    return [leaf_path(path) for path, _ in jax.tree.leaves_with_path(tree)]


def _is_overwritten(index: int, paths: list[str], changed: list[int], new: Any, held: jax.Array) -> bool:
    """Returns whether a schedule will overwrite the new value of a leaf, so that the change would be lost.

    An equal value is none, and neither is a change of the schedule's own state: that sets the value which is due.
    """
    schedule = _schedule_of(index, paths)
    return bool(schedule) and not set(schedule) & set(changed) and not held.is_deleted() and not _is_equal(new, held)


def _is_equal(new: Any, held: Any) -> bool:
    """Returns whether two values are equal, NaN included; of two floats, in the narrower of their dtypes."""
    new, held = np.asarray(new), np.asarray(held)
    if all(jnp.issubdtype(each.dtype, jnp.inexact) for each in (new, held)):
        narrow = min(new.dtype, held.dtype, key=lambda dtype: dtype.itemsize)
        with np.errstate(over="ignore"):
            new, held = new.astype(narrow), held.astype(narrow)
    return new.shape == held.shape and bool(((new == held) | ((new != new) & (held != held))).all())


def _schedule_of(index: int, paths: list[str]) -> list[int]:
    """Returns which leaves are the state of the schedule that sets a hyperparameter; none if no schedule does."""

    def states() -> Iterator[int]:
        if found := _HYPERPARAMETER.fullmatch(paths[index]):
            scheduled = f"{found['before']}hyperparams_states/{found['name']}"
            for other, path in enumerate(paths):
                if path == scheduled or path.startswith(f"{scheduled}/"):
                    yield other

    return list(states())


def _scheduled(path: str) -> str:
    return (
        f"`{path}` follows a schedule, which sets it anew in every step, so what is set would be lost; give "
        f"optax.inject_hyperparams a number for it and not a schedule."
    )
