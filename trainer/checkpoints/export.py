"""A checkpoint in one format made from one in another, without a model.

Nothing is lost between our files, Orbax directories and pickles in the reference's layout, but what the
format has no place for: a pickle holds no progress and no extension weights, ``.safetensors`` holds the
parameters and nothing else.
"""

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import jax
import numpy as np

from trainer.checkpoints.atomic import replacing
from trainer.checkpoints.containers import rebuild
from trainer.checkpoints.file_format import DTYPES, Leaf, leaf_from_record, leaf_to_record, write_bundle
from trainer.checkpoints.open import PROGRESS, Source, is_pickle, open_source
from trainer.checkpoints.orbax_directory import write_directory
from trainer.checkpoints.reference_pickle import write_pickle
from trainer.errors import ArgumentError, CheckpointError
from trainer.state import TrainState
from trainer.tree_paths import LeafPath

_PATHS = "nnx-trainer"


def convert(
    source: str | os.PathLike[str], target: str | os.PathLike[str], *, like: str | os.PathLike[str] | None = None
) -> None:
    """Writes what one checkpoint holds as another.

    Args:
        source: Of any kind. What is inside tells which, except for ``.safetensors``, which has no mark.
        target: A name that ends in ``.msgpack``, ``.pkl`` or ``.safetensors``, or in ``.orbax`` or without an
            ending, for a directory of Orbax. It is replaced as a whole, but a directory must not exist yet.
        like: A checkpoint of the same model and optimizer, in our format or Orbax's, for a ``source`` that is
            a pickle: that tells neither which variables are parameters nor what the optimizer calls its fields.

    Raises:
        ArgumentError: ``target`` names no format, or ``like`` is missing.
        CheckpointError: ``source`` cannot be used or ``target`` cannot be written.
    """
    source, target = Path(source), Path(target)
    if target.suffix not in _WRITERS:
        endings = ", ".join(filter(None, _WRITERS))
        raise ArgumentError(
            f"`{target}` ends in {target.suffix!r}; known: {endings}, and none, which is a directory of Orbax too."
        )
    with _open(source, like) as opened:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _WRITERS[target.suffix](target, opened)
        except (OSError, ValueError, TypeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"`{target}` could not be written: {error}") from error


class _Params:
    """The parameters in a ``.safetensors`` file, which has no checksums."""

    def __init__(self, path: Path) -> None:
        safetensors = _safetensors()
        self.path = path
        self.info: Mapping[str, Any] = {}
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                self._arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, it is no mapping
                about = json.loads((file.metadata() or {}).get(_PATHS, "{}"))
            records = {name: leaf_from_record(record) for name, record in about.items()}
        except Exception as error:  # safetensors has errors of its own, in Rust
            raise CheckpointError(f"`{path}` could not be read: {error}") from error
        named = {name: records.get(name) or _leaf_of(name, array) for name, array in self._arrays.items()}
        self.leaves = {leaf.path: leaf for leaf in named.values()}
        self._names = {leaf.path: name for name, leaf in named.items()}

    def read(self, wanted: Mapping[LeafPath, jax.Array | None]) -> dict[LeafPath, Any]:
        return {path: self._arrays[self._names[path]] for path in wanted}

    def verify(self) -> None:
        raise CheckpointError(f"`{self.path}` has no checksums.")

    def __enter__(self) -> "_Params":
        return self

    def __exit__(self, *about: object) -> None:
        del about


def _open(path: Path, like: str | os.PathLike[str] | None) -> Source:
    if path.suffix == ".safetensors":
        return _Params(path)
    if not is_pickle(path):
        return open_source(path)
    if like is None:
        raise ArgumentError(
            f"`{path}` is a pickle, which tells neither which variables are parameters nor what the optimizer calls "
            f"its fields; pass `like`, a checkpoint of the same model and optimizer in another format."
        )
    with open_source(like) as template:
        return open_source(path, _state_of(template))


def _state_of(source: Source) -> TrainState:
    """Makes a state of NumPy arrays; only keys are of JAX."""
    leaves = {path: leaf for path, leaf in source.leaves.items() if path != PROGRESS}
    arrays = source.read(dict.fromkeys(leaves))
    for path, leaf in leaves.items():
        if leaf.key is not None:
            arrays[path] = jax.random.wrap_key_data(arrays[path], impl=leaf.key)
    tree = rebuild(arrays, source.info.get("containers", ()))
    fields = {name: tree.get(name, {}) for name in ("params", "model_state", "opt_state", "extensions")}
    for extension in fields["extensions"].values():
        extension.setdefault("variables", {})
    for name in ("rng", "step"):
        if name not in tree:
            raise CheckpointError(f"`{source.path}` holds no `{name}`: it is a part of a checkpoint only.")
    return TrainState(**fields, rng=tree["rng"], step=tree["step"], graphdef=cast(Any, None))


def _to_file(path: Path, source: Source) -> None:
    write_bundle(path, source.info, [(leaf, functools.partial(_read, source, leaf)) for leaf in source.leaves.values()])


def _to_pickle(path: Path, source: Source) -> None:
    with replacing(path, 0) as file:
        write_pickle(cast(BinaryIO, file), _state_of(source))


def _to_params(path: Path, source: Source) -> None:
    safetensors = _safetensors()
    params = {leaf: ".".join(map(str, leaf.path[1:])) for leaf in source.leaves.values() if leaf.path[0] == "params"}
    if len(set(params.values())) < len(params):
        raise CheckpointError(f"`{source.path}` has two parameters of one name once their parts are joined by dots.")
    # That library writes memory as it lies, whatever the strides say.
    arrays = {name: np.ascontiguousarray(_read(source, leaf)) for leaf, name in params.items()}
    about = json.dumps({name: leaf_to_record(leaf) for leaf, name in params.items()})
    try:
        data = safetensors.numpy.save(arrays, {_PATHS: about})
    except Exception as error:
        raise CheckpointError(f"`{path}` could not be written, safetensors says: {error!r}") from error
    with replacing(path, len(data)) as file:
        file.write(data)


def _to_directory(path: Path, source: Source) -> None:
    if path.exists():
        raise CheckpointError(f"`{path}` exists already; a directory is not replaced.")
    leaves = list(source.leaves.values())
    write_directory(path, source.info, [(leaf, _read(source, leaf)) for leaf in leaves])


_WRITERS = {
    ".msgpack": _to_file,
    ".pkl": _to_pickle,
    ".safetensors": _to_params,
    ".orbax": _to_directory,
    "": _to_directory,
}


def _read(source: Source, leaf: Leaf) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = source.read({leaf.path: None})[leaf.path]
    return array


def _leaf_of(name: str, array: np.ndarray[Any, Any]) -> Leaf:
    """Describes an array of a file that somebody else wrote: dots separate, numbers are indices."""
    if array.dtype.name not in DTYPES:
        raise CheckpointError(f"`{name}` has dtype {array.dtype.name}, which checkpoints do not know.")
    parts = [int(part) if part.isdecimal() else part for part in name.split(".")]
    return Leaf(("params", *parts), array.dtype.name, array.shape)


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ArgumentError(
            "files that end in .safetensors need the package safetensors; run `pip install safetensors`."
        ) from error
    return safetensors
