"""Checkpoints: a state in a file, whole or not at all, checked before anything is touched."""

import dataclasses
import datetime
import functools
import importlib.metadata
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
from jax.sharding import NamedSharding

from trainer.checkpoints.atomic import remove_directory, replacing, restore
from trainer.checkpoints.file_format import DTYPES, Bundle, Leaf, write_bundle
from trainer.checkpoints.open import PROGRESS, Source, describe, open_source, read_progress
from trainer.checkpoints.orbax_directory import OrbaxDirectory, begin_directory
from trainer.checkpoints.reference_pickle import write_pickle
from trainer.core.checks import did_you_mean
from trainer.core.tree_paths import LeafPath, parts_of
from trainer.distributed.agreement import AllOrNone
from trainer.errors import ArgumentError, CheckpointError, UnreadableError
from trainer.sharding.arrays import is_multiprocess
from trainer.state import TrainState

_OWN_NAME = re.compile(r"checkpoint_(0|[1-9]\d*)\.(msgpack|orbax)")

Progress = Mapping[str, Any] | Callable[[], bytes] | None
"""Plain values, or a function that packs them: where several processes save, what it raises is raised in all."""

_T = TypeVar("_T")


class Loaded(NamedTuple):
    """What a checkpoint held, and where: ``progress`` is None if there was none."""

    path: Path
    state: TrainState
    progress: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What will be written: descriptions and arrays.

    Attributes:
        state: The state it was taken of.
        info: Plain values about it, for people.
        leaves: The arrays with their descriptions, keys as their words.
        finish: What finishes the directory that is being written, where Orbax has the copies.
    """

    state: TrainState
    info: dict[str, Any]
    leaves: Sequence[tuple[Leaf, Any]]
    finish: Callable[[], None] | None = None

    def on_host(self, path: Path) -> "Snapshot":
        """Copies all arrays now, so that the state may be donated before `write_snapshot` writes them to ``path``.

        Of a state that is spread over processes each copies its part, for a directory of Orbax.

        Raises:
            CheckpointError: One is spread over processes and ``path`` is a file, or a directory of Orbax
                cannot be written.
        """
        if path.suffix == ".orbax":
            return dataclasses.replace(self, finish=begin_directory(path, self.info, self.leaves))
        for leaf, array in self.leaves:
            _check_within_process(leaf, array)
            if isinstance(array, jax.Array):
                array.copy_to_host_async()
        return dataclasses.replace(self, leaves=[(leaf, _copied_to_host(array)) for leaf, array in self.leaves])


def take_snapshot(state: TrainState, info: Mapping[str, Any] | None = None, *, progress: Progress = None) -> Snapshot:
    """Describes a state for `write_snapshot`; arguments as for `save_state`. Copies nothing yet.

    Raises:
        CheckpointError: An array is of a dtype, or ``progress`` has a value, that no file can hold.
        StateError: The state was donated to a step.
    """
    if not _is_multiprocess(state):
        return _snapshot(state, info, progress)
    described, snapshot, failure = AllOrNone("snapshot"), None, None
    try:
        snapshot = _snapshot(state, info, progress)
    except Exception as error:  # the others would wait for this process, whatever the error is
        failure = error
    described.sync(failure)
    return cast(Snapshot, snapshot)


def _snapshot(state: TrainState, info: Mapping[str, Any] | None, progress: Progress) -> Snapshot:
    state.check_alive()
    leaves: list[tuple[Leaf, Any]] = []
    for keys, leaf in jax.tree.leaves_with_path(state):
        described = describe(parts_of(keys), leaf)
        if described.dtype not in DTYPES:
            raise CheckpointError(f"`{described.name}` has dtype {described.dtype}, which checkpoints do not know.")
        leaves.append((described, jax.random.key_data(leaf) if described.key is not None else leaf))
    about = {
        "step": int(state.step),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in ("nnx-trainer", "jax", "flax", "optax")},
        **(info or {}),
    }
    if progress is not None:
        data = progress() if callable(progress) else _packed(progress)
        packed = np.frombuffer(data, np.uint8)
        leaves.append((Leaf(PROGRESS, "uint8", packed.shape), packed))
    return Snapshot(state, about, leaves)


def write_snapshot(path: Path, snapshot: Snapshot) -> None:
    """Writes a snapshot in the format that the name asks for, see `save_state`.

    Raises:
        CheckpointError: It could not be written; what was there before is untouched. Or an array is
            spread over processes, which only a name that ends in ``.orbax`` can hold.
    """
    if path.suffix == ".orbax":
        finish = snapshot.finish or begin_directory(path, snapshot.info, snapshot.leaves)
        finish()
        return
    for leaf, array in snapshot.leaves:
        _check_within_process(leaf, array)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".pkl":
            with replacing(path, 0) as file:
                write_pickle(cast(BinaryIO, file), snapshot.state)
        else:
            leaves = [(leaf, functools.partial(_to_host, array)) for leaf, array in snapshot.leaves]
            write_bundle(path, snapshot.info, leaves)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"`{path}` could not be written: {error}") from error


def save_state(
    path: str | os.PathLike[str],
    state: TrainState,
    info: Mapping[str, Any] | None = None,
    *,
    progress: Mapping[str, Any] | None = None,
) -> Path:
    """Writes ``state`` under a name, whose ending decides the format:

    * ``.orbax``: a directory of Orbax (`trainer.orbax_format`), for states on a mesh. Each array is
      written from where it is. Where there are several processes, all of them save, at the same point.
    * ``.pkl``: a pickle in the reference's layout (`trainer.pickles`).
    * any other: one file of ours (`trainer.bundle`). One array at a time is on the host.

    What has the name is there as a whole or not at all, after a crash as well (`trainer.durable`).

    Args:
        path: The name. The directory above is made if it is missing.
        state: The state.
        info: Plain values to keep beside it, shown by ``trainer inspect``.
        progress: Plain values of any size to keep beside it, for `load_with_progress`.

    Returns:
        The path.

    Raises:
        CheckpointError: It could not be written, in any process; what was there before is untouched.
        StateError: The state was donated to a step.
    """
    path = Path(path)
    write_snapshot(path, take_snapshot(state, info, progress=progress))
    return path


def load_state(
    path: str | os.PathLike[str],
    like: TrainState,
    *,
    strict: bool = True,
    only: Iterable[str] | None = None,
) -> TrainState:
    """Reads a state of the same structure as ``like``, which stays as it is.

    Everything is compared before an array is read, and every array's checksum is verified.

    Args:
        path: What `save_state` wrote, a directory written by `trainer.ModelCheckpoint`, or a pickle of
            the reference implementation. What is inside tells which, not the name.
            Of a pickle nothing is executed (`trainer.pickles`), but it has no checksums; save it again in
            our format.
        like: A state of the same model, optimizer and extensions. Its values matter only where the
            file's are not wanted; it may be a donated one if all are. It need not lie as the state
            that was saved did. Where it is spread over processes, all of them load, at the same point,
            and what fails in one fails in all.
        strict: Whether everything must fit. If not, what does not keeps the value that it has in
            ``like``, and a warning names it.
        only: Names of fields (``"params"``, ``"opt_state"``, …) to load; the others are copied.

    Returns:
        A new state, each array where its counterpart in ``like`` is.

    Raises:
        CheckpointError: The file is missing, damaged, of another kind or version, or does not fit;
            every array that does not fit is named.
        ArgumentError: ``only`` names no field of a state.
    """
    path = Path(path)
    fields = _fields_to_load(only)

    def load(votes: AllOrNone | None) -> tuple[TrainState, str]:
        with open_source(path, like, votes) as source:
            return _fitted(source, like, fields, strict=strict)

    state, problems = _together(path, load, like)
    if problems:
        warnings.warn(f"`{path}` does not fit the state everywhere; not loaded: {problems}.", stacklevel=2)
    return state


def load_with_progress(path: str | os.PathLike[str], like: TrainState) -> Loaded:
    """Reads a state, as `load_state` does, and what was given to `save_state` as ``progress``.

    Raises:
        CheckpointError: The checkpoint cannot be used. It is an `UnreadableError` where that is so
            whatever ``like`` is.
    """
    path = Path(path)

    def load(votes: AllOrNone | None) -> Loaded:
        with open_source(path, like, votes) as source:
            state, _ = _fitted(source, like, _fields_to_load(None))
            return Loaded(path, state, read_progress(source))

    return _together(path, load, like)


def load_latest(directory: str | os.PathLike[str], like: TrainState) -> Loaded | None:
    """Reads the newest checkpoint of a directory that is undamaged, which it opens once.

    It is ``load_with_progress(latest_checkpoint(directory), like)``, None where there is none.

    Raises:
        CheckpointError: There are checkpoints, and all are damaged; or the newest that is not does
            not fit ``like``.
    """
    # Process 0 says which there are: another may see one later, or one that is gone.
    names = _own_names(Path(directory))
    if _is_multiprocess(like):
        names = AllOrNone(f"list {directory}").sync(None, names)
    return _newest(directory, names, lambda path: load_with_progress(path, like))


def latest_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """Returns the newest checkpoint of a directory that is undamaged, by the step in its name.

    Only default names (``checkpoint_<step>.msgpack`` and ``.orbax``) are looked at. A damaged one is passed over
    with a warning that says why. Whether a checkpoint fits the model is not asked here: loading one
    that does not is an error, and no reason to use an older one.

    Returns:
        The path, or None where there is no checkpoint at all.

    Raises:
        CheckpointError: There are checkpoints, and all are damaged.
    """

    def verified(path: Path) -> Path:
        if path.suffix == ".orbax":
            OrbaxDirectory(path).verify()
            return path
        with Bundle(path) as bundle:
            bundle.verify()
        return path

    return _newest(directory, _own_names(Path(directory)), verified)


def prune(directory: Path, keep: int) -> None:
    """Removes all but the ``keep`` latest checkpoints with default names, and nothing else.

    Directories of Orbax belong to all processes, and process 0 alone removes them, each as a whole.
    """
    for name in _own_names(directory)[:-keep]:
        if name.endswith(".msgpack"):
            (directory / name).unlink(missing_ok=True)
        elif jax.process_index() == 0:
            remove_directory(directory / name)


def default_name(step: int, state: TrainState | None = None) -> str:
    """Returns the name of the checkpoint of a step where the caller gives none.

    It ends in ``.orbax`` for a state with arrays on a mesh of several devices, whether they
    are of one process or of many, and in ``.msgpack`` for any other.
    """
    is_on_mesh = any(
        isinstance(leaf.sharding, NamedSharding) and leaf.sharding.num_devices > 1 for leaf in jax.tree.leaves(state)
    )
    return f"checkpoint_{step}.{'orbax' if is_on_mesh else 'msgpack'}"


def describe_leaf(leaf: Leaf) -> str:
    """Formats shape and dtype, as ``(3, 3, 1, 16) float32``."""
    shape = ", ".join(map(str, leaf.shape)) + ("," if len(leaf.shape) == 1 else "")
    return f"({shape}) {leaf.dtype if leaf.key is None else f'key<{leaf.key}>'}"


def _own_names(directory: Path) -> list[str]:
    """Returns the checkpoints that have default names, in the order of their steps."""
    if not directory.is_dir():
        return []
    restore(directory)  # a save that was killed while it replaced the latest must not hide it
    names = os.listdir(directory)
    matches = filter(None, map(_OWN_NAME.fullmatch, names))
    return [match[0] for match in sorted(matches, key=lambda match: (int(match[1]), match[2]))]


def _newest(directory: str | os.PathLike[str], names: Sequence[str], use: Callable[[Path], _T]) -> _T | None:
    """Returns what ``use`` makes of the newest of a directory's checkpoints that it can read."""
    directory = Path(directory)
    passed_over = []
    for name in reversed(names):
        path = directory / name
        try:
            used = use(path)
        except UnreadableError as error:
            passed_over.append(str(error))
            continue
        if passed_over:
            warnings.warn(f"using `{path}`, since newer ones are unusable: {' '.join(passed_over)}", stacklevel=3)
        return used
    if passed_over:
        raise CheckpointError(f"no checkpoint in `{directory}` can be used: {' '.join(passed_over)}")
    return None


