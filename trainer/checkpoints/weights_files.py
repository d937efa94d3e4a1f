"""Weights files that other programs read: ``.safetensors``, and NumPy's ``.npz``.

Both hold only what a model computes with: its params and model state. Neither has our checksums. Names in a
``.safetensors`` file are the model's attributes joined by dots (``layers.0.kernel``), as other programs write them;
its metadata holds our descriptions of the arrays. A ``.npz`` file has no place for descriptions: its names are full
paths (``params/layers/0/kernel``), and keys are stored as key data.
"""

import io
import json
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

from trainer.checkpoints.atomic import replacing
from trainer.checkpoints.file_format import DTYPES, MAGIC, Leaf, leaf_from_record, leaf_to_record
from trainer.core.tree_paths import LeafPath, parts_of
from trainer.errors import ArgumentError, CheckpointError, UnreadableError
from trainer.sharding.arrays import place_like
from trainer.state import TrainState

WEIGHTS = ("params", "model_state")
"""The state fields that weights files hold."""

_LEAF_RECORDS = "nnx-trainer"
"""The key in the metadata of a ``.safetensors`` file for our descriptions of its arrays."""

Described = tuple[Leaf, Callable[[], np.ndarray[Any, Any]]]
"""A description, and a function that returns the array."""


class WeightsFile:
    """A weights file as a `trainer.checkpoints.open.Source`.

    Args:
        path: The file.
        kind: "safetensors" or "npz".
        like: A state of the same model. It tells which names are params and which integers are keys, if the file
            does not. Without it, everything that another program wrote counts as params.

    Raises:
        ArgumentError: The package safetensors is missing.
        UnreadableError: The file is damaged, or holds something other than arrays.
    """

    def __init__(self, path: Path, kind: str, like: TrainState | None = None) -> None:
        self.path = path
        self.info: Mapping[str, Any] = {}
        records: dict[str, Leaf] = {}
        safetensors = _import_safetensors() if kind == "safetensors" else None
        try:
            if safetensors is not None:
                with safetensors.safe_open(path, framework="numpy") as file:
                    self._arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118, no mapping
                    about = dict(file.metadata() or {})
                described = json.loads(about.pop(_LEAF_RECORDS, "{}"))
                records = {name: leaf_from_record(record) for name, record in described.items()}
                self.info = about
            else:
                with np.load(path, allow_pickle=False) as file:
                    self._arrays = {name: file[name] for name in file.files}
        except Exception as error:  # safetensors raises its own errors from Rust; zipfile and NumPy raise many types
            raise UnreadableError(f"`{path}` could not be read: {error}") from error
        for name, array in self._arrays.items():
            if not isinstance(array, np.ndarray):  # if a member is not an array, NumPy returns its bytes
                raise UnreadableError(f"`{path}` is an archive of other things than arrays: `{name}` is none.")
        known = {} if like is None else _known_names(like)
        self.leaves: dict[LeafPath, Leaf] = {}
        self._names: dict[LeafPath, str] = {}
        for name, array in self._arrays.items():
            place, record = known.get(name), records.get(name)
            leaf = place or record or _guess_leaf(name)
            leaf = _with_array(leaf.path, (record or leaf).key, array, path)
            if leaf.path in self.leaves:
                raise UnreadableError(f"`{path}` has two arrays for `{leaf.name}`.")
            self.leaves[leaf.path], self._names[leaf.path] = leaf, name

    def read(self, wanted: Mapping[LeafPath, jax.Array | None]) -> dict[LeafPath, Any]:
        """Returns arrays, each placed like its template."""
        arrays = {path: self._arrays[self._names[path]] for path in wanted}
        return {path: arrays[path] if like is None else place_like(arrays[path], like) for path, like in wanted.items()}

    def verify(self) -> None:
        """Raises `CheckpointError`: the file has no checksums."""
        raise CheckpointError(f"`{self.path}` has no checksums; a checkpoint in another format has.")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *about: object) -> None:
        del about


