"""`Progress`: what a terminal, a notebook and a file get of a run."""

import gc
import io
import logging
import os
import re
import signal
import subprocess
import sys
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.problems import Linear, config, regression, squared_error
from trainer import (
    ArgumentTypeError,
    Callback,
    CallbackList,
    EarlyStopping,
    LambdaCallback,
    ModelCheckpoint,
    Progress,
    ReduceLROnPlateau,
    Trainer,
)
from trainer.fit.live import Planned


class Terminal(io.StringIO):
    """A terminal that can be read as the screen that it would show."""

    encoding = "utf-8"

    def isatty(self):
        return True

    @property
    def screen(self):
        """The lines that stand on the screen at the end, by the control codes that are used here."""
        lines, row, column = [""], 0, 0
        for code, text in re.findall(r"(\x1b\[[?\d;]*[A-Za-z]|[\r\n])|([^\x1b\r\n]+)", self.getvalue()):
            if code == "\r":
                column = 0
            elif code == "\n":
                row, column = row + 1, 0
                lines += [""] * (row + 1 - len(lines))
            elif code.endswith("A"):
                row -= int(code[2:-1] or 1)
            elif code.endswith("K"):
                lines[row] = ""
            elif not code:
                line = lines[row].ljust(column)
                lines[row] = line[:column] + text + line[column + len(text) :]
                column += len(text)
            else:
                assert code.endswith(("m", "h", "l")), code
        return [line.rstrip() for line in lines if line.strip()]

    @property
    def draws(self):
        """Every state of the line that is drawn in place."""
        plain = re.sub(r"\x1b\[[\d;]*m", "", self.getvalue())
        return [text for text in re.split(r"[\r\n]|\x1b\[[?\d]*[A-Za-z]", plain) if text.startswith("epoch ")]


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


class Average:
    def __init__(self, **values):
        self._values = values

    def compute(self):
        return self._values


class Played:
    """Stands in for a trainer, and emits the events of a run to a display."""

    is_primary_process, is_new_run, should_stop, callbacks = True, True, False, ()

    def __init__(self, stream, epochs, batches, seconds=1.0, *, known=True):
        self.clock = Clock()
        self.progress = Progress(stream, clock=self.clock)
        self.epochs, self.batches, self.seconds = epochs, batches, seconds
        self.planned = Planned(0, epochs * batches if known else None, batches if known else None, 0, epochs)
        self.run = SimpleNamespace(average=Average(loss=0.5), batch=0)
        live = SimpleNamespace(failure="", meter=SimpleNamespace(waiting_for_data=0.25))
        events = SimpleNamespace(stop_reasons=list)
        self.setup = SimpleNamespace(
            live=live,
            events=events,
            checkpointer=SimpleNamespace(saved_path=lambda run: None),
            rate=lambda run: self.rates(self.step),
        )
        self.rates = lambda step: None
        self.step = self.epoch = 0

    def play(self, metrics=lambda step: {"step": step, "loss": float(step)}):
        self.progress.on_train_begin(self)
        for epoch in range(self.epochs):
            self.progress.on_epoch_begin(self, epoch)
            for _ in range(self.batches):
                self.clock.now += self.seconds
                self.step += 1
                self.progress.on_call_end(self, self.step, metrics(self.step))
            self.epoch += 1
        self.progress.on_train_end(self)
        return self


def build(tmp_path=None, **options):
    settings = options.pop("settings", config())
    return Trainer(Linear(4), settings, loss_fn=squared_error, workdir=tmp_path, **options)


