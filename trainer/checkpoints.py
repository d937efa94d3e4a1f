"""Checkpoints: a state in a file, whole or not at all, checked before anything is touched."""

import contextlib
import dataclasses
import datetime
import functools
import importlib.metadata
import os
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
import msgpack
import numpy as np

from trainer.bundle import DTYPES, Bundle, Leaf, LeafPath, write_bundle
from trainer.durable import replacing
from trainer.errors import ArgumentError, CheckpointError, UnreadableError, did_you_mean
from trainer.pickles import read_pickle, write_pickle
from trainer.state import TrainState

# Beside the fields of the state, which are all that `load_state` looks at.
_PROGRESS = ("progress",)

_OWN_NAME = re.compile(r"checkpoint_(\d+)\.msgpack")

_T = TypeVar("_T")


class Found(NamedTuple):
    """An array in a file: what it is, and how to get it."""

    leaf: Leaf
    read: Callable[[], np.ndarray[Any, Any]]


class Loaded(NamedTuple):
    """What a checkpoint held, and where: ``progress`` is None if there was none."""

    path: Path
    state: TrainState
    progress: dict[str, Any] | None


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """What will be written: descriptions, and how to get the arrays.

    Attributes:
        state: The state it was taken of.
        info: Plain values about it, for people.
        leaves: The arrays with their descriptions.
    """

    state: TrainState
    info: dict[str, Any]
    leaves: Sequence[tuple[Leaf, Callable[[], np.ndarray[Any, Any]]]]

    def on_host(self) -> "Snapshot":
        """Copies all arrays now, so that the state may be donated before they are written."""
        for leaf in jax.tree.leaves(self.state):
            if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
                leaf.copy_to_host_async()
        # On the CPU what NumPy is shown is the buffer itself.
        copies = [(leaf, functools.partial(np.asarray, np.array(get(), copy=True))) for leaf, get in self.leaves]
        return dataclasses.replace(self, leaves=copies)


def take_snapshot(
    state: TrainState, info: Mapping[str, Any] | None = None, *, progress: Mapping[str, Any] | None = None
) -> Snapshot:
    """Describes a state for `write_snapshot`; arguments as for `save_state`. Copies nothing yet.

    Raises:
        CheckpointError: An array is spread over processes, or of a dtype that no file can hold.
        StateError: The state was donated to a step.
    """
    state.check_alive()
    leaves = [_to_write(keys, leaf) for keys, leaf in jax.tree.leaves_with_path(state)]
    about = {
        "step": int(state.step),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "versions": {name: _version(name) for name in ("nnx-trainer", "jax", "flax", "optax")},
        **(info or {}),
    }
    if progress is not None:
        packed = np.frombuffer(msgpack.packb(progress, default=str), np.uint8)
        leaves.append((Leaf(_PROGRESS, "uint8", packed.shape), lambda: packed))
    return Snapshot(state, about, leaves)


def write_snapshot(path: Path, snapshot: Snapshot) -> None:
    """Writes a snapshot to a file, in the format that its name asks for.

    Raises:
        CheckpointError: The file could not be written; what was there before is untouched.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".pkl":
            with replacing(path, 0) as file:
                write_pickle(cast(BinaryIO, file), snapshot.state)
        else:
            write_bundle(path, snapshot.info, snapshot.leaves)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"`{path}` could not be written: {error}") from error


def save_state(
    path: str | os.PathLike[str],
    state: TrainState,
    info: Mapping[str, Any] | None = None,
    *,
    progress: Mapping[str, Any] | None = None,
) -> Path:
    """Writes ``state`` to a file, see `trainer.bundle` for its format, or `trainer.pickles` for ``.pkl``.

    The file is either there as a whole or not at all, after a crash as well (`trainer.durable`).
    One array at a time is on the host.

    Args:
        path: The file. Its directory is made if it is missing.
        state: The state.
        info: Plain values to keep beside it, shown by ``trainer inspect``.
        progress: Plain values of any size to keep beside it, for `load_with_progress`.

    Returns:
        The path.

    Raises:
        CheckpointError: The file could not be written; what was there before is untouched.
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
        path: A file written by `save_state`, or a pickle of the reference implementation. The first
            bytes tell which, not the name. Of a pickle nothing is executed (`trainer.pickles`), but
            it has no checksums; save it again in our format.
        like: A state of the same model, optimizer and extensions. Its values matter only where the
            file's are not wanted; it may be a donated one if all are.
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
    with ExitStack() as stack:
        state, problems = _fitted(path, like, _open(path, like, stack), fields, strict=strict)
    if problems:
        warnings.warn(f"`{path}` does not fit the state everywhere; not loaded: {problems}.", stacklevel=2)
    return state


