"""The training state: everything that training changes, as one immutable pytree of arrays.

It holds no callables and no configuration, so it is exactly what a checkpoint saves, and building it twice compiles
nothing twice. The only static field is ``graphdef``, the structure of the module without its values.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from trainer.core.keys import is_key, key_impl
from trainer.core.learning_rate import with_learning_rate
from trainer.core.nnx_bridge import Flat, GraphDef, Path, lookup, nest, split_module, values_of, variables_of
from trainer.core.nonfinite import check_policy, record_of
from trainer.core.optimizer import initial_opt_state
from trainer.core.precision import Precision, as_precision
from trainer.core.tree_paths import join_path, leaf_path
from trainer.errors import ArgumentError, ArgumentTypeError, StateError
from trainer.types import LOSS_SCALE, MEMBERS, NONFINITE, ExtensionLike, NonFinite

if TYPE_CHECKING:  # importing chex takes a tenth of the time of `import trainer`
    import chex


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=["params", "model_state", "opt_state", "rng", "step", "extensions"],
    meta_fields=["graphdef"],
)
@dataclasses.dataclass(frozen=True, repr=False)
class TrainState:
    """Everything that training changes. Make one with `create`, advance it with a step; it is immutable.

    A step compiled with ``donate_argnums=0`` reuses the buffers of its input state: that state is
    invalid afterwards, and only the returned one may be used.

    Attributes:
        params: The variables that the optimizer updates, as nested plain dicts along the module's attributes.
        model_state: Every other variable of the module (batch statistics, RNG counts, caches).
        opt_state: The state of the optax optimizer.
        rng: The base key, raw or typed as it was passed. It never changes: each step uses
            ``fold_in(rng, step)``.
        step: The number of optimizer updates finished, an int32 scalar.
        extensions: For each extension by name, its ``weight`` (a float32 scalar, so that changing it
            compiles nothing) and its ``variables``; also the records kept by steps, see ``nonfinite`` of `create`.
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
        """Creates a state from a module's variables, and initializes the optimizer.

        Every array is copied, so the module stays valid when the state is donated, and no two leaves
        share a buffer. `create` can be traced: ``jax.vmap`` over keys makes an ensemble.

        Args:
            model: The module. It is not modified.
            optimizer: Any optax transformation.
            rng: A typed key (``jax.random.key``), a raw key (``jax.random.PRNGKey``), or an integer seed for a raw key.
            wrt: The variables that the optimizer updates, as an nnx filter. All others become ``model_state``. A string
                with a ``*`` or a slash, also within a list, is a path pattern such as ``"encoder/**"``, see
                `trainer.by_path`.
            extensions: The extensions by name; the state carries their weights and variables.
            nonfinite: As for `make_train_step`. Every value but "ignore" keeps a record in the state, in
                ``extensions["nonfinite"]``: ``skipped``, the number of skipped steps, and more.
            precision: As for `make_train_step`, see `with_precision`.

        Raises:
            ArgumentTypeError: ``model``, ``optimizer`` or ``rng`` has the wrong type.
            ArgumentError: A variable holds no array, the optimizer cannot update a selected variable, a pattern in
                ``wrt`` selects nothing, or an extension has the name of a record.
            StateError: An array of the model was donated to a step.
        """
        check_model(model)
        check_optimizer(optimizer)
        rng = as_key(rng)
        if is_gone(rng):
            raise StateError(
                "`rng` was donated to a step with `donate_argnums=0`: its buffer is gone; pass another key."
            )
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
                if hasattr(extension, "weight")  # an extension without a weight only handles events
            },
            graphdef=graphdef,
        )
        return created.with_precision(precision)

    def model(self) -> Any:
        """Returns a new module with the values of this state, in its original training or evaluation mode.

        Its variables share the arrays of the state: use it for evaluation; a donation invalidates it.

        Raises:
            StateError: The state was donated to a step.
        """
        self.check_alive()
        flat = lookup(self.params, self.model_state, paths=self.graphdef.paths)
        return self.graphdef.merge([flat[path] for path in self.graphdef.paths])

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with some fields replaced, as ``dataclasses.replace`` does.

        Integers become arrays: ``step=0`` an int32 scalar, ``rng=1`` a key of the kind that the state holds. An
        `nnx.State` as ``params`` or ``model_state`` becomes nested plain dicts. The arrays are not copied, so a step
        with donation takes them too.

        Raises:
            ArgumentTypeError: ``step`` or ``rng`` is a number that is no integer.
        """
        for name, value in changes.items():
            if name in ("params", "model_state") and isinstance(value, nnx.State):
                changes[name] = values_of(value)
            elif name in ("step", "rng") and isinstance(value, int | float | np.number):
                changes[name] = _as_step(value) if name == "step" else _as_key_like(value, self.rng)
        return dataclasses.replace(self, **changes)

    def with_optimizer(self, optimizer: optax.GradientTransformation) -> Self:
        """Returns a copy with the initial state of another optimizer, to continue with a step made for it.

        It is ``state.replace(opt_state=optimizer.init(state.params))``, but for any optimizer: every array of the new
        optimizer state is a copy, so that a step may donate it (L-BFGS, Prodigy and averages keep the params
        themselves), and `optax.lookahead` gets its pair of params. Params, step and key stay.

        Raises:
            ArgumentTypeError: ``optimizer`` is not an optax transformation.
            ArgumentError: It cannot be initialized with the params.
            StateError: The state was donated to a step.
        """
        check_optimizer(optimizer)
        self.check_alive()
        return self.replace(opt_state=_init_optimizer(optimizer, self.params))

    def with_learning_rate(self, value: float) -> Self:
        """Returns a copy with another learning rate, if the optimizer keeps the rate in its state.

        An optimizer made by `optax.inject_hyperparams` does, also inside ``optax.chain``, ``optax.MultiSteps`` and
        others. For a configured optimizer use ``optax.inject_hyperparams(make_optimizer)(optimizer_config,
        learning_rate=1e-3)``. Any other optimizer has its rate compiled into the step. (Other injected hyperparameters
        are entries of ``opt_state.hyperparams``, which a `Trainer` lets you assign.)

        Args:
            value: The learning rate from the next step on, until it is set again. Nothing is recompiled.

        Raises:
            ArgumentError: ``value`` is not a number, is negative or is not finite; or the state holds no rate, several,
                or one that a schedule overwrites in every step.
        """
        return self.replace(opt_state=with_learning_rate(self.opt_state, value))

    def with_precision(self, precision: str | Precision | None) -> Self:
        """Returns a state for training in a precision: with a loss scale for float16, otherwise unchanged.

        The loss scale is an entry of ``extensions``, ``{"scale": a float32 scalar, "good_steps": an int32 scalar}``.
        An existing one is kept.

        Raises:
            ArgumentError: ``precision`` is invalid, or an extension has the name ``loss_scale``.
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
        """Returns a copy with its own buffers, which stays valid when this state is donated.

        Raises:
            StateError: This state was already donated.
        """
        self.check_alive()
        copied: Self = jax.tree.map(_own, self)
        return copied

    def is_finite(self) -> jax.Array:
        """Returns whether the state holds no NaN or infinity, as a boolean scalar on the device.

        Checks ``params``, ``model_state`` and ``opt_state``. Scalars in ``opt_state`` may be infinite, but not NaN:
        the best loss so far starts at infinity. In stacked states, a scalar is one of each member.
        """
        self.check_alive()
        held = jax.tree.leaves(self.opt_state)
        members = self.extensions.get(MEMBERS, {})  # of a sweep, whose own step is one for all
        stacked = jnp.ndim(members["step"] if members.keys() == {"step", "rng"} else self.step)
        arrays, scalars = (
            [leaf for leaf in held if leaf.ndim > stacked],
            [leaf for leaf in held if leaf.ndim <= stacked],
        )
        finite: jax.Array = _is_finite((self.params, self.model_state, arrays), scalars)
        return finite

    def __repr__(self) -> str:
        """Returns sizes only, so that printing a state neither waits for the device nor fills the screen."""
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
        # Computing paths takes as long as the check itself, so it is left to the error message.
        path = next(path for path, leaf in jax.tree.leaves_with_path(self) if is_gone(leaf))
        raise StateError(
            f"`state` was donated: the buffer of `{leaf_path(path)}` is gone. A step compiled with "
            f"`donate_argnums=0` consumes the state it is given; use the one that it returned, or keep "
            f"a `state.copy()`."
        )