@pytest.fixture(autouse=True)
def eighty_columns(monkeypatch):
    for name in ("NO_COLOR", "FORCE_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "80")


class TestFile:
    def test_a_file_gets_a_line_per_epoch(self):
        stream = io.StringIO()
        Played(stream, epochs=2, batches=3).play()
        assert stream.getvalue().splitlines() == [
            "epoch 1/2  step 3/6  loss 0.5  3.0 s",
            "epoch 2/2  step 6/6  loss 0.5  3.0 s",
            "finished after 2 epochs, step 6, 6.0 s",
        ]

    def test_a_long_epoch_has_a_line_every_half_minute(self):
        stream = io.StringIO()
        Played(stream, epochs=1, batches=100).play()
        lines = stream.getvalue().splitlines()
        assert lines[0] == ("epoch 1/1  step 30/100  loss 29  1 steps/s  eta 1:10  data wait 25%")
        assert [line.split("  ")[1] for line in lines[:-1]] == [f"step {step}/100" for step in (30, 60, 90, 100)]

    def test_of_a_thousand_short_epochs_some_have_a_line_and_the_last_does(self):
        stream = io.StringIO()
        Played(stream, epochs=1000, batches=1, seconds=0.005).play()
        numbers = [int(line.split("/")[0].split()[1]) for line in stream.getvalue().splitlines()[:-1]]
        assert numbers[:100] == list(range(1, 101))
        assert numbers[-1] == 1000
        assert len(numbers) < 130
        assert (np.diff(numbers[100:-1]) >= 40).all()

    def test_the_length_may_be_unknown(self):
        stream = io.StringIO()
        Played(stream, epochs=2, batches=3, known=False).play()
        assert stream.getvalue().startswith("epoch 1/2  step 3  loss 0.5  3.0 s\n")

    def test_standard_error_is_the_default_and_has_no_control_character(self, capsys):
        build().train(regression(32), 5, 8, regression(8))
        out, err = capsys.readouterr()
        assert out == ""
        lines = err.splitlines()
        assert lines[0] == "compiling train_steps, once ..."
        assert re.fullmatch(r"compiled train_steps in \d+\.\d s", lines[1])
        assert re.fullmatch(r"compiled eval_step in \d+\.\d s", lines[2])
        rows = [line for line in lines if line.startswith("epoch")]
        pattern = r"epoch {0}/5  step {1}/20  loss \S+  mean_error \S+  val_loss \S+  val_mean_error \S+  \d+\.\d s"
        assert all(re.fullmatch(pattern.format(i, 4 * i), row) for i, row in enumerate(rows, 1))
        assert len(rows) == 5
        assert re.fullmatch(r"finished after 5 epochs, step 20, \d+\.\d s", lines[8])
        assert re.fullmatch(r"best val_loss \S+ at step 20", lines[9])
        assert len(lines) == 10
        assert all(line.isprintable() for line in lines)

    @pytest.mark.parametrize("variable", ["FORCE_COLOR", "TTY_COMPATIBLE", "CLICOLOR_FORCE"])
    def test_no_variable_makes_a_terminal_of_a_file(self, variable, monkeypatch, capsys):
        monkeypatch.setenv(variable, "1")
        build().train(regression(16), 1, 8)
        assert "\x1b" not in capsys.readouterr().err


class TestTerminal:
    def test_rows_stay_above_a_line_that_vanishes_at_the_end(self):
        stream = Terminal()
        Played(stream, epochs=2, batches=3).play()
        assert stream.screen == [
            "epoch      loss      time",
            "  1/2       0.5     3.0 s",
            "  2/2       0.5     3.0 s",
            "finished after 2 epochs, step 6, 6.0 s",
        ]

    def test_the_line_says_where_the_run_is_from_the_metrics_of_the_call_before(self):
        stream = Terminal()
        Played(stream, epochs=2, batches=3).play()
        assert [re.sub(r"[━─]+", "BAR", line) for line in stream.draws if "step" in line][1:3] == [
            "epoch 1/2  BAR  step 2/6  loss 1  1 steps/s  eta 4.0 s  data wait 25%",
            "epoch 1/2  BAR  step 3/6  loss 2  1 steps/s  eta 3.0 s  data wait 25%",
        ]

    def test_the_metrics_of_the_call_in_flight_are_not_read(self):
        class InFlight:
            def __init__(self, step):
                self.step = step

            def __float__(self):
                assert played.step > self.step
                return 1.0

        played = Played(Terminal(), epochs=2, batches=5)
        played.play(lambda step: {"loss": InFlight(step)})

    def test_it_is_drawn_at_most_five_times_a_second(self):
        stream = Terminal()
        Played(stream, epochs=1, batches=1000, seconds=0.01).play()
        drawn = [line for line in stream.draws if "step" in line]
        assert 40 <= len(set(drawn)) <= 50

    def test_a_resumed_run_that_owes_a_validation_shows_that_it_validates(self):
        stream = Terminal()
        played = Played(stream, epochs=1, batches=3)
        played.setup.live.meter = None
        played.progress.on_train_begin(played)
        played.progress.on_epoch_begin(played, 0)
        played.progress.on_validation_begin(played)
        played.progress.on_validation_end(played, {"loss": 0.25})
        assert "validating ...  epoch 1/1" in re.sub(r"\x1b\[[\d;]*m", "", stream.getvalue())
        played.progress.on_train_end(played)

    def test_what_is_reported_of_the_learning_rate_is_shown(self):
        stream = Terminal()
        Played(stream, epochs=1, batches=3).play(lambda step: {"loss": 1.0, "learning_rate": 0.001})
        assert any("  lr 0.001  " in line for line in stream.draws)

    def test_the_learning_rate_is_shown_when_it_is_computed_and_nobody_waits_for_it(self):
        class Computed:
            def __init__(self, step):
                self.step = step

            def is_ready(self):
                return played.step > self.step

            def __float__(self):
                assert self.is_ready()
                return self.step / 1000

        stream = Terminal()
        played = Played(stream, epochs=1, batches=6)
        played.rates = Computed
        played.play()
        shown = [line.split("  lr ")[1].split()[0] if "  lr " in line else None for line in stream.draws]
        # Asked for at the end of each call, once the run is a second old: at steps 1, 2, 3, ...
        assert shown[:6] == [None, "0.001", "0.002", "0.003", "0.004", "0.005"]

    def test_a_rate_that_is_late_is_the_one_before(self):
        late = SimpleNamespace(is_ready=lambda: False)
        stream = Terminal()
        played = Played(stream, epochs=1, batches=5)
        played.rates = lambda step: 0.25 if step == 1 else late
        played.play()
        assert all("  lr 0.25  " in line for line in stream.draws[1:5])

    def test_the_learning_rate_is_asked_for_twice_a_second(self):
        asked = []
        played = Played(Terminal(), epochs=1, batches=1000, seconds=0.01)
        played.rates = asked.append
        played.play()
        assert 15 <= len(asked) <= 19
        assert asked[0] == 100  # after a second: a shorter run pays nothing for it

    def test_a_file_asks_only_before_a_line(self):
        asked = []
        played = Played(io.StringIO(), epochs=1, batches=100)
        played.rates = lambda step: asked.append(step) or 0.5
        played.play()
        assert asked == [29, 59, 89]
        lines = played.progress._stream.getvalue().splitlines()
        assert all("  lr 0.5  " in line for line in lines if line.startswith("epoch 1/1  step") and "steps/s" in line)

    @pytest.mark.parametrize("width", [20, 40, 80, 200])
    def test_nothing_is_wider_than_the_terminal(self, width, monkeypatch):
        monkeypatch.setenv("COLUMNS", str(width))
        stream = Terminal()
        played = Played(stream, epochs=2, batches=3)
        played.run.average = Average(loss=0.5, **{f"a_long_name_of_a_metric_{i}": 0.123456 for i in range(9)})
        played.play(lambda step: {"loss": 1.0, **{f"a_long_name_of_a_metric_{i}": 0.123456 for i in range(9)}})
        rows = stream.screen[:-1]
        assert all(len(line) < width for line in [*rows, *stream.draws])
        assert rows[0].split()[:2] == ["epoch", "loss"]
        assert len(rows) == 3

    def test_the_heading_comes_again_where_there_is_more_to_show(self):
        stream = Terminal()
        played = Played(stream, epochs=3, batches=1)
        averages = iter([Average(loss=1.0), Average(loss=1.0), Average(loss=1.0, accuracy=0.5)])
        play = played.progress.on_call_end

        def on_call_end(trainer, step, logs):
            played.run.average = next(averages)
            play(trainer, step, logs)

        played.progress.on_call_end = on_call_end
        played.play()
        assert [line.split() for line in stream.screen[:-1]] == [
            ["epoch", "loss", "time"],
            ["1/3", "1", "1.0", "s"],
            ["2/3", "1", "1.0", "s"],
            ["epoch", "loss", "accuracy", "time"],
            ["3/3", "1", "0.5", "1.0", "s"],
        ]

    def test_it_says_that_it_compiles_and_how_long_that_took(self):
        stream = Terminal()
        build(callbacks=[Progress(stream)]).train(regression(16), 1, 8, regression(8))
        assert "compiling train_steps, once ..." in stream.getvalue()
        assert "compiling eval_step, once ..." in stream.getvalue()
        for name, line in zip(("train_steps", "eval_step"), stream.screen, strict=False):
            assert re.fullmatch(rf"compiled {name} in \d+\.\d s", line)

    def test_the_line_goes_back_to_the_validation_that_compiled(self):
        stream = Terminal()
        build(callbacks=[Progress(stream)]).train(regression(16), 1, 8, regression(8))
        shown = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", stream.getvalue())
        assert shown.rindex("validating ...") > shown.index("compiled eval_step")

    def test_what_a_validation_compiles_counts_neither_as_validation_nor_as_training(self):
        """Of 10 steps of a second each, the fifth is followed by a validation of 3 s of which 2 s are compilation."""
        stream = Terminal()
        played = Played(stream, epochs=1, batches=10)
        follow = played.progress.on_call_end

        def on_call_end(trainer, step, logs):
            follow(trainer, step, logs)
            if step == 5:
                played.progress.on_validation_begin(played)
                played.progress.on_compile_begin(played, "eval_step")
                played.clock.now += 2
                played.progress.on_compile_end(played, "eval_step", 2.0)
                played.clock.now += 1
                played.progress.on_validation_end(played, {"loss": 0.25})

        played.progress.on_call_end = on_call_end
        played.play()
        assert (played.progress._paused, played.progress._compiled) == (1.0, 2.0)
        (line,) = [line for line in stream.draws if "step 6/10" in line]
        # Four more steps at a second, and the sixth of that for validations to come.
        assert "  1 steps/s  eta 4.7 s" in line

    def test_a_dumb_terminal_gets_what_a_file_gets(self, monkeypatch):
        monkeypatch.setenv("TERM", "dumb")
        stream = Terminal()
        Played(stream, epochs=2, batches=3).play()
        assert stream.getvalue().startswith("epoch 1/2  step 3/6  loss 0.5  3.0 s\n")

    def test_no_color_means_none(self, monkeypatch):
        monkeypatch.setenv("NO_COLOR", "1")
        stream = Terminal()
        Played(stream, epochs=2, batches=3).play()
        assert not re.search(r"\x1b\[[\d;]*3\d", stream.getvalue())


class TestNames:
    @pytest.mark.parametrize("kind", [io.StringIO, Terminal])
    @pytest.mark.parametrize(
        ("name", "shown"),
        [("[red]x[/red]", "[red]x[/red]"), ("名前", "名前"), (":smile:", ":smile:"), ("a\x1b[31mb", "a\\x1b[31mb")],
    )
    def test_any_letters_are_shown_as_they_are_and_control_characters_escaped(self, kind, name, shown):
        stream = kind()
        played = Played(stream, epochs=1, batches=3)
        played.run.average = Average(**{"loss": 1.0, name: 2.0})
        played.play(lambda step: {name: 1.0})
        assert shown in stream.getvalue()
        assert "\x1b[31m" not in stream.getvalue()

    @pytest.mark.parametrize("is_terminal", [False, True])
    def test_letters_that_the_stream_lacks_are_escaped(self, is_terminal):
        written = io.BytesIO()
        stream = io.TextIOWrapper(written, encoding="ascii")
        stream.isatty = lambda: is_terminal
        played = Played(stream, epochs=1, batches=3)
        played.run.average = Average(loss=1.0, é=2.0)
        played.play(lambda step: {"é": 1.0})
        assert b"\\xe9" in written.getvalue()
        if is_terminal:
            assert b"====" in written.getvalue()

    def test_what_is_no_number_is_left_out(self):
        stream = io.StringIO()
        played = Played(stream, epochs=1, batches=1)
        played.run.average = Average(loss=1.0, per_class=[1.0, 2.0], nothing=None)
        played.play()
        assert stream.getvalue().startswith("epoch 1/1  step 1/1  loss 1  1.0 s\n")


class Speaks(Callback):
    """Prints, warns and logs at a step, while the line is drawn."""

    def __init__(self, logger=None):
        self.logger = logger

    def on_call_end(self, trainer, step, logs):
        print("printed", step)
        print("warned", step, file=sys.stderr)
        if self.logger is not None:
            self.logger.warning("logged %s", step)


class TestOtherOutput:
    def test_what_others_write_stands_above_the_line_and_in_order(self, monkeypatch):
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "stdout", stream)
        handler = logging.StreamHandler()  # keeps the stream of now, as that of basicConfig
        logger = logging.getLogger("tests.progress")
        logger.addHandler(handler)
        try:
            trainer = build(callbacks=[Speaks(logger)], steps_per_call=1)
            trainer.train(regression(16), 1, 8)
        finally:
            logger.removeHandler(handler)
        told = [line for line in stream.screen if line.startswith(("printed", "warned", "logged"))]
        assert told == [f"{what} {step}" for step in (1, 2) for what in ("printed", "warned", "logged")]
        assert handler.stream is stream
        assert sys.stderr is stream
        assert sys.stdout is stream

    def test_what_goes_to_a_file_stays_there(self, monkeypatch):
        terminal, file = Terminal(), io.StringIO()
        monkeypatch.setattr(sys, "stderr", terminal)
        monkeypatch.setattr(sys, "stdout", file)
        build(callbacks=[Speaks()], steps_per_call=1).train(regression(16), 1, 8)
        assert file.getvalue() == "printed 1\nprinted 2\n"
        assert "printed" not in terminal.getvalue()

    def test_a_run_within_a_run_writes_lines_above_the_line_of_the_other(self, monkeypatch):
        class Trains(Callback):
            def on_epoch_end(self, trainer, epoch, logs):
                build().train(regression(16), 1, 8)

        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "stdout", stream)
        build(callbacks=[Trains()]).train(regression(16), 1, 8)
        assert sum(line.startswith("finished after 1 epoch, step 2") for line in stream.screen) == 2


