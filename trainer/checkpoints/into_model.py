"""Loads weights from a checkpoint into a model, without an optimizer."""

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
    """Returns a copy of a model with the params and other variables of a checkpoint.

    Equivalent to ``load_state(path, like, only=("params", "model_state")).model()`` for a state of the model.

    Args:
        path: As for `load_state`: one of our checkpoints, an Orbax directory, ``.safetensors``, ``.npz`` or a pickle.
            Names in a weights file may be the model's attributes joined by dots: ``layers.0.kernel``.
        model: A model of the same structure. It is not modified.
        strict: As for `load_state`.
        wrt: The ``wrt`` of the trainer that wrote the checkpoint, if it is one of ours.

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
    # Nothing is optimized. `create` requires a key, but the key is not loaded.
    like = TrainState.create(model, optax.identity(), rng=jax.random.key(0), wrt=wrt)
    loaded = load_state(path, like, strict=strict, only=("params", "model_state"))
    return cast(Module, loaded.model())
