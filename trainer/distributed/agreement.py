"""Agreement between processes: compare arguments, fail together, gather small values, wait for each other.

`check_agreement` and `gathered` replace JAX's `multihost_utils.assert_equal` and `process_allgather`. Those run a
device collective, which hangs forever if one process does not take part; these use only the host, with a
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

    Call it once before the first step, at the same point in every process. Without it, a difference shows up as a
    hang or as wrong results::

        lowered = step.lower(state, batch)
        check_agreement({"config": config.to_dict(), "step": lowered.as_text()})

    The text of a lowered step contains the shapes, shardings, objective and optimizer, whatever code
    produced them. The versions of Python, this library, JAX, Flax, optax and NumPy are always compared. Only
    hashes and short values are exchanged.

    Args:
        parts: Text, bytes, or JSON-serializable values, by name. Mappings are compared entry by entry.
        timeout_seconds: How long to wait for the other processes.

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
    """Makes work shared by all processes succeed in all or fail in all.

    An error in a single process would leave the others waiting for it. So each process catches the errors of
    its own part, and passes them to `sync`, where all processes meet::

        save, failure = AllOrNone(f"save {path.name}"), None
        try:
            write_mine()
        except OSError as error:
            failure = error
        save.sync(failure)  # raises in all processes, or in none

    It uses no device, so a thread may call it while the devices compute. One object serves all `sync` points of one
    piece of work, even if later points are in another thread: the first point gives all processes the same unique
    identity, which names the later ones.

    Args:
        name: Names the work, the same in all processes: for example the path to be saved. Work that may be in
            flight at the same time needs different names.
        timeout_seconds: How long to wait for the other processes at a point.
    """

    def __init__(self, name: str, *, timeout_seconds: float = 600.0) -> None:
        self._name = name
        self._identity = ""
        self._points = 0
        self._timeout_seconds = timeout_seconds

    def sync(self, error: Exception | None, broadcast: Any = None, *, timeout_seconds: float | None = None) -> Any:
        """Waits for all processes, and raises if one has failed.

        Args:
            error: The error in this process, if any; it is raised here. If it came from an earlier point, all
                processes know of it, and it is raised without waiting.
            broadcast: A value that process 0 sends to all others; it must be MessagePack-serializable.
            timeout_seconds: How long to wait at this point, if not the default.

        Returns:
            The value that process 0 broadcast.

        Raises:
            CheckpointError: Another process raised it; an `UnreadableError` if that was its type.
            DistributedError: Another process raised something else, or did not arrive in time.
        """
        if error is not None and getattr(error, "is_synced", False):
            raise error
        own = {"broadcast": broadcast, "kind": error and type(error).__name__, "text": str(error)[:2000]}
        held = self._exchange(own, self._timeout_seconds if timeout_seconds is None else timeout_seconds)
        failed = [process for process in held if held[process]["kind"] is not None]
        if failed and error is None:
            first = held[failed[0]]
            error = _KINDS.get(first["kind"], DistributedError)(f"process {failed[0]} failed: {first['text']}")
        if error is not None:
            error.is_synced = True  # type: ignore[attr-defined]
            raise error
        return held[0]["broadcast"]

    def _exchange(self, own: Any, timeout_seconds: float) -> Mapping[int, Any]:
        if jax.process_count() == 1:
            return {0: own}
        point, self._points = self._points, self._points + 1
        if point == 0:
            found = exchange(self._name, own, timeout_seconds)
            self._identity = found.identity
            return found.values
        name = f"{self._identity} {point}"
        return exchange(name, own, timeout_seconds, once=True, label=repr(self._name)).values


def gathered(value: Any, *, name: str = "gathered", timeout_seconds: float = 300.0) -> list[Any]:
    """Returns the value of each process, in process order. All processes must call it.

    Args:
        value: A MessagePack-serializable value. It must be small, since it goes through the coordination service.
        name: Names the values, the same in all processes.
        timeout_seconds: How long to wait for the other processes.

    Raises:
        DistributedError: Not all processes arrived in time. It names the missing ones.
    """
    return list(exchange(name, value, timeout_seconds).values.values())


def barrier(name: str, timeout_seconds: float = 300.0) -> None:
    """Waits until every process has reached the barrier of this name.

    It uses no device: computations dispatched earlier may still be running.

    Args:
        name: The same in every process; it may be reused.
        timeout_seconds: How long to wait.

    Raises:
        DistributedError: Not all processes arrived in time. It names the missing ones.
    """
    exchange(f"barrier {name}", None, timeout_seconds, label=f"the barrier {name!r}")


def _entries(name: str, value: Any) -> Iterator[tuple[str, str]]:
    """Yields the path and the text (a hash if it is long) of everything in a value."""
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
    """Returns ``0.1 in processes 0, 2 and 0.2 in process 1``, or nothing if all values are equal."""
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
    except PackageNotFoundError:  # this library, running from an uninstalled checkout
        return "not installed"
