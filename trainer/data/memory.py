"""Batches from in-memory arrays, in an order determined by a seed and an epoch; held by datarax if installed."""

import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Literal, Self

import jax
import jax.numpy as jnp
import numpy as np

from trainer.batches import checked_data, describe
from trainer.core.checks import check_count
from trainer.data.host_arrays import aligned_empty
from trainer.data.padding import MASK, check_maskable, check_pad_to
from trainer.types import Batch

_ROWS_OF_FINGERPRINT = 64
_ROWS_AT_ONCE = 4096


class InMemoryData:
    """Batches of in-memory arrays, held by a ``datarax.MemorySource`` if datarax is installed.

    Each epoch draws one permutation (Fisher-Yates by NumPy's PCG64, seeded with the seed and the epoch), so
    every example comes exactly once, the last batch may be short, and any batch of any epoch can be found
    without drawing the ones before.

    Args:
        data: A pytree of arrays, each of shape ``(num_examples, ...)``: a dict, a tuple ``(x, y)``, a registered
            dataclass, or one array. Nothing is copied. A batch has the same structure.
        batch_size: The number of examples in a batch.
        name: The name of the data in errors.
        pad_to: "batch" pads the last batch to ``batch_size`` rows by repeating an example, and adds an entry
            ``mask`` to every batch, which is 0 for padding; see `trainer.pad_batch`.
        mask: Whether padded batches get that entry; predictions need none.
        limit: The maximum number of batches in a pass, None for all. The limit applies after shuffling, so each
            epoch draws different examples.

    Raises:
        BatchError: A leaf of ``data`` is not a numeric array, leading dimensions differ, or there are no examples;
            or a mask cannot be added.
        ArgumentError: ``batch_size`` is not a positive integer, or ``pad_to`` is invalid.
    """

    def __init__(
        self,
        data: Any,
        batch_size: int,
        name: str = "data",
        *,
        pad_to: Literal["batch"] | None = None,
        mask: bool = True,
        limit: int | None = None,
    ) -> None:
        check_pad_to(pad_to)
        if pad_to is not None and mask:
            check_maskable(data, name)
        data, self.num_examples = checked_data(data, name)
        self.batch_size = check_count(batch_size, "batch_size")
        self.pad_to, self.has_mask = pad_to, pad_to is not None and mask
        leaves, self._structure = jax.tree.flatten(data)
        self._columns = [_on_host(leaf) for leaf in leaves]
        self.limit = limit
        self._source: Future[Any] | None = None

    def __len__(self) -> int:
        """Returns the number of batches in an epoch, including a short last one."""
        count = -(-self.num_examples // self.batch_size)
        return count if self.limit is None else min(count, self.limit)

    @property
    def examples_per_epoch(self) -> int:
        """The number of examples in an epoch: all, unless ``limit`` cuts it short."""
        return min(self.num_examples, len(self) * self.batch_size)

    def head(self, batches: int) -> "InMemoryData":
        """Returns the examples of the first batches, in their original order, without copying."""
        columns, structure = self.columns()
        rows = [column[: batches * self.batch_size] for column in columns]
        data = jax.tree.unflatten(structure, rows)
        return type(self)(data, self.batch_size, pad_to=self.pad_to, mask=self.has_mask)

    def in_order(self) -> "Epoch":
        """Returns a pass over every example once, in the original order."""
        return Epoch(self, None, 0)

    def shuffled(self, seed: tuple[int, ...], epoch: int, skip: int = 0) -> "Epoch":
        """Returns a pass over every example once, in an order that is a pure function of the seed and the epoch.

        Args:
            seed: The key data to draw from.
            epoch: The epoch number.
            skip: The number of batches to skip at the start.
        """
        return Epoch(self, order_of(seed, epoch, self.num_examples), skip)

    def fingerprint(self, most_bytes: int = 0) -> str:
        """Returns a line that identifies the data: shapes, dtypes, and a hash of rows spread over all of it.

        Args:
            most_bytes: How many bytes to hash, if that is more than 64 rows; all rows if they are smaller.
        """
        columns = [
            jax.random.key_data(column) if jnp.issubdtype(column.dtype, jax.dtypes.prng_key) else column
            for column in self.columns()[0]
        ]
        bytes_of_row = max(1, sum(column.nbytes for column in columns) // self.num_examples)
        count = min(self.num_examples, max(_ROWS_OF_FINGERPRINT, most_bytes // bytes_of_row))
        rows = np.linspace(0, self.num_examples - 1, count).astype(np.intp)
        content = hashlib.sha256(repr([(column.shape, str(column.dtype)) for column in columns]).encode())
        for start in range(0, count, _ROWS_AT_ONCE):
            for column in columns:
                content.update(np.ascontiguousarray(column[rows[start : start + _ROWS_AT_ONCE]]).tobytes())
        shapes = describe(_specification(*self.columns(), self.batch_size))
        return f"{shapes} of {self.num_examples} with hash {content.hexdigest()[:16]}"

    def columns(self) -> tuple[list[Any], Any]:
        """Returns the arrays, and the tree structure of a batch."""
        source = None if self._source is None else self._source.result()  # None in the first pass, see `make_source`
        if source is None or isinstance(source, ImportError):
            return self._columns, self._structure
        return [source.data[str(i)] for i in range(len(source.data))], self._structure

    @property
    def source(self) -> Any:
        """The ``datarax.MemorySource`` of the arrays, under their indices in the tree. Waits for its import.

        Without datarax, batches are the same, gathered from the arrays directly.

        Raises:
            ImportError: datarax is not installed, or cannot be imported.
        """
        self.make_source()
        assert self._source is not None
        source = self._source.result()
        if isinstance(source, ImportError):
            raise ImportError(
                f"`source` is a datarax.MemorySource, and datarax cannot be imported ({source}); run "
                "`pip install 'nnx-trainer[datarax]'`, and on Python 3.11 then `pip install --no-deps datarax==0.1.4`. "
                "Training does not need it."
            ) from source
        return source

    def make_source(self) -> None:
        """Starts making the source in a thread, unless that has been done.

        Importing datarax loads Grain and Orbax: a quarter of the time to the first step when compilations are cached.
        So the first pass starts it after its first batch, while the device is busy; a pass of a single batch leaves
        it to the next pass.
        """
        if self._source is None:
            maker = ThreadPoolExecutor(1, thread_name_prefix="datarax")
            self._source = maker.submit(_memory_source, self._columns)
            maker.shutdown(wait=False)

    def finish_import(self) -> None:
        """Waits for the thread that makes the source, if there is one.

        Call it before raising KeyboardInterrupt: if another thread runs code (an import) during interpreter
        shutdown, the process exits with status 1 instead of SIGINT's.
        """
        if self._source is not None:
            wait([self._source])


def order_of(seed: tuple[int, ...], epoch: int, count: int) -> np.ndarray[Any, Any]:
    """Returns the order of ``count`` examples in an epoch, of shape ``(count,)``; see `InMemoryData.shuffled`."""
    return np.random.default_rng([*seed, epoch]).permutation(count)


class Epoch(Iterator[Batch]):
    """One pass over in-memory data: an iterator of batches that can also return several at once, stacked.

    Padding rows have the index ``num_examples``. In the arrays it selects the last example; in the mask, which has
    one more entry, it selects a zero. With padding, all batches are full.

    Attributes:
        batch_size: The number of rows in a full batch.
        full_batches_in_epoch: The number of full batches in the whole pass.
        drawn: The number of examples in the latest batch.
    """

    def __init__(self, data: InMemoryData, order: np.ndarray[Any, Any] | None, skip: int) -> None:
        self._data, (self._columns, self._structure) = data, data.columns()
        self._num_examples, self.batch_size = data.examples_per_epoch, data.batch_size
        self._num_rows = self._num_examples if data.pad_to is None else len(data) * data.batch_size
        order = order if order is None else order[: self._num_examples]
        padding = self._num_rows - self._num_examples
        if padding:
            order = np.arange(self._num_examples) if order is None else order
            order = np.concatenate([order, np.full(padding, data.num_examples, order.dtype)])
        if data.has_mask:
            self._columns, self._structure = _with_mask_column(self._columns, self._structure, data.num_examples)
        self._order = order
        self._start = self._position = skip * data.batch_size
        self.full_batches_in_epoch = self._num_rows // data.batch_size
        self.drawn = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        index = self._next()
        if index is None:
            raise StopIteration
        if isinstance(index, slice):
            return self._batch([column[index] for column in self._columns])
        return self.gathered(lambda column: rows_of(column, index))

    def next_indices(self) -> np.ndarray[Any, Any] | None:
        """Draws the next batch and returns the indices of its examples, or None at the end."""
        index = self._next()
        return np.arange(index.start, index.stop) if isinstance(index, slice) else index

    def next_several(self, count: int, capacity: int) -> np.ndarray[Any, Any]:
        """Draws ``count`` full batches and returns their indices, ``(capacity, batch_size)``, padded with zeros."""
        indices = np.zeros((capacity, self.batch_size), np.intp)
        indices[:count] = self._several(count).reshape(count, self.batch_size)
        return indices

    def gathered(self, gather: Callable[[Any], Any]) -> Batch:
        """Returns the batch whose leaves are ``gather(column)`` for each column."""
        return self._batch([gather(column) for column in self._columns])

    @property
    def full_batches(self) -> int:
        """The number of full batches left."""
        return max(0, self._num_rows - self._position) // self.batch_size

    def specification(self) -> Any:
        """Returns the shapes and JAX dtypes of a full batch."""
        return _specification(self._columns, self._structure, self.batch_size)

    def stacked(self, count: int, capacity: int) -> Batch:
        """Returns the next ``count`` full batches, in arrays of shape ``(capacity, batch_size, ...)``.

        Rows from ``count`` on are padding with unspecified values.
        """
        order = self._several(count)
        size, shape = capacity * self.batch_size, (capacity, self.batch_size)
        return self._batch(
            [rows_of(column, order, size).reshape(*shape, *column.shape[1:]) for column in self._columns]
        )

    def _next(self) -> slice | np.ndarray[Any, Any] | None:
        if self._start < self._position < self._num_examples:
            self._data.make_source()
        start, end = self._position, min(self._position + self.batch_size, self._num_rows)
        if start >= end:
            return None
        self._position, self.drawn = end, min(end, self._num_examples) - start
        return slice(start, end) if self._order is None else self._order[start:end]

    def _several(self, count: int) -> np.ndarray[Any, Any]:
        if self._start < self._position < self._num_examples:
            self._data.make_source()
        start, end = self._position, self._position + count * self.batch_size
        self._position = end
        return np.arange(start, end) if self._order is None else self._order[start:end]

    def _batch(self, leaves: list[Any]) -> Batch:
        batch: Batch = jax.tree.unflatten(self._structure, leaves)
        return batch


def rows_of(column: Any, index: np.ndarray[Any, Any], size: int | None = None) -> Any:
    """Returns the rows of a column at ``index``, padded to ``size`` rows with unspecified values.

    An index past the last row selects the last row.
    """
    size = len(index) if size is None else size
    if not isinstance(column, np.ndarray):
        return _rows_on_device(column, np.resize(index, size))
    rows = aligned_empty((size, *column.shape[1:]), column.dtype)
    # Clipping maps the padding index to the last row, and lets NumPy write into `out` without a buffer.
    np.take(column, index, axis=0, out=rows[: len(index)], mode="clip")
    return rows


@jax.jit
def _rows_on_device(column: jax.Array, index: jax.Array) -> jax.Array:
    # Indexing a device array from Python takes fifteen times as long.
    return column.at[index].get(mode="clip")


def _specification(columns: list[Any], structure: Any, batch_size: int) -> Any:
    shapes = [jax.ShapeDtypeStruct((batch_size, *column.shape[1:]), dtype_in_jax(column)) for column in columns]
    return jax.tree.unflatten(structure, shapes)


def _with_mask_column(columns: list[Any], structure: Any, num_examples: int) -> tuple[list[Any], Any]:
    mask = np.ones(num_examples + 1, np.float32)
    mask[num_examples] = 0
    # Merge the arrays as leaves, so that a batch of columns gets the entry at its place in leaf order.
    return jax.tree.flatten({**jax.tree.unflatten(structure, columns), MASK: mask})


def dtype_in_jax(array: Any) -> Any:
    """Returns the dtype of an array on a device: 64-bit types become 32-bit if x64 is off."""
    return jax.dtypes.canonicalize_dtype(array.dtype, allow_extended_dtype=True)


def seed_from_key(rng: jax.Array) -> tuple[int, ...]:
    """Returns key data as integers, to seed orders drawn on the host. Blocks until the key is ready."""
    words = jax.random.key_data(rng) if jnp.issubdtype(rng.dtype, jax.dtypes.prng_key) else rng
    return tuple(int(word) for word in np.asarray(words).ravel())


def _memory_source(columns: list[Any]) -> Any:
    """Returns the source, or the error that prevents it."""
    try:
        from datarax.sources import MemorySource, MemorySourceConfig
    except ImportError as error:
        return error
    # A source takes only flat dicts. It creates a counter on the device, which a caller's transfer guard would refuse.
    with jax.transfer_guard("allow"):
        return MemorySource(MemorySourceConfig(shuffle=False), {str(i): column for i, column in enumerate(columns)})


def _on_host(leaf: Any) -> Any:
    # Indexing a device array from Python dispatches a kernel; on the CPU, the host shares its memory.
    if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    if isinstance(leaf, jax.Array) and next(iter(leaf.devices())).platform != "cpu":
        return leaf
    return np.asarray(leaf)
