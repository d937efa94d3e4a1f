"""Where the state and the batches of a trainer lie: on JAX's default device, or over a mesh.

A batch comes in one of two ways. One that a caller or a loader hands over is this process's own part of it, which
is all of it where there is one process. One that is drawn from data in memory is known to every process by the
numbers of its examples, and each gathers only what its devices hold.
"""

import functools
import math
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from trainer.batches import checked_batch, describe
from trainer.data.memory import EpochOfData, rows_of
from trainer.errors import ArgumentError, ArgumentTypeError, BatchError
from trainer.sharding.arrays import to_global
from trainer.sharding.partition import BATCH_AXES, batch_sharding, create_sharded, multiples_near, partition
from trainer.state import TrainState
from trainer.types import Batch, ExtensionLike


class DefaultDevice:
    """JAX's default device. Whatever a compiled step takes as it is stays where it is.

    Attributes:
        processes: How many processes train together.
        one_at_a_time: Whether a call has to be finished before the next one is dispatched.
        is_primary_process: Whether this process is the one that writes logs.
        replicated: The sharding of what every device holds, None where there is but one.
    """

    processes = 1
    one_at_a_time = False
    is_primary_process = True
    replicated: NamedSharding | None = None

    def __init__(self) -> None:
        self._numbers: dict[int, jax.Array] = {}

    def create(
        self,
        model: Any,
        optimizer: optax.GradientTransformation,
        rng: jax.Array,
        wrt: nnx.filterlib.Filter,
        extensions: Mapping[str, ExtensionLike],
    ) -> TrainState:
        """Makes the state."""
        return TrainState.create(model, optimizer, rng=rng, wrt=wrt, extensions=extensions)

    def adopt(self, state: TrainState) -> TrainState:
        """Returns a state of somebody else's as it has to lie here."""
        return state

    def check_batch_size(self, batch_size: int) -> None:
        """Refuses a size of full batches that the devices cannot share."""

    def own(self, batch: Any, *, may_be_short: bool = True, at_once: bool = False) -> tuple[Batch, int]:
        """Checks this process's part of a batch, and sends it on its way to the devices.

        Args:
            batch: The part, or a batch that lies where it has to already.
            may_be_short: Whether it may be a last batch, which the devices need not be able to share.
            at_once: Whether a compiled step takes it now, which may hand it over faster itself.

        Returns:
            The batch of all processes, and the number of examples in it.

        Raises:
            BatchError: It is no batch, or the devices cannot share it.
        """
        del may_be_short
        batch, examples = checked_batch(batch)
        return batch if at_once else jax.device_put(batch), examples

    def specification(self, batch: Any) -> tuple[Any, int]:
        """Returns shapes and dtypes of what `own` would return, of a batch of which only these matter."""
        return checked_batch(batch)

    def draw(self, data: EpochOfData, *, at_once: bool = False) -> tuple[Batch, int] | None:
        """Returns the next batch of data in memory and its examples, None at the end; arguments as for `own`."""
        batch = next(data, None)
        return None if batch is None else (batch if at_once else jax.device_put(batch), data.drawn)

    def draw_several(self, data: EpochOfData, count: int, room: int) -> Batch:
        """Returns the next ``count`` full batches, in arrays of shape ``(room, batch_size, ...)``."""
        batches: Batch = jax.device_put(data.stacked(count, room))
        return batches

    def specification_in(self, data: EpochOfData) -> Any:
        """Returns shapes and dtypes of a full batch that `draw` would return."""
        return data.specification()

    def number(self, value: int) -> jax.Array:
        """Returns an integer as an array on every device, the same one every time."""
        if value not in self._numbers:
            array = jax.device_put(np.int32(value))
            self._numbers[value] = array if self.replicated is None else to_global(array, self.replicated)
        return self._numbers[value]

    def take(
        self, batches: Iterator[Batch], *, may_be_short: bool = True, at_once: bool = False
    ) -> tuple[Batch, int] | None:
        """Returns the next batch of either kind and its examples, None at the end; arguments as for `own`."""
        if isinstance(batches, EpochOfData):
            return self.draw(batches, at_once=at_once)
        batch = next(batches, None)
        return None if batch is None else self.own(batch, may_be_short=may_be_short, at_once=at_once)


