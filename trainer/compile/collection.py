"""Python's garbage collector during a run: at chosen moments, not in the middle of a step."""

import contextlib
import gc
from collections.abc import Callable, Iterator

# So many objects that may be garbage are worth a pause of about a millisecond.
_MANY = 20_000


@contextlib.contextmanager
def scheduled_collection() -> Iterator[Callable[[], None]]:
    """Keeps the collector from running by itself inside the block, and starts it again afterwards.

    A collector that the caller has switched off stays off.

    Yields:
        A function that collects what came since the last time, if that is much: a short pause, since
        it leaves alone what has been there for longer.
    """
    if not gc.isenabled():
        yield lambda: None
        return

    def collect() -> None:
        if gc.get_count()[0] > _MANY:
            gc.collect(1)

    gc.disable()
    try:
        yield collect
    finally:
        gc.enable()
