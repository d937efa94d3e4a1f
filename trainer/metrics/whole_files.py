"""Files that take their name when they are whole. Checkpoints have more to keep, see `trainer.checkpoints.atomic`."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def named_when_whole(path: Path) -> Iterator[Path]:
    """Gives a temporary name beside ``path``; what is written to it gets that name when the block ends.

    If the block raises, the temporary is removed and ``path`` is what it was before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
