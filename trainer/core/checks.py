"""Checks of arguments, and hints for messages, that several modules share."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

from trainer.errors import ArgumentError, ArgumentTypeError


def check_count(value: Any, name: str) -> int:
    """Returns ``value`` as a positive int; any type with ``__index__`` is taken, except bool.

    Raises:
        ArgumentTypeError: ``value`` is not an integer.
        ArgumentError: ``value`` is not positive.
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ArgumentTypeError(f"`{name}` is {value!r} of type {type(value).__name__}; it must be a positive integer.")
    if int(value) <= 0:
        raise ArgumentError(f"`{name}` is {value!r}; it must be a positive integer.")
    return int(value)


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns the end of a message about an unknown ``name``: the closest known name, or all known names."""
    known = sorted(known)
    near = get_close_matches(name, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}."
