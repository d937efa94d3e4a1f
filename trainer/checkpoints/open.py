"""Opens checkpoints of any kind: our files, pickles in the reference's layout, Orbax directories, and weights files.

The contents decide the kind, not the name.
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
from trainer.core.keys import key_impl
from trainer.core.tree_paths import LeafPath, parts_of
from trainer.distributed.agreement import AllOrNone
from trainer.errors import CheckpointError
from trainer.paths import in_home
from trainer.sharding.arrays import place_like
from trainer.state import TrainState

PROGRESS: LeafPath = ("progress",)
"""The path of the packed run record, beside the fields of the state."""

# Readers wait for memory and checksums, and neither holds the GIL.
_READERS = min(8, os.cpu_count() or 1)


class Source(Protocol):
    """An open checkpoint."""

    @property
    def path(self) -> Path:
        """Its path."""
        ...

    @property
    def info(self) -> Mapping[str, Any]:
        """Plain values about it."""
        ...

    @property
    def leaves(self) -> Mapping[LeafPath, Leaf]:
        """The arrays it holds, by path."""
        ...

    def read(self, wanted: Mapping[LeafPath, jax.Array | None]) -> dict[LeafPath, Any]:
        """Returns arrays, each placed like its template, or as a NumPy array if the template is None.

        Raises:
            CheckpointError: One is damaged or cannot be read.
        """
        ...

    def verify(self) -> None:
        """Reads and checks everything, without keeping it.

        Raises:
            CheckpointError: A checksum does not match.
        """
        ...

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...


def open_source(
    path: str | os.PathLike[str], like: TrainState | None = None, agreement: AllOrNone | None = None
) -> Source:
    """Opens a checkpoint and checks everything but the arrays.

    Args:
        path: A file or directory.
        like: A state of the same structure. Pickles need it, since they record neither which variables are params nor
            the names of the optimizer's fields; so do weights files written by other programs.
        agreement: See `OrbaxDirectory`, if several processes load it together.

    Raises:
        CheckpointError: It is missing, damaged, of a newer format, or not a checkpoint.
    """
    path = Path(in_home(path))
    if not os.path.lexists(path):
        restore(path.parent)  # otherwise, a save killed while replacing a directory would hide it
    if path.is_dir():
        from trainer.checkpoints.orbax_directory import OrbaxDirectory  # lazy, since few runs need it

        return OrbaxDirectory(path, agreement)
    if is_pickle(path):
        return _Pickle(path, like)
    kind = weights_kind(path)
    return _File(path) if kind is None else WeightsFile(path, kind, like)


def read_progress(source: Source) -> dict[str, Any] | None:
    """Returns the plain values saved beside the state, or None if there are none.

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


def describe(path: LeafPath, leaf: Any) -> Leaf:
    """Returns the `Leaf` that a file would hold for an array, or for its shape; for a key, that of its key data."""
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return Leaf(path, _name_of(leaf.dtype), tuple(leaf.shape))
    words = _words_of(leaf.dtype)
    return Leaf(path, str(words.dtype), (*leaf.shape, *words.shape), str(key_impl(leaf)))


_name_of = functools.cache(str)  # NumPy rebuilds a dtype's name on each call


class _File:
    """A file of `trainer.checkpoints.file_format`, read by several threads."""

    def __init__(self, path: Path) -> None:
        self._bundle = Bundle(path)
        self.path = path
        self.info = self._bundle.info
        self.leaves = {leaf.path: leaf for leaf in self._bundle.leaves}

    def read(self, wanted: Mapping[LeafPath, jax.Array | None]) -> dict[LeafPath, Any]:
        arrays: dict[LeafPath, Any] = {}
        with ThreadPoolExecutor(_READERS, thread_name_prefix="checkpoint") as readers:
            # Limits how many arrays wait on the host for their transfer to a device.
            everything = list(wanted)
            for paths in (everything[i : i + 2 * _READERS] for i in range(0, len(everything), 2 * _READERS)):
                values = readers.map(lambda path: self._bundle.read(self.leaves[path]), paths)
                for path, value in zip(paths, values, strict=True):
                    # Place in this thread: others lack its settings (x64, the default device).
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
    """A pickle in the reference's layout. Nothing in it is executed, and it has no checksums."""

    def __init__(self, path: Path, like: TrainState | None) -> None:
        from trainer.checkpoints.reference_pickle import read_pickle  # lazy, since few runs need it

        self.path = path
        self.info: dict[str, Any] = {}
        self.leaves: dict[LeafPath, Leaf] = {}
        self._arrays: dict[LeafPath, Any] = {}
        parts = [parts_of(keys) for keys, _ in jax.tree.leaves_with_path(like)]
        known = {"/".join(map(str, one)): one for one in parts}
        for name, (array, key) in read_pickle(path, like).items():
            leaf = Leaf(known.get(name, tuple(name.split("/"))), array.dtype.name, array.shape, key)
            self.leaves[leaf.path], self._arrays[leaf.path] = leaf, array
        # The layout holds only the variables of extensions; weights and loss scales keep their live values.
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
    """Tells whether a file begins like a pickle."""
    # Opening a named pipe would block. An unreadable file is refused later by `Bundle`, with the reason.
    with contextlib.suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                return file.read(1) == b"\x80"
    return False
