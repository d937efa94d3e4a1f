"""What a step would cost on devices that are not there: memory and communication, before anything runs.

A step can be compiled for a mesh of CPU devices that exist in name only, which is enough to see what
the compiler makes of it. Say how many there are before JAX starts, and put nothing on them::

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 64)
    mesh = make_mesh({"data": -1, "fsdp": 8})
    state = abstract_state(model_fn, optimizer, rng=jax.random.key(0), mesh=mesh)
    print(plan(make_train_step(loss_fn, optimizer), state, batch_shapes))
"""

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import jax

from trainer.sharding import bytes_per_device, jit_step, shardings_of

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind in one run of a program.

    Attributes:
        count: How many are executed.
        bytes: The sum of their sizes on one device, of the operands or of the results, whichever are
            larger. Over n devices in a ring, (n-1)/n of it leaves a device, for an all-reduce twice that.
    """

    count: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one device needs for a step. All sizes are bytes on one device.

    Attributes:
        mesh: Names and sizes of the axes.
        state: The training state.
        arguments: All arguments: the state, and this device's part of the batch.
        outputs: All results. Those that take over the memory of a donated argument are counted
            in ``aliased`` too.
        aliased: Results in the memory of arguments.
        temporary: Everything in between, activations and gathered params above all. The compiler for
            CPUs schedules and fuses differently from those for GPUs and TPUs, so compare plans with
            plans, and not with the memory of an accelerator to the last percent.
        collectives: By kind.
    """

    mesh: dict[str, int]
    state: int
    arguments: int
    outputs: int
    aliased: int
    temporary: int
    collectives: dict[str, Traffic]

    @property
    def total(self) -> int:
        """The memory that a device needs while the step runs."""
        return self.arguments + self.outputs - self.aliased + self.temporary

    def __str__(self) -> str:
        rows = [(name, f"{getattr(self, name):,}") for name in ("state", "arguments", "temporary", "total")]
        rows += [(kind, f"{traffic.bytes:,} in {traffic.count}") for kind, traffic in self.collectives.items()]
        names, sizes = (max(map(len, column)) for column in zip(*rows, strict=True))
        mesh = " x ".join(f"{name} {size}" for name, size in self.mesh.items())
        lines = [f"{name:<{names}}  {size:>{sizes}}" for name, size in rows]
        return "\n".join([f"bytes on each of {math.prod(self.mesh.values())} devices ({mesh})", *lines])


def plan(step: Callable[..., Any], state: Any, batch: Any, batch_sharding: Any = None) -> Plan:
    """Compiles a train step and tells what it needs, without running it.

    Args:
        step: ``(state, batch) -> (state, metrics)``, see `trainer.make_train_step`.
        state: A state with shardings, usually `trainer.sharding.abstract_state`.
        batch: The global batch, of arrays or `jax.ShapeDtypeStruct`.
        batch_sharding: See `trainer.sharding.jit_step`, which compiles the step.

    Raises:
        ArgumentTypeError: A leaf of ``state`` is on no mesh.
        BatchError: The batch cannot be split evenly, see `trainer.sharding.check_batch_fits`.
    """
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), batch)
    compiled = jit_step(step, state, batch_sharding).lower(state, shapes).compile()
    memory = compiled.memory_analysis()
    return Plan(
        mesh=dict(jax.tree.leaves(shardings_of(state))[0].mesh.shape),
        state=bytes_per_device(state),
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased=memory.alias_size_in_bytes,
        temporary=memory.temp_size_in_bytes,
        collectives=collectives(compiled.as_text()),
    )


def collectives(program: str) -> dict[str, Traffic]:
    """Counts the collectives of a compiled program.

    Those in a loop count as often as it runs, where the compiler knows that; else once.

    Args:
        program: Its text, ``jax.jit(f).lower(...).compile().as_text()``.

    Returns:
        The traffic of each kind that occurs, in the order of the alphabet.
    """
    computations = dict(_computations(program))
    runs = Counter({name: 1 for name, (is_entry, _) in computations.items() if is_entry})
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    # A computation is defined before it is called, so going backwards its callers are known.
    for name, (_, lines) in reversed(computations.items()):
        results: dict[str, int] = {}
        for line in lines:
            instruction = _INSTRUCTION.match(line)
            if instruction is None:
                continue
            target, type_, operation, rest = instruction.groups()
            results[target] = _size(type_)
            # Of an asynchronous pair the end counts: the type of the start repeats the operands.
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
    """Yields the name of each computation, whether the program starts there, and its lines."""
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
