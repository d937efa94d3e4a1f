"""``trainer demo``: trains a small network on handwritten digits, and draws its curves in the terminal."""

import argparse
import itertools
from pathlib import Path
from typing import Any, TextIO

from trainer.commands.text import add_command

_EXAMPLE = "  trainer demo\n  trainer demo --epochs 5 --workdir /tmp/demo"


def add_to(commands: Any) -> None:
    """Adds the command to a parser."""
    about = "train a small network on handwritten digits, in seconds (needs the extra `demo`)"
    parser = add_command(commands, "demo", run, about, _EXAMPLE)
    parser.add_argument("--epochs", type=int, default=15, metavar="N", help="how many epochs to train (15)")
    parser.add_argument("--workdir", type=Path, help="the directory of the run; by default a new one, runs/demo-N")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def run(options: argparse.Namespace, out: TextIO) -> None:
    """Runs the command."""
    from trainer.commands.histories import read_rows
    from trainer.commands.job import Job, JobConfig
    from trainer.commands.plot import has_braille
    from trainer.commands.train import train_job
    from trainer.metrics.plots import draw_panels, panels_of

    names = {"model": "Network", "data": "load", "objective": "cross_entropy"}
    config = JobConfig.from_dict(
        {
            **{field: {"factory": f"trainer.commands.digits:{name}"} for field, name in names.items()},
            "name": "demo",
            "workdir": str(options.workdir or _new_directory()),
            "num_epochs": options.epochs,
            "batch_size": 64,
            "log_frequency": 1,
            "optimizer": {"optimizer_type": "adamw", "learning_rate": 3e-3, "weight_decay": 1e-4},
            "scheduler": {"scheduler_type": "one_cycle"},
            "trainer": {"report": ["learning_rate"]},
        }
    )
    train_job(Job(config), out, quiet=options.quiet)
    panels = panels_of({"demo": read_rows(Path(str(config.workdir)))}, ["loss", "accuracy"])
    print(f"\n{draw_panels(panels, 72, 8, braille=has_braille(out))}", file=out)


def _new_directory() -> Path:
    paths = (Path("runs") / f"demo-{number}" for number in itertools.count(1))
    return next(path for path in paths if not path.exists())
