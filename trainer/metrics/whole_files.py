"""Atomic files without locks or flushes to disk; for checkpoints, see `trainer.checkpoints.atomic`."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def named_when_whole(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path``, which is renamed to ``path`` when the block ends.

    If the block raises, the temporary file is removed and ``path`` is unchanged.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
