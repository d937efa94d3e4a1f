"""``trainer inspect``: shows what a checkpoint or a run directory holds, without the model."""

import argparse
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO

from trainer.checkpoints.listing import entries_in
from trainer.checkpoints.open import open_source
from trainer.checkpoints.state_io import describe_leaf
from trainer.commands.text import add_command, human_size, printable, shown
from trainer.errors import CheckpointError
from trainer.fit.run_file import RUN_FILE, read_starts

_EXAMPLE = """\
  trainer inspect runs/digits
  trainer inspect runs/digits/checkpoint_144.msgpack --verify"""


def add_to(commands: Any) -> None:
    """Adds the command to a parser."""
    about = "print what a checkpoint or a run directory holds, without loading arrays"
    parser = add_command(commands, "inspect", run, about, _EXAMPLE)
    parser.add_argument("path", metavar="PATH", help="a checkpoint of any format, or the directory of a run")
    parser.add_argument("--verify", action="store_true", help="read everything and compare all checksums")


def run(options: argparse.Namespace, out: TextIO) -> None:
    """Runs the command."""
    path = Path(options.path)
    show = inspect_run if is_run_directory(path) else inspect
    show(path, verify=options.verify, out=out)


def is_run_directory(path: Path) -> bool:
    """Returns whether a path is a run directory (``run.json``, or default checkpoint names), not an Orbax one."""
    return path.is_dir() and not (path / "about").exists() and bool((path / RUN_FILE).exists() or entries_in(path))


def inspect_run(path: Path, *, verify: bool = False, out: TextIO) -> None:
    """Prints what a run directory holds: the latest start, its configuration, and the latest checkpoint.

    Args:
        path: The directory.
        verify: Whether to read all checkpoints and verify their checksums.
        out: Where to print.

    Raises:
        CheckpointError: With ``verify``, if a checkpoint is damaged.
    """
    starts: list[dict[str, Any]] = []
    try:
        starts = read_starts(path / RUN_FILE) or []
    except (OSError, ValueError) as error:
        print(f"{RUN_FILE:<13}cannot be read: {printable(str(error))}", file=out)
    for name, value in _about_run(starts):
        print(f"{name:<13}{shown(value)}", file=out)
    if starts:
        print("configuration", file=out)
        for name, value in _settings(starts[-1].get("config")):
            print(f"  {printable(name)}: {shown(value)}", file=out)
    entries = entries_in(path)
    size = sum(file.stat().st_size for entry in entries for file in _files(path / entry.name))
    print(f"{'checkpoints':<13}{len(entries)}, {human_size(size)}", file=out)
    for entry in reversed(entries):
        try:
            with open_source(path / entry.name) as source:
                info = dict(source.info)
        except CheckpointError as error:
            print(f"{'damaged':<13}{printable(str(error))}", file=out)
            continue
        print(f"{'latest':<13}{entry.name}, written {shown(info.get('time', ''))}", file=out)
        metrics = info.get("metrics")
        if isinstance(metrics, Mapping) and metrics:
            texts = [
                f"{name} {value:.6g}" if isinstance(value, float) else f"{name} {value}"
                for name, value in metrics.items()
            ]
            print(f"{'metrics':<13}{printable('  '.join(texts))}", file=out)
        break
    for entry in entries if verify else ():
        with open_source(path / entry.name) as source:
            source.verify()
        print(f"{'verified':<13}{entry.name}", file=out)


def _about_run(starts: list[dict[str, Any]]) -> Iterator[tuple[str, Any]]:
    if not starts:
        return
    latest = starts[-1]
    yield "run", " ".join(filter(None, [str(latest.get("run", "")), str(latest.get("name", ""))]))
    for entry in starts[-5:]:
        resumed = f" from {Path(str(entry['resumed_from'])).name}" if "resumed_from" in entry else ""
        yield str(entry.get("event", "start")), f"{entry.get('time', '')} at step {entry.get('step', '')}{resumed}"
    call, git, devices, versions = (_mapping(latest.get(name)) for name in ("call", "git", "devices", "versions"))
    yield "call", f"{call.get('method', '')}: {call.get('about', '')}"
    yield "command", " ".join(map(str, latest.get("command") or []))
    yield "directory", latest.get("directory", "")
    if git:
        yield "code", f"{git.get('commit', '')}{', with changes that are not committed' * bool(git.get('is_dirty'))}"
    python = {"python": latest.get("python", "")}
    yield "versions", ", ".join(f"{name} {version}" for name, version in {**versions, **python}.items())
    yield "devices", f"{devices.get('count', '')} x {devices.get('kind', '')}"
    yield "parameters", f"{latest.get('parameters', '')}"


def _settings(config: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the non-empty settings of a configuration by dotted name."""
    for name, value in _mapping(config).items():
        dotted = f"{path}.{name}" if path else str(name)
        if isinstance(value, Mapping):
            yield from _settings(value, dotted)
        elif value not in (None, "", []):
            yield dotted, value


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _files(path: Path) -> Iterator[Path]:
    yield from (file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]


def inspect(path: str | os.PathLike[str], *, verify: bool = False, out: TextIO) -> None:
    """Prints the metadata of a checkpoint, its tree of arrays with shapes, dtypes and sizes, and the total size.

    Args:
        path: The checkpoint.
        verify: Whether to read the arrays and verify their checksums.
        out: Where to print.

    Raises:
        CheckpointError: The checkpoint cannot be used; with ``verify`` also if an array is damaged.
    """
    with open_source(path) as source:
        for name, value in source.info.items():
            if name != "containers":  # a long entry of the earliest files, which nothing reads any more
                print(f"{printable(name):<10}{shown(value)}", file=out)
        print(file=out)
        before: tuple[str | int, ...] = ()
        for leaf in source.leaves.values():
            for depth, part in enumerate(leaf.path):
                if leaf.path[: depth + 1] == before[: depth + 1]:
                    continue
                last = depth == len(leaf.path) - 1
                about = f"  {describe_leaf(leaf)}  {human_size(leaf.bytes)}" if last else ""
                print(f"{'  ' * depth}{printable(str(part))}{about}", file=out)
            before = leaf.path
        size = human_size(sum(leaf.bytes for leaf in source.leaves.values()))
        print(f"\n{len(source.leaves)} arrays, {size}", file=out)
        if verify:
            source.verify()
            print("every checksum agrees", file=out)
