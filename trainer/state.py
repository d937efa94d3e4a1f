"""The training state: everything that training changes, as one immutable pytree of arrays.

Nothing in it is callable and nothing in it is configuration, so "the state" and "what a checkpoint
holds" are one thing, and a state that was built twice compiles nothing twice. The single static
field is the ``graphdef``, the shape of the module without its values.
"""

import dataclasses
import functools
import weakref
from collections.abc import Iterable, Mapping
from typing import Any, Self

import chex
import jax
import jax.numpy as jnp
import optax
from flax import nnx

from trainer.errors import ArgumentError, ArgumentTypeError, ObjectiveError, StateError, leaf_path
from trainer.types import ExtensionLike

Path = tuple[str | int, ...]
Flat = dict[Path, Any]


class GraphDef(nnx.GraphDef[Any]):
    """An `nnx.GraphDef` that hashes in no time and is one object for all its equals.

    ``jax.jit`` hashes and compares the static part of its arguments on every call. Flax recomputes
    the hash each time (76 µs for four layers); here it is computed once, and interning makes the
    comparison an identity. ``nnx.merge(state.graphdef, state.params, state.model_state)`` works.
    """

    __slots__ = ("__weakref__", "_hash", "paths")

    paths: tuple[Path, ...]
    """Where each variable sits in the module, in the order that ``nnx.merge`` wants them."""

    def __new__(cls, graphdef: nnx.GraphDef[Any], paths: Iterable[Path]) -> "GraphDef":
        code = _hash(graphdef)
        known = _interned.get(code)
        if known is not None and known.__eq__(graphdef):
            return known
        self = object.__new__(cls)
        object.__setattr__(self, "nodes", graphdef.nodes)
        object.__setattr__(self, "attributes", graphdef.attributes)
        object.__setattr__(self, "num_leaves", graphdef.num_leaves)
        object.__setattr__(self, "paths", tuple(paths))
        object.__setattr__(self, "_hash", code)
        _interned[code] = self
        return self

    def __init__(self, graphdef: nnx.GraphDef[Any], paths: Iterable[Path]) -> None:
        del graphdef, paths  # the fields of an interned object are set once, in __new__

    def __hash__(self) -> int:
        return self._hash

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return (
            isinstance(other, nnx.GraphDef)
            and self.num_leaves == other.num_leaves
            and self.nodes == other.nodes
            and self.attributes == other.attributes
        )

    def __reduce__(self) -> tuple[Any, ...]:
        plain = nnx.GraphDef(self.nodes, self.attributes, self.num_leaves)
        return GraphDef, (plain, self.paths)