def load_with_progress(path: str | os.PathLike[str], like: TrainState) -> Loaded:
    """Reads a state, as `load_state` does, and what was given to `save_state` as ``progress``.

    Raises:
        CheckpointError: The file cannot be used. It is an `UnreadableError` where that is so whatever
            ``like`` is.
    """
    path = Path(path)
    with ExitStack() as stack:
        found = _open(path, like, stack)
        state, _ = _fitted(path, like, found, _fields_to_load(None))
        return Loaded(path, state, _progress(path, found))


def load_latest(directory: str | os.PathLike[str], like: TrainState) -> Loaded | None:
    """Reads the newest checkpoint of a directory that is undamaged, which it opens once.

    It is ``load_with_progress(latest_checkpoint(directory), like)``, None where there is none.

    Raises:
        CheckpointError: There are checkpoints, and all are damaged; or the newest that is not does
            not fit ``like``.
    """
    return _newest(directory, lambda path: load_with_progress(path, like))


def latest_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """Returns the newest checkpoint of a directory that is undamaged, by the step in its name.

    Only default names (``checkpoint_<step>.msgpack``) are looked at. A damaged one is passed over
    with a warning that says why. Whether a checkpoint fits the model is not asked here: loading one
    that does not is a mistake to hear of, not a reason to go back to an older one.

    Returns:
        The path, or None where there is no checkpoint at all.

    Raises:
        CheckpointError: There are checkpoints, and all are damaged.
    """

    def verified(path: Path) -> Path:
        with Bundle(path) as bundle:
            bundle.verify()
        return path

    return _newest(directory, verified)


def prune(directory: Path, keep: int) -> None:
    """Removes all but the ``keep`` latest checkpoints with default names, and nothing else."""
    for step in _own_steps(directory)[:-keep]:
        (directory / default_name(step)).unlink(missing_ok=True)


def default_name(step: int) -> str:
    """Returns the name of the checkpoint of a step where the caller gives none."""
    return f"checkpoint_{step}.msgpack"


def describe_leaf(leaf: Leaf) -> str:
    """Formats shape and dtype, as ``(3, 3, 1, 16) float32``."""
    shape = ", ".join(map(str, leaf.shape)) + ("," if len(leaf.shape) == 1 else "")
    return f"({shape}) {leaf.dtype if leaf.key is None else f'key<{leaf.key}>'}"


def _own_steps(directory: Path) -> list[int]:
    names = os.listdir(directory) if directory.is_dir() else []
    matches = filter(None, map(_OWN_NAME.fullmatch, names))
    # A name with leading zeros is not one that we give.
    return sorted(int(match[1]) for match in matches if match[0] == default_name(int(match[1])))


def _newest(directory: str | os.PathLike[str], use: Callable[[Path], _T]) -> _T | None:
    """Returns what ``use`` makes of the newest checkpoint that it can read."""
    directory = Path(directory)
    passed_over = []
    for step in reversed(_own_steps(directory)):
        path = directory / default_name(step)
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


def _to_write(keys: Any, leaf: jax.Array) -> tuple[Leaf, Callable[[], np.ndarray[Any, Any]]]:
    described = _described(_parts(keys), leaf)
    if not leaf.is_fully_addressable:
        raise CheckpointError(
            f"`{described.name}` lies on devices of other processes, which one file cannot hold; save sharded states "
            f"with Orbax."
        )
    if described.dtype not in DTYPES:
        raise CheckpointError(f"`{described.name}` has dtype {described.dtype}, which checkpoints do not know.")

    def get() -> np.ndarray[Any, Any]:
        words = jax.random.key_data(leaf) if described.key is not None else leaf
        # An array keeps the copy that it makes for the host; that of its only shard goes with the shard.
        return np.asarray(words.addressable_data(0) if words.is_fully_replicated else words)

    return described, get


def _described(path: LeafPath, leaf: jax.Array) -> Leaf:
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return Leaf(path, str(leaf.dtype), tuple(leaf.shape))
    words = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return Leaf(path, str(words.dtype), tuple(words.shape), str(jax.random.key_impl(leaf)))


def _parts(keys: Iterable[Any]) -> LeafPath:
    """Turns a JAX key path into attribute names, dict keys and indices."""
    names = ("name", "key", "idx")
    parts = [next(getattr(key, name) for name in names if hasattr(key, name)) for key in keys]
    return tuple(part if isinstance(part, int) else str(part) for part in parts)


def _fields_to_load(only: Iterable[str] | None) -> set[str]:
    fields = {"params", "model_state", "opt_state", "rng", "step", "extensions"}
    chosen = fields if only is None else set(only)
    for name in sorted(chosen - fields):
        raise ArgumentError(f"`only` names {name!r}, which is no field of a state; {did_you_mean(name, fields)}")
    return chosen


