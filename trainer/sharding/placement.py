"""Places a trainer's state and batches: on JAX's default device, or over a mesh.

Batches reach the devices in two ways. A batch from a caller or a loader is this process's own
part of the global batch (all of it, in a single process). A batch of in-memory data is known to every process
by its indices, and each process gathers only the rows that its devices hold.
"""

import functools
import math
from collections.abc import Iterator, Mapping
from typing import Any, Protocol, final

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from trainer.batches import checked_batch, summarize
from trainer.data.host_arrays import private_copy
from trainer.data.memory import Epoch, dtype_in_jax
from trainer.errors import ArgumentError, ArgumentTypeError, BatchError, warn
from trainer.sharding.arrays import gather_rows, to_global
from trainer.sharding.create import create_sharded
from trainer.sharding.mesh import BATCH_AXES, batch_sharding, multiples_near, shares_threads, with_auto_axes
from trainer.sharding.partition import partition
from trainer.sharding.single_device import SingleDevice, cached_ints, number_of_examples
from trainer.state import TrainState
from trainer.types import Batch

_END = object()


class Placement(Protocol):
    """Places the state and the batches on devices. `placement_of` makes one.

    Attributes:
        num_processes: The number of processes that train together.
        one_call_at_a_time: Whether a compiled call must finish before the next is dispatched.
        is_primary_process: Whether this process writes the logs.
        replicated: The sharding of a replicated array; None on a single device.
    """

    @property
    def num_processes(self) -> int: ...
    @property
    def one_call_at_a_time(self) -> bool: ...
    @property
    def is_primary_process(self) -> bool: ...
    @property
    def replicated(self) -> NamedSharding | None: ...

    def create(
        self,
        model: Any,
        optimizer: optax.GradientTransformation,
        rng: jax.Array,
        held: Mapping[str, Any],
    ) -> TrainState:
        """Creates the state on its devices; ``held`` are more arguments of `TrainState.create`.

        Over a mesh, ``model`` may also be a callable from ``nnx.Rngs`` to the model; the state is then initialized
        sharded, see `create_sharded`.
        """

    def adopt(self, state: TrainState) -> TrainState:
        """Returns the state with every leaf placed here; leaves already placed stay as they are."""

    def check_batch_size(self, batch_size: int) -> None:
        """Checks that full batches of this size can be split over the devices.

        Raises:
            ArgumentError: They cannot.
        """

    def own_examples(self, examples: int) -> int:
        """Returns how many examples of a global batch of this size come from this process."""

    def check_context(self) -> None:
        """Checks that arrays on these devices can be used where this is called.

        Raises:
            ArgumentError: `jax.set_mesh` has set a mesh that the arrays are not on.
        """

    def place_batch(
        self, batch: Any, *, may_be_short: bool = True, at_once: bool = False, is_private: bool = False
    ) -> tuple[Batch, int]:
        """Checks this process's part of a batch and starts its transfer to the devices.

        Args:
            batch: The part, or a global batch that is already placed.
            may_be_short: Whether it may be a short last batch, which may not split evenly over the devices.
            at_once: Whether a compiled step takes the batch immediately. On a single device the step then does the
                transfer, which is faster than a separate ``jax.device_put``.
            is_private: Whether the arrays will not be written to again. Otherwise they are copied, since a loader may
                reuse its buffers before a step has read them.

        Returns:
            The global batch, and its number of examples; 1 if its arrays have no common leading dimension.

        Raises:
            BatchError: It is not a batch, or cannot be split over the devices.
        """

    def abstract_batch(self, batch: Any) -> tuple[Any, int]:
        """Returns the shapes, dtypes (over a mesh also shardings) and number of examples of `place_batch`'s result.

        Args:
            batch: As for `place_batch`, of arrays or `jax.ShapeDtypeStruct`; the values are not read.

        Raises:
            BatchError: As for `place_batch` with ``may_be_short=False``.
        """

    def next_batch(self, epoch: Epoch, *, at_once: bool = False) -> tuple[Batch, int] | None:
        """Returns the next in-memory batch, placed, and its number of examples; None at the end of the epoch.

        Args:
            epoch: The data. Every process draws the same batches from it.
            at_once: As for `place_batch`.
        """

    def next_batches(self, epoch: Epoch, count: int, capacity: int) -> Batch:
        """Returns the next ``count`` full batches, placed, in arrays of shape ``(capacity, batch_size, ...)``.

        Rows from ``count`` on are padding with unspecified values.
        """

    def abstract_batch_of(self, epoch: Epoch) -> Any:
        """Returns the shapes and dtypes (over a mesh also shardings) of a full batch from `next_batch`."""

    def replicated_int(self, value: int) -> jax.Array:
        """Returns an int32 scalar that every device holds."""


