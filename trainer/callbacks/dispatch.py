"""`CallbackDispatcher`: the events and saved states of a trainer's callbacks and extensions."""

import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from trainer.callbacks.base import CallbackList, asks_to_stop, emit, flatten, handles
from trainer.errors import CheckpointError, warn


class CallbackDispatcher:
    """Sends events to a trainer's callbacks and then to its extensions, callbacks with ``runs_last`` at the end.

    Args:
        callbacks: What `trainer.callbacks.base.as_callback_list` returned. A `CallbackList` is read at every event,
            so it may change during a run; a list of any other class dispatches to its members itself.
        extensions: The extensions by name. Their methods for events are called like those of callbacks.
        display: A callback that gets every event after all of these, and has no state; None for no such.
    """

    def __init__(self, callbacks: Any, extensions: Mapping[str, Any], display: Any = None) -> None:
        self._callbacks = callbacks
        self._extensions = extensions
        self._all = CallbackList((callbacks, *extensions.values(), *([] if display is None else [display])))
        # Before any event has changed them.
        self._made = [(callback, _attributes_of(callback)) for callback in flatten([callbacks])]

    def emit(self, event: str, *args: Any) -> None:
        """Calls the method named ``event`` with ``args``, on each that has one."""
        self._all.emit(event, *args)

    def emit_to_all(self, event: str, *args: Any) -> list[BaseException]:
        """Like `emit`, but an exception does not keep the event from the rest; returns the exceptions.

        Ctrl-C in one callback is no reason to leave the others' files open either: it is among what is returned.
        """
        failures: list[BaseException] = []
        for callback in self._all.in_order():
            try:
                emit(callback, event, *args)
            except BaseException as failure:
                failures.append(failure)
        return failures

    def handles(self, event: str) -> bool:
        """Returns whether any callback or extension does anything at an event."""
        return any(handles(callback, event) for callback in self._all.in_order())

    @property
    def should_stop(self) -> bool:
        """Whether any callback or extension asks to end the run."""
        return self._all.should_stop

    def stop_reasons(self) -> list[str]:
        """Returns why callbacks ask to end the run: their ``reason``, or their class."""
        asking = [one for one in self._all.in_order() if asks_to_stop(one)]
        return [getattr(one, "reason", None) or f"{type(one).__name__} asked for it" for one in asking]

    def state_dict(self) -> list[dict[str, Any]]:
        """Returns the states of the callbacks and extensions that have ``state_dict`` and ``load_state_dict``.

        Each is ``{"callback": name, "state": state}``. The name is the ``state_key`` of a callback, else the name of
        its class; an extension is ``extensions/<name>``. Of several of one name each has a digest of its plain
        attributes too, as they were when the trainer was made: ``"made": text``.
        """
        present = self._stateful()
        names = [name for name, _ in present]
        return [
            {
                "callback": name,
                "state": one.state_dict(),
                **({"made": self._made_of(one)} if names.count(name) > 1 else {}),
            }
            for name, one in present
        ]

    def load_state_dict(self, states: Sequence[Any]) -> None:
        """Gives each state to the callback or extension that it is named for.

        Several of one name get theirs by the attributes that they were made with, in whatever order they come; where
        these tell nothing (they are all alike, or others than then) in list order. If there are more or fewer of them
        than when the states were saved, none gets one, since any of them may be the owner. Whatever finds no owner or
        no state is named in a warning. States of an older format have no names, and are given out by position.

        Raises:
            CheckpointError: A callback or an extension cannot use its state, or some states have names and some none.
        """
        present = self._stateful()
        named = [_is_named(entry) for entry in states]
        if any(named) and not all(named):
            raise CheckpointError("of the states of callbacks in the checkpoint, some have a name and some have none.")
        if not all(named):
            if len(states) != len(present):
                _warn([f"{len(states)} states without names, which {len(present)} callbacks get by position"])
            for (_, callback), state in zip(present, states, strict=False):
                _load(callback, state)
            return
        problems = []
        for name in dict.fromkeys([*(name for name, _ in present), *(entry["callback"] for entry in states)]):
            owners = [callback for known, callback in present if known == name]
            entries = [entry for entry in states if entry["callback"] == name]
            found = [entry["state"] for entry in entries]
            if not found:
                problems.append(f"no state for {name!r}, which starts without one")
            elif not owners:
                problems.append(f"a state of {name!r}, which this trainer does not have")
            elif len(owners) != len(found):
                problems.append(
                    f"{len(found)} for the {len(owners)} callbacks named {name!r}, none of which gets one (give each "
                    f"callback a `state_key` of its own)"
                )
            else:
                then = [entry.get("made") for entry in entries]
                now = [self._made_of(owner) for owner in owners]
                if len(set(then)) == len(then) and set(then) == set(now):
                    found = [found[then.index(made)] for made in now]
                for callback, state in zip(owners, found, strict=True):
                    _load(callback, state)
        if problems:
            _warn(problems)

    @property
    def has_states(self) -> bool:
        """Whether any callback or extension has a state to save."""
        return bool(self._stateful())

    def _made_of(self, callback: Any) -> str:
        return next((text for one, text in self._made if one is callback), "")

    def _stateful(self) -> list[tuple[str, Any]]:
        """Returns the callbacks and extensions that have a state, by name, in list order whatever ``runs_last`` is."""
        named = [(_name_of(callback), callback) for callback in flatten([self._callbacks])]
        named += [(f"extensions/{name}", extension) for name, extension in self._extensions.items()]
        return [(name, one) for name, one in named if hasattr(one, "state_dict") and hasattr(one, "load_state_dict")]


def _name_of(callback: Any) -> str:
    key = getattr(callback, "state_key", None)
    return key if isinstance(key, str) and key else type(callback).__name__


def _attributes_of(callback: Any) -> str:
    """Returns a digest of the attributes of a callback that are plain values: what it was made with, mostly."""
    plain = (str, int, float, bool, type(None), os.PathLike)
    held = {name: value for name, value in getattr(callback, "__dict__", {}).items() if isinstance(value, plain)}
    text = repr([(name, str(held[name])) for name in sorted(held)])
    return hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:16]  # no text: some hold passwords


def _is_named(entry: Any) -> bool:
    if not isinstance(entry, Mapping) or entry.keys() - {"made"} != {"callback", "state"}:
        return False
    return isinstance(entry["callback"], str)


def _load(callback: Any, state: Any) -> None:
    try:
        callback.load_state_dict(state)
    except Exception as error:
        raise CheckpointError(
            f"{type(callback).__name__}.load_state_dict raised {error!r} at the state in the checkpoint."
        ) from error


def _warn(problems: list[str]) -> None:
    warn(f"the checkpoint holds, of the states of callbacks: {'; '.join(problems)}.")
