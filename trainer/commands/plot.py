"""``trainer plot``: plots the histories of runs over each other, into a file or in the terminal."""

import argparse
import shutil
import sys
from pathlib import Path
from typing import Any, TextIO

from trainer.commands.text import add_command, printable

_EXAMPLE = """\
  trainer plot runs/digits                           in the terminal
  trainer plot runs/a runs/b -o curves.png           over each other, into a file
  trainer plot runs/a --metric loss --metric accuracy"""


def add_to(commands: Any) -> None:
    """Adds the command to a parser."""
    about = "draw what runs recorded, over each other, into a file or into the terminal"
    parser = add_command(commands, "plot", run, about, _EXAMPLE)
    what = "the directory of a run, a checkpoint, or a log in .jsonl or .csv"
    parser.add_argument("runs", metavar="RUN", nargs="+", help=what)
    parser.add_argument("-o", "--output", metavar="FILE", help="a name in .png, .svg or .pdf (needs the extra `plot`)")
    parser.add_argument("--metric", metavar="NAME", action="append", help="what to draw, as often as needed; else all")


def run(options: argparse.Namespace, out: TextIO) -> None:
    """Runs the command."""
    from trainer.commands.histories import labelled, read_rows
    from trainer.metrics.plots import draw_panels, panels_of, plot_runs

    rows = {label: read_rows(path) for label, path in labelled([Path(name) for name in options.runs]).items()}
    rows = {printable(label): recorded for label, recorded in rows.items()}
    if options.output is not None:
        plot_runs(rows, options.output, options.metric)
        return
    panels = panels_of(rows, options.metric)
    width = min(shutil.get_terminal_size().columns, 100)
    drawn = draw_panels(panels, width, braille=has_braille(out))
    for line in drawn.splitlines():
        print(printable(line), file=out)


def has_braille(out: TextIO) -> bool:
    """Returns whether the encoding of a stream has Braille characters."""
    try:
        "\u28ff".encode(getattr(out, "encoding", None) or sys.getdefaultencoding())
    except (LookupError, UnicodeEncodeError):
        return False
    return True
