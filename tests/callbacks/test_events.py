"""Hooks that raise: the user's own exception comes out, and the state is that of the last finished step."""

import signal

import jax
import pytest

from tests.marks import slow_unless
from tests.problems import Busy, Counting, config, regression, squared_error
from tests.test_api import Recorder, assert_same_bits
from trainer import Callback, Trainer, latest_checkpoint
from trainer.callbacks.base import EVENTS

# The first call of each hook, and the second where there is one; and the steps that are finished then.
CALLS = [
    ("on_train_begin", 1, 0),
    ("on_epoch_begin", 1, 0),
    ("on_epoch_begin", 2, 2),
    ("on_batch_begin", 1, 0),
    ("on_batch_begin", 2, 1),
    ("on_batch_end", 1, 1),
    ("on_batch_end", 2, 2),
    ("on_call_end", 1, 1),
    ("on_call_end", 2, 2),
    ("on_compile_begin", 1, 0),
    ("on_compile_end", 1, 1),
    ("on_validation_begin", 1, 1),
    ("on_validation_begin", 2, 2),
    ("on_validation_end", 1, 1),
    ("on_validation_end", 2, 2),
    ("on_epoch_end", 1, 2),
    ("on_epoch_end", 2, 4),
    ("on_train_end", 1, 4),
]


class Keeping(Callback):
    """Keeps a copy of the state after every step."""

    def __init__(self):
        self.states = {}

    def on_train_begin(self, trainer):
        self.states[0] = trainer.state.copy()

    def on_batch_end(self, trainer, step, logs):
        self.states[step] = trainer.state.copy()


def failing(base, event, nth, error):
    """Makes a callback or an extension that raises an error when an event comes for the n-th time."""
    calls = []

    def fail(self, *_):
        calls.append(event)
        if len(calls) == nth:
            raise error

    return type("Failing", (base,), {event: fail})()


def build(directory, callbacks=(), extension=None):
    return Trainer(
        Busy(),
        config(),
        loss_fn=squared_error,
        workdir=directory,
        rng=jax.random.key(1),
        callbacks=list(callbacks),
        extensions={"size": extension or Counting()},
        save_interval=1,
    )


def run(trainer, **options):
    return trainer.train(regression(16), 2, 8, regression(8, seed=1), val_interval=1, **options)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    keeping = Keeping()
    trainer = build(tmp_path_factory.mktemp("whole"), [keeping])
    return run(trainer), keeping.states


def test_every_hook_is_in_the_table():
    assert {event for event, _, _ in CALLS} == set(EVENTS)


@pytest.mark.parametrize(
    ("base", "event", "nth", "step"),
    slow_unless(
        lambda base, event, nth, step: base is Callback or nth == 1,
        [(base, *call) for base in (Callback, Counting) for call in CALLS],
    ),
)
@pytest.mark.few(3)
# The extension that raises is of another class than the one that resumes.
@pytest.mark.filterwarnings("ignore:.*`extensions.size` differs:UserWarning")
def test_one_that_raises_ends_the_run_at_the_last_finished_step(event, nth, step, base, tmp_path, undisturbed):
    returned, states = undisturbed
    error, recorder = ZeroDivisionError("the user's own"), Recorder()
    broken = failing(base, event, nth, error)
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    trainer = build(tmp_path, [broken, recorder]) if base is Callback else build(tmp_path, [recorder], extension=broken)
    with pytest.raises(ZeroDivisionError) as caught:
        run(trainer)
    assert caught.value is error
    assert not getattr(error, "__notes__", [])
    assert recorder.names[-1] == "on_train_end"
    assert recorder.names.count("on_train_end") == 1
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers
    assert trainer.step == step
    assert_same_bits(trainer.state, states[step])

    # What is on the disk is a step of the same run as well, and to go on from it is to have it whole.
    assert not list(tmp_path.glob(".*"))
    saved = latest_checkpoint(tmp_path)
    assert (0 if saved is None else int(saved.stem.split("_")[1])) in (step - 1, step)
    resumed = build(tmp_path)
    assert run(resumed, resume=True) == returned
    assert_same_bits(resumed.state, states[4])
