"""`CallbackDispatcher`: the events and saved states of a trainer's callbacks and extensions."""

import functools
import hashlib
import inspect
import os
import types
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from trainer.callbacks.base import CallbackList, asks_to_stop, emit, flatten, handles
from trainer.core.fingerprint import fingerprint
from trainer.errors import CheckpointError, warn

_PLAIN = (str, int, float, bool, type(None), os.PathLike)
_FUNCTIONS = (types.FunctionType, types.BuiltinFunctionType, functools.partial)
_HASHED = (list, tuple, dict, set, frozenset, np.ndarray, *_FUNCTIONS)


class CallbackDispatcher:
    """Sends events to a trainer's callbacks, then to its extensions, then to callbacks with ``runs_last``.

    Args:
        callbacks: The result of `trainer.callbacks.base.as_callback_list`. A `CallbackList` is read at every event,
            so it may change during a run; a list of any other class dispatches to its members itself.
        extensions: The extensions by name. Their event methods are called like those of callbacks.
        display: A callback without state that gets every event after all others, or None.
    """

    def __init__(self, callbacks: Any, extensions: Mapping[str, Any], display: Any = None) -> None:
        self._callbacks = callbacks
        self._extensions = extensions
        self._all = CallbackList((callbacks, *extensions.values(), *([] if display is None else [display])))
        self.emit = self._all.emit  # three times in every step
        self._shared_reasons: list[str] | None = None
        # Taken before any event changes them.
        self._made = [(callback, _attributes_of(callback)) for callback in flatten([callbacks])]
        self._made += [(one, {"class": _short(type(one).__qualname__)}) for one in extensions.values()]

    def emit_to_all(self, event: str, *args: Any) -> list[BaseException]:
        """Like `emit`, but exceptions do not stop the event from reaching the rest; returns the exceptions.

        Even Ctrl-C in one callback must not leave the files of others open, so it is returned too.
        """
        failures: list[BaseException] = []
        for callback in self._all.in_order():
            try:
                emit(callback, event, *args)
            except BaseException as failure:
                failures.append(failure)
        return failures

    def handles(self, event: str) -> bool:
        """Returns whether any callback or extension handles an event."""
        return any(handles(callback, event) for callback in self._all.in_order())

    @property
    def should_stop(self) -> bool:
        """Whether any callback or extension asks to end the run.

        With several processes, whether one did in any of them at the last `share_stop`: what a callback of this process
        says since then, the others do not know, and all must end together.
        """
        return self._all.should_stop if self._shared_reasons is None else bool(self._shared_reasons)

    def stop_reasons(self) -> list[str]:
        """Returns why callbacks ask to end the run: their ``reason``, or their class name."""
        return self.own_stop_reasons() or self._shared_reasons or []

    def own_stop_reasons(self) -> list[str]:
        """Returns why callbacks of this process ask to end the run."""
        asking = [one for one in self._all.in_order() if asks_to_stop(one)]
        return [getattr(one, "reason", None) or f"{type(one).__name__} asked for it" for one in asking]

    def share_stop(self, reasons: Sequence[Sequence[str]]) -> None:
        """Takes the `own_stop_reasons` of each process, in process order: the run ends in all if it does in one."""
        self._shared_reasons = [f"{why}, in process {process}" for process, own in enumerate(reasons) for why in own]

    @property
    def has_shared_stop(self) -> bool:
        """Whether a callback of any process asked to end the run at the last `share_stop`; all know the same."""
        return bool(self._shared_reasons)

    def state_dict(self) -> list[dict[str, Any]]:
        """Returns the states of the callbacks and extensions that have ``state_dict`` and ``load_state_dict``.

        Each is ``{"callback": name, "state": state, "made": digests}``. The name is a callback's ``state_key``, or by
        default its class name; for an extension it is ``extensions/<name>``. The digests are those of its attributes
        that are plain values, containers or functions, by name, when the trainer was created; of an extension, that of
        its class.
        """
        return [
            {"callback": name, "state": one.state_dict(), **({"made": made} if (made := self._made_of(one)) else {})}
            for name, one in self._stateful()
        ]

    def load_state_dict(self, states: Sequence[Any]) -> None:
        """Restores each state to the callback or extension of its name.

        Callbacks that share a name are matched by the attributes that they were created with, then by their
        constructor arguments, and in list order only if these are equal. If their number has changed since the save,
        none gets a state, since any could be the owner. A warning lists callbacks without a state, states without a
        callback, a single callback whose state comes from one with other arguments, and an extension whose state comes
        from another class. States of an older format have no names, and are assigned by position.

        Raises:
            CheckpointError: A callback or an extension cannot use its state, or only some states have names.
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
                    f"{len(found)} for the {len(owners)} callbacks named {name!r}, so these start without states (give "
                    f"each callback a `state_key` of its own)"
                )
            else:
                problems += self._load_matched(name, owners, entries)
        if problems:
            _warn(problems)

    @property
    def has_states(self) -> bool:
        """Whether any callback or extension has a state to save."""
        return bool(self._stateful())

    def _load_matched(self, name: str, owners: Sequence[Any], entries: Sequence[Any]) -> list[str]:
        """Gives callbacks of one name as many states, each that of its like; returns what is to be said."""
        left, kept = list(owners), [dict(entry) for entry in entries]
        if any(owners[0] is extension for extension in self._extensions.values()):
            _load(left[0], kept[0]["state"])
            if _differing(self._made_of(left[0]), _made_in(kept[0])):
                return [f"a state of {name!r} from another class, which {type(left[0]).__name__} gets all the same"]
            return []
        for alike in (_equal, _of_equal_arguments, _of_equal_arguments_but_mappings):
            for entry in list(kept):
                made = _made_in(entry)
                owner = next((one for one in left if alike(one, self._made_of(one), made)), None)
                if owner is not None:
                    _load(owner, entry["state"])
                    left, kept = _without(left, owner), _without(kept, entry)
        if len(left) > 1:
            return [
                f"{len(kept)} of {name!r} from callbacks with other arguments, so the {len(left)} start without states"
            ]
        if not left:
            return []
        (owner,), (entry,) = left, kept
        _load(owner, entry["state"])
        if hasattr(owner, "state_key"):  # the caller has said whose it is
            return []
        now, then = _arguments_in(owner, self._made_of(owner)), _made_in(entry)
        others = [f"`{argument.lstrip('_')}`" for argument in _differing(now, then)]
        return [f"a state of {name!r} saved with another {', '.join(others)}, restored nevertheless"]

    def _made_of(self, callback: Any) -> dict[str, str]:
        return next((digests for one, digests in self._made if one is callback), {})

    def _stateful(self) -> list[tuple[str, Any]]:
        """Returns the callbacks and extensions with a state, by name, in list order regardless of ``runs_last``."""
        named = [(_name_of(callback), callback) for callback in flatten([self._callbacks])]
        named += [(f"extensions/{name}", extension) for name, extension in self._extensions.items()]
        return [(name, one) for name, one in named if hasattr(one, "state_dict") and hasattr(one, "load_state_dict")]


def _name_of(callback: Any) -> str:
    key = getattr(callback, "state_key", None)
    return key if isinstance(key, str) and key else type(callback).__name__


def _attributes_of(callback: Any) -> dict[str, str]:
    """Returns short digests of a callback's plain values, containers and functions, mostly constructor arguments."""
    held = getattr(callback, "__dict__", {})
    return {name: _digest(held[name]) for name in sorted(held) if isinstance(held[name], (*_PLAIN, *_HASHED))}


