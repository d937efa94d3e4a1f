"""Checkpoints as Orbax directories, for states that are spread over devices and processes.

A directory has two items. ``state`` holds the arrays, as a tree of dicts along their paths that any
Orbax reads; ``about`` holds what a person wants to know and a description of every array with a checksum
of our own, since Orbax notices damage to its indices but not to the numbers. Arrays are written from
where they are and read to where they shall be; none is gathered.

Orbax cannot store some arrays, so they are stored otherwise: those without entries in the description
alone, keys as their words, dtypes of less than two bytes other than the plain integers as bits (uint8).
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from trainer.bundle import DTYPES, Leaf, leaf_from_record, leaf_to_record
from trainer.digests import as_text, bits, digest, digest_on_host, from_bits
from trainer.errors import UnreadableError
from trainer.paths import LeafPath
from trainer.placement import place

FORMAT = "nnx-trainer orbax 1"

_PLAIN = {"bool", "int8", "uint8", "int16", "uint16", "float16", "bfloat16", "int32", "uint32", "float32"}
_PLAIN |= {"int64", "uint64", "float64", "complex64", "complex128"}


def save_args(info: Mapping[str, Any], leaves: Sequence[tuple[Leaf, Any]]) -> Any:
    """Returns what ``orbax.checkpoint.CheckpointManager.save`` takes as ``args``.

    Args:
        info: Plain values for people.
        leaves: Descriptions of the arrays, and the arrays, of JAX or NumPy; keys as their words. They may
            be sharded over devices and processes, and donated as soon as the save has returned.
    """
    import orbax.checkpoint as ocp

    digests = [_digest(array) for _, array in leaves]
    tree: dict[str, Any] = {}
    for leaf, array in leaves:
        if array.size:
            *parents, last = _names(leaf.path)
            node = tree
            for name in parents:
                node = node.setdefault(name, {})
            node[last] = array if leaf.dtype in _PLAIN else bits(jnp.asarray(array))
    records = [
        {**leaf_to_record(leaf), "digest": as_text(found)} for (leaf, _), found in zip(leaves, digests, strict=True)
    ]
    about = json.dumps({"info": info, "leaves": records}, default=str)
    envelope = {"format": FORMAT, "about": about, "checksum": xxhash.xxh3_64_hexdigest(about.encode())}
    return ocp.args.Composite(state=ocp.args.PyTreeSave(tree), about=ocp.args.JsonSave(envelope))


def write_directory(path: Path, info: Mapping[str, Any], leaves: Sequence[tuple[Leaf, Any]]) -> None:
    """Writes one checkpoint, arguments as for `save_args`.

    Raises:
        ValueError: Orbax could not write it.
    """
    import orbax.checkpoint as ocp

    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        checkpointer.save(path.absolute(), args=save_args(info, leaves))


class OrbaxDirectory:
    """A checkpoint that `save_args` described, opened. Nothing but the description is read yet.

    Attributes:
        info: What was written about the state.
        leaves: What it holds, by path.

    Raises:
        UnreadableError: It cannot be read, or is no such directory.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path).absolute()
        self.info, self.leaves, self._digests = self._read_about()

    def read(self, wanted: Mapping[LeafPath, jax.Array | None]) -> dict[LeafPath, Any]:
        """Returns arrays, each where its counterpart is, or as a NumPy array where that is None.

        Raises:
            UnreadableError: One is damaged or cannot be read.
        """
        if not wanted:
            return {}
        arrays = self._restore({path: like for path, like in wanted.items() if 0 not in self.leaves[path].shape})
        for path in wanted.keys() - arrays.keys():
            arrays[path] = np.empty(self.leaves[path].shape, DTYPES[self.leaves[path].dtype])
        digests = {path: _digest(array) for path, array in arrays.items()}
        for path, found in digests.items():
            if as_text(found) != self._digests[path]:
                raise self._damaged(f"the checksum of `{self.leaves[path].name}` does not agree")
        return {path: _placed(arrays[path], like) for path, like in wanted.items()}

    def verify(self) -> None:
        """Reads everything, one array at a time, and keeps nothing.

        Raises:
            UnreadableError: A checksum does not agree.
        """
        for path in self.leaves:
            self.read({path: None})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        del kind, error, trace  # no file is open

    def _read_about(self) -> tuple[dict[str, Any], dict[LeafPath, Leaf], dict[LeafPath, str]]:
        steps = sorted(int(name) for name in os.listdir(self.path) if name.isdecimal()) if self.path.is_dir() else []
        if steps:
            listed = ", ".join(map(str, steps))
            raise UnreadableError(f"`{self.path}` holds checkpoints of the steps {listed}; pass one of them.")
        try:
            text = (self.path / "about" / "metadata").read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UnreadableError(
                f"`{self.path}` is no Orbax directory that this library wrote, since its `about` could not be read: "
                f"{error}"
            ) from error
        try:
            envelope = json.loads(text)
            if envelope["format"] != FORMAT:
                raise self._damaged(f"its format is {envelope['format']!r}, and this release reads {FORMAT!r}")
            if xxhash.xxh3_64_hexdigest(envelope["about"].encode()) != envelope["checksum"]:
                raise self._damaged("its description does not have the checksum that was written")
            about = json.loads(envelope["about"])
            digests = [str(record.pop("digest")) for record in about["leaves"]]
            leaves = [leaf_from_record(record) for record in about["leaves"]]
            found = dict(zip((leaf.path for leaf in leaves), digests, strict=True))
            return dict(about["info"]), {leaf.path: leaf for leaf in leaves}, found
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if isinstance(error, UnreadableError):
                raise
            raise self._damaged(f"its description cannot be understood: {error!r}") from error

    def _restore(self, wanted: Mapping[LeafPath, jax.Array | None]) -> dict[LeafPath, Any]:
        """Reads the stored arrays, in one go: Orbax reads many at once."""
        import orbax.checkpoint as ocp

        item: dict[str, Any] = {}
        how: dict[str, Any] = {}
        for path, like in wanted.items():
            leaf = self.leaves[path]
            *parents, last = _names(path)
            items, hows = item, how
            for name in parents:
                items, hows = items.setdefault(name, {}), hows.setdefault(name, {})
            stored = DTYPES[leaf.dtype] if leaf.dtype in _PLAIN else np.dtype(np.uint8)
            items[last] = jax.ShapeDtypeStruct(leaf.shape, stored)
            hows[last] = ocp.RestoreArgs(restore_type=np.ndarray)
            if like is not None and like.committed:
                sharding = jax.random.key_data(like).sharding if leaf.key is not None else like.sharding
                hows[last] = ocp.ArrayRestoreArgs(sharding=sharding, global_shape=leaf.shape)
        try:
            with ocp.PyTreeCheckpointer() as checkpointer:
                tree = checkpointer.restore(
                    self.path / "state",
                    args=ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True),
                )
        except Exception as error:  # whatever a damaged directory makes Orbax and TensorStore raise
            reason = " ".join(str(error).split())[:300]
            raise self._damaged(f"its arrays could not be read ({type(error).__name__}: {reason})") from error
        arrays = {}
        for path in wanted:
            leaf, stored_array = self.leaves[path], tree
            for name in _names(path):
                stored_array = stored_array[name]
            if leaf.dtype not in _PLAIN:
                stored_array = from_bits(jnp.asarray(stored_array), DTYPES[leaf.dtype])
            if (tuple(stored_array.shape), stored_array.dtype) != (leaf.shape, DTYPES[leaf.dtype]):
                raise self._damaged(f"`{leaf.name}` is {stored_array.dtype}{stored_array.shape} in its arrays")
            arrays[path] = stored_array
        return arrays

    def _damaged(self, how: str) -> UnreadableError:
        return UnreadableError(f"`{self.path}` is damaged: {how}.")


def _placed(array: Any, like: jax.Array | None) -> Any:
    if like is None:
        return np.asarray(array)
    if isinstance(array, jax.Array):  # it was read to its place
        wrapped = jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
        return jax.random.wrap_key_data(array, impl=jax.random.key_impl(like)) if wrapped else array
    return place(array, like)


def _digest(array: Any) -> Any:
    return digest(array) if isinstance(array, jax.Array) else digest_on_host(array)


def _names(path: LeafPath) -> list[str]:
    """Returns the names under which Orbax is given an array; it joins them with dots and slashes itself."""
    return [quote(str(part), safe="").replace(".", "%2E") or "%" for part in path]
