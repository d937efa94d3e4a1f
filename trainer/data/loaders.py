"""Loaders: how one is opened, and one pass over it.

A loader is an iterable of batches, or a callable that returns one. An iterable is used as is; a callable is
called for every pass. The batch size is passed by name, so that it cannot bind to another option of the callable.
"""

import copy
import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any

from trainer.errors import ArgumentError, ArgumentTypeError, BatchError, warn
from trainer.types import Batch

WARN_AFTER = 10_000
"""A pass with no limit over a loader with no length warns after this many batches that it may be endless."""

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def open_loader(loader: Any, batch_size: int, name: str) -> Iterable[Batch]:
    """Returns the batches of one pass over a loader.

    Args:
        loader: An iterable of batches, or a callable that returns one. ``batch_size`` is passed to the parameter of
            that name, or to the only required positional parameter; all other options keep their defaults.
        batch_size: The number of examples in a batch, for a callable that takes it.
        name: The loader's name in errors.

    Raises:
        ArgumentTypeError: It is neither, its result is not iterable, or iterating over it yields keys or rows.
        ArgumentError: The callable has other required parameters.
    """
    check_loader(loader, name)
    if isinstance(loader, Iterable):
        return loader
    parameter = _size_parameter(loader, name)
    if parameter is None:
        batches = loader()
    elif parameter.kind is inspect.Parameter.POSITIONAL_ONLY or parameter.name != "batch_size":
        batches = loader(batch_size)
    else:
        batches = loader(batch_size=batch_size)
    _check_iterable(batches, f"`{name}` returned an object that")
    return batches  # type: ignore[no-any-return]


def check_loader(loader: Any, name: str) -> None:
    """Checks that a loader can be opened, without opening it.

    Raises:
        ArgumentTypeError, ArgumentError: As for `open_loader`.
    """
    if callable(loader) and not isinstance(loader, Iterable):
        _size_parameter(loader, name)
    else:
        _check_iterable(loader, f"`{name}`")


def takes_batch_size(loader: Any, name: str) -> bool:
    """Tells whether a loader is a callable that takes the batch size; errors as for `open_loader`."""
    return callable(loader) and not isinstance(loader, Iterable) and _size_parameter(loader, name) is not None


def one_pass(loader: Any, batch_size: int, name: str, limit: int | None, *, bound: str) -> Iterator[Batch]:
    """Yields the batches of one pass, at most ``limit``.

    Args:
        loader: As for `open_loader`.
        batch_size: As for `open_loader`.
        name: As for `open_loader`.
        limit: The maximum number of batches; None for all.
        bound: How to bound an endless loader, for the warning.

    Raises:
        ArgumentError: There are no batches.
        BatchError: The loader yielded None.
    """
    iterator = iter(open_loader(loader, batch_size, name))
    drawn = 0
    while limit is None or drawn < limit:
        try:
            batch = next(iterator)
        except StopIteration:
            if not drawn:
                raise no_batch(name) from None
            return
        except Exception as error:
            add_position(error, name, drawn)
            raise
        check_drawn(batch, drawn, loader, name, limit, bound)
        drawn += 1
        yield batch


def first_batches(loader: Any, batch_size: int, name: str, count: int) -> list[Batch]:
    """Returns copies of the first batches of a pass, at most ``count``; errors as for `one_pass`."""
    # A loader may reuse one buffer.
    return [copy.deepcopy(batch) for batch in one_pass(loader, batch_size, name, count, bound="")]


def check_drawn(batch: Any, drawn: int, loader: Any, name: str, limit: int | None, bound: str) -> None:
    """Checks a batch as drawn from a loader; ``drawn`` is the number of earlier batches in the pass.

    Warns once per pass that has no limit and seems endless.

    Raises:
        BatchError: The batch is None.
    """
    if batch is None:
        raise BatchError(
            f"`{name}` yielded None in place of batch {drawn} of its pass (the first is batch 0). None is neither a "
            f"batch nor the end of a pass; skip the record in the loader, or end the pass by returning."
        )
    if drawn == WARN_AFTER and limit is None and not isinstance(loader, Sized):
        warn(
            f"`{name}` has yielded {drawn:,} batches in this pass and has no length, so the pass may never end. If the "
            f"loader is endless, {bound}; if it is only long, there is nothing to do."
        )


def add_position(error: Exception, name: str, drawn: int) -> None:
    """Adds a note to a loader's error: which batch it was about to yield."""
    error.add_note(f"raised by `{name}` in place of batch {drawn} of its pass (the first is batch 0)")


def no_batch(name: str) -> ArgumentError:
    """Returns the error for a pass that yielded nothing."""
    return ArgumentError(
        f"`{name}` yielded no batch. If it is an iterator it was used up by an earlier pass; pass a callable "
        f"that makes a new one, or something that can be iterated over again."
    )


