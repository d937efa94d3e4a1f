"""Saves beside the training: one at a time, and every failure is raised."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import Any

from trainer.core.private_api import before_executors_shut_down

_in_flight: set[Future[Any]] = set()


class BackgroundSaver:
    """Runs saves in a thread, one after the other. An interpreter that exits waits for the last one."""

    def __init__(self) -> None:
        self._pending: Future[Any] | None = None

    def start(self, save: Callable[[], Any]) -> None:
        """Starts a save, after the one before has finished.

        Raises:
            Exception: What the one before raised; then this one is not started.
        """
        self.wait()
        pending: Future[Any] = Future()
        self._pending = pending

        def run() -> None:
            try:
                pending.set_result(save())
            except BaseException as error:  # raised in the thread that waits
                pending.set_exception(error)

        # A thread of its own, which is gone afterwards; the interpreter waits for the save before it exits.
        _in_flight.add(pending)
        pending.add_done_callback(_in_flight.discard)
        threading.Thread(target=run, name="checkpoint").start()

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
