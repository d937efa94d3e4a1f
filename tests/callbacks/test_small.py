"""Functions as a callback, an end by time or by NaN, samples."""

import datetime
import time

import jax.numpy as jnp
import numpy as np
import pytest

from tests.problems import Linear, config, regression, squared_error
from trainer import (
    ArgumentError,
    ArgumentTypeError,
    GenerateSamples,
    LambdaCallback,
    NonFiniteError,
    TerminateOnNonFinite,
    Timer,
    Trainer,
    TrainingInterrupted,
)
from trainer.callbacks import EVENTS
from trainer.callbacks.base import handles


def made(*callbacks, **options):
    return Trainer(Linear(4), config(), loss_fn=options.pop("loss_fn", squared_error), callbacks=callbacks, **options)


class TestLambdaCallback:
    def test_functions_hear_their_events_and_no_others(self):
        heard = []
        callback = LambdaCallback(
            on_epoch_end=lambda trainer, epoch, logs: heard.append((epoch, sorted(logs))),
            on_train_end=lambda trainer: heard.append(trainer.step),
        )
        made(callback).train(regression(16), 2, 8)
        assert heard == [(0, ["loss", "mean_error"]), (1, ["loss", "mean_error"]), 4]
        assert [event for event in EVENTS if handles(callback, event)] == ["on_train_end", "on_epoch_end"]

    def test_what_is_no_event_or_no_function(self):
        with pytest.raises(ArgumentError, match="`on_epoch_ends` is no event of a run; did you mean 'on_epoch_end'"):
            LambdaCallback(on_epoch_ends=print)
        with pytest.raises(ArgumentTypeError, match="`on_epoch_end` is of type int"):
            LambdaCallback(on_epoch_end=3)


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


class TestTimer:
    def test_it_ends_the_run_after_the_epoch_and_says_why(self):
        clock = Clock()
        timer = Timer("00:00:30", clock=clock)
        tick = LambdaCallback(on_call_end=lambda trainer, step, logs: setattr(clock, "now", clock.now + 10))
        trainer = made(timer, tick, steps_per_call=1)
        trainer.train(regression(16), 9, 8)
        assert trainer.epoch == 2
        assert timer.elapsed == 40
        assert timer.reason == "the time of 0:00:30 is up"

    def test_by_step_it_saves_as_a_signal_does_and_the_run_resumes(self, tmp_path):
        clock = Clock()
        tick = LambdaCallback(on_call_end=lambda trainer, step, logs: setattr(clock, "now", clock.now + 10))
        trainer = made(Timer(30, "step", clock=clock), tick, steps_per_call=1, workdir=tmp_path)
        with pytest.raises(TrainingInterrupted) as caught:
            trainer.train(regression(64), 1, 8)
        assert trainer.step == 4  # the first at which 30 seconds have passed
        assert caught.value.path == tmp_path / "checkpoint_4.msgpack"
        later = Timer(None, clock=clock)
        resumed = made(later, workdir=tmp_path)
        resumed.train(regression(64), 1, 8, resume=True)
        assert resumed.step == 8
        assert later.elapsed >= 40

    def test_by_step_without_signals_it_is_refused(self):
        with pytest.raises(ArgumentError, match="`handle_signals`"):
            made(Timer(3, "step"), handle_signals=False).train(regression(16), 1, 8)

    def test_without_a_duration_it_only_measures(self):
        timer = Timer()
        start = time.monotonic()
        made(timer).train(regression(16), 1, 8)
        assert 0 < timer.elapsed <= time.monotonic() - start

    @pytest.mark.parametrize(
        ("given", "seconds"),
        [(5, 5), (0.5, 0.5), ("01:02:03", 3723), ("2:00:00:01", 172801), (datetime.timedelta(minutes=1), 60)],
    )
    def test_durations(self, given, seconds):
        assert Timer(given).duration == seconds

    @pytest.mark.parametrize("given", [-1, "1h", True, float("nan"), [3]])
    def test_what_is_no_duration(self, given):
        with pytest.raises(ArgumentError, match="`duration`"):
            Timer(given)

    def test_what_is_no_interval(self):
        with pytest.raises(ArgumentError, match="`interval` is 'batch'; it must be 'epoch' or 'step'"):
            Timer(3, "batch")


