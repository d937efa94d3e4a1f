"""`CallbackDispatcher`: the events and the states of callbacks and extensions together."""

import dataclasses
import functools
import gc
import itertools
import time
import weakref
from pathlib import Path

import numpy as np
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
    def __init__(self, start):
        self.state = start

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


def stop(monitor="val_loss", **options):
    return EarlyStopping(monitor, **options)


class TestStates:
    def test_they_come_in_list_order_and_go_back_to_their_owners(self):
        def make(*states):
            return build([Last(states[0]), Callback(), CallbackList([Stateful(states[1])])], one=Stateful(states[2]))

        source, target = make("last", "nested", "extension"), make(1, 2, 3)
        names = ["Last", "Stateful", "extensions/one"]
        states = ["last", "nested", "extension"]
        saved = source.state_dict()
        assert [(one["callback"], one["state"]) for one in saved] == list(zip(names, states, strict=True))
        target.load_state_dict(saved)
        assert [one["state"] for one in target.state_dict()] == states

    def test_they_find_their_owners_in_another_order(self):
        a, b, last = Stateful("a"), stop("val_b"), Last("last")
        b.load_state_dict({"best_score": 0.5, "waited": 1, "stopped_step": None})
        saved = build([a, CallbackList([b]), last], x=Stateful("x"), y=Stateful("y")).state_dict()
        a2, b2, last2, x2, y2 = Stateful(0), stop("val_b", patience=3), Last(0), Stateful(0), Stateful(0)
        build([last2, b2, a2], y=y2, x=x2).load_state_dict(saved)
        assert (a2.state, last2.state, x2.state, y2.state) == ("a", "last", "x", "y")
        assert b2.state_dict() == b.state_dict()

    def test_an_owner_without_a_state_starts_without_one_and_a_state_without_an_owner_is_said(self):
        saved = build([old := stop("val_a")], one=Stateful(1)).state_dict()
        old.best_score = 0.25
        new = stop("val_b")
        fresh = new.state_dict()
        with pytest.warns(UserWarning, match="the checkpoint holds, of the states of callbacks: ") as said:
            build([new], two=(two := Stateful(2))).load_state_dict(saved)
        (text,) = [str(one.message) for one in said]
        assert "no state for 'EarlyStopping(val_b)', which starts without one" in text
        assert "no state for 'extensions/two'" in text
        assert "a state of 'EarlyStopping(val_a)', which this trainer does not have" in text
        assert "a state of 'extensions/one'" in text
        assert (new.state_dict(), two.state) == (fresh, 2)

    def test_several_of_one_name_keep_their_order(self):
        saved = build([Stateful(1), Last(0), Stateful(2)]).state_dict()
        build([first := Stateful(0), second := Stateful(0), Last(9)]).load_state_dict(saved)
        assert (first.state, second.state) == (1, 2)

    def test_several_of_one_name_find_theirs_by_what_they_were_made_with(self):
        class Counter(Stateful):
            def __init__(self, name, folder):
                super().__init__(0)
                self.name, self._folder = name, folder

        def made():
            return [Counter("a", Path("x")), Counter("b", Path("x")), Counter("a", Path("y"))]

        before = made()
        dispatcher = build(before)
        for number, callback in enumerate(before):
            callback.state = number + 1  # as events do
        saved = dispatcher.state_dict()
        for order in itertools.permutations(range(3)):
            after = made()
            build([after[index] for index in order]).load_state_dict(saved)
            assert [callback.state for callback in after] == [1, 2, 3]

    @pytest.mark.parametrize(
        ("first", "second"),
        [
            (["a"], ["b"]),
            (("a", 1), ("a", 2)),
            ({"a": 1}, {"a": 2}),
            ({"a"}, {"b"}),
            (lambda logs: logs["a"], lambda logs: logs["b"]),
            (functools.partial(max, 1), functools.partial(max, 2)),
            (max, min),
            (np.ones(2), np.zeros(2)),
        ],
        ids=["list", "tuple", "dict", "set", "function", "partial", "builtin", "array"],
    )
    def test_a_container_or_a_function_tells_them_apart(self, first, second):
        class Watching(Stateful):
            def __init__(self, of):
                super().__init__(0)
                self.of = of

        dispatcher = build([a := Watching(first), b := Watching(second)])
        a.state, b.state = "a", "b"
        saved = dispatcher.state_dict()
        build([b := Watching(second), a := Watching(first)]).load_state_dict(saved)
        assert (a.state, b.state) == ("a", "b")

    def test_one_with_another_list_is_said_and_one_with_another_mapping_is_not(self):
        class Watching(Stateful):
            def __init__(self, of, options):
                super().__init__(0)
                self.of, self.options = of, options

        dispatcher = build([watching := Watching(["a"], {"resume": False})])
        watching.state = 1
        saved = dispatcher.state_dict()
        build([watching := Watching(["a"], {"resume": True})]).load_state_dict(saved)
        assert watching.state == 1
        with pytest.warns(UserWarning, match="saved with another `of`, restored nevertheless"):
            build([watching := Watching(["b"], {"resume": False})]).load_state_dict(saved)
        assert watching.state == 1

    def test_digests_of_functions_by_other_versions_are_not_compared(self):
        class Watching(Stateful):
            def __init__(self, of):
                super().__init__(0)
                self.of = of

        saved = build([Watching(max)]).state_dict()
        assert len(saved[0]["made"]["of"]) == 9
        saved[0]["made"]["of"] = "0000:0000"
        build([watching := Watching(min)]).load_state_dict(saved)
        assert watching.state == 0

    def test_digests_from_before_containers_counted_still_tell_callbacks_apart(self):
        class Counter(Stateful):
            def __init__(self, label):
                super().__init__(0)
                self.name, self.seen = f"counter of {label}", []

        dispatcher = build([a := Counter("a"), b := Counter("b")])
        a.state, b.state = "a", "b"
        saved = dispatcher.state_dict()
        for entry in saved:
            del entry["made"]["seen"]
        build([b := Counter("b"), a := Counter("a")]).load_state_dict(saved)
        assert (a.state, b.state) == ("a", "b")

    def test_an_extension_of_another_class_is_said(self):
        saved = build(one=Stateful(1)).state_dict()
        build(one=(same := Stateful(0))).load_state_dict(saved)
        assert same.state == 1
        with pytest.warns(
            UserWarning, match="a state of 'extensions/one' from another class, which Last gets all the same"
        ):
            build(one=(other := Last(0))).load_state_dict(saved)
        assert other.state == 1

    def test_those_of_other_arguments_get_no_state_of_another(self):
        class Best(Stateful):
            def __init__(self, monitor):
                super().__init__(0)
                self._monitor = monitor

        before = [Best("accuracy"), Best("loss"), Best("error")]
        dispatcher = build(before)
        for callback, best in zip(before, (0.9, 0.1, 0.2), strict=True):
            callback.state = best
        saved = dispatcher.state_dict()
        after = [Best("rate"), Best("norm"), Best("accuracy")]
        with pytest.warns(UserWarning, match="2 of 'Best' from callbacks with other arguments, so the 2 start"):
            build(after).load_state_dict(saved)
        assert [one.state for one in after] == [0, 0, 0.9]
        after = [Best("norm"), Best("loss"), Best("accuracy")]
        with pytest.warns(UserWarning, match="a state of 'Best' saved with another `monitor`, restored nevertheless"):
            build(after).load_state_dict(saved)
        assert [one.state for one in after] == [0.2, 0.1, 0.9]

    def test_a_single_one_of_other_arguments_is_said(self):
        class Best(Stateful):
            def __init__(self, monitor, patience):
                super().__init__(0)
                self.monitor, self._patience, self.seen = monitor, patience, object()

        dispatcher = build([best := Best("a", 3)])
        best.state = 1
        saved = dispatcher.state_dict()
        build([best := Best("a", 3)]).load_state_dict(saved)
        assert best.state == 1
        with pytest.warns(UserWarning, match="saved with another `patience`, `monitor`, restored nevertheless"):
            build([best := Best("b", 4)]).load_state_dict(saved)
        assert best.state == 1

    @pytest.mark.parametrize("made", ["0123456789abcdef", None, {}])
    def test_a_checkpoint_without_the_arguments_goes_by_list_order(self, made):
        saved = [{"callback": "Stateful", "state": number, "made": made} for number in (1, 2)]
        build([first := Stateful(8), second := Stateful(9)]).load_state_dict(saved)
        assert (first.state, second.state) == (1, 2)

    def test_what_is_no_argument_tells_nothing(self):
        class Timed(Stateful):
            def __init__(self):
                super().__init__(0)
                self.begun = time.perf_counter()

        dispatcher = build([timed := Timed()])
        timed.state = 1
        build([timed := Timed()]).load_state_dict(dispatcher.state_dict())
        assert timed.state == 1

    def test_a_best_score_of_the_other_mode_is_no_start(self):
        saved = build([old := stop("val_a")]).state_dict()
        old.best_score = 0.25
        with pytest.warns(UserWarning, match=r"no state for 'EarlyStopping\(val_a, max\)'"):
            build([new := stop("val_a", mode="max")]).load_state_dict(saved)
        assert new.best_score is None

    @pytest.mark.parametrize(("before", "after"), [([1], [8, 9]), ([1, 2], [9])])
    def test_which_of_several_was_meant_is_not_guessed(self, before, after):
        saved = build([*map(Stateful, before), Last(0)]).state_dict()
        callbacks = [*map(Stateful, after), Last(9)]
        with pytest.warns(UserWarning, match=rf"{len(before)} for the {len(after)} callbacks named 'Stateful', so th"):
            build(callbacks).load_state_dict(saved)
        assert [one.state for one in callbacks] == [*after, 0]

    def test_a_key_tells_members_of_a_class_apart(self):
        def keyed(key, state):
            callback = Stateful(state)
            callback.state_key = key
            return callback

        saved = build([keyed("a", 1), keyed("b", 2)]).state_dict()
        assert [one["callback"] for one in saved] == ["a", "b"]
        build([b := keyed("b", 0), a := keyed("a", 0)]).load_state_dict(saved)
        assert (a.state, b.state) == (1, 2)

    def test_states_without_names_go_by_position_as_they_were_saved(self):
        build([Last(0), a := Stateful(0)], one=(one := Stateful(0))).load_state_dict(["last", "a", "one"])
        assert (a.state, one.state) == ("a", "one")
        with pytest.warns(UserWarning, match="1 states without names, which 2 callbacks get by position"):
            build([a, one]).load_state_dict([7])
        assert (a.state, one.state) == (7, "one")

    def test_states_of_which_some_have_names_are_refused(self):
        with pytest.raises(CheckpointError, match="some have a name and some have none"):
            build([Stateful(0), Last(0)]).load_state_dict([{"callback": "Stateful", "state": 1}, 5])


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


def test_a_wish_to_stop_counts_whichever_process_it_is_from():
    own = EarlyStopping("loss")
    own.should_stop, own.reason = False, "the loss stalls"
    dispatcher = CallbackDispatcher(CallbackList([own]), {})
    dispatcher.share_stop([[], ["the time is up"]])
    assert dispatcher.should_stop
    assert dispatcher.stop_reasons() == ["the time is up, in process 1"]
    assert dispatcher.own_stop_reasons() == []
    own.should_stop = True
    assert dispatcher.stop_reasons() == dispatcher.own_stop_reasons() == ["the loss stalls"]
    own.should_stop = False
    dispatcher.share_stop([[], []])
    assert not dispatcher.should_stop


@pytest.mark.parametrize("shared", [[[], []], [["the time is up"], []]], ids=["goes on", "stops"])
def test_a_wish_that_changes_after_it_was_shared_counts_at_the_next_time(shared):
    own = Callback()
    dispatcher = build(own)
    dispatcher.share_stop(shared)
    for own.should_stop in (True, False, True):
        assert dispatcher.should_stop == any(shared)
    dispatcher.share_stop([dispatcher.own_stop_reasons(), []])
    assert dispatcher.should_stop
