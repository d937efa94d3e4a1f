"""Counting the floating-point operations of a traced program.

`jax.extend.core` and equation parameters are not part of JAX's stable API; checked with 0.10, 0.11 and 0.12.
"""

import math
from typing import Any

from jax.extend import core


def flops(jaxpr: Any) -> float:
    """Estimates the floating-point operations of a jaxpr; a multiply-add counts as two.

    Matrix products and convolutions are counted exactly, any other operation as one per entry of its result. A loop of
    unknown length counts as one iteration, and so does the body of a Pallas kernel.
    """
    return sum(flops_by_scope(jaxpr).values())


def flops_by_scope(jaxpr: Any, outer: str = "") -> dict[str, float]:
    """Returns the same count by `jax.named_scope`, keyed by the names of all enclosing scopes, outermost first."""
    total: dict[str, float] = {}
    for equation in jaxpr.eqns:
        scope = f"{outer}/{equation.source_info.name_stack}"
        inner = [flops_by_scope(body, scope) for body in _bodies(equation)]
        if not inner:
            inner = [{scope: _COUNTED.get(equation.primitive.name, _entries)(equation)}]
        elif equation.primitive.name == "cond":
            inner = [max(inner, key=lambda branch: sum(branch.values()))]
        for counts in inner:
            for name, count in counts.items():
                total[name] = total.get(name, 0.0) + count * _passes(equation)
    return total


def primitives(jaxpr: Any) -> set[str]:
    """Returns the names of all primitives in a jaxpr, including those in loops and branches."""
    names = {equation.primitive.name for equation in jaxpr.eqns}
    return names.union(*(primitives(body) for equation in jaxpr.eqns for body in _bodies(equation)))


def _bodies(equation: Any) -> list[Any]:
    """Returns the jaxprs that an equation runs: the body of a loop, the branches of a conditional."""
    values = (value if isinstance(value, list | tuple) else (value,) for value in equation.params.values())
    programs = (one for several in values for one in several if isinstance(one, core.ClosedJaxpr | core.Jaxpr))
    return [getattr(program, "jaxpr", program) for program in programs]


def _passes(equation: Any) -> int:
    """Returns how often the body of an equation runs; the body of a `shard_map` runs on every device of its mesh."""
    if equation.primitive.name == "shard_map":
        return int(math.prod(equation.params["mesh"].shape.values()))
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
