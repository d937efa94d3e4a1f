"""What a run ran in: the command, the code with its versions, and the devices. No environment variable is looked at."""

import functools
import math
import os
import platform
import re
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from trainer.checkpoints.saving import versions

_GIT_SECONDS = 2.0

_SECRET_NAME = re.compile(
    r"(^|[-_.])(api[-_.]?key|access[-_.]?key|private[-_.]?key|key|token|secret|password|passwd|credentials?|auth)$",
    re.IGNORECASE,
)
_SECRET_VALUE = re.compile(r"\b(sk-|hf_|gh[pousr]_|github_pat_|glpat-|xox[abp]-|AKIA|AIza|eyJ)[\w.-]{12,}")
_LOGIN = re.compile(r"(?<=://)[^/@\s]+(?=@)")
_HIDDEN = "***"


def surroundings(devices: Iterable[jax.Device]) -> dict[str, Any]:
    """Returns what a run on some devices ran in, as plain values."""
    devices = list(devices)
    return {
        "command": without_secrets(sys.argv),
        "directory": os.getcwd(),
        "git": dict(git_state(os.getcwd())),
        "python": platform.python_version(),
        "versions": versions(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "devices": {
            "kind": ", ".join(sorted({device.device_kind for device in devices})),
            "count": len(devices),
            "processes": jax.process_count(),
        },
    }


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """Returns the words of a command line, ``***`` in place of what looks like a password or a token.

    That is the value of an option whose name ends like one (``--api-key=…``, ``--token …``, ``auth.password=…``), what
    begins as the tokens of well-known services do, and a login in an address. Anything else is kept.

    Example:
        >>> without_secrets(["train.py", "--lr", "1", "--api-key", "abc", "db.password=x", "http://me:pw@host/"])
        ['train.py', '--lr', '1', '--api-key', '***', 'db.password=***', 'http://***@host/']
    """
    shown, hide_next = [], False
    for word in map(str, arguments):
        name, equals, _ = word.partition("=")
        if hide_next and not word.startswith("-"):
            shown.append(_HIDDEN)
        elif equals and is_secret(name):
            shown.append(f"{name}={_HIDDEN}")
        else:
            shown.append(_masked(word))
        hide_next = not equals and word.startswith("-") and is_secret(name)
    return shown


def is_secret(name: str) -> bool:
    """Tells whether a name is that of a password or a token."""
    return _SECRET_NAME.search(name) is not None


def as_json(value: Any, depth: int = 0) -> Any:
    """Returns values that JSON has, for people: what it lacks as text, and no secrets under names that tell them."""
    if isinstance(value, Mapping) and depth < 20:
        return {
            str(key): _HIDDEN if is_secret(str(key)) and inner else as_json(inner, depth + 1)
            for key, inner in value.items()
        }
    if isinstance(value, list | tuple) and depth < 20:
        return [as_json(inner, depth + 1) for inner in value]
    if value is None or type(value) in (bool, int) or (type(value) is float and math.isfinite(value)):
        return value
    return _masked(str(value))


def _masked(text: str) -> str:
    return _LOGIN.sub(_HIDDEN, _SECRET_VALUE.sub(_HIDDEN, text))


@functools.lru_cache(maxsize=8)  # the code that runs is that of the first look
def git_state(directory: str) -> tuple[tuple[str, Any], ...]:
    """Returns pairs of the commit of the repository that a directory is in, and whether tracked files differ from it.

    Empty without a repository, without git, or where it takes more than two seconds. It writes nothing, and runs no
    program that a repository asks for.
    """
    if not any((parent / ".git").exists() for parent in (Path(directory), *Path(directory).parents)):
        return ()
    settings = ["-c", "core.fsmonitor=false", "-c", "core.hooksPath=/dev/null", "-c", "core.untrackedCache=false"]
    command = ["git", "--no-optional-locks", *settings, "status"]
    command += ["--porcelain=v2", "--branch", "--untracked-files=no", "--ignore-submodules"]
    try:
        done = subprocess.run(  # noqa: S603 - a fixed command
            command, cwd=directory, capture_output=True, timeout=_GIT_SECONDS, check=True, stdin=subprocess.DEVNULL
        )
    except (OSError, subprocess.SubprocessError):
        return ()
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    about = dict(line[2:].split(" ", 1) for line in lines if line.startswith("# branch.") and " " in line[2:])
    commit = about.get("branch.oid", "")
    if not re.fullmatch(r"[0-9a-f]{40,64}", commit):  # "(initial)"
        return ()
    return (
        ("commit", commit),
        ("branch", about.get("branch.head", "")),
        ("is_dirty", any(not line.startswith("#") for line in lines)),
    )
