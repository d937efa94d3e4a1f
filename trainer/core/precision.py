"""Mixed precision: a model computes in half precision while its state stays in float32."""

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from trainer.core.checks import check_count
from trainer.core.module_views import (
    View,
    called_through,
    is_of_nnx,
    modules_of,
    no_view,
    owner_matches,
    raw_value,
    refuse_unmatched,
)
from trainer.core.nnx_bridge import Path, nest
from trainer.core.other_names import PRECISIONS
from trainer.core.path_patterns import check_pattern
from trainer.errors import ArgumentError, ArgumentTypeError, warn
from trainer.types import MODEL_OUTPUTS

DTYPES = ("float32", "bfloat16", "float16")


@dataclasses.dataclass(frozen=True)
class Precision:
    """The dtypes in which a model computes; its params and the optimizer state keep the dtype of the state.

    With the cast c to ``compute`` and the cast o to ``output``, the objective sees the model f(x; θ) as
    o(f(c(x); c(θ))). The gradient is taken at θ and has the dtype of θ (Micikevicius et al. 2018, "Mixed Precision
    Training"; the three dtypes match a policy of DeepMind's ``jmp``):

    * Floating params and other floating arrays of the model are cast inside the differentiated function, except batch
      statistics (`nnx.BatchStat`). Variables assigned in the forward pass are cast back to the dtype of the state;
      all others stay bit-identical. An assigned variable of another kind, such as an average, was computed in
      ``compute``: this causes a warning, and an entry in ``exceptions`` keeps the variable in float32.
    * Each module casts its floating inputs. Flax layers do so through their ``dtype`` if it is None, and an `nnx.Embed`
      also if it equals the dtype of its table. Embeddings are cast after the lookup, so that the gradient of the table
      is summed in float32. A layer created with a dtype keeps it, as does `nnx.SimpleCell`, which sets float32 itself.
      (`nnx.LSTMCell` and `nnx.GRUCell` compute their products in ``compute`` and keep their carry in float32.)
    * The result of calling the model itself is cast to ``output``. Results of its other methods are not cast.
    * The objective gets the batch unchanged, so targets, masks and weights keep full precision; its loss and floating
      metrics are float32.

    Some products still have another dtype if a function outside any module combines params with float32 arrays that it
    creates: use arrays of ``x.dtype``, or make it a module. If a module indexes a table directly, the gradient of the
    table is summed in ``compute``, which is slow and loses small terms: make the table an `nnx.Embed`.

    Attributes:
        compute: The dtype of computation: "float32", "bfloat16" or "float16".
        output: The dtype of the result of calling the model.
        inputs: The dtype to which floating entries of the batch are cast before the objective sees them, for
            objectives that compute with them outside of modules; None for no cast.
        exceptions: Other dtypes by path of a module or variable: ``{"head/**": "float32"}``. Patterns are as in
            `trainer.by_path`; one that matches a module applies to everything in it. The first match decides.
        initial_scale: For "float16", the loss scale of the first step; see `trainer.core.loss_scale`.
        growth_interval: For "float16", the number of consecutive finite steps after which the loss scale doubles.

    Raises:
        ArgumentError: A dtype, a pattern or a number is invalid. A step raises it while it is traced if a pattern
            matches nothing in the model.
    """

    compute: str
    output: str = "float32"
    inputs: str | None = None
    exceptions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    initial_scale: float = 2.0**15
    growth_interval: int = 2000

    def __post_init__(self) -> None:
        for name in ("compute", "output", "inputs"):
            value = getattr(self, name)
            if value is not None or name != "inputs":
                object.__setattr__(self, name, _dtype_name(value, f"Precision.{name}"))
        if not isinstance(self.exceptions, Mapping):
            raise ArgumentTypeError(
                f"`Precision.exceptions` is of type {type(self.exceptions).__name__}; it must map patterns of paths to "
                f"dtypes, such as {{'head/**': 'float32'}}."
            )
        exceptions = {
            check_pattern(pattern, "Precision.exceptions"): _dtype_name(dtype, f"Precision.exceptions[{pattern!r}]")
            for pattern, dtype in self.exceptions.items()
        }
        object.__setattr__(self, "exceptions", exceptions)
        scale = self.initial_scale
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < float("inf"):
            raise ArgumentError(f"`Precision.initial_scale` is {scale!r}; it must be a positive number, such as 2**15.")
        check_count(self.growth_interval, "Precision.growth_interval")

    @property
    def has_loss_scale(self) -> bool:
        """Whether the loss is scaled, to keep gradients above 6e-8, the smallest float16 number."""
        return "float16" in (self.compute, *self.exceptions.values())

    @property
    def is_plain(self) -> bool:
        """Whether all dtypes are float32, the same as no `Precision`."""
        return {self.compute, self.output, self.inputs or "float32", *self.exceptions.values()} == {"float32"}

    def dtype_at(self, path: Path) -> str:
        """Returns the dtype in which a module or variable computes."""
        return next((dtype for pattern, dtype in self.exceptions.items() if owner_matches(pattern, path)), self.compute)