def bad_from_step(first):
    def loss_fn(model, batch, rng, step):
        loss, metrics = squared_error(model, batch, rng, step)
        return jnp.where(step >= first, jnp.nan, loss), metrics

    return loss_fn


class TestTerminateOnNonFinite:
    @pytest.mark.filterwarnings("ignore:the loss is nan")
    @pytest.mark.parametrize("steps_per_call", [1, "auto"])
    def test_it_ends_the_run_after_the_epoch(self, steps_per_call):
        callback = TerminateOnNonFinite()
        trainer = made(callback, loss_fn=bad_from_step(3), steps_per_call=steps_per_call)
        trainer.train(regression(16), 9, 8)
        assert trainer.epoch == 2
        assert callback.reason == "the loss is nan at step 4"

    @pytest.mark.filterwarnings("ignore:the loss is nan")
    def test_or_raises_at_once(self):
        trainer = made(TerminateOnNonFinite(raise_error=True), loss_fn=bad_from_step(1), steps_per_call=1)
        with pytest.raises(NonFiniteError, match="the loss is nan at step 2") as caught:
            trainer.train(regression(64), 1, 8)
        assert caught.value.step == 2
        assert trainer.step == 3  # the call after it was under way

    def test_a_finite_run_goes_on(self):
        trainer = made(TerminateOnNonFinite())
        trainer.train(regression(16), 2, 8)
        assert trainer.epoch == 2


class Kept:
    log_scalar = log_scalars = log_histogram = log_hyperparams = close = lambda *args, **more: None

    def __init__(self):
        self.kept = []

    def log_text(self, name, text, step=None):
        self.kept.append((name, text, step))

    def log_image(self, name, image, step=None):
        self.kept.append((name, np.shape(image), step))


class TestGenerateSamples:
    @pytest.mark.parametrize(
        ("samples", "kept"),
        [
            ("a text", ["a text"]),
            (["one", "two"], ["one\n\ntwo"]),
            (np.zeros((4, 4)), [(4, 4)]),
            (np.zeros((4, 4, 3)), [(4, 4, 3)]),
            (np.zeros((2, 8, 8)), [(8, 8), (8, 8)]),
            (jnp.zeros((2, 4, 4, 1)), [(4, 4, 1), (4, 4, 1)]),
            ([np.zeros((4, 4)), np.zeros((5, 5))], [(4, 4), (5, 5)]),
        ],
        ids=["text", "texts", "image", "colour", "grey batch", "batch", "list"],
    )
    def test_the_loggers_get_them_every_so_many_epochs(self, samples, kept):
        logger, seen = Kept(), []

        def generate(model, epoch):
            seen.append((type(model).__name__, epoch))
            return samples

        made(GenerateSamples(generate, every=2), logger=logger).train(regression(16), 3, 8)
        own = [entry for entry in logger.kept if entry[0].startswith("samples")]
        assert [entry[1] for entry in own] == kept
        assert {entry[2] for entry in own} == {4}
        assert seen == [("Linear", 1)]

    @pytest.mark.parametrize("samples", [3, np.zeros(4), None, np.array(["a"])], ids=repr)
    def test_what_is_no_sample(self, samples):
        with pytest.raises((ArgumentTypeError, TypeError), match="`generate` returned"):
            made(GenerateSamples(lambda model, epoch: samples)).train(regression(16), 1, 8)

    def test_what_cannot_be_called(self):
        with pytest.raises(ArgumentTypeError, match="`generate` is of type int"):
            GenerateSamples(3)
