"""``trainer plot``: where it finds a history, and what it draws."""

import io
import json

import pytest

from tests.problems import Linear, config, regression, squared_error
from trainer import FileLogger, Trainer
from trainer.commands.histories import labelled, read_rows
from trainer.commands.main import main


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "first"
    logger = FileLogger(directory / "log.jsonl")
    settings = config(log_frequency=1)
    trainer = Trainer(Linear(4), settings, loss_fn=squared_error, workdir=directory, logger=logger, save_interval=5)
    trainer.train(regression(32), 2, 8, regression(16))
    logger.close()
    return directory


def run(*arguments):
    out = io.StringIO()
    return main(["plot", *map(str, arguments)], out), out.getvalue()


def test_a_directory_is_drawn_in_the_terminal(directory):
    status, text = run(directory)
    assert status == 0
    titles = [line for line in text.splitlines() if line and not line.startswith((" ", "a "))]
    assert [title.split(" (")[0] for title in titles] == ["loss", "mean_error", "learning rate", "steps per second"]
    assert any("\u2800" < letter <= "\u28ff" for letter in text)


def test_the_history_is_that_of_the_newest_checkpoint_with_the_speeds_of_the_log(directory):
    rows = read_rows(directory)
    assert [row["step"] for row in rows if "loss" in row] == list(range(1, 9))
    assert [row["step"] for row in rows if "speed/examples_per_second" in row] == [4, 8]
    assert [row["step"] for row in rows if "speed/steps_per_second" in row] == [8]  # of the run file: steps alone
    assert [row["step"] for row in read_rows(directory / "checkpoint_5.msgpack")] == list(range(1, 6))
    assert rows[7]["val_loss"] == read_rows(directory / "checkpoint_8.msgpack")[-1]["val_loss"]


def test_without_a_log_the_speeds_are_those_of_the_run_file(tmp_path):
    trainer = Trainer(Linear(4), config(), loss_fn=squared_error, workdir=tmp_path / "run", save_interval=4)
    trainer.train(regression(32), 3, 8)
    speeds = dict(trainer.history.figures.get("steps_per_second", ()))
    name = "speed/steps_per_second"
    read = {row["step"]: row[name] for row in read_rows(tmp_path / "run") if name in row}
    assert read == speeds
    assert list(read) == [8, 12]  # the first epoch was spent on compiling
    (tmp_path / "run" / "checkpoint_12.msgpack").unlink()
    assert [row["step"] for row in read_rows(tmp_path / "run") if "speed/steps_per_second" in row] == [8]
    assert "steps per second" in run(tmp_path / "run")[1]
    (tmp_path / "run" / "run.json").write_text("{}")
    assert "steps per second" not in run(tmp_path / "run")[1]


def test_a_damaged_newest_checkpoint_is_passed_over(directory, tmp_path):
    (tmp_path / "checkpoint_5.msgpack").write_bytes((directory / "checkpoint_5.msgpack").read_bytes())
    (tmp_path / "checkpoint_8.msgpack").write_bytes(b"damaged")
    assert read_rows(tmp_path)[-1]["step"] == 5


def test_runs_over_each_other_in_a_file(directory, tmp_path):
    status, text = run(directory, directory / "checkpoint_5.msgpack", "-o", tmp_path / "a.svg", "--metric", "loss")
    assert (status, text) == (0, "")
    assert (tmp_path / "a.svg").read_text().startswith("<?xml")


def test_logs_are_read_while_they_are_written(tmp_path):
    (tmp_path / "run.json").write_text("{}")
    lines = [{"hyperparameters": {"a": 1}}, {"step": 1, "train/loss": 2.0}, {"step": 1, "val/loss": 3.0}]
    lines += [{"step": 1, "text": "x"}, {"step": 1, "test/loss": 1.0}, {"step": 2, "train/loss": float("nan")}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 3, "tr')
    rows = read_rows(tmp_path)
    assert rows[:2] == [{"step": 1.0, "loss": 2.0}, {"step": 1.0, "val_loss": 3.0}]
    assert len(rows) == 3
    (tmp_path / "a.csv").write_text("epoch,step,loss,val_loss\n1,1,0.5,\n1,2,nan,0.25\n")
    assert read_rows(tmp_path / "a.csv")[0] == {"epoch": 1.0, "step": 1.0, "loss": 0.5}
    assert run(tmp_path / "a.csv", tmp_path / "log.jsonl")[0] == 0


def test_labels_are_the_shortest_that_differ(tmp_path):
    paths = [tmp_path / name for name in ("a/x", "b/x", "a/y")]
    assert list(labelled(paths)) == ["a/x", "b/x", "a/y"]
    assert list(labelled(paths[1:])) == ["x", "y"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["absent"], "`absent` could not be read: [Errno 2]"),
        (["."], "`.` has no history: no checkpoint that can be read, and no log that ends in .jsonl"),
        (["a.jsonl"], "`a.jsonl` is no log of a run: no row in it has a `step` and a number."),
        (["b.csv", "b.csv"], "`b.csv` is named twice."),
        (["b.csv", "-o", "a.jpg"], "`path` is 'a.jpg'; a picture is a name in .png, .svg, .pdf."),
        (["b.csv", "--metric", "los"], "no run recorded the metric 'los'; did you mean 'loss'?"),
        (["w.msgpack"], "`w.msgpack` could not be read: it is no checkpoint"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    status, _ = run(*arguments) if arguments == ["."] else (None, "")
    (tmp_path / "a.jsonl").write_text("[1]\n3\nx\n")
    (tmp_path / "b.csv").write_text("step,loss\n1,2\n")
    (tmp_path / "w.msgpack").write_bytes(b"something else")
    if status is None:
        status, _ = run(*arguments)
    error = capsys.readouterr().err
    assert status == 1
    assert error.count("\n") == 1
    assert error.startswith(message.split(" could not")[0])
    assert message in error or "w.msgpack" in error
