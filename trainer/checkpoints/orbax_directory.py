"""Checkpoints as Orbax directories, for states sharded over devices and processes.

A directory has two items. ``state`` holds the arrays, as a tree of dicts along their paths that any
Orbax reads; ``about`` holds information for people and a description of every array. Each description has our own
checksum, since Orbax detects damage to its indices but not to array data. Arrays are written from their devices and
read into the sharding of their template; none above 1 MiB is gathered.

With several processes, all call at the same point. Orbax writes in each process what its devices hold;
process 0 writes the rest, and renames the directory once all have finished. A failure in one process
is raised in all (`trainer.distributed.AllOrNone`).

Orbax's handlers are driven by hand, since its checkpointers wait at barriers that a failed process never reaches:
``PyTreeCheckpointHandler`` with ``async_save``, ``finalize`` and ``restore``, in the layout that it writes with
``use_zarr3=False``; seen in orbax-checkpoint 0.12.8.

Some arrays Orbax cannot store: arrays without entries are stored only as descriptions, keys as key data, and
dtypes of less than two bytes, other than the plain integers, as bits (uint8).
"""

import asyncio
import contextlib
import functools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from urllib.parse import quote

import jax
import jax.numpy as jnp
import numpy as np
import xxhash

from trainer.checkpoints.atomic import NewDirectory
from trainer.checkpoints.file_format import DTYPES, Leaf, leaf_from_record, leaf_to_record
from trainer.checkpoints.orbax_checks import check_files, check_stored
from trainer.checkpoints.plain_values import bytes_to_json, from_plain, to_plain
from trainer.core.checksums import bits, from_bits, prepare_digests
from trainer.core.tree_paths import LeafPath
from trainer.distributed.agreement import AllOrNone
from trainer.errors import CheckpointError, UnreadableError
from trainer.sharding.arrays import as_key, is_committed, is_multiprocess, place_like, sharding_of

FORMAT = "nnx-trainer orbax 1"

# A save that takes longer counts as failed.
_SAVE_TIMEOUT_SECONDS = 3600.0

# Parsed JSON takes up to 30 times its bytes in memory.
_MAX_ABOUT = 96 * 2**20

_PLAIN = {"bool", "int8", "uint8", "int16", "uint16", "float16", "bfloat16", "int32", "uint32", "float32"}
_PLAIN |= {"int64", "uint64", "float64", "complex64", "complex128"}


def begin_directory(
    path: Path,
    info: Mapping[str, Any],
    leaves: Sequence[tuple[Leaf, Any]],
    claim: Callable[[], None] | None = None,
) -> Callable[[], None]:
    """Copies arrays to the host, and starts writing them to a temporary directory next to ``path``.

    Args:
        path: The directory, which may already hold a checkpoint. Its parent is created if missing.
        info: Plain values for people.
        leaves: Descriptions, with JAX or NumPy arrays; keys as their key data. The arrays may be sharded
            over devices and processes, and may be donated once this returns.
        claim: As for `trainer.checkpoints.atomic.replacing`; called in process 0.

    Returns:
        A function that finishes the checkpoint and must be called, in any thread: it waits until all
        processes have written everything, then renames the directory. Until then, ``path`` is unchanged.

    Raises:
        CheckpointError: Something failed, in this or another process. The returned function raises it
            too; ``path`` is then unchanged.
    """
    agreement = AllOrNone(f"save {path.name}")  # one per save, since it may finish in another thread
    writing = _Writing(path.absolute(), info, leaves, claim)
    try:
        temporary = agreement.sync(*_attempted(writing.prepare, path))
        # The devices of all processes compute the checksums together, in collectives that never time out. So whatever
        # can fail in a single process is part of `prepare`, and no process enters the collectives unless all do.
        failure, _ = _attempted(writing.compute_checksums, path)
        if failure is None:
            failure, _ = _attempted(functools.partial(writing.begin, Path(temporary)), path)
        agreement.sync(failure)
    except BaseException:
        writing.discard()
        raise

    def finish() -> None:
        try:
            agreement.sync(*_attempted(writing.wait, path), timeout_seconds=_SAVE_TIMEOUT_SECONDS)
            agreement.sync(*_attempted(writing.commit, path), timeout_seconds=_SAVE_TIMEOUT_SECONDS)
        except BaseException:
            writing.discard()
            raise

    return finish


