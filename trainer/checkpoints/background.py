"""Background saves: one at a time, and every failure is raised."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from trainer.core.private_api import before_executors_shut_down
from trainer.errors import warn

# Saves in flight, and those that failed where nobody has asked for the result yet.
_unheard: set[Future[Any]] = set()


class BackgroundSaver:
    """Runs saves in a thread, one at a time. Interpreter exit waits for the last one."""

    def __init__(self) -> None:
        self._pending: Future[Any] | None = None
        # The thread lives from the first save until this object is freed: starting one takes up to 4 ms, since the
        # starting thread waits for the new one, which then holds the GIL.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def start(self, save: Callable[[], Any]) -> None:
        """Starts a save after the previous one has finished.

        Raises:
            Exception: What the previous save raised; the new one is then not started.
        """
        self.wait()
        self._pending = pending = self._thread.submit(save)
        _unheard.add(pending)
        pending.add_done_callback(_forget_if_written)

    def check(self) -> Any:
        """Returns the result or raises the error of a finished save, once; does not wait for a save in flight."""
        return self.wait() if self._pending is not None and self._pending.done() else None

    def wait(self) -> Any:
        """Waits for the save in flight and returns its result or raises its error, once; None if there is no save."""
        pending = self._pending
        if pending is not None:
            # A signal may interrupt the wait; the save is then still in flight, and its failure not yet raised.
            wait([pending])
            self._pending = None
            _unheard.discard(pending)
            return pending.result()
        return None


def _forget_if_written(save: Future[Any]) -> None:
    if save.exception() is None:
        _unheard.discard(save)


def _wait_for_all() -> None:
    """Waits for the saves in flight, and warns of those that failed where no call has raised it."""
    wait(set(_unheard))
    for failure in filter(None, (save.exception() for save in set(_unheard))):
        warn(f"a save in the background failed, and no later call could raise it: {failure!r}")


# Interpreter exit first closes executors to new work, but Orbax submits some while it finishes a save.
before_executors_shut_down(_wait_for_all)
