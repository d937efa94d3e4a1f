"""Exports predictions to a file that runs without this library, Flax or the model's code."""

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np

from trainer.batches import checked_batch, summarize
from trainer.checkpoints.atomic import replacing
from trainer.core.checks import check_count, did_you_mean
from trainer.data.memory import dtype_in_jax
from trainer.errors import ArgumentError, CheckpointError
from trainer.paths import in_home
from trainer.state import TrainState
from trainer.types import Batch

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def export_prediction(
    path: str | os.PathLike[str],
    predict_step: Callable[[TrainState, Batch], Any],
    state: TrainState,
    example: Any,
    *,
    batch_size: int | None = None,
    platforms: Sequence[str] | None = None,
) -> Path:
    """Writes a prediction function, weights included, as StableHLO serialized by ``jax.export``.

    Needs the extra ``export``. Another program, which needs only JAX and flatbuffers, reads and calls it::

        predict = jax.export.deserialize(bytearray(open(path, "rb").read())).call
        outputs = predict(batch)

    JAX guarantees that it stays readable for at least six months. The write is atomic.

    Args:
        path: The file; its parent directory is created if missing.
        predict_step: The result of `make_predict_step`, with or without ``jax.jit``.
        state: The state; all of it must be on this process's devices. It is copied to the host.
        example: A batch of arrays or ``jax.ShapeDtypeStruct``. Only dtypes and the shapes after the first dimension
            matter. The other program passes batches of the same structure.
        batch_size: The number of examples in a batch; None for any number, which the model must support.
        platforms: Compilation targets among "cpu", "cuda", "rocm" and "tpu"; by default JAX's default platform.

    Returns:
        The path.

    Raises:
        ArgumentError: An argument is invalid, or the function cannot be exported: it depends on the number of
            examples, calls back into Python, or takes a batch of a class that JAX cannot serialize.
        BatchError: ``example`` is not a batch whose arrays have the same number of rows.
        CheckpointError: The file could not be written; any existing file is unchanged.
    """
    path = Path(in_home(path))
    _import_flatbuffers()
    for platform in _checked_platforms(platforms):
        if platform not in PLATFORMS:
            raise ArgumentError(f"`platforms` names {platform!r}; {did_you_mean(str(platform), PLATFORMS)}")
    example, length = checked_batch(example, "example")
    if length is None:
        raise ArgumentError(f"`example` has no common number of rows: {summarize(example)}.")
    rows = jax.export.symbolic_shape("rows")[0] if batch_size is None else check_count(batch_size, "batch_size")
    abstract = jax.tree.map(lambda leaf: _abstract(leaf, rows), example)
    state.check_alive()
    if not all(leaf.is_fully_addressable for leaf in jax.tree.leaves(state)):
        raise ArgumentError("`state` is spread over several processes; export it from one that holds all of it.")
    # A single device can make the predictions of a whole mesh.
    held = jax.tree.map(_on_one_device, state)
    function = getattr(predict_step, "__wrapped__", predict_step)
    try:
        exported = jax.export.export(jax.jit(lambda batch: function(held, batch)), platforms=platforms)(abstract)
        content = exported.serialize()
    except Exception as error:
        if isinstance(error, ArgumentError):
            raise
        advice = "" if batch_size else " If the model needs to know the number of examples, pass `batch_size`."
        raise ArgumentError(f"the prediction cannot be exported: {str(error).rstrip('.')}.{advice}") from error
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, len(content)) as file:
            file.write(content)
    except OSError as error:
        raise CheckpointError(f"`{path}` could not be written: {error}") from error
    return path


def _import_flatbuffers() -> None:
    try:
        import flatbuffers  # noqa: F401, which JAX imports when it serializes
    except ImportError as error:
        raise ArgumentError(
            "exporting needs the package flatbuffers; run `pip install 'nnx-trainer[export]'`."
        ) from error


def _checked_platforms(platforms: Any) -> Sequence[str]:
    if platforms is None:
        return ()
    if isinstance(platforms, str) or not isinstance(platforms, Sequence) or not platforms:
        raise ArgumentError(f"`platforms` is {platforms!r:.60}; it must be a list of names, such as ['cpu', 'cuda'].")
    return platforms


def _abstract(leaf: Any, rows: Any) -> Any:
    shape = np.shape(leaf)
    dtype = dtype_in_jax(leaf if hasattr(leaf, "dtype") else np.asarray(leaf))
    return jax.ShapeDtypeStruct((rows, *shape[1:]) if shape else (), dtype)


def _on_one_device(leaf: jax.Array) -> jax.Array:
    if not jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.asarray(np.asarray(leaf))
    data = jnp.asarray(np.asarray(jax.random.key_data(leaf)))
    key: jax.Array = jax.random.wrap_key_data(data, impl=jax.random.key_impl(leaf))
    return key
