"""`Progress`: a callback that displays the progress of a run."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TextIO

from trainer.callbacks.base import Callback, flatten
from trainer.callbacks.display import Display, Notebook, Part, open_display, printable
from trainer.callbacks.epoch_table import EpochTable, counted, duration, in_words, number
from trainer.callbacks.monitor import Monitor
from trainer.errors import ArgumentTypeError
from trainer.types import BATCH_WEIGHT

FEW_EPOCHS = 100
"""The number of initial epochs of a run that each get a row, however short they are."""

ROW_EVERY = 0.2
"""The minimum seconds between rows of later epochs; if epochs are shorter, some get no row."""

_SAMPLES = 16
"""How many times to keep: the first and the last give the speed; they are at least half a second apart."""

ASK_EVERY = 0.5
"""The minimum seconds between two computations of the learning rate. The first comes after twice as long."""

_NOT_SHOWN = ("step", "epoch", "time", BATCH_WEIGHT)


@dataclasses.dataclass
class _Epoch:
    """An epoch: its number from 0, when it began, and its results so far."""

    index: int
    began: float
    average: Any = None
    validation: Mapping[str, float] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    step: int = 0


class Progress(Callback):
    """Displays the progress of a run: a permanent row for each finished epoch, and a status line.

    On a terminal the status line is redrawn in place, below the rows; in a notebook both are one output that is
    replaced. A file or a pipe gets a plain line per epoch, another every 30 seconds within an epoch, and no control
    characters. At the end it prints why the run ended, the best value of each metric that a callback monitors and of
    the validation loss, and where the checkpoints are.

    It costs the loop next to nothing: steps stay fused, no thread runs, and the status line is drawn at most five
    times a second, from the metrics of the previous call, which are finished by then. The learning rate is computed
    beside the steps, twice a second, if the configuration or the optimizer state provides it (`trainer.fit.rate`);
    otherwise it is shown only if the trainer reports it. Of epochs shorter than 0.2 s only the first hundred get a
    row each. With several processes only the primary one writes. A closed or missing stream turns off the display
    and nothing else.

    A `trainer.Trainer` has one by default (``progress``). Consecutive calls of ``train_epoch`` form one run.
    """

    # After all others, so that their saves are known.
    runs_last = True

    # State of the displayed run, or of the latest one: further calls of `train_epoch` continue it.
    _table: EpochTable
    _epoch: _Epoch | None  # in progress
    _pending: list[_Epoch]  # finished, their rows due
    _metrics: Mapping[str, Any]  # of the previous call
    _rate_asked: Any  # on the device, perhaps not computed yet
    _rate_known: float | None
    _ask_at: float
    _validation: Mapping[str, float]  # the latest
    _monitors: list[Monitor]
    _best: dict[tuple[str, str], tuple[float, int]]  # by the name and mode of a monitor: the value and its step
    _has_earlier: bool  # whether it was resumed, so that there may be a better one of an earlier epoch
    _rows: int
    _row_at: float  # when the latest of them became due
    _shown_at: float  # when rows were shown
    _has_compiled: bool
    _began: float
    _validating: float | None  # when the validation in progress began, without its compilations
    _validations: int
    _paused: float  # the seconds of all validations
    _compiled: float  # the seconds of all compilations
    _next_line: float
    _samples: collections.deque[tuple[float, int]]  # times and steps, for the speed

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Makes a progress display.

        Args:
            stream: Where to write; standard error if left out, or the output of a notebook's cell.
            clock: Returns the time in seconds.
        """
        self._stream = stream
        self._clock = clock
        self._notebook: Notebook | None = None
        self._display: Display | None = None
        self._reached: int | None = None
        self._start()

    def on_train_begin(self, trainer: Any) -> None:
        if not trainer.is_primary_process:
            return
        self._display = self._open()
        if self._display is None:
            return
        now = self._clock()
        if trainer.is_new_run or self._reached != trainer.step:
            self._start()
            self._began = now
            self._monitors = _monitors(trainer.callbacks)
            if not trainer.is_new_run:
                self._has_earlier = True
                self._say(f"resumed at step {trainer.step}, after {_epochs(trainer.epoch)}")
                self._note_earlier(trainer)
        self._validating, self._ask_at = None, now + 2 * ASK_EVERY
        # Time between two calls of `train_epoch` does not count for this run.
        self._next_line, self._samples = now + self._display.line_every, collections.deque(maxlen=_SAMPLES)

    def on_train_end(self, trainer: Any) -> None:
        if self._display is None:
            return
        failure = trainer.setup.live.failure
        planned = trainer.planned
        is_over = planned.last_epoch is not None and trainer.epoch >= planned.last_epoch
        is_last = bool(failure) or is_over or trainer.should_stop
        try:
            # If the run has failed, reading its results may fail too.
            with contextlib.suppress(Exception) if failure else contextlib.nullcontext():
                self._end_epoch(trainer, is_last=is_last)
                self._show_rows(trainer)
            if is_last:
                self._say(*self._ending(trainer, failure))
        finally:
            self._display.close()
            self._reached = trainer.step
            # Nothing that lives on a device outlives the run.
            self._display = self._epoch = None
            self._pending, self._metrics, self._rate_asked = [], {}, None

    def on_epoch_begin(self, trainer: Any, epoch: int) -> None:
        if self._display is None:
            return
        self._end_epoch(trainer, is_last=False)
        self._epoch = _Epoch(epoch, self._clock())

    def on_compile_begin(self, trainer: Any, what: str) -> None:
        if self._display is None:
            return
        text = f"compiling {what}, once ..."
        if self._display.has_table:
            self._display.draw([Part(text, 0)])
        elif not self._has_compiled:
            self._say(text)
        self._has_compiled = True

    def on_compile_end(self, trainer: Any, what: str, seconds: float) -> None:
        if self._display is None:
            return
        self._say(f"compiled {what} in {seconds:.1f} s")
        self._compiled += seconds
        if self._validating is None:
            self._samples.clear()
            return
        self._validating += seconds
        self._pause(seconds)
        if self._display.has_table:
            self._draw(trainer, trainer.step, self._clock(), doing="validating ...")

    def on_call_end(self, trainer: Any, step: int, logs: Mapping[str, Any]) -> None:
        if self._display is None or self._epoch is None:
            return
        now = self._clock()
        if not self._samples or now - self._samples[-1][0] >= 0.5:
            self._samples.append((now, step))
        if self._pending and now - self._shown_at >= ROW_EVERY:
            self._show_rows(trainer)
        if now >= self._next_line:
            self._draw(trainer, step, now)
        if now >= self._ask_at and now >= self._next_line - 2 * ASK_EVERY and "learning_rate" not in logs:
            self._rate_asked, self._ask_at = trainer.setup.rate(trainer.run), now + ASK_EVERY
        self._metrics = logs
        self._epoch.average, self._epoch.step = trainer.run.average, step

    def on_validation_begin(self, trainer: Any) -> None:
        now = self._validating = self._clock()
        is_long = self._validations == 0 or self._paused > 0.2 * self._validations
        if self._display is not None and self._display.has_table and is_long:
            self._draw(trainer, trainer.step, now, doing="validating ...")

    def on_validation_end(self, trainer: Any, logs: dict[str, float]) -> None:
        if self._display is None:
            return
        now = self._clock()
        paused = now - (now if self._validating is None else self._validating)
        self._validating, self._validation = None, logs
        self._paused, self._validations = self._paused + paused, self._validations + 1
        self._pause(paused)
        if self._epoch is not None:
            self._epoch.validation = logs
        for monitor in self._monitors:
            if monitor.of_validation:
                self._note(monitor, logs.get(monitor.name.removeprefix("val_")), trainer.step)

    def _start(self) -> None:
        self._table = EpochTable()
        self._epoch = None
        self._pending, self._metrics, self._validation = [], {}, {}
        self._rate_asked = self._rate_known = None
        self._ask_at = 0.0
        self._monitors, self._best, self._has_earlier = [], {}, False
        self._rows, self._row_at, self._shown_at = 0, 0.0, 0.0
        self._has_compiled = False
        self._began = self._next_line = self._paused = self._compiled = 0.0
        self._validating, self._validations = None, 0
        self._samples = collections.deque(maxlen=_SAMPLES)

    def _pause(self, seconds: float) -> None:
        """Leaves out seconds that have just passed from the speed of the steps."""
        self._samples = collections.deque(((when + seconds, step) for when, step in self._samples), maxlen=_SAMPLES)

    def _note(self, monitor: Monitor, value: Any, step: int) -> None:
        """Remembers a value of a monitored metric if it is the best so far."""
        if not isinstance(value, int | float) or not math.isfinite(value):  # not measured, or an array
            return
        key = (monitor.name, monitor.mode)
        known = self._best.get(key)
        # Of equal values, the earlier one.
        if known is None or (monitor.rank(value), -step) > (monitor.rank(known[0]), -known[1]):
            self._best[key] = (float(value), step)

    def _note_earlier(self, trainer: Any) -> None:
        """Remembers the best values from before a run was resumed.

        Those of validations are in the history. It does not hold averages of epochs, but callbacks know their best;
        a `ModelCheckpoint` only after its own ``on_train_begin``, so it is asked at the end.
        """
        for monitor in self._monitors:
            if monitor.of_validation:
                for row in trainer.history:
                    self._note(monitor, row.get(monitor.name), row["step"])
                continue
            for one in _members(trainer.callbacks):
                if _is_same(monitor, getattr(one, "_monitor", None)):
                    self._note(monitor, getattr(one, "best_score", None), getattr(one, "best_step", None) or 0)

    def _open(self) -> Display | None:
        display = open_display(self._stream)
        if not isinstance(display, Notebook):
            return display
        # Calls of `train_epoch` in one cell share its output.
        if self._notebook is None or self._notebook.cell != display.cell:
            self._notebook = display
        return self._notebook

    def _end_epoch(self, trainer: Any, *, is_last: bool) -> None:
        """Records the epoch that has ended, if it gets a row."""
        epoch, now = self._epoch, self._clock()
        if epoch is None or trainer.epoch <= epoch.index:
            return
        self._epoch = None
        for monitor in self._monitors:
            if not monitor.of_validation:
                self._note(monitor, monitor.latest, trainer.step)
        epoch.seconds = now - epoch.began
        if is_last or self._rows < FEW_EPOCHS or now - self._row_at >= ROW_EVERY:
            self._pending, self._row_at = [*self._pending, epoch], now
            self._rows += 1
            # The next call may be far off; and after a long epoch, waiting for the last step costs little.
            if epoch.seconds > 1.0:
                self._show_rows(trainer)

    def _show_rows(self, trainer: Any) -> None:
        """Shows the rows that are due. It waits for the last step of their epochs while the device runs later steps."""
        pending, self._pending, self._shown_at = self._pending, [], self._clock()
        rows: list[str] = []
        for epoch in pending:
            heading, row = self._row(trainer, epoch)
            if heading is not None:
                self._say(*rows)
                rows = []
                self._say(heading, style="bold")
            rows.append(row)
        self._say(*rows)

    def _row(self, trainer: Any, epoch: _Epoch) -> tuple[str | None, str]:
        """Returns the heading, if one is due, and the row of an epoch."""
        averages = {} if epoch.average is None else epoch.average.compute()
        cells = {"epoch": counted(epoch.index + 1, trainer.planned.last_epoch)}
        cells |= self._numbers(averages) | self._numbers(epoch.validation, "val_")
        time_taken = {"time": duration(epoch.seconds)}
        if self._display is None or not self._display.has_table:
            where = {"epoch": cells.pop("epoch"), "step": counted(epoch.step, trainer.planned.last_step)}
            return None, in_words({**where, **cells, **time_taken})
        return self._table.add({**cells, **time_taken}, self._display.width)

    def _draw(self, trainer: Any, step: int, now: float, doing: str = "") -> None:
        """Draws the status line from the metrics of the previous call."""
        display, epoch = self._display, self._epoch
        if display is None or epoch is None:
            return
        planned, shown = trainer.planned, self._numbers(self._metrics)
        rate, last = self._rate(step, now), planned.last_step
        if last is None and planned.steps_per_epoch is not None:
            done, whole = trainer.run.batch, planned.steps_per_epoch
        else:
            done, whole = step - planned.first_step, planned.num_steps
        learning_rate, loss = shown.pop("learning_rate", None) or self._learning_rate(), shown.pop("loss", None)
        parts = [Part(f"epoch {counted(epoch.index + 1, planned.last_epoch)}", 0)]
        if whole:
            parts.append(Part(" " * 12, 4, done / whole))
        parts.append(Part(f"step {counted(step, last)}", 1))
        parts += [Part(f"loss {loss}", 2)] if loss is not None else []
        if "loss" in self._validation:
            parts.append(Part(f"val_loss {number(self._validation['loss'])}", 5))
        parts += [Part(f"{name} {value}", 8 + index) for index, (name, value) in enumerate(shown.items())]
        parts += [Part(f"lr {learning_rate}", 6)] if learning_rate is not None else []
        if rate:
            parts.append(Part(f"{rate:,.3g} steps/s" if rate < 1000 else f"{rate:,.0f} steps/s", 3))
            if whole and whole > done:
                trained = max(now - self._began - self._paused - self._compiled, 1e-3)
                parts.append(Part(f"eta {duration((whole - done) / rate * (1.0 + self._paused / trained))}", 3))
        meter = trainer.setup.live.meter
        if meter is not None:  # as in the validation that an interrupted run still owed
            parts.append(Part(f"data wait {meter.waiting_for_data:.0%}", 7))
        display.draw([Part(doing, 0), *parts] if doing else parts)
        # Measured after drawing, so that a slow terminal is redrawn less often.
        self._next_line = self._clock() + display.line_every

    def _learning_rate(self) -> str | None:
        """Returns the learning rate of the latest update for which it is already computed, without waiting."""
        asked = self._rate_asked
        # `is_ready` is not in the documented `jax.Array`; seen in jax 0.10.2.
        if asked is not None and (isinstance(asked, float) or asked.is_ready()):
            self._rate_known, self._rate_asked = float(asked), None
        return None if self._rate_known is None else number(self._rate_known)

    def _rate(self, step: int, now: float) -> float | None:
        """Returns the recent steps per second, without compilations and validations; None if unknown."""
        if not self._samples or now <= self._samples[0][0] or step <= self._samples[0][1]:
            return None
        began, first = self._samples[0]
        return (step - first) / (now - began)

    def _ending(self, trainer: Any, failure: str) -> Iterable[str]:
        """Yields why the run ended, its best values, where the checkpoint is, and how to resume."""
        epochs, took = trainer.epoch, duration(self._clock() - self._began)
        reasons = "; ".join(trainer.setup.events.stop_reasons())
        is_early = trainer.planned.last_epoch is None or epochs < trainer.planned.last_epoch
        at = f"after {_epochs(epochs)}, step {trainer.step}, {took}"
        if failure:
            yield f"{failure} {at}"
        else:
            yield f"stopped {at}: {reasons}" if reasons and is_early else f"finished {at}"
        for monitor in self._monitors:
            asked = [one for one in _members(trainer.callbacks) if hasattr(one, "best_by")]
            kept = next(filter(None, (one.best_by(monitor, trainer.run.id) for one in asked)), None)
            if kept is not None and self._has_earlier and not monitor.of_validation:
                self._note(monitor, kept.score, kept.step)
            best = self._best.get((monitor.name, monitor.mode))
            if best is not None:
                where = "" if kept is None else f", kept in {kept.path}"
                yield f"best {monitor.name} {number(best[0])} at step {best[1]}{where}"
        path = trainer.setup.checkpointer.saved_path(trainer.run)
        if path is not None:
            yield f"checkpoint {path}"
            yield (
                "resume with the same call and resume=True" if failure else "restore it with trainer.load_checkpoint"
            )

    def _numbers(self, metrics: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
        """Returns metrics as texts by displayable names, the loss first."""
        encoding = "utf-8" if self._display is None else self._display.encoding
        names = sorted((name for name in metrics if name not in _NOT_SHOWN), key=lambda name: name != "loss")
        texts = {printable(prefix + name, encoding): number(metrics[name]) for name in names}
        return {name: text for name, text in texts.items() if text is not None}

    def _say(self, *lines: str, style: str = "") -> None:
        if self._display is not None and lines:
            self._display.say(lines, style)


def progress_for(given: Any, callbacks: Any) -> Progress | None:
    """Returns the display of a trainer: the given one, or a new one; None if the callbacks contain one.

    Raises:
        ArgumentTypeError: ``given`` is neither a bool nor a `Progress`.
    """
    if not isinstance(given, bool | Progress):
        raise ArgumentTypeError(
            f"`progress` is of type {type(given).__name__}; it must be True, False, or a trainer.Progress."
        )
    if given is False or any(isinstance(one, Progress) for one in _members(callbacks)):
        return None
    return Progress() if given is True else given


def _monitors(callbacks: Any) -> list[Monitor]:
    """Returns the monitors of callbacks, one for each metric and mode; with none of validation also the loss there."""
    found: list[Monitor] = []
    for one in _members(callbacks):
        monitor = getattr(one, "_monitor", None)
        if isinstance(monitor, Monitor) and not any(_is_same(monitor, other) for other in found):
            found.append(monitor)
    return found if any(monitor.of_validation for monitor in found) else [*found, Monitor("val_loss", "min")]


def _is_same(monitor: Monitor, other: Any) -> bool:
    return isinstance(other, Monitor) and (other.name, other.mode) == (monitor.name, monitor.mode)


def _epochs(count: int) -> str:
    return f"{count} epoch{'s' * (count != 1)}"


def _members(callbacks: Any) -> Iterable[Any]:
    held = getattr(callbacks, "callbacks", None)
    return flatten(held if isinstance(held, list | tuple) else [callbacks])