def write_directory(path: Path, info: Mapping[str, Any], leaves: Sequence[tuple[Leaf, Any]]) -> None:
    """Writes one checkpoint; arguments and errors as for `begin_directory`."""
    begin_directory(path, info, leaves)()


class _Writing:
    """One process's part in writing a checkpoint."""

    def __init__(
        self,
        path: Path,
        info: Mapping[str, Any],
        leaves: Sequence[tuple[Leaf, Any]],
        claim: Callable[[], None] | None = None,
    ) -> None:
        self._path = path
        self._claim = claim
        self._info = info
        self._leaves = leaves
        self._tree: dict[str, Any] = {}
        self._digests: Callable[[], list[str]] = list
        self._checksums: list[str] = []
        self._handler: Any = None
        self._new: NewDirectory | None = None
        self._temporary = path
        self._futures: Sequence[Any] = ()

    def prepare(self) -> str | None:
        """Converts the arrays to what Orbax can store, and does the local part of their checksums.

        Process 0 also creates the temporary directory.
        """
        import orbax.checkpoint as ocp

        self._info = to_plain(self._info, "info")
        for leaf, _ in self._leaves:
            leaf_from_record(leaf_to_record(leaf))  # raises before anything is written if no reader would accept it
        self._handler = ocp.PyTreeCheckpointHandler(use_zarr3=False)  # the layout that `check_stored` reads
        self._tree = _tree_of(self._leaves)
        self._digests = prepare_digests([array for _, array in self._leaves])
        if jax.process_index() != 0:
            return None
        if self._path.is_dir() and any(self._path.iterdir()) and not (self._path / "about" / "metadata").exists():
            raise FileExistsError("it is a directory of something else, which is not replaced")
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._new = NewDirectory(self._path, self._claim)
        (self._new.temporary / "state").mkdir()
        return str(self._new.temporary)

    def compute_checksums(self) -> None:
        """Dispatches the programs that compute checksums over the devices of all processes."""
        self._checksums, self._digests = self._digests(), list

    def begin(self, temporary: Path) -> None:
        """Copies the arrays to the host, for Orbax to write in the background."""
        import orbax.checkpoint as ocp

        self._temporary = temporary
        saving = self._handler.async_save(_state_in(temporary), args=ocp.args.PyTreeSave(self._tree))
        self._futures = _run(saving) or ()
        self._tree = {}
        # The caller may now donate the arrays, so keep only their descriptions.
        self._leaves = [(leaf, None) for leaf, _ in self._leaves]

    def wait(self) -> None:
        """Waits until all writes have ended, and raises the first error."""
        deadline = time.monotonic() + _SAVE_TIMEOUT_SECONDS
        futures, self._futures = self._futures, ()
        failures = []
        for future in futures:
            try:
                future.result(timeout=max(deadline - time.monotonic(), 0.0))
            except Exception as error:
                failures.append(error)
        if failures:
            raise failures[0]

    def commit(self) -> None:
        """In process 0, writes the description and renames the directory."""
        if self._new is None:
            return
        records = [
            {**leaf_to_record(leaf), "digest": checksum}
            for (leaf, _), checksum in zip(self._leaves, self._checksums, strict=True)
        ]
        about = json.dumps({"info": self._info, "leaves": records}, default=bytes_to_json)
        if len(about) > _MAX_ABOUT // 3:  # the file escapes quotes a second time
            raise ValueError(f"its description takes {len(about)} bytes, more than {_MAX_ABOUT // 3}")
        self._handler.finalize(_state_in(self._temporary))
        envelope = {"format": FORMAT, "about": about, "checksum": xxhash.xxh3_64_hexdigest(about.encode())}
        (self._temporary / "about").mkdir()
        (self._temporary / "about" / "metadata").write_text(json.dumps(envelope), encoding="utf-8")
        self._new.commit()

    def discard(self) -> None:
        if self._new is not None:
            with contextlib.suppress(Exception):  # an error is already being handled
                self.wait()
            self._new.discard()