def _together(path: Path, load: Callable[[AllOrNone | None], _T], like: TrainState) -> _T:
    """Loads in all processes or in none, where the state is on devices of several."""
    if not _is_multiprocess(like):
        return load(None)
    votes, loaded, failure = AllOrNone(f"load {path}"), None, None
    try:
        loaded = load(votes)
    except Exception as error:  # a bug as well would leave the others waiting
        failure = error
    votes.sync(failure)
    return cast(_T, loaded)


def _is_multiprocess(state: TrainState) -> bool:
    return any(map(is_multiprocess, jax.tree.leaves(state)))


def plain_value(value: Any) -> Any:
    """Returns an array as numbers, for MessagePack; raises TypeError for any other object."""
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        return np.asarray(value).tolist()
    raise TypeError(
        f"an object of type {type(value).__qualname__}, which no checkpoint holds; what callbacks return from "
        f"state_dict() consists of numbers, strings, lists and mappings"
    )


def _packed(progress: Mapping[str, Any]) -> bytes:
    try:
        return bytes(msgpack.packb(progress, default=plain_value))
    except (TypeError, ValueError, OverflowError) as error:
        raise CheckpointError(f"the progress of the run has {error}.") from error


def _check_within_process(leaf: Leaf, array: Any) -> None:
    if is_multiprocess(array):
        raise CheckpointError(
            f"`{leaf.name}` is sharded over several processes, which one file cannot hold; save under a name that "
            f"ends in .orbax, in every process."
        )