class TestStreamsThatFail:
    def test_without_standard_error_there_is_no_display(self, monkeypatch):
        monkeypatch.setattr(sys, "stderr", None)
        assert build().train(regression(16), 1, 8)["loss"] > 0

    @pytest.mark.parametrize("kind", [io.StringIO, Terminal])
    def test_a_closed_stream_ends_the_display_and_nothing_else(self, kind):
        stream = kind()

        class Closes(Callback):
            def on_epoch_end(self, trainer, epoch, logs):
                stream.close()

        trainer = build(callbacks=[Closes(), Progress(stream)])
        trainer.train(regression(16), 3, 8)
        assert trainer.step == 6
        trainer.train(regression(16), 3, 8)
        assert trainer.step == 12

    @pytest.mark.parametrize("error", [BrokenPipeError, OSError, ValueError])
    @pytest.mark.parametrize("kind", [io.StringIO, Terminal])
    def test_nor_does_one_that_cannot_be_written(self, kind, error, monkeypatch):
        class Broken(kind):
            def write(self, text):
                raise error("no space left")

        before = sys.stdout
        trainer = build(callbacks=[Progress(Broken())])
        trainer.train(regression(16), 2, 8)
        assert trainer.step == 4
        assert sys.stdout is before


class Fails(Callback):
    def __init__(self, error, step):
        self.error, self.step = error, step

    def on_call_end(self, trainer, step, logs):
        if step == self.step:
            raise self.error


