"""Low-rank adaptation (LoRA) of any model, by the paths of its layers."""

import copy
import functools
import math
import string
from collections.abc import Sequence
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from trainer.core.checks import check_count, check_number
from trainer.core.module_views import hidden_subclass
from trainer.core.path_patterns import check_pattern, matches, matches_nothing
from trainer.errors import ArgumentError, ArgumentTypeError
from trainer.state import check_model

ModelT = TypeVar("ModelT", bound=nnx.Module)


def add_lora(
    model: ModelT, rank: int, *, paths: str | Sequence[str] = "*", alpha: float | None = None, rngs: nnx.Rngs
) -> ModelT:
    """Returns a copy of a model whose layers have trainable low-rank factors beside their weights.

    With weights W, factors A and B of rank r = ``rank``, and α = ``alpha``, a layer computes with::

        W' = W + α/r · A B,    A: inputs x r,    B: r x outputs

    (Hu et al., https://arxiv.org/abs/2106.09685). B is initially zero, so the model starts bit-identical to the given
    one. ``wrt=nnx.LoRAParam`` trains only the factors: then W takes neither optimizer memory nor a gradient, since the
    layer computes x W + α/r · (x A) B. A convolution computes W' itself, and so the gradient of W', which is as large
    as W.

    Supported layers are `nnx.Linear`, `nnx.LinearGeneral` (the projections of `nnx.MultiHeadAttention`), `nnx.Einsum`,
    `nnx.Embed` (there A is initially zero), `nnx.Conv`, `nnx.ConvTranspose`, and subclasses that do not override
    ``__call__``. The model class needs no edit: each layer becomes an instance of a subclass of its own class, with
    `nnx.LoRAParam` ``lora_a`` and ``lora_b`` in the dtype of its weights, at least float32. All paths stay the same.

    Args:
        model: The module. It is not modified.
        rank: r.
        paths: Path patterns of layers, as in `trainer.by_path`: ``"encoder/**"``, ``["*/query", "*/value"]``.
            Every layer by default.
        alpha: α; ``rank`` if left out, a scale of one.
        rngs: The source of the initial A, drawn by `nnx.initializers.he_uniform` as in `nnx.LoRA`.

    Raises:
        ArgumentTypeError: An argument has the wrong type.
        ArgumentError: One is out of range, a pattern matches no layer, or a matching layer already has factors.

    Example:
        >>> model = nnx.Sequential(nnx.Linear(8, 16, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(16, 1, rngs=nnx.Rngs(1)))
        >>> adapted = add_lora(model, 2, paths="layers/0", rngs=nnx.Rngs(2))
        >>> jax.tree.map(jnp.shape, nnx.to_pure_dict(nnx.state(adapted, nnx.LoRAParam)))
        {'layers': {0: {'lora_a': (8, 2), 'lora_b': (2, 16)}}}
        >>> print(type(merge_lora(adapted).layers[0]).__name__)
        Linear
    """
    check_model(model)
    rank = check_count(rank, "rank")
    scale = _check_alpha(rank if alpha is None else alpha) / rank
    if not isinstance(rngs, nnx.Rngs):
        raise ArgumentTypeError(f"`rngs` is of type {type(rngs).__name__}; it must be an nnx.Rngs, as nnx.Rngs(0).")
    patterns = [paths] if isinstance(paths, str) else list(paths)
    model = nnx.clone(model, graph=True)
    layers = _adaptable(model)
    for pattern in patterns:
        check_pattern(pattern, "paths")
        if not any(matches(pattern, path) for path in layers):
            raise ArgumentError(
                f"`paths` has the pattern {pattern!r}, which selects no layer that can be adapted (Linear, "
                f"LinearGeneral, Einsum, Embed, Conv): it {matches_nothing(pattern, layers)}."
            )
    chosen = {path: layer for path, layer in layers.items() if any(matches(pattern, path) for pattern in patterns)}
    adapted = [f"`{path}`" for path, layer in chosen.items() if isinstance(layer, _LowRank)]
    if adapted:
        raise ArgumentError(
            f"`model` has low-rank factors already, at {', '.join(adapted[:5])}; call merge_lora before."
        )
    for layer in chosen.values():
        _adapt(layer, rank, scale, rngs)
    return model


def merge_lora(model: ModelT) -> ModelT:
    """Returns a copy of a model in its original classes, with W + α/r · A B for the weights of `add_lora`.

    It computes the same within rounding, and exports like the original model before `add_lora`::

        state = TrainState.create(merge_lora(trainer.model), optax.identity(), rng=jax.random.key(0))
        save_state("merged.safetensors", state)

    Raises:
        ArgumentTypeError: ``model`` is not a module.
        ArgumentError: No layer has factors of `add_lora`.
    """
    check_model(model)
    model = nnx.clone(model, graph=True)
    layers = [module for _, module in nnx.iter_modules(model) if isinstance(module, _LowRank)]
    if not layers:
        raise ArgumentError("`model` has no low-rank factors of add_lora, so there is nothing to merge.")
    for layer in layers:
        _merge(layer)
    return model


