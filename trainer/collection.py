"""Python's garbage collector during a run: at chosen moments, not in the middle of a step."""

import contextlib
import gc
from collections.abc import Callable, Iterator

# So many objects that may be garbage are worth a pause of about a millisecond.
_MANY = 20_000


@contextlib.contextmanager
def scheduled_collection() -> Iterator[Callable[[], None]]:
    """Keeps the collector from running by itself inside the block.

    What was there before the block is left out of collections inside it, which makes them short: JAX
    alone has some hundred thousand objects. Afterwards everything is as it was. A collector that
    the caller has switched off stays off.

    Yields:
        A function that collects, if enough has come together since.
    """
    if not gc.isenabled():
        yield lambda: None
        return
    freeze = gc.get_freeze_count() == 0

    def collect() -> None:
        if gc.get_count()[0] > _MANY:
            gc.collect()

    gc.disable()
    if freeze:
        gc.freeze()
    try:
        yield collect
    finally:
        if freeze:
            gc.unfreeze()
        gc.enable()