@final
class OverMesh:
    """The devices of a mesh, see `trainer.sharding`.

    The mesh axes ``data`` and ``fsdp`` split the first dimension of a batch. A short batch that they do not divide
    is split over the axes that do divide it, or replicated; the result is the same.

    A one-device mesh needs no sharded batches. `SingleDevice` places them there, at no extra cost per batch
    compared with training without a mesh.

    Args:
        mesh: The mesh.
        rules: How the state is split, as for `trainer.partition`.

    Raises:
        ArgumentTypeError, ArgumentError: The mesh or the rules are invalid.
    """

    def __init__(self, mesh: Mesh, rules: Mapping[str, PartitionSpec] | None) -> None:
        _check_mesh(mesh)
        self.check_context()
        self.mesh, self._rules = mesh, rules = with_auto_axes(mesh), rules
        self._single = SingleDevice() if mesh.size == 1 else None
        self._axes = tuple(axis for axis in BATCH_AXES if axis in mesh.axis_names)
        self._shards = _parts(mesh, self._axes)
        self.num_processes = jax.process_count()
        self.is_primary_process = jax.process_index() == 0
        self.replicated = NamedSharding(mesh, PartitionSpec())
        self._ints = cached_ints(self.replicated)
        self.one_call_at_a_time = shares_threads(mesh)
        shards = self._batch_sharding(self._shards).addressable_devices_indices_map((self._shards,))
        self._own_shards = len({index[0].start for index in shards.values() if index is not None})
        self._is_first_state, self._is_idle = True, False

    def create(
        self,
        model: Any,
        optimizer: optax.GradientTransformation,
        rng: jax.Array,
        held: Mapping[str, Any],
    ) -> TrainState:
        if callable(model) and not isinstance(model, nnx.Module):
            return self.adopt(create_sharded(model, optimizer, rng=rng, mesh=self.mesh, rules=self._rules, **held))
        return self.adopt(TrainState.create(model, optimizer, rng=rng, **held))

    def adopt(self, state: TrainState) -> TrainState:
        if not all(map(self._is_placed, jax.tree.leaves(state))):
            state = self._placed(state)
        if self._is_first_state:
            self._is_first_state = False
            leaves = jax.tree.leaves(state)
            is_split = self._axes or not all(leaf.sharding.is_fully_replicated for leaf in leaves)
            self._is_idle = self.mesh.size > 1 and not is_split
        return state

    def check_batch_size(self, batch_size: int) -> None:
        if batch_size % self._shards:
            nearest = " or ".join(map(str, multiples_near(batch_size, self._shards)))
            raise ArgumentError(
                f"`batch_size` is {batch_size}, which cannot be shared by the {self._shards} devices of "
                f"{self._named_axes()}; the nearest that can is {nearest}."
            )

    def own_examples(self, examples: int) -> int:
        return examples * self._own_shards // self._shards

    def check_context(self) -> None:
        if AxisType.Explicit in jax.sharding.get_abstract_mesh().axis_types:
            raise ArgumentError(
                "jax.set_mesh has set a mesh with axes of type Explicit, and a trainer's arrays are on axes of type "
                "Auto; make the trainer, and call it, outside of it, or set a mesh of trainer.make_mesh."
            )

    def place_batch(
        self, batch: Any, *, may_be_short: bool = True, at_once: bool = False, is_private: bool = False
    ) -> tuple[Batch, int]:
        if at_once:
            self.check_context()
        if self._single is not None:
            batch, examples = self._single.place_batch(
                batch, may_be_short=may_be_short, at_once=at_once, is_private=is_private
            )
            return self._moved(batch), examples
        batch, length = checked_batch(batch)
        if all(map(self._is_placed, jax.tree.leaves(batch))):
            return batch, number_of_examples(length)
        self._warn_if_idle()
        examples, shardings = self._shares(batch, length, may_be_short)
        batch = batch if is_private else private_copy(batch)
        if self.num_processes == 1:
            placed: Batch = jax.device_put(batch, shardings)
            return placed, examples
        return jax.tree.map(
            lambda leaf, sharding: jax.make_array_from_process_local_data(
                sharding, np.asarray(leaf), (examples, *leaf.shape[1:]) if np.ndim(leaf) else ()
            ),
            batch,
            jax.tree.broadcast(shardings, batch),
        ), examples

    def abstract_batch(self, batch: Any) -> tuple[Any, int]:
        self.check_context()
        if self._single is not None:
            batch, examples = self._single.abstract_batch(batch)
            return self._moved(batch), examples
        batch, length = checked_batch(batch)
        examples, shardings = self._shares(batch, length, may_be_short=False)

        def abstract(leaf: Any, sharding: NamedSharding) -> Any:
            if not hasattr(leaf, "dtype"):  # a Python number
                return leaf
            shape = leaf.shape if length is None or not leaf.shape else (examples, *leaf.shape[1:])
            return jax.ShapeDtypeStruct(shape, dtype_in_jax(leaf), sharding=sharding)

        return jax.tree.map(abstract, batch, jax.tree.broadcast(shardings, batch)), examples

    def next_batch(self, epoch: Epoch, *, at_once: bool = False) -> tuple[Batch, int] | None:
        if self._single is not None:
            return self._single.next_batch(epoch, at_once=at_once)
        index = epoch.next_indices()
        if index is None:
            return None
        self._warn_if_idle()
        return epoch.gathered(functools.partial(gather_rows, index, self._batch_sharding(len(index)))), epoch.drawn

    def next_batches(self, epoch: Epoch, count: int, capacity: int) -> Batch:
        if self._single is not None:
            return self._single.next_batches(epoch, count, capacity)
        self._warn_if_idle()
        index = epoch.next_several(count, capacity)
        sharding = NamedSharding(self.mesh, PartitionSpec(None, *self._batch_sharding(epoch.batch_size).spec))
        return epoch.gathered(functools.partial(gather_rows, index, sharding))

    def abstract_batch_of(self, epoch: Epoch) -> Any:
        if self._single is not None:
            return self._single.abstract_batch_of(epoch)
        sharding = self._batch_sharding(epoch.batch_size)
        return jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), epoch.specification()
        )

    def replicated_int(self, value: int) -> jax.Array:
        return self._ints(value)

    def _placed(self, state: TrainState) -> TrainState:
        state.check_alive()

        def place(leaf: Any, sharding: NamedSharding) -> Any:
            return leaf if self._is_placed(leaf) else to_global(leaf, sharding)

        adopted: TrainState = jax.tree.map(place, state, partition(state, self.mesh, self._rules))
        return adopted

    def _moved(self, batch: Batch) -> Batch:
        """Returns a batch for the only device, without arrays that are committed to others or are on another mesh."""
        if not any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(batch)):
            return batch

        def moved(leaf: Any) -> Any:
            if not isinstance(leaf, jax.Array) or not leaf.committed or self._is_placed(leaf):
                return leaf
            is_here = isinstance(leaf.sharding, SingleDeviceSharding) and leaf.devices() == self.replicated.device_set
            return leaf if is_here else jax.device_put(leaf, self.replicated)

        return jax.tree.map(moved, batch)

    def _warn_if_idle(self) -> None:
        """Warns once if the mesh splits neither the state nor a batch that is placed here."""
        if self._is_idle:
            self._is_idle = False
            warn(
                f"`mesh` has the axes {', '.join(map(repr, self.mesh.axis_names))}, and nothing is split over them: "
                f"every device holds the whole state and gets every batch whole. An axis that is to split the batch "
                f"must be named 'data' or 'fsdp', as in make_mesh({{'data': -1}}); or pass batches that are split "
                f"already."
            )

    def _is_placed(self, leaf: Any) -> bool:
        sharding = getattr(leaf, "sharding", None)
        return isinstance(sharding, NamedSharding) and sharding.mesh == self.mesh

    def _shares(self, batch: Any, length: int | None, may_be_short: bool) -> tuple[int, Any]:
        """Returns the number of examples in the global batch, and one sharding for all leaves, or a tree of them.

        Args:
            batch: This process's part of the batch.
            length: Its length, None if its arrays have no common one: each is then split if possible.
            may_be_short: As for `place_batch`.
        """
        if length is None and self.num_processes > 1:
            raise BatchError(
                f"`batch` has no common leading dimension ({summarize(batch)}), so it cannot be put together from the "
                f"parts of several processes; pad its arrays to one length."
            )
        examples = 1 if length is None else self._global_examples(batch, length, may_be_short)
        if length is not None and all(map(np.ndim, jax.tree.leaves(batch))):
            return examples, self._batch_sharding(examples)

        def sharding_of(leaf: Any) -> NamedSharding:
            if not np.ndim(leaf):
                return self.replicated
            return self._batch_sharding(leaf.shape[0] if length is None else examples)

        return examples, jax.tree.map(sharding_of, batch)

    def _global_examples(self, batch: Any, own: int, may_be_short: bool) -> int:
        """Returns the number of examples in the global batch, given that of this process's part."""
        alone = self._own_shards == self._shards
        if own % self._own_shards and not (may_be_short and alone):
            parts = f"the {self._own_shards} devices of {self._named_axes()}" + " in this process" * (not alone)
            raise BatchError(
                f"`batch` has {own} examples ({summarize(batch)}), which cannot be shared by {parts}; make it a "
                f"multiple of {self._own_shards}"
                + (", or use data in memory, where a short last batch is allowed." if not alone else ".")
            )
        return own if alone else own // self._own_shards * self._shards

    def _batch_sharding(self, examples: int) -> NamedSharding:
        """Splits over each batch axis that, combined with the axes before it, divides the examples."""
        axes: tuple[str, ...] = ()
        for axis in self._axes:
            if examples % _parts(self.mesh, (*axes, axis)) == 0:
                axes = (*axes, axis)
        return batch_sharding(self.mesh, axes)

    def _named_axes(self) -> str:
        return " and ".join(f"`{axis}`" for axis in self._axes) or "the mesh"


