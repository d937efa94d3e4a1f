"""Argument checks and message hints shared by several modules."""

import contextlib
import inspect
import reprlib
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from typing import Any

from trainer.errors import ArgumentError, ArgumentTypeError


def check_count(value: Any, name: str, *, least: int = 1, otherwise: str = "") -> int:
    """Returns ``value`` as a positive int, or with ``least=0`` a non-negative one.

    Any type with ``__index__`` is accepted, except bool. The message says what to pass ``otherwise``.

    Raises:
        ArgumentTypeError: ``value`` is not an integer.
        ArgumentError: ``value`` is less than ``least``.
    """
    wanted = ("a positive integer" if least else "an integer of at least 0") + otherwise
    shape = getattr(value, "shape", ())
    if shape:  # `train(x, y, 1, 64)`
        raise ArgumentTypeError(
            f"`{name}` is an array of shape {tuple(shape)}; it must be {wanted}. All arrays of the data are "
            f"one argument, the first: {{'x': x, 'y': y}}, or (x, y)."
        )
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise ArgumentTypeError(
            f"`{name}` is {reprlib.repr(value)} of type {type(value).__name__}; it must be {wanted}."
        )
    if int(value) < least:
        raise ArgumentError(f"`{name}` is {value!r}; it must be {wanted}.")
    return int(value)


def check_interval(value: Any, name: str) -> int | None:
    """Returns ``value``, an interval in steps, as a positive int, or None for never.

    Raises:
        ArgumentTypeError, ArgumentError: As for `check_count`.
    """
    return None if value is None else check_count(value, name, otherwise=", or None for never")


def check_call(function: Callable[..., Any], name: str, call: str, *args: Any, **kwargs: Any) -> None:
    """Checks that a callable takes the arguments that it will be called with. One without a signature passes.

    Args:
        function: The callable.
        name: The argument that it came in, for the message.
        call: How it is called, for the message.
        *args, **kwargs: Stand for the arguments.

    Raises:
        ArgumentTypeError: It does not take them.
    """
    try:
        signature = inspect.signature(function, follow_wrapped=False)  # an adapter takes what it takes itself
    except Exception:  # it has none, or annotations that cannot be evaluated
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        raise ArgumentTypeError(f"`{name}` takes {signature}, and is called as {call}: {error}.") from None


def check_number(value: Any, name: str) -> float:
    """Returns ``value`` as a float; accepts any real number and one-element arrays, but no bool or text.

    Raises:
        ArgumentTypeError: ``value`` is not a number.
    """
    if not isinstance(value, bool | str | bytes):
        with contextlib.suppress(TypeError, ValueError):
            return float(value)
    raise ArgumentTypeError(f"`{name}` is {value!r:.60} of type {type(value).__name__}; it must be a number.")


def check_bool(value: Any, name: str) -> bool:
    """Returns ``value`` if it is a bool.

    Raises:
        ArgumentTypeError: It is not.
    """
    if not isinstance(value, bool):
        raise ArgumentTypeError(f"`{name}` is {value!r:.60} of type {type(value).__name__}; it must be True or False.")
    return value


def check_choice(value: Any, choices: Iterable[str], name: str) -> str:
    """Returns ``value`` if it is one of the strings ``choices``.

    Raises:
        ArgumentError: It is not.
    """
    choices = tuple(choices)
    if not isinstance(value, str) or value not in choices:
        listed = f"{', '.join(map(repr, choices[:-1]))} or {choices[-1]!r}"
        raise ArgumentError(f"`{name}` is {reprlib.repr(value)}; it must be {listed}.")
    return value


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns the end of a message about an unknown ``name``: the closest known name, or all known names."""
    known = sorted(known)
    # Normalized, so that "AdamW" finds adamw (not adam) and "one-cycle" finds one_cycle.
    plain = {_plain(candidate): candidate for candidate in known}
    near = get_close_matches(_plain(name), plain, n=1)
    return f"did you mean {plain[near[0]]!r}?" if near else f"known: {', '.join(known) or 'none'}."


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "").replace(" ", "")
