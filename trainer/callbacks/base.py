"""Callbacks: what a caller wants to happen around a run, outside compiled code.

Events come in this order, callbacks in the order of their list and then extensions in theirs, and last
those that say so (``comes_last``). Where nobody listens to the events of a batch, `train` may run
several steps in one call::

    on_train_begin(trainer)
      on_epoch_begin(trainer, epoch)
        on_batch_begin(trainer, step)          step: updates finished before this batch
          … the step runs; its metrics are logged …
        on_batch_end(trainer, step, logs)      step: updates finished after it
        on_call_end(trainer, step, logs)       after each call into compiled code, of one or more steps
        on_validation_begin(trainer)           when a validation is due
        on_validation_end(trainer, logs)
          … a checkpoint is saved when one is due, so after the validation of the same step …
      on_epoch_end(trainer, epoch, logs)
    on_train_end(trainer)                      also when anything above raised
"""

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TextIO

from trainer.errors import ArgumentTypeError, CheckpointError

EVENTS = (
    "on_train_begin",
    "on_train_end",
    "on_epoch_begin",
    "on_epoch_end",
    "on_batch_begin",
    "on_batch_end",
    "on_call_end",
    "on_compile_begin",
    "on_compile_end",
    "on_validation_begin",
    "on_validation_end",
)


class Callback:
    """Does nothing at every event; override those you need. Any object with such methods works.

    Set ``should_stop`` to end the run after the current epoch. One that ``comes_last`` hears of every
    event after all others, extensions included, because it saves what they have made of it.
    """

    should_stop = False
    comes_last = False

    def on_train_begin(self, trainer: Any) -> None:
        """A call of ``train`` starts."""

    def on_train_end(self, trainer: Any) -> None:
        """A call of ``train`` ends, by itself or by an exception."""

    def on_epoch_begin(self, trainer: Any, epoch: int) -> None:
        """A pass over the data starts; epochs count from 0 over the life of the trainer."""

    def on_epoch_end(self, trainer: Any, epoch: int, logs: dict[str, float]) -> None:
        """A pass has ended. ``logs``: its averages, and the last validation's as ``val_<name>``."""

    def on_batch_begin(self, trainer: Any, step: int) -> None:
        """A step is about to run. ``step``: the updates finished so far."""

    def on_batch_end(self, trainer: Any, step: int, logs: Mapping[str, Any]) -> None:
        """A step was dispatched. ``logs``: scalars on the device; reading one waits for the step."""

    def on_call_end(self, trainer: Any, step: int, logs: Mapping[str, Any]) -> None:
        """One or several steps were dispatched; ``logs`` are those of the last. For whoever shows progress."""

    def on_compile_begin(self, trainer: Any, what: str) -> None:
        """A program is about to be compiled for the first time."""

    def on_compile_end(self, trainer: Any, what: str, seconds: float) -> None:
        """A program was compiled. ``seconds``: that and tracing it, until its first call was dispatched."""

    def on_validation_begin(self, trainer: Any) -> None:
        """A validation starts."""

    def on_validation_end(self, trainer: Any, logs: dict[str, float]) -> None:
        """A validation has ended. ``logs``: its averages, without prefix."""


class CallbackList(Callback):
    """Several callbacks as one, called in order."""

    def __init__(self, callbacks: Iterable[Any] | None = None) -> None:
        self.callbacks: list[Any] = list(callbacks or ())

    def add(self, callback: Any) -> None:
        """Appends a callback."""
        self.callbacks.append(callback)

    def remove(self, callback: Any) -> None:
        """Removes a callback."""
        self.callbacks.remove(callback)

    def __len__(self) -> int:
        return len(self.callbacks)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.callbacks)

    @property
    def should_stop(self) -> bool:  # type: ignore[override]
        """Whether any of them asks to stop."""
        return any(getattr(callback, "should_stop", False) for callback in self.callbacks)


def emit(listener: Any, event: str, *args: Any) -> None:
    """Calls an event on a listener, if it has a method for it."""
    method = getattr(listener, event, None)
    if method is not None:
        method(*args)


def listens(listener: Any, event: str) -> bool:
    """Tells whether a listener does anything at an event."""
    method = getattr(listener, event, None)
    function = getattr(method, "__func__", method)
    if function is getattr(CallbackList, event):
        return any(listens(callback, event) for callback in listener.callbacks)
    return function is not None and function is not getattr(Callback, event)


def _dispatcher(event: str) -> Callable[..., None]:
    def dispatch(self: CallbackList, *args: Any) -> None:
        # A copy: a callback may remove itself, which must not skip the next one.
        for callback in _in_order(self.callbacks):
            emit(callback, event, *args)

    dispatch.__name__ = event
    dispatch.__doc__ = f"Calls ``{event}`` on each, in order."
    return dispatch


for _event in EVENTS:
    setattr(CallbackList, _event, _dispatcher(_event))


def _in_order(listeners: Iterable[Any]) -> list[Any]:
    return sorted(listeners, key=lambda listener: bool(getattr(listener, "comes_last", False)))


