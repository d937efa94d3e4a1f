"""Callbacks and lists of callbacks: which methods an event calls, and in which order."""

import copy
import dataclasses
import io
import pickle
from types import SimpleNamespace

import pytest

from tests.problems import Linear, config, regression, squared_error
from trainer import (
    ArgumentTypeError,
    Callback,
    CallbackList,
    EarlyStopping,
    Extension,
    ModelCheckpoint,
    Progress,
    ReduceLROnPlateau,
    Trainer,
)
from trainer.callbacks.base import EVENTS, as_callback_list, emit, handles

ARGUMENTS = {
    "on_train_begin": ("trainer",),
    "on_train_end": ("trainer",),
    "on_epoch_begin": ("trainer", 0),
    "on_epoch_end": ("trainer", 0, {"loss": 1.0}),
    "on_batch_begin": ("trainer", 0),
    "on_batch_end": ("trainer", 1, {"loss": 1.0}),
    "on_call_end": ("trainer", 1, {"loss": 1.0}),
    "on_compile_begin": ("trainer", "train_step"),
    "on_compile_end": ("trainer", "train_step", 1.5),
    "on_validation_begin": ("trainer",),
    "on_validation_end": ("trainer", {"loss": 1.0}),
}


class Recorder:
    """Not a `Callback`, with a method for every event."""

    def __init__(self, name, calls):
        self.name, self.calls = name, calls

    def __getattr__(self, event):
        if event not in EVENTS:
            raise AttributeError(event)
        return lambda *args: self.calls.append((self.name, event, args))


class OnEpochEnd(Callback):
    def on_epoch_end(self, trainer, epoch, logs):
        raise NotImplementedError


class DuckTyped:
    """Has one method and nothing else."""

    def __init__(self):
        self.epochs = []

    def on_epoch_begin(self, trainer, epoch):
        self.epochs.append(epoch)


def test_the_table_of_arguments_is_complete():
    assert ARGUMENTS.keys() == set(EVENTS)


@pytest.mark.parametrize("event", EVENTS)
def test_a_list_calls_everyone_in_order_with_the_same_arguments(event):
    calls = []
    callbacks = CallbackList([Recorder("a", calls), CallbackList([Recorder("b", calls)]), Callback(), object()])
    callbacks.add(Recorder("c", calls))
    getattr(callbacks, event)(*ARGUMENTS[event])
    assert calls == [(name, event, ARGUMENTS[event]) for name in "abc"]


@pytest.mark.parametrize("event", EVENTS)
def test_the_base_does_nothing(event):
    callback = Callback()
    assert getattr(callback, event)(*ARGUMENTS[event]) is None
    assert vars(callback) == {}
    assert not callback.should_stop


def test_a_list_can_be_changed():
    first, second = Callback(), Callback()
    callbacks = CallbackList()
    assert (len(callbacks), list(callbacks), callbacks.should_stop) == (0, [], False)
    callbacks.add(first)
    callbacks.add(second)
    assert (len(callbacks), list(callbacks)) == (2, [first, second])
    callbacks.remove(first)
    assert list(callbacks) == [second]
    with pytest.raises(ValueError, match="not in list"):
        callbacks.remove(first)


def test_a_list_does_not_share_the_one_it_was_made_from():
    given = [Callback()]
    CallbackList(given).add(Callback())
    assert len(given) == 1


def test_a_callback_may_remove_itself_without_the_next_one_missing_the_event():
    calls = []
    callbacks = CallbackList()
    once = SimpleNamespace(on_train_begin=lambda trainer: callbacks.remove(once))
    callbacks.add(once)
    callbacks.add(Recorder("next", calls))
    callbacks.on_train_begin(None)
    assert [name for name, _, _ in calls] == ["next"]
    assert len(callbacks) == 1


def test_a_callback_may_add_another_which_gets_the_next_event():
    calls = []
    callbacks = CallbackList()
    callbacks.add(SimpleNamespace(on_train_begin=lambda trainer: callbacks.add(Recorder("new", calls))))
    callbacks.on_train_begin(None)
    assert calls == []
    callbacks.on_train_end(None)
    assert calls == [("new", "on_train_end", (None,))]


