"""Counting the floating-point operations of a traced program.

`jax.extend.core` and equation parameters are not part of JAX's stable API; checked with 0.10, 0.11 and 0.12.
"""

import math
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.extend import core


def flops(jaxpr: Any) -> float:
    """Estimates the floating-point operations of a jaxpr; a multiply-add counts as two.

    Matrix products and convolutions are counted exactly, any other operation as one per entry of its result. The body
    of a `jax.shard_map` counts once for each device that runs its own. A loop of unknown length counts as one
    iteration, and so does the body of a Pallas kernel.
    """
    return sum(_count(jaxpr, lambda equation, scope: None).values())


def flops_by_scope(jaxpr: Any) -> dict[str, float]:
    """Returns the same count by `jax.named_scope`, keyed by the names of all enclosing scopes, outermost first."""
    return _count(jaxpr, lambda equation, scope: scope)


def known_flops(jaxpr: Any) -> float | None:
    """Returns `flops`, or None if a kernel hides the number: of Pallas (``pallas_call``) or foreign (``ffi_call``)."""
    return None if primitives(jaxpr) & _OPAQUE else flops(jaxpr)


def product_dtype(jaxpr: Any) -> Any:
    """Returns the dtype of the operands of at least 99 % of the operations in matrix products and convolutions.

    A product of two dtypes counts as of the wider one. None if no dtype has that share, or there are no products.
    """
    counts = _count(jaxpr, lambda equation, scope: _operands(equation) if equation.primitive.name in _COUNTED else None)
    counts.pop(None, None)
    dtype = max(counts, key=lambda name: counts[name], default=None)
    return dtype if dtype is not None and counts[dtype] >= 0.99 * sum(counts.values()) else None


def primitives(jaxpr: Any) -> set[str]:
    """Returns the names of all primitives in a jaxpr, including those in loops and branches."""
    names = {equation.primitive.name for equation in jaxpr.eqns}
    return names.union(*(primitives(body) for equation in jaxpr.eqns for body in _bodies(equation)))


def _bodies(equation: Any) -> list[Any]:
    """Returns the jaxprs that an equation runs: the body of a loop, the branches of a conditional."""
    values = (value if isinstance(value, list | tuple) else (value,) for value in equation.params.values())
    programs = (one for several in values for one in several if isinstance(one, core.ClosedJaxpr | core.Jaxpr))
    return [getattr(program, "jaxpr", program) for program in programs]


def _count(jaxpr: Any, key: Callable[[Any, str], Any], outer: str = "") -> dict[Any, float]:
    """Returns the operations by the key of their equation; the key takes the equation and the names of its scopes."""
    total: dict[Any, float] = {}
    for equation in jaxpr.eqns:
        scope = f"{outer}/{equation.source_info.name_stack}"
        inner = [_count(body, key, scope) for body in _bodies(equation)]
        if not inner:
            inner = [{key(equation, scope): _COUNTED.get(equation.primitive.name, _entries)(equation)}]
        elif equation.primitive.name == "cond":
            inner = [max(inner, key=lambda branch: sum(branch.values()))]
        for counts in inner:
            for name, count in counts.items():
                total[name] = total.get(name, 0.0) + count * _passes(equation)
    return total


def _operands(equation: Any) -> Any:
    return jnp.promote_types(*(variable.aval.dtype for variable in equation.invars[:2]))


def _passes(equation: Any) -> int:
    """Returns how often the body of an equation runs; that of a `shard_map`, once for each place on its manual axes."""
    if equation.primitive.name == "shard_map":
        sizes = equation.params["mesh"].shape
        # Over its other axes the compiler splits the body, whose shapes are those of all devices. Seen in jax 0.10.2.
        return int(math.prod(sizes[axis] for axis in equation.params.get("newly_manual_axes", sizes)))
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
_OPAQUE = {"pallas_call", "ffi_call"}
