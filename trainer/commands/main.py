"""`main`: parses the command line, runs a command, and turns exceptions into a line of text and an exit status."""

import argparse
import io
import os
import sys
from collections.abc import Sequence
from typing import TextIO

from trainer import __version__
from trainer.commands import convert, demo, inspect, plan, plot, train
from trainer.commands.text import printable
from trainer.errors import TrainerError, TrainingInterrupted

_BROKEN_PIPE = 141
"""The exit status of a command ended by SIGPIPE, 128 + 13."""

_INTERRUPTED = 130
"""The exit status of a command ended by Ctrl-C, 128 + 2."""

_STATUS = """\
exit status:
  0    done
  1    refused, or failed: one line on standard error says why; an error in your own code comes with its traceback
  2    the command line cannot be understood
  130  ended by Ctrl-C; 143: ended by SIGTERM. A training run has saved its state, and continues with --resume
  141  the reader of the output has closed it, as `head` does

`trainer COMMAND --help` explains a command, with an example. `python -m trainer` is the same command.
"""


def main(arguments: Sequence[str] | None = None, out: TextIO | None = None) -> int:
    """Runs the command and returns its exit status, see ``trainer --help``."""
    parser = argparse.ArgumentParser(
        prog="trainer",
        description="Trains from a configuration, and looks at what runs have left.",
        epilog=_STATUS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"nnx-trainer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for command in (demo, train, plan, plot, inspect, convert):
        command.add_to(commands)
    options, rest = parser.parse_known_args(arguments)
    _take_overrides(parser, options, rest)
    if out is None:
        out = sys.stdout
        if isinstance(out, io.TextIOWrapper):
            out.reconfigure(errors="backslashreplace")  # a terminal may lack the characters of a name
    try:
        options.run(options, out)
        out.flush()
    except BrokenPipeError:  # the reader has stopped reading, as `head` does
        # Discard what is still in the buffer, or the interpreter would report an error when flushing it at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except KeyboardInterrupt as interruption:
        return _failed(interruption, _INTERRUPTED, "interrupted")
    except TrainingInterrupted as interruption:
        return _failed(interruption, int(str(interruption.code)))
    except (TrainerError, OSError, ModuleNotFoundError) as error:
        if isinstance(error, ModuleNotFoundError) and "nnx-trainer[" not in str(error):
            raise  # an import in the caller's code
        return _failed(error, 1)
    return 0


def _take_overrides(parser: argparse.ArgumentParser, options: argparse.Namespace, rest: list[str]) -> None:
    """Adds the arguments that argparse leaves over: list items that come after an option in between."""
    if any(word.startswith("-") for word in rest) or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    for word in rest:
        try:
            options.overrides.append(train.override(word))
        except argparse.ArgumentTypeError as error:
            parser.error(str(error))


def _failed(error: BaseException, status: int, text: str = "") -> int:
    # JAX notes about frames in the traceback have several lines.
    notes = [note for note in getattr(error, "__notes__", []) if "\n" not in note]
    print("; ".join(printable(part) for part in (text or str(error), *notes)), file=sys.stderr)
    return status
