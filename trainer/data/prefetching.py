"""Draws batches ahead in a thread, so that a slow loader works while the caller does something else."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Self

import jax

from trainer.core.checks import check_count
from trainer.data.padding import PaddedBatches
from trainer.data.resumable import LoaderPass
from trainer.types import Batch

_END = object()
_PATIENCE_SECONDS = 10.0


class Prefetched(Iterator[Batch]):
    """The batches of an iterable, at most ``count`` of them drawn ahead.

    A thread draws each batch and calls ``place`` on it before drawing the next, so a loader may reuse its buffers.
    The thread uses the caller's ``jax_enable_x64`` and default device. An error of the loader is raised when its batch
    is requested. A `LoaderPass` remembers its positions, and reports the one after the batches that were trained.

    The thread ends with the batches, or at `close`, which a ``with`` block calls at its end. If the loader still blocks
    ten seconds after `close`, the thread is abandoned and ends with the process.

    Args:
        batches: The batches.
        count: The maximum number of batches drawn ahead.
        place: Returns a batch that shares no memory with the loader's.

    Raises:
        ArgumentError: ``count`` is not a positive integer.
    """

    def __init__(self, batches: Iterable[Batch], count: int, place: Callable[[Batch], Batch]) -> None:
        count = check_count(count, "count")
        iterator = iter(batches)
        source = iterator.source if isinstance(iterator, PaddedBatches) else iterator
        self._pass = source if isinstance(source, LoaderPass) else None
        if self._pass is not None:
            # In addition to those drawn ahead: one in training, and one with the caller.
            self._pass.remember(count + 2)
        self._drawn: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._capacity, self._stop = threading.Semaphore(count), threading.Event()
        self._last: tuple[Any, BaseException | None] | None = None
        settings = jax.config.read("jax_enable_x64"), jax.config.jax_default_device  # type: ignore[attr-defined]
        # The thread holds no reference to this object, so dropping this object ends the thread.
        arguments = iterator, place, self._drawn, self._capacity, self._stop, settings
        self._thread = threading.Thread(target=_draw_ahead, args=arguments, name="prefetch", daemon=True)
        self._thread.start()

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        if self._last is None:
            batch, error = self._drawn.get()
            if batch is not _END:
                self._capacity.release()
                return batch
            self._last = batch, error
            self._thread.join()
            if error is None and self._pass is not None:
                self._pass.end()
        if self._last[1] is not None:
            raise self._last[1]
        raise StopIteration

    def close(self) -> None:
        """Stops the thread after the batch it is drawing; batches drawn ahead are dropped."""
        self._last = self._last or (_END, None)
        self._stop.set()
        self._capacity.release()
        self._thread.join(_PATIENCE_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __del__(self) -> None:
        if hasattr(self, "_thread"):
            self._stop.set()
            self._capacity.release()


def _draw_ahead(
    iterator: Iterator[Batch],
    place: Callable[[Batch], Batch],
    drawn: queue.SimpleQueue[tuple[Any, BaseException | None]],
    capacity: threading.Semaphore,
    stop: threading.Event,
    settings: tuple[bool, Any],
) -> None:
    try:
        with jax.enable_x64(settings[0]), jax.default_device(settings[1]):
            while capacity.acquire() and not stop.is_set():
                batch = next(iterator, _END)
                if batch is _END:
                    break
                drawn.put((place(batch), None))
        drawn.put((_END, None))
    except BaseException as error:  # including SystemExit, which is for the caller to handle
        drawn.put((_END, error))