class Listeners:
    """The callbacks and extensions of a trainer, in the order in which they hear of events."""

    def __init__(self, listeners: Iterable[Any]) -> None:
        self._listeners = tuple(listeners)

    def emit(self, event: str, *args: Any) -> None:
        """Calls an event on each."""
        if self._are_none():
            return
        for listener in _in_order(self._each()):
            emit(listener, event, *args)

    def emit_to_all(self, event: str, *args: Any) -> list[Exception]:
        """Calls an event on each, whatever the ones before raise; returns what they raised."""
        failures = []
        for listener in _in_order(self._each()):
            try:
                emit(listener, event, *args)
            except Exception as failure:
                failures.append(failure)
        return failures

    def listen(self, event: str) -> bool:
        """Tells whether any of them does anything at an event."""
        return any(listens(listener, event) for listener in self._listeners)

    def _are_none(self) -> bool:
        first, *others = self._listeners
        return not others and type(first) is CallbackList and not first.callbacks

    @property
    def should_stop(self) -> bool:
        """Whether any of them asks to stop."""
        return any(getattr(listener, "should_stop", False) for listener in self._listeners)

    def state_dict(self) -> list[Any]:
        """Returns the states of those that have one, in order."""
        return [listener.state_dict() for listener in self._stateful()]

    def load_state_dict(self, states: Iterable[Any]) -> None:
        """Gives each of those that have a state its own back.

        Raises:
            CheckpointError: One refuses it.
        """
        for listener, state in zip(self._stateful(), states, strict=False):
            try:
                listener.load_state_dict(state)
            except Exception as error:
                raise CheckpointError(
                    f"{type(listener).__name__}.load_state_dict raised {error!r} at the state in the checkpoint."
                ) from error

    def _stateful(self) -> list[Any]:
        return [one for one in self._each() if hasattr(one, "state_dict") and hasattr(one, "load_state_dict")]

    def _each(self) -> Iterator[Any]:
        for listener in self._listeners:
            # A list of the caller's own kind may do something else with an event.
            yield from listener if type(listener) is CallbackList else (listener,)


def as_callback_list(callbacks: Any) -> Any:
    """Returns callbacks as one listener.

    Raises:
        ArgumentTypeError: They are neither a list nor something that listens.
    """
    if callbacks is None:
        return CallbackList()
    # A list of the caller's own kind dispatches by itself.
    if isinstance(callbacks, CallbackList) or any(hasattr(callbacks, event) for event in EVENTS):
        return callbacks
    if isinstance(callbacks, Iterable):
        return CallbackList(callbacks)
    raise ArgumentTypeError(
        f"`callbacks` is of type {type(callbacks).__name__}; it must be a trainer.CallbackList or a sequence of "
        f"callbacks."
    )


class Progress(Callback):
    """Shows where a run is: one line an epoch that stays, and on a terminal one that moves.

    The moving line is drawn at most ten times a second, from the metrics of the step before, so it
    hardly ever waits for the device. Nothing but whole lines goes to a file or a pipe. Of several processes
    that train together one shows it.
    """

    def __init__(self, stream: TextIO | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        """Makes a display.

        Args:
            stream: Where to write, standard error if left out.
            clock: Tells the time in seconds.
        """
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._started = self._painted = 0.0
        self._previous: Mapping[str, Any] = {}
        self._width = 0

    def on_epoch_begin(self, trainer: Any, epoch: int) -> None:
        del trainer, epoch
        self._started = self._clock()

    def on_compile_begin(self, trainer: Any, what: str) -> None:
        if trainer.is_primary_process and self._stream.isatty():
            self._write(f"compiling {what} …", {}, self._clock(), end="\r")

    def on_compile_end(self, trainer: Any, what: str, seconds: float) -> None:
        if trainer.is_primary_process:
            self._write(f"compiled {what} in {seconds:.1f} s", {}, self._clock(), end="\n")

    def on_call_end(self, trainer: Any, step: int, logs: Mapping[str, Any]) -> None:
        now = self._clock()
        if trainer.is_primary_process and self._stream.isatty() and now - self._painted >= 0.1:
            self._write(f"epoch {trainer.epoch + 1}  step {step}", self._previous, now, end="\r")
            self._painted = now
        self._previous = logs

    def on_epoch_end(self, trainer: Any, epoch: int, logs: dict[str, float]) -> None:
        if trainer.is_primary_process:
            self._write(f"epoch {epoch + 1}  step {trainer.step}", logs, self._clock(), end="\n")

    def _write(self, head: str, logs: Mapping[str, Any], now: float, end: str) -> None:
        shown = [f"{name} {float(value):.4g}" for name, value in logs.items() if name != "step"]
        line = "  ".join([head, *shown, f"{now - self._started:.1f} s"])
        # Padding wipes what a longer line left behind.
        self._stream.write(f"{line:<{self._width}}{end}" if self._stream.isatty() else f"{line}{end}")
        self._width = len(line) if end == "\r" else 0
        self._stream.flush()
