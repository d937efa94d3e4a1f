"""Writes a state as a pickle in the reference's layout, one array at a time."""

import itertools
import pickle  # for its opcodes only
import struct
from collections.abc import Iterable, Iterator
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from trainer.checkpoints.reference_pickle.layout import (
    EXTENDED_DTYPES,
    KEY_WIDTHS,
    KEYS,
    bits_dtype,
    children_of,
    merged,
)
from trainer.errors import CheckpointError
from trainer.state import TrainState


def write_pickle(file: BinaryIO, state: TrainState) -> None:
    """Writes a state as a pickle of protocol 4.

    The weights of extensions are left out: the reference treats them as configuration.

    Args:
        file: An open binary file.
        state: The state. ``params`` and ``model_state`` become one tree of module attributes, and optax's named tuples
            become plain tuples.

    Raises:
        CheckpointError: The state is that of several models, or a key of it has a PRNG implementation that
            `read_pickle` does not know.
    """
    if state.step.ndim:
        raise CheckpointError(
            f"a pickle holds one step, and `state.step` has the shape {state.step.shape}, that of several models, "
            f"stacked; save a name in .msgpack or .orbax."
        )
    content = (
        int(state.step),
        state.opt_state,
        merged(state.params, state.model_state),
        state.rng,
        {name: entry["variables"] for name, entry in state.extensions.items() if "variables" in entry},
    )
    file.write(pickle.PROTO + bytes([4]))
    for piece in _pickled(dict(zip(KEYS, content, strict=True))):
        file.write(piece)
    file.write(pickle.STOP)


def _pickled(value: Any) -> Iterator[Any]:
    """Yields the bytes of the operations that build ``value``. No piece is larger than one array."""
    match value:
        case None:
            yield pickle.NONE
        case str():
            yield from _sized(pickle.BINUNICODE, "<I", value.encode())
        case int():
            yield from _sized(pickle.LONG1, "<B", pickle.encode_long(value))
        case tuple():
            yield from _enclosed(pickle.MARK, value, pickle.TUPLE)
        case list():
            yield from _enclosed(pickle.EMPTY_LIST + pickle.MARK, value, pickle.APPENDS)
        case dict():
            items = itertools.chain.from_iterable(value.items())
            yield from _enclosed(pickle.EMPTY_DICT + pickle.MARK, items, pickle.SETITEMS)
        case _ if not jax.tree_util.all_leaves([value]):
            yield from _pickled(children_of(value))
        case jax.Array() if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            name = str(jax.random.key_impl(value))
            if name not in KEY_WIDTHS:
                raise CheckpointError(f"a key is of the implementation {name!r}; known: {', '.join(KEY_WIDTHS)}.")
            yield from _pickled({"key_impl": name, "key_data": jax.random.key_data(value)})
        case _:
            # On an accelerator, a jax.Array caches its host copy; the cache of this alias is freed with the alias.
            array = np.asarray(value.addressable_data(0) if getattr(value, "is_fully_replicated", False) else value)
            if array.dtype.name in EXTENDED_DTYPES:
                yield from _pickled({"dtype": array.dtype.name, "bits": array.view(bits_dtype(array.dtype))})
            else:
                yield from _pickled_array(array)


def _pickled_array(array: npt.NDArray[Any]) -> Iterator[Any]:
    # These names work in every NumPy: version 2 keeps the old names for pickles, and version 1 lacks the new ones.
    yield b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n"
    yield from _pickled((0,))
    yield from _sized(pickle.SHORT_BINBYTES, "<B", b"b")
    yield pickle.TUPLE3 + pickle.REDUCE + pickle.MARK + pickle.BININT1 + b"\1"
    yield from _pickled(array.shape)
    array = array.astype(array.dtype.newbyteorder("<"), copy=False)
    yield b"cnumpy\ndtype\n"
    yield from _pickled((array.dtype.str,))
    yield pickle.REDUCE + pickle.NEWFALSE
    yield from _sized(pickle.BINBYTES8, "<Q", array.reshape(-1).view(np.uint8))
    yield pickle.TUPLE + pickle.BUILD


def _enclosed(start: bytes, values: Iterable[Any], end: bytes) -> Iterator[Any]:
    yield start
    for value in values:
        yield from _pickled(value)
    yield end


def _sized(code: bytes, length: str, data: Any) -> Iterator[Any]:
    yield code + struct.pack(length, len(data))
    yield data