def as_precision(precision: str | Precision | None) -> Precision | None:
    """Returns the `Precision` of a ``precision`` argument; None if it changes nothing.

    Raises:
        ArgumentError: It is not the name of a dtype; if it is of another type, `ArgumentTypeError`.
    """
    if precision is None:
        return None
    if not isinstance(precision, Precision):
        precision = Precision(_dtype_name(precision, "precision"))
    return None if precision.is_plain else precision


def in_precision(precision: Precision | None) -> View:
    """Returns the view of a model that computes in a precision."""
    if precision is None:
        return no_view

    @contextlib.contextmanager
    def enter(model: Any) -> Iterator[None]:
        modules = modules_of(model)
        wrappers: list[tuple[Any, Any]] = [
            (module, _Cast(precision.dtype_at(path), None if path else precision.output))
            for path, module in modules.items()
            if not path or not _casts_by_itself(module)
        ]
        unset = {path: module for path, module in modules.items() if _has_no_dtype(module)}
        wrappers += [
            (module, _Lookup(precision.dtype_at(path)))
            for path, module in unset.items()
            if path and isinstance(module, nnx.Embed) and _casts_by_itself(module)
        ]
        dtypes = [(module, precision.dtype_at(path)) for path, module in unset.items()]
        with _cast_variables(model, precision, modules), _with_dtypes(dtypes), called_through(wrappers):
            yield

    return enter


def objective_in(precision: Precision | None, loss_fn: Any) -> Any:
    """Returns an objective with float32 loss and floating metrics, on a batch cast to ``precision.inputs``."""
    if precision is None:
        return loss_fn

    @functools.wraps(loss_fn)
    def objective(model: Any, batch: Any, rng: Any, step: Any) -> Any:
        result = loss_fn(model, batch_in(precision, batch), rng, step)
        if not isinstance(result, tuple) or len(result) != 2 or not isinstance(result[1], Mapping):
            return result  # `call_objective` raises
        loss, metrics = result
        # Extensions get the model outputs uncast.
        wide = {name: value if name == MODEL_OUTPUTS else _widened(value) for name, value in metrics.items()}
        total = _widened(loss)
        return total, {**wide, "loss": total} if metrics.get("loss") is loss else wide

    return objective


def batch_in(precision: Precision | None, batch: Any) -> Any:
    """Returns the batch with floating entries cast to ``precision.inputs``."""
    if precision is None or precision.inputs is None:
        return batch
    return _cast(batch, precision.inputs)


@dataclasses.dataclass(frozen=True)
class _Cast:
    """The wrapper that casts the inputs and outputs of a module."""

    inputs: str
    outputs: str | None

    def __call__(self, call: Callable[..., Any], module: Any, args: Any, kwargs: Any) -> Any:
        args, kwargs = _cast((args, kwargs), self.inputs)
        outputs = call(module, *args, **kwargs)
        return outputs if self.outputs is None else _cast(outputs, self.outputs)


@dataclasses.dataclass(frozen=True)
class _Lookup:
    """The wrapper that reads rows of a table in float32, and returns them in another dtype.

    The rows are the same. Their gradients, many per row of a small table, are summed in float32: in half precision the
    sum loses small terms, and a GPU adds them one at a time, which took as long as the whole model.
    """

    outputs: str

    def __call__(self, call: Callable[..., Any], module: Any, args: Any, kwargs: Any) -> Any:
        with _with_dtypes([(module, "float32")]):
            return _cast(call(module, *args, **kwargs), self.outputs)


