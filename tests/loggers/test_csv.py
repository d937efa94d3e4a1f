"""`CSVLogger`: one valid table at any time, no step twice, nothing lost."""

import csv
import json
import math
import os

import jax.numpy as jnp
import numpy as np
import pytest

from tests.problems import Linear, config, regression, squared_error
from trainer import ArgumentError, ArgumentTypeError, CSVLogger, Trainer


def table(path):
    """The rows as dicts of what is not empty; every row has as many cells as the header."""
    with path.open(newline="") as file:
        header, *rows = csv.reader(file)
    assert len(set(header)) == len(header)
    assert all(len(row) == len(header) for row in rows)
    return [{name: float(cell) for name, cell in zip(header, row, strict=True) if cell} for row in rows]


def steps(path):
    return [int(row["step"]) for row in table(path)]


@pytest.fixture
def logger(tmp_path):
    made = CSVLogger(tmp_path / "run")
    yield made
    made.close()


def test_a_step_has_one_row_and_columns_may_come_later(logger):
    logger.log_scalars({"train/loss": 0.5}, 1)
    assert table(logger.path) == [{"step": 1, "train/loss": 0.5}]
    logger.log_scalars({"train/loss": 0.25}, 2)
    logger.log_scalars({"val/loss": 0.75, "val/error": 1.0}, 2)
    logger.log_scalars({"train/loss": 0.125, "val/loss": np.float32(0.5)}, jnp.int32(3))
    assert table(logger.path) == [
        {"step": 1, "train/loss": 0.5},
        {"step": 2, "train/loss": 0.25, "val/loss": 0.75, "val/error": 1.0},
        {"step": 3, "train/loss": 0.125, "val/loss": 0.5},
    ]
    assert [path.name for path in logger.directory.iterdir()] == ["metrics.csv"]


def test_the_same_scalar_again_replaces_the_cell(logger):
    for value in (1.25, 1.0, 1.0625):  # shorter, and longer, than the text before
        logger.log_scalars({"a": value}, 1)
        assert table(logger.path) == [{"step": 1, "a": value}]


def test_a_row_of_an_earlier_step_finds_its_place(logger):
    for step in (1, 3, 5):
        logger.log_scalars({"a": step}, step)
    logger.log_scalars({"b": 3.5}, 3)
    logger.log_scalars({"a": 2.0}, 2)
    logger.log_scalars({"a": 6.0}, 6)
    assert [row["a"] for row in table(logger.path)] == [1, 2, 3, 5, 6]
    assert table(logger.path)[2] == {"step": 3, "a": 3, "b": 3.5}


def test_numbers_that_are_not_finite_and_rows_without_a_step(logger):
    logger.log_scalars({"a": math.nan, "b": -math.inf}, 1)
    logger.log_scalar("a", 2.0)
    logger.log_scalar("a", 3.0)
    logger.log_scalars({}, 7)
    first, *rest = table(logger.path)
    assert math.isnan(first["a"])
    assert first["b"] == -math.inf
    assert rest == [{"a": 2.0}, {"a": 3.0}]


def test_names_are_quoted(logger):
    names = ['a,"b"', "ü", "two\nlines"]
    logger.log_scalars(dict.fromkeys(names, 1.0), 1)
    logger.close()
    logger.log_scalars({names[0]: 2.0}, 2)
    assert table(logger.path)[1] == {"step": 2, names[0]: 2.0}
    assert table(logger.path)[0].keys() == {"step", 'a,"b"', "ü", "two lines"}


def test_what_is_no_number_of_a_step_goes_beside_it(logger):
    logger.log_text("note", "text", 1)
    logger.log_histogram("w", np.arange(3.0), 1)
    logger.log_hyperparams({"rate": 1e-3})
    lines = (logger.directory / "events.jsonl").read_text().splitlines()
    assert [list(json.loads(line)) for line in lines] == [["step", "note"], ["step", "w"], ["hyperparameters"]]
    assert not logger.path.exists()


def written(directory, last):
    logger = CSVLogger(directory)
    for step in range(1, last + 1):
        logger.log_scalars({"a": step}, step)
    logger.close()
    return CSVLogger(directory)


def test_a_new_process_appends(tmp_path):
    again = written(tmp_path, 3)
    again.log_scalars({"a": 4, "b": 1}, 4)
    again.close()
    assert steps(again.path) == [1, 2, 3, 4]