def is_gone(leaf: Any) -> bool:
    """Returns whether an array was donated. Tracers and NumPy arrays never are, and have no `is_deleted`."""
    return isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer) and leaf.is_deleted()


def own_except(state: TrainState, kept: Iterable[Any]) -> TrainState:
    """Returns the state with a copy of every leaf that is none of ``kept``, or that occurs a second time.

    So the state can be donated: what the caller holds survives, and no buffer is donated twice.

    Raises:
        StateError: The state was donated to a step.
    """
    state.check_alive()
    free = {id(leaf) for leaf in kept}

    def own(leaf: Any) -> Any:
        if id(leaf) in free:
            free.remove(id(leaf))
            return leaf
        return _own(leaf)

    owned: TrainState = jax.tree.map(own, state)
    return owned


def step_of(state: TrainState) -> int:
    """Returns the step as an integer; of stacked states, which step together, the largest. Waits for the device."""
    return int(np.asarray(state.step).max())


def step_of_one(state: TrainState) -> int:
    """Returns the step as an integer. Waits for the device.

    Raises:
        ArgumentError: The state is that of several models, stacked.
    """
    if jnp.ndim(state.step):
        raise ArgumentError(
            f"`state.step` has the shape {jnp.shape(state.step)}: the state is that of several models, stacked, and a "
            f"run has one step count. make_sweep(step_fn, state) makes a state and a `step_fn` of them."
        )
    return int(state.step)


