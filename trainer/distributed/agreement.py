"""Agreement of many processes: compare arguments, fail together, gather small values, wait for each other.

`check_agreement` and `gathered` stand in for JAX's `multihost_utils.assert_equal` and `process_allgather`. Those run a
collective on the devices, which waits for ever if one process does not take part; these use the host alone, with a
timeout.
"""

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import jax

from trainer.distributed.coordination import name_processes
from trainer.distributed.rounds import exchange
from trainer.errors import ArgumentTypeError, CheckpointError, DistributedError, UnreadableError

_LONGEST_SHOWN = 80

_KINDS = {kind.__name__: kind for kind in (CheckpointError, UnreadableError)}

_PACKAGES = ("nnx-trainer", "jax", "jaxlib", "flax", "optax", "numpy")


def check_agreement(parts: Mapping[str, Any], *, timeout_seconds: float = 300.0) -> None:
    """Raises in all processes if they are not about to do the same.

    Call it once before the first step, at the same point of every process. Without it a difference shows as a hang, or
    as wrong results::

        lowered = step.lower(state, batch)
        check_agreement({"config": config.to_dict(), "step": lowered.as_text()})

    The text of a lowered step holds the shapes, shardings, objective and optimizer, whatever source
    they come from. The versions of Python, of this library, and of JAX, Flax, optax and NumPy are always compared. Only
    hashes and short values travel between the processes.

    Args:
        parts: By name, text, bytes, or what JSON can express. Mappings are compared entry by entry.
        timeout_seconds: How long to wait for the others.

    Raises:
        ArgumentTypeError: A part cannot be compared.
        DistributedError: In every process, naming each entry that differs and its value in each process; or not
            all processes called this in time.
    """
    parts = {**parts, "versions": _versions()}
    entries = dict(entry for name, value in parts.items() for entry in _entries(name, value))
    if jax.process_count() == 1:
        return
    held = exchange("agreement", entries, timeout_seconds).values
    differences = [
        f"`{name}` is {found}"
        for name in sorted(set().union(*held.values()))
        if (found := who_holds_what({process: entries.get(name) for process, entries in held.items()}))
    ]
    if differences:
        raise DistributedError(
            f"The processes disagree: {'; '.join(differences)}. Start all of them with the same code and configuration."
        )


class AllOrNone:
    """Points of a piece of work that all processes share, at which they learn whether one has failed.

    What one process alone raises leaves the others waiting for it. So each catches what its part of the
    work raises, and brings it to the next point::

        save, failure = AllOrNone(f"save {path.name}"), None
        try:
            write_mine()
        except OSError as error:
            failure = error
        save.sync(failure)  # raises in all processes, or in none

    It takes no device, so a thread may do it while the devices compute. One object serves all points of one piece of
    work, also where the later ones come in another thread: at the first point all processes get the same unique
    identity, which names the later ones.

    Args:
        name: What the work is, the same in all processes, for example the path that is saved. Works that may be in
            flight at the same time need different names.
        timeout_seconds: How long to wait for the others at a point.
    """

    def __init__(self, name: str, *, timeout_seconds: float = 600.0) -> None:
        self._name = name
        self._identity = ""
        self._points = 0
        self._timeout_seconds = timeout_seconds

    def sync(self, error: Exception | None, broadcast: Any = None, *, timeout_seconds: float | None = None) -> Any:
        """Waits for all processes, and raises if one has failed.

        Args:
            error: What went wrong in this process. It is raised here if something did. One that an earlier point
                raised, so that all processes know of it, is raised without waiting.
            broadcast: A value of process 0 for all others; MessagePack must be able to express it.
            timeout_seconds: How long to wait at this point, if not as long as at the others.

        Returns:
            The value that process 0 broadcast.

        Raises:
            CheckpointError: Another process raised one; an `UnreadableError` if it raised such.
            DistributedError: Another process raised something else, or did not come in time.
        """
        if error is not None and getattr(error, "is_synced", False):
            raise error
        vote = {"broadcast": broadcast, "kind": error and type(error).__name__, "text": str(error)[:2000]}
        held = self._exchange(vote, self._timeout_seconds if timeout_seconds is None else timeout_seconds)
        failed = [process for process in held if held[process]["kind"] is not None]
        if failed and error is None:
            first = held[failed[0]]
            error = _KINDS.get(first["kind"], DistributedError)(f"process {failed[0]} failed: {first['text']}")
        if error is not None:
            error.is_synced = True  # type: ignore[attr-defined]
            raise error
        return held[0]["broadcast"]

    def _exchange(self, vote: Any, timeout_seconds: float) -> Mapping[int, Any]:
        if jax.process_count() == 1:
            return {0: vote}
        point, self._points = self._points, self._points + 1
        if point == 0:
            found = exchange(self._name, vote, timeout_seconds)
            self._identity = found.identity
            return found.values
        name = f"{self._identity} {point}"
        return exchange(name, vote, timeout_seconds, once=True, label=repr(self._name)).values


def gathered(value: Any, *, name: str = "gathered", timeout_seconds: float = 300.0) -> list[Any]:
    """Returns the value of each process, in the order of their indices. All processes call it.

    Args:
        value: What MessagePack can express. It goes through the coordination service, so it must be small.
        name: What is gathered, the same in all processes.
        timeout_seconds: How long to wait for the others.

    Raises:
        DistributedError: Not all processes came in time. It names the missing ones.
    """
    return list(exchange(name, value, timeout_seconds).values.values())


def barrier(name: str, timeout_seconds: float = 300.0) -> None:
    """Waits until every process has come to the barrier of this name.

    It takes no device: computations that were dispatched before it may still be running.

    Args:
        name: The same in every process; it may be used again.
        timeout_seconds: How long to wait.

    Raises:
        DistributedError: Not all processes came in time. It names the missing ones.
    """
    exchange(f"barrier {name}", None, timeout_seconds, label=f"the barrier {name!r}")


def _entries(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yields the path and the text, or the hash of a long one, of everything in a value."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _entries(f"{name}/{key}", item)
        return
    if isinstance(value, bytes):
        text = hashlib.sha256(value).hexdigest()[:16]
    elif isinstance(value, str):
        text = value
    else:
        try:
            text = json.dumps(value, sort_keys=True)
        except TypeError as error:
            raise ArgumentTypeError(
                f"`parts` has the entry `{name}` of type {type(value).__name__}; it must be text, bytes, or what "
                f"JSON can express ({error})."
            ) from error
    if len(text) > _LONGEST_SHOWN:
        text = f"a text of {len(text):,} characters with hash {hashlib.sha256(text.encode()).hexdigest()[:16]}"
    yield name, text


def who_holds_what(values: Mapping[int, str | None]) -> str:
    """Returns ``0.1 in processes 0, 2 and 0.2 in process 1``, or nothing where all hold the same."""
    holders: dict[str | None, list[int]] = {}
    for process, value in sorted(values.items()):
        holders.setdefault(value, []).append(process)
    if len(holders) == 1:
        return ""
    return " and ".join(
        f"{'absent' if value is None else value} in {name_processes(processes)}" for value, processes in holders.items()
    )


def _versions() -> dict[str, str]:
    python = ".".join(map(str, sys.version_info[:3]))
    return {"python": python, **{package: _version_of(package) for package in _PACKAGES}}


def _version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:  # this library, run from a checkout that is not installed
        return "not installed"
