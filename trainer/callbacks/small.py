"""Small callbacks: functions as a callback, the learning rate, a time limit, an end at NaN, generated samples."""

import datetime
import math
import os
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import jax
import numpy as np

from trainer.callbacks.base import EVENTS, Callback
from trainer.core.checks import check_choice, check_count, did_you_mean
from trainer.distributed.agreement import gathered
from trainer.errors import ArgumentError, ArgumentTypeError, NonFiniteError


class LambdaCallback(Callback):
    """Functions as a callback, each under the name of its event, as in Keras and Lightning::

        LambdaCallback(on_epoch_end=lambda trainer, epoch, logs: print(epoch, logs["loss"]))

    Args:
        functions: For each event name, see `trainer.callbacks`, a function with the arguments of that event.

    Raises:
        ArgumentError: There is no such event.
        ArgumentTypeError: A value is not callable.
    """

    def __init__(self, **functions: Callable[..., Any]) -> None:
        for name, function in functions.items():
            if name not in EVENTS:
                raise ArgumentError(f"`{name}` is no event of a run; {did_you_mean(name, EVENTS)}")
            if not callable(function):
                raise ArgumentTypeError(f"`{name}` is of type {type(function).__name__}; it must be callable.")
            setattr(self, name, function)


class LearningRateMonitor(Callback):
    """Reports the learning rate as a metric of every step: in the history, to loggers, on the display.

    It equals ``report=["learning_rate"]`` of the trainer. The rate is computed in the compiled step, so it costs no
    extra call; with a schedule it is the rate of that step, with `ReduceLROnPlateau` the rate after scaling. Your own
    optimizer must keep its rate in its state, as `optax.inject_hyperparams` does; any other is refused with advice.

    Attributes:
        reports: What a trainer with this callback reports in addition to its own ``report``.
    """

    reports = ("learning_rate",)


