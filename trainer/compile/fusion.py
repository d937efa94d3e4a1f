"""How many steps are worth one call, judged by what a step computes and not by a clock.

A call from Python costs about as much as ten million floating-point operations on a CPU, and a little
more for every array of the state; steps that compute not much more are worth fusing. The judgement looks at
the traced step alone, so that it is the same in every run: XLA rounds some programs differently inside
of a loop, and a run that was timed in a busy moment must not learn something else.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core

# Floating-point operations of one call, less than a second of work, so that Ctrl-C is obeyed soon. Beside
# what a call costs, a loop on the CPU spares what is paid for fresh memory at every call.
_FLOPS_PER_CALL = {"cpu": 2e10, "gpu": 1e12, "tpu": 1e12}
_MOST_STEPS = 128
# The batches of a call, little enough to stay in a cache while they are made and used.
_MOST_BYTES = 8 * 2**20

# XLA's CPU backend runs these several times slower inside of a loop: there it has no threads for them.
_SLOW_IN_LOOPS = {"cpu": {"conv_general_dilated"}}


def steps_worth_fusing(step: core.ClosedJaxpr, batch_bytes: int, platform: str) -> int:
    """Returns how many steps one call should run where nothing else limits it.

    Args:
        step: The traced step.
        batch_bytes: The size of a batch; those of one call are held at a time.
        platform: "cpu", "gpu" or "tpu".
    """
    if _primitives(step.jaxpr) & _SLOW_IN_LOOPS.get(platform, set()):
        return 1
    by_work = _FLOPS_PER_CALL.get(platform, 1e12) / max(flops(step.jaxpr), 1.0)
    by_memory = _MOST_BYTES / max(batch_bytes, 1)
    return max(1, int(min(by_work, by_memory, _MOST_STEPS)))


def flops(jaxpr: Any) -> float:
    """Estimates the floating-point operations of a traced program, a multiplication and an addition as two.

    Matrix products and convolutions are counted exactly, anything else as one for an entry of its
    result. A loop whose length is not known counts as one pass.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        below = [flops(inner) for inner in _inner(equation)]
        if below:
            total += max(below) if equation.primitive.name == "cond" else sum(below) * _passes(equation)
        else:
            total += _COUNTED.get(equation.primitive.name, _entries)(equation)
    return total


def as_function(traced: Any) -> Callable[..., Any]:
    """Returns what ``jax.jit(function).trace(...)`` traced as a function, which need not be traced again."""
    run = core.jaxpr_as_fun(traced.jaxpr)
    structure = jax.tree.structure(traced.out_info)
    return lambda *args: jax.tree.unflatten(structure, run(*jax.tree.leaves(args)))


def _inner(equation: Any) -> list[Any]:
    """Returns the programs that an equation runs."""
    values = (value if isinstance(value, list | tuple) else (value,) for value in equation.params.values())
    programs = (one for several in values for one in several if isinstance(one, core.ClosedJaxpr | core.Jaxpr))
    return [getattr(program, "jaxpr", program) for program in programs]


def _primitives(jaxpr: Any) -> set[str]:
    names = {equation.primitive.name for equation in jaxpr.eqns}
    return names.union(*(_primitives(inner) for equation in jaxpr.eqns for inner in _inner(equation)))


def _passes(equation: Any) -> int:
    return int(equation.params.get("length", 1)) if equation.primitive.name == "scan" else 1


def _entries(equation: Any) -> float:
    return float(sum(math.prod(variable.aval.shape) for variable in equation.outvars))


def _product(equation: Any) -> float:
    (contracted, _), _ = equation.params["dimension_numbers"]
    shape = equation.invars[0].aval.shape
    return float(2 * _entries(equation) * math.prod(shape[axis] for axis in contracted))


def _convolution(equation: Any) -> float:
    kernel = equation.invars[1].aval.shape
    out_channels = kernel[equation.params["dimension_numbers"].rhs_spec[0]]
    return float(2 * _entries(equation) * math.prod(kernel) / out_channels)


_COUNTED = {"dot_general": _product, "conv_general_dilated": _convolution}


class FusionPolicy:
    advise_at = 10

    def fusable_steps(self, jaxpr, size, platform):
        return steps_worth_fusing(jaxpr, size, platform)
