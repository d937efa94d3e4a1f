"""The coordination service of JAX: how processes talk to each other beside their devices.

This is the one module that touches the private client of the service (`jax._src.distributed`, seen in jax 0.10 and
0.11; Orbax takes the same one), and that reads the texts of its errors.
"""

import base64
import collections
from collections.abc import Sequence
from typing import Any

import jax
import msgpack

from trainer.errors import DistributedError

POLL_SECONDS = 1.0
"""How often a process looks for a message of another."""

_PREFIX = "trainer"


def coordination_service() -> Any:
    """Returns the client of JAX's coordination service."""
    from jax._src import distributed

    return distributed.global_state.client


def barrier(name: str, timeout_seconds: float = 300.0) -> None:
    """Waits until every process has come to the barrier of this name.

    It takes no device: computations that were dispatched before it may still be running.

    Args:
        name: The same in every process; it may be used again.
        timeout_seconds: How long to wait.

    Raises:
        DistributedError: Not all came in time. It names the processes that did not.
    """
    if jax.process_count() == 1:
        return
    try:
        coordination_service().wait_at_barrier(f"{_PREFIX}/{name}", int(timeout_seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        raise DistributedError(
            f"Not all {jax.process_count()} processes came to the barrier {name!r} within {timeout_seconds:g} s. "
            f"They may have taken different ways through the program, or be busy: {error}"
        ) from error


def exchange(key: str, value: Any, timeout_seconds: float) -> dict[int, Any]:
    """Returns the value of each process by its index. All processes call it, with a key that is used once.

    Args:
        key: The name of the exchange.
        value: What MessagePack can express.
        timeout_seconds: How long to wait for the others.

    Raises:
        DistributedError: Not all processes came in time.
    """
    client, key = coordination_service(), f"{_PREFIX}/{key}"
    client.key_value_set(f"{key}/{jax.process_index()}", base64.b64encode(msgpack.packb(value)).decode())
    barrier(key, timeout_seconds)
    held = client.key_value_dir_get(f"{key}/")
    _forget_later(key)
    return {int(name.rsplit("/", 1)[1]): msgpack.unpackb(base64.b64decode(text)) for name, text in held}


_KEPT = 64

_finished: collections.deque[str] = collections.deque()


def _forget_later(key: str) -> None:
    """Deletes the keys of an early exchange, so that a long run leaves a bounded number behind.

    Others may still be reading the latest exchange, and saves in the background exchange values in a thread of their
    own. Each thread has one exchange at a time, so the one that was finished 64 exchanges ago has been read by all.
    """
    _finished.append(key)
    if len(_finished) > _KEPT:
        oldest = _finished.popleft()
        if jax.process_index() == 0:
            coordination_service().key_value_delete(f"{oldest}/")


def read_now(key: str) -> str | None:
    """Returns the text under a key, or None if there is none."""
    try:
        text: str = coordination_service().key_value_try_get(key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" in str(error):
            return None
        raise
    return text


def read_within(key: str, seconds: float) -> str | None:
    """Waits for the text under a key; returns None if it does not come in time."""
    try:
        text: str = coordination_service().blocking_key_value_get(key, int(seconds * 1000) + 1)
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        return None
    return text


def name_processes(numbers: Sequence[int]) -> str:
    """Writes ``process 1``, or ``processes 0, 2 and 8 more``."""
    more = f" and {len(numbers) - 8} more" * (len(numbers) > 8)
    return f"process{'es' * (len(numbers) > 1)} {', '.join(map(str, numbers[:8]))}{more}"