def _wanted(like: TrainState) -> dict[LeafPath, jax.Array]:
    return {_parts(keys): leaf for keys, leaf in jax.tree.leaves_with_path(like)}


def _fitted(
    path: Path, like: TrainState, found: Mapping[LeafPath, Found], fields: set[str], *, strict: bool = True
) -> tuple[TrainState, str]:
    """Returns the state, and what of it is not from the file because it does not fit."""
    found = {key: value for key, value in found.items() if key[0] in fields}
    wanted = _wanted(like)
    problems = dict(_mismatches({key: leaf for key, leaf in wanted.items() if key[0] in fields}, found))
    shown = "; ".join(list(problems.values())[:20])
    shown += f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
    if problems and strict:
        raise CheckpointError(f"`{path}` does not fit the state: {shown}.")
    loadable = found.keys() & wanted.keys() - problems.keys()
    new = [
        _place(found[key].read(), leaf) if key in loadable else jnp.array(leaf, copy=True)
        for key, leaf in wanted.items()
    ]
    return cast(TrainState, jax.tree.unflatten(jax.tree.structure(like), new)), shown


def _progress(path: Path, found: Mapping[LeafPath, Found]) -> dict[str, Any] | None:
    there = found.get(_PROGRESS)
    if there is None or there.leaf.dtype != "uint8":
        return None
    packed = there.read().tobytes()
    try:
        progress = msgpack.unpackb(packed)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise CheckpointError(f"`{path}` holds a progress that cannot be understood: {error}") from error
    if not isinstance(progress, dict):
        raise CheckpointError(f"`{path}` holds a progress of type {type(progress).__name__}; it must be a mapping.")
    return progress


def _open(path: Path, like: TrainState, stack: ExitStack) -> dict[LeafPath, Found]:
    if _is_pickle(path):
        return _open_pickle(path, like, _wanted(like))
    bundle = stack.enter_context(Bundle(path))
    return {leaf.path: Found(leaf, functools.partial(bundle.read, leaf)) for leaf in bundle.leaves}


def _is_pickle(path: Path) -> bool:
    # A named pipe would wait for a writer. What cannot be read is refused by the bundle, with a reason.
    with contextlib.suppress(OSError):
        if path.is_file():
            with path.open("rb") as file:
                return file.read(1) == b"\x80"
    return False


def _open_pickle(path: Path, like: TrainState, wanted: Iterable[LeafPath]) -> dict[LeafPath, Found]:
    paths = {"/".join(map(str, parts)): parts for parts in wanted}
    found: dict[LeafPath, Found] = {}
    for name, (array, key) in read_pickle(path, like).items():
        leaf = Leaf(paths.get(name, tuple(name.split("/"))), array.dtype.name, array.shape, key)
        found[leaf.path] = Found(leaf, functools.partial(np.array, array))
    # That layout has no weights: those of the live extensions stay.
    for name, extension in like.extensions.items():
        place, weight = ("extensions", name, "weight"), extension["weight"]
        found[place] = Found(_described(place, weight), functools.partial(np.array, weight))
    return found


def _mismatches(
    wanted: Mapping[LeafPath, jax.Array], found: Mapping[LeafPath, Found]
) -> Iterator[tuple[LeafPath, str]]:
    for path, leaf in wanted.items():
        here = _described(path, leaf)
        if path not in found:
            yield path, f"{here.name}: not in the file, {describe_leaf(here)} here"
            continue
        there = found[path].leaf
        if (there.dtype, there.shape, there.key) != (here.dtype, here.shape, here.key):
            wide = DTYPES[there.dtype].name in ("int64", "uint64", "float64", "complex128")
            hint = "" if not wide or jax.config.read("jax_enable_x64") else " (64 bits need jax_enable_x64)"
            yield path, f"{here.name}: {describe_leaf(there)} in the file{hint}, {describe_leaf(here)} here"
    for path in found.keys() - wanted.keys():
        yield path, f"{found[path].leaf.name}: {describe_leaf(found[path].leaf)} in the file, nothing here"


def _place(value: np.ndarray[Any, Any], like: jax.Array) -> jax.Array:
    """Puts an array where ``like`` is. The memory is fresh and aligned, so the CPU takes it as it is."""
    array = jax.device_put(value)
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        array = jax.random.wrap_key_data(array, impl=jax.random.key_impl(like))
    # An uncommitted array must stay so, or the compiled step would see another kind of argument.
    placed: jax.Array = jax.device_put(array, like.sharding) if like.committed else array
    return placed


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
        return "unknown"
