"""`InBackground`: runs a logger with a slow or unreachable server behind a thread and a bounded queue."""

import atexit
import collections
import os
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from trainer.core.checks import check_count
from trainer.errors import ArgumentError, warn
from trainer.loggers.base import Logger, check_logger

_MAX_TOGETHER = 1000
"""The maximum number of rows for `log_rows`."""

Call = tuple[float, str, tuple[Any, ...]]
"""The time of a call in seconds since 1970, the method, and the arguments."""


class InBackground(Logger):
    """Calls a logger in a thread, in order, so that it never blocks a step::

        with_server = InBackground(MyServerLogger("http://…"))
        trainer = Trainer(model, config, loss_fn=loss_fn, logger=with_server)
        trainer.train(data, num_epochs=5, batch_size=64)
        with_server.close()

    Pending calls wait in a queue, with copies of their arrays. If the queue is full, the oldest call is dropped, but
    never hyperparameters: the newest values matter most. The first exception of the logger is raised by the next call
    of any method. `close` reports once how many calls were dropped or failed.

    A logger with ``log_rows(rows)`` gets rows that waited together in one call, as tuples (time, scalars, step).

    Args:
        logger: The logger. `close` closes it, in the thread.
        max_calls: The maximum number of pending calls.
        max_bytes: The maximum total size of their arrays; a single array may be larger.
        close_timeout: How many seconds `close` waits for pending calls.

    Attributes:
        logger: The logger.

    Raises:
        ArgumentTypeError: ``logger`` is not a logger.
        ArgumentError: A limit is not positive.
    """

    def __init__(
        self, logger: Logger, *, max_calls: int = 10_000, max_bytes: int = 2**28, close_timeout: float = 30.0
    ) -> None:
        check_logger(logger, "logger")
        self.logger = logger
        self._max_calls = check_count(max_calls, "max_calls")
        self._max_bytes = check_count(max_bytes, "max_bytes")
        if isinstance(close_timeout, bool) or not isinstance(close_timeout, int | float) or not close_timeout > 0:
            raise ArgumentError(f"`close_timeout` is {close_timeout!r}; it must be a positive number of seconds.")
        self._close_timeout = float(close_timeout)
        self._waiting: collections.deque[Call] = collections.deque()
        self._bytes = self._calls = self._in_hand = self._dropped = self._failed = 0
        self._failure: Exception | None = None
        self._is_told = self._is_closed = False
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def log_scalars(self, scalars: Mapping[str, float], step: int | None = None) -> None:
        self._put("log_scalars", dict(scalars), step)

    def log_text(self, name: str, text: str, step: int | None = None) -> None:
        self._put("log_text", name, text, step)

    def log_image(self, name: str, image: Any, step: int | None = None) -> None:
        self._put("log_image", name, np.array(image), step)  # a copy: the caller may change or donate its own

    def log_histogram(self, name: str, values: Any, step: int | None = None) -> None:
        self._put("log_histogram", name, np.array(values), step)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        self._put("log_hyperparams", dict(params))

    def log_checkpoint(self, path: str | os.PathLike[str], step: int) -> None:
        self._put("log_checkpoint", path, step)

    def rewind(self, step: int) -> None:
        self._put("rewind", step)

    def close(self) -> None:
        """Waits until everything is sent and the logger is closed, but no longer than ``close_timeout``.

        It warns if any call was dropped, failed, or is still pending. It is called at Python exit if it was not
        called before.
        """
        atexit.unregister(self.close)
        with self._changed:
            if self._is_closed:
                return
            self._is_closed = True
            self._changed.notify_all()
        if self._thread is None:
            self.logger.close()
            return
        self._thread.join(self._close_timeout)
        with self._changed:
            left = len(self._waiting) + self._in_hand
            self._waiting.clear()
        self._say(left, is_stuck=self._thread.is_alive())

    def _put(self, method: str, *arguments: Any) -> None:
        size = _bytes_of(arguments)
        with self._changed:
            if self._is_closed:
                raise ArgumentError(f"{method} of a closed InBackground({type(self.logger).__name__}); make a new one.")
            while self._waiting and (len(self._waiting) >= self._max_calls or self._bytes + size > self._max_bytes):
                self._drop()
            self._waiting.append((time.time(), method, arguments))
            self._bytes += size
            self._calls += 1
            if self._thread is None:
                # A daemon: interpreter exit does not wait for the thread, only for `close`, which is bounded.
                self._thread = threading.Thread(target=self._work, name="logger", daemon=True)
                self._thread.start()
                atexit.register(self.close)
            self._changed.notify_all()
            failure = None if self._is_told else self._failure
            self._is_told = self._is_told or failure is not None
        if failure is not None:
            raise failure

    def _drop(self) -> None:
        oldest = next((at for at, (_, method, _) in enumerate(self._waiting) if method != "log_hyperparams"), 0)
        self._bytes -= _bytes_of(self._waiting[oldest][2])
        del self._waiting[oldest]
        self._dropped += 1

    def _work(self) -> None:
        while calls := self._take():
            try:
                self._send(calls)
            except Exception as error:
                self._failed += len(calls)
                self._failure = self._failure or error
        try:
            self.logger.close()
        except Exception as error:
            self._failure = self._failure or error

    def _take(self) -> list[Call]:
        """Waits for the next call, or for several rows to send together; returns an empty result at the end."""
        with self._changed:
            self._in_hand = 0
            while not self._waiting and not self._is_closed:
                self._changed.wait()
            taken: list[Call] = []
            together = _MAX_TOGETHER if hasattr(self.logger, "log_rows") else 1
            while self._waiting and len(taken) < together:
                if taken and {taken[0][1], self._waiting[0][1]} != {"log_scalars"}:
                    break
                taken.append(self._waiting.popleft())
                self._bytes -= _bytes_of(taken[-1][2])
            self._in_hand = len(taken)
            return taken

    def _send(self, calls: list[Call]) -> None:
        _, method, arguments = calls[0]
        if method == "log_scalars" and hasattr(self.logger, "log_rows"):
            self.logger.log_rows([(when, *arguments) for when, _, arguments in calls])
        elif handler := getattr(self.logger, method, None):
            handler(*arguments)

    def _say(self, left: int, is_stuck: bool) -> None:
        parts = []
        if self._dropped:
            parts.append(f"{self._dropped} were dropped since it did not keep up (`max_calls`, `max_bytes`)")
        if self._failed or (self._failure is not None and not is_stuck):
            parts.append(f"{self._failed} failed, the first with {self._failure!r}")
        if left or is_stuck:
            parts.append(f"{left} were not sent within {self._close_timeout:g} s (`close_timeout`)")
        if parts:
            warn(f"of {self._calls} calls of {type(self.logger).__name__}, {', '.join(parts)}.")


def _bytes_of(arguments: tuple[Any, ...]) -> int:
    return sum(argument.nbytes for argument in arguments if isinstance(argument, np.ndarray))
