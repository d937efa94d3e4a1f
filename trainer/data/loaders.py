"""Loaders: how one is opened, and one pass over it.

A loader is an iterable of batches, or a callable that returns one. An iterable is used as is; a callable is
called for every pass. The batch size and the epoch are passed by name, so that they cannot bind to another option of
the callable.
"""

import contextlib
import copy
import functools
import hashlib
import inspect
import operator
import re
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from typing import Any, Self

import jax
import numpy as np

from trainer.batches import GIVES_EXAMPLES, is_indexed
from trainer.errors import ArgumentError, ArgumentTypeError, BatchError, warn
from trainer.types import Batch

WARN_AFTER = 10_000
"""A pass with no limit over a loader with no length warns after this many batches that it may be endless."""

_NO_SIZE = re.compile(
    r"data(set)?|device|directory|epochs?|file(name)?s?|index|key|mesh|mode|num_(epochs|steps|workers)|paths?|prefix|"
    r"rank|rngs?|root|seed|shard|shuffle|split|state|steps?|subset|train(ing)?|worker"
)
"""Names of parameters that mean something else than a batch size."""

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def open_loader(loader: Any, batch_size: int, name: str, *, epoch: int | None = None) -> Iterable[Batch]:
    """Returns the batches of one pass over a loader.

    Args:
        loader: An iterable of batches, or a callable that returns one. ``batch_size`` and ``epoch`` are passed to the
            parameters of these names. Without a ``batch_size``, a single required positional parameter takes it, unless
            its name means something else (``seed``, ``split``). All other options keep their defaults.
        batch_size: The number of examples in a batch, for a callable that takes it.
        name: The loader's name in errors.
        epoch: The number of epochs finished before, for a callable that takes it; None if there are no epochs.

    Raises:
        ArgumentTypeError: It is neither, its result is not iterable, or iterating over it yields keys or rows.
        ArgumentError: The callable has other required parameters.
    """
    if not is_factory(loader):
        if is_indexed(loader):  # checked before the run, since that reads a batch
            return _InOrder(loader)
        check_loader(loader, name)
        return loader  # type: ignore[no-any-return]
    size, takes_epoch = _parameters(loader, name, has_epoch=epoch is not None)
    by_name: dict[str, Any] = {"epoch": epoch} if takes_epoch else {}
    if size is None:
        batches = loader(**by_name)
    elif size.kind is inspect.Parameter.POSITIONAL_ONLY or size.name != "batch_size":
        batches = loader(batch_size, **by_name)
    else:
        batches = loader(batch_size=batch_size, **by_name)
    _check_iterable(batches, f"`{name}` returned an object that")
    return _InOrder(batches) if is_indexed(batches) else batches


class _InOrder:
    """The batches of an object that `is_indexed`, such as a ``keras.utils.Sequence``, in the order of their indices.

    As Keras does, it calls the object's ``on_epoch_end()`` after the last, in which many shuffle.
    """

    def __init__(self, batches: Any) -> None:
        self._batches = batches

    def __len__(self) -> int:
        return len(self._batches)

    def __iter__(self) -> Iterator[Batch]:
        return _Indexed(self._batches)


class _Indexed:
    """One pass over the batches of an `_InOrder`."""

    def __init__(self, batches: Any) -> None:
        # Up to its length: Keras asks for no IndexError beyond, and slices of arrays raise none.
        self._batches, self._indices = batches, iter(range(len(batches)))

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        for index in self._indices:
            return self._batches[index]
        self.finish()
        raise StopIteration

    def finish(self) -> None:
        """Calls ``on_epoch_end()``, once, if all batches have been drawn. The caller no longer needs the last one."""
        batches = self._batches
        if batches is not None and not operator.length_hint(self._indices):
            self._batches = None
            _end_epoch(batches)


_ends: dict[int, tuple[Any, int]] = {}
"""By the id of an object that `is_indexed`: a weak reference to it, and how many epochs of it this process ended."""


def _end_epoch(batches: Any) -> None:
    if callable(end := getattr(batches, "on_epoch_end", None)):
        end()
        with contextlib.suppress(TypeError):  # an object with slots
            key = id(batches)
            _ends[key] = weakref.ref(batches, lambda _: _ends.pop(key, None)), _ended_epochs(batches) + 1


def _ended_epochs(batches: Any) -> int:
    reference, count = _ends.get(id(batches), (None, 0))
    return count if reference is not None and reference() is batches else 0


def end_finished_epochs(loader: Any, count: int) -> None:
    """Calls ``on_epoch_end()`` of an object that `is_indexed` until this process has done so ``count`` times."""
    if not is_factory(loader) and is_indexed(loader):
        for _ in range(count - _ended_epochs(loader)):
            _end_epoch(loader)


