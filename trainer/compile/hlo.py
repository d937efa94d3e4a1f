"""Counts the collectives in the text of a compiled program.

XLA does not specify this text, which says nothing if it changes: collectives would then not be found. The regular
expressions are for that of jaxlib 0.10.2; `tests/compile/test_hlo.py` compares counts with known programs.
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterator

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one run of a program.

    Attributes:
        count: The number executed.
        bytes: The sum of their sizes on one device, of the operands or the results, whichever is
            larger. In a ring of n devices, (n-1)/n of it leaves a device; twice that for an all-reduce.
    """

    count: int
    bytes: int


def collectives(program: str) -> dict[str, Traffic]:
    """Counts the collectives of a compiled program.

    A collective in a loop counts once per iteration if the compiler knows the trip count, otherwise once.

    Args:
        program: Optimized HLO as text, ``jax.jit(f).lower(...).compile().as_text()``.

    Returns:
        The traffic by kind, in alphabetical order, without kinds that do not occur.
    """
    computations = dict(_computations(program))
    runs = Counter({name: 1 for name, (is_entry, _) in computations.items() if is_entry})
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    # HLO defines a computation before its callers, so in reverse order all runs of a computation are already counted.
    for name, (_, lines) in reversed(computations.items()):
        results: dict[str, int] = {}
        for line in lines:
            instruction = _INSTRUCTION.match(line)
            if instruction is None:
                continue
            target, type_, operation, rest = instruction.groups()
            results[target] = _size(type_)
            # An asynchronous pair counts at its `-done`, because the result type of `-start` repeats the operands.
            kind = operation.removesuffix("-done")
            if kind in KINDS:
                operands = sum(results.get(operand, 0) for operand in re.findall(r"%([\w.\-]+)", rest.split(")")[0]))
                counts[kind] += runs[name]
                sizes[kind] += runs[name] * (results[target] if kind != operation else max(results[target], operands))
            elif operation not in ("async-update", "async-done"):
                for called in _called(rest):
                    runs[called] += runs[name] * _trips(operation, rest)
    return {kind: Traffic(counts[kind], sizes[kind]) for kind in sorted(counts) if counts[kind]}


_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.\-]+) = (.+?) ([\w\-]+)\((.*)$")
_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.\-]+) .*\{$")


def _computations(program: str) -> Iterator[tuple[str, tuple[bool, list[str]]]]:
    """Yields each computation's name, whether it is the entry, and its lines."""
    lines: list[str] = []
    for line in program.splitlines():
        if start := _COMPUTATION.match(line):
            lines = []
            yield start[2], (start[1] is not None, lines)
        else:
            lines.append(line)


def _called(rest: str) -> list[str]:
    single = re.findall(r"(?:body|condition|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)", rest)
    several = re.findall(r"(?:branch_computations|called_computations)=\{([^}]*)\}", rest)
    return single + [name.strip(" %") for names in several for name in names.split(",")]


def _trips(operation: str, rest: str) -> int:
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest) if operation == "while" else None
    return int(known[1]) if known else 1


def _size(type_: str) -> int:
    """Returns the bytes of an HLO type, such as ``(f32[8,2]{1,0}, pred[])``."""
    bits = 0
    for dtype, shape in re.findall(r"\b([a-z]+\d*\w*)\[([\d,]*)\]", type_):
        entries = math.prod(int(length) for length in shape.split(",") if length)
        width = re.search(r"\d+", dtype)
        bits += entries * (8 if dtype == "pred" else int(width[0]) if width else 0)
    return bits // 8