class TestEnd:
    def test_an_early_stop_says_why(self, capsys):
        stopping = EarlyStopping("val_loss", patience=1, stopping_threshold=1e9)
        build(callbacks=[stopping]).train(regression(32), 5, 8, regression(8))
        line = capsys.readouterr().err.splitlines()[-2]
        assert line.startswith("stopped after 1 epoch, step 4, ")
        assert line.endswith(stopping.reason)

    def test_it_says_what_was_best_and_where_the_checkpoint_is(self, tmp_path, capsys):
        trainer = build(tmp_path, settings=config(optimizer={"learning_rate": 3.0}))
        trainer.train(regression(32), 5, 8, regression(8))
        steps, losses = trainer.history.series("val_loss")
        best = int(np.argmin(losses))
        assert capsys.readouterr().err.splitlines()[-3:] == [
            f"best val_loss {losses[best]:.4g} at step {steps[best]}",
            f"checkpoint {tmp_path / 'checkpoint_20.msgpack'}",
            "restore it with trainer.load_checkpoint",
        ]

    def test_the_metric_that_a_callback_watches_is_that_of_which_the_best_is_told(self, tmp_path, capsys):
        best = ModelCheckpoint(tmp_path / "best", monitor="val_mean_error", mode="max")
        trainer = build(callbacks=[best])
        trainer.train(regression(32), 3, 8, regression(8))
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("best")]
        assert line.startswith("best val_mean_error ")
        assert line.endswith(f", kept in {best.best_model_path}")

    @pytest.mark.parametrize(("monitor", "mode"), [("loss", "max"), ("mean_error", "min")])
    def test_the_best_of_a_metric_of_training_is_told_and_where_it_is_kept(self, monitor, mode, tmp_path, capsys):
        best, logged = ModelCheckpoint(tmp_path / "best", monitor=monitor, mode=mode), []
        # At this rate the loss rises and falls.
        trainer = build(
            settings=config(optimizer={"learning_rate": 3.0}),
            callbacks=[best, LambdaCallback(on_epoch_end=lambda trainer, epoch, logs: logged.append(logs[monitor]))],
        )
        trainer.train(regression(32), 5, 8)
        at = int(np.argmax(logged) if mode == "max" else np.argmin(logged))
        assert at < 4
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("best")]
        kept = tmp_path / "best" / str(4 * (at + 1))
        assert line == f"best {monitor} {logged[at]:.4g} at step {4 * (at + 1)}, kept in {kept}"

    def test_a_value_that_another_callback_adds_to_the_logs_counts(self, capsys):
        class Adds(Callback):
            def on_epoch_end(self, trainer, epoch, logs):
                logs["accuracy"] = (0.25, 0.75, 0.5)[epoch]

        build(callbacks=[Adds(), EarlyStopping("accuracy", "max")]).train(regression(32), 3, 8)
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("best")]
        assert line == "best accuracy 0.75 at step 8"

    def test_each_monitored_metric_has_a_line_and_only_that_of_the_checkpoints_a_path(self, tmp_path, capsys):
        kept = ModelCheckpoint(tmp_path / "best", monitor="val_mean_error", mode="max")
        callbacks = [EarlyStopping("val_loss"), ReduceLROnPlateau("loss"), EarlyStopping("val_loss"), kept]
        build(callbacks=callbacks).train(regression(32), 3, 8, regression(8))
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("best")]
        assert [line.split()[1] for line in lines] == ["val_loss", "loss", "val_mean_error"]
        assert [line.partition(", kept in ")[2] for line in lines] == ["", "", str(kept.best_model_path)]

    def test_beside_a_metric_of_training_the_validation_loss_is_told(self, capsys):
        build(callbacks=[EarlyStopping("loss")]).train(regression(32), 3, 8, regression(8))
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("best")]
        assert [line.split()[1] for line in lines] == ["loss", "val_loss"]

    def test_without_a_monitor_no_loss_of_training_is_called_the_best(self, capsys):
        build().train(regression(32), 3, 8)
        assert "best" not in capsys.readouterr().err

    @pytest.mark.parametrize("keeps", [False, True])
    def test_a_resumed_run_knows_the_best_epoch_before(self, keeps, tmp_path, capsys):
        def make(*callbacks):
            monitoring = ModelCheckpoint(tmp_path / "best", "loss") if keeps else EarlyStopping("loss")
            return build(tmp_path / "run", callbacks=[*callbacks, monitoring], save_interval=6)

        def adds(trainer, epoch, logs):
            logs["loss"] = (0.25, 0.5, 0.75, 1.0)[epoch]

        adding = LambdaCallback(on_epoch_end=adds)
        with pytest.raises(KeyboardInterrupt):
            make(adding, Fails(KeyboardInterrupt(), 12)).train(regression(32), 4, 8)
        capsys.readouterr()
        # The best epoch is the first, and the run goes on in the second.
        make(adding).train(regression(32), 4, 8, resume=True)
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == "resumed at step 6, after 1 epoch"
        (line,) = [line for line in lines if line.startswith("best")]
        assert line == "best loss 0.25 at step 4" + (f", kept in {tmp_path / 'best' / '4'}" if keeps else "")

    @pytest.mark.parametrize("is_first", [False, True])
    @pytest.mark.parametrize("which", ["first", "second"])
    def test_a_resumed_run_is_told_its_own_best_though_another_did_better_or_renamed_it(
        self, which, is_first, tmp_path, capsys
    ):
        def make(losses, *callbacks):
            adding = LambdaCallback(on_epoch_end=lambda trainer, epoch, logs: logs.update(loss=losses[epoch]))
            others = [adding, *callbacks, ModelCheckpoint(tmp_path / "best", "loss")]
            return build(tmp_path / "run", callbacks=[Progress(), *others] if is_first else others, save_interval=6)

        own = {"first": (0.3, 0.1, 0.2, 0.4), "second": (0.7, 0.9, 0.8, 1.0)}
        first = make(own["first"])
        first.train(regression(32), 3, 8)
        second = make(own["second"], Fails(KeyboardInterrupt(), 12))
        with pytest.warns(UserWarning, match="later than this run's step 0"), pytest.raises(KeyboardInterrupt):
            second.train(regression(32), 4, 8)
        renamed = tmp_path / "best" / f"8.{first.run.id}"
        assert renamed.exists()
        capsys.readouterr()
        resumed = make(own[which])
        with warnings.catch_warnings(action="ignore"):
            resumed.train(
                regression(32), 4, 8, resume=True if which == "second" else tmp_path / "run" / "checkpoint_12.msgpack"
            )
        assert resumed.run.id == {"first": first, "second": second}[which].run.id
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("best")]
        told = f"0.1 at step 8, kept in {renamed}"
        assert line == f"best loss {told if which == 'first' else f'0.7 at step 4, kept in {tmp_path}/best/4'}"

    @pytest.mark.parametrize(
        ("error", "why"), [(KeyboardInterrupt(), "interrupted"), (ZeroDivisionError(), "failed (ZeroDivisionError)")]
    )
    def test_what_ended_it_is_told_and_the_terminal_left_clean(self, error, why, monkeypatch):
        stream = Terminal()
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(sys, "stdout", stream)
        with pytest.raises(type(error)):
            build(callbacks=[Fails(error, 5)], steps_per_call=1).train(regression(32), 3, 8)
        assert sys.stderr is stream
        assert stream.screen[-1].startswith(f"{why} after 1 epoch, step 5, ")
        assert stream.getvalue().rindex("\x1b[?25h") > stream.getvalue().rindex("\x1b[?25l")

    def test_an_interrupted_run_says_how_to_resume_and_the_resumed_run_where_it_is(self, tmp_path, capsys):
        data, val_data = regression(32), regression(8)
        trainer = build(tmp_path, callbacks=[Fails(KeyboardInterrupt(), 6)], save_interval=3, steps_per_call=1)
        with pytest.raises(KeyboardInterrupt):
            trainer.train(data, 3, 8, val_data, val_interval=2)
        *_, checkpoint, how = capsys.readouterr().err.splitlines()
        assert checkpoint == f"checkpoint {tmp_path / 'checkpoint_3.msgpack'}"
        assert how == "resume with the same call and resume=True"
        resumed = build(tmp_path, save_interval=3)
        resumed.train(data, 3, 8, val_data, val_interval=2, resume=True)
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == "resumed at step 3, after 0 epochs"
        best = min(zip(*resumed.history.series("val_loss")[::-1], strict=True))
        assert f"best val_loss {best[0]:.4g} at step {best[1]}" in lines

    def test_consecutive_calls_of_train_epoch_are_one_run(self, monkeypatch):
        stream = Terminal()
        data = regression(32)
        batches = [{name: array[i : i + 8] for name, array in data.items()} for i in range(0, 32, 8)]
        trainer = build(settings=config(num_epochs=3), train_data_loader=batches, callbacks=[Progress(stream)])
        for _ in range(3):
            trainer.train_epoch()
        words = [line.split()[0] for line in stream.screen]
        assert words == ["compiled", "epoch", "1/3", "2/3", "3/3", "finished"]

    def test_train_epoch_without_a_number_of_epochs_promises_none(self, capsys):
        batch = regression(8)
        trainer = build(train_data_loader=[batch] * 2)
        for _ in range(2):
            trainer.train_epoch()
        rows = capsys.readouterr().err.splitlines()[2:]
        assert [re.sub(r"loss.*", "", row) for row in rows] == ["epoch 1  step 2  ", "epoch 2  step 4  "]


