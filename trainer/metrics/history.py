"""The history of a run: its logged rows, as an append-only sequence that is cheap to copy and to save."""

import dataclasses
import functools
import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Self

import msgpack

from trainer.metrics.average import MAX_PENDING, read

Row = dict[str, Any]

_CHUNK = 256

Figures = dict[str, tuple[tuple[int, float], ...]]
"""Figures of epochs by name: pairs of the step at which an epoch ended, and the value."""

MAX_EPOCHS = 1000
"""Maximum number of epochs whose figures are kept; with more, some of the earlier ones are dropped."""


@dataclasses.dataclass(frozen=True)
class _Chunk:
    """Rows already read from the device and final; packed once, however often they are saved."""

    rows: tuple[Row, ...]

    @functools.cached_property
    def packed(self) -> bytes:
        return b"".join(map(_pack, self.rows))


class History(Sequence[Row]):
    """The logged rows, oldest first; ``history[-1]`` is the latest.

    A row holds ``step`` and the metrics of that step: training metrics under their own names, validation
    averages as ``val_<name>``. In a trainer, `TrainingConfig.log_frequency` decides which steps get a row. Values are
    read from the device on demand, or once much newer ones have been added.

    A copy costs nothing: the two share their parts, which are replaced and never mutated.

    Example:
        >>> history = History()
        >>> history.record(1, {"loss": 0.5})
        >>> history.record(2, {"loss": 0.25})
        >>> history.record(2, {"loss": 0.3}, prefix="val_")
        >>> history.to_dict()
        {'step': [1, 2], 'loss': [0.5, 0.25], 'val_loss': [None, 0.3]}
        >>> history.series("val_loss")
        ([2], [0.3])
    """

    __slots__ = ("_batches", "_chunks", "_dropped", "_figures", "_frozen", "_max_rows", "_recent", "_unread")

    def __init__(self, max_rows: int = 100_000) -> None:
        """Makes an empty history that holds at most ``max_rows`` rows and drops the oldest ones."""
        self._max_rows = max_rows
        self._batches: tuple[int, int, int] | None = None
        self._figures: dict[str, tuple[tuple[int, Any], ...]] = {}
        self._chunks: tuple[_Chunk, ...] = ()
        self._dropped = 0  # how many rows at the start of the first chunk are dropped
        self._frozen = 0  # how many other rows are in chunks
        self._recent: tuple[Row, ...] = ()
        self._unread = 0  # how many of the last recent rows may have values on the device

    def __getattr__(self, name: str) -> Any:
        if name == "history":  # of Keras: `model.fit(...).history["loss"]`
            raise AttributeError(
                "'History' object has no attribute 'history'; here, `series('loss')` returns steps and values, and "
                "`to_dict()` all columns.",
                name=name,
            )
        return object.__getattribute__(self, name)

    def record(self, step: int, metrics: Mapping[str, Any], prefix: str = "") -> None:
        """Adds the metrics of a step, to its existing row if that is the latest."""
        self.extend([(step, metrics)], prefix)

    def extend(self, rows: Iterable[tuple[int, Mapping[str, Any]]], prefix: str = "") -> None:
        """Adds the metrics of several steps, each to its existing row if that is the latest."""
        added: list[Row] = []
        for step, metrics in rows:
            values = {
                name if name.startswith(prefix) else prefix + name: value
                for name, value in metrics.items()
                if name != "step"
            }
            latest = added[-1] if added else self._latest
            if latest is not None and latest["step"] == step:
                values = {**latest, **values}
                added.pop() if added else self._drop_latest()
            added.append({"step": step, **values})
        # Read as many old rows as there are new ones, so that all steps take equally long.
        self._read(min(len(added), self._unread - MAX_PENDING))
        # Once for all rows, since extending a tuple copies it.
        self._recent = (*self._recent, *added)
        self._unread += len(added)
        while len(self) > self._max_rows:
            self._drop_oldest()
        while len(self._recent) > 2 * _CHUNK:
            self._freeze()

    def copy(self) -> Self:
        """Returns an equal, independent history."""
        copied = type(self)(self._max_rows)
        copied._batches, copied._figures = self._batches, self._figures
        copied._chunks, copied._dropped, copied._frozen = self._chunks, self._dropped, self._frozen
        copied._recent, copied._unread = self._recent, self._unread
        return copied

    def know_batches(self, first_step: int, num_examples: int, batch_size: int) -> None:
        """Records which steps had short batches, for `plot`; arguments as for `trainer.metrics.plots.with_weights`."""
        self._batches = first_step, num_examples, batch_size

    def know_epoch(self, step: int, **figures: Any) -> None:
        """Records figures of the epoch that ended at a step, for `plot`. They are in no row and no checkpoint.

        Args:
            step: The step.
            figures: In a trainer ``steps_per_second``, without epochs that spent more than a tenth of their time on
                compilation, and ``learning_rate``, that of the last update. A scalar on the device is read on demand.
        """
        found = {name: thinned((*self._figures.get(name, ()), (step, value))) for name, value in figures.items()}
        self._figures = {**self._figures, **found}

    @property
    def figures(self) -> Figures:
        """What `know_epoch` recorded in this process, by name. Waits for the device."""
        self._figures = {
            name: tuple((step, float(value)) for step, value in pairs) for name, pairs in self._figures.items()
        }
        return self._figures

    @classmethod
    def from_rows(cls, rows: Sequence[Mapping[str, Any]]) -> Self:
        """Returns a history of these rows."""
        history = cls()
        kept = tuple(dict(row) for row in rows[-history._max_rows :])
        whole = len(kept) // _CHUNK * _CHUNK
        history._chunks = tuple(_Chunk(kept[start : start + _CHUNK]) for start in range(0, whole, _CHUNK))
        history._recent, history._frozen = kept[whole:], whole
        return history

    def rewind(self, step: int) -> None:
        """Drops the rows of steps after ``step``. Does not wait for the device."""
        first_unread = len(self._recent) - self._unread
        chunks = (_Chunk(tuple(row for row in chunk.rows if row["step"] <= step)) for chunk in self._whole_chunks())
        self._chunks, self._dropped = tuple(chunk for chunk in chunks if chunk.rows), 0
        self._frozen = sum(len(chunk.rows) for chunk in self._chunks)
        kept = [(index, row) for index, row in enumerate(self._recent) if row["step"] <= step]
        self._recent = tuple(row for _, row in kept)
        self._unread = sum(index >= first_unread for index, _ in kept)
        figures = {name: tuple(pair for pair in pairs if pair[0] <= step) for name, pairs in self._figures.items()}
        self._figures = {name: pairs for name, pairs in figures.items() if pairs}

    def to_dict(self) -> dict[str, list[Any]]:
        """Returns columns of equal length, None for missing values, in a form for ``pandas.DataFrame``."""
        rows = self._rows()
        names = dict.fromkeys(name for row in rows for name in row)
        return {name: [row.get(name) for row in rows] for name in names}

    def to_pandas(self) -> Any:
        """Returns a ``pandas.DataFrame`` of these columns, indexed by step, with NaN for missing values.

        Raises:
            ImportError: pandas is not installed (the extra ``pandas``).
        """
        try:
            import pandas
        except ImportError as error:
            raise ImportError("History.to_pandas() needs pandas: pip install 'nnx-trainer[pandas]'") from error
        # A column of None and numbers would get the dtype object.
        columns = {"step": [], **self.to_dict()}
        frame = pandas.DataFrame({name: pandas.Series(values).infer_objects() for name, values in columns.items()})
        return frame.set_index("step")

    def plot(self, path: str | os.PathLike[str] | None = None, metrics: Collection[str] | None = None) -> Any:
        """Plots the history: training and validation metrics together, learning rate, gradient norm, throughput.

        The gradient norm appears if the trainer reports it: ``report=["gradient_norm"]``. The learning rate is that of
        every step if it is reported, else that of each epoch's last update, if the optimizer's rate can be known. That
        and the throughput cover the epochs that this process ran; the throughput not those spent mostly on compilation,
        such as the first epoch of a short run.

        Args:
            path: Where to write the plot; ends in ``.png``, ``.svg`` or ``.pdf``.
            metrics: The metrics to show, in this order; by default all.

        Returns:
            The ``matplotlib.figure.Figure``, which a notebook displays; None if written to ``path``. See
            `trainer.plot_runs`, which overlays several runs, for what is shown and how.

        Raises:
            ArgumentError: Nothing was recorded, a metric was not, or ``path`` has another suffix.
            ImportError: matplotlib is not installed (the extra ``plot``).
        """
        from trainer.metrics.plots import plot_runs

        return plot_runs({"": self}, path, metrics)

    def to_draw(self) -> Sequence[Mapping[str, Any]]:
        """Returns the rows with the weights of their batches, and rows of the figures of epochs, as far as known."""
        from trainer.metrics.plots import figure_rows, with_weights

        rows = self._rows()
        weighted = rows if self._batches is None else with_weights(rows, *self._batches)
        return [*weighted, *figure_rows(self.figures, rows)]

    def series(self, name: str) -> tuple[list[int], list[Any]]:
        """Returns the steps at which ``name`` was logged, and its values at those steps.

        Raises:
            KeyError: Nothing was logged under this name.
        """
        everything = self._rows()
        rows = [row for row in everything if name in row]
        if not rows:
            known = sorted({key for row in everything for key in row})
            raise KeyError(f"nothing was logged as {name!r}; there is {', '.join(known) or 'nothing'}")
        return [row["step"] for row in rows], [row[name] for row in rows]

    def of_training(self) -> list[Row]:
        """Returns rows with only training metrics: ``step``, and everything without the prefix ``val_``."""
        rows = ({name: row[name] for name in row if not name.startswith("val_")} for row in self._rows())
        return [row for row in rows if len(row) > 1]

    def of_validation(self) -> list[Row]:
        """Returns rows with only validation averages: ``step``, and the averages without ``val_``."""
        rows = (
            {name.removeprefix("val_"): row[name] for name in row if name == "step" or name.startswith("val_")}
            for row in self._rows()
        )
        return [row for row in rows if len(row) > 1]

    def packed(self) -> tuple[int, list[bytes]]:
        """Returns the number of rows, and their MessagePack bytes in pieces. Only recent rows are packed again."""
        self._read()
        pieces = [chunk.packed for chunk in self._whole_chunks()]
        return len(self), [*pieces, b"".join(map(_pack, self._recent))]

    def __len__(self) -> int:
        return self._frozen + len(self._recent)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, int) and -len(self._recent) <= index < 0:  # recent rows, without building the full list
            self._read()
            return self._recent[index]
        return self._rows()[index]

    def __iter__(self) -> Iterator[Row]:
        return iter(self._rows())

    def __repr__(self) -> str:
        return f"History({len(self)} rows, latest {self[-1] if self else None})"

    @property
    def _latest(self) -> Row | None:
        if self._recent:
            return self._recent[-1]
        return self._chunks[-1].rows[-1] if len(self) else None

    def _drop_latest(self) -> None:
        if self._recent:
            self._recent = self._recent[:-1]
            self._unread = max(self._unread - 1, 0)
            return
        # The latest row is already frozen, so unfreeze its chunk.
        *kept, last = self._whole_chunks()
        self._chunks, self._dropped, self._recent = tuple(kept), 0, last.rows[:-1]
        self._frozen -= len(last.rows)

    def _drop_oldest(self) -> None:
        if not self._chunks:
            self._recent = self._recent[1:]
            self._unread = min(self._unread, len(self._recent))
            return
        self._frozen -= 1
        if self._dropped + 1 == len(self._chunks[0].rows):
            self._chunks, self._dropped = self._chunks[1:], 0
        else:
            self._dropped += 1

    def _whole_chunks(self) -> list[_Chunk]:
        """Returns the chunks without the dropped rows of the first."""
        if not self._dropped:
            return list(self._chunks)
        first, *others = self._chunks
        return [_Chunk(first.rows[self._dropped :]), *others]

    def _freeze(self) -> None:
        """Moves the oldest recent rows to a chunk, which is packed once."""
        self._read(_CHUNK - len(self._recent) + self._unread)
        self._chunks = (*self._chunks, _Chunk(self._recent[:_CHUNK]))
        self._frozen += _CHUNK
        self._recent = self._recent[_CHUNK:]

    def _read(self, count: int | None = None) -> None:
        """Reads the ``count`` oldest unread rows from the device, or all unread rows."""
        first = len(self._recent) - self._unread
        last = len(self._recent) if count is None else first + count
        if first < last:
            # Rebuild each row, since pytrees sort dict keys, but rows keep the order of recording.
            unread = self._recent[first:last]
            fetched = [{**row, **values} for row, values in zip(unread, read([*unread]), strict=True)]
            self._recent = (*self._recent[:first], *fetched, *self._recent[last:])
            self._unread = len(self._recent) - last

    def _rows(self) -> list[Row]:
        self._read()
        return [*(row for chunk in self._whole_chunks() for row in chunk.rows), *self._recent]


def thinned(pairs: tuple[tuple[int, Any], ...]) -> tuple[tuple[int, Any], ...]:
    """Returns the pairs, or every second one if there are more than `MAX_EPOCHS`; the latest is kept."""
    return pairs if len(pairs) <= MAX_EPOCHS else pairs[(len(pairs) - 1) % 2 :: 2]


def is_recordable(value: Any) -> bool:
    """Tells whether a checkpoint can hold a value of a row: a number, string, None, or nested list of these."""
    if type(value) is list:
        return all(map(is_recordable, value))
    return type(value) in (float, int, bool, str, type(None))


def _pack(row: Row) -> bytes:
    for name, value in row.items():
        if not is_recordable(value):
            raise TypeError(f"`{name}` is of type {type(value).__qualname__}")
    return bytes(msgpack.packb(row))
