"""Callbacks: who is called, in which order, and what a run shows of itself."""

import io
from types import SimpleNamespace

import pytest

from trainer import Callback, CallbackList, Extension, Progress
from trainer.callbacks.base import EVENTS, emit, listens

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
    assert (getattr(CallbackList, event).__name__, event in getattr(CallbackList, event).__doc__) == (event, True)


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
    ("listener", "expected"),
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
        (Progress(io.StringIO()), True),
    ],
)
def test_listens(listener, expected):
    assert listens(listener, "on_epoch_end") is expected


def test_listens_asks_for_one_event():
    assert not listens(OnEpochEnd(), "on_batch_end")
    assert listens(DuckTyped(), "on_epoch_begin")


class Terminal(io.StringIO):
    def isatty(self):
        return True


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def show(stream, times, num_batches_per_epoch=3):
    """Runs a display through one batch at each of the times, in seconds since the start."""
    clock = Clock()
    progress = Progress(stream, clock=clock)
    trainer = SimpleNamespace(epoch=0, step=0, leads=True)
    for i, time in enumerate(times):
        if i % num_batches_per_epoch == 0:
            trainer.epoch = i // num_batches_per_epoch
            progress.on_epoch_begin(trainer, trainer.epoch)
        clock.now = 100.0 + time
        trainer.step = i + 1
        progress.on_call_end(trainer, trainer.step, {"step": i + 1, "loss": float(i + 1)})
        if (i + 1) % num_batches_per_epoch == 0:
            progress.on_epoch_end(trainer, trainer.epoch, {"loss": 0.5})
    return stream.getvalue()


def test_a_file_gets_whole_lines_only():
    assert show(io.StringIO(), [0.5, 1.0, 2.0, 3.0, 4.0, 5.25]) == (
        "epoch 1  step 3  loss 0.5  2.0 s\nepoch 2  step 6  loss 0.5  3.2 s\n"
    )


def test_a_terminal_shows_the_metrics_of_the_step_before():
    assert show(Terminal(), [1.0, 2.0, 3.0]) == (
        "epoch 1  step 1  1.0 s\r"
        "epoch 1  step 2  loss 1  2.0 s\r"
        "epoch 1  step 3  loss 2  3.0 s\r"
        "epoch 1  step 3  loss 0.5  3.0 s\n"
    )


def test_a_terminal_is_drawn_at_most_ten_times_a_second():
    drawn = show(Terminal(), [i * 0.03 for i in range(100)], num_batches_per_epoch=1000).split("\r")[:-1]
    seconds = [float(line.split()[-2]) for line in drawn]
    # 0.0, then every fourth batch.
    assert len(drawn) == 25
    assert seconds == [round(4 * i * 0.03, 1) for i in range(25)]


def test_a_shorter_line_wipes_a_longer_one():
    stream, clock = Terminal(), Clock()
    progress = Progress(stream, clock=clock)
    trainer = SimpleNamespace(epoch=0, step=9, leads=True)
    progress.on_epoch_begin(trainer, 0)
    metrics = {f"a_long_name_{i}": 0.123456 for i in range(9)}
    for logs in (metrics, {}, {}):
        clock.now += 1.0
        progress.on_call_end(trainer, 9, logs)
    progress.on_epoch_end(trainer, 0, {})
    _, long, short, last = stream.getvalue().split("\r")
    assert len(long) > 200
    assert len(short) == len(long)
    assert (short.rstrip(), last) == ("epoch 1  step 9  3.0 s", "epoch 1  step 9  3.0 s\n")


def test_progress_goes_to_standard_error_by_default(capsys):
    progress = Progress(clock=Clock())
    progress.on_epoch_begin(None, 0)
    progress.on_epoch_end(SimpleNamespace(step=4, leads=True), 0, {"step": 4, "loss": 1.0})
    assert capsys.readouterr() == ("", "epoch 1  step 4  loss 1  0.0 s\n")