@dataclasses.dataclass
class Equal:
    """Equal to every other of its class, but not the same."""

    def __post_init__(self):
        self.steps = []

    def on_batch_begin(self, trainer, step):
        self.steps.append(step)


def test_a_replaced_callback_gets_no_event_any_more_though_the_new_one_is_equal():
    old, new = Equal(), Equal()
    inner = CallbackList([old])
    callbacks = CallbackList([inner])
    callbacks.on_batch_begin(None, 1)
    inner.callbacks[0] = new
    callbacks.on_batch_begin(None, 2)
    inner.callbacks = [old]
    callbacks.on_batch_begin(None, 3)
    assert (old.steps, new.steps) == ([1, 3], [2])


def test_a_method_that_is_assigned_later_is_called_from_the_next_epoch_on():
    calls = []
    callback = Callback()
    callbacks = CallbackList([callback])
    callbacks.on_batch_begin(None, 1)
    callback.on_batch_begin = lambda trainer, step: calls.append(step)
    callbacks.on_epoch_begin(None, 1)
    callbacks.on_batch_begin(None, 2)
    assert calls == [2]


def test_a_callback_that_runs_last_does_so_from_within_a_nested_list():
    calls = []
    last = Recorder("last", calls)
    last.runs_last = True
    callbacks = CallbackList([CallbackList([last, Recorder("a", calls)]), Recorder("b", calls)])
    callbacks.on_train_begin(None)
    assert [name for name, _, _ in calls] == ["a", "b", "last"]


def test_an_exception_of_a_callback_reaches_the_caller():
    with pytest.raises(NotImplementedError):
        CallbackList([OnEpochEnd()]).on_epoch_end(None, 0, {})


def test_a_duck_typed_callback_is_called_for_what_it_has():
    duck = DuckTyped()
    callbacks = CallbackList([duck])
    for event in EVENTS:
        emit(callbacks, event, *ARGUMENTS[event])
    assert duck.epochs == [0]


def test_anyone_can_ask_to_stop():
    quiet, asking = Callback(), Callback()
    callbacks = CallbackList([object(), quiet, CallbackList([asking])])
    assert not callbacks.should_stop
    asking.should_stop = True
    assert callbacks.should_stop
    assert not quiet.should_stop


def with_method_of_its_own():
    callback = Callback()
    callback.on_epoch_end = lambda trainer, epoch, logs: None
    return callback


@pytest.mark.parametrize(
    ("callback", "expected"),
    [
        (Callback(), False),
        (OnEpochEnd(), True),
        (with_method_of_its_own(), True),
        (Extension(), False),
        (object(), False),
        (DuckTyped(), False),
        (SimpleNamespace(on_epoch_end=print), True),
        (Recorder("a", []), True),
        (CallbackList(), False),
        (CallbackList([Callback(), DuckTyped()]), False),
        (CallbackList([Callback(), OnEpochEnd()]), True),
        (CallbackList([CallbackList([OnEpochEnd()])]), True),
        (Progress(io.StringIO()), False),  # so that no average is waited for
    ],
)
def test_handles(callback, expected):
    assert handles(callback, "on_epoch_end") is expected


def test_handles_asks_for_one_event():
    assert not handles(OnEpochEnd(), "on_batch_end")
    assert handles(DuckTyped(), "on_epoch_begin")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            [lambda trainer: None],
            r"`callbacks\[0\]` is of type function, which is no callback; a callback is an object",
        ),
        (
            [Callback(), object()],
            r"`callbacks\[1\]` is of type object, .* \(on_train_begin, .*subclass of trainer.Call",
        ),
        ((EarlyStopping,), r"`callbacks\[0\]` is the class EarlyStopping, which is no callback"),
        (CallbackList([Callback(), CallbackList([None])]), r"`callbacks\[1\]` is of type NoneType"),
        ("tensorboard", "`callbacks` is of type str; it must be a trainer.CallbackList or a sequence of callbacks"),
        (EarlyStopping, "`callbacks` is the class EarlyStopping; it must be a trainer.CallbackList"),
        (5, "`callbacks` is of type int; it must be"),
    ],
)
def test_what_is_no_callback_is_refused(given, message):
    with pytest.raises(ArgumentTypeError, match=message):
        as_callback_list(given)


