"""Work beside the training: at most one save at a time, and no failure that nobody hears of."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any


class BackgroundSaver:
    """Runs saves in a thread, one after the other. An interpreter that exits waits for the last one."""

    def __init__(self) -> None:
        self._executor: ThreadPoolExecutor | None = None
        self._pending: Future[Any] | None = None

    def start(self, save: Callable[[], Any]) -> None:
        """Starts a save, after the one before has finished.

        Raises:
            Exception: What the one before raised; then this one is not started.
        """
        self.wait()
        if self._executor is None:
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending = self._executor.submit(save)

    def check(self) -> None:
        """Raises what a finished save raised, once; does not wait for one that is under way."""
        if self._pending is not None and self._pending.done():
            self.wait()

    def wait(self) -> None:
        """Waits for the save that is under way, and raises what it raised, once."""
        pending = self._pending
        if pending is not None:
            # A signal may end the waiting; then it is still under way, and its failure yet to be heard of.
            wait([pending])
            self._pending = None
            pending.result()
