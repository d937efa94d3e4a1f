"""Many processes, one program: start together, agree before the first step, and end together.

JAX brings the processes together and runs their collectives. A collective waits for all of them, so
what goes wrong in one process is a silence in the others. The functions here turn silence into a
message: they talk through the coordination service of JAX, beside the devices, and never wait for ever.
"""

import atexit
import base64
import hashlib
import itertools
import json
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from types import TracebackType
from typing import Any

import jax
import msgpack

from trainer.errors import ArgumentError, ArgumentTypeError, CheckpointError, DistributedError, UnreadableError

_FAILURE = "trainer/failure"
POLL_SECONDS = 1.0
"""How often a process looks whether another has said something."""

_LONGEST_SHOWN = 80

_KINDS = {kind.__name__: kind for kind in (CheckpointError, UnreadableError)}

_rounds = itertools.count()
_works = itertools.count()


def initialize(
    coordinator_address: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    local_device_ids: Sequence[int] | None = None,
    initialization_timeout_seconds: int = 300,
    heartbeat_timeout_seconds: int = 100,
    shutdown_timeout_seconds: int = 300,
) -> None:
    """Joins this process to the others of a run. Call it before anything that asks JAX for devices.

    What is not given is taken from the environment variables ``JAX_COORDINATOR_ADDRESS``,
    ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``, and then from what JAX detects by itself: Slurm, Open
    MPI, Cloud TPU and, with the package ``kubernetes``, Kubernetes.

    From then on no process outlives another for long. Where one

    * ends with an exception, the others print it within seconds and end with status 1;
    * is killed, or its machine dies, the others end after ``heartbeat_timeout_seconds`` with a message
      of JAX that names the process (at once, if it was process 0, which coordinates);
    * leaves in another way while the rest goes on, all end after ``shutdown_timeout_seconds``.

    SIGTERM does what it did before, to its default action or the handler that was there: JAX would
    swallow it, and then wait at its end for ever. So ``reached_preemption_sync_point`` of JAX, which relies
    on that, hears nothing.

    Args:
        coordinator_address: Host and port of process 0, ``"10.0.0.1:1234"``.
        num_processes: How many there are. 1 runs alone and needs nothing else.
        process_id: Which one this is, from 0.
        local_device_ids: Which devices of this machine are this process's; all, by default.
        initialization_timeout_seconds: How long to wait for the others to start. Halfway a line on stderr
            says so; then JAX ends the process.
        heartbeat_timeout_seconds: Silence after which a process counts as dead.
        shutdown_timeout_seconds: How long a process that has finished waits for the others.

    Raises:
        ArgumentTypeError: A number is none, in an argument or in the environment.
        ArgumentError: Nothing says where the other processes are, or ``process_id`` is out of range.
    """
    coordinator_address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    num_processes = _number(num_processes, "num_processes", "JAX_NUM_PROCESSES")
    process_id = _number(process_id, "process_id", "JAX_PROCESS_ID")
    if num_processes == 1:
        return
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise ArgumentError(f"`process_id` is {process_id}; it must be from 0 to {num_processes - 1}.")
    # What JAX says when it gives up names neither the address nor a remedy, and cannot be caught.
    waiting = threading.Timer(
        initialization_timeout_seconds / 2,
        print,
        (
            f"process {process_id} has waited {initialization_timeout_seconds / 2:g} s for the others of "
            f"{num_processes} at {coordinator_address}, and gives up after {initialization_timeout_seconds} s. Look "
            f"whether each was started, with an id of its own, and reaches that address.",
        ),
        {"file": sys.stderr, "flush": True},
    )
    waiting.daemon = True
    waiting.start()
    try:
        jax.distributed.initialize(
            coordinator_address,
            num_processes,
            process_id,
            local_device_ids,
            initialization_timeout=initialization_timeout_seconds,
            heartbeat_timeout_seconds=heartbeat_timeout_seconds,
            shutdown_timeout_seconds=shutdown_timeout_seconds,
        )
    except ValueError as error:
        raise ArgumentError(
            f"`coordinator_address`, `num_processes` and `process_id` are {coordinator_address!r}, {num_processes} and "
            f"{process_id}, and JAX detected no cluster ({error}). Pass them, set JAX_COORDINATOR_ADDRESS, "
            f"JAX_NUM_PROCESSES and JAX_PROCESS_ID, or pass `num_processes` = 1 to run alone."
        ) from error
    finally:
        waiting.cancel()
    if threading.current_thread() is threading.main_thread():
        # JAX has put a handler of its own below that of Python, which Python does not know of.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    _end_with_the_others()


