"""Meshes of devices, and how a mesh splits a batch."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from trainer.batches import check_batch
from trainer.core.tree_paths import leaf_path
from trainer.errors import ArgumentError, ArgumentTypeError, BatchError
from trainer.types import Batch

BATCH_AXES = ("data", "fsdp")
"""The mesh axes that split a batch: each device along them computes on its own examples."""

Axes = str | tuple[str, ...] | None
"""What splits a dimension: a mesh axis, several from major to minor, or none."""


def make_mesh(axes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """Arranges devices in a mesh for the compiler to partition over (axis type `Auto`).

    Args:
        axes: Name to size, from major to minor. At most one size may be -1, for the remaining devices.
            Conventional names are ``data`` (replicas), ``fsdp`` (splits the state and the batch) and
            ``tensor`` (splits layers). An axis of size 1 costs nothing, and lets the same rules work on
            fewer devices.
        devices: By default all devices of all processes, in an order that suits their interconnect.

    Raises:
        ArgumentTypeError: A size is not an integer.
        ArgumentError: The sizes do not multiply to the number of devices.

    Example:
        >>> make_mesh({"data": -1, "tensor": 1}, jax.devices()[:1]).axis_names
        ('data', 'tensor')
    """
    if not axes or not isinstance(axes, Mapping):
        raise ArgumentTypeError(f"`axes` is {axes!r}; it must map names of axes to sizes, such as {{'data': -1}}.")
    for name, size in axes.items():
        if isinstance(size, bool) or not isinstance(size, int):
            raise ArgumentTypeError(
                f"`axes[{name!r}]` is {size!r}; it must be an integer; -1 takes the remaining devices."
            )
        if size == 0 or size < -1:
            raise ArgumentError(f"`axes[{name!r}]` is {size}; it must be positive; -1 takes the remaining devices.")
    free = [name for name, size in axes.items() if size == -1]
    if len(free) > 1:
        raise ArgumentError(f"`axes` leaves {' and '.join(map(repr, free))} open; at most one size can be -1.")
    count = len(jax.devices() if devices is None else devices)
    fixed = math.prod(size for size in axes.values() if size != -1)
    if count % fixed or (not free and count != fixed):
        raise ArgumentError(
            f"`axes` = {dict(axes)} needs {'a multiple of ' if free else ''}{fixed} devices, and there are {count}; "
            f"change the sizes"
            + (f", or pass `devices` = jax.devices()[:{fixed}]." if not free and fixed < count else ".")
        )
    sizes = tuple(count // fixed if size == -1 else size for size in axes.values())
    return jax.make_mesh(sizes, tuple(axes), axis_types=(AxisType.Auto,) * len(sizes), devices=devices)


def with_auto_axes(mesh: Mesh) -> Mesh:
    """Returns a mesh with every axis of type `Auto`, over which the compiler partitions.

    ``jax.make_mesh`` makes axes of type `Explicit` by default, which put shardings into the types of arrays. A model
    needs no such types here: rules and propagation decide.
    """
    if all(kind == AxisType.Auto for kind in mesh.axis_types):
        return mesh
    return Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * len(mesh.axis_names))


def batch_sharding(mesh: Mesh, axes: Axes = BATCH_AXES, *others: Axes) -> NamedSharding:
    """Returns the sharding of a batch. Axes missing from the mesh are ignored.

    Args:
        mesh: See `make_mesh`.
        axes: What splits the first dimension, the examples.
        *others: What splits the dimensions after the first, in order. Splitting the second dimension of
            sequences is sequence parallelism: each device computes on its part of every sequence, and
            the compiler gathers the keys and values of attention. Rules and model stay the same.

    Example:
        >>> mesh = make_mesh({"data": 1, "sequence": 1}, jax.devices()[:1])
        >>> batch_sharding(mesh).spec
        P('data',)
        >>> batch_sharding(mesh, BATCH_AXES, "sequence").spec
        P('data', 'sequence')
    """
    split = [tuple(name for name in as_tuple(entry) if name in mesh.axis_names) or None for entry in (axes, *others)]
    while split and split[-1] is None:
        split.pop()
    return NamedSharding(with_auto_axes(mesh), PartitionSpec(*split))


def check_batch_fits(batch: Batch, sharding: Any) -> None:
    """Checks that a batch can be split evenly, before anything is placed or compiled.

    Args:
        batch: The global batch, of arrays or `jax.ShapeDtypeStruct`.
        sharding: A result of `batch_sharding`, or a tree of them that is a prefix of the batch.

    Raises:
        BatchError: It is not a batch, or an axis does not divide a dimension. The message names the
            leaves, the axes and the nearest sizes that would work.
    """
    check_batch(batch)
    shardings = jax.tree.broadcast(sharding, batch)
    mesh = jax.tree.leaves(shardings)[0].mesh
    uneven: dict[str, list[str]] = {}
    for (path, leaf), split in zip(jax.tree.leaves_with_path(batch), jax.tree.leaves(shardings), strict=True):
        shape = np.shape(leaf)
        for dimension, axes in enumerate(map(as_tuple, split.spec)):
            parts = math.prod(mesh.shape[axis] for axis in axes)
            if axes and dimension >= len(shape):
                why = f"no dimension {dimension} to split over {', '.join(axes)}; give it a sharding of its own"
            elif axes and shape[dimension] % parts:
                why = _uneven(dimension, shape[dimension], parts, axes)
            else:
                continue
            uneven.setdefault(why, []).append(f"`batch/{leaf_path(path)}`")
    if uneven:
        found = "; ".join(f"{', '.join(names)}: {why}" for why, names in uneven.items())
        raise BatchError(f"`batch` cannot be split evenly over the mesh {dict(mesh.shape)}. {found}.")


def shares_threads(mesh: Mesh) -> bool:
    """Tells whether devices of this process share a thread pool, as those of the CPU do.

    Two calls with collectives in flight could then occupy all threads while each waits for the other, and XLA ends the
    process after 40 seconds. So a call must finish before the next is dispatched.
    """
    local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
    return len(local) > 1 and local[0].platform == "cpu"


def multiples_near(length: int, parts: int) -> list[int]:
    """Returns the nearest positive multiples of ``parts``, the lower one first."""
    return [size for size in (length // parts * parts, -(-length // parts) * parts) if size]


def as_tuple(axes: Axes) -> tuple[str, ...]:
    """Returns an entry of a `PartitionSpec` as a tuple of axis names."""
    return () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)


def _uneven(dimension: int, length: int, parts: int, axes: tuple[str, ...]) -> str:
    near = multiples_near(length, parts)
    wanted = f"lengths are {near[0]} and {near[1]}" if len(near) > 1 else f"length is {near[0]}"
    return f"dimension {dimension} of length {length} is split in {parts} over {', '.join(axes)}; the nearest {wanted}"
