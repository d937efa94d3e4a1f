"""The command ``trainer``: inspects and converts checkpoints without a model."""

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from typing import Any, TextIO

from trainer import __version__
from trainer.checkpoints.export import convert
from trainer.checkpoints.open import open_source
from trainer.checkpoints.plain_values import bytes_to_json, to_plain
from trainer.checkpoints.state_io import describe_leaf
from trainer.errors import ArgumentError, CheckpointError

_BROKEN_PIPE = 141
"""The exit status of a command that SIGPIPE ends, 128 + 13."""


def main(arguments: Sequence[str] | None = None, out: TextIO | None = None) -> int:
    """Runs the command and returns its exit status: 0, or 1 after an error that it prints to stderr."""
    parser = argparse.ArgumentParser(prog="trainer", description="Inspects and converts checkpoints.")
    parser.add_argument("--version", action="version", version=f"nnx-trainer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    inspecting = commands.add_parser("inspect", help="print what a checkpoint holds, without loading its arrays")
    inspecting.add_argument("checkpoint")
    inspecting.add_argument("--verify", action="store_true", help="read everything and compare all checksums")
    converting = commands.add_parser("convert", help="write the contents of a checkpoint in another format")
    converting.add_argument("source", help="a .msgpack file, an Orbax directory, a .safetensors or .npz file")
    converting.add_argument(
        "target",
        help="a name that ends in .msgpack; .orbax, a directory; .safetensors or .npz, params and model state only",
    )
    options = parser.parse_args(arguments)
    if out is None:
        out = sys.stdout
        if isinstance(out, io.TextIOWrapper):
            out.reconfigure(errors="backslashreplace")  # a terminal may lack the letters of a name
    try:
        if options.command == "convert":
            left_out = convert(options.source, options.target)
            if left_out:
                print(printable(f"`{options.target}` cannot hold and left out: {', '.join(left_out)}"), file=sys.stderr)
        else:
            inspect(options.checkpoint, verify=options.verify, out=out)
        out.flush()
    except BrokenPipeError:  # the reader has seen enough, as `head` has
        # What is still in the buffer goes nowhere, or the interpreter would complain when it flushes it at its exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _BROKEN_PIPE
    except (ArgumentError, CheckpointError) as error:
        print(printable(str(error)), file=sys.stderr)
        return 1
    return 0


def printable(text: str) -> str:
    """Returns text in which control characters, and all else that has no look of its own, are escaped."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def inspect(path: str | os.PathLike[str], *, verify: bool = False, out: TextIO) -> None:
    """Prints the information of a checkpoint, its tree of arrays with shapes, dtypes and sizes, and the total size.

    Args:
        path: The checkpoint.
        verify: Whether to read the arrays and compare their checksums.
        out: Where to print.

    Raises:
        CheckpointError: The checkpoint cannot be used; with ``verify`` also if an array is damaged.
    """
    with open_source(path) as source:
        for name, value in source.info.items():
            if name != "containers":  # the first files have a long entry of this name that nothing reads any more
                text = value if isinstance(value, str | int | float) else _as_json(value)
                print(printable(f"{name:<10}{text}"), file=out)
        print(file=out)
        shown: tuple[str | int, ...] = ()
        for leaf in source.leaves.values():
            for depth, part in enumerate(leaf.path):
                if leaf.path[: depth + 1] == shown[: depth + 1]:
                    continue
                last = depth == len(leaf.path) - 1
                about = f"  {describe_leaf(leaf)}  {_human(leaf.bytes)}" if last else ""
                print(f"{'  ' * depth}{printable(str(part))}{about}", file=out)
            shown = leaf.path
        size = _human(sum(leaf.bytes for leaf in source.leaves.values()))
        print(f"\n{len(source.leaves)} arrays, {size}", file=out)
        if verify:
            source.verify()
            print("every checksum agrees", file=out)


def _as_json(value: Any) -> str:
    return json.dumps(to_plain(value, "info"), default=bytes_to_json)


def _human(size: int) -> str:
    """Formats a number of bytes, ``1.5 MiB``."""
    amount, units = float(size), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while amount >= 1024 and unit != "TiB":
        amount, unit = amount / 1024, next(units)
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"
