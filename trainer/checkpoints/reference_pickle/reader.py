"""Reads the arrays of a pickle in the reference's layout, by their paths in a training state."""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
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
from trainer.checkpoints.reference_pickle.machine import ArrayNode, Global, Instance, Machine, Refused, describe_value
from trainer.core.tree_paths import leaf_path
from trainer.errors import CheckpointError
from trainer.state import TrainState

ArrayOrKey = tuple[npt.NDArray[Any], str | None]
"""An array, and the key implementation if the array is key data."""

# A short file can refer to one node many times, and so expand to a huge tree. This bounds the total length of all
# paths, including those of inner nodes.
MAX_PATHS = 2**23
MAX_DEPTH = 100

_SOWN = ("Intermediate", "Perturbation")
_RAW_VALUE = ("_raw_value", "raw_value", "value")
"""The field that holds a variable's value: in Flax today, in 0.12.0, and before."""


def read_pickle(path: Path, like: TrainState | None) -> dict[str, ArrayOrKey]:
    """Returns the arrays of a file that `write_pickle` or the reference trainer wrote, in protocol 2 or later.

    Nothing that the file names is imported or called. Reading takes the memory of the file, or three times that for
    protocol 2. Pickles have no checksums: damage to the bytes of an array goes unnoticed.

    Args:
        path: The file.
        like: A state that tells which variables are ``params`` and gives the names of the optimizer's fields.
            If it is None, paths are as in the file: all variables of the model are under ``model_state``, and fields
            are numbered.

    Returns:
        The arrays, by the path that `trainer.errors.leaf_path` gives the leaf in ``like``. Each is read-only, possibly
        unaligned, and shares the bytes of the file. An array without a counterpart keeps its path in the file. Leaves
        of ``like`` may be missing, and the weights of extensions always are.

    Raises:
        CheckpointError: The file could not be read, or is not such a pickle.
    """
    params = {leaf_path(keys) for keys, _ in jax.tree.leaves_with_path(like.params if like else ())}
    try:
        if not path.is_file():
            raise FileNotFoundError("there is no such file")  # reading a named pipe would block
        data = path.read_bytes()
    except (OSError, MemoryError) as error:
        raise CheckpointError(f"`{path}` could not be read: {error}") from error
    try:
        found = _leaves(Machine(data).run(), like)
    except Refused as error:
        raise CheckpointError(f"`{path}` is refused: {error}. Nothing in it was executed.") from None
    except Exception as error:  # hostile bytes can raise anything, and callers catch one exception
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise CheckpointError(f"`{path}` is damaged or no checkpoint ({reason}). Nothing in it was executed.") from None
    return {_path_in_state(name, params): leaf for name, leaf in found.items()}


def _leaves(content: Any, like: TrainState | None) -> dict[str, ArrayOrKey]:
    """Returns the arrays in a machine's result, by their paths in it, with the field names of ``like``."""
    if type(content) is not dict or not {*KEYS[:4]} <= content.keys() <= {*KEYS}:
        keys = ", ".join(str(key) for key in itertools.islice(content, 10)) if type(content) is dict else ""
        found = f"a dict of the keys {keys or 'none'}" if type(content) is dict else describe_value(content)
        raise Refused(f"it holds {found}, and a checkpoint is a dict of the keys {', '.join(KEYS)}")
    live: dict[str, Any] = {}
    extensions: dict[str, Any] = {}
    if like is not None:
        live = {"opt_state": like.opt_state, "model_state": merged(like.params, like.model_state)}
        extensions = like.extensions
    todo = [(key, content[key], live.get(key), 0) for key in KEYS[:4]]
    for name, variables in content.get("extensions_state", {}).items():
        todo.append((f"extensions/{name}/variables", variables, extensions.get(name, {}).get("variables"), 0))
    leaves: dict[str, ArrayOrKey] = {}
    allowance = MAX_PATHS
    # A loop rather than recursion, so that a deep tree is refused before it overflows the stack.
    while todo:
        path, node, counterpart, depth = todo.pop()
        leaf = _leaf(node)
        if leaf is not None:
            if path in leaves:
                raise Refused(f"it has two arrays at `{path}`")
            leaves[path] = leaf
            continue
        for below, value, known in _parts(path, node, counterpart):
            allowance -= len(below)
            if allowance < 0 or depth > MAX_DEPTH:
                raise Refused("it unfolds into a tree that is too deep or too large")
            todo.append((below, value, known, depth + 1))
    step, implementation = leaves.get("step", (np.empty(0), None))
    if implementation or step.shape != () or step.dtype.kind not in "iu" or not 0 <= int(step) < 2**31:
        raise Refused("its `step` is no number of updates")
    leaves["step"] = np.asarray(step, np.int32), None
    return leaves


def _leaf(node: Any) -> ArrayOrKey | None:
    """Returns the array that a node represents, or None if the node is a container."""
    match node:
        case ArrayNode(value=np.ndarray() as array):
            return array, None
        case bool() | int() | float():
            return np.asarray(node, jax.dtypes.canonicalize_dtype(type(node))), None
        case {"dtype": str(name), "bits": ArrayNode(value=np.ndarray() as bits)} if (
            len(node) == 2 and name in EXTENDED_DTYPES
        ):
            dtype = EXTENDED_DTYPES[name]
            return (bits.view(dtype), None) if bits.dtype == bits_dtype(dtype) else None
        case {"key_impl": str(name), "key_data": ArrayNode(value=np.ndarray() as data)} if len(node) == 2:
            return _key(data, name)
        case Instance(
            kind=Global("jax._src.random.prng.PRNGKeyArray" | "jax._src.prng.PRNGKeyArray"),
            attributes={
                "_impl": Instance(arguments=(*_, str(name), _)),
                "_base_array": ArrayNode(value=np.ndarray() as data),
            },
        ):
            return _key(data, name)
    return None


def _key(data: npt.NDArray[Any], implementation: str) -> ArrayOrKey | None:
    fits = data.dtype == np.uint32 and data.shape[-1:] == (KEY_WIDTHS.get(implementation),)
    return (data, implementation) if fits else None


def _parts(path: str, node: Any, like: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yields the path, value and counterpart in ``like`` of each child of a node, or of the value it wraps."""
    match node:
        case None:
            pass
        case Instance(attributes={"_mapping": mapping}):  # an nnx.State
            yield path, mapping, like
        case Instance(attributes=dict(fields)) if "_var_metadata" in fields:  # an nnx.Variable
            # Sown values are not part of a training state.
            if fields.get("type", node.kind) not in (Global(f"flax.nnx.variablelib.{name}") for name in _SOWN):
                yield path, next(fields[name] for name in _RAW_VALUE if name in fields), like
        case Instance():  # a dataclass, or a named tuple
            yield path, node.arguments if node.attributes is None else node.attributes, like
        case dict():
            known = children_of(like)
            for key, value in node.items():
                yield f"{path}/{key}", value, known.get(str(key))
        case list() | tuple():
            known = children_of(like) if isinstance(like, list | tuple) else {}
            unknown = ((index, None) for index in range(len(known), len(node)))
            for value, (name, counterpart) in zip(node, itertools.chain(known.items(), unknown), strict=False):
                yield f"{path}/{name}", value, counterpart
        case _:
            raise Refused(f"`{path}` is {describe_value(node)}, where an array must be")


def _path_in_state(path: str, params: set[str]) -> str:
    section, _, below = path.partition("/")
    return f"params/{below}" if section == "model_state" and below in params else path
