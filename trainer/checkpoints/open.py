"""A checkpoint of any kind, opened: a file of ours, a pickle in the reference's layout, an Orbax directory, or weights.

What is inside tells the kind, not the name.
"""

import contextlib
import functools
import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import jax
import jax.numpy as jnp
import msgpack
import numpy as np

from trainer.checkpoints.atomic import restore
from trainer.checkpoints.file_format import Bundle, Leaf
from trainer.checkpoints.plain_values import unpack
from trainer.checkpoints.weights_files import WeightsFile, weights_kind
from trainer.core.tree_paths import LeafPath, parts_of
from trainer.distributed.agreement import AllOrNone
from trainer.errors import CheckpointError
from trainer.sharding.arrays import place_like
from trainer.state import TrainState

PROGRESS: LeafPath = ("progress",)
"""Beside the fields of the state: where the run was, packed."""

# Reading waits for memory and for checksums, neither of which holds Python's lock.
_READERS = min(8, os.cpu_count() or 1)


class Source(Protocol):
    """An open checkpoint."""

    @property
    def path(self) -> Path:
        """Where it is."""
        ...

    @property
    def info(self) -> Mapping[str, Any]:
        """Plain values about it."""
        ...

    @property
    def leaves(self) -> Mapping[LeafPath, Leaf]:
        """What it holds, by path."""
        ...

    def read(self, wanted: Mapping[LeafPath, jax.Array | None]) -> dict[LeafPath, Any]:
        """Returns arrays, each where its counterpart is, or as a NumPy array where that is None.

        Raises:
            CheckpointError: One is damaged or cannot be read.
        """
        ...

    def verify(self) -> None:
        """Reads everything, and keeps nothing.

        Raises:
            CheckpointError: A checksum does not agree.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_source(
    path: str | os.PathLike[str], like: TrainState | None = None, agreement: AllOrNone | None = None
) -> Source:
    """Opens a checkpoint, and checks everything but the arrays.

    Args:
        path: A file or directory.
        like: A state of the same structure. A pickle needs it, which neither tells the parameters from other
            variables nor knows what the optimizer calls its fields; and a file of weights by another program.
        agreement: Where several processes load it together, see `OrbaxDirectory`.

    Raises:
        CheckpointError: It is missing, damaged, of a newer format, or no checkpoint.
    """
    path = Path(path)
    if not os.path.lexists(path):
        restore(path.parent)  # a save that was killed while it replaced a directory must not hide it
    if path.is_dir():
        from trainer.checkpoints.orbax_directory import OrbaxDirectory  # here, since few runs need it

        return OrbaxDirectory(path, agreement)
    if is_pickle(path):
        return _Pickle(path, like)
    kind = weights_kind(path)
    return _File(path) if kind is None else WeightsFile(path, kind, like)


def read_progress(source: Source) -> dict[str, Any] | None:
    """Returns the plain values that were saved beside the state, None if there are none.

    Raises:
        CheckpointError: They are damaged.
    """
    if PROGRESS not in source.leaves or source.leaves[PROGRESS].dtype != "uint8":
        return None
    packed = source.read({PROGRESS: None})[PROGRESS]
    try:
        progress = unpack(packed.tobytes())
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise CheckpointError(f"`{source.path}` holds a progress that cannot be understood: {error}") from error
    if not isinstance(progress, dict):
        raise CheckpointError(
            f"`{source.path}` holds a progress of type {type(progress).__name__}; it must be a mapping."
        )
    return progress


def describe(path: LeafPath, leaf: jax.Array) -> Leaf:
    """Returns what a file would say of an array: of a key, its words and its implementation."""
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return Leaf(path, _name_of(leaf.dtype), tuple(leaf.shape))
    words = _words_of(leaf.dtype)
    return Leaf(path, str(words.dtype), (*leaf.shape, *words.shape), str(jax.random.key_impl(leaf)))


_name_of = functools.cache(str)  # a dtype writes its name anew each time


class _File:
    """A file of `trainer.checkpoints.file_format`, whose arrays are read by several threads."""

    def __init__(self, path: Path) -> None:
        self._bundle = Bundle(path)
        self.path = path
        self.info = self._bundle.info
        self.leaves = {leaf.path: leaf for leaf in self._bundle.leaves}

    def read(self, wanted: Mapping[LeafPath, jax.Array | None]) -> dict[LeafPath, Any]:
        arrays: dict[LeafPath, Any] = {}
        with ThreadPoolExecutor(_READERS, thread_name_prefix="checkpoint") as readers:
            # No more than a few arrays wait on the host for their way to a device.
            everything = list(wanted)
            for paths in (everything[i : i + 2 * _READERS] for i in range(0, len(everything), 2 * _READERS)):
                values = readers.map(lambda path: self._bundle.read(self.leaves[path]), paths)
                for path, value in zip(paths, values, strict=True):
                    # In this thread, whose settings (64 bits, the default device) other threads do not have.
                    like = wanted[path]
                    arrays[path] = value if like is None else place_like(value, like)
        return arrays

    def verify(self) -> None:
        self._bundle.verify()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bundle.close()


class _Pickle:
    """A pickle in the reference's layout; nothing in it is executed, and nothing has a checksum."""

    def __init__(self, path: Path, like: TrainState | None) -> None:
        from trainer.checkpoints.reference_pickle import read_pickle  # here, since few runs need it

        self.path = path
        self.info: dict[str, Any] = {}
        self.leaves: dict[LeafPath, Leaf] = {}
        self._arrays: dict[LeafPath, Any] = {}
        parts = [parts_of(keys) for keys, _ in jax.tree.leaves_with_path(like)]
        known = {"/".join(map(str, one)): one for one in parts}
        for name, (array, key) in read_pickle(path, like).items():
            leaf = Leaf(known.get(name, tuple(name.split("/"))), array.dtype.name, array.shape, key)
            self.leaves[leaf.path], self._arrays[leaf.path] = leaf, array
        # That layout has the variables of extensions only: weights and loss scales stay the live ones.
        for name, entry in ({} if like is None else like.extensions).items():
            for key, live in entry.items():
                if key != "variables":
                    leaf = describe(("extensions", name, key), live)
                    self.leaves[leaf.path], self._arrays[leaf.path] = leaf, live

    def read(self, wanted: Mapping[LeafPath, jax.Array | None]) -> dict[LeafPath, Any]:
        values = {path: np.array(self._arrays[path]) for path in wanted}
        return {path: values[path] if like is None else place_like(values[path], like) for path, like in wanted.items()}

    def verify(self) -> None:
        raise CheckpointError(f"`{self.path}` is a pickle, which has no checksums; save it again in another format.")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, error, trace


@functools.cache
def _words_of(dtype: Any) -> jax.ShapeDtypeStruct:
    words: jax.ShapeDtypeStruct = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), dtype))
    return words


def is_pickle(path: Path) -> bool:
    """Tells whether a file begins as pickles do."""
    # A named pipe would wait for a writer. What cannot be read is refused by the bundle, with a reason.
    with contextlib.suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                return file.read(1) == b"\x80"
    return False
