"""How a training state is split over a mesh: partition rules, and what each device holds.

JAX does the work. A train step names no devices; under ``jax.jit`` the compiler derives every collective
from the shardings of the step's arguments. It remains to choose a `NamedSharding` for each leaf of the state
and of the batch, and to have the step return its state with the same shardings (`jit_step`).
"""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.core import spmd
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from trainer.core.checks import did_you_mean
from trainer.core.path_patterns import check_pattern, matches, matches_nothing
from trainer.core.private_api import axes_by_name, names_of_dimensions
from trainer.core.tree_paths import leaf_path
from trainer.errors import ArgumentError, ArgumentTypeError
from trainer.sharding.mesh import Axes, as_tuple, with_auto_axes
from trainer.state import TrainState

FSDP_AXIS = "fsdp"
"""The mesh axis that splits a leaf whose sharding no name, rule or param decides."""

MIN_SIZE = 2**16
"""Smaller leaves (in entries) are replicated, since gathering them costs more latency than their memory saves."""

Keys = tuple[str, ...]


def partition(
    tree: Any,
    mesh: Mesh,
    rules: Mapping[str, PartitionSpec] | None = None,
    *,
    logical_axes: Mapping[str, Axes] | None = None,
    min_size: int = MIN_SIZE,
) -> Any:
    """Returns the sharding of each leaf over the mesh.

    The first of these that applies decides:

    1. Dimension names that the module's author gave to a variable (``nnx.with_partitioning``).
       ``logical_axes`` maps them to mesh axes; the name of a mesh axis stands for itself.
    2. The first of ``rules`` whose pattern matches the path.
    3. A param's sharding, by 1, 2 or 4, for a leaf of ``opt_state`` or ``extensions`` whose path ends
       with the param's path. The leaf has the param's shape (a momentum, an average of the params), or
       lacks a dimension (Adafactor's rows and columns; not if the shape fits two dimensions that are
       split differently), or has one more leading dimension, which is not split (L-BFGS's memory).
    4. The mesh axis ``fsdp``, which splits the largest dimension that it divides, the last of those with
       equal length. Leaves with fewer than ``min_size`` entries, keys and scalars are replicated, and so is
       every leaf if the mesh has no such axis.

    If 1 decides a param, its momentum follows it before the rules apply. A rule that matches only
    ``opt_state/...`` splits the optimizer's state and leaves the params replicated.

    Args:
        tree: A `TrainState`, or another tree, of arrays or `jax.ShapeDtypeStruct`. 1 and 3 apply to a
            `TrainState` only.
        mesh: The mesh, see `make_mesh`.
        rules: Pattern to `PartitionSpec`. A pattern must match a whole path in the state, as in
            `trainer.by_path`: ``params/layers/*/kernel``, or a regular expression, ``params/layers/.*/kernel``.
        logical_axes: Dimension name to mesh axes, or to None for a dimension that is not split.
        min_size: Leaves with fewer entries are replicated by 4.

    Returns:
        The same tree with a `NamedSharding` for each leaf, for ``jax.device_put`` or ``jax.jit``.

    Raises:
        ArgumentTypeError: A rule's value is not a `PartitionSpec`.
        ArgumentError: A rule decides nothing, the mesh lacks an axis, or axes do not divide a dimension.
            The message names all of them.

    Example:
        >>> from trainer.sharding import make_mesh
        >>> mesh = make_mesh({"fsdp": 1, "tensor": 1}, jax.devices()[:1])
        >>> shapes = {"dense": {"kernel": jax.ShapeDtypeStruct((512, 256), jnp.float32)}}
        >>> partition(shapes, mesh)["dense"]["kernel"].spec
        P('fsdp', None)
        >>> partition(shapes, mesh, {"dense/.*": PartitionSpec(None, "tensor")})["dense"]["kernel"].spec
        P(None, 'tensor')
    """
    mesh, rules = with_auto_axes(mesh), _check_rules(rules)
    unknown = _unknown_axes(rules, mesh)
    leaves = {_keys(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
    problems = list(unknown.values())
    named = _named_specs(tree, mesh, logical_axes or {}, problems)
    params = {keys[1:] for keys in leaves if keys[0] == "params"} if isinstance(tree, TrainState) else set()
    decided_by = dict.fromkeys(rules, 0)
    matched = dict.fromkeys(rules, 0)

    @functools.cache
    def decide(keys: Keys) -> PartitionSpec:
        leaf, path = leaves[keys], "/".join(keys)
        source = _mirrored(keys, params)
        followed = _spec_like_param(decide(source), leaves[source].shape, leaf.shape) if source else None
        spec = named.get(keys, followed if source in named else None)
        for pattern, ruled in rules.items():
            if matches(pattern, path):
                matched[pattern] += 1
                if spec is None:
                    decided_by[pattern] += 1
                    spec = ruled
                    if pattern not in unknown:
                        problems.extend(_misfits(path, leaf.shape, spec, mesh, f"by the rule {pattern!r}"))
        if spec is None:
            spec = followed
        return _automatic(leaf, mesh, min_size) if spec is None else spec

    specs = [decide(keys) for keys in leaves]
    for pattern, count in decided_by.items():
        if not count:
            problems.append(_unused_rule(pattern, matched[pattern], leaves))
    if problems:
        found = "; ".join(dict.fromkeys(problems))
        raise ArgumentError(f"`tree` cannot be partitioned over the mesh {dict(mesh.shape)}: {found}.")
    return jax.tree.unflatten(jax.tree.structure(tree), [NamedSharding(mesh, spec) for spec in specs])


def shardings_of(tree: Any) -> Any:
    """Returns the sharding of each leaf, an array or a `jax.ShapeDtypeStruct`.

    Raises:
        ArgumentTypeError: The sharding of a leaf is not over a mesh.
    """

    def of(path: Any, leaf: Any) -> NamedSharding:
        sharding = getattr(leaf, "sharding", None)
        if not isinstance(sharding, NamedSharding):
            raise ArgumentTypeError(
                f"`{leaf_path(path)}` has the sharding {sharding}, which is not over a mesh; create the state with "
                f"create_sharded, or place it: jax.device_put(state, partition(state, mesh))."
            )
        return sharding

    return jax.tree.map_with_path(of, tree)


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes of the tree that each device of its mesh holds."""
    return sum(_bytes(leaf, sharding) for leaf, sharding in _with_shardings(tree))


def describe(tree: Any) -> str:
    """Returns a printable table of how each leaf is split.

    Args:
        tree: A sharded state or another tree of arrays or `jax.ShapeDtypeStruct` with shardings.

    Returns:
        A line for each leaf, with its path, dtype and shape, `PartitionSpec` and bytes per device, and
        a line of totals.

    Raises:
        ArgumentTypeError: The sharding of a leaf is not over a mesh.

    Example:
        >>> from trainer.sharding import make_mesh
        >>> mesh = make_mesh({"fsdp": 1}, jax.devices()[:1])
        >>> print(describe(jax.device_put({"bias": jnp.zeros(8)}, NamedSharding(mesh, PartitionSpec()))))
        path   array       spec  bytes per device
        bias   float32[8]  P()                 32
        total                            32 of 32
    """
    paths = [leaf_path(path) for path, _ in jax.tree.leaves_with_path(tree)]
    held = _with_shardings(tree)
    whole = sum(leaf.size * leaf.dtype.itemsize for leaf, _ in held)
    lines = [("path", "array", "spec", "bytes per device")]
    for path, (leaf, sharding) in zip(paths, held, strict=True):
        array = f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"
        lines.append((path, array, str(sharding.spec), f"{_bytes(leaf, sharding):,}"))
    lines.append(("total", "", "", f"{bytes_per_device(tree):,} of {whole:,}"))
    path_width, array_width, spec_width, size_width = (max(map(len, column)) for column in zip(*lines, strict=True))
    return "\n".join(
        f"{path:<{path_width}}  {array:<{array_width}}  {spec:<{spec_width}}  {size:>{size_width}}"
        for path, array, spec, size in lines
    )


def _check_rules(rules: Mapping[str, PartitionSpec] | None) -> dict[str, PartitionSpec]:
    if rules is None:
        return {}
    if not isinstance(rules, Mapping):
        raise ArgumentTypeError(
            f"`rules` is of type {type(rules).__name__}; it must map patterns to specs, "
            f"such as {{'params/.*/kernel': PartitionSpec(None, 'tensor')}}."
        )
    for pattern, spec in rules.items():
        if not isinstance(spec, PartitionSpec):
            raise ArgumentTypeError(
                f"`rules[{pattern!r}]` is {spec!r} of type {type(spec).__name__}; it must be a "
                f"jax.sharding.PartitionSpec, such as PartitionSpec(None, 'tensor')."
            )
        check_pattern(pattern, "rules")
    return dict(rules)


def _unknown_axes(rules: Mapping[str, PartitionSpec], mesh: Mesh) -> dict[str, str]:
    """Returns, by pattern, the problem of each rule that names an axis missing from the mesh."""
    found = {}
    for pattern, spec in rules.items():
        absent = [axis for axes in spec for axis in as_tuple(axes) if axis not in mesh.axis_names]
        if absent:
            hint = did_you_mean(absent[0], mesh.axis_names).rstrip(".")
            found[pattern] = (
                f"the rule {pattern!r} splits as {spec}, and the mesh has no axis {absent[0]!r}: {hint} "
                f"(one of size 1 costs nothing)"
            )
    return found


def _named_specs(
    tree: Any, mesh: Mesh, logical_axes: Mapping[str, Axes], problems: list[str]
) -> dict[Keys, PartitionSpec]:
    """Returns the specs of variables with named dimensions, by path in the state; appends to ``problems``."""
    if not isinstance(tree, TrainState):
        return {}
    leaves = {_keys(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
    specs: dict[Keys, PartitionSpec] = {}
    for path, variable in nnx.to_flat_state(nnx.state(tree.model())):
        names = names_of_dimensions(variable) if isinstance(variable, nnx.Variable) else None
        if not names:
            continue
        if isinstance(names, NamedSharding):
            names = names.spec
        # `spmd`, of Linen, holds the rules that NNX uses too; seen in Flax 0.12.8.
        meaning = {**axes_by_name(variable), **dict(spmd.get_logical_axis_rules()), **logical_axes}
        spec = PartitionSpec(*(meaning.get(name, name) if isinstance(name, str) else name for name in names))
        for where in ("params", "model_state"):
            keys = (where, *map(str, path))
            if keys in leaves:
                specs[keys] = spec
                problems.extend(
                    _misfits(
                        "/".join(keys), leaves[keys].shape, spec, mesh, f"by the names {tuple(names)} in its metadata"
                    )
                )
    return specs


def _mirrored(keys: Keys, params: set[Keys]) -> Keys | None:
    """Returns the path of the param that a leaf of the optimizer or an extension belongs to, or None."""
    if not params or keys[0] not in ("opt_state", "extensions"):
        return None
    # Longest suffix first: `mu/layers/kernel` belongs to `layers/kernel`, not to a param `kernel`.
    for start in range(1, len(keys)):
        if keys[start:] in params:
            return "params", *keys[start:]
    return None


def _spec_like_param(spec: PartitionSpec, param: tuple[int, ...], shape: tuple[int, ...]) -> PartitionSpec | None:
    """Returns the spec of a leaf that belongs to a param, or None if the two shapes leave it ambiguous."""
    if shape == param:
        return spec
    if shape[1:] == param:
        return PartitionSpec(None, *spec)
    axes = (*spec, *[None] * len(param))[: len(param)]
    lacking = {axes[:i] + axes[i + 1 :] for i in range(len(param)) if param[:i] + param[i + 1 :] == shape}
    return PartitionSpec(*lacking.pop()) if len(lacking) == 1 else None


def _automatic(leaf: Any, mesh: Mesh, min_size: int) -> PartitionSpec:
    if FSDP_AXIS not in mesh.axis_names or leaf.size < min_size or not jnp.issubdtype(leaf.dtype, np.number):
        return PartitionSpec()
    size = mesh.shape[FSDP_AXIS]
    divisible = [(length, dimension) for dimension, length in enumerate(leaf.shape) if length % size == 0]
    if not divisible:
        return PartitionSpec()
    chosen = max(divisible)[1]
    return PartitionSpec(*(FSDP_AXIS if dimension == chosen else None for dimension in range(leaf.ndim)))


def _misfits(path: str, shape: tuple[int, ...], spec: PartitionSpec, mesh: Mesh, why: str) -> list[str]:
    """Returns the problems of a spec for a shape, as clauses of an error message."""
    subject = f"`{path}` of shape {shape} is split {why} as {spec}"
    if len(spec) > len(shape):
        return [f"{subject}, which has {len(spec)} dimensions; a pattern can be narrowed to other paths"]
    axes = [axis for axes in spec for axis in as_tuple(axes)]
    unknown = [axis for axis in axes if axis not in mesh.axis_names]
    if unknown:
        hint = did_you_mean(unknown[0], mesh.axis_names).rstrip(".")
        return [
            f"{subject}, and the mesh has no axis {unknown[0]!r}: {hint} (`logical_axes` maps names to axes, and so "
            f"does `with flax.core.spmd.logical_axis_rules(...):` around the call)"
        ]
    if len(set(axes)) < len(axes):
        return [f"{subject}, which uses an axis twice"]
    wrong = []
    for dimension, (length, names) in enumerate(zip(shape, spec, strict=False)):
        parts = math.prod(mesh.shape[axis] for axis in as_tuple(names))
        if length % parts:
            wrong.append(f"{subject}, and dimension {dimension} of length {length} cannot be split in {parts}")
    return wrong


def _unused_rule(pattern: str, matched: int, leaves: Mapping[Keys, Any]) -> str:
    if matched:
        return f"the rule {pattern!r} decides nothing, since names in metadata or rules before it decide every match"
    return f"the rule {pattern!r} {matches_nothing(pattern, ('/'.join(keys) for keys in leaves))}"


def _keys(path: Sequence[Any]) -> Keys:
    return tuple(leaf_path([key]) for key in path)


def _with_shardings(tree: Any) -> list[tuple[Any, NamedSharding]]:
    return list(zip(jax.tree.leaves(tree), jax.tree.leaves(shardings_of(tree)), strict=True))


def _bytes(leaf: Any, sharding: NamedSharding) -> int:
    return math.prod(sharding.shard_shape(leaf.shape)) * int(leaf.dtype.itemsize)