class TestOfATrainer:
    def test_it_can_be_switched_off(self, capsys):
        build(progress=False).train(regression(16), 2, 8)
        assert capsys.readouterr() == ("", "")

    def test_it_can_be_given(self, capsys):
        stream = io.StringIO()
        build(progress=Progress(stream)).train(regression(16), 2, 8)
        assert "finished after 2 epochs" in stream.getvalue()
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize("wrap", [list, CallbackList, lambda given: [CallbackList(given)]])
    def test_one_among_the_callbacks_is_the_only_one(self, wrap, capsys):
        stream = io.StringIO()
        build(callbacks=wrap([Progress(stream)])).train(regression(16), 2, 8)
        assert stream.getvalue().count("finished") == 1
        assert capsys.readouterr().err == ""

    @pytest.mark.parametrize("wrong", ["yes", 1, None, Progress])
    def test_anything_else_is_refused(self, wrong):
        with pytest.raises(ArgumentTypeError, match=r"`progress` is of type .*; it must be True, False, or a "):
            build(progress=wrong)

    def test_steps_stay_fused(self):
        class Calls(Callback):
            number = 0

            def on_call_end(self, trainer, step, logs):
                self.number += 1

        calls = Calls()
        build(callbacks=[calls], progress=Progress(Terminal())).train(regression(64), 2, 8)
        assert calls.number == 2

    def test_it_changes_nothing_of_what_is_learned(self):
        shown, silent = build(progress=Progress(Terminal())), build(progress=False)
        assert shown.train(regression(64), 3, 8) == silent.train(regression(64), 3, 8)
        assert shown.history.to_dict() == silent.history.to_dict()
        jax.tree.map(np.testing.assert_array_equal, shown.state.params, silent.state.params)

    def test_nothing_of_a_trainer_outlives_it(self):
        progress = Progress(Terminal())
        trainer = build(progress=progress)
        trainer.train(regression(64), 3, 8, regression(8))
        arrays = [weakref.ref(leaf) for leaf in trainer.run.leaves]
        gc.disable()
        try:
            del trainer
            assert not any(array() is not None for array in arrays)
        finally:
            gc.enable()
        assert progress._metrics == {}

    def test_other_processes_write_nothing(self):
        stream = io.StringIO()
        played = Played(stream, epochs=2, batches=3)
        played.is_primary_process = False
        played.play()
        assert stream.getvalue() == ""


