"""Turns, medians and tables: how every benchmark here measures and reports.

Contenders run in one process and in turns, every other turn in reverse order, so that other load on the machine affects
all of them alike. A time is the median over the turns. A ratio is the median over the turns of the quotients within a
turn. The ratios are what counts: times are those of one machine on one day.
"""

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

Contender = Callable[[], float]
"""Works for a while, and returns the seconds that one unit of the work took."""


def per(units: int, work: Callable[[], object]) -> Contender:
    """Makes a contender of ``work``, which does a number of units and returns when they are done."""

    def seconds() -> float:
        start = time.perf_counter()
        work()
        return (time.perf_counter() - start) / units

    return seconds


def in_turns(contenders: Mapping[str, Contender], repeats: int) -> dict[str, list[float]]:
    """Returns the seconds of each contender in each turn, after one turn that compiles and is not counted."""
    for contender in contenders.values():
        contender()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(repeats):
        for name in list(contenders) if turn % 2 == 0 else reversed(contenders):
            times[name].append(contenders[name]())
    return times


def ratio(times: Sequence[float], baseline: Sequence[float]) -> float:
    """Returns the time as a multiple of that of the baseline."""
    return statistics.median(a / b for a, b in zip(times, baseline, strict=True))


def fastest(times: Mapping[str, Sequence[float]], names: Sequence[str]) -> str:
    """Returns which of ``names`` was the fastest, the first of equals."""
    return min(names, key=lambda name: statistics.median(times[name]))


def compared(
    times: Mapping[str, Sequence[float]], unit: str, scale: float, baselines: Mapping[str, str]
) -> list[dict[str, object]]:
    """Makes rows for `Report.table`.

    Args:
        times: What `in_turns` returned.
        unit: The heading of the column of times.
        scale: The number of these units in a second.
        baselines: The contender that a column of ratios refers to, by the heading of the column.
    """
    return [
        {
            "what": name,
            unit: statistics.median(seconds) * scale,
            **{heading: ratio(seconds, times[baseline]) for heading, baseline in baselines.items()},
            "turns": [value * scale for value in seconds],
        }
        for name, seconds in times.items()
    ]


class Report:
    """The command line of a benchmark, the tables that it prints, and the file that holds them.

    Attributes:
        quick: Whether to do little work, as a check that everything runs; the figures then mean nothing.
        repeats: The number of turns.
        options: All of the parsed command line.
    """

    def __init__(self, description: str, repeats: int, options: Mapping[str, Mapping[str, object]] | None = None):
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--repeats", type=int, help=f"turns of every contender ({repeats} if left out)")
        parser.add_argument("--quick", action="store_true", help="little work and two turns: does it run?")
        parser.add_argument("--json", type=Path, metavar="PATH", help="write the tables there as well")
        for name, settings in (options or {}).items():
            parser.add_argument(name, **settings)
        self.options = parser.parse_args()
        self.quick = self.options.quick
        self.repeats = self.options.repeats or (2 if self.quick else repeats)
        self._tables: dict[str, list[dict[str, object]]] = {}

    def table(self, title: str, rows: list[dict[str, object]]) -> None:
        """Prints rows of the same columns; values that are lists go only into the file."""
        self._tables[title] = rows
        columns = [name for name, value in rows[0].items() if not isinstance(value, list)]
        cells = [columns, *([_text(row[name]) for name in columns] for row in rows)]
        widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
        print(f"\n{title}{' (quick: figures mean nothing)' if self.quick else ''}")
        for line in cells:
            first, *rest = (
                cell.ljust(width) if i == 0 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
            print("  ".join(["", first, *rest]), flush=True)

    def close(self) -> None:
        """Describes the machine, and writes the file if one was requested."""
        about = machine()
        print("\n" + ", ".join(f"{name} {value}" for name, value in about.items()))
        if self.options.json is not None:
            content = {"machine": about, "repeats": self.repeats, "quick": self.quick, "tables": self._tables}
            self.options.json.parent.mkdir(parents=True, exist_ok=True)
            self.options.json.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def machine() -> dict[str, object]:
    """Describes the machine in general words."""
    import jax

    devices = jax.devices()
    versions = {name: importlib.metadata.version(name) for name in ("jax", "flax", "optax", "numpy")}
    return {
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "devices": f"{len(devices)} {devices[0].device_kind}",
        "python": platform.python_version(),
        **versions,
    }


def _text(value: object) -> str:
    if not isinstance(value, float):
        return f"{value:,}" if isinstance(value, int) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.1f}" if abs(value) >= 100 else f"{value:.2f}"
