"""Saves and loads states: atomic writes, and loads that are checked before anything changes."""

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
from trainer.checkpoints.saving import is_multiprocess_state, take_snapshot, write_snapshot
from trainer.checkpoints.weights_files import WEIGHTS, WeightsFile
from trainer.core.checks import did_you_mean
from trainer.core.tree_paths import LeafPath, parts_of
from trainer.distributed.agreement import AllOrNone
from trainer.errors import ArgumentError, CheckpointError, UnreadableError, warn
from trainer.paths import in_home
from trainer.state import TrainState
from trainer.types import RECORDS

_T = TypeVar("_T")


class Loaded(NamedTuple):
    """The contents of a checkpoint, and its path: ``progress`` is None if there was none."""

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
    """Writes ``state`` to a path, whose suffix decides the format:

    * ``.orbax``: an Orbax directory (`trainer.checkpoints.orbax_directory`), for states on a mesh. Each array is
      written from its devices. With several processes, all must save at the same point.
    * ``.pkl``: a pickle in the reference's layout (`trainer.checkpoints.reference_pickle`).
    * ``.safetensors``: only the params and the model state, for other programs, with a warning. Needs the extra
      ``safetensors``.
    * a suffix of another program's format (``.pt``, ``.h5``, ``.npz``, ``.zip``, …): refused.
    * any other: one of our files (`trainer.checkpoints.file_format`). One array at a time is on the host.

    The write is atomic, even across a crash (`trainer.checkpoints.atomic`).

    Args:
        path: The path. Its parent directory is created if missing.
        state: The state.
        info: Plain values to store beside it, shown by ``trainer inspect``.
        progress: Plain values of any size to store beside it, for `load_with_progress`.

    Returns:
        The path.

    Raises:
        ArgumentError: The suffix is that of another program's format, or safetensors is missing.
        CheckpointError: The write failed, in any process; any existing file is unchanged.
        StateError: The state was donated to a step.
    """
    path = Path(in_home(path))
    write_snapshot(path, take_snapshot(state, info, progress=progress))
    return path


def load_state(
    path: str | os.PathLike[str],
    like: TrainState,
    *,
    strict: bool = True,
    only: Iterable[str] | None = None,
) -> TrainState:
    """Reads a state of the same structure as ``like``, which is not modified.

    The structure is compared before any array is read, and every array's checksum is verified.

    Args:
        path: A checkpoint from `save_state`, a directory from `trainer.ModelCheckpoint`, a pickle from
            the reference implementation, or a weights file (``.safetensors``, ``.npz``). The contents
            decide the format, not the name. Weights files leave the other fields as in ``like``, and a
            warning names them. Nothing in a pickle is executed, but it has no checksums; save it again
            in our format. Of a directory of checkpoints, the newest undamaged one.
        like: A state of the same model, optimizer and extensions. Its values are used only for what is not
            loaded; if everything is loaded, it may be donated, or be the shapes alone:
            ``jax.eval_shape(lambda: TrainState.create(...))``. Its sharding may differ from that of the
            saved state. If it spans several processes, all must load at the same point, and a failure in
            one is raised in all.
        strict: Whether everything must fit. If False, whatever does not fit keeps its value from
            ``like``, and a warning names it.
        only: Names of the fields (``"params"``, ``"opt_state"``, …) to load; the others are copied.

    Returns:
        A new state, each array placed like its counterpart in ``like``: on the default device if that is a NumPy array
        or a shape without a sharding. A shape whose array is not loaded stays a shape.

    Raises:
        CheckpointError: The file is missing, damaged, of another kind or version, or does not fit;
            every array that does not fit is named.
        ArgumentError: ``only`` has a name that is not a field of the state.
    """
    path, fields = Path(in_home(path)), _fields_to_load(only)
    if names := _checkpoints_in(path, like):
        found = _newest(path, names, lambda one: load_state(one, like, strict=strict, only=only and fields))
        assert found is not None, "names of checkpoints were given"
        return found

    def load(agreement: AllOrNone | None) -> tuple[TrainState, str]:
        with open_source(path, like, agreement) as source:
            return _fitted(source, like, _held(source, fields, only is None), strict=strict)

    state, problems = _together(path, load, like)
    if problems:
        warn(f"`{path}` does not fit the state everywhere; not loaded: {problems}.")
    return state


def load_with_progress(path: str | os.PathLike[str], like: TrainState) -> Loaded:
    """Reads a state as `load_state` does, and the ``progress`` given to `save_state`.

    Raises:
        CheckpointError: The checkpoint cannot be used. It is an `UnreadableError` if the cause does
            not depend on ``like``.
    """
    path = Path(in_home(path))
    found = _newest(path, _checkpoints_in(path, like), lambda one: _load_one(one, like))
    return _load_one(path, like) if found is None else found