class Timer(Callback):
    """Ends a run cleanly, with a save, after a time limit, before the job's own limit kills it.

    Args:
        duration: Seconds, a `datetime.timedelta`, or a string ``"DD:HH:MM:SS"``. None only measures.
        interval: "epoch" ends the run after the epoch in which the time is up. "step" ends it at the next step as
            SIGTERM does: the state is saved, and `TrainingInterrupted` is raised.

    Attributes:
        elapsed: The seconds of training so far, including those before an interruption: checkpoints hold them.
        reason: A text that says why it ended the run, or None.

    Raises:
        ArgumentError: ``duration`` is not a time, or ``interval`` is neither; at the start of a run, if it is "step"
            and the trainer does not handle signals.
    """

    state_key = "Timer"  # whatever its duration: a run may be resumed for longer

    def __init__(
        self,
        duration: float | str | datetime.timedelta | None = None,
        interval: Literal["epoch", "step"] = "epoch",
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.duration = None if duration is None else _seconds(duration)
        self._is_by_step = check_choice(interval, ("epoch", "step"), "interval") == "step"
        self._clock = clock
        self._before, self._started, self._is_running = 0.0, 0.0, False
        self.reason: str | None = None

    @property
    def elapsed(self) -> float:
        return self._before + (self._clock() - self._started if self._is_running else 0.0)

    def on_train_begin(self, trainer: Any) -> None:
        if self._is_by_step and not trainer.setup.handle_signals:
            raise ArgumentError("`interval` = 'step' ends a run as SIGTERM does; leave `handle_signals` on.")
        if getattr(trainer, "is_new_run", True):
            self._before = 0.0
        self.should_stop, self.reason = False, None
        self._started, self._is_running = self._clock(), True

    def on_call_end(self, trainer: Any, step: int, logs: Mapping[str, Any]) -> None:
        del trainer, step, logs
        if self._is_by_step and self.reason is None and self._is_up():
            self.reason = self._said()
            os.kill(os.getpid(), signal.SIGTERM)

    def on_epoch_end(self, trainer: Any, epoch: int, logs: dict[str, float]) -> None:
        del trainer, epoch, logs
        if self._is_by_step or self.duration is None:
            return
        # All processes end after the same epoch.
        is_up = self._is_up() if jax.process_count() == 1 else any(gathered(self._is_up()))
        if is_up:
            self.should_stop, self.reason = True, self._said()

    def on_train_end(self, trainer: Any) -> None:
        del trainer
        self._before, self._is_running = self.elapsed, False

    def state_dict(self) -> dict[str, float]:
        return {"elapsed": self.elapsed}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        self._before = float(state["elapsed"])

    def _is_up(self) -> bool:
        return self.duration is not None and self.elapsed >= self.duration

    def _said(self) -> str:
        return f"the time of {datetime.timedelta(seconds=round(self.duration or 0))} is up"


class TerminateOnNonFinite(Callback):
    """Ends a run whose loss is NaN or infinite, like ``TerminateOnNaN`` of Keras.

    It reads the loss of the previous call, which has finished by then, so it hardly waits. Training continues to the
    end of the epoch; ``nonfinite="raise"`` of the trainer ends at the step itself, and keeps the state before it.

    Args:
        raise_error: Whether to raise `NonFiniteError` at once instead of ending after the epoch.

    Attributes:
        reason: A text with the value and its step, or None.
    """

    def __init__(self, raise_error: bool = False) -> None:
        self._raises = raise_error
        self._previous: tuple[int, Any] | None = None
        self.reason: str | None = None

    def on_train_begin(self, trainer: Any) -> None:
        del trainer
        self.should_stop, self.reason, self._previous = False, None, None

    def on_call_end(self, trainer: Any, step: int, logs: Mapping[str, Any]) -> None:
        previous, self._previous = self._previous, (step, logs.get("loss"))
        self._check(trainer, previous)

    def on_epoch_end(self, trainer: Any, epoch: int, logs: dict[str, float]) -> None:
        del epoch, logs
        previous, self._previous = self._previous, None
        self._check(trainer, previous)

    def _check(self, trainer: Any, measured: tuple[int, Any] | None) -> None:
        if self.should_stop or measured is None or measured[1] is None:
            return
        step, loss = measured[0], float(measured[1])
        if math.isfinite(loss):
            return
        self.should_stop, self.reason = True, f"the loss is {loss} at step {step}"
        if self._raises:
            raise NonFiniteError(f"{self.reason}.", step, ("loss",), trainer.state)


class GenerateSamples(Callback):
    """Generates samples at the end of epochs and sends them to the trainer's loggers, as images or texts.

    Args:
        generate: ``generate(model, epoch)`` with the model in evaluation mode; returns an image or a batch of images,
            float in [0, 1] or uint8, ``(height, width)`` or with 1, 3 or 4 channels last, or one text or several.
        every: Run after every this many epochs; the first time is after epoch ``every``.
        name: The name under which they are logged.

    Raises:
        ArgumentTypeError: ``generate`` is not callable, or returns something else.
    """

    def __init__(self, generate: Callable[[Any, int], Any], every: int = 1, name: str = "samples") -> None:
        if not callable(generate):
            raise ArgumentTypeError(f"`generate` is of type {type(generate).__name__}; it must be callable.")
        self._generate, self._every, self._name = generate, check_count(every, "every"), name

    def on_epoch_end(self, trainer: Any, epoch: int, logs: dict[str, float]) -> None:
        del logs
        if (epoch + 1) % self._every:
            return
        made = self._generate(trainer.model, epoch)
        texts = [made] if isinstance(made, str) else made
        if isinstance(texts, list | tuple) and texts and all(isinstance(text, str) for text in texts):
            trainer.loggers.log_text(self._name, "\n\n".join(texts))
            return
        for index, image in enumerate(_images(made)):
            trainer.loggers.log_image(self._name if index == 0 else f"{self._name}_{index}", image)


def _images(made: Any) -> Iterator[Any]:
    """Yields the images in an array, or in a list of arrays."""
    if isinstance(made, list | tuple):
        for one in made:
            yield from _images(one)
        return
    array = np.asarray(made)
    if array.ndim not in (2, 3, 4) or array.dtype.kind not in "fuib":
        raise ArgumentTypeError(
            f"`generate` returned an array of shape {array.shape} and dtype {array.dtype}; it must return texts, or "
            f"images of shape (height, width) or (height, width, channels), alone or stacked."
        )
    is_one = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in (1, 3, 4))
    yield from [array] if is_one else array


def _seconds(duration: Any) -> float:
    """Returns a duration in seconds."""
    if isinstance(duration, datetime.timedelta):
        duration = duration.total_seconds()
    if isinstance(duration, str):
        parts = re.fullmatch(r"(?:(\d+):)?(\d+):(\d{1,2}):(\d{1,2})", duration)
        if parts is None:
            raise ArgumentError(f"`duration` is {duration!r:.60}; a text must be 'DD:HH:MM:SS' or 'HH:MM:SS'.")
        days, hours, minutes, seconds = (int(part or 0) for part in parts.groups())
        return ((days * 24 + hours) * 60 + minutes) * 60.0 + seconds
    if isinstance(duration, bool) or not isinstance(duration, int | float) or not 0 <= duration < math.inf:
        raise ArgumentError(f"`duration` is {duration!r:.60}; it must be seconds, a timedelta, or 'DD:HH:MM:SS'.")
    return float(duration)
