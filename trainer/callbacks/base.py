"""Callbacks: objects with a method for each event of a run that they handle.

`train` and `train_epoch` emit the same events, in this order::

    on_train_begin(trainer)
      on_epoch_begin(trainer, epoch)
        on_batch_begin(trainer, step)          step: updates finished before this batch
          ... the step runs and is counted; its metrics are logged ...
        on_batch_end(trainer, step, logs)      step: updates finished, this step included
        on_call_end(trainer, step, logs)       after each call into compiled code, of one step or of several
        on_validation_begin(trainer)           when a validation is due
        on_validation_end(trainer, logs)
          ... a checkpoint is saved if one is due, after the validation of the same step ...
      on_epoch_end(trainer, epoch, logs)
    on_train_end(trainer)                      also when anything above raised

    on_compile_begin(trainer, what)            around the first call of a compiled program, inside the events
    on_compile_end(trainer, what, seconds)     of the step or the validation that makes this call

What is compiled is ``train_step``, ``train_steps`` (fused) or ``eval_step``. A batch of another shape has an
``on_compile_end`` of its own. `evaluate` and `predict` emit no events.

A step is counted before the events that follow it: the state, ``trainer.step``, the position in
the data and the averages agree, so a checkpoint that a callback saves at any event is complete.

Each event goes to the callbacks in list order, then to the extensions in theirs, then to callbacks with
``runs_last``. If no callback handles ``on_batch_begin`` or ``on_batch_end``, `train` may fuse several steps
into one call.
"""

import inspect
from collections.abc import Iterable, Iterator, Mapping
from operator import is_
from types import MappingProxyType
from typing import Any

from trainer.core.checks import check_call, did_you_mean
from trainer.errors import ArgumentTypeError, warn

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
    """A callback that ignores every event: override the methods you need.

    Any object with one of these methods is a callback too; deriving from this class is optional. The state of a
    callback with ``state_dict()`` and ``load_state_dict(state)`` is saved in checkpoints, under the callback's
    ``state_key``, a string, or by default under its class name.

    Attributes:
        should_stop: Set it to end the run after the current epoch.
        runs_last: Whether this callback gets each event after all other callbacks and all extensions, as a callback
            that saves their states must. It belongs to the class: do not change it during a run.
    """

    should_stop = False
    runs_last = False

    def on_train_begin(self, trainer: Any) -> None:
        """A run starts or resumes."""

    def on_train_end(self, trainer: Any) -> None:
        """A run ends, at its last step or with an exception."""

    def on_epoch_begin(self, trainer: Any, epoch: int) -> None:
        """A pass over the data starts. Epochs count from 0 over the life of the trainer."""

    def on_epoch_end(self, trainer: Any, epoch: int, logs: dict[str, float]) -> None:
        """A pass over the data ended. ``logs``: its averages, and those of the last validation as ``val_<name>``."""

    def on_batch_begin(self, trainer: Any, step: int) -> None:
        """A step is about to run. ``step``: updates finished so far."""

    def on_batch_end(self, trainer: Any, step: int, logs: Mapping[str, Any]) -> None:
        """A step was dispatched and counted. ``logs``: scalars on the device; reading one waits for the step."""

    def on_call_end(self, trainer: Any, step: int, logs: Mapping[str, Any]) -> None:
        """One step or several fused steps were dispatched and counted. ``logs``: the metrics of the last one."""

    def on_compile_begin(self, trainer: Any, what: str) -> None:
        """A program is about to be compiled for the first time."""

    def on_compile_end(self, trainer: Any, what: str, seconds: float) -> None:
        """A program was compiled. ``seconds``: the time to trace, compile and first dispatch it."""

    def on_validation_begin(self, trainer: Any) -> None:
        """A validation starts."""

    def on_validation_end(self, trainer: Any, logs: dict[str, float]) -> None:
        """A validation ended. ``logs``: its averages, without a prefix."""


