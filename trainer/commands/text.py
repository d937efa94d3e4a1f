"""Text helpers of all commands: names without control characters, sizes with units, examples in the help."""

import argparse
import json
from typing import Any

import numpy as np

from trainer.callbacks.display import printable as printable
from trainer.checkpoints.plain_values import bytes_to_json, to_plain


def human_size(size: int) -> str:
    """Formats a number of bytes, such as ``1.5 MiB``."""
    amount, units = float(size), iter(("B", "KiB", "MiB", "GiB", "TiB"))
    unit = next(units)
    while amount >= 1024 and unit != "TiB":
        amount, unit = amount / 1024, next(units)
    return f"{amount:.0f} {unit}" if unit == "B" else f"{amount:.1f} {unit}"


def shown(value: Any) -> str:
    """Formats a plain value: a string or a number unchanged, anything else as JSON."""
    if isinstance(value, str | int | float):
        return printable(str(value))
    return printable(json.dumps(to_plain(_listed(value), "info"), default=bytes_to_json, ensure_ascii=False))


def _listed(value: Any) -> Any:
    """Returns a value with lists in place of its arrays; complex numbers, dates and durations in them become text."""
    if isinstance(value, np.ndarray):
        return (value.astype(str) if value.dtype.kind in "cmM" else value).tolist()
    if isinstance(value, dict):
        return {key: _listed(held) for key, held in value.items()}
    return type(value)(map(_listed, value)) if type(value) in (list, tuple) else value


def add_command(commands: Any, name: str, run: Any, about: str, example: str) -> argparse.ArgumentParser:
    """Adds a command whose help ends with an example."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=about,
        description=about[0].upper() + about[1:] + ".",
        epilog=f"example:\n{example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=run)
    return parser
