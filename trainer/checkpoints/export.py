"""Converts checkpoints between formats without a model: our files, Orbax directories and ``.safetensors``.

Our files and Orbax directories hold the same, so nothing is lost between them. A ``.safetensors`` file holds the
parameters only.
"""

import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from trainer.checkpoints.atomic import replacing
from trainer.checkpoints.file_format import DTYPES, Leaf, leaf_from_record, leaf_to_record, write_bundle
from trainer.checkpoints.open import Source, is_pickle, open_source
from trainer.checkpoints.orbax_directory import write_directory
from trainer.core.tree_paths import LeafPath
from trainer.errors import ArgumentError, CheckpointError

_LEAF_RECORDS = "nnx-trainer"
"""The key under which the metadata of a ``.safetensors`` file holds our descriptions of its arrays."""


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> None:
    """Writes the contents of one checkpoint in another format.

    Args:
        source: One of our files, an Orbax directory or a ``.safetensors`` file. The contents decide the format,
            except for ``.safetensors``, which is recognized by its ending.
        target: A name that ends in ``.msgpack``, ``.safetensors`` or ``.orbax``. A name without an ending is an
            Orbax directory. An existing file is replaced atomically; an existing directory is refused.

    Raises:
        ArgumentError: ``target`` ends in something else, or either is a pickle.
        CheckpointError: ``source`` cannot be used or ``target`` cannot be written.
    """
    source, target = Path(source), Path(target)
    if target.suffix == ".pkl":
        raise ArgumentError(
            f"`{target}` is a pickle, whose layout depends on the classes of the optimizer's state; load "
            f'`{source}` into a state of the model and call `save_state("{target.name}", state)`.'
        )
    if target.suffix not in _WRITERS:
        endings = ", ".join(filter(None, _WRITERS))
        raise ArgumentError(
            f"`{target}` ends in {target.suffix!r}; known: {endings}, and no ending, which is an Orbax directory too."
        )
    with _open(source) as opened:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _WRITERS[target.suffix](target, opened)
        except (OSError, ValueError, TypeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"`{target}` could not be written: {error}") from error


class _Safetensors:
    """The parameters in a ``.safetensors`` file, as a `Source`. The format has no checksums."""

    def __init__(self, path: Path) -> None:
        safetensors = _import_safetensors()
        self.path = path
        self.info: Mapping[str, Any] = {}
        try:
            with safetensors.safe_open(path, framework="numpy") as file:
                self._arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, not a mapping
                about = json.loads((file.metadata() or {}).get(_LEAF_RECORDS, "{}"))
            records = {name: leaf_from_record(record) for name, record in about.items()}
        except Exception as error:  # safetensors raises its own errors, from Rust
            raise CheckpointError(f"`{path}` could not be read: {error}") from error
        named = {name: records.get(name) or _guess_leaf(name, array) for name, array in self._arrays.items()}
        self.leaves = {leaf.path: leaf for leaf in named.values()}
        self._names = {leaf.path: name for name, leaf in named.items()}

    def read(self, wanted: Mapping[LeafPath, jax.Array | None]) -> dict[LeafPath, Any]:
        return {path: self._arrays[self._names[path]] for path in wanted}

    def verify(self) -> None:
        raise CheckpointError(f"`{self.path}` has no checksums.")

    def __enter__(self) -> "_Safetensors":
        return self

    def __exit__(self, *about: object) -> None:
        del about


def _open(path: Path) -> Source:
    if path.suffix == ".safetensors":
        return _Safetensors(path)
    if is_pickle(path):
        # A pickle says neither which variables are parameters nor what the optimizer calls its fields.
        raise ArgumentError(
            f"`{path}` is a pickle, which cannot be read without the model; call "
            f'`save_state("x.msgpack", load_state("{path.name}", like=state))` with a state of the model and optimizer.'
        )
    return open_source(path)


def _write_file(path: Path, source: Source) -> None:
    write_bundle(path, source.info, [(leaf, functools.partial(_read, source, leaf)) for leaf in source.leaves.values()])


def _write_directory(path: Path, source: Source) -> None:
    if path.exists():
        raise CheckpointError(f"`{path}` exists already; a directory is not replaced.")
    write_directory(path, source.info, [(leaf, _read(source, leaf)) for leaf in source.leaves.values()])


def _write_safetensors(path: Path, source: Source) -> None:
    safetensors = _import_safetensors()
    params = {leaf: ".".join(map(str, leaf.path[1:])) for leaf in source.leaves.values() if leaf.path[0] == "params"}
    if len(set(params.values())) < len(params):
        raise CheckpointError(f"`{source.path}` has two parameters of one name once their parts are joined by dots.")
    # safetensors writes the buffer of an array and ignores its strides.
    arrays = {name: np.ascontiguousarray(_read(source, leaf)) for leaf, name in params.items()}
    about = json.dumps({name: leaf_to_record(leaf) for leaf, name in params.items()})
    try:
        data = safetensors.numpy.save(arrays, {_LEAF_RECORDS: about})
    except Exception as error:  # safetensors raises its own errors, from Rust
        raise CheckpointError(f"`{path}` could not be written, safetensors says: {error!r}") from error
    with replacing(path, len(data)) as file:
        file.write(data)


_WRITERS = {
    ".msgpack": _write_file,
    ".safetensors": _write_safetensors,
    ".orbax": _write_directory,
    "": _write_directory,
}


def _read(source: Source, leaf: Leaf) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = source.read({leaf.path: None})[leaf.path]
    return array


def _guess_leaf(name: str, array: np.ndarray[Any, Any]) -> Leaf:
    """Describes an array that another program wrote: dots separate the parts of a path, numbers are indices."""
    if array.dtype.name not in DTYPES:
        raise CheckpointError(f"`{name}` has dtype {array.dtype.name}, which checkpoints do not know.")
    parts = [int(part) if part.isdecimal() else part for part in name.split(".")]
    return Leaf(("params", *parts), array.dtype.name, array.shape)


def _import_safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ArgumentError(
            "files that end in .safetensors need the package safetensors; run `pip install safetensors`."
        ) from error
    return safetensors