def barrier(name: str, timeout_seconds: float = 300.0) -> None:
    """Waits until every process has come to the barrier of this name.

    It takes no device: computations that were dispatched before it may still be running.

    Args:
        name: The same in every process; it may be used again.
        timeout_seconds: How long to wait.

    Raises:
        DistributedError: Not all came in time. It tells who did not.
    """
    if jax.process_count() == 1:
        return
    try:
        coordination_service().wait_at_barrier(f"trainer/{name}", int(timeout_seconds * 1000))
    except jax.errors.JaxRuntimeError as error:
        raise DistributedError(
            f"Not all {jax.process_count()} processes came to the barrier {name!r} within {timeout_seconds:g} s. "
            f"They may have taken different ways through the program, or be busy: {error}"
        ) from error


def check_agreement(parts: Mapping[str, Any], *, timeout_seconds: float = 300.0) -> None:
    """Compares what this process is about to do with what the others are about to do.

    Call it once before the first step, at the same point of every process. A difference that would
    show as a hang, or worse, as a training that is wrong, becomes an error in all processes::

        lowered = step.lower(state, batch)
        check_agreement({"config": config.to_dict(), "step": lowered.as_text()})

    The text of a lowered step holds the shapes, shardings, objective and optimizer, whatever source
    they come from. The versions of Python, JAX, Flax and optax are always compared. Only hashes and short
    values travel between the processes.

    Args:
        parts: By name, text, bytes, or what JSON can express. Mappings are compared entry by entry.
        timeout_seconds: How long to wait for the others.

    Raises:
        ArgumentTypeError: A part cannot be compared.
        DistributedError: In every process, naming each entry that differs and who holds what; or not
            all processes called this in time.
    """
    parts = {**parts, "versions": _versions()}
    entries = dict(entry for name, value in parts.items() for entry in _entries(name, value))
    if jax.process_count() == 1:
        return
    held = _exchange(f"agreement/{next(_rounds)}", entries, timeout_seconds)
    differences = [
        f"`{name}` is {found}"
        for name in sorted(set().union(*held.values()))
        if (found := _who_holds_what({process: entries.get(name) for process, entries in held.items()}))
    ]
    if differences:
        raise DistributedError(
            f"The processes disagree: {'; '.join(differences)}. Start all of them with the same code and configuration."
        )


def end_others(reason: str) -> None:
    """Ends the other processes, which may be waiting for this one, with a message; this one goes on to its end.

    Args:
        reason: The message without its subject, which is this process.
    """
    try:
        coordination_service().key_value_set(_FAILURE, f"process {jax.process_index()} {reason}"[:2000])
    except jax.errors.JaxRuntimeError:
        return  # another was first, or the coordinator is gone, which ends the others as well


class AllOrNone:
    """Points of a piece of work that all processes share, at which they learn whether one has failed.

    What one process alone raises leaves the others waiting for it. So each catches what its part of the
    work raises, and brings it to the next point::

        votes, failure = AllOrNone("save"), None
        try:
            write_mine()
        except OSError as error:
            failure = error
        votes.sync(failure)  # raises in all processes, or in none

    It takes no device, so a thread may do it while the devices compute. Make one at the same place of
    every process, in the same order. In a single process a failure is raised, and that is all.

    Args:
        name: What the work is, for messages.
        timeout_seconds: How long to wait for the others at a point.
    """

    def __init__(self, name: str, *, timeout_seconds: float = 600.0) -> None:
        self._room = f"{name}/{next(_works)}"
        self._timeout_seconds = timeout_seconds
        self._points = itertools.count()

    def sync(self, error: Exception | None, broadcast: Any = None) -> Any:
        """Waits for all processes, and raises if one has failed.

        Args:
            error: What went wrong in this process. It is raised here if something did; unless it is
                from an earlier point, which all have heard of, when nobody is waited for.
            broadcast: A value of process 0 for all others; MessagePack must be able to express it.

        Returns:
            The value that process 0 broadcast.

        Raises:
            CheckpointError: Another process raised one; an `UnreadableError` if it raised such.
            DistributedError: Another process raised something else, or not all came in time.
        """
        if error is not None and getattr(error, "is_synced", False):
            raise error
        if jax.process_count() == 1:
            if error is not None:
                raise error
            return broadcast
        vote = {"broadcast": broadcast, "kind": error and type(error).__name__, "text": str(error)[:2000]}
        held = _exchange(f"{self._room}/{next(self._points)}", vote, self._timeout_seconds)
        failed = [process for process in sorted(held) if held[process]["kind"] is not None]
        if failed and error is None:
            first = held[failed[0]]
            error = _KINDS.get(first["kind"], DistributedError)(f"process {failed[0]} failed: {first['text']}")
        if error is not None:
            error.is_synced = True  # type: ignore[attr-defined]
            raise error
        return held[0]["broadcast"]


