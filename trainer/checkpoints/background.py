"""Saves beside the training: one at a time, and every failure is raised."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from trainer.core.private_api import before_executors_shut_down

_in_flight: set[Future[Any]] = set()


class BackgroundSaver:
    """Runs saves in a thread, one after the other. An interpreter that exits waits for the last one."""

    def __init__(self) -> None:
        self._pending: Future[Any] | None = None
        # The thread is kept from the first save on, until this object is freed: to start one takes up to 4 ms, since
        # the starting thread waits for the new one, which then keeps the interpreter.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def start(self, save: Callable[[], Any]) -> None:
        """Starts a save, after the one before has finished.

        Raises:
            Exception: What the one before raised; then this one is not started.
        """
        self.wait()
        self._pending = pending = self._thread.submit(save)
        _in_flight.add(pending)
        pending.add_done_callback(_in_flight.discard)

    def check(self) -> Any:
        """Returns or raises what a finished save returned or raised, once; does not wait for a save in flight."""
        return self.wait() if self._pending is not None and self._pending.done() else None

    def wait(self) -> Any:
        """Waits for the save in flight, and returns or raises what it returned or raised, once; else None."""
        pending = self._pending
        if pending is not None:
            # A signal may end the waiting; then the save is still in flight, and its failure is not raised yet.
            wait([pending])
            self._pending = None
            return pending.result()
        return None


def _wait_for_all() -> None:
    wait(set(_in_flight))


# An interpreter that exits first forbids the executors to take work, which Orbax gives them while it finishes a save.
before_executors_shut_down(_wait_for_all)