class CallbackList(Callback):
    """Several callbacks as one: each event goes to all of them in order, those with ``runs_last`` last.

    A nested list counts as its members.
    """

    # The order and the handlers of each event, valid until this list or a list inside it changes.
    # Class attributes, so that they exist in a subclass whose __init__ does not call ours.
    _held: tuple[Any, ...] | None = None
    _held_inside: tuple[tuple["CallbackList", tuple[Any, ...]], ...] = ()
    _ordered: tuple[Any, ...] = ()
    _handlers: Mapping[str, tuple[Any, ...]] = MappingProxyType({})

    def __init__(self, callbacks: Iterable[Any] | None = None) -> None:
        """Makes a new list from ``callbacks``."""
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
        """Whether any callback asks to stop."""
        return any(asks_to_stop(callback) for callback in self.callbacks)

    def in_order(self) -> tuple[Any, ...]:
        """Returns the callbacks in the order in which they get an event, with nested lists flattened."""
        if not self._is_unchanged():
            self._held = tuple(self.callbacks)
            self._held_inside = tuple((inner, tuple(inner.callbacks)) for inner in _lists_inside(self))
            self._ordered = tuple(sorted(flatten(self.callbacks), key=runs_last))
            self._handlers = {}
        return self._ordered

    def emit(self, event: str, *args: Any) -> None:
        """Calls the method named ``event`` of every callback that has one.

        An event without handlers costs less than a microsecond: handlers are looked up only after the list has
        changed, and whenever a run or an epoch begins.
        """
        if event in ("on_train_begin", "on_epoch_begin"):
            self._handlers = {}
        handlers = self._handlers.get(event)
        if handlers is None or not self._is_unchanged():
            handlers = tuple(callback for callback in self.in_order() if handles(callback, event))
            self._handlers = {**self._handlers, event: handlers}
        # A tuple, so that a callback that adds or removes itself makes no other callback miss the event.
        for callback in handlers:
            emit(callback, event, *args)

    def _is_unchanged(self) -> bool:
        # Compare by identity, since equal callbacks are still distinct. A list does not store itself in
        # `_held_inside`, because that cycle would keep extensions, and their arrays, alive.
        # Three times in every step, so without further calls; a generator in all() would take twice as long.
        for inner, held in self._held_inside:
            if len(inner.callbacks) != len(held) or not all(map(is_, inner.callbacks, held)):
                return False
        held_here = self._held
        return (
            held_here is not None and len(self.callbacks) == len(held_here) and all(map(is_, self.callbacks, held_here))
        )

    def on_train_begin(self, trainer: Any) -> None:
        self.emit("on_train_begin", trainer)

    def on_train_end(self, trainer: Any) -> None:
        self.emit("on_train_end", trainer)

    def on_epoch_begin(self, trainer: Any, epoch: int) -> None:
        self.emit("on_epoch_begin", trainer, epoch)

    def on_epoch_end(self, trainer: Any, epoch: int, logs: dict[str, float]) -> None:
        self.emit("on_epoch_end", trainer, epoch, logs)

    def on_batch_begin(self, trainer: Any, step: int) -> None:
        self.emit("on_batch_begin", trainer, step)

    def on_batch_end(self, trainer: Any, step: int, logs: Mapping[str, Any]) -> None:
        self.emit("on_batch_end", trainer, step, logs)

    def on_call_end(self, trainer: Any, step: int, logs: Mapping[str, Any]) -> None:
        self.emit("on_call_end", trainer, step, logs)

    def on_compile_begin(self, trainer: Any, what: str) -> None:
        self.emit("on_compile_begin", trainer, what)

    def on_compile_end(self, trainer: Any, what: str, seconds: float) -> None:
        self.emit("on_compile_end", trainer, what, seconds)

    def on_validation_begin(self, trainer: Any) -> None:
        self.emit("on_validation_begin", trainer)

    def on_validation_end(self, trainer: Any, logs: dict[str, float]) -> None:
        self.emit("on_validation_end", trainer, logs)


def emit(callback: Any, event: str, *args: Any) -> None:
    """Calls the method named ``event``, if the callback has it."""
    method = getattr(callback, event, None)
    if method is not None:
        method(*args)


def handles(callback: Any, event: str) -> bool:
    """Returns whether a callback handles an event."""
    method = getattr(callback, event, None)
    function = getattr(method, "__func__", method)
    if function is getattr(CallbackList, event):
        return any(handles(member, event) for member in callback.callbacks)
    return function is not None and function is not getattr(Callback, event)


def runs_last(callback: Any) -> bool:
    """Returns whether a callback gets events after all others."""
    return bool(getattr(callback, "runs_last", False))


def asks_to_stop(callback: Any) -> bool:
    """Returns whether a callback, or a member of a callback list of any class, has ``should_stop`` set."""
    if getattr(callback, "should_stop", False):
        return True
    # CallbackList asks its members itself. A list of another class may not know `should_stop`.
    members = () if isinstance(callback, CallbackList) else getattr(callback, "callbacks", None)
    if members is None:
        members = callback
    is_list = isinstance(members, Iterable) and not isinstance(members, Iterator | Mapping)
    return is_list and any(asks_to_stop(member) for member in members if is_callback(member))


