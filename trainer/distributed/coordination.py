"""The key-value store of JAX's coordination service: communication between processes without their devices.

Process 0 holds the store. Only this module depends on the texts of its errors.

Two measurements with jax 0.10.2 limit what is used. `wait_at_barrier` leaks 1.3 to 1.5 kB in process 0 per
barrier name. `blocking_key_value_get` leaks 34 kB per call that times out, 20 kB of it in the caller; a call
that returns a value leaks nothing, nor does a lookup of a missing key. So there are no barriers here, and
nothing waits in a loop of short blocking calls.
"""

import threading
from collections.abc import Sequence
from concurrent.futures import Future

import jax

from trainer.core.private_api import coordination_client
from trainer.errors import first_of

POLL_SECONDS = 1.0
"""How often a process polls for messages of others."""


def write_once(key: str, text: str) -> bool:
    """Writes a key if it does not exist; otherwise changes nothing and returns False."""
    try:
        coordination_client().key_value_set(key, text)
    except jax.errors.JaxRuntimeError as error:
        if "ALREADY_EXISTS" not in str(error):
            raise
        return False
    return True


def read_now(key: str) -> str | None:
    """Returns the text under a key, or None if there is none."""
    try:
        text: str = coordination_client().key_value_try_get(key)
    except jax.errors.JaxRuntimeError as error:
        if "NOT_FOUND" not in str(error):
            raise
        return None
    return text


def read_within(key: str, seconds: float) -> str | None:
    """Waits for the text under a key; returns None on timeout.

    A second thread blocks on the store while the main thread waits for it, so that Python can handle signals.
    """
    if threading.current_thread() is not threading.main_thread():
        return _read_within(key, seconds)
    found: Future[str | None] = Future()

    def wait() -> None:
        try:
            found.set_result(_read_within(key, seconds))
        except Exception as error:  # raised in the main thread
            found.set_exception(error)

    try:
        threading.Thread(target=wait, name="trainer-wait", daemon=True).start()
    except RuntimeError:  # Python 3.12 starts no threads during interpreter exit
        return _read_within(key, seconds)
    return found.result()


def _read_within(key: str, seconds: float) -> str | None:
    try:
        text: str = coordination_client().blocking_key_value_get(key, int(max(seconds, 0.0) * 1000) + 1)
    except jax.errors.JaxRuntimeError as error:
        if "DEADLINE_EXCEEDED" not in str(error):
            raise
        return None
    return text


def read_directory(directory: str) -> dict[str, str]:
    """Returns the current texts below a directory, by the rest of their keys."""
    found = coordination_client().key_value_dir_get(f"{directory}/")
    return {key.removeprefix(f"{directory}/"): text for key, text in found}


def count_up(key: str) -> int:
    """Increments a number in the store and returns it, starting at 1. Each caller gets a different number."""
    count: int = coordination_client().key_value_increment(key, 1)
    return count


def delete_directory(directory: str) -> None:
    """Deletes all keys below a directory."""
    coordination_client().key_value_delete(f"{directory}/")


def name_processes(numbers: Sequence[int]) -> str:
    """Formats ``process 1``, or ``processes 0, 2 and 8 more``."""
    return f"process{'es' * (len(numbers) > 1)} {first_of([str(number) for number in numbers], 8)}"