def _digest(value: Any) -> str:
    if isinstance(value, _PLAIN):
        return _short(str(value))
    versions, _, content = fingerprint(value).rpartition(" ")
    return f"{_short(versions)}:{content[:4]}"


def _short(text: str) -> str:
    # 16 bits tell arguments apart, and nothing about one that is a password.
    return hashlib.sha256(repr(text).encode()).hexdigest()[:4]


def _differing(now: Mapping[str, str], then: Mapping[str, str]) -> list[str]:
    """Returns the names in both whose digests differ, and were made by the same versions."""
    shared = [name for name in now if isinstance(then.get(name), str)]
    return [name for name in shared if now[name] != then[name] and now[name][:-4] == then[name][:-4]]


def _arguments_in(callback: Any, made: Mapping[str, str]) -> dict[str, str]:
    """Returns the digests of what the constructor takes, as far as the callback holds it under that name."""
    try:
        taken = inspect.signature(type(callback)).parameters
    except (TypeError, ValueError):  # a class without a signature
        return {}
    return {name: digest for name, digest in made.items() if name.lstrip("_") in taken}


def _equal(callback: Any, now: Mapping[str, str], then: Mapping[str, str]) -> bool:
    del callback
    # A file from before containers and functions counted has fewer names.
    return bool(then) and then.keys() <= now.keys() and not _differing(now, then)


def _of_equal_arguments(callback: Any, now: Mapping[str, str], then: Mapping[str, str]) -> bool:
    return not _differing(_arguments_in(callback, now), then)


def _of_equal_arguments_but_mappings(callback: Any, now: Mapping[str, str], then: Mapping[str, str]) -> bool:
    # A mapping may hold all arguments of a program, such as whether to resume.
    held = getattr(callback, "__dict__", {})
    return not [name for name in _differing(_arguments_in(callback, now), then) if not isinstance(held.get(name), dict)]


def _without(members: list[Any], removed: Any) -> list[Any]:
    return [one for one in members if one is not removed]


def _made_in(entry: Mapping[str, Any]) -> Mapping[str, str]:
    made = entry.get("made")
    return made if isinstance(made, Mapping) else {}


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
