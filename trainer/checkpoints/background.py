"""Background saves: one at a time, and every failure is raised."""

import functools
import itertools
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

from trainer.core.private_api import before_executors_shut_down
from trainer.errors import warn

_in_flight: set[Future[Any]] = set()

# The errors of failed saves by number, until `wait` raises them. Only their text: an exception has a traceback, whose
# frames hold the arrays.
_unheard: dict[int, str] = {}
_numbers = itertools.count()


class BackgroundSaver:
    """Runs saves in a thread, one at a time. Interpreter exit waits for the last one."""

    def __init__(self) -> None:
        self._pending: Future[Any] | None = None
        self._number = -1
        # The thread lives from the first save until this object is freed: starting one takes up to 4 ms, since the
        # starting thread waits for the new one, which then holds the GIL.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")

    def __reduce__(self) -> Any:
        return type(self), ()  # a copy has a thread of its own, and no save in flight

    def start(self, save: Callable[[], Any]) -> None:
        """Starts a save after the previous one has finished.

        Raises:
            Exception: What the previous save raised; the new one is then not started.
        """
        self.wait()
        self._number = next(_numbers)
        self._pending = pending = self._thread.submit(functools.partial(_attempt, save, self._number))
        _in_flight.add(pending)
        pending.add_done_callback(_in_flight.discard)

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
            _unheard.pop(self._number, None)
            return pending.result()
        return None


def _attempt(save: Callable[[], Any], number: int) -> Any:
    try:
        return save()
    except BaseException as error:
        _unheard[number] = repr(error)  # before the future is done, so before anybody can ask
        raise


def _wait_for_all() -> None:
    """Waits for the saves in flight, and warns of those that failed where no call has raised it."""
    wait(set(_in_flight))
    for failure in list(_unheard.values()):
        warn(f"a save in the background failed, and no later call could raise it: {failure}")


# Interpreter exit first closes executors to new work, but Orbax submits some while it finishes a save.
before_executors_shut_down(_wait_for_all)
