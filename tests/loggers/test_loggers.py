"""Loggers: what each writes for each event, and when."""

import copy
import io
import json
import math
import pickle
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from trainer import ArgumentTypeError, ConsoleLogger, FileLogger, Logger, MetricsLogger, ObjectiveError
from trainer.loggers.base import check_metric_names, prefixed

IMAGE = np.array([[0.0, 1.0], [0.5, 0.25]])


class Recording(Logger):
    """A logger that overrides one method only."""

    def __init__(self):
        self.rows = []

    def log_scalars(self, scalars, step=None):
        self.rows.append((dict(scalars), step))


def test_the_base_ignores_everything_and_passes_single_scalars_on():
    base, recording = Logger(), Recording()
    for logger in (base, recording):
        logger.log_scalar("loss", 1.0, 3)
        logger.log_scalar("loss", 2.0)
        logger.log_text("note", "text", 3)
        logger.log_image("image", IMAGE, 3)
        logger.log_histogram("weights", IMAGE, 3)
        logger.log_hyperparams({"a": 1})
        logger.log_checkpoint("checkpoint", 3)
        logger.rewind(2)
        logger.close()
    assert recording.rows == [({"loss": 1.0}, 3), ({"loss": 2.0}, None)]


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda to: to.log_scalar("loss", 0.123456789, 7), "step 7  loss 0.123457\n"),
        (lambda to: to.log_scalars({"a": 1.0, "b": math.nan}, 0), "step 0  a 1  b nan\n"),
        (lambda to: to.log_scalars({"a": jnp.float32(0.5)}), "a 0.5\n"),
        (lambda to: to.log_text("note", "hello", 2), "step 2  note: hello\n"),
        (lambda to: to.log_image("image", IMAGE, 2), "step 2  image: image (2, 2)\n"),
        (lambda to: to.log_histogram("w", jnp.asarray(IMAGE)), "w: min 0  mean 0.4375  max 1\n"),
        (
            lambda to: to.log_hyperparams({"rate": 1e-3, "kind": int}),
            'hyperparameters: {"rate": 0.001, "kind": "<class \'int\'>"}\n',
        ),
    ],
)
def test_console_writes_one_line_per_event(call, expected):
    stream = io.StringIO()
    call(ConsoleLogger(stream))
    assert stream.getvalue() == expected


def test_console_writes_to_standard_error_by_default(capsys):
    ConsoleLogger().log_scalar("loss", 1.0)
    assert capsys.readouterr() == ("", "loss 1\n")


def rows(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def to_file(tmp_path):
    logger = FileLogger(tmp_path / "deep" / "log.jsonl")
    yield logger
    logger.close()


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda to: to.log_scalar("loss", 0.1, 7), {"step": 7, "loss": 0.1}),
        (lambda to: to.log_scalars({"a": np.float32(0.5), "b": jnp.ones(())}), {"a": 0.5, "b": 1.0}),
        (lambda to: to.log_text("note", "äöü\nzwei", 0), {"step": 0, "note": "äöü\nzwei"}),
        (
            lambda to: to.log_image("image", IMAGE, 2),
            {"step": 2, "image": {"file": "log_images/image/00000002.png", "min": 0.0, "mean": 0.4375, "max": 1.0}},
        ),
        (
            lambda to: to.log_hyperparams({"rate": 1e-3, "kind": int}),
            {"hyperparameters": {"rate": 1e-3, "kind": "<class 'int'>"}},
        ),
    ],
)
def test_file_gets_one_object_per_event(to_file, call, expected):
    call(to_file)
    assert rows(to_file.path) == [expected]


def test_file_keeps_numbers_that_are_not_finite_visible(to_file):
    to_file.log_scalars({"loss": math.nan, "norm": math.inf})
    assert to_file.path.read_text() == '{"loss": NaN, "norm": Infinity}\n'
    assert math.isnan(rows(to_file.path)[0]["loss"])