def gathered(value: Any, *, timeout_seconds: float = 300.0) -> list[Any]:
    """Returns what each process holds, in their order. All call it, at the same point.

    Args:
        value: What MessagePack can express, and little of it.
        timeout_seconds: How long to wait for the others.

    Raises:
        DistributedError: Not all came in time.
    """
    if jax.process_count() == 1:
        return [value]
    held = _exchange(f"gathered/{next(_works)}", value, timeout_seconds)
    return [held[process] for process in sorted(held)]


def coordination_service() -> Any:
    """Returns the client of JAX's coordination service, through which processes talk beside their devices."""
    # JAX has no public way to it; Orbax takes the same one.
    from jax._src import distributed

    return distributed.global_state.client


def name_processes(numbers: Sequence[int]) -> str:
    """Writes ``process 1``, or ``processes 0, 2 and 8 more``."""
    more = f" and {len(numbers) - 8} more" * (len(numbers) > 8)
    return f"process{'es' * (len(numbers) > 1)} {', '.join(map(str, numbers[:8]))}{more}"


def _exchange(room: str, value: Any, timeout_seconds: float) -> dict[int, Any]:
    """Returns what each process holds, by its index, as MessagePack gives it back. Each room is used once."""
    client, room = coordination_service(), f"trainer/{room}"
    client.key_value_set(f"{room}/{jax.process_index()}", base64.b64encode(msgpack.packb(value)).decode())
    barrier(room, timeout_seconds)
    held = client.key_value_dir_get(f"{room}/")
    return {int(key.rsplit("/", 1)[1]): msgpack.unpackb(base64.b64decode(text)) for key, text in held}


def _number(value: Any, name: str, variable: str) -> int | None:
    """Returns an argument, or what the environment says in its place."""
    source = f"`{name}`"
    if value is None and variable in os.environ:
        source, text = f"The environment variable {variable}", os.environ[variable]
        value = int(text) if text.isdecimal() else text
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise ArgumentTypeError(f"{source} is {value!r}; it must be an integer.")


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


def _who_holds_what(values: Mapping[int, str | None]) -> str:
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
    return {"python": python, **{name: version(name) for name in ("jax", "jaxlib", "flax", "optax")}}


def _end_with_the_others() -> None:
    """Tells the other processes of an exception that ends this one, and listens for theirs.

    A process that fails waits in the shutdown of JAX for the others, who wait in a collective for
    it; only a timeout ends that.
    """
    client, process = coordination_service(), jax.process_index()
    ending = threading.Event()
    previous = sys.excepthook

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        previous(kind, error, trace)
        ending.set()
        end_others(f"failed: {kind.__name__}: {error}")

    def listen() -> None:
        while not ending.wait(POLL_SECONDS):
            try:
                message = client.key_value_try_get(_FAILURE)
            except jax.errors.JaxRuntimeError as error:
                if "NOT_FOUND" in str(error):
                    continue
                return
            if message.startswith(f"process {process} "):
                return  # it ends the others
            print(f"process {process} ends, since {message}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            # The main thread may be in a collective, which no exception can reach.
            jax.distributed.shutdown()
            os._exit(1)

    listener = threading.Thread(target=listen, name="trainer-failures", daemon=True)
    listener.start()
    sys.excepthook = tell

    # Registered after that of JAX, so it runs before it: the listener must not use a client that is gone.
    @atexit.register
    def stop() -> None:
        ending.set()
        listener.join()