class OverMesh(DefaultDevice):
    """The devices of a mesh, see `trainer.sharding`.

    The first dimension of a batch is split over the axes ``data`` and ``fsdp``. A short batch that they
    cannot share is split over those of them that can, or lies whole on every device: what is computed is
    the same.

    Args:
        mesh: The mesh.
        rules: How the state is split, as for `trainer.partition`.

    Raises:
        ArgumentTypeError, ArgumentError: No trainer can use the mesh.
    """

    def __init__(self, mesh: Mesh, rules: Mapping[str, PartitionSpec] | None) -> None:
        super().__init__()
        _check_mesh(mesh)
        self.mesh, self._rules = mesh, rules
        self._axes = tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)
        self._shards = _parts(mesh, self._axes)
        self.processes = jax.process_count()
        self.is_primary_process = jax.process_index() == 0
        self.replicated = NamedSharding(mesh, PartitionSpec())
        local = [device for device in mesh.devices.flat if device.process_index == jax.process_index()]
        # On a CPU, where one process has several devices, collectives of two calls wait for each other.
        self.one_at_a_time = local[0].platform == "cpu" and len(local) > 1
        whole = self._sharding(self._shards).addressable_devices_indices_map((self._shards,))
        self._own_shards = len({where[0].start for where in whole.values() if where is not None})

    def create(
        self,
        model: Any,
        optimizer: optax.GradientTransformation,
        rng: jax.Array,
        wrt: nnx.filterlib.Filter,
        extensions: Mapping[str, ExtensionLike],
    ) -> TrainState:
        if callable(model) and not isinstance(model, nnx.Module):
            return create_sharded(
                model, optimizer, rng=rng, mesh=self.mesh, rules=self._rules, wrt=wrt, extensions=extensions
            )
        return self.adopt(super().create(model, optimizer, rng, wrt, extensions))

    def adopt(self, state: TrainState) -> TrainState:
        if all(self._lies_here(leaf) for leaf in jax.tree.leaves(state)):
            return state
        state.check_alive()

        def place(leaf: Any, sharding: NamedSharding) -> Any:
            return leaf if self._lies_here(leaf) else to_global(leaf, sharding)

        adopted: TrainState = jax.tree.map(place, state, partition(state, self.mesh, self._rules))
        return adopted

    def check_batch_size(self, batch_size: int) -> None:
        if batch_size % self._shards:
            nearest = " or ".join(map(str, multiples_near(batch_size, self._shards)))
            raise ArgumentError(
                f"`batch_size` is {batch_size}, which cannot be shared by the {self._shards} devices of "
                f"{self._named_axes()}; the nearest that can is {nearest}."
            )

    def own(self, batch: Any, *, may_be_short: bool = True, at_once: bool = False) -> tuple[Batch, int]:
        del at_once
        batch, own = checked_batch(batch)
        if all(map(self._lies_here, jax.tree.leaves(batch))):
            return batch, own
        examples = self._examples_of_all(batch, own, may_be_short)
        sharding = self._sharding(examples)
        if sharding.is_fully_addressable:
            placed: Batch = jax.device_put(batch, sharding)
            return placed, examples
        return jax.tree.map(
            lambda leaf: jax.make_array_from_process_local_data(
                sharding, np.asarray(leaf), (examples, *leaf.shape[1:])
            ),
            batch,
        ), examples

    def specification(self, batch: Any) -> tuple[Any, int]:
        batch, own = checked_batch(batch)
        examples = self._examples_of_all(batch, own, may_be_short=False)
        return self._specified(batch, examples), examples

    def draw(self, data: EpochOfData, *, at_once: bool = False) -> tuple[Batch, int] | None:
        del at_once
        index = data.next_examples()
        if index is None:
            return None
        return data.gathered(functools.partial(self._gather, index, self._sharding(len(index)))), len(index)

    def draw_several(self, data: EpochOfData, count: int, room: int) -> Batch:
        index = data.next_several(count, room)
        sharding = NamedSharding(self.mesh, PartitionSpec(None, *self._sharding(data.batch_size).spec))
        return data.gathered(functools.partial(self._gather, index, sharding))

    def specification_in(self, data: EpochOfData) -> Any:
        return self._specified(data.specification(), data.batch_size)

    def _lies_here(self, leaf: Any) -> bool:
        sharding = getattr(leaf, "sharding", None)
        return isinstance(sharding, NamedSharding) and sharding.mesh == self.mesh

    def _examples_of_all(self, batch: Any, own: int, may_be_short: bool) -> int:
        """Returns how many examples all processes have, where this one has so many of its own."""
        alone = self._own_shards == self._shards
        if own % self._own_shards and not (may_be_short and alone):
            parts = f"the {self._own_shards} devices of {self._named_axes()}" + " in this process" * (not alone)
            raise BatchError(
                f"`batch` has {own} examples ({describe(batch)}), which cannot be shared by {parts}; make it a "
                f"multiple of {self._own_shards}"
                + (", or use data in memory, of which a short last batch is taken as well." if not alone else ".")
            )
        return own if alone else own // self._own_shards * self._shards

    def _sharding(self, examples: int) -> NamedSharding:
        shared: tuple[str, ...] = ()
        for axis in self._axes:
            if examples % _parts(self.mesh, (*shared, axis)) == 0:
                shared = (*shared, axis)
        return batch_sharding(self.mesh, shared)

    def _specified(self, batch: Any, examples: int) -> Any:
        sharding = self._sharding(examples)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(
                (examples, *leaf.shape[1:]), jax.dtypes.canonicalize_dtype(leaf.dtype), sharding=sharding
            ),
            batch,
        )

    def _gather(self, index: np.ndarray[Any, Any], sharding: NamedSharding, column: Any) -> jax.Array:
        """Returns the rows of a column that ``index`` names, of which each device has its part."""

        @functools.cache
        def rows(*bounds: tuple[int | None, int | None]) -> Any:
            part = index[tuple(slice(*bound) for bound in bounds[: index.ndim])]
            found = rows_of(column, part.ravel())
            return found.reshape(*part.shape, *column.shape[1:])

        # Several devices may want the same rows.
        shape = (*index.shape, *column.shape[1:])
        return jax.make_array_from_callback(
            shape, sharding, lambda where: rows(*((one.start, one.stop) for one in where or ()))
        )

    def _named_axes(self) -> str:
        return " and ".join(f"`{axis}`" for axis in self._axes) or "the mesh"


