"""Pads short batches to a fixed shape, with a mask that tells examples from padding."""

from collections.abc import Iterator, Mapping
from typing import Any, Self

import jax
import numpy as np

from trainer.batches import checked_batch, summarize
from trainer.errors import ArgumentError, BatchError, warn
from trainer.types import Batch

MASK = "mask"
"""The batch entry that is 1 for an example and 0 for a row of padding: float32 of shape ``(batch_size,)``."""


def pad_batch(batch: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Returns a batch of ``size`` rows, with a mask that tells examples from padding.

    Padding repeats the last example, so that nothing is computed on values that do not occur in the data. The
    objective should average with the mask, and report the mask's sum as the batch weight. Averages over batches,
    devices and micro-batches are then averages over examples::

        weight = batch["mask"].sum()
        loss = (losses * batch["mask"]).sum() / weight  # losses: shape (size,), one for each row
        return loss, {"batch_weight": weight}

    Anything that ignores the mask sees the padding: batch normalization counts the last example several times.

    Args:
        batch: A mapping of arrays with the same leading dimension, the examples; scalars stay as they are.
        size: The number of rows to pad to.

    Returns:
        A dict of the same entries, and ``mask``, float32 of shape ``(size,)``: 1 for an example, 0 for padding.

    Raises:
        BatchError: ``batch`` is not a mapping, already has an entry ``mask``, has no common leading dimension, or
            has more than ``size`` examples.

    Example:
        >>> padded = pad_batch({"x": np.array([[1.0], [2.0]])}, 4)
        >>> print(padded["x"].ravel(), padded["mask"])
        [1. 2. 2. 2.] [1. 1. 0. 0.]
    """
    check_maskable(batch, "batch")
    rows, length = pad_rows(batch, size)
    return {**rows, MASK: np.float32(np.arange(size) < length)}


def pad_rows(batch: Any, size: int) -> tuple[Any, int]:
    """Returns a batch padded to ``size`` rows with its last example, and its example count; errors as `pad_batch`.

    Accepts any pytree, and adds no mask.
    """
    batch, length = checked_batch(batch)
    if length is None:
        raise BatchError(
            f"`batch` has no common leading dimension ({summarize(batch)}), so it cannot be padded; make its arrays "
            f"equally long, or leave `pad_to` out."
        )
    if length > size:
        raise BatchError(
            f"`batch` has {length} examples ({summarize(batch)}), more than the {size} to which it is padded; pass the "
            f"`batch_size` of the loader."
        )
    if length == size:
        return batch, length
    index = np.minimum(np.arange(size), length - 1)
    return jax.tree.map(lambda leaf: leaf[index] if np.ndim(leaf) else leaf, batch), length


def with_mask(batch: Any) -> Any:
    """Adds a mask of ones to a batch that has no mask. The batch may be of `jax.ShapeDtypeStruct`."""
    if isinstance(batch, Mapping) and MASK in batch:  # padded by the caller
        return batch
    check_maskable(batch, "batch")
    batch, length = checked_batch(batch)
    return batch if length is None else {**batch, MASK: np.ones(length, np.float32)}


def check_maskable(data: Any, name: str) -> None:
    """Raises `BatchError` unless ``data`` is a mapping to which an entry ``mask`` can be added."""
    if not isinstance(data, Mapping):
        raise BatchError(
            f"`{name}` is of type {type(data).__name__}, and padding adds an entry {MASK!r} to it; it must be a "
            f"mapping of names to arrays, such as {{'x': x, 'y': y}}."
        )
    if MASK in data:
        raise BatchError(
            f"`{name}` has an entry {MASK!r} already, the name under which padding is told from examples; rename it."
        )


def check_pad_to(pad_to: Any) -> None:
    """Raises `ArgumentError` unless ``pad_to`` is "batch" or None."""
    if pad_to is not None and not (isinstance(pad_to, str) and pad_to == "batch"):
        raise ArgumentError(f"`pad_to` is {pad_to!r}; it must be 'batch' or None.")


class PaddedBatches(Iterator[Batch]):
    """The batches of a loader, padded to the same number of rows.

    Args:
        batches: The batches.
        size: The number of rows; None for that of the first batch.
        mask: Whether to add a mask, as `pad_batch` does. A batch with a ``mask`` of shape ``(batch_size,)`` keeps it,
            with 0 for the rows added.
        setting: The source of ``size``, for a warning if the first batch has fewer rows; None for no warning.
        grows: Whether a batch with more rows is the size from then on, where it would be refused.

    Attributes:
        source: The batches.
        drawn: The number of examples in the latest batch.
    """

    def __init__(
        self,
        batches: Iterator[Batch],
        size: int | None = None,
        *,
        mask: bool = True,
        setting: str | None = None,
        grows: bool = False,
    ) -> None:
        self.source, self._size, self._mask, self._setting, self._grows = batches, size, mask, setting, grows
        self.drawn = 0

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Batch:
        batch, length = checked_batch(next(self.source))
        size = length or 1 if self._size is None else self._size
        size = self._size = max(size, length or 1) if self._grows else size
        if self._mask:
            padded, self.drawn = _pad_with_mask(batch, size), length or 1
        else:
            padded, self.drawn = pad_rows(batch, size)
        if self._setting is not None and self.drawn < size:
            warn(
                f"the first batch has {self.drawn} examples and is padded to {size}, which is {self._setting}: if all "
                f"are as short, every step computes rows that count for nothing. Pass the batch size of the loader."
            )
        self._setting = None
        return padded


def _pad_with_mask(batch: Any, size: int) -> dict[str, Any]:
    """Returns what `pad_batch` does; a mask of the caller's, with an entry for each row, stays."""
    own = batch.get(MASK) if isinstance(batch, Mapping) else None
    if own is None or np.ndim(own) != 1:
        return pad_batch(batch, size)
    rows, length = pad_rows(batch, size)
    is_added = np.arange(size) >= length
    return {**rows, MASK: np.where(is_added, 0, rows[MASK]).astype(rows[MASK].dtype) if length < size else rows[MASK]}
