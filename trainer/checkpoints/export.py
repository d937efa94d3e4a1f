"""Converts checkpoints between formats without a model: our files, Orbax directories and weights files.

Our files and Orbax directories hold the same contents, so converting between them loses nothing. Weights files
(``.safetensors``, ``.npz``) hold only the params and the model state.
"""

import functools
import os
from pathlib import Path
from typing import Any

import numpy as np

from trainer.checkpoints.file_format import Leaf, write_bundle
from trainer.checkpoints.names import suffix_of
from trainer.checkpoints.open import Source, is_pickle, open_source
from trainer.checkpoints.orbax_directory import write_directory
from trainer.checkpoints.weights_files import WEIGHTS, Described, write_npz, write_safetensors
from trainer.errors import ArgumentError, CheckpointError
from trainer.paths import in_home


def convert(source: str | os.PathLike[str], target: str | os.PathLike[str]) -> list[str]:
    """Writes the contents of one checkpoint in another format.

    Args:
        source: One of our files, an Orbax directory, or a weights file. The contents decide the format.
        target: A path ending in ``.msgpack``, ``.safetensors``, ``.npz`` or ``.orbax``. A path without a suffix is an
            Orbax directory. An existing file is replaced atomically; an existing directory is refused.

    Returns:
        What the source holds but the target cannot: names of state fields, and "progress".

    Raises:
        ArgumentError: ``target`` has another suffix, or either is a pickle.
        CheckpointError: ``source`` cannot be used or ``target`` cannot be written.
    """
    source, target = Path(in_home(source)), Path(in_home(target))
    suffix = suffix_of(target)
    if suffix == ".pkl":
        raise ArgumentError(
            f"`{target}` is a pickle, whose layout depends on the classes of the optimizer's state; load "
            f'`{source}` into a state of the model and call `save_state("{target.name}", state)`.'
        )
    if suffix not in _WRITERS:
        endings = ", ".join(filter(None, _WRITERS))
        raise ArgumentError(
            f"`{target}` ends in {target.suffix!r}; known: {endings}, and no ending, which is an Orbax directory too."
        )
    with _open(source) as opened:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _WRITERS[suffix](target, opened)
        except (OSError, ValueError, TypeError) as error:
            if isinstance(error, ArgumentError | CheckpointError):
                raise
            raise CheckpointError(f"`{target}` could not be written: {error}") from error
        fields = dict.fromkeys(str(path[0]) for path in opened.leaves)
        return [field for field in fields if suffix in (".safetensors", ".npz") and field not in WEIGHTS]


def _open(path: Path) -> Source:
    if is_pickle(path):
        # A pickle does not record which variables are params, nor the names of the optimizer's fields.
        raise ArgumentError(
            f"`{path}` is a pickle, which cannot be read without the model; call "
            f'`save_state("x.msgpack", load_state("{path.name}", like=state))` with a state of the model and optimizer.'
        )
    return open_source(path)


def _write_file(path: Path, source: Source) -> None:
    write_bundle(path, source.info, _described(source))


def _write_directory(path: Path, source: Source) -> None:
    if path.exists():
        raise CheckpointError(f"`{path}` exists already; a directory is not replaced.")
    write_directory(path, source.info, [(leaf, _read(source, leaf)) for leaf in source.leaves.values()])


def _write_safetensors(path: Path, source: Source) -> None:
    write_safetensors(path, source.info, _described(source))


def _write_npz(path: Path, source: Source) -> None:
    write_npz(path, source.info, _described(source))


_WRITERS = {
    ".msgpack": _write_file,
    ".safetensors": _write_safetensors,
    ".npz": _write_npz,
    ".orbax": _write_directory,
    "": _write_directory,
}


def _described(source: Source) -> list[Described]:
    return [(leaf, functools.partial(_read, source, leaf)) for leaf in source.leaves.values()]


def _read(source: Source, leaf: Leaf) -> np.ndarray[Any, Any]:
    array: np.ndarray[Any, Any] = source.read({leaf.path: None})[leaf.path]
    return array