def weights_kind(path: Path) -> str | None:
    """Returns "safetensors" or "npz" for a file with that format's magic or suffix; None for any other."""
    try:
        if not path.is_file():
            return None  # opening a named pipe would block
        with path.open("rb") as file:
            head, size = file.read(9), path.stat().st_size
    except OSError:
        return None
    if head[:8] == MAGIC:
        return None
    if head[:4] in (b"PK\3\4", b"PK\5\6"):
        return "npz"
    # safetensors: the length of the JSON header, then the header.
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") <= size - 8:
        return "safetensors"
    return {".safetensors": "safetensors", ".npz": "npz"}.get(path.suffix.lower())


def write_safetensors(path: Path, info: Mapping[str, Any], leaves: Sequence[Described]) -> None:
    """Writes the weights among ``leaves``, named by the model's attributes.

    Raises:
        ArgumentError: The package safetensors is missing.
        CheckpointError: Two arrays get the same name, or the format lacks a dtype.
        OSError: The write failed; any existing file is unchanged.
    """
    safetensors = _import_safetensors()
    named = _named(path, leaves, lambda leaf: ".".join(map(str, leaf.path[1:])))
    about = {name: value if isinstance(value, str) else json.dumps(value, default=str) for name, value in info.items()}
    about[_LEAF_RECORDS] = json.dumps({name: leaf_to_record(leaf) for name, (leaf, _) in named.items()})
    # safetensors writes the buffer of an array and ignores its strides.
    arrays = {name: np.asarray(get(), order="C") for name, (_, get) in named.items()}
    try:
        data = safetensors.numpy.save(arrays, about)
    except Exception as error:  # safetensors raises its own errors from Rust
        raise CheckpointError(f"`{path}` could not be written, safetensors says: {error!r}") from error
    _replace(path, data)


def write_npz(path: Path, info: Mapping[str, Any], leaves: Sequence[Described]) -> None:
    """Writes the weights among ``leaves`` under their full paths; arguments and errors as `write_safetensors`."""
    del info  # .npz has no place for it
    named = _named(path, leaves, lambda leaf: leaf.name)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, (leaf, get) in named.items():
            array = np.asarray(get())
            if array.dtype.kind not in "biufc":  # NumPy would write it, but read it back as raw bytes
                raise CheckpointError(
                    f"`{leaf.name}` has dtype {array.dtype.name}, which .npz lacks; write `{path.stem}.safetensors`."
                )
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    _replace(path, buffer.getbuffer())


def _replace(path: Path, data: Any) -> None:
    with replacing(path, len(data)) as file:
        file.write(data)


def _named(path: Path, leaves: Sequence[Described], name_of: Callable[[Leaf], str]) -> dict[str, Described]:
    weights = [(leaf, get) for leaf, get in leaves if leaf.path[0] in WEIGHTS]
    named = {name_of(leaf): (leaf, get) for leaf, get in weights}
    if len(named) < len(weights):
        raise CheckpointError(f"`{path}` would have two arrays of one name once the parts of their paths are joined.")
    return named


def _known_names(like: TrainState) -> dict[str, Leaf]:
    """Returns the leaves of a state by their names in either kind of file."""
    known = {}
    for keys, leaf in jax.tree.leaves_with_path(like):
        path = parts_of(keys)
        if path[0] in WEIGHTS:
            is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
            described = Leaf(path, "", (), str(jax.random.key_impl(leaf)) if is_key else None)
            known[described.name] = known[".".join(map(str, path[1:]))] = described
    return known


def _guess_leaf(name: str) -> Leaf:
    """Describes an array from its name alone; numbers are indices."""
    parts = [int(part) if part.isdecimal() else part for part in name.split("/" if "/" in name else ".")]
    return Leaf(tuple(parts) if parts[0] in WEIGHTS and len(parts) > 1 else ("params", *parts), "", ())


def _with_array(path: LeafPath, key: str | None, array: np.ndarray[Any, Any], file: Path) -> Leaf:
    leaf = Leaf(path, array.dtype.name, array.shape, key)
    if leaf.dtype not in DTYPES:
        raise CheckpointError(f"`{file}`: `{leaf.name}` has dtype {leaf.dtype}, which checkpoints do not know.")
    return leaf


def _import_safetensors() -> Any:
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ArgumentError(
            "files that end in .safetensors need the package safetensors; run `pip install safetensors`."
        ) from error
    return safetensors
