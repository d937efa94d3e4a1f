"""Weights from a checkpoint in a model of their own, without an optimizer."""

import os
from typing import TypeVar, cast

import jax
import optax
from flax import nnx

from trainer.checkpoints.state_io import load_state
from trainer.state import TrainState, check_model

Module = TypeVar("Module", bound=nnx.Module)


def load_weights(
    path: str | os.PathLike[str], model: Module, *, strict: bool = True, wrt: nnx.filterlib.Filter = nnx.Param
) -> Module:
    """Returns a copy of a model with the params and the other variables of a checkpoint.

    It is ``load_state(path, like, only=("params", "model_state")).model()`` for a state of the model.

    Args:
        path: As for `load_state`: a checkpoint of ours, a directory of Orbax, ``.safetensors``, ``.npz``, a pickle.
            Names in the last but one are the attributes of the model, joined by dots: ``layers.0.kernel``.
        model: A model of the same structure. It is not touched.
        strict: As for `load_state`.
        wrt: The ``wrt`` of the trainer that wrote a checkpoint of ours.

    Raises:
        ArgumentTypeError: ``model`` is not an ``nnx.Module``.
        CheckpointError: As for `load_state`.

    Example:
        >>> import tempfile
        >>> from trainer import save_state
        >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
        >>> state = TrainState.create(model, optax.adam(1e-3), rng=jax.random.key(0))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     path = save_state(f"{directory}/model.msgpack", state)
        ...     loaded = load_weights(path, nnx.Linear(2, 1, rngs=nnx.Rngs(1)))
        >>> bool((loaded.kernel == model.kernel).all())
        True
    """
    check_model(model)
    # Nothing is optimized; the key is needed to make a state, and not loaded.
    like = TrainState.create(model, optax.identity(), rng=jax.random.key(0), wrt=wrt)
    loaded = load_state(path, like, strict=strict, only=("params", "model_state"))
    return cast(Module, loaded.model())