class _LowRank(nnx.Module):
    """What the subclass of a layer adds to the layer.

    It is a module itself, since an instance can only change to a class with the same memory layout.
    """

    base: ClassVar[type]
    weights: ClassVar[str] = "kernel"

    lora_a: nnx.LoRAParam[jax.Array]
    lora_b: nnx.LoRAParam[jax.Array]
    lora_scale: float

    @staticmethod
    def lora_axes(layer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Returns which axes of the weights of one layer belong to A, and which to B."""
        del layer
        return (0,), (1,)

    def lora_factors(self, dtype: Any) -> tuple[jax.Array, jax.Array]:
        """Returns A and B in the dtype that the layer computes in."""
        return self.lora_a[...].astype(dtype), self.lora_b[...].astype(dtype)

    def lora_product(self) -> jax.Array:
        """Returns A B in the shape of the weights; leading axes are those of stacked layers."""
        a, b = self.lora_a[...], self.lora_b[...]
        inputs, outputs = self.lora_axes(self)
        stacked = a.ndim - len(inputs) - 1
        lead, rank = a.shape[:stacked], a.shape[-1]
        product = jnp.matmul(a.reshape(*lead, -1, rank), b.reshape(*lead, rank, -1), precision="highest")
        product = product.reshape(*a.shape[:-1], *b.shape[stacked + 1 :])
        order = sorted(range(len(inputs + outputs)), key=(inputs + outputs).__getitem__)
        return product.transpose(*range(stacked), *(stacked + axis for axis in order))

    def lora_merged(self) -> Any:
        """Returns a layer of the original class with the weights W'."""
        return _merge(copy.copy(self))


class _LoRALinear(_LowRank):
    precision: Any

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        outputs: jax.Array = super().__call__(inputs, *args, **kwargs)
        a, b = self.lora_factors(outputs.dtype)
        hidden = jnp.matmul(inputs.astype(outputs.dtype), a, precision=self.precision)
        return outputs + self.lora_scale * jnp.matmul(hidden, b, precision=self.precision)


class _LoRALinearGeneral(_LowRank):
    precision: Any
    axis: tuple[int, ...]
    batch_axis: Any

    @staticmethod
    def lora_axes(layer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        inputs, outputs = len(layer.batch_axis) + len(layer.in_features), len(layer.out_features)
        return tuple(range(inputs)), tuple(range(inputs, inputs + outputs))

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        if self.batch_axis:
            merged: jax.Array = self.lora_merged()(inputs, *args, **kwargs)
            return merged
        outputs: jax.Array = super().__call__(inputs, *args, **kwargs)
        a, b = self.lora_factors(outputs.dtype)
        axes = (self.axis, tuple(range(len(self.axis))))
        hidden = jnp.tensordot(inputs.astype(outputs.dtype), a, axes, precision=self.precision)
        return outputs + self.lora_scale * jnp.tensordot(hidden, b, 1, precision=self.precision)


class _LoRAEinsum(_LowRank):
    precision: Any
    einsum_str: str

    @staticmethod
    def lora_axes(layer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        operand, weights, _ = _letters(layer.einsum_str)
        inputs = [axis for axis, letter in enumerate(weights) if letter in operand]
        return tuple(inputs), tuple(axis for axis in range(len(weights)) if axis not in inputs)

    def __call__(self, inputs: jax.Array, einsum_str: str | None = None, *args: Any, **kwargs: Any) -> jax.Array:
        if einsum_str is not None:  # its letters differ from those that A and B were made with
            merged: jax.Array = self.lora_merged()(inputs, einsum_str, *args, **kwargs)
            return merged
        outputs: jax.Array = super().__call__(inputs, None, *args, **kwargs)
        operand, weights, result = _letters(self.einsum_str)
        of_a, of_b = ("".join(weights[axis] for axis in axes) for axes in self.lora_axes(self))
        rank = next(letter for letter in string.ascii_letters if letter not in self.einsum_str)
        a, b = self.lora_factors(outputs.dtype)
        equation = f"{operand},{of_a}{rank},{rank}{of_b}->{result}"
        inputs = inputs.astype(outputs.dtype)
        return outputs + self.lora_scale * jnp.einsum(equation, inputs, a, b, precision=self.precision)


class _LoRAEmbed(_LowRank):
    weights = "embedding"

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        outputs: jax.Array = super().__call__(inputs, *args, **kwargs)
        a, b = self.lora_factors(outputs.dtype)
        # One row stands for every index, as in `nnx.Embed`.
        rows = jnp.broadcast_to(a, (*inputs.shape, a.shape[-1])) if len(a) == 1 else jnp.take(a, inputs, axis=0)
        return outputs + self.lora_scale * (rows @ b)

    def attend(self, query: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        """Returns the inner products with W', as `nnx.Embed.attend` does with W."""
        outputs: jax.Array = super().attend(query, *args, **kwargs)  # type: ignore[misc]
        a, b = self.lora_factors(outputs.dtype)
        return outputs + self.lora_scale * (query.astype(outputs.dtype) @ b.T @ a.T)


class _LoRAConv(_LowRank):
    @staticmethod
    def lora_axes(layer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
        axes = tuple(range(len(layer.kernel_size) + 2))
        return axes[:-1], axes[-1:]

    def __call__(self, inputs: jax.Array, *args: Any, **kwargs: Any) -> jax.Array:
        merged: jax.Array = self.lora_merged()(inputs, *args, **kwargs)
        return merged


_KINDS: dict[type, type[_LowRank]] = {
    nnx.Linear: _LoRALinear,
    nnx.LinearGeneral: _LoRALinearGeneral,
    nnx.Einsum: _LoRAEinsum,
    nnx.Embed: _LoRAEmbed,
    nnx.Conv: _LoRAConv,
    nnx.ConvTranspose: _LoRAConv,
}


@functools.cache  # equal models have equal classes, and compile once
def _subclass(base: type) -> type[_LowRank]:
    kind = next(kind for layer, kind in _KINDS.items() if issubclass(base, layer))
    return hidden_subclass(f"LoRA{base.__name__}", base, {"__module__": __name__, "base": base}, kind)


# With names, the classes of Flax's own layers can be pickled.
LoRALinear, LoRALinearGeneral, LoRAEinsum, LoRAEmbed, LoRAConv, LoRAConvTranspose = map(_subclass, _KINDS)


def _adaptable(model: nnx.Module) -> dict[str, Any]:
    """Returns the layers that can be adapted, by path, including those already adapted."""
    layers = {}
    for path, module in nnx.iter_modules(model):
        if isinstance(module, tuple(_KINDS)) and not isinstance(module, nnx.LoRALinear):  # that has its own factors
            layers["/".join(map(str, path))] = module
    return layers


def _adapt(layer: Any, rank: int, scale: float, rngs: nnx.Rngs) -> None:
    """Gives a layer its factors, and the class that computes with them."""
    base: Any = type(layer)
    adapted = _subclass(base)
    weights = getattr(layer, adapted.weights)
    inputs, outputs = adapted.lora_axes(layer)
    lead = weights.ndim - len(inputs) - len(outputs)
    stacked = weights.shape[:lead]
    sizes_a, sizes_b = ([weights.shape[lead + axis] for axis in axes] for axes in (inputs, outputs))
    dtype = jnp.promote_types(weights.dtype, jnp.float32)
    random = nnx.initializers.he_uniform(batch_axis=tuple(range(lead)))
    shape_a, shape_b = (*stacked, math.prod(sizes_a), rank), (*stacked, rank, math.prod(sizes_b))
    if isinstance(layer, nnx.Embed):  # an index reads one row, so the number of inputs is not a fan-in
        a, b = jnp.zeros(shape_a, dtype), nnx.initializers.normal(1.0)(rngs.params(), shape_b, dtype)
    else:
        a, b = random(rngs.params(), shape_a, dtype), jnp.zeros(shape_b, dtype)
    layer.lora_a = nnx.LoRAParam(a.reshape(*stacked, *sizes_a, rank))
    layer.lora_b = nnx.LoRAParam(b.reshape(*stacked, rank, *sizes_b))
    layer.lora_scale = scale
    object.__setattr__(layer, "__class__", adapted)


def _merge(layer: Any) -> Any:
    """Gives a layer the weights W' and restores its original class; only its own attributes change."""
    weights = getattr(layer, layer.weights)
    dtype = jnp.promote_types(weights.dtype, jnp.float32)
    values = weights[...].astype(dtype) + layer.lora_scale * layer.lora_product().astype(dtype)
    setattr(layer, layer.weights, weights.replace(values.astype(weights.dtype)))
    object.__setattr__(layer, "__class__", layer.base)
    for name in ("lora_a", "lora_b", "lora_scale"):
        delattr(layer, name)
    return layer


def _letters(equation: str) -> tuple[str, str, str]:
    """Returns the index letters of the inputs, the weights and the outputs of `nnx.Einsum`."""
    operands, result = equation.replace(" ", "").split("->")
    operand, weights = operands.split(",")
    return operand, weights, result


def _check_alpha(alpha: Any) -> float:
    if not 0 < check_number(alpha, "alpha") < math.inf:
        raise ArgumentError(f"`alpha` is {alpha}; it must be positive and finite.")
    return float(alpha)
