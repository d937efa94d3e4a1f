"""`in_home`: every argument that is a path may begin with ``~``."""

import os
from pathlib import Path
from typing import Any


def in_home(path: Any) -> Any:
    """Returns a path that begins with ``~`` as one in the home directory, and any other, or None, as it is.

    ``~name`` of a user that does not exist is the name of a file, as for a shell.
    """
    is_in_home = isinstance(path, str | os.PathLike) and os.fspath(path).startswith("~")
    return Path(os.path.expanduser(path)) if is_in_home else path