def test_file_histogram_counts_what_is_finite_and_says_what_is_not(to_file):
    to_file.log_histogram("w", jnp.arange(31.0), 1)
    to_file.log_histogram("w", np.array([[0.0, math.nan], [3.0, math.inf]]), 2)
    to_file.log_histogram("w", [math.nan], 3)
    first, second, third = (row["w"] for row in rows(to_file.path))
    assert (sum(first["counts"]), len(first["counts"]), first["not_finite"]) == (31, 30, 0)
    np.testing.assert_allclose(first["edges"], np.arange(31.0))
    assert (sum(second["counts"]), second["edges"][0], second["edges"][-1], second["not_finite"]) == (2, 0.0, 3.0, 2)
    assert (sum(third["counts"]), third["not_finite"]) == (0, 1)


def test_file_is_made_at_the_first_event_and_written_at_once(to_file):
    assert not to_file.path.parent.exists()
    to_file.log_scalar("loss", 1.0)
    assert rows(to_file.path) == [{"loss": 1.0}]


def test_file_is_appended_to_after_closing(to_file):
    to_file.log_scalar("loss", 1.0, 1)
    to_file.close()
    to_file.close()
    to_file.log_scalar("loss", 2.0, 2)
    to_file.close()
    FileLogger(str(to_file.path)).close()
    assert [row["step"] for row in rows(to_file.path)] == [1, 2]


@pytest.mark.parametrize(
    ("given", "file"),
    [
        ("new", "new/metrics.jsonl"),
        ("deep/new", "deep/new/metrics.jsonl"),
        ("there", "there/metrics.jsonl"),
        ("there.d", "there.d/metrics.jsonl"),
        ("log.jsonl", "log.jsonl"),
        ("log", "log"),
    ],
)
def test_file_is_named_by_itself_or_by_its_directory(tmp_path, given, file):
    (tmp_path / "there").mkdir()
    (tmp_path / "there.d").mkdir()
    (tmp_path / "log").touch()
    logger = FileLogger(tmp_path / given)
    logger.log_scalar("loss", 1.0)
    logger.close()
    assert logger.path == tmp_path / file
    assert rows(tmp_path / file) == [{"loss": 1.0}]


def test_file_is_a_path():
    with pytest.raises(ArgumentTypeError, match="`path` of FileLogger is of type int; it must be a path"):
        FileLogger(1)


def test_metrics_are_named_after_where_they_come_from():
    recording = Recording()
    metrics = MetricsLogger(recording)
    metrics.log_training_metrics({"loss": 1.0, "step": 5}, step=5)
    metrics.log_validation_metrics({"loss": 2.0, "val/error": 3.0}, step=5)
    metrics.log_validation_metrics({"loss": 2.0})
    metrics.log_test_metrics({"loss": 4.0})
    assert recording.rows == [
        ({"train/loss": 1.0}, 5),
        ({"val/loss": 2.0, "val/error": 3.0}, 5),
        ({"val/loss": 2.0}, None),
        ({"test/loss": 4.0}, None),
    ]


def test_prefix_comes_once():
    assert prefixed("val_", {"val_loss": 1, "loss_val_": 2, "step": 3}) == {"val_loss": 1, "val_loss_val_": 2}


@pytest.mark.parametrize("names", [("loss", "val_loss"), ("val_loss", "step", "loss")])
def test_two_metrics_do_not_become_one(names):
    with pytest.raises(ObjectiveError, match="metrics `loss` and `val_loss` are both `val_loss`; rename one"):
        prefixed("val_", dict.fromkeys(names, 1.0))


def test_names_of_validation_averages_are_refused():
    check_metric_names({"loss": 1.0, "interval_loss": 2.0, "val": 3.0, "step": 4})
    with pytest.raises(ObjectiveError, match=r"`val_loss`, but names .* rename it, for example to `own_val_loss`"):
        check_metric_names({"loss": 1.0, "val_loss": 2.0})


@pytest.mark.parametrize("name", ["stderr", "stdout"])
def test_a_console_logger_can_be_copied_and_pickled(name, capsys):
    given = ConsoleLogger(getattr(sys, name))
    for one in (copy.deepcopy(given), pickle.loads(pickle.dumps(given))):
        one.log_text("a", "b", 3)
    assert getattr(capsys.readouterr(), name[3:]) == "step 3  a: b\n" * 2