def flatten(callbacks: Iterable[Any]) -> Iterator[Any]:
    """Yields callbacks, replacing each `CallbackList` by its members."""
    for callback in callbacks:
        # A subclass may handle events differently, so it dispatches to its members itself.
        if type(callback) is CallbackList:
            yield from flatten(callback.callbacks)
        else:
            yield callback


def asked_by(callbacks: Any) -> tuple[tuple[Any, ...], tuple[str, ...]]:
    """Returns what callbacks need from the trainer that is created with them.

    These are the transformations to chain after the optimizer (``optimizer_part``), and the names of the values that
    the step should report (``reports``), see `trainer.make_train_step`.
    """
    members = list(flatten([callbacks]))
    parts = tuple(one.optimizer_part for one in members if getattr(one, "optimizer_part", None) is not None)
    return parts, tuple(dict.fromkeys(name for one in members for name in getattr(one, "reports", ())))


def without_savers(callbacks: Any) -> Any:
    """Returns the callbacks except those that save the states of others, which have ``runs_last``."""
    if not isinstance(callbacks, CallbackList):
        return callbacks
    return CallbackList(callback for callback in flatten(callbacks.callbacks) if not runs_last(callback))


def is_callback(value: Any) -> bool:
    """Returns whether an object has a method for any event, or ``should_stop``. A class is not a callback."""
    return not isinstance(value, type) and any(hasattr(value, name) for name in (*EVENTS, "should_stop"))


def as_callback_list(callbacks: Any) -> Any:
    """Returns ``callbacks`` as one callback: a `CallbackList`, or an object that dispatches events itself.

    Raises:
        ArgumentTypeError: It is neither a callback nor a sequence of callbacks.
    """
    if callbacks is None:
        return CallbackList()
    if is_callback(callbacks):
        if isinstance(callbacks, CallbackList):
            _check_members(callbacks)
        else:
            check_handlers(callbacks, "callbacks")
        return callbacks
    inside = getattr(callbacks, "callbacks", None)
    if isinstance(inside, list | tuple) and not isinstance(callbacks, type):
        # Another library's list, which leaves dispatch to its trainer; later additions to it count.
        made = CallbackList()
        made.callbacks = inside  # type: ignore[assignment]
        _check_members(made)
        return made
    if not isinstance(callbacks, Iterable) or isinstance(callbacks, str | bytes | type):
        raise ArgumentTypeError(
            f"`callbacks` {_what_came(callbacks)}; it must be a trainer.CallbackList or a sequence of callbacks."
        )
    made = CallbackList(callbacks)
    _check_members(made)
    return made


def check_handlers(callback: Any, name: str) -> None:
    """Checks the methods of a callback or an extension that events would call.

    A method whose name begins with ``on_`` and that no event calls, such as ``on_train_epoch_end``, is a warning.

    Raises:
        ArgumentTypeError: A method cannot take the arguments of its event.
    """
    kind = type(callback)
    unknown = [
        f"`{method}` ({did_you_mean(_in_our_words(method), EVENTS)})"
        for method in dir(kind)
        if method.startswith("on_") and method not in EVENTS and callable(getattr(kind, method, None))
    ]
    if unknown:
        warn(f"`{name}` of type {kind.__name__} has methods that no event calls: {', '.join(unknown)}")
    for event in EVENTS:
        if handles(callback, event):
            called = [one for one in inspect.signature(getattr(Callback, event)).parameters if one != "self"]
            check_call(getattr(callback, event), f"{name}.{event}", f"{event}({', '.join(called)})", *called)


def _in_our_words(method: str) -> str:
    """Returns the name of an event of Keras or Lightning as it would be here, ``on_epoch_begin``, or nearly so."""
    for theirs, ours in (
        ("train_batch", "batch"),
        ("train_epoch", "epoch"),
        ("start", "begin"),
        ("test", "validation"),
    ):
        method = method.replace(theirs, ours)
    return method


def _check_members(callbacks: CallbackList) -> None:
    for index, callback in enumerate(flatten(callbacks.callbacks)):
        if is_callback(callback):
            check_handlers(callback, f"callbacks[{index}]")
        else:
            raise ArgumentTypeError(
                f"`callbacks[{index}]` {_what_came(callback)}, which is no callback; a callback is an object with a "
                f"method for at least one event ({', '.join(EVENTS[:4])}, ...), for example an instance of a subclass "
                f"of trainer.Callback."
            )


def _what_came(value: Any) -> str:
    return f"is the class {value.__name__}" if isinstance(value, type) else f"is of type {type(value).__name__}"


def _lists_inside(callbacks: CallbackList) -> Iterator[CallbackList]:
    for callback in callbacks.callbacks:
        if type(callback) is CallbackList:
            yield callback
            yield from _lists_inside(callback)
