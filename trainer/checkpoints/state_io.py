"""Saving and loading a state: atomic, and checked before anything is touched."""

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from trainer.checkpoints.file_format import DTYPES, Leaf
from trainer.checkpoints.listing import Entry, entries_in, open_named
from trainer.checkpoints.open import Source, describe, open_source, read_progress
from trainer.checkpoints.snapshot import is_multiprocess_state, take_snapshot, write_snapshot
from trainer.checkpoints.weights_files import WEIGHTS, WeightsFile
from trainer.core.checks import did_you_mean
from trainer.core.tree_paths import LeafPath, parts_of
from trainer.distributed.agreement import AllOrNone
from trainer.errors import ArgumentError, CheckpointError, UnreadableError, warn
from trainer.state import TrainState
from trainer.types import RECORDS

_T = TypeVar("_T")


class Loaded(NamedTuple):
    """What a checkpoint held, and where: ``progress`` is None if there was none."""

    path: Path
    state: TrainState
    progress: dict[str, Any] | None


def save_state(
    path: str | os.PathLike[str],
    state: TrainState,
    info: Mapping[str, Any] | None = None,
    *,
    progress: Mapping[str, Any] | None = None,
) -> Path:
    """Writes ``state`` under a name, whose ending decides the format:

    * ``.orbax``: a directory of Orbax (`trainer.checkpoints.orbax_directory`), for states on a mesh. Each array is
      written from its devices. Where there are several processes, all of them save, at the same point.
    * ``.pkl``: a pickle in the reference's layout (`trainer.checkpoints.reference_pickle`).
    * ``.safetensors``: the params and the model state alone, for other programs; a warning says so. Needs the extra
      ``safetensors``.
    * an ending that promises the format of another program (``.pt``, ``.h5``, ``.npz``, ``.zip``, …): refused.
    * any other: one file of ours (`trainer.checkpoints.file_format`). One array at a time is on the host.

    The write is atomic, after a crash as well (`trainer.checkpoints.atomic`).

    Args:
        path: The name. The directory above is made if it is missing.
        state: The state.
        info: Plain values to keep beside it, shown by ``trainer inspect``.
        progress: Plain values of any size to keep beside it, for `load_with_progress`.

    Returns:
        The path.

    Raises:
        ArgumentError: The name promises the format of another program, or safetensors is missing.
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
            the reference implementation, or a file of weights (``.safetensors``, ``.npz``). What is inside tells
            which, not the name. Weights leave the other fields as in ``like``, and a warning names these.
            Of a pickle nothing is executed, but it has no checksums; save it again in
            our format.
        like: A state of the same model, optimizer and extensions. Its values matter only where the
            file's are not wanted; it may be a donated one if all are. Its sharding may differ from that of the state
            that was saved. Where it is spread over processes, all of them load, at the same point,
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

    def load(agreement: AllOrNone | None) -> tuple[TrainState, str]:
        with open_source(path, like, agreement) as source:
            return _fitted(source, like, _held(source, fields, only is None), strict=strict)

    state, problems = _together(path, load, like)
    if problems:
        warn(f"`{path}` does not fit the state everywhere; not loaded: {problems}.")
    return state


def load_with_progress(path: str | os.PathLike[str], like: TrainState) -> Loaded:
    """Reads a state, as `load_state` does, and what was given to `save_state` as ``progress``.

    Raises:
        CheckpointError: The checkpoint cannot be used. It is an `UnreadableError` where that is so
            whatever ``like`` is.
    """
    path = Path(path)

    def load(agreement: AllOrNone | None) -> Loaded:
        with open_source(path, like, agreement) as source:
            state, _ = _fitted(source, like, _held(source, _fields_to_load(None), True))
            return Loaded(path, state, read_progress(source))

    return _together(path, load, like)


def load_latest(
    directory: str | os.PathLike[str], like: TrainState, entries: Sequence[Entry] | None = None
) -> Loaded | None:
    """Reads the newest checkpoint of a directory that is undamaged, which it opens once.

    It is ``load_with_progress(latest_checkpoint(directory), like)``, None where there is none.

    Args:
        directory: The directory.
        like: As for `load_state`.
        entries: What `entries_in` returned for the directory, if it was listed already.

    Raises:
        CheckpointError: There are checkpoints, and all are damaged; or the newest that is not does
            not fit ``like``.
    """
    # Process 0 says which there are: another may see one later, or one that is gone.
    names = [entry.name for entry in (entries_in(Path(directory)) if entries is None else entries)]
    if is_multiprocess_state(like):
        names = AllOrNone(f"list {Path(directory).name}").sync(None, names)
    return _newest(directory, names, lambda path: load_with_progress(path, like))


def latest_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """Returns the newest checkpoint of a directory that is undamaged: the last one of the run that has saved last.

    Only default names (``checkpoint_<step>.msgpack`` and ``.orbax``) are looked at. The headers tell the runs and the
    times; checkpoints of no run, which `trainer.save_state` writes, go by the steps in their names. A damaged one is
    passed over with a warning that says why. Whether a checkpoint fits the model is not asked here: loading one that
    does not is an error, and no reason to use an older one.

    Returns:
        The path, or None where there is no checkpoint at all.

    Raises:
        CheckpointError: There are checkpoints, and all are damaged.
    """

    def verified(path: Path) -> Path:
        with open_named(path) as source:
            source.verify()
        return path

    return _newest(directory, [entry.name for entry in entries_in(Path(directory))], verified)


def default_name(step: int, state: Any = None) -> str:
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
            warn(f"using `{path}`, since newer ones are unusable: {' '.join(passed_over)}")
        return used
    if passed_over:
        raise CheckpointError(f"no checkpoint in `{directory}` can be used: {' '.join(passed_over)}")
    return None


def _together(path: Path, load: Callable[[AllOrNone | None], _T], like: TrainState) -> _T:
    """Loads in all processes or in none, where the state is on devices of several."""
    if not is_multiprocess_state(like):
        return load(None)
    agreement, loaded, failure = AllOrNone(f"load {path.name}"), None, None
    try:
        loaded = load(agreement)
    except Exception as error:  # a bug as well would leave the others waiting
        failure = error
    agreement.sync(failure)
    return cast(_T, loaded)


def _fields_to_load(only: Iterable[str] | None) -> set[str]:
    fields = {"params", "model_state", "opt_state", "rng", "step", "extensions"}
    chosen = fields if only is None else set(only)
    for name in sorted(chosen - fields):
        raise ArgumentError(f"`only` names {name!r}, which is no field of a state; {did_you_mean(name, fields)}")
    return chosen


def _held(source: Source, fields: set[str], everything: bool) -> set[str]:
    """Returns which of the fields a source can hold; warns of the others where everything is asked for."""
    if not isinstance(source, WeightsFile):
        return fields
    if everything:
        left = ", ".join(sorted(fields.difference(WEIGHTS)))
        warn(f"`{source.path}` holds weights only; not loaded: {left}. They stay as they were.")
        return fields.intersection(WEIGHTS)
    return fields


def _fitted(source: Source, like: TrainState, fields: set[str], *, strict: bool = True) -> tuple[TrainState, str]:
    """Returns the state, and what of it is not from the file because it does not fit."""
    leaves, structure = jax.tree.flatten_with_path(like)
    wanted = {parts_of(keys): leaf for keys, leaf in leaves}
    found = {key: leaf for key, leaf in source.leaves.items() if key[0] in fields}
    unfit = dict(_mismatches({key: leaf for key, leaf in wanted.items() if key[0] in fields}, found))
    # A run may be resumed with a guard that it had not, or without the one that it had.
    problems = {key: problem for key, problem in unfit.items() if key[0] != "extensions" or key[1] not in RECORDS}
    shown = "; ".join(list(problems.values())[:20])
    shown += f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
    if problems and strict:
        raise CheckpointError(f"`{source.path}` does not fit the state: {shown}.")
    loaded = source.read({key: leaf for key, leaf in wanted.items() if key in found and key not in unfit})
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