def warn_of_unseen(loader: Any, batches: Iterable[Batch], name: str, limit: int | None) -> None:
    """Warns if every pass starts over and stops before the loader's end, so that some batches are never seen.

    Args:
        loader: The loader.
        batches: The result of `open_loader`.
        name: Its name in the warning.
        limit: The maximum number of batches in a pass.
    """
    if limit is None or isinstance(batches, Iterator) or not isinstance(batches, Sized):
        return
    try:
        length = len(batches)
    except TypeError:  # an iterable-style torch loader has `__len__`, but no length
        return
    if length > limit:
        calls = "is called again" if batches is not loader else "starts over"
        warn(
            f"`{name}` has {length} batches and {calls} in every epoch, and `TrainingConfig.steps_per_epoch` ends the "
            f"epoch after {limit}: unless it shuffles, the rest ({length - limit} of {length}) is never seen. Pass an "
            f"iterator, which continues where the epoch before ended, or leave `steps_per_epoch` out."
        )


def check_batches(batches: Any, subject: str) -> None:
    """Checks that a loop over an iterable can give batches.

    Raises:
        ArgumentTypeError: It gives the keys of a mapping, the rows of a data set, or the columns of one.
    """
    if isinstance(batches, Mapping):
        raise ArgumentTypeError(
            f"{subject} is a {type(batches).__name__}: a loop over it gives its keys, not batches. Pass [batch] if it "
            f"is one batch; for arrays of a whole data set call train(data, num_epochs, batch_size)."
        )
    _check_rows(batches, subject)
    _check_columns(batches, subject)


def _check_iterable(batches: Any, subject: str) -> None:
    check_batches(batches, subject)
    if hasattr(batches, "__array__") and hasattr(batches, "shape"):
        raise ArgumentTypeError(
            f"{subject} is an array of type {type(batches).__name__}: a loop over it gives its rows, not batches. Pass "
            f"[batch] if it is one batch; for a whole data set call train(data, num_epochs, batch_size)."
        )
    if not isinstance(batches, Iterable):
        raise ArgumentTypeError(
            f"{subject} is of type {type(batches).__name__}; it must be an iterable of batches, or a callable "
            f"that returns one."
        )


def _check_columns(loader: Any, subject: str) -> None:
    """Refuses a list of the columns of a data set, ``[x, y]``: batches of one loader have equally many dimensions."""
    if not isinstance(loader, list) or not all(hasattr(one, "__array__") and hasattr(one, "shape") for one in loader):
        return
    shapes = [tuple(one.shape) for one in loader]
    if all(shapes) and len({shape[0] for shape in shapes}) == 1 and len({len(shape) for shape in shapes}) > 1:
        listed = ", ".join(map(str, shapes[:5])) + (", …" if len(shapes) > 5 else "")
        raise ArgumentTypeError(
            f"{subject} is a list of arrays of shapes {listed}, and a list is a loader: each item would be a batch. "
            f"Pass a tuple if they are the columns of one data set, (x, y)."
        )


def _check_rows(loader: Any, subject: str) -> None:
    """Refuses a Hugging Face dataset that iterates over examples: batches have no columns of scalars."""
    features = getattr(loader, "features", None)
    if not hasattr(loader, "with_format") or not isinstance(features, Mapping):
        return
    if any(type(feature).__name__ in ("Value", "ClassLabel") for feature in features.values()):
        raise ArgumentTypeError(
            f"{subject} is a {type(loader).__name__} of Hugging Face: a loop over it gives rows, not batches. Pass "
            f"dataset.with_format('numpy')[:], which is data in memory, or a loader that reads batches: "
            f"lambda batch_size: dataset.with_format('numpy').iter(batch_size)."
        )


def _size_parameter(function: Callable[..., Any], name: str) -> inspect.Parameter | None:
    """Returns the parameter that takes the batch size, or None if there is none.

    Raises:
        ArgumentError: The function has other required parameters.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some builtins have no signature, so nothing can be matched by name
        return None
    bound = function.keywords if isinstance(function, functools.partial) else {}  # keep what the caller bound
    parameters = [one for one in parameters if one.kind not in _VARIADIC and one.name not in bound]
    named = [one for one in parameters if one.name == "batch_size"]
    required = [one for one in parameters if one.default is inspect.Parameter.empty]
    if not named and len(required) == 1 and required[0].kind in _POSITIONAL:
        named = required
    others = [one.name for one in required if one not in named]
    if named and named[0].kind is inspect.Parameter.POSITIONAL_ONLY and named[0] is not parameters[0]:
        others = [one.name for one in parameters[: parameters.index(named[0])]]
    if others:
        raise ArgumentError(
            f"`{name}` is a callable that requires {', '.join(f'`{other}`' for other in others)}, and nothing but "
            f"`batch_size` is passed to it. Bind the others: lambda batch_size: loader(..., batch_size=batch_size)."
        )
    return named[0] if named else None