def _to_host(array: Any) -> np.ndarray[Any, Any]:
    if isinstance(array, jax.Array) and array.is_fully_replicated:
        # An array keeps the copy that it makes for the host; that of its only shard goes with the shard.
        return np.asarray(array.addressable_data(0))
    return np.asarray(array)


def _copied_to_host(array: Any) -> np.ndarray[Any, Any]:
    """Returns a copy that survives the donation of the array."""
    host = _to_host(array)
    # NumPy sees the buffer itself where a device uses memory of the host: on the CPU, and where a state is offloaded.
    # From any other memory `host` is a copy already.
    return host.copy() if isinstance(array, jax.Array) and _is_in_host_memory(array) else host


def _is_in_host_memory(array: jax.Array) -> bool:
    devices: Any = array.sharding.device_set
    platforms = {device.platform for device in devices}
    return "cpu" in platforms or "host" in (array.sharding.memory_kind or "")


def _fields_to_load(only: Iterable[str] | None) -> set[str]:
    fields = {"params", "model_state", "opt_state", "rng", "step", "extensions"}
    chosen = fields if only is None else set(only)
    for name in sorted(chosen - fields):
        raise ArgumentError(f"`only` names {name!r}, which is no field of a state; {did_you_mean(name, fields)}")
    return chosen


