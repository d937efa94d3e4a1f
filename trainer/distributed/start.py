"""Several processes run one program: they start together and end together.

JAX connects the processes and runs their collectives. A collective waits for all of them, so a failure in one process
makes the others hang. The functions here turn the hang into a message: they use JAX's coordination service, not the
devices, and every wait has a timeout.
"""

import atexit
import contextlib
import os
import signal
import sys
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import jax

from trainer.distributed.coordination import POLL_SECONDS, read_now, write_once
from trainer.distributed.rounds import announce_end
from trainer.errors import ArgumentError, ArgumentTypeError

_FAILURE = "trainer/failure"
_GRACE_SECONDS = 3.0
_leaving = threading.Event()  # set when this process ends in a way that it has told the others


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

    Arguments that are None come from the environment variables ``JAX_COORDINATOR_ADDRESS``,
    ``JAX_NUM_PROCESSES`` and ``JAX_PROCESS_ID``, or else from what JAX detects itself: Slurm, Open
    MPI, Cloud TPU and, with the package ``kubernetes``, Kubernetes.

    From then on, no process outlives another for long. If a process

    * ends with an exception, the others print it within seconds and exit with status 1;
    * is killed, or its machine dies, the others end after ``heartbeat_timeout_seconds`` with a JAX
      message that names the process (at once if it was process 0, the coordinator);
    * exits in another way while the others continue, all end after ``shutdown_timeout_seconds``. Exchanging values
      with a process that has exited raises at once.

    SIGTERM keeps its existing handler or default action: with JAX's own handler, a process would ignore the
    signal, then wait forever in its shutdown. As a result, JAX's ``reached_preemption_sync_point``, which relies on
    that handler, receives no signals.

    Args:
        coordinator_address: Host and port of process 0: ``"10.0.0.1:1234"``.
        num_processes: The number of processes. 1 runs alone and needs no other argument.
        process_id: The index of this process, from 0.
        local_device_ids: The devices of this machine that this process uses; by default all.
        initialization_timeout_seconds: How long to wait for the others to start. Halfway, a line on stderr
            reports the wait; at the timeout, JAX ends the process.
        heartbeat_timeout_seconds: Silence after which a process counts as dead.
        shutdown_timeout_seconds: How long a finished process waits for the others.

    Raises:
        ArgumentTypeError: A number is not an integer, in an argument or in the environment.
        ArgumentError: The addresses of the other processes are unknown, or ``process_id`` is out of range.
    """
    coordinator_address = coordinator_address or os.environ.get("JAX_COORDINATOR_ADDRESS")
    num_processes = _number(num_processes, "num_processes", "JAX_NUM_PROCESSES")
    process_id = _number(process_id, "process_id", "JAX_PROCESS_ID")
    if num_processes == 1:
        return
    if num_processes is not None and process_id is not None and not 0 <= process_id < num_processes:
        raise ArgumentError(f"`process_id` is {process_id}; it must be from 0 to {num_processes - 1}.")
    # JAX's message at the timeout names neither the address nor a remedy, and cannot be caught.
    waiting = threading.Timer(
        initialization_timeout_seconds / 2,
        print,
        (
            f"process {process_id} has waited {initialization_timeout_seconds / 2:g} s for the others of "
            f"{num_processes} at {coordinator_address}, and gives up after {initialization_timeout_seconds} s. Check "
            f"that each was started, with an id of its own, and reaches that address.",
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
        # JAX has installed a handler below Python's, without Python's knowledge.
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM))
    _end_with_the_others()


def end_others(reason: str, *, grace: bool = False) -> None:
    """Ends the other processes, which may be waiting for this one, with a message; this one continues.

    Args:
        reason: The predicate of the message; its subject is this process.
        grace: Whether they get a few seconds to end by themselves, as when all call `sys.exit`.
    """
    if grace:
        _leaving.set()
    try:
        message = f"process {jax.process_index()} {reason}"[:2000]
        write_once(_FAILURE, f"{int(grace)} {message}")  # only the first counts
    except jax.errors.JaxRuntimeError:
        return  # the coordinator is gone, which ends the others too


def _number(value: Any, name: str, variable: str) -> int | None:
    """Returns an argument, or its value from the environment."""
    source = f"`{name}`"
    if value is None and variable in os.environ:
        source, text = f"The environment variable {variable}", os.environ[variable]
        value = int(text) if text.isdecimal() else text
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    raise ArgumentTypeError(f"{source} is {value!r}; it must be an integer.")


def _end_with_the_others() -> None:
    """Publishes an exception that ends this process, and watches for exceptions in the others.

    A failed process would wait in JAX's shutdown for the others, while they wait in a collective for it, until a
    timeout. The exception is caught by `sys.excepthook`, which IPython does not call.
    """
    process = jax.process_index()
    ending = threading.Event()
    previous = sys.excepthook

    def tell(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        previous(kind, error, trace)
        ending.set()
        end_others(f"failed: {kind.__name__}: {error}")

    def listen() -> None:
        while not ending.wait(POLL_SECONDS):
            try:
                message = read_now(_FAILURE)
            except jax.errors.JaxRuntimeError:
                return  # the coordinator is gone
            if message is None:
                continue
            grace, _, message = message.partition(" ")
            if message.startswith(f"process {process} "):
                return  # this process ends the others
            if grace == "1" and _leaving.wait(_GRACE_SECONDS):
                return
            print(f"process {process} ends, since {message}", file=sys.stderr, flush=True)
            sys.stdout.flush()
            # The main thread may be in a collective, which no exception can interrupt.
            jax.distributed.shutdown()
            os._exit(1)

    listener = threading.Thread(target=listen, name="trainer-failures", daemon=True)
    listener.start()
    sys.excepthook = tell

    # Registered after JAX's, so it runs before: the listener must not use a closed client.
    @atexit.register
    def stop() -> None:
        ending.set()
        listener.join()
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator is gone
            announce_end()