ON_A_TERMINAL = """
import time
from tests.problems import Linear, config, regression, squared_error
from trainer import Callback, Trainer

class Slow(Callback):
    def on_call_end(self, trainer, step, logs):
        time.sleep(0.1)

trainer = Trainer(Linear(4), config(), loss_fn=squared_error, callbacks=[Slow()], steps_per_call=1, save_interval=10**9)
trainer.train(regression(32), 1000, 8, regression(8))
"""


@pytest.mark.slow
def test_ctrl_c_leaves_a_real_terminal_clean(tmp_path):
    reading, writing = os.openpty()
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONIOENCODING": "utf-8"}
    command = [sys.executable, "-c", ON_A_TERMINAL]
    shown = Terminal()
    with subprocess.Popen(command, stdout=writing, stderr=writing, cwd=tmp_path, env=environment) as process:
        os.close(writing)
        while data := _read(reading):
            running = "epoch 2/1000  " not in shown.getvalue()
            shown.write(data)
            if running and "epoch 2/1000  " in shown.getvalue():
                process.send_signal(signal.SIGINT)
    os.close(reading)
    # What Python says of the exception comes after what the display says, and there is nothing of the line left.
    lines = shown.screen
    (ending,) = [index for index, line in enumerate(lines) if line.startswith("interrupted after ")]
    assert lines[ending - 1].split()[0].endswith("/1000")
    assert lines[ending + 2].startswith("checkpoint ")
    assert lines[ending + 3 : ending + 5] == [
        "resume with the same call and resume=True",
        "Traceback (most recent call last):",
    ]
    assert shown.getvalue().rindex("\x1b[?25h") > shown.getvalue().rindex("\x1b[?25l")