def placement_of(mesh: Mesh | None, rules: Mapping[str, PartitionSpec] | None) -> Placement:
    """Returns the placement over a mesh, or on JAX's default device if there is no mesh.

    Raises:
        ArgumentTypeError, ArgumentError: The arguments are invalid.
    """
    if mesh is not None:
        return OverMesh(mesh, rules)
    if rules is not None:
        raise ArgumentError("`partition_rules` were given without a `mesh`; pass one, see trainer.make_mesh.")
    if jax.process_count() > 1:
        warn(
            f"there are {jax.process_count()} processes and no `mesh`: each trains a model of its own, and they may "
            f"write to the same files. trainer.make_mesh makes a mesh over all devices."
        )
    return SingleDevice()


def next_batch_from(
    placement: Placement, batches: Iterator[Batch], *, may_be_short: bool = True, at_once: bool = False
) -> tuple[Batch, int] | None:
    """Returns the next batch of in-memory data or a loader, placed, and its number of examples; None at the end.

    Args:
        placement: Where to place it.
        batches: An `Epoch`, or an iterator over this process's parts of the batches.
        may_be_short: As for `Placement.place_batch`.
        at_once: As for `Placement.place_batch`.

    Raises:
        BatchError: As for `Placement.place_batch`; None is not a batch.
    """
    if isinstance(batches, Epoch):
        return placement.next_batch(batches, at_once=at_once)
    batch = next(batches, _END)
    return None if batch is _END else placement.place_batch(batch, may_be_short=may_be_short, at_once=at_once)


def _check_mesh(mesh: Any) -> None:
    if not isinstance(mesh, Mesh):
        raise ArgumentTypeError(
            f"`mesh` is of type {type(mesh).__name__}; it must be a jax.sharding.Mesh, such as "
            f"trainer.make_mesh({{'data': -1}})."
        )
    absent = set(range(jax.process_count())) - {device.process_index for device in mesh.devices.flat}
    if absent:
        raise ArgumentError(
            f"`mesh` has no device of the processes {', '.join(map(str, sorted(absent)))}; every process needs one to "
            f"take part."
        )


def _parts(mesh: Mesh, axes: tuple[str, ...]) -> int:
    return math.prod(mesh.shape[axis] for axis in axes)
