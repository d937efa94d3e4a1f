"""The optimizer of a trainer: gradient clipping, the given or configured one, parts of callbacks, the average."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from trainer.config import TrainingConfig, make_optimizer, make_schedule
from trainer.core.assigned_values import widened
from trainer.core.optimizer import LookaheadOptState, adapt_optimizer, initial_opt_state
from trainer.core.tree_paths import leaf_path
from trainer.errors import ArgumentError, first_of

ANY_HORIZON = 2**31 - 1
"""A placeholder horizon, used if only the structure of the optimizer state matters."""


@dataclasses.dataclass(frozen=True, eq=False)
class WholeOptimizer:
    """What the optimizer of a trainer is built from, and which part of its state is that of the caller's optimizer.

    Attributes:
        config: The configuration.
        given: The caller's optimizer; None if it is built from the configuration.
        parts: Transformations that callbacks append to it, as `trainer.ReduceLROnPlateau` does.
        average: The last transformation of the chain, see `trainer.ema_of_params`.
    """

    config: TrainingConfig
    given: optax.GradientTransformation | None
    parts: Sequence[optax.GradientTransformation]
    average: optax.GradientTransformation | None

    def build(self, horizon: Any) -> optax.GradientTransformation:
        """Returns the chain of gradient clipping, the given or configured optimizer, and the average of the params.

        Args:
            horizon: The step at which a computed schedule ends; it may be traced, so that a longer run compiles
                nothing.

        Raises:
            ConfigError: The schedule needs a horizon, but none is known.
        """
        optimizer, clip_norm = self._own(horizon), self.config.gradient_clip_norm
        if clip_norm is not None:
            optimizer = optax.chain(optax.clip_by_global_norm(clip_norm), adapt_optimizer(optimizer))
        if self.parts:
            optimizer = optax.chain(adapt_optimizer(optimizer), *self.parts)
        return optimizer if self.average is None else optax.chain(adapt_optimizer(optimizer), self.average)

    def own_state(self, opt_state: Any) -> Any:
        """Returns the state of the given or configured optimizer, from that of the whole one."""
        for index in self._positions():
            opt_state = opt_state[index]
        return opt_state

    def fitted(self, opt_state: Any, params: Any, held: Any = None) -> Any:
        """Returns an optimizer state in the structure that the steps take.

        A state fits if its arrays have the paths and shapes of that structure, as for a checkpoint. That of the given
        or configured optimizer alone, ``optimizer.init(params)``, fits too: clipping keeps nothing, and the parts of
        callbacks and the average are those in ``held``, or new.

        Args:
            opt_state: The state.
            params: The params of the same state.
            held: The state that the trainer holds, if it is for these params.

        Raises:
            ArgumentError: It does not fit.
        """
        try:
            wanted, wanted_own = (
                jax.eval_shape(lambda params, optimizer=optimizer: initial_opt_state(optimizer, params), params)
                for optimizer in (self.build(ANY_HORIZON), self._own(ANY_HORIZON))
            )
        except Exception:  # an `init` that cannot be traced
            return opt_state
        if (found := _in_structure(opt_state, wanted)) is not None:
            return found
        own = _in_structure(opt_state, wanted_own)
        own = _in_structure(_without_clipping(opt_state), wanted_own) if own is None else own
        if own is None and isinstance(wanted_own, LookaheadOptState):
            inner = _in_structure(opt_state, wanted_own.inner)
            own = None if inner is None else LookaheadOptState(inner, jax.tree.map(jnp.copy, params))
        if own is None:
            anew = "optimizer.init(state.params)` starts it anew"
            if self.given is None:
                anew = f"trainer.{anew}, and so does a trainer of `state.model()`"
            raise ArgumentError(
                f"`opt_state` is not that of the optimizer of this trainer: {_difference(opt_state, wanted)}. `{anew}."
            )
        if held is None or _shapes(held) != _shapes(wanted):
            held = initial_opt_state(self.build(ANY_HORIZON), params)
            held = jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), held)  # an average may share the params
        return _replaced(held, self._positions(), own)

    def _own(self, horizon: Any) -> optax.GradientTransformation:
        if self.given is not None:
            return self.given
        rate, scheduler = self.config.optimizer.learning_rate, self.config.scheduler
        return make_optimizer(
            self.config.optimizer, None if scheduler is None else make_schedule(scheduler, rate, horizon)
        )

    def _positions(self) -> list[int]:
        """Returns the indices, from the outermost chain inwards, that lead to the caller's optimizer."""
        is_clipped = self.config.gradient_clip_norm is not None
        return [0] * (self.average is not None) + [0] * bool(self.parts) + [1] * is_clipped


def has_same_shapes(opt_state: Any, held: Any) -> bool:
    """Returns whether two states have the same structure, and arrays of the same shapes."""
    structures: list[Any] = [jax.tree.structure(tree) for tree in (opt_state, held)]
    shapes = [list(map(jnp.shape, jax.tree.leaves(tree))) for tree in (opt_state, held)]
    return structures[0] == structures[1] and shapes[0] == shapes[1]


def _replaced(node: Any, positions: Sequence[int], own: Any) -> Any:
    if not positions:
        return own
    index, *rest = positions
    return (*node[:index], _replaced(node[index], rest, own), *node[index + 1 :])


def _without_clipping(opt_state: Any) -> Any:
    """Returns the state of an optimizer from that of a trainer with ``gradient_clip_norm``; any other is unchanged."""
    is_clipped = type(opt_state) is tuple and len(opt_state) == 2 and isinstance(opt_state[0], optax.EmptyState)
    return opt_state[1] if is_clipped else opt_state


def _shapes(tree: Any) -> dict[str, tuple[int, ...]]:
    return {leaf_path(path): jnp.shape(leaf) for path, leaf in jax.tree.leaves_with_path(tree)}


def _in_structure(opt_state: Any, wanted: Any) -> Any:
    """Returns the arrays of a state in another structure, with the wider of both dtypes; None if they do not fit."""
    if _shapes(opt_state) != _shapes(wanted):
        return None
    held = {leaf_path(path): leaf for path, leaf in jax.tree.leaves_with_path(opt_state)}
    return jax.tree.map_with_path(lambda path, like: widened(held[leaf_path(path)], like.dtype), wanted)


def _difference(opt_state: Any, wanted: Any) -> str:
    have, want = _shapes(opt_state), _shapes(wanted)
    kinds = {
        "it lacks": [f"`{path}`" for path in want if path not in have],
        "it also holds": [f"`{path}`" for path in have if path not in want],
        "another shape has": [
            f"`{path}`, {have[path]} and not {shape}" for path, shape in want.items() if have.get(path, shape) != shape
        ],
    }
    return "; ".join(f"{what} {first_of(named, 3)}" for what, named in kinds.items() if named)
