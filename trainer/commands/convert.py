"""``trainer convert``: writes the contents of a checkpoint in another format."""

import argparse
import sys
from pathlib import Path
from typing import Any, TextIO

from trainer.commands.text import add_command, printable
from trainer.paths import in_home

_EXAMPLE = "  trainer convert runs/digits/checkpoint_144.msgpack digits.safetensors"


def add_to(commands: Any) -> None:
    """Adds the command to a parser."""
    parser = add_command(commands, "convert", run, "write the contents of a checkpoint in another format", _EXAMPLE)
    parser.add_argument(
        "source",
        help="a .msgpack file, an Orbax directory, a .safetensors or .npz file; for a run directory its newest one",
    )
    parser.add_argument(
        "target",
        help="a name that ends in .msgpack; .orbax, a directory; .safetensors or .npz, params and model state only",
    )


def run(options: argparse.Namespace, out: TextIO) -> None:
    """Runs the command."""
    from trainer.checkpoints.export import convert
    from trainer.checkpoints.state_io import latest_checkpoint
    from trainer.commands.inspect import is_run_directory

    del out
    source = Path(in_home(options.source))
    if is_run_directory(source):
        source = latest_checkpoint(source) or source
    left_out = convert(source, options.target)
    if left_out:
        print(printable(f"`{options.target}` cannot hold and left out: {', '.join(left_out)}"), file=sys.stderr)
