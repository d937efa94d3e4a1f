"""Checks that replicated parts of arrays have the same bits in every process."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from trainer.core.checksums import digests_as_text
from trainer.core.tree_paths import leaf_path
from trainer.distributed.agreement import AllOrNone, who_holds_what
from trainer.distributed.rounds import exchange
from trainer.errors import DistributedError

_MOST_NAMED = 5


def check_replicas(tree: Any, *, timeout_seconds: float = 300.0) -> None:
    """Raises in all processes if arrays that they replicate differ between them.

    JAX assumes that a replicated array has the same values on all devices. Processes that initialize from
    different seeds, or restore different files, break this: they train on with params that never agree.

    Each process computes checksums of its parts, on the devices that hold them. For each set of processes that share
    parts, one 64-bit checksum is exchanged; names of arrays are exchanged only if it differs. Parts held by a single
    process are not compared, and neither are arrays local to one process.

    Args:
        tree: A pytree, such as a `trainer.TrainState`. Each process passes its own.
        timeout_seconds: How long to wait for the other processes.

    Raises:
        DistributedError: Arrays differ; it names up to five, and which processes hold which values. Or not all
            processes called this in time, or one failed to compute its checksums.
    """
    if jax.process_count() == 1:
        return
    mine: dict[str, dict[str, str]] = {}
    failure: Exception | None = None
    try:
        mine = _shared_parts(tree)
    except Exception as error:
        failure = error
    AllOrNone("checksums of replicas", timeout_seconds=timeout_seconds).sync(failure)
    sums = {members: _digest_of_all(parts) for members, parts in mine.items()}
    held = exchange("replicas", sums, timeout_seconds).values
    groups = sorted(members for members in set().union(*held.values()) if _differences(held, members, [members]))
    if not groups:
        return
    held = exchange("parts that differ", {members: mine.get(members, {}) for members in groups}, timeout_seconds).values
    differing: list[str] = []
    for members in groups:
        parts = {process: of_process[members] for process, of_process in held.items()}
        differing += _differences(parts, members, dict.fromkeys(name for one in parts.values() for name in one))
    more = f"; and {len(differing) - _MOST_NAMED} more" if len(differing) > _MOST_NAMED else ""
    raise DistributedError(
        f"The processes hold different values of the same arrays (told by checksums): "
        f"{'; '.join(differing[:_MOST_NAMED])}{more}. Initialize all of them from the same key, and restore the same "
        f"checkpoint in each."
    )


def _differences(held: Mapping[int, Mapping[str, str]], members: str, names: Iterable[str]) -> list[str]:
    """Describes the values of each name for which the members of a group hold different ones."""
    processes = [int(process) for process in members.split(",")]
    found = ((name, who_holds_what({process: held[process].get(name) for process in processes})) for name in names)
    return [f"`{name}` is {holders}" for name, holders in found if holders]


def _digest_of_all(parts: Mapping[str, str]) -> str:
    return hashlib.sha256(repr(sorted(parts.items())).encode()).hexdigest()[:16]


def _shared_parts(tree: Any) -> dict[str, dict[str, str]]:
    """Returns the digests of array parts that this process shares with others.

    They are grouped by the sharing processes, as "0,1", and named by array and part.
    """
    shared: dict[str, dict[str, str]] = {}
    found: list[tuple[str, str, jax.Array]] = []
    for path, leaf in jax.tree.leaves_with_path(tree):
        if not isinstance(leaf, jax.Array) or leaf.sharding.is_fully_addressable:
            continue
        array = jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        holders = _processes_by_part(array)
        own = {_text(shard.index, array): shard.data for shard in array.addressable_shards}
        for part, data in own.items():
            if len(holders[part]) > 1:
                found.append((",".join(map(str, sorted(holders[part]))), leaf_path(path) + part, data))
    digests = digests_as_text([data for *_, data in found])
    for (members, name, _), digest in zip(found, digests, strict=True):
        shared.setdefault(members, {})[name] = digest
    return shared


def _processes_by_part(array: jax.Array) -> dict[str, set[int]]:
    """Returns the processes that hold each part of an array."""
    devices: Iterable[Any] = array.sharding.device_set
    if array.is_fully_replicated:  # skips a loop over possibly thousands of devices
        return {"": {device.process_index for device in devices}}
    holders: dict[str, set[int]] = {}
    held: Mapping[Any, Any] = array.sharding.devices_indices_map(array.shape)
    for device, index in held.items():
        holders.setdefault(_text(index, array), set()).add(device.process_index)
    return holders


def _text(index: tuple[slice, ...] | None, array: jax.Array) -> str:
    """Formats a part as ``[0:8, :]``, the whole array as an empty string."""
    if array.is_fully_replicated:
        return ""
    ranges = (one.indices(size) for one, size in zip(index or (), array.shape, strict=True))
    return f"[{', '.join(f'{start}:{stop}' for start, stop, _ in ranges)}]"
