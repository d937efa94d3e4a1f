"""`CallbackDispatcher`: the events and the states of callbacks and extensions together."""

import dataclasses
import gc
import weakref

import pytest

from tests.callbacks.test_base import OnEpochEnd, Recorder
from trainer import Callback, CallbackList, CheckpointError, EarlyStopping
from trainer.callbacks.base import as_callback_list
from trainer.callbacks.dispatch import CallbackDispatcher


def build(callbacks=None, **extensions):
    return CallbackDispatcher(as_callback_list(callbacks), extensions)


class Foreign:
    """A list of callbacks of a class of its own, which handles one event."""

    def __init__(self, members):
        self.callbacks = members

    def __iter__(self):
        return iter(self.callbacks)

    def on_epoch_end(self, *args):
        for callback in reversed(self.callbacks):
            callback.on_epoch_end(*args)


class OnlyIterable(Foreign):
    def __init__(self, members):
        self.members = members

    def __iter__(self):
        return iter(self.members)


class Stateful(Callback):
    def __init__(self, state):
        self.state = state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        if state == "bad":
            raise KeyError("no such state")
        self.state = state


class Last(Stateful):
    runs_last = True


def test_callbacks_come_before_extensions_and_what_runs_last_after_both():
    calls = []
    last = Recorder("last", calls)
    last.runs_last = True
    dispatcher = build([last, Recorder("callback", calls)], first=Recorder("extension", calls), second=object())
    dispatcher.emit("on_batch_end", "trainer", 1, {})
    assert calls == [(name, "on_batch_end", ("trainer", 1, {})) for name in ("callback", "extension", "last")]


def test_the_list_of_the_caller_may_change_between_events():
    calls = []
    callbacks = CallbackList()
    dispatcher = CallbackDispatcher(callbacks, {})
    assert not dispatcher.handles("on_train_begin")
    dispatcher.emit("on_train_begin", None)
    callbacks.callbacks.append(Recorder("a", calls))
    assert dispatcher.handles("on_train_begin")
    dispatcher.emit("on_train_begin", None)
    assert calls == [("a", "on_train_begin", (None,))]


def test_every_callback_gets_an_event_that_some_raise_at():
    calls = []
    dispatcher = build([OnEpochEnd(), Recorder("a", calls)], broken=OnEpochEnd(), last=Recorder("b", calls))
    failures = dispatcher.emit_to_all("on_epoch_end", None, 0, {})
    assert [type(failure) for failure in failures] == [NotImplementedError, NotImplementedError]
    assert [name for name, _, _ in calls] == ["a", "b"]


def test_a_list_of_another_class_dispatches_itself():
    calls = []
    dispatcher = build(Foreign([Recorder("a", calls), Recorder("b", calls)]))
    dispatcher.emit("on_train_begin", None)
    dispatcher.emit("on_epoch_end", None, 0, {})
    assert [(name, event) for name, event, _ in calls] == [("b", "on_epoch_end"), ("a", "on_epoch_end")]
    assert dispatcher.handles("on_epoch_end")
    assert not dispatcher.handles("on_train_begin")


def test_a_subclass_of_the_list_dispatches_itself():
    class Reversed(CallbackList):
        def on_train_begin(self, trainer):
            for callback in reversed(self.callbacks):
                callback.on_train_begin(trainer)

    calls = []
    dispatcher = build(Reversed([Recorder("a", calls), Recorder("b", calls)]))
    dispatcher.emit("on_train_begin", None)
    dispatcher.emit("on_train_end", None)
    assert [name for name, _, _ in calls] == ["b", "a", "a", "b"]


@pytest.mark.parametrize("wrap", [lambda x: x, CallbackList, Foreign, OnlyIterable, lambda x: [Foreign([Foreign(x)])]])
def test_a_member_of_any_list_can_ask_to_stop(wrap):
    asking = Callback()
    dispatcher = build(wrap([Callback(), asking]))
    assert dispatcher.should_stop is False
    asking.should_stop = True
    assert dispatcher.should_stop is True


def test_an_extension_can_ask_to_stop():
    asking = Callback()
    dispatcher = build(None, asking=asking)
    assert not dispatcher.should_stop
    asking.should_stop = True
    assert dispatcher.should_stop


def test_states_come_in_list_order_and_go_back_to_their_positions():
    def make(*states):
        return build([Last(states[0]), Callback(), CallbackList([Stateful(states[1])])], extension=Stateful(states[2]))

    source, target = make("last", "nested", "extension"), make(1, 2, 3)
    assert source.state_dict() == ["last", "nested", "extension"]
    target.load_state_dict(source.state_dict())
    assert target.state_dict() == source.state_dict()


def test_a_state_that_is_refused_names_the_callback():
    with pytest.raises(
        CheckpointError, match=r"Stateful.load_state_dict raised KeyError\('no such state'\) at the state"
    ):
        build([EarlyStopping(), Stateful(0)]).load_state_dict([EarlyStopping().state_dict(), "bad"])


def test_it_keeps_nothing_alive():
    @dataclasses.dataclass(eq=False)
    class Large(Callback):
        pass

    large = Large()
    alive = weakref.ref(large)
    dispatcher = build(CallbackList([CallbackList([large])]), large=large)
    dispatcher.emit("on_batch_begin", None, 1)
    gc.disable()
    try:
        del dispatcher, large
        assert alive() is None
    finally:
        gc.enable()
