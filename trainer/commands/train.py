"""``trainer train``: runs the training that a configuration describes."""

import argparse
import contextlib
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from trainer.commands.text import add_command, printable
from trainer.paths import in_home

LOG = "log.jsonl"
"""The log in the directory of a run; it has what the history lacks: speeds and texts."""

_EXAMPLE = """\
  trainer train examples/digits.yaml optimizer.learning_rate=1e-3 num_epochs=20
  trainer train examples/digits.yaml --resume

The file has the fields of trainer.TrainingConfig, and names Python callables: `model` (called with rngs), `data` (which
returns training and validation data) and `objective` (the loss function), as `package.module:name`. Modules are found
beside the file, in the current directory, and where Python looks. A value on the command line is read as YAML."""


def add_to(commands: Any) -> None:
    """Adds the command to a parser."""
    parser = add_command(commands, "train", run, "train what a configuration describes", _EXAMPLE)
    add_job_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="continue the run in its directory at its next batch")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def add_job_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the configuration and its overrides to the arguments of a command."""
    parser.add_argument("config", metavar="CONFIG.yaml", help="what to train")
    parser.add_argument(
        "overrides",
        metavar="KEY=VALUE",
        nargs="*",
        type=override,
        help="a field to replace, by its dotted name: optimizer.learning_rate=1e-3",
    )


def run(options: argparse.Namespace, out: TextIO) -> None:
    """Runs the command."""
    from trainer.commands.job import Job

    job = Job.from_file(Path(options.config), options.overrides)
    train_job(job, out, resume=options.resume, quiet=options.quiet)


def train_job(job: Any, out: TextIO, *, resume: bool = False, quiet: bool = False) -> dict[str, float]:
    """Trains a job in its directory, prints the result, and returns it."""
    from trainer.loggers import FileLogger

    config = job.config
    workdir = Path(in_home(config.workdir))
    logger = FileLogger(workdir / LOG)
    with (
        plain_warnings(),
        contextlib.closing(logger),
        job.opened(workdir=workdir, logger=logger, progress=not quiet) as (trainer, train_data, val_data),
    ):
        counts = (config.num_epochs, config.batch_size)
        result: dict[str, float] = trainer.train(
            train_data, *counts, val_data, val_interval=config.val_interval, resume=resume
        )
        step = trainer.step
    kind = "training" if val_data is None else "validation"
    metrics = "  ".join(f"{name} {value:.6g}" for name, value in result.items())
    print(printable(f"{kind} after {step} steps: {metrics}"), file=out)
    print(printable(f"run directory: {workdir} (`trainer inspect {workdir}`, `trainer plot {workdir}`)"), file=out)
    return result


@contextlib.contextmanager
def plain_warnings() -> Iterator[None]:
    """Shows warnings as readable lines during the block, without the location in this command's code."""

    def show(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        del category, filename, lineno, file, line
        print(printable(f"warning: {message}"), file=sys.stderr)

    with warnings.catch_warnings():
        warnings.showwarning = show
        yield


def override(text: str) -> str:
    """Checks a command-line argument that overrides a field; raises `argparse.ArgumentTypeError`."""
    name, equals, _ = text.partition("=")
    if not equals or not all(name.split(".")):
        raise argparse.ArgumentTypeError(f"{text!r} is no KEY=VALUE, such as optimizer.learning_rate=1e-3")
    return text
