"""The model summary: what its modules hold, what is trained, and the optimizer memory."""

import contextlib
import contextvars
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from trainer.core.checks import check_count
from trainer.core.flops import flops_by_scope
from trainer.core.modes import in_training_mode
from trainer.core.module_views import called_through, modules_of
from trainer.core.objective import call_objective, check_loss_fn
from trainer.core.tree_paths import leaf_path
from trainer.errors import ArgumentError
from trainer.state import TrainState
from trainer.types import Batch, LossFn


def summarize(
    state: TrainState, depth: int | None = None, *, loss_fn: LossFn | None = None, batch: Batch | None = None
) -> str:
    """Returns a printable table with a line for each module. Nothing is computed.

    The line of a module includes its submodules. "state" are variables that no optimizer updates: batch statistics,
    RNG counts, and params frozen by ``wrt``. "optimizer" is the optimizer state of the module's params.

    Args:
        state: The state, of arrays or `jax.ShapeDtypeStruct`.
        depth: How many levels of attributes to show, counting the model itself; None for all.
        loss_fn: The objective; with ``batch``, the operations of its forward pass are counted per module.
        batch: Arrays, or `jax.ShapeDtypeStruct`. "flops" counts a multiplication and an addition as two.

    Raises:
        ArgumentError: ``depth`` is not positive, or only one of ``loss_fn`` and ``batch`` is given.

    Example:
        >>> import optax
        >>> model = nnx.Sequential(nnx.Linear(4, 8, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(8, 2, rngs=nnx.Rngs(1)))
        >>> print(summarize(TrainState.create(model, optax.adam(1e-3), rng=jax.random.key(0))))
        module    type        trained  bytes  state  bytes  optimizer bytes
        .         Sequential       58    232      0      0              468
        layers/0  Linear           40    160      0      0              320
        layers/2  Linear           18     72      0      0              144
    """
    if (loss_fn is None) != (batch is None):
        raise ArgumentError("the operations of a model are those of an objective on a batch; pass both, or neither.")
    counted = {} if loss_fn is None else _flops(loss_fn, state, batch)
    if depth is not None:
        depth = check_count(depth, "depth")
    trees = {name: _leaves(getattr(state, name)) for name in ("params", "model_state")}
    kept = _leaves(state.opt_state)
    paths = list(trees["params"])
    heading = ("module", "type", "trained", "bytes", "state", "bytes", "optimizer bytes")
    rows: list[tuple[str, ...]] = [(*heading, "flops") if counted else heading]
    for path, kind in _modules(state):
        level = len(path) + 1
        if depth is not None and level > depth:
            continue
        name = "/".join(map(str, path))
        own = {tree: [leaf for where, leaf in held.items() if _is_below(where, name)] for tree, held in trees.items()}
        below = [where for where in paths if _is_below(where, name)]
        moments = [leaf for where, leaf in kept.items() if not name or any(_ends(where, one) for one in below)]
        counts = [*_sizes(own["params"]), *_sizes(own["model_state"]), _sizes(moments)[1]]
        if counted:
            counts.append(round(sum(count for where, count in counted.items() if not name or _is_at(where, name))))
        rows.append((name or ".", kind, *(f"{count:,}" for count in counts)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) if index < 2 else cell.rjust(width) for index, (cell, width) in enumerate(cells))
        for cells in (zip(row, widths, strict=True) for row in rows)
    )


def _flops(loss_fn: LossFn, state: TrainState, batch: Any) -> dict[str, float]:
    """Returns the operations of the forward pass in training mode, by the path of the innermost enclosing module."""
    check_loss_fn(loss_fn)

    def forward(state: TrainState, batch: Batch) -> jax.Array:
        model = in_training_mode(state.model())
        with _scoped_by_module(model):
            return call_objective(loss_fn, model, batch, state.rng, state.step)[0]

    traced = jax.make_jaxpr(forward)(state, batch)
    counted: dict[str, float] = {}
    for scopes, count in flops_by_scope(traced.jaxpr).items():
        within = _SCOPE.findall(scopes)
        counted[within[-1] if within else ""] = counted.get(within[-1] if within else "", 0.0) + count
    return counted


@contextlib.contextmanager
def _scoped_by_module(model: Any) -> Iterator[None]:
    """A context in which the operations of a module are in a name scope with its path."""
    modules = modules_of(model)
    paths = {id(module): "/".join(map(str, path)) for path, module in modules.items()}
    token = _PATHS.set(paths)
    try:
        with called_through((module, _scoped) for module in modules.values()):
            yield
    finally:
        _PATHS.reset(token)


def _scoped(call: Callable[..., Any], module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with jax.named_scope(f"module[{_PATHS.get().get(id(module), '')}]"):
        return call(module, *args, **kwargs)


_PATHS: contextvars.ContextVar[dict[int, str]] = contextvars.ContextVar("paths")
_SCOPE = re.compile(r"module\[([^\]]*)\]")


def _modules(state: TrainState) -> Iterator[tuple[tuple[Any, ...], str]]:
    """Yields the path and the class of each module that holds a variable, the model first."""
    held = [*_leaves(state.params), *_leaves(state.model_state)]
    model = state.graphdef.merge([jax.ShapeDtypeStruct((), np.float32)] * len(state.graphdef.paths))
    modules = ((tuple(path), module) for path, module in nnx.iter_modules(model))
    found = {path: type(module).__name__ for path, module in modules if not isinstance(module, nnx.List | nnx.Dict)}
    for path in sorted(found, key=lambda path: [str(part).zfill(9 * isinstance(part, int)) for part in path]):
        if any(_is_below(where, "/".join(map(str, path))) for where in held):
            yield path, found[path]


def _leaves(tree: Any) -> dict[str, Any]:
    return {leaf_path(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


def _is_at(path: str, module: str) -> bool:
    return path == module or _is_below(path, module)


def _is_below(path: str, module: str) -> bool:
    return not module or path.startswith(f"{module}/")


def _ends(path: str, param: str) -> bool:
    return f"/{path}".endswith(f"/{param}")


def _sizes(leaves: list[Any]) -> tuple[int, int]:
    return sum(leaf.size for leaf in leaves), sum(leaf.size * int(leaf.dtype.itemsize) for leaf in leaves)