_interned: weakref.WeakValueDictionary[int, GraphDef] = weakref.WeakValueDictionary()


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "model_state", "opt_state", "rng", "step", "extensions"],
    meta_fields=["graphdef"],
)
@dataclasses.dataclass(frozen=True)
class TrainState:
    """What training changes. Make one with `create`, advance it with a step, never change it.

    A step compiled with ``donate_argnums=0`` reuses the buffers of the state it is given: that
    state is gone afterwards, and only the returned one may be used.

    Attributes:
        params: What the optimizer updates, as nested plain dicts along the module's attributes.
        model_state: Every other variable of the module (batch statistics, random counts, caches).
        opt_state: The state of the optax optimizer.
        rng: The key from which the next step draws, raw or typed as the caller gave it.
        step: The number of optimizer updates finished, an int32 scalar.
        extensions: By name of the extension, its ``weight`` (a float32 scalar, so that changing it
            compiles nothing) and its ``variables``.
        graphdef: The static structure of the module, shared by all states of one architecture.
    """

    params: chex.ArrayTree
    model_state: chex.ArrayTree
    opt_state: optax.OptState
    rng: jax.Array
    step: jax.Array
    extensions: dict[str, dict[str, Any]]
    graphdef: GraphDef

    @classmethod
    def create(
        cls,
        model: nnx.Module,
        optimizer: optax.GradientTransformation,
        *,
        rng: jax.Array,
        wrt: nnx.filterlib.Filter = nnx.Param,
        extensions: Mapping[str, ExtensionLike] | None = None,
    ) -> Self:
        """Copies the values out of a module and starts its optimizer.

        Every array is copied, so the caller's module stays alive when the state is donated, and no
        two leaves share a buffer. It may be traced: ``jax.vmap`` over keys makes an ensemble.

        Args:
            model: The module. It is read, never changed.
            optimizer: Any optax transformation.
            rng: A typed key (``jax.random.key``) or a raw one (``jax.random.PRNGKey``).
            wrt: Which variables the optimizer updates, an nnx filter. The rest is ``model_state``.
            extensions: By name, the extensions whose weights and variables the state carries.

        Raises:
            ArgumentTypeError: ``model``, ``optimizer`` or ``rng`` is something else.
            ArgumentError: A variable holds no array, or the optimizer cannot update a selected one.
        """
        check_model(model)
        check_optimizer(optimizer)
        check_rng(rng)
        graphdef, selected, rest = split_module(model, wrt)
        params = nest(_own_all(selected, "params"))
        _check_trainable(params)
        return cls(
            params=params,
            model_state=nest(_own_all(rest, "model_state")),
            opt_state=jax.tree.map(_own, optimizer.init(params)),
            rng=_own(rng),
            step=jnp.zeros((), jnp.int32),
            extensions={
                name: {
                    "weight": jnp.asarray(extension.weight, jnp.float32),
                    "variables": nest(_own_all(variables_of(extension), f"extensions/{name}")),
                }
                for name, extension in (extensions or {}).items()
            },
            graphdef=graphdef,
        )

    def model(self) -> Any:
        """Returns a new module with the values of this state, in the mode it was created in.

        Its variables refer to the arrays of the state: fine to evaluate, gone after a donation.

        Raises:
            StateError: The state was donated to a step.
        """
        self.check_alive()
        flat = flatten(self.params, self.model_state, paths=self.graphdef.paths)
        return nnx.merge(self.graphdef, [flat[path] for path in self.graphdef.paths])

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with some fields replaced, as ``dataclasses.replace`` does."""
        return dataclasses.replace(self, **changes)

    def check_alive(self) -> None:
        """Does nothing, unless an array of this state was given away.

        Raises:
            StateError: The state was donated to a step.
        """
        for path, leaf in jax.tree.leaves_with_path(self):
            # Tracers know no `is_deleted`: under a transformation every leaf is alive.
            if not isinstance(leaf, jax.core.Tracer) and isinstance(leaf, jax.Array):
                if leaf.is_deleted():
                    raise StateError(
                        f"`state` was donated: the buffer of `{leaf_path(path)}` is gone. A step compiled "
                        f"with `donate_argnums=0` consumes the state it is given; use the one that it "
                        f"returned, or copy first with `jax.tree.map(jnp.copy, state)`."
                    )


def split_module(module: nnx.Module, wrt: nnx.filterlib.Filter) -> tuple[GraphDef, Flat, Flat]:
    """Splits a module into its static structure, the variables under ``wrt``, and the others."""
    module = without_intermediates(module)
    graphdef, flat = nnx.flatten(module)
    _, selected, rest = nnx.split(module, wrt, ...)
    return GraphDef(graphdef, flat.paths), _values(selected), _values(rest)


def variables_of(module: Any) -> Flat:
    """Returns the values of a module's variables by path; an object that is no module has none."""
    if not isinstance(module, nnx.Module):
        return {}
    return _values(nnx.split(without_intermediates(module))[1])


def with_variables(module: Any, variables: chex.ArrayTree) -> Any:
    """Returns a copy of a module that holds ``variables``; an object that is no module as it is."""
    if not isinstance(module, nnx.Module):
        return module
    graphdef, flat = nnx.flatten(without_intermediates(module))
    values = flatten(variables, paths=flat.paths)
    return nnx.merge(graphdef, [values[path] for path in flat.paths])


def without_intermediates(module: nnx.Module) -> nnx.Module:
    """Returns the module, or a copy of it, without what `nnx.Module.sow` left behind.

    Sown values grow with every call, so they cannot be part of a state that keeps its type.
    """
    _, flat = nnx.flatten(module)
    if not any(isinstance(leaf, nnx.Intermediate) for leaf in flat.leaves):
        return module
    module = nnx.clone(module)
    nnx.pop(module, nnx.Intermediate)
    return module


def carry(before: chex.ArrayTree, after: Flat, where: str) -> chex.ArrayTree:
    """Returns what a step carries on: the values ``after`` it, in the structure ``before`` it.

    A variable that appears, vanishes or changes its kind would make the next state another type
    than this one, which neither ``jit`` nor ``scan`` can run.

    Raises:
        ObjectiveError: Naming every variable that appeared, vanished or changed shape or dtype.
    """
    flat = flatten(before, paths=after.keys(), missing=_ABSENT)
    problems = [
        f"`{_join(where, path)}` was created inside the step; create it in the module's constructor"
        for path, value in flat.items()
        if value is _ABSENT
    ]
    carried: Flat = {}
    for path, value in after.items():
        if flat[path] is _ABSENT:
            continue
        kept = jax.tree.map(_as_before, flat[path], value) if _same_tree(flat[path], value) else value
        if not _same_type(flat[path], kept):
            problems.append(
                f"`{_join(where, path)}` was {_types(flat[path])} and the step made it {_types(kept)}; "
                f"a variable keeps its shape and dtype"
            )
        carried[path] = kept
    result = nest(carried)
    if not problems and jax.tree.structure(result) != jax.tree.structure(before):
        gone = jax.tree.structure(before).num_leaves - jax.tree.structure(result).num_leaves
        problems.append(f"{gone} variables of `{where}` were removed inside the step")
    if problems:
        raise ObjectiveError("; ".join(problems) + ".")
    return result