def _tree_of(leaves: Sequence[tuple[Leaf, Any]]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for leaf, array in leaves:
        if array.size:
            *parents, last = _names(leaf.path)
            node = tree
            for name in parents:
                node = node.setdefault(name, {})
            stored = array if leaf.dtype in _PLAIN else bits(jnp.asarray(array))
            # Process 0 writes arrays that every process has a copy of. Orbax takes those only as NumPy arrays.
            node[last] = np.asarray(stored) if jax.process_count() > 1 and not is_multiprocess(stored) else stored
    return tree


def _attempted(work: Callable[[], Any], path: Path) -> tuple[Exception | None, Any]:
    """Returns the failure for `AllOrNone.sync`, and the result of the work."""
    try:
        return None, work()
    except CheckpointError as error:
        return error, None
    except Exception as error:  # disk errors make Orbax and TensorStore raise many types
        reason = " ".join(str(error).split())[:300]
        failure = CheckpointError(f"`{path}` could not be written ({type(error).__name__}: {reason})")
        failure.__cause__ = error
        return failure, None


def _state_in(directory: Path) -> Any:
    """Returns the path of the arrays, in the type that Orbax handlers take."""
    from etils import epath  # type: ignore[import-untyped]

    return epath.Path(directory / "state")


def _run(coroutine: Any) -> Any:
    """Runs a coroutine to completion, in another thread if this one has an event loop, as in notebooks."""
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return _run_in_new_loop(coroutine)
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_run_in_new_loop, coroutine).result()


def _run_in_new_loop(coroutine: Any) -> Any:
    # asyncio.run() ends by iterating over the tasks of all threads, which may change meanwhile.
    loop = asyncio.new_event_loop()
    try:
        return loop.run_until_complete(coroutine)
    finally:
        loop.close()