class OverOneDevice(OverMesh):
    """A mesh of one device: only the state has to be put there, and a batch follows it as fast as without a mesh."""

    own = DefaultDevice.own
    specification = DefaultDevice.specification
    draw = DefaultDevice.draw
    draw_several = DefaultDevice.draw_several
    specification_in = DefaultDevice.specification_in


def devices_of(mesh: Mesh | None, rules: Mapping[str, PartitionSpec] | None) -> DefaultDevice:
    """Returns where a trainer computes.

    Raises:
        ArgumentTypeError, ArgumentError: The arguments cannot be used.
    """
    if mesh is not None:
        return OverOneDevice(mesh, rules) if getattr(mesh, "size", 0) == 1 else OverMesh(mesh, rules)
    if rules is not None:
        raise ArgumentError("`partition_rules` were given without a `mesh`; pass one, see trainer.make_mesh.")
    if jax.process_count() > 1:
        warnings.warn(
            f"there are {jax.process_count()} processes and no `mesh`: each trains a model of its own, and they may "
            f"write to the same files. trainer.make_mesh makes a mesh over all devices.",
            stacklevel=3,
        )
    return DefaultDevice()


def _check_mesh(mesh: Any) -> None:
    if not isinstance(mesh, Mesh):
        raise ArgumentTypeError(
            f"`mesh` is of type {type(mesh).__name__}; it must be a jax.sharding.Mesh, such as "
            f"trainer.make_mesh({{'data': -1}})."
        )
    if any(kind != AxisType.Auto for kind in mesh.axis_types):
        raise ArgumentError(
            f"`mesh` has the axis types {mesh.axis_types}; the compiler partitions over axes of type Auto only, such "
            f"as those of trainer.make_mesh."
        )
    absent = set(range(jax.process_count())) - {device.process_index for device in mesh.devices.flat}
    if absent:
        raise ArgumentError(
            f"`mesh` has no device of the processes {', '.join(map(str, sorted(absent)))}; every process needs one to "
            f"take part."
        )


def _parts(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