def keeps_order(loader: Any, name: str) -> bool:
    """Tells whether a loader is known to yield the same batches in an epoch, whatever was drawn from it before."""
    if is_factory(loader):
        return _parameters(loader, name, has_epoch=True)[1]
    parts = [loader, *(getattr(loader, part, None) for part in ("dataset", "sampler", "batch_sampler"))]
    tells_epoch = any(callable(getattr(part, "set_epoch", None)) for part in parts)  # a callback sets it
    return tells_epoch or isinstance(loader, list | tuple) or is_indexed(loader)


def finish_pass(iterator: Iterator[Batch]) -> None:
    """Tells an iterator of `open_loader` that its pass has ended at a limit, which may be its last batch."""
    if isinstance(iterator, _Indexed):
        iterator.finish()


def check_loader(loader: Any, name: str, *, has_epoch: bool = False) -> None:
    """Checks that a loader can be opened, without opening it; ``has_epoch`` tells whether with an ``epoch``.

    Raises:
        ArgumentTypeError, ArgumentError: As for `open_loader`.
    """
    if is_factory(loader):
        _parameters(loader, name, has_epoch=has_epoch)
    else:
        _check_iterable(loader, f"`{name}`")


def is_factory(loader: Any) -> bool:
    """Tells whether a loader is a callable that is called for every pass."""
    return callable(loader) and not isinstance(loader, Iterable)


def takes_batch_size(loader: Any, name: str) -> bool:
    """Tells whether a training loader is a callable that takes the batch size; errors as for `open_loader`."""
    return is_factory(loader) and _parameters(loader, name, has_epoch=True)[0] is not None


def one_pass(
    loader: Any, batch_size: int, name: str, limit: int | None, *, bound: str, epoch: int | None = None
) -> Iterator[Batch]:
    """Yields the batches of one pass, at most ``limit``.

    Args:
        loader: As for `open_loader`.
        batch_size: As for `open_loader`.
        name: As for `open_loader`.
        limit: The maximum number of batches; None for all.
        bound: How to bound an endless loader, for the warning.
        epoch: As for `open_loader`.

    Raises:
        ArgumentError: There are no batches.
        BatchError: The loader yielded None.
    """
    iterator = iter(open_loader(loader, batch_size, name, epoch=epoch))
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
    finish_pass(iterator)


def first_batches(loader: Any, batch_size: int, name: str, count: int) -> list[Batch]:
    """Returns copies of the first batches of a pass, at most ``count``; errors as for `one_pass`."""
    # A loader may reuse one buffer.
    return [copy.deepcopy(batch) for batch in one_pass(loader, batch_size, name, count, bound="", epoch=0)]


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


def check_seen(loader: Any, batches: Iterable[Batch], name: str, limit: int | None) -> bool:
    """Warns if every pass starts over and stops before the loader's end, so that some batches are never seen.

    Args:
        loader: The loader.
        batches: The result of `open_loader`.
        name: Its name in the warning.
        limit: The maximum number of batches in a pass.

    Returns:
        Whether that is still unknown, because the loader has no length; see `check_seen_again`.
    """
    if limit is None or (batches is loader and isinstance(batches, Iterator)):
        return False
    try:
        length = len(batches)  # type: ignore[arg-type]
    except (TypeError, NotImplementedError):  # an iterable-style torch loader has `__len__`, but no length
        return True
    if length > limit:
        rest = f"unless it shuffles, the rest ({length - limit} of {length})"
        _warn_of_unseen(loader, name, f"has {length} batches", limit, rest)
    return False


def check_seen_again(loader: Any, rest: Iterator[Batch], name: str, limit: int, first: bytes | None) -> None:
    """Warns of the same for a loader without a length, two passes of which have begun with the same batch.

    Args:
        loader: The loader.
        rest: The iterator of the second, which has ended after ``limit`` batches. One more is drawn from it: if there
            is none, or if it is the first one again, nothing is left out.
        name: Its name in the warning.
        limit: The maximum number of batches in a pass.
        first: The `digest_of` that batch.
    """
    try:
        further = digest_of(next(rest))
    except Exception:  # the pass has ended, whatever it raises now
        return
    if further not in (None, first):
        _warn_of_unseen(loader, name, "begins with the same batch", limit, "what comes after")


def digest_of(batch: Any) -> bytes | None:
    """Returns a hash of a batch; None for one whose values cannot be read here."""
    try:
        leaves, structure = jax.tree.flatten(dict(batch) if isinstance(batch, Mapping) else batch)
        content = hashlib.sha256(str(structure).encode())
        for array in map(np.asarray, leaves):
            if array.dtype.hasobject:
                return None
            content.update(f"{array.dtype}{array.shape}".encode() + array.tobytes())
    except Exception:  # an array of another process, or no batch at all, of which the step tells
        return None
    return content.digest()