class OrbaxDirectory:
    """An open checkpoint that `begin_directory` wrote. Only the description is read at first.

    Args:
        path: The directory.
        agreement: Makes a failed read in one process fail in all, if the arrays are sharded over several.

    Attributes:
        info: Plain values about the state.
        leaves: The arrays it holds, by path.

    Raises:
        UnreadableError: It cannot be read, or is not such a directory.
    """

    def __init__(self, path: str | os.PathLike[str], agreement: AllOrNone | None = None) -> None:
        self.path = Path(path).absolute()
        self._agreement = agreement
        self.info, self.leaves, self._digests = self._read_about()

    def read(self, wanted: Mapping[LeafPath, jax.Array | None]) -> dict[LeafPath, Any]:
        """Returns arrays, each placed like its template, or as a NumPy array if the template is None.

        Raises:
            UnreadableError: One is damaged or cannot be read.
        """
        if not wanted:
            return {}
        arrays: dict[LeafPath, Any] = {}
        failure: Exception | None = None
        try:
            arrays = self._restore({path: like for path, like in wanted.items() if 0 not in self.leaves[path].shape})
            for path in wanted.keys() - arrays.keys():
                arrays[path] = np.empty(self.leaves[path].shape, DTYPES[self.leaves[path].dtype])
            # In file order, which is the same in all processes.
            paths = [path for path in self.leaves if path in arrays]
            digests = prepare_digests([arrays[path] for path in paths])
        except Exception as error:
            failure = error
        if self._agreement is not None and any(map(is_multiprocess, wanted.values())):
            self._agreement.sync(failure)  # before all processes compute the digests together
        if failure is not None:
            raise failure
        for path, found in zip(paths, digests(), strict=True):
            if found != self._digests[path]:
                raise self._damaged(f"the checksum of `{self.leaves[path].name}` does not agree")
        return {path: _placed(arrays[path], like) for path, like in wanted.items()}

    def verify(self) -> None:
        """Reads and checks everything, one array at a time, without keeping it.

        Raises:
            UnreadableError: A checksum does not match.
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
        try:
            steps = sorted(int(name) for name in os.listdir(self.path) if name.isdecimal())
            if steps:
                listed = ", ".join(map(str, steps))
                raise UnreadableError(f"`{self.path}` holds checkpoints of the steps {listed}; pass one of them.")
            check_files(self.path / "about")
            if (self.path / "about" / "metadata").stat().st_size > _MAX_ABOUT:
                raise ValueError("it is too large")
            text = (self.path / "about" / "metadata").read_text(encoding="utf-8")
        except UnreadableError:
            raise
        except (OSError, ValueError) as error:
            why = f"its `about` could not be read: {error}"
            if isinstance(error, FileNotFoundError) and self.path.is_dir():
                why = "it has no `about`" if any(self.path.iterdir()) else "it is empty"
            raise UnreadableError(
                f"`{self.path}` is no Orbax directory that this library wrote, since {why}"
            ) from error
        try:
            envelope = json.loads(text)
            if envelope["format"] != FORMAT:
                raise self._damaged(f"its format is {envelope['format']!r}, and this release reads {FORMAT!r}")
            if xxhash.xxh3_64_hexdigest(envelope["about"].encode()) != envelope["checksum"]:
                raise self._damaged("its description does not have the checksum that was written")
            about = json.loads(envelope["about"], object_hook=from_plain)
            digests = [str(record.pop("digest")) for record in about["leaves"]]
            leaves = [leaf_from_record(record) for record in about["leaves"]]
            found = dict(zip((leaf.path for leaf in leaves), digests, strict=True))
            return dict(about["info"]), {leaf.path: leaf for leaf in leaves}, found
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            if isinstance(error, UnreadableError):
                raise
            raise self._damaged(f"its description cannot be understood: {error!r}") from error

    def _restore(self, wanted: Mapping[LeafPath, jax.Array | None]) -> dict[LeafPath, Any]:
        """Reads the stored arrays in one call, so that Orbax reads them in parallel."""
        if not wanted:
            return {}
        import orbax.checkpoint as ocp

        item: dict[str, Any] = {}
        how: dict[str, Any] = {}
        for path, like in wanted.items():
            leaf = self.leaves[path]
            *parents, last = _names(path)
            items, hows = item, how
            for name in parents:
                items, hows = items.setdefault(name, {}), hows.setdefault(name, {})
            items[last] = jax.ShapeDtypeStruct(leaf.shape, _stored_dtype(leaf))
            hows[last] = ocp.RestoreArgs(restore_type=np.ndarray)
            if like is not None and is_committed(like):
                hows[last] = ocp.ArrayRestoreArgs(sharding=sharding_of(like), global_shape=leaf.shape)
        restore = ocp.args.PyTreeRestore(item=item, restore_args=how, partial_restore=True)
        try:
            state = self.path / "state"
            stored = {
                ".".join(_names(path)): (self.leaves[path].shape, _stored_dtype(self.leaves[path])) for path in wanted
            }
            check_stored(state, stored, check_files(state, (self.path / "about" / "metadata").stat().st_size))
            tree = ocp.PyTreeCheckpointHandler().restore(_state_in(self.path), args=restore)
        except Exception as error:  # a damaged directory makes Orbax and TensorStore raise many types
            reason = " ".join(str(error).split())[:300]
            raise self._damaged(f"its arrays could not be read ({type(error).__name__}: {reason})") from error
        arrays = {}
        for path in wanted:
            leaf, stored_array = self.leaves[path], tree
            for name in _names(path):
                stored_array = stored_array.get(name) if isinstance(stored_array, dict) else None
            if not isinstance(stored_array, np.ndarray | jax.Array) or stored_array.dtype != _stored_dtype(leaf):
                raise self._damaged(f"`{leaf.name}` is {str(stored_array)[:100]} in its arrays")
            if leaf.dtype not in _PLAIN:
                stored_array = from_bits(jnp.asarray(stored_array), DTYPES[leaf.dtype])
            if (tuple(stored_array.shape), stored_array.dtype) != (leaf.shape, DTYPES[leaf.dtype]):
                raise self._damaged(f"`{leaf.name}` is {stored_array.dtype}{stored_array.shape} in its arrays")
            arrays[path] = stored_array
        return arrays

    def _damaged(self, how: str) -> UnreadableError:
        return UnreadableError(f"`{self.path}` is damaged: {how}.")


def _stored_dtype(leaf: Leaf) -> np.dtype[Any]:
    return DTYPES[leaf.dtype] if leaf.dtype in _PLAIN else np.dtype(np.uint8)


def _placed(array: Any, like: jax.Array | None) -> Any:
    if like is None:
        return np.asarray(array)
    # Orbax has already placed JAX arrays.
    return as_key(array, like) if isinstance(array, jax.Array) else place_like(array, like)


def _names(path: LeafPath) -> list[str]:
    """Returns the parts of an array's name for Orbax, which joins them with dots and slashes itself."""
    return [quote(str(part), safe="").replace(".", "%2E") or "%" for part in path]