def nest(flat: Flat) -> dict[Any, Any]:
    """Turns ``{("a", 0): x}`` into ``{"a": {0: x}}``."""
    tree: dict[Any, Any] = {}
    for path, value in flat.items():
        *parents, last = path
        node = tree
        for key in parents:
            node = node.setdefault(key, {})
        node[last] = value
    return tree


_ABSENT = object()


def flatten(*trees: Any, paths: Iterable[Path], missing: Any = None) -> Flat:
    """Looks every path up in the nested dicts; the first tree that has it wins."""

    def look_up(path: Path) -> Any:
        for tree in trees:
            try:
                return functools.reduce(lambda node, key: node[key], path, tree)
            except (KeyError, TypeError, IndexError):
                continue
        return missing

    return {path: look_up(path) for path in paths}


def check_model(model: Any) -> None:
    if not isinstance(model, nnx.Module):
        raise ArgumentTypeError(
            f"`model` is {_kind(model)}; it must be a flax.nnx.Module instance."
            + (" Call the class to make one." if isinstance(model, type) else "")
        )


def check_optimizer(optimizer: Any) -> None:
    if not (callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None))):
        raise ArgumentTypeError(
            f"`optimizer` is {_kind(optimizer)}; it must be an optax.GradientTransformation, such as optax.adam(1e-3)."
        )
    if isinstance(optimizer, nnx.Module):
        raise ArgumentTypeError(
            f"`optimizer` is {_kind(optimizer)}, which holds its own state; pass the optax "
            f"transformation that it was made from."
        )


def check_rng(rng: Any) -> None:
    typed = isinstance(rng, jax.Array) and jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)
    raw = not typed and getattr(rng, "dtype", None) == jnp.uint32
    width = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
    if (typed and rng.shape == ()) or (raw and rng.shape == width):
        return
    described = f"{rng.dtype}{rng.shape}" if hasattr(rng, "shape") else repr(rng)[:40]
    raise ArgumentTypeError(f"`rng` is {described}; it must be one key, jax.random.key(0) or jax.random.PRNGKey(0).")


def _hash(graphdef: nnx.GraphDef[Any]) -> int:
    try:
        return hash(graphdef)
    except TypeError:
        for name, attribute in graphdef.attributes:
            value = getattr(attribute, "value", None)
            try:
                hash(value)
            except TypeError:
                raise ArgumentError(
                    f"`model` has the attribute `{name}` = {value!r:.60}, a plain Python {type(value).__name__} "
                    f"that cannot be part of a compiled program's identity. Use a tuple, nnx.List or "
                    f"nnx.Dict, or keep it outside the module."
                ) from None
        raise


def _values(state: nnx.State[Any, Any]) -> Flat:
    return {
        path: leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf
        for path, leaf in nnx.to_flat_state(state)
    }


def _own_all(flat: Flat, where: str) -> Flat:
    def own(path: Path, leaf: Any) -> Any:
        try:
            return _own(leaf)
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                f"`{_join(where, path)}` holds {leaf!r:.60}, {_kind(leaf)}; a variable must hold arrays."
            ) from error

    return {path: jax.tree.map(functools.partial(own, path), value) for path, value in flat.items()}


def _own(leaf: Any) -> jax.Array:
    # A weakly typed leaf would come back strongly typed from the first step and compile it twice.
    copied = jnp.array(leaf, copy=True)
    return copied.astype(copied.dtype) if getattr(copied, "weak_type", False) else copied


def _check_trainable(params: chex.ArrayTree) -> None:
    wrong = [
        f"`params/{leaf_path(path)}` ({leaf.dtype})"
        for path, leaf in jax.tree.leaves_with_path(params)
        if not jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    if wrong:
        raise ArgumentError(
            f"`wrt` selects variables without a gradient: {', '.join(wrong)}. Select floating ones only, "
            f"or make these another kind of nnx.Variable."
        )


def _same_tree(before: Any, after: Any) -> bool:
    return jax.tree.structure(before) == jax.tree.structure(after)


def _as_before(before: Any, after: Any) -> Any:
    # A Python number, or a result of one, takes the dtype that the variable has.
    if isinstance(after, bool | int | float | complex) or getattr(after, "weak_type", False):
        return jnp.asarray(after, before.dtype)
    return after


def _same_type(before: Any, after: Any) -> bool:
    return _same_tree(before, after) and all(
        jnp.shape(a) == jnp.shape(b) and _dtype(a) == _dtype(b)
        for a, b in zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    )


def _dtype(leaf: Any) -> Any:
    return leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)


def _types(value: Any) -> str:
    leaves = [f"{_dtype(leaf)}{jnp.shape(leaf)}" for leaf in jax.tree.leaves(value)]
    return leaves[0] if len(leaves) == 1 else f"({', '.join(leaves)})"


def _join(where: str, path: Path) -> str:
    return "/".join([where, *map(str, path)])


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"of type {type(value).__name__}"