@jax.jit
def _is_finite(tree: Any, scalars: list[Any]) -> jax.Array:
    finite = [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree) if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    numbers = [~jnp.any(jnp.isnan(leaf)) for leaf in scalars if jnp.issubdtype(leaf.dtype, jnp.inexact)]
    return jnp.all(jnp.stack([*finite, *numbers]))


def check_model(model: Any) -> None:
    """Raises `ArgumentTypeError` unless ``model`` is a module instance."""
    if not isinstance(model, nnx.Module):
        raise ArgumentTypeError(
            f"`model` is {_kind(model)}; it must be a flax.nnx.Module instance."
            + (" Call the class to make one." if isinstance(model, type) else "")
        )


def check_optimizer(optimizer: Any, name: str = "optimizer") -> None:
    """Raises `ArgumentTypeError` unless ``optimizer``, passed as the argument ``name``, is an optax transformation."""
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
    """Returns a raw or typed key unchanged, and ``jax.random.PRNGKey(rng)`` for an integer.

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

    Every leaf is copied, because sharing cannot be detected: ``init`` may return the params (lookahead), an array that
    it also keeps, or another object over the same buffer (from `jax.device_put`, a jitted identity function, or a NumPy
    array without a copy). Donating one would then destroy the other. Each leaf is released before the next is copied,
    so the copies cost time but not a second state: for Adam on 100 MB of params the peak is 200 MB of optimizer state
    plus one leaf, not 400 MB.
    """
    # `leaves` holds our only reference to each leaf.
    leaves, treedef = jax.tree.flatten(initial_opt_state(optimizer, params))
    for index in range(len(leaves)):
        leaves[index] = _own(leaves[index])
    return jax.tree.unflatten(treedef, leaves)


def _own_all(flat: Flat, where: str) -> Flat:
    def own(path: Path, leaf: Any) -> Any:
        if is_gone(leaf):
            raise StateError(
                f"`{join_path(where, path)}` was donated: its buffer is gone. The model shares its arrays with a state "
                f"that was given to a step with `donate_argnums=0`, as that of `state.model()` does; make the model "
                f"from the state that the step returned, or from a `state.copy()`."
            )
        try:
            return _own(leaf)
        except (TypeError, ValueError) as error:
            raise ArgumentError(
                f"`{join_path(where, path)}` holds {leaf!r:.60}, {_kind(leaf)}; a variable must hold arrays."
            ) from error

    # Most variables hold a single array, for which `jax.tree.map` would take as long as the copy.
    return {
        path: own(path, value) if isinstance(value, jax.Array) else jax.tree.map(functools.partial(own, path), value)
        for path, value in flat.items()
    }


def _own(leaf: Any) -> jax.Array:
    # The first step returns a weakly typed leaf as strongly typed, so the second step would compile again.
    copied = jnp.array(leaf, copy=True)
    return copied.astype(copied.dtype) if getattr(copied, "weak_type", False) else copied


def _as_step(value: Any) -> jax.Array:
    if isinstance(value, bool) or not isinstance(value, int | np.integer):
        raise ArgumentTypeError(f"`step` is {value!r:.60}; it must be an integer, the number of updates finished.")
    return jnp.asarray(value, jnp.int32)


def _as_key_like(seed: Any, held: Any) -> jax.Array:
    raw = as_key(seed)
    return jax.random.key(int(seed), impl=key_impl(held)) if is_key(held) else raw


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
