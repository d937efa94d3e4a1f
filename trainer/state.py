"""The training state: everything that training changes, as one immutable pytree of arrays.

Nothing in it is callable and nothing in it is configuration, so "the state" and "what a checkpoint
holds" are one thing, and a state that was built twice compiles nothing twice. The single static
field is the ``graphdef``, the shape of the module without its values.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from trainer.core.learning_rate import with_learning_rate
from trainer.core.nnx_bridge import Flat, GraphDef, Path, lookup, nest, split_module, variables_of
from trainer.core.nonfinite import check_policy, record_of
from trainer.core.optimizer import adapt_optimizer
from trainer.core.precision import Precision, as_precision
from trainer.core.tree_paths import join_path, leaf_path
from trainer.errors import ArgumentError, ArgumentTypeError, StateError
from trainer.types import LOSS_SCALE, NONFINITE, ExtensionLike, NonFinite

if TYPE_CHECKING:  # for annotations only: importing chex takes a tenth of the time of `import trainer`
    import chex


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "model_state", "opt_state", "rng", "step", "extensions"],
    meta_fields=["graphdef"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class TrainState:
    """What training changes. Make one with `create`, advance it with a step, never change it.

    A step compiled with ``donate_argnums=0`` reuses the buffers of the state it is given: that
    state is gone afterwards, and only the returned one may be used.

    Attributes:
        params: What the optimizer updates, as nested plain dicts along the module's attributes.
        model_state: Every other variable of the module (batch statistics, RNG counts, caches).
        opt_state: The state of the optax optimizer.
        rng: The base key, raw or typed as the caller gave it. It never changes: each step uses
            ``fold_in(rng, step)``.
        step: The number of optimizer updates finished, an int32 scalar.
        extensions: By name of the extension, its ``weight`` (a float32 scalar, so that changing it
            compiles nothing) and its ``variables``; and what steps keep a record of, see ``nonfinite`` of `create`.
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
        rng: jax.Array | int,
        wrt: nnx.filterlib.Filter = nnx.Param,
        extensions: Mapping[str, ExtensionLike] | None = None,
        nonfinite: NonFinite = "ignore",
        precision: str | Precision | None = None,
    ) -> Self:
        """Copies the values out of a module and starts its optimizer.

        Every array is copied, so the caller's module stays alive when the state is donated, and no
        two leaves share a buffer. It may be traced: ``jax.vmap`` over keys makes an ensemble.

        Args:
            model: The module. It is read, never changed.
            optimizer: Any optax transformation.
            rng: A typed key (``jax.random.key``), a raw one (``jax.random.PRNGKey``), or an integer to make that of.
            wrt: Which variables the optimizer updates, an nnx filter. The rest is ``model_state``. A string with a
                ``*`` or a slash is a pattern of paths, ``"encoder/**"``, see `trainer.by_path`; so it is in a list.
            extensions: By name, the extensions whose weights and variables the state carries.
            nonfinite: That of the step, see `make_train_step`. All but "ignore" keep a record in the state, as
                ``extensions["nonfinite"]``: ``skipped``, the number of steps left out, and more.
            precision: That of the step, see `with_precision`.

        Raises:
            ArgumentTypeError: ``model``, ``optimizer`` or ``rng`` is something else.
            ArgumentError: A variable holds no array, the optimizer cannot update a selected one, a pattern of ``wrt``
                selects nothing, or an extension has the name of a record.
        """
        check_model(model)
        check_optimizer(optimizer)
        rng = as_key(rng)
        graphdef, selected, rest = split_module(model, wrt)
        params = nest(_own_all(selected, "params"))
        _check_trainable(params)
        model_state = nest(_own_all(rest, "model_state"))
        records = {} if check_policy(nonfinite) == "ignore" else {NONFINITE: record_of(params, model_state)}
        if names := records.keys() & (extensions or {}).keys():
            raise ArgumentError(f"`extensions[{min(names)!r}]` has the name of a record of the state; rename it.")
        created = cls(
            params=params,
            model_state=model_state,
            opt_state=_init_optimizer(optimizer, params),
            rng=_own(rng),
            step=jnp.zeros((), jnp.int32),
            extensions=records
            | {
                name: {
                    "weight": jnp.asarray(extension.weight, jnp.float32),
                    "variables": nest(_own_all(variables_of(extension), f"extensions/{name}")),
                }
                for name, extension in (extensions or {}).items()
                if hasattr(extension, "weight")  # the others handle events only
            },
            graphdef=graphdef,
        )
        return created.with_precision(precision)

    def model(self) -> Any:
        """Returns a new module with the values of this state, in the mode it was created in.

        Its variables refer to the arrays of the state: fine to evaluate, gone after a donation.

        Raises:
            StateError: The state was donated to a step.
        """
        self.check_alive()
        flat = lookup(self.params, self.model_state, paths=self.graphdef.paths)
        return self.graphdef.merge([flat[path] for path in self.graphdef.paths])

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with some fields replaced, as ``dataclasses.replace`` does."""
        return dataclasses.replace(self, **changes)

    def with_learning_rate(self, value: float) -> Self:
        """Returns a copy with another learning rate, where the optimizer keeps one in its state.

        That of `optax.inject_hyperparams` does, alone or inside ``optax.chain``, ``optax.MultiSteps`` and others. The
        optimizer of a configuration becomes one by ``optax.inject_hyperparams(make_optimizer)(optimizer_config,
        learning_rate=1e-3)``. Any other has its rate compiled into the step. (Further hyperparameters that are kept
        are entries of ``opt_state.hyperparams``, which a `Trainer` lets you assign.)

        Args:
            value: The rate from the next step on, until it is set again. It compiles nothing.

        Raises:
            ArgumentError: ``value`` is no number, negative or not finite; or the state holds no rate, several, or one
                that a schedule sets anew in every step.
        """
        return self.replace(opt_state=with_learning_rate(self.opt_state, value))

    def with_precision(self, precision: str | Precision | None) -> Self:
        """Returns a state that a step of a precision can train: for float16 with a loss scale, else this one.

        The loss scale is an entry of ``extensions``, ``{"scale": a float32 scalar, "good_steps": an int32 scalar}``.
        One that is there is kept.

        Raises:
            ArgumentError: ``precision`` is none, or an extension has the name ``loss_scale``.
        """
        resolved = as_precision(precision)
        if resolved is None or not resolved.has_loss_scale:
            return self
        held = self.extensions.get(LOSS_SCALE)
        if held is not None and held.keys() != {"scale", "good_steps"}:
            raise ArgumentError(
                f"`extensions[{LOSS_SCALE!r}]` has the name of the loss scale of `precision` = {resolved.compute!r}; "
                f"give the extension another."
            )
        started = {
            "scale": jnp.asarray(resolved.initial_scale, jnp.float32),
            "good_steps": jnp.zeros((), jnp.int32),
        }
        return self.replace(extensions={**self.extensions, LOSS_SCALE: started if held is None else held})

    def copy(self) -> Self:
        """Returns an equal state with buffers of its own, which outlives a donation of this one.

        Raises:
            StateError: This one was donated already.
        """
        self.check_alive()
        copied: Self = jax.tree.map(_own, self)
        return copied

    def is_finite(self) -> jax.Array:
        """Tells, as a scalar on the device, whether training can go on from here: nothing is NaN or infinite.

        It looks at the parameters, the variables of the model, and all that the optimizer holds. Scalars of the
        optimizer may be infinite, though not NaN: the best loss so far begins so.
        """
        self.check_alive()
        held = jax.tree.leaves(self.opt_state)
        arrays, scalars = [leaf for leaf in held if leaf.ndim], [leaf for leaf in held if not leaf.ndim]
        finite: jax.Array = _is_finite((self.params, self.model_state, arrays), scalars)
        return finite

    def __repr__(self) -> str:
        """Shows sizes only, so that printing a state neither waits for the device nor fills the screen."""
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del parts["graphdef"]
        leaves = {name: jax.tree.leaves(part) for name, part in parts.items()}
        sizes = [f"{name}: {len(held)} arrays, {sum(map(np.size, held)):,} entries" for name, held in leaves.items()]
        return f"TrainState({'; '.join(sizes)})"

    def check_alive(self) -> None:
        """Checks that no array of this state was donated. It does not wait for the device.

        Raises:
            StateError: The state was donated to a step.
        """
        if not any(map(is_gone, jax.tree.leaves(self))):
            return
        # Paths take as long again as the check itself, so only the message makes them.
        path = next(path for path, leaf in jax.tree.leaves_with_path(self) if is_gone(leaf))
        raise StateError(
            f"`state` was donated: the buffer of `{leaf_path(path)}` is gone. A step compiled with "
            f"`donate_argnums=0` consumes the state it is given; use the one that it returned, or keep "
            f"a `state.copy()`."
        )


def is_gone(leaf: Any) -> bool:
    """Tells whether an array was donated. Tracers and NumPy arrays never are: these know no `is_deleted`."""
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted()


@jax.jit
def _is_finite(tree: Any, scalars: list[Any]) -> jax.Array:
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    numbers = [~jnp.isnan(leaf) for leaf in scalars if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([*finite, *numbers]))


def check_model(model: Any) -> None:
    """Raises `ArgumentTypeError` unless ``model`` is a module instance."""
    if not isinstance(model, nnx.Module):
        raise ArgumentTypeError(
            f"`model` is {_kind(model)}; it must be a flax.nnx.Module instance."
            + (" Call the class to make one." if isinstance(model, type) else "")
        )


def check_optimizer(optimizer: Any, name: str = "optimizer") -> None:
    """Raises `ArgumentTypeError` unless ``optimizer``, the argument of this name, is an optax transformation."""
    if isinstance(optimizer, nnx.Optimizer):
        raise ArgumentTypeError(
            f"`{name}` is {_kind(optimizer)}, which holds its own state; pass the optax transformation that "
            f"it was made from."
        )
    if not (callable(getattr(optimizer, "init", None)) and callable(getattr(optimizer, "update", None))):
        raise ArgumentTypeError(
            f"`{name}` is {_kind(optimizer)}; it must be an optax.GradientTransformation, such as optax.adam(1e-3)."
        )


def as_key(rng: Any) -> jax.Array:
    """Returns a key, raw or typed, as it is, and ``jax.random.PRNGKey(rng)`` for an integer.

    Raises:
        ArgumentTypeError: ``rng`` is neither.
    """
    if isinstance(rng, int | np.integer) and not isinstance(rng, bool):
        return jax.random.PRNGKey(int(rng))
    typed = isinstance(rng, jax.Array) and jnp.issubdtype(rng.dtype, jax.dtypes.prng_key)
    raw = not typed and getattr(rng, "dtype", None) == jnp.uint32
    width = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0))).shape
    if (typed and rng.shape == ()) or (raw and rng.shape == width):
        key: jax.Array = rng
        return key
    is_array = isinstance(rng, jax.Array | np.ndarray)
    described = f"{rng.dtype}{rng.shape}" if is_array else f"{repr(rng)[:40]!s} of type {type(rng).__name__}"
    raise ArgumentTypeError(
        f"`rng` is {described}; it must be one key, jax.random.key(0) or jax.random.PRNGKey(0), or an integer."
    )


def _init_optimizer(optimizer: optax.GradientTransformation, params: chex.ArrayTree) -> Any:
    """Returns the optimizer's initial state, whose leaves share no buffer with anything else.

    All of it is copied, because what is shared cannot be told: ``init`` may return the params (lookahead), an array
    that it also keeps, or another object over the same buffer (`jax.device_put`, a jitted function that returns its
    argument, a NumPy array without a copy). A donated step would then destroy the other one. Each leaf is released
    before the next is copied, so the copies cost time but not a second state: for Adam on 100 MB of params the peak is
    200 MB of optimizer state and one leaf, not 400 MB.
    """
    # `leaves` holds the only reference that we have to each leaf.
    leaves, treedef = jax.tree.flatten(adapt_optimizer(optimizer).init(params))
    for index in range(len(leaves)):
        leaves[index] = _own(leaves[index])
    return jax.tree.unflatten(treedef, leaves)


def _own_all(flat: Flat, where: str) -> Flat:
    def own(path: Path, leaf: Any) -> Any:
        try:
            return _own(leaf)
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                f"`{join_path(where, path)}` holds {leaf!r:.60}, {_kind(leaf)}; a variable must hold arrays."
            ) from error

    # Most variables hold one array; `jax.tree.map` over it takes as long as the copy.
    return {
        path: own(path, value) if isinstance(value, jax.Array) else jax.tree.map(functools.partial(own, path), value)
        for path, value in flat.items()
    }


def _own(leaf: Any) -> jax.Array:
    # A weakly typed leaf would return from the first step strongly typed, and the second step would compile again.
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


def _kind(value: Any) -> str:
    return f"the class {value.__name__}" if isinstance(value, type) else f"of type {type(value).__name__}"
