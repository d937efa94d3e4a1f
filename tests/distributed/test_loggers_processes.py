"""Loggers, ``run.json`` and pictures of runs of several processes: process 0 writes them, and every row once."""

import json
import os
import re
import signal
import sys
import warnings
from pathlib import Path

import jax
import pytest

from tests.distributed.test_start import JOIN, finish, start
from tests.loggers.test_csv import table
from tests.marks import slow_unless
from tests.problems import Linear, config, regression, squared_error
from trainer import (
    Callback,
    CSVLogger,
    FileLogger,
    InBackground,
    Logger,
    SchedulerConfig,
    Trainer,
    TrainingInterrupted,
    make_mesh,
)

LOGGED = """
from tests.distributed.test_loggers_processes import course
print(json.dumps(course(**json.loads(os.environ["FLAGS"]))))
"""


class Failing(Logger):
    def log_scalars(self, scalars, step=None):
        raise OSError("the disk is full")


class Asking(Callback):
    """Asks for the learning rate in process 0 alone, as the display does, at every call."""

    def on_call_end(self, trainer, step, logs):
        if trainer.is_primary_process:
            assert float(trainer.setup.rate(trainer.run)) == pytest.approx(float(logs["learning_rate"]), rel=1e-6)


class Stopping(Callback):
    """Stops both processes after a step: by a signal to process 1, or by an error in each."""

    def __init__(self, step, way):
        self.step, self.way = step, way

    def on_call_end(self, trainer, step, logs):
        if step == self.step and self.way == "error":
            raise RuntimeError("stopped")
        if step == self.step and jax.process_index() == 1:
            os.kill(os.getpid(), signal.SIGTERM)


def written_below(directory):
    """Returns a set of names in the directory, to which each one is added that this process opens for writing."""
    names, writes = set(), os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def watch(event, arguments):
        if event == "open" and isinstance(arguments[0], str | os.PathLike) and arguments[2] & writes:
            path = Path(arguments[0])
            if directory in path.parents and "checkpoint" not in path.relative_to(directory).parts[0]:
                names.add(re.sub(r"^\.(.+)\.\d+\.tmp$", r"\1", path.name))  # a file takes its name when it is whole

    sys.addaudithook(watch)
    return names


def course(directory, axes, steps_per_call, draws):
    """Trains in three parts, the first two of which are stopped, and returns what this process has seen."""
    directory, mesh = Path(directory), make_mesh(axes)
    written, stops, told = written_below(directory), [], []

    def part(*callbacks):
        behind = InBackground(FileLogger(directory / "behind.jsonl"))
        loggers = [CSVLogger(directory), FileLogger(directory), Failing(), InBackground(Failing())]
        trainer = Trainer(
            Linear(),
            config(log_frequency=1, scheduler=SchedulerConfig(scheduler_type="step", step_size=4, gamma=0.5)),
            loss_fn=squared_error,
            mesh=mesh,
            workdir=directory,
            save_interval=3,
            logger=[*loggers, behind],
            callbacks=[Asking(), *callbacks],
            report=["learning_rate"],
            steps_per_call=steps_per_call,
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                trainer.train(regression(80, 3), 3, 16, regression(13, 3), val_interval=4, resume=True)
            except (TrainingInterrupted, RuntimeError):
                stops.append(trainer.step)
                behind.close()  # at the end of the last part, Python does
            for logger in loggers:
                logger.close()
            trainer.close()
        told.append([str(warning.message) for warning in caught])
        return trainer

    part(Stopping(4, "signal"))
    part(Stopping(10, "error"))
    history = part().history
    if draws:
        # But for the throughput, which each process measures.
        history.plot(directory / f"history_{jax.process_index()}.png", ["loss", "mean_error"])
    losses = {name: list(zip(*history.series(name), strict=True)) for name in ("loss", "val_loss")}
    return {"written": sorted(written), "stops": stops, "told": told, **losses}


def rows_of(path, name):
    rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return [(row["step"], row[name]) for row in rows if name in row]


@pytest.mark.parametrize(
    ("processes", "devices", "axes", "steps_per_call", "draws"),
    slow_unless(
        lambda *case: case[-1] is False,
        [(2, 1, {"data": 2}, 1, False), (2, 2, {"data": 2, "fsdp": 2}, "auto", True), (4, 1, {"data": 4}, 1, True)],
    ),
)
def test_one_process_writes_every_row_once(processes, devices, axes, steps_per_call, draws, tmp_path):
    flags = {"directory": str(tmp_path), "axes": axes, "steps_per_call": steps_per_call, "draws": draws}
    results, _ = finish(start(JOIN + LOGGED, processes, devices=devices, flags=flags), timeout=120)
    assert [status for status, _, _ in results] == [0] * processes, results
    first, *others = (json.loads(out.splitlines()[-1]) for _, out, _ in results)
    stopped, failed = first["stops"]
    assert (4 <= stopped < 10, failed) == (True, 10)

    for process, other in enumerate(others, start=1):
        assert other["written"] == [f"history_{process}.png"] * draws
        assert other["told"] == [[], [], []]
        assert [other[name] for name in ("stops", "loss", "val_loss")] == [
            first[name] for name in ("stops", "loss", "val_loss")
        ]
    for told in first["told"]:
        assert len([text for text in told if text.startswith("Failing failed in log_scalars: OSError('the disk")]) == 1
        assert len([text for text in told if "calls of Failing" in text and "failed, the first with" in text]) == 1
        assert [text for text in told if "Failing" not in text] == []

    loss, val_loss = ([tuple(row) for row in first[name]] for name in ("loss", "val_loss"))
    assert [step for step, _ in loss] == list(range(1, 16))
    assert [step for step, _ in val_loss] == [4, 5, 8, 10, 12, 15]
    rows = table(tmp_path / "metrics.csv")
    assert [(row["step"], row["train/loss"]) for row in rows] == loss
    assert [(row["step"], row["val/loss"]) for row in rows if "val/loss" in row] == val_loss
    for name in ("metrics.jsonl", "behind.jsonl"):
        # These append: the run was resumed behind step 9, so the next step is there twice, and of equal value.
        assert rows_of(tmp_path / name, "train/loss") == loss[:10] + loss[9:]
        assert rows_of(tmp_path / name, "val/loss") == val_loss

    begun, again, last = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["starts"]
    assert [(entry["event"], entry["step"]) for entry in (begun, again, last)] == [
        ("start", 0),
        ("resume", stopped),
        ("resume", 9),
    ]
    assert begun["run"] == again["run"] == last["run"]
    run, speeds = next(
        iter(json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))["steps_per_second"].items())
    )
    assert run == begun["run"]
    assert {step for step, _ in speeds} <= {5, 10, 15}
    assert begun["devices"]["processes"] == processes
    pictures = [(tmp_path / f"history_{process}.png").read_bytes() for process in range(processes) if draws]
    assert all(picture == pictures[0] for picture in pictures)
