"""`CallbackDispatcher`: the events and saved states of a trainer's callbacks and extensions."""

from collections.abc import Iterable, Mapping
from typing import Any

from trainer.callbacks.base import CallbackList, asks_to_stop, emit, flatten, handles
from trainer.errors import CheckpointError


class CallbackDispatcher:
    """Sends events to a trainer's callbacks and then to its extensions, callbacks with ``runs_last`` at the end.

    Args:
        callbacks: What `trainer.callbacks.base.as_callback_list` returned. A `CallbackList` is read at every event,
            so it may change during a run; a list of any other class dispatches to its members itself.
        extensions: The extensions by name. Their methods for events are called like those of callbacks.
    """

    def __init__(self, callbacks: Any, extensions: Mapping[str, Any]) -> None:
        self._callbacks = callbacks
        self._all = CallbackList((callbacks, *extensions.values()))

    def emit(self, event: str, *args: Any) -> None:
        """Calls the method named ``event`` with ``args``, on each that has one."""
        self._all.emit(event, *args)

    def emit_to_all(self, event: str, *args: Any) -> list[Exception]:
        """Like `emit`, but an exception does not keep the event from the rest; returns the exceptions."""
        failures = []
        for callback in self._all.in_order():
            try:
                emit(callback, event, *args)
            except Exception as failure:
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

    def state_dict(self) -> list[Any]:
        """Returns the states of the callbacks and extensions that have ``state_dict`` and ``load_state_dict``.

        They come in list order, whatever ``runs_last`` says, so that the position identifies the owner.
        """
        return [callback.state_dict() for callback in self._stateful()]

    def load_state_dict(self, states: Iterable[Any]) -> None:
        """Gives each state to the callback or extension at its position.

        Raises:
            CheckpointError: A callback or an extension cannot use its state.
        """
        for callback, state in zip(self._stateful(), states, strict=False):
            try:
                callback.load_state_dict(state)
            except Exception as error:
                raise CheckpointError(
                    f"{type(callback).__name__}.load_state_dict raised {error!r} at the state in the checkpoint."
                ) from error

    def _stateful(self) -> list[Any]:
        found = flatten(self._all.callbacks)
        return [one for one in found if hasattr(one, "state_dict") and hasattr(one, "load_state_dict")]