def _fitted(source: Source, like: TrainState, fields: set[str], *, strict: bool = True) -> tuple[TrainState, str]:
    """Returns the state, and what of it is not from the file because it does not fit."""
    leaves, structure = jax.tree.flatten_with_path(like)
    wanted = {parts_of(keys): leaf for keys, leaf in leaves}
    found = {key: leaf for key, leaf in source.leaves.items() if key[0] in fields}
    problems = dict(_mismatches({key: leaf for key, leaf in wanted.items() if key[0] in fields}, found))
    shown = "; ".join(list(problems.values())[:20])
    shown += f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
    if problems and strict:
        raise CheckpointError(f"`{source.path}` does not fit the state: {shown}.")
    loaded = source.read({key: leaf for key, leaf in wanted.items() if key in found and key not in problems})
    new = [loaded[key] if key in loaded else jnp.array(leaf, copy=True) for key, leaf in wanted.items()]
    return cast(TrainState, jax.tree.unflatten(structure, new)), shown


def _mismatches(wanted: Mapping[LeafPath, jax.Array], found: Mapping[LeafPath, Leaf]) -> Iterator[tuple[LeafPath, str]]:
    for path, leaf in wanted.items():
        here = describe(path, leaf)
        if path not in found:
            yield path, f"{here.name}: not in the file, {describe_leaf(here)} here"
            continue
        there = found[path]
        if (there.dtype, there.shape, there.key) != (here.dtype, here.shape, here.key):
            wide = DTYPES[there.dtype].name in ("int64", "uint64", "float64", "complex128")
            hint = "" if not wide or jax.config.read("jax_enable_x64") else " (64 bits need jax_enable_x64)"
            yield path, f"{here.name}: {describe_leaf(there)} in the file{hint}, {describe_leaf(here)} here"
    for path in found.keys() - wanted.keys():
        yield path, f"{found[path].name}: {describe_leaf(found[path])} in the file, nothing here"


@functools.cache  # it parses a file each time
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