@contextlib.contextmanager
def _cast_variables(model: Any, precision: Precision, modules: Mapping[Path, Any]) -> Iterator[None]:
    """Casts the arrays of a model; on exit assigned arrays are cast back, and others are restored exactly."""
    leaves = dict(nnx.flatten(model, graph=True)[1])
    for pattern in precision.exceptions:
        if not any(owner_matches(pattern, path) for path in (*leaves, *modules)):
            refuse_unmatched("Precision.exceptions", pattern, (*modules, *leaves))
    before = {path: raw_value(leaf) for path, leaf in leaves.items()}
    during = {
        path: value if isinstance(leaves[path], nnx.BatchStat) else _cast(value, precision.dtype_at(path))
        for path, value in before.items()
    }
    _assign(model, {path: value for path, value in during.items() if value is not before[path]})
    yield
    after = {path: raw_value(leaf) for path, leaf in nnx.flatten(model, graph=True)[1] if path in before}
    assigned = {path: value for path, value in after.items() if value is not during[path]}
    unchanged = {path: before[path] for path, value in after.items() if value is during[path] is not before[path]}
    _assign(model, {path: _like(value, before[path]) for path, value in assigned.items()} | unchanged)
    rounded = [
        "/".join(map(str, path))
        for path in assigned
        if during[path] is not before[path] and not isinstance(leaves[path], nnx.Param | nnx.Cache)
    ]
    if rounded:
        warn(
            f"the forward pass assigned `{'`, `'.join(rounded[:5])}`, computed in {precision.dtype_at(())}: an average "
            f"over steps may stand still in it. Precision(..., exceptions={{{rounded[0]!r}: 'float32'}}) keeps float32."
        )


@contextlib.contextmanager
def _with_dtypes(unset: Iterable[tuple[Any, str]]) -> Iterator[None]:
    """Sets the ``dtype`` of layers temporarily."""
    held = [(module, module.dtype, dtype) for module, dtype in unset]
    try:
        for module, _, dtype in held:
            module.dtype = jnp.dtype(dtype)
        yield
    finally:
        for module, dtype, _ in held:
            module.dtype = dtype


def _has_no_dtype(module: Any) -> bool:
    """Returns whether a Flax layer infers the dtype of its computation."""
    layer = any(kind.__module__.startswith("flax.nnx.nn.") for kind in type(module).__mro__)
    if not layer or "dtype" not in vars(module):
        return False
    # An `nnx.Embed` without a dtype uses that of its table.
    inferred = isinstance(module, nnx.Embed) and jnp.dtype(module.dtype) == jnp.dtype(module.param_dtype)
    return module.dtype is None or inferred


def _casts_by_itself(module: Any) -> bool:
    """Returns whether a module casts its inputs, or passes them to modules that do: all of Flax except Linen."""
    return type(module).__module__.startswith("flax.") and not isinstance(module, nnx.bridge.ToNNX)


def _cast(tree: Any, dtype: str) -> Any:
    """Returns a tree with its floating arrays cast to a dtype; modules and variables in it are unchanged."""
    return jax.tree.map(lambda leaf: _as(leaf, dtype) if _is_floating(leaf) else leaf, tree, is_leaf=is_of_nnx)


def _widened(tree: Any) -> Any:
    def widen(leaf: Any) -> Any:
        return _as(leaf, "float32") if _is_floating(leaf) and leaf.dtype.itemsize < 4 else leaf

    return jax.tree.map(widen, tree, is_leaf=is_of_nnx)


def _like(value: Any, before: Any) -> Any:
    structures: list[Any] = [jax.tree.structure(tree) for tree in (value, before)]
    if structures[0] != structures[1]:
        return value  # `merge_updated` raises
    return jax.tree.map(
        lambda new, old: _as(new, old.dtype) if _is_floating(new) and _is_floating(old) else new, value, before
    )


def _as(leaf: Any, dtype: Any) -> Any:
    return leaf if leaf.dtype == dtype else jnp.asarray(leaf).astype(dtype)


def _is_floating(leaf: Any) -> bool:
    # Eight-bit floats come from the model's own quantization.
    is_array = isinstance(leaf, jax.Array | np.ndarray | np.generic)
    return is_array and jnp.issubdtype(leaf.dtype, jnp.floating) and leaf.dtype.itemsize > 1


def _assign(model: Any, values: Mapping[Path, Any]) -> None:
    if values:
        nnx.update(model, nnx.State(nest(dict(values))))


def _dtype_name(dtype: Any, argument: str) -> str:
    if isinstance(dtype, str) and dtype in DTYPES:
        return dtype
    try:
        name = "" if isinstance(dtype, str) else str(jnp.dtype(dtype).name)
    except TypeError:
        name = ""
    if name in DTYPES:
        return name
    kind = ArgumentError if isinstance(dtype, str) else ArgumentTypeError
    known = PRECISIONS.get(dtype) if isinstance(dtype, str) else None
    hint = "" if known is None else f" Here it is {known!r}."
    raise kind(f"`{argument}` is {dtype!r:.60}; it must be one of {', '.join(map(repr, DTYPES))}.{hint}")