@pytest.mark.parametrize(
    "given", [None, [], (DuckTyped(), Callback(), Extension()), iter([SimpleNamespace(should_stop=0)])]
)
def test_what_is_a_sequence_of_callbacks_becomes_a_list(given):
    assert type(as_callback_list(given)) is CallbackList


@pytest.mark.parametrize("given", [CallbackList(), DuckTyped(), EarlyStopping()])
def test_what_is_one_callback_stays_itself(given):
    assert as_callback_list(given) is given


class TestHandlers:
    """A method that no event can call, or that none ever will, is said when the trainer is made."""

    class OfKeras(Callback):
        def on_epoch_end(self, epoch, logs=None):
            pass

    class OfLightning(Callback):
        def on_train_epoch_end(self, trainer, module):
            pass

        def on_epoch_end(self, trainer, epoch, logs):
            pass

    class Loose(Callback):
        def on_epoch_end(self, *given):
            pass

        def on_batch_end(self, trainer, step, logs=None, **more):
            pass

        def onward(self):
            pass

    def test_arguments_of_another_library(self):
        with pytest.raises(ArgumentTypeError) as caught:
            as_callback_list([EarlyStopping(), self.OfKeras()])
        assert str(caught.value) == (
            "`callbacks[1].on_epoch_end` takes (epoch, logs=None), and is called as on_epoch_end(trainer, epoch, logs):"
            " too many positional arguments."
        )

    def test_a_method_of_another_library(self):
        with pytest.warns(UserWarning, match="that no event calls") as caught:
            as_callback_list([self.OfLightning()])
        assert [str(one.message) for one in caught] == [
            "`callbacks[0]` of type OfLightning has methods that no event calls: `on_train_epoch_end` (did you mean "
            "'on_epoch_end'?)"
        ]

    @pytest.mark.parametrize(
        ("name", "meant"),
        [
            ("on_train_batch_start", "on_batch_begin"),
            ("on_train_start", "on_train_begin"),
            ("on_test_end", "on_validation_end"),
            ("on_epoch_finish", "on_epoch_begin"),
        ],
    )
    def test_the_nearest_event_is_named(self, name, meant):
        made = type("Made", (Callback,), {name: lambda self, *given: None})
        with pytest.warns(UserWarning, match=f"`{name}` \\(did you mean '{meant}'"):
            as_callback_list([made()])

    @pytest.mark.parametrize("given", [[OfLightning()], CallbackList([OfLightning()]), OfLightning()])
    def test_however_it_is_given(self, given):
        with pytest.warns(UserWarning, match="`on_train_epoch_end`"):
            as_callback_list(given)

    def test_an_extension(self):
        class Typed(Extension):
            def loss_fn(self, batch, model_outputs):
                return 0.0

            def on_epoch_finished(self, trainer, epoch, logs):
                pass

        with pytest.warns(UserWarning, match=r"`extensions\['a'\]` of type Typed has .* `on_epoch_finished`"):
            Trainer(Linear(4), config(), loss_fn=squared_error, extensions={"a": Typed()})

    def test_whatever_can_be_called_is_taken(self):
        as_callback_list([self.Loose(), OnEpochEnd(), Recorder("a", [])])


@pytest.mark.parametrize(
    "make",
    [
        lambda path: ModelCheckpoint(path, monitor="loss"),
        lambda path: ReduceLROnPlateau("loss"),
        lambda path: EarlyStopping("loss"),
        lambda path: Progress(),
    ],
    ids=["ModelCheckpoint", "ReduceLROnPlateau", "EarlyStopping", "Progress"],
)
@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))], ids=["copied", "pickled"]
)
def test_callbacks_can_be_copied_for_every_fold(make, copied, tmp_path):
    given = make(tmp_path / "best")
    fold = copied(given)
    trainer = Trainer(Linear(4), config(), loss_fn=squared_error, callbacks=[fold], progress=False)
    trainer.train(regression(16), 2, 8)
    assert trainer.step == 4
    assert type(copied(fold)) is type(given)  # also after it has run
