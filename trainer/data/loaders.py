"""Loaders of the caller's: how one is opened, and one pass over it."""

import inspect
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

from trainer.errors import ArgumentError, ArgumentTypeError
from trainer.types import Batch


def open_loader(loader: Any, batch_size: int, name: str) -> Iterable[Batch]:
    """Returns one pass over a loader.

    Args:
        loader: Something to iterate over, taken as it is; or a callable that returns such a thing,
            called with ``batch_size`` if it takes an argument and with nothing if it takes none.
        batch_size: What to call it with.
        name: What to call the loader in an error.

    Raises:
        ArgumentTypeError: It is neither, or what it returned cannot be iterated over.
    """
    batches = loader
    if not isinstance(loader, Iterable) and callable(loader):
        batches = loader(batch_size) if takes_batch_size(loader) else loader()
    if not isinstance(batches, Iterable):
        where = f"`{name}`" if batches is loader else f"`{name}` returned an object that"
        raise ArgumentTypeError(
            f"{where} is of type {type(batches).__name__}; it must be an iterable of batches, or a callable "
            f"that returns one."
        )
    return batches


def one_pass(loader: Any, batch_size: int, name: str, limit: int | None) -> Iterator[Batch]:
    """Yields the batches of one pass, at most ``limit``.

    Raises:
        ArgumentError: There was none.
    """
    empty = True
    for batch in islice(open_loader(loader, batch_size, name), limit):
        empty = False
        yield batch
    if empty:
        raise no_batch(name)


def no_batch(name: str) -> ArgumentError:
    """Returns the error of a pass that yielded nothing."""
    return ArgumentError(
        f"`{name}` yielded no batch. If it is an iterator it was used up by an earlier pass; pass a callable "
        f"that makes a new one, or something that can be iterated over again."
    )


def takes_batch_size(loader: Any) -> bool:
    """Tells whether a loader is a callable that is told the size of a batch."""
    return callable(loader) and not isinstance(loader, Iterable) and _takes_argument(loader)


def _takes_argument(function: Callable[..., Any]) -> bool:
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):  # some builtins have no signature to look at
        return True
    kinds = (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    )
    return any(parameter.kind in kinds for parameter in parameters)