def _warn_of_unseen(loader: Any, name: str, what: str, limit: int, rest: str) -> None:
    calls = "is called again" if is_factory(loader) else "starts over"
    instead = ", a callable that takes `epoch`" * is_factory(loader)
    warn(
        f"`{name}` {what} and {calls} in every epoch, and `TrainingConfig.steps_per_epoch` ends the epoch after "
        f"{limit}: {rest} is never seen. Pass an iterator, which continues where the epoch before ended{instead}, or "
        f"leave `steps_per_epoch` out."
    )


def gives_batches(loader: Any) -> bool:
    """Tells whether an object that `is_indexed` gives batches: the leaves of its first item share their first axis.

    Those of an example do not, but for examples of one array or of arrays of one length.
    """
    if any(base.__module__.startswith("torch.utils.data") for base in type(loader).__mro__):  # map-style data sets
        return False
    if not len(loader):
        return True  # of which the pass tells
    shapes: list[tuple[int, ...]] = [getattr(leaf, "shape", ()) for leaf in jax.tree.leaves(loader[0])]
    return bool(shapes) and all(shapes) and len({shape[0] for shape in shapes}) == 1


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
    if isinstance(batches, str | bytes | set | frozenset) and batches:  # the pass tells of an empty one
        raise ArgumentTypeError(
            f"{subject} is a {type(batches).__name__}, which holds no batches in an order; it must be an iterable of "
            f"batches, or a callable that returns one."
        )
    if hasattr(batches, "__array__") and hasattr(batches, "shape"):
        raise ArgumentTypeError(
            f"{subject} is an array of type {type(batches).__name__}: a loop over it gives its rows, not batches. Pass "
            f"[batch] if it is one batch; for a whole data set call train(data, num_epochs, batch_size)."
        )
    if is_indexed(batches):
        if not gives_batches(batches):
            raise ArgumentTypeError(f"{subject} is a {type(batches).__name__}, {GIVES_EXAMPLES}")
    elif not isinstance(batches, Iterable):
        raise ArgumentTypeError(
            f"{subject} is of type {type(batches).__name__}; it must be an iterable of batches, or a callable "
            f"that returns one."
        )


def _check_columns(loader: Any, subject: str) -> None:
    """Refuses the columns of a data set, ``[x, y]``: batches of one loader have equally many dimensions."""
    arrays = isinstance(loader, list | tuple) and all(hasattr(a, "__array__") and hasattr(a, "shape") for a in loader)
    if not arrays:
        return
    shapes = [tuple(one.shape) for one in loader]
    if all(shapes) and len({shape[0] for shape in shapes}) == 1 and len({len(shape) for shape in shapes}) > 1:
        listed = ", ".join(map(str, shapes[:5])) + (", …" if len(shapes) > 5 else "")
        if isinstance(loader, list):
            raise ArgumentTypeError(
                f"{subject} is a list of arrays of shapes {listed}, and a list is a loader: each item would be a "
                f"batch. Pass a tuple if they are the columns of one data set, (x, y)."
            )
        raise ArgumentTypeError(
            f"{subject} is a tuple of arrays of shapes {listed}, and a loader is expected: each item would be a batch. "
            f"Pass [(x, y)] if it is one batch; for a whole data set call train(data, num_epochs, batch_size)."
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


def _parameters(function: Callable[..., Any], name: str, *, has_epoch: bool) -> tuple[inspect.Parameter | None, bool]:
    """Returns the parameter that takes the batch size, if there is one, and whether another takes the epoch.

    Raises:
        ArgumentError: The function has other required parameters.
    """
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):  # some builtins have no signature, so nothing can be matched by name
        return None, False
    bound = function.keywords if isinstance(function, functools.partial) else {}  # keep what the caller bound
    parameters = [one for one in parameters if one.kind not in _VARIADIC and one.name not in bound]
    epochs = [one for one in parameters if has_epoch and one.name == "epoch"]
    epochs = [one for one in epochs if one.kind is not inspect.Parameter.POSITIONAL_ONLY]
    named = [one for one in parameters if one.name == "batch_size"]
    required = [one for one in parameters if one.default is inspect.Parameter.empty and one not in epochs]
    alone = None if named or len(required) != 1 else required[0]
    is_size = alone is not None and alone.kind in _POSITIONAL and not _NO_SIZE.fullmatch(alone.name)
    if is_size and (not epochs or alone is parameters[0]):
        named = required
    others = [one.name for one in required if one not in named]
    if named and named[0].kind is inspect.Parameter.POSITIONAL_ONLY and named[0] is not parameters[0]:
        others = [one.name for one in parameters[: parameters.index(named[0])]]
    if others:
        given = "`batch_size` and `epoch` are" if has_epoch else "`batch_size` is"
        raise ArgumentError(
            f"`{name}` is a callable that requires {', '.join(f'`{other}`' for other in others)}, and nothing but "
            f"{given} passed to it. Bind the others: lambda batch_size: loader(..., batch_size=batch_size)."
        )
    return named[0] if named else None, bool(epochs)
