"""Saving: the arrays and the run record are described and copied as a `Snapshot`, then written in any format."""

import dataclasses
import datetime
import functools
import importlib.metadata
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import jax
import numpy as np

from trainer.checkpoints.atomic import replacing
from trainer.checkpoints.file_format import DTYPES, Leaf, write_bundle
from trainer.checkpoints.names import refuse_foreign, suffix_of
from trainer.checkpoints.open import PROGRESS, describe
from trainer.checkpoints.plain_values import pack, to_plain
from trainer.checkpoints.weights_files import write_safetensors
from trainer.core.tree_paths import parts_of
from trainer.distributed.agreement import AllOrNone
from trainer.errors import ArgumentError, CheckpointError, warn
from trainer.sharding.arrays import is_multiprocess
from trainer.state import TrainState, step_of

Progress = Mapping[str, Any] | Callable[[], bytes] | None
"""Plain values, or a function that packs them. With several processes, an error in one is raised in all."""


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """Descriptions and arrays, ready to be written.

    Attributes:
        state: The state.
        info: Plain values about it, for people.
        leaves: The arrays with their descriptions, keys as their key data.
        finish: Finishes the directory in flight, if Orbax has the copies.
        claim: Called right before a file or directory of ours gets its name; see `trainer.checkpoints.atomic`.
    """

    state: TrainState
    info: dict[str, Any]
    leaves: Sequence[tuple[Leaf, Any]]
    finish: Callable[[], None] | None = None
    claim: Callable[[], None] | None = None

    def begin(self, path: Path) -> "Snapshot":
        """Copies all arrays now, so that the state may be donated before `write_snapshot` finishes the directory.

        If the state spans several processes, each copies its own part.

        Raises:
            CheckpointError: The directory cannot be written.
        """
        return dataclasses.replace(self, finish=_begin_directory(path, self))


def _begin_directory(path: Path, snapshot: Snapshot) -> Callable[[], None]:
    from trainer.checkpoints.orbax_directory import begin_directory  # lazy, since few runs need it

    return begin_directory(path, snapshot.info, snapshot.leaves, snapshot.claim)


def take_snapshot(state: TrainState, info: Mapping[str, Any] | None = None, *, progress: Progress = None) -> Snapshot:
    """Describes a state for `write_snapshot`; arguments as for `save_state`. Copies no array.

    Raises:
        CheckpointError: An array's dtype, or a value in ``info`` or ``progress``, cannot be stored in any file.
        StateError: The state was donated to a step.
    """
    if not is_multiprocess_state(state):
        return _snapshot(state, info, progress)
    described, snapshot, failure = AllOrNone("snapshot"), None, None
    try:
        snapshot = _snapshot(state, info, progress)
    except Exception as error:  # whatever the error, the other processes must not wait for this one
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
    to_plain(info or {}, "info")  # raises before anything is copied
    about = {
        "step": step_of(state),
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds"),
        "versions": versions(),
        **(info or {}),
    }
    if progress is not None:
        data = progress() if callable(progress) else pack(progress, "progress")
        packed = np.frombuffer(data, np.uint8)
        leaves.append((Leaf(PROGRESS, "uint8", packed.shape), packed))
    return Snapshot(state, about, leaves)


def write_snapshot(path: Path, snapshot: Snapshot) -> None:
    """Writes a snapshot in the format of the suffix, see `save_state`.

    A ``.safetensors`` path warns about what the file leaves out.

    Raises:
        ArgumentError: The suffix is that of another program's format.
        CheckpointError: The write failed; any existing file is unchanged. Or an array spans several
            processes, which only ``.orbax`` supports.
    """
    refuse_foreign(path)
    suffix = suffix_of(path)
    if suffix == ".orbax":
        finish = snapshot.finish or _begin_directory(path, snapshot)
        finish()
        return
    for leaf, array in snapshot.leaves:
        check_within_process(leaf.name, array)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        leaves = [(leaf, functools.partial(_to_host, array)) for leaf, array in snapshot.leaves]
        if suffix == ".pkl":
            from trainer.checkpoints.reference_pickle import write_pickle  # lazy, since few runs need it

            with replacing(path, 0) as file:
                write_pickle(cast(BinaryIO, file), snapshot.state)
        elif suffix == ".safetensors":
            write_safetensors(path, snapshot.info, leaves)
            warn(
                f"`{path}` holds the params and the model state of step {snapshot.info['step']}, and nothing to "
                f"continue a run with; save a name in .msgpack as well for that."
            )
        else:
            write_bundle(path, snapshot.info, leaves, snapshot.claim)
    except (OSError, ValueError, TypeError) as error:
        if isinstance(error, ArgumentError | CheckpointError):
            raise
        raise CheckpointError(f"`{path}` could not be written: {error}") from error


def is_multiprocess_state(state: TrainState) -> bool:
    """Tells whether any array of a state spans several processes."""
    return any(map(is_multiprocess, jax.tree.leaves(state)))


def check_within_process(name: str, array: Any) -> None:
    """Refuses an array that a file cannot hold because no process has all of it."""
    if is_multiprocess(array):
        raise CheckpointError(
            f"`{name}` is sharded over several processes, which one file cannot hold; save under a name that "
            f"ends in .orbax, in every process."
        )


def _to_host(array: Any) -> np.ndarray[Any, Any]:
    if isinstance(array, jax.Array) and array.is_fully_replicated:
        # An array caches its host copy. The cache of its first shard is freed along with the shard.
        return np.asarray(array.addressable_data(0))
    return np.asarray(array)


def copied_to_host(array: Any) -> np.ndarray[Any, Any]:
    """Returns a copy that survives the donation of the array."""
    host = _to_host(array)
    # For a whole array in host memory (on the CPU, or offloaded), NumPy returns a view of the device's buffer.
    # Otherwise `host` is already a copy, assembled or transferred.
    is_view = isinstance(array, jax.Array) and array.is_fully_replicated and is_in_host_memory(array)
    return host.copy() if is_view else host


def is_in_host_memory(array: jax.Array) -> bool:
    """Tells whether an array is in host memory: on the CPU, or offloaded by an accelerator."""
    devices: Any = array.sharding.device_set
    platforms = {device.platform for device in devices}
    return "cpu" in platforms or "host" in (array.sharding.memory_kind or "")


def versions() -> dict[str, str]:
    """Returns the versions of this library and its dependencies."""
    return {name: _version(name) for name in ("nnx-trainer", "jax", "flax", "optax", "numpy")}


@functools.cache  # each lookup parses a file
def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # running from an uninstalled checkout
        return "unknown"