def _read(terminal):
    try:
        return os.read(terminal, 65536).decode(errors="replace")
    except OSError:  # the other end is closed
        return ""


class TestNotebook:
    @pytest.fixture
    def shown(self, monkeypatch):
        """What a notebook was told to show: every display, with its updates."""
        displays = []

        class Handle:
            def __init__(self, bundle):
                self.bundles = [bundle]

            def update(self, bundle, raw):
                self.bundles.append(bundle)

        def display(bundle, raw, display_id):
            displays.append(Handle(bundle))
            return displays[-1]

        shell = SimpleNamespace(kernel=object(), execution_count=1)
        ipython = SimpleNamespace(get_ipython=lambda: shell, display=SimpleNamespace(display=display), shell=shell)
        monkeypatch.setitem(sys.modules, "IPython", ipython)
        return SimpleNamespace(displays=displays, shell=shell)

    def test_it_is_one_display_that_is_replaced(self, shown, capsys):
        Played(None, epochs=2, batches=3).play()
        (display,) = shown.displays
        assert display.bundles[-1]["text/plain"].splitlines() == [
            "epoch      loss      time",
            "  1/2       0.5     3.0 s",
            "  2/2       0.5     3.0 s",
            "finished after 2 epochs, step 6, 6.0 s",
        ]
        assert any("step 2/6  loss 1" in bundle["text/plain"] for bundle in display.bundles)
        assert capsys.readouterr() == ("", "")

    def test_names_cannot_be_markup(self, shown):
        played = Played(None, epochs=1, batches=1)
        played.run.average = Average(**{"loss": 1.0, "<b>": 2.0})
        played.play()
        assert "&lt;b&gt;" in shown.displays[0].bundles[-1]["text/html"]
        assert "monospace" in shown.displays[0].bundles[-1]["text/html"]

    def test_it_does_not_grow_without_end(self, shown):
        Played(None, epochs=1000, batches=1).play()
        assert len(shown.displays[0].bundles[-1]["text/plain"].splitlines()) <= 200

    def test_calls_in_one_cell_share_a_display_and_those_of_another_have_their_own(self, shown):
        trainer = build(train_data_loader=[regression(8)] * 2)
        trainer.train_epoch()
        trainer.train_epoch()
        shown.shell.execution_count = 2
        trainer.train_epoch()
        assert len(shown.displays) == 2


def test_a_score_that_is_not_finite_is_not_the_best(capsys):
    def objective(model, batch, rng, step):
        loss, metrics = squared_error(model, batch, rng, step)
        return jnp.nan * loss, metrics

    trainer = Trainer(Linear(4), config(), loss_fn=objective, callbacks=[EarlyStopping()])
    with pytest.warns(UserWarning, match="the loss is nan"):
        trainer.train(regression(16), 2, 8, regression(8))
    told = capsys.readouterr().err
    assert "val_loss = nan is not finite" in told
    assert "best val_loss" not in told
