"""Checkpoints: the state, written to one file and read back into an equal one.

The file is a MessagePack map: ``format``, ``version``, ``info`` (step, name, library versions), and
``leaves``, one ``[path, dtype, shape, key implementation or nil, little-endian bytes]`` per array,
in the order in which JAX flattens the state. It holds data only: reading one runs no code, and the
structure comes from the state that it is loaded into.
"""

import importlib.metadata
import os
import re
import secrets
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, cast

import jax
import jax.numpy as jnp
import msgpack
import numpy as np

from trainer.errors import CheckpointError, leaf_path
from trainer.state import TrainState

FORMAT = "nnx-trainer checkpoint"
VERSION = 1

_OWN_NAME = re.compile(r"checkpoint_(\d+)\.msgpack")


def save_state(path: str | os.PathLike[str], state: TrainState, info: Mapping[str, Any] | None = None) -> Path:
    """Writes ``state`` to a file, which is either there as a whole or not at all.

    The bytes go to a temporary file in the same directory, are flushed to the disk, and then take
    the name; an earlier file of that name stays until that moment.

    Args:
        path: The file. Its directory is made if it is missing.
        state: The state. Its arrays are copied to the host, one at a time.
        info: Plain values to keep beside it.

    Returns:
        The path.

    Raises:
        CheckpointError: The file could not be written; what was there before is untouched.
        StateError: The state was donated to a step.
    """
    path = Path(path)
    state.check_alive()
    if path.suffix == ".pkl":
        raise CheckpointError(f"`{path}`: the pickle layout is not supported by this version; use the suffix .msgpack.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
        try:
            with temporary.open("xb") as file:
                _write(file, state, info or {})
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_directory(path.parent)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"`{path}` could not be written: {error}") from error
    return path


def load_state(path: str | os.PathLike[str], like: TrainState) -> TrainState:
    """Reads a state of the same structure as ``like``, which stays as it is.

    Args:
        path: A file written by `save_state`.
        like: A state of the same model, optimizer and extensions. Its values do not matter.

    Returns:
        A new state, each array where its counterpart in ``like`` is.

    Raises:
        CheckpointError: The file is missing, damaged, of another kind or version, or does not fit;
            every array that does not fit is named.
    """
    path = Path(path)
    bundle = _read(path)
    wanted, structure = jax.tree.flatten_with_path(like)
    found = {leaf[0]: leaf for leaf in bundle["leaves"]}
    problems = list(_mismatches(wanted, found))
    if problems:
        shown = "; ".join(problems[:20]) + (f"; and {len(problems) - 20} more" if len(problems) > 20 else "")
        raise CheckpointError(f"`{path}` does not fit the state: {shown}.")
    leaves = [_place(found[leaf_path(keys)][4], leaf) for keys, leaf in wanted]
    return cast(TrainState, jax.tree.unflatten(structure, leaves))


def prune(directory: Path, keep: int) -> None:
    """Removes all but the ``keep`` latest checkpoints with default names, and nothing else."""
    steps = sorted(int(m[1]) for name in os.listdir(directory) if (m := _OWN_NAME.fullmatch(name)))
    for step in steps[:-keep]:
        (directory / default_name(step)).unlink(missing_ok=True)


def default_name(step: int) -> str:
    """Returns the name of the checkpoint of a step where the caller gives none."""
    return f"checkpoint_{step}.msgpack"


def _write(file: BinaryIO, state: TrainState, info: Mapping[str, Any]) -> None:
    packer = msgpack.Packer()
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax")}
    about = {"step": int(state.step), "versions": versions, **info}
    file.write(packer.pack_map_header(4))
    for key, value in (("format", FORMAT), ("version", VERSION), ("info", about), ("leaves", None)):
        file.write(packer.pack(key))
        if value is not None:
            file.write(packer.pack(value))
    leaves = jax.tree.leaves_with_path(state)
    file.write(packer.pack_array_header(len(leaves)))
    for keys, leaf in leaves:
        dtype, shape, implementation = _signature(leaf)
        data = np.asarray(jax.random.key_data(leaf) if implementation else leaf)
        file.write(packer.pack([leaf_path(keys), dtype, shape, implementation, data.tobytes()]))


def _read(path: Path) -> dict[str, Any]:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"`{path}` could not be read: {error}") from error
    try:
        bundle = msgpack.unpackb(data, max_bin_len=len(data), max_str_len=len(data))
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise CheckpointError(f"`{path}` is damaged or no checkpoint: {error!r}.") from error
    if not isinstance(bundle, dict) or bundle.get("format") != FORMAT:
        raise CheckpointError(f"`{path}` is no checkpoint of this library.")
    if bundle.get("version") != VERSION:
        raise CheckpointError(
            f"`{path}` has format version {bundle.get('version')}; this release reads version {VERSION}."
        )
    leaves = bundle.get("leaves")
    if not isinstance(leaves, list) or not all(_is_record(leaf) for leaf in leaves):
        raise CheckpointError(f"`{path}` is damaged: its list of arrays cannot be understood.")
    return bundle


def _is_record(leaf: Any) -> bool:
    kinds = (str, str, list, str | None, bytes)
    return (
        isinstance(leaf, list)
        and len(leaf) == len(kinds)
        and all(isinstance(entry, kind) for entry, kind in zip(leaf, kinds, strict=True))
    )


def _mismatches(wanted: list[tuple[Any, Any]], found: dict[str, Any]) -> Iterator[str]:
    paths = [leaf_path(keys) for keys, _ in wanted]
    for path, (_, leaf) in zip(paths, wanted, strict=True):
        here = _signature(leaf)
        if path not in found:
            yield f"{path}: not in the file, {_describe(here)} here"
            continue
        _, dtype, shape, implementation, data = found[path]
        there = (dtype, shape, implementation)
        if there != here:
            yield f"{path}: {_describe(there)} in the file, {_describe(here)} here"
        elif len(data) != _host_type(leaf).itemsize * int(np.prod(_host_shape(leaf))):
            yield f"{path}: {len(data)} bytes in the file, which is not {_describe(here)}"
    for path in found.keys() - set(paths):
        yield f"{path}: {_describe(tuple(found[path][1:4]))} in the file, nothing here"


def _signature(leaf: jax.Array) -> tuple[str, list[int], str | None]:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return "key", list(leaf.shape), str(jax.random.key_impl(leaf))
    return str(leaf.dtype), list(leaf.shape), None


def _describe(signature: tuple[str, list[int], str | None]) -> str:
    dtype, shape, implementation = signature
    described = dtype if implementation is None else f"{dtype}<{implementation}>"
    return f"({', '.join(map(str, shape))}{',' if len(shape) == 1 else ''}) {described}"


def _host_type(leaf: jax.Array) -> np.dtype[Any]:
    is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
    return np.dtype(np.uint32) if is_key else np.dtype(leaf.dtype)


def _host_shape(leaf: jax.Array) -> tuple[int, ...]:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return tuple(jax.eval_shape(jax.random.key_data, leaf).shape)
    return tuple(leaf.shape)


def _place(data: bytes, like: jax.Array) -> jax.Array:
    # The dtype is the live one, which the file was found to agree with: never one that a file names.
    array = jnp.array(np.frombuffer(data, _host_type(like)).reshape(_host_shape(like)), copy=True)
    if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
        array = jax.random.wrap_key_data(array, impl=jax.random.key_impl(like))
    # An uncommitted array must stay so, or the compiled step would see another kind of argument.
    return jax.device_put(array, like.sharding) if like.committed else array


def _sync_directory(directory: Path) -> None:
    if not hasattr(os, "O_DIRECTORY"):  # Windows cannot open one
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