def test_rewinding_drops_the_rows_after_the_checkpoint(tmp_path):
    again = written(tmp_path, 9)
    again.log_hyperparams({})
    again.rewind(4)
    assert steps(again.path) == [1, 2, 3, 4]
    again.log_scalars({"a": 4.5}, 4)
    again.log_scalars({"a": 7.5}, 7)
    again.close()
    assert [(row["step"], row["a"]) for row in table(again.path)] == [(1, 1), (2, 2), (3, 3), (4, 4.5), (7, 7.5)]


def test_rewinding_all_of_a_run_is_no_other_run(tmp_path):
    again = written(tmp_path, 3)
    again.rewind(0)
    again.log_scalars({"a": 1.5}, 1)
    again.close()
    assert table(again.path) == [{"step": 1, "a": 1.5}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


def test_rewinding_before_there_is_a_table_makes_none(logger):
    logger.rewind(3)
    assert not logger.directory.exists()


def test_without_rewinding_a_step_that_comes_again_replaces_its_cells(tmp_path):
    again = written(tmp_path, 9)
    again.log_scalars({"a": 5.5, "b": 1}, 5)
    again.close()
    assert steps(again.path) == [1, 2, 3, 4, 5, 6, 7, 8, 9]
    assert table(again.path)[4] == {"step": 5, "a": 5.5, "b": 1}


def test_a_checkpoint_that_is_loaded_to_evaluate_it_costs_no_row(tmp_path):
    logger = CSVLogger(tmp_path / "log")
    trainer = Trainer(Linear(4), config(log_frequency=3), loss_fn=squared_error, logger=logger, workdir=tmp_path)
    first = trainer.save_checkpoint()
    trainer.train(regression(40), 1, 4)
    middle = trainer.save_checkpoint()
    trainer.train(regression(40), 1, 4)
    logged = steps(logger.path)
    for path in (first, middle):
        trainer.load_checkpoint(path)
    trainer.validate_step(regression(8))
    assert steps(logger.path) == logged
    assert "val/loss" in table(logger.path)[logged.index(10)]
    for _ in range(2):
        trainer.train_step(regression(8))  # now the run goes on from there
    assert steps(logger.path) == [step for step in logged if step <= 10] + [12]
    logger.close()


def test_a_run_from_the_start_keeps_the_table_of_another(tmp_path):
    again = written(tmp_path, 3)
    for number in (1, 2):
        with pytest.warns(UserWarning, match=f"rows of an earlier run up to step 3, .* kept in `metrics.{number}.csv`"):
            again.log_scalars({"a": 0.5}, 1)
        again.log_scalars({"a": 2, "b": 1}, 2)
        again.log_scalars({"a": 3}, 3)
        again.close()
        again = CSVLogger(tmp_path)
    assert steps(tmp_path / "metrics.csv") == steps(tmp_path / "metrics.1.csv") == [1, 2, 3]
    assert steps(tmp_path / "metrics.2.csv") == [1, 2, 3]


def test_a_row_that_a_killed_process_began_is_cut_off(tmp_path):
    path = written(tmp_path, 3).path
    with path.open("a") as file:
        file.write("4,1.2")
    again = CSVLogger(tmp_path)
    again.log_scalars({"a": 4.0}, 4)
    again.close()
    assert table(path)[-1] == {"step": 4, "a": 4.0}


def test_making_a_logger_writes_nothing(tmp_path):
    """Of several processes each makes one, while that of the first may be writing."""
    path = written(tmp_path, 3).path
    with path.open("a") as file:
        file.write("4,1.2")
        file.flush()
        CSVLogger(tmp_path)
        file.write("5\n")
    assert table(path)[-1] == {"step": 4, "a": 1.25}


class Full:
    """A file on a disk that is full after some bytes."""

    def __init__(self, file):
        self.file, self.room = file, 3

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.file.write(data[: self.room])
        self.file.flush()
        self.room -= len(data)
        if self.room < 0:
            self.room = 1000
            raise OSError("No space left on device")


@pytest.mark.parametrize("step", [4, 5])
def test_a_full_disk_leaves_a_table(tmp_path, step):
    """While the last row grows, or a new one is written."""
    again = written(tmp_path, 3)
    again.log_scalars({"a": 4, "b": 1}, 4)
    again._table._file = Full(again._table._file)
    with pytest.raises(OSError, match="No space left"):
        again.log_scalars({"b": 1.125}, step)
    assert table(again.path)[-1] == {"step": 4, "a": 4, "b": 1}
    again.log_scalars({"b": 2}, 6)
    assert steps(again.path) == [1, 2, 3, 4, 6]
    again.close()


def test_a_new_column_on_a_full_disk_changes_nothing(tmp_path, monkeypatch):
    again = written(tmp_path, 3)
    again.log_scalars({"a": 4}, 4)

    def full(descriptor):
        raise OSError("No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            again.log_scalars({"b": 1}, 4)
        assert table(again.path)[-1] == {"step": 4, "a": 4}
    again.log_scalars({"b": 2}, 5)
    again.close()
    assert table(again.path)[-2:] == [{"step": 4, "a": 4}, {"step": 5, "b": 2}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize("moment", ["before", "after"])
def test_ctrl_c_around_the_replacement_loses_no_later_row(tmp_path, monkeypatch, moment):
    again = written(tmp_path, 3)
    again.log_scalars({"a": 4}, 4)
    replace = os.replace

    def interrupted(*paths):
        if moment == "after":
            replace(*paths)
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            again.log_scalars({"b": 1}, 5)
    again.log_scalars({"a": 6}, 6)
    again.close()
    assert steps(again.path) == ([1, 2, 3, 4, 5, 6] if moment == "after" else [1, 2, 3, 4, 6])
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.csv"]


@pytest.mark.parametrize(
    "content", ["epoch,loss\n1,2\n", "no table", "step,a,a\n", "step,a\n1,2,3\n", "step,a\nx,2\n", 'step,"a\n1,2\n']
)
def test_a_file_of_another_program_is_refused_and_not_touched(tmp_path, content):
    (tmp_path / "metrics.csv").write_text(content)
    with pytest.raises(
        ArgumentError, match=r"metrics.csv` is no table of CSVLogger: line \d .* use another `directory`"
    ):
        CSVLogger(tmp_path)
    assert (tmp_path / "metrics.csv").read_text() == content


def test_bad_input_is_refused_by_name(tmp_path, logger):
    with pytest.raises(ArgumentTypeError, match="`directory` of CSVLogger is of type NoneType; it must be a path"):
        CSVLogger(None)
    (tmp_path / "file").touch()
    with pytest.raises(ArgumentError, match=r"`directory` of CSVLogger is `.*file`, which is a file; it must be a dir"):
        CSVLogger(tmp_path / "file")
    with pytest.raises(ArgumentError, match="a scalar is called `step`, which is the name of the first column"):
        logger.log_scalars({"step": 1.0}, 1)
    assert not logger.directory.exists()


def train(logger, **how):
    how = {"save_interval": 7 if "workdir" in how else 1000, **how}
    trainer = Trainer(Linear(4), config(log_frequency=3), loss_fn=squared_error, logger=logger, **how)
    trainer.train(regression(40), 3, 4, regression(8), 5, resume="workdir" in how)


def test_a_run_that_is_killed_and_resumed_holds_each_step_once(tmp_path):
    whole = CSVLogger(tmp_path / "whole")
    train(whole)

    class Killed(CSVLogger):
        def log_scalars(self, scalars, step=None):
            super().log_scalars(scalars, step)
            if step == 20:
                raise KeyboardInterrupt

    killed = Killed(tmp_path / "parts")
    with pytest.raises(KeyboardInterrupt):
        train(killed, workdir=tmp_path / "run", handle_signals=False)
    killed.close()
    for path in (tmp_path / "run").glob("*20*"):  # what was saved last, at step 14, is before what was logged
        path.unlink()
    before = steps(tmp_path / "parts" / "metrics.csv")
    parts = CSVLogger(tmp_path / "parts")
    train(parts, workdir=tmp_path / "run")
    assert before[-1] == 20
    after = table(parts.path)
    names = ("step", "train/loss", "val/loss", "epoch/loss")
    assert [{name: row.get(name) for name in names} for row in after] == [
        {name: row.get(name) for name in names} for row in table(whole.path)
    ]
    parts.close()
    whole.close()


def test_two_trainers_with_one_logger_have_a_table_each(tmp_path):
    logger = CSVLogger(tmp_path)
    train(logger)
    with pytest.warns(UserWarning, match="kept in `metrics.1.csv`"):
        train(logger)
    logger.close()
    assert steps(tmp_path / "metrics.csv") == steps(tmp_path / "metrics.1.csv")