def load_latest(
    directory: str | os.PathLike[str], like: TrainState, entries: Sequence[Entry] | None = None
) -> Loaded | None:
    """Reads the newest undamaged checkpoint in a directory, and opens it only once.

    Equivalent to ``load_with_progress(latest_checkpoint(directory), like)``, or None if there is none.

    Args:
        directory: The directory.
        like: As for `load_state`.
        entries: The result of `entries_in` for the directory, if it is already listed.

    Raises:
        CheckpointError: There are checkpoints, but all are damaged; or the newest undamaged one does
            not fit ``like``.
    """
    directory = Path(in_home(directory))
    return _newest(directory, _checkpoints_in(directory, like, entries), lambda path: _load_one(path, like))


def latest_checkpoint(directory: str | os.PathLike[str]) -> Path | None:
    """Returns the newest undamaged checkpoint in a directory: the last one of the run that saved last.

    Only default names (``checkpoint_<step>.msgpack`` and ``.orbax``) are considered. The headers give runs and
    times; checkpoints without a run, which `trainer.save_state` writes, are ordered by the step in their name. A
    damaged one is skipped with a warning that says why. Whether a checkpoint fits the model is not checked: loading
    one that does not fit is an error, not a reason to use an older one.

    Returns:
        The path, or None if there is no checkpoint at all.

    Raises:
        CheckpointError: There are checkpoints, but all are damaged.
    """

    def verified(path: Path) -> Path:
        with open_named(path) as source:
            source.verify()
        return path

    directory = Path(in_home(directory))
    return _newest(directory, [entry.name for entry in entries_in(directory)], verified)


def default_name(step: int, state: Any = None) -> str:
    """Returns the default name of the checkpoint at a step.

    It ends in ``.orbax`` if the state has arrays on a mesh of several devices, in one process or many,
    and in ``.msgpack`` otherwise.
    """
    is_on_mesh = any(
        isinstance(leaf.sharding, NamedSharding) and leaf.sharding.num_devices > 1 for leaf in jax.tree.leaves(state)
    )
    return f"checkpoint_{step}.{'orbax' if is_on_mesh else 'msgpack'}"


def describe_leaf(leaf: Leaf) -> str:
    """Formats shape and dtype: ``(3, 3, 1, 16) float32``."""
    shape = ", ".join(map(str, leaf.shape)) + ("," if len(leaf.shape) == 1 else "")
    return f"({shape}) {leaf.dtype if leaf.key is None else f'key<{leaf.key}>'}"


def _load_one(path: Path, like: TrainState) -> Loaded:
    def load(agreement: AllOrNone | None) -> Loaded:
        with open_source(path, like, agreement) as source:
            state, _ = _fitted(source, like, _held(source, _fields_to_load(None), True))
            return Loaded(path, state, read_progress(source))

    return _together(path, load, like)


def _checkpoints_in(path: Path, like: TrainState, entries: Sequence[Entry] | None = None) -> list[str]:
    """Returns the names of the checkpoints in a directory, the newest last; none if the path is no such directory."""
    # Process 0 decides which exist: others may see a new one later, or still see a removed one.
    names = [entry.name for entry in (entries_in(path) if entries is None else entries)]
    return AllOrNone(f"list {path.name}").sync(None, names) if is_multiprocess_state(like) else names


def _newest(directory: str | os.PathLike[str], names: Sequence[str], use: Callable[[Path], _T]) -> _T | None:
    """Returns the result of ``use`` for the newest checkpoint in a directory that it can read."""
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
    """Loads in all processes or none, if the state spans several."""
    if not is_multiprocess_state(like):
        return load(None)
    agreement, loaded, failure = AllOrNone(f"load {path.name}"), None, None
    try:
        loaded = load(agreement)
    except Exception as error:  # including bugs, which would leave the other processes waiting
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
    """Returns which of the fields a source can hold; if everything was requested, warns about the others."""
    if not isinstance(source, WeightsFile):
        return fields
    if everything:
        left = ", ".join(sorted(fields.difference(WEIGHTS)))
        warn(f"`{source.path}` holds weights only; not loaded: {left}. They stay as they were.")
        return fields.intersection(WEIGHTS)
    return fields


def _fitted(source: Source, like: TrainState, fields: set[str], *, strict: bool = True) -> tuple[TrainState, str]:
    """Returns the state, and a description of what was not loaded because it does not fit."""
    leaves, structure = jax.tree.flatten_with_path(like)
    wanted = {parts_of(keys): leaf for keys, leaf in leaves}
    found = {key: leaf for key, leaf in source.leaves.items() if key[0] in fields}
    unfit = dict(_mismatches({key: leaf for key, leaf in wanted.items() if key[0] in fields}, found))
    # A run may be resumed with a guard added or removed.
    problems = {key: problem for key, problem in unfit.items() if key[0] != "extensions" or key[1] not in RECORDS}
    shown = "; ".join(list(problems.values())[:20])
    shown += f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
    if problems and strict:
        raise CheckpointError(f"`{source.path}` does not fit the state: {shown}.")
    loaded = source.read({key: leaf for key, leaf in wanted.items() if key in found and key not in unfit})
    new = [loaded[key] if key in loaded else _kept(leaf) for key, leaf in wanted.items()]
    return cast(TrainState, jax.tree.unflatten(structure, new)), shown


def _kept(leaf: Any) -> Any:
    return leaf if isinstance(leaf, jax.ShapeDtypeStruct) else jnp.array(leaf, copy=True)


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
