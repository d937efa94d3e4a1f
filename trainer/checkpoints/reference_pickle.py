"""The pickle layout of the reference trainer, written and read without Python's own pickle machine.

A pickle is a program for a small stack machine, and Python's imports and calls whatever the program
names. The one here knows a closed list of operations, looks no name up, and makes nothing but plain
containers and arrays over the bytes of the file. An allow-list for ``pickle.Unpickler`` would not do:
the state of a ``numpy.dtype`` alone can make NumPy read memory that is not its own.

What is written is a dict with the keys ``step`` (an int), ``opt_state``, ``model_state``, ``rng`` and
``extensions_state``, made of dicts, tuples, lists, strings, ints, None and NumPy arrays, so that
``pickle.load`` needs NumPy alone. What NumPy has no dtype for is a dict:

- ``{"dtype": "bfloat16", "bits": <uint16 array>}`` for the dtypes of ``ml_dtypes``. Those of less
  than a byte take one byte an entry. With that package, ``bits.view(dtype)`` is the array.
- ``{"key_impl": "threefry2x32", "key_data": <uint32 array>}`` for typed keys.
"""

import dataclasses
import itertools
import math
import pickle  # for the codes of its operations only
import struct
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import numpy.typing as npt

from trainer.errors import CheckpointError, leaf_path
from trainer.state import TrainState

Leaf = tuple[npt.NDArray[Any], str | None]
"""An array, and the key implementation if it is the data of typed keys."""

KEYS = ("step", "opt_state", "model_state", "rng", "extensions_state")

# A jax array takes about 65 operations, so this is 16,000 of them; a hostile file of as many makes 100 MB.
MAX_OPERATIONS = 2**20
# References let a short file stand for a long tree. This bounds the characters in all paths, inner nodes' too.
MAX_PATHS = 2**23
MAX_DEPTH = 100
MAX_NAME = 256

_NATIVE = {
    order + code: np.dtype(f"<{code}")
    for order in ("", "<", "|")
    for code in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
}
_EXTENDED: dict[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for name, kind in vars(ml_dtypes).items()
    if isinstance(kind, type) and issubclass(kind, np.generic)
}
_KEY_WIDTHS = {"threefry2x32": 2, "rbg": 4, "unsafe_rbg": 4}


def write_pickle(file: BinaryIO, state: TrainState) -> None:
    """Writes a state as a pickle of protocol 4, one array at a time.

    The weights of extensions are not written: to the reference they are configuration.

    Args:
        file: Where to.
        state: What. ``params`` and ``model_state`` become one tree along the module's attributes, the named
            tuples of optax plain ones.

    Raises:
        CheckpointError: A key of the state is of an implementation that could not be read back.
    """
    content = (
        int(state.step),
        state.opt_state,
        _merge(state.params, state.model_state),
        state.rng,
        {name: extension["variables"] for name, extension in state.extensions.items()},
    )
    file.write(pickle.PROTO + bytes([4]))
    for piece in _pickled(dict(zip(KEYS, content, strict=True))):
        file.write(piece)
    file.write(pickle.STOP)


def read_pickle(path: Path, like: TrainState | None) -> dict[str, Leaf]:
    """Reads a file of `write_pickle`, or of the reference trainer, in any protocol since 2.

    Nothing that the file names is imported or called, whatever is in it. It takes the memory of the file,
    three times that in protocol 2. A pickle has no checksum: damage to the bytes of an array goes unnoticed.

    Args:
        path: The file.
        like: Says which variables are ``params``, and how the fields of the optimizer's state are called. Without
            it the paths are those of the file: everything of the model under ``model_state``, fields by number.

    Returns:
        By the path that `trainer.errors.leaf_path` gives the leaf in ``like``, the array: read-only, perhaps
        unaligned, over the bytes of the file. What has no counterpart there goes by its path in the file; of
        ``like`` any leaf may be missing, and the weights of the extensions always are.

    Raises:
        CheckpointError: It could not be read, or is anything but such a file.
    """
    params = {leaf_path(keys) for keys, _ in jax.tree.leaves_with_path(like.params if like else ())}
    try:
        if not path.is_file():
            raise FileNotFoundError("there is no such file")  # and no wait for the other end of a pipe
        data = path.read_bytes()
    except (OSError, MemoryError) as error:
        raise CheckpointError(f"`{path}` could not be read: {error}") from error
    try:
        found = _leaves(_Machine(data).run(), like)
    except _Refused as error:
        raise CheckpointError(f"`{path}` is refused: {error}. Nothing in it was executed.") from None
    except Exception as error:  # hostile bytes have no end of ways to be wrong, and the caller must learn of one
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise CheckpointError(f"`{path}` is damaged or no checkpoint ({reason}). Nothing in it was executed.") from None
    return {_in_state(name, params): leaf for name, leaf in found.items()}


def _pickled(value: Any) -> Iterator[Any]:
    """Yields the bytes of a pickle that makes ``value``, in pieces of at most one array."""
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
            yield from _pickled(_children(value))
        case jax.Array() if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            name = str(jax.random.key_impl(value))
            if name not in _KEY_WIDTHS:
                raise CheckpointError(f"a key is of the implementation {name!r}; known: {', '.join(_KEY_WIDTHS)}.")
            yield from _pickled({"key_impl": name, "key_data": jax.random.key_data(value)})
        case _:
            # On an accelerator a jax.Array caches its copy on the host; the cache of this alias ends with it.
            array = np.asarray(value.addressable_data(0) if getattr(value, "is_fully_replicated", False) else value)
            if array.dtype.name in _EXTENDED:
                yield from _pickled({"dtype": array.dtype.name, "bits": array.view(_bits(array.dtype))})
            else:
                yield from _pickled_array(array)


def _pickled_array(array: npt.NDArray[Any]) -> Iterator[Any]:
    # By these names any NumPy knows them: version 2 keeps the old ones for files, and 1 lacks those of 2.
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


class _Refused(Exception):  # noqa: N818
    """Why a file is not read, as a part of a sentence."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Name:
    """A module and what Python's machine would look up in it."""

    name: str


@dataclasses.dataclass(eq=False, slots=True)
class _Object:
    """What Python's machine would make an instance from."""

    kind: _Name
    arguments: tuple[Any, ...]
    attributes: dict[Any, Any] | None = None


@dataclasses.dataclass(eq=False, slots=True)
class _Array:
    value: npt.NDArray[Any] | None = None


class _Machine:
    """Runs the operations of a pickle over a stack of plain values, dtypes and the classes above."""

    def __init__(self, data: bytes) -> None:
        self.data = memoryview(data)
        self.position = 0
        # Each byte may go into one array and, protocol 2 having no bytes, into one string before that.
        self.allowance = 2 * len(data)
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        if bytes(self.data[:2]) not in (b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5"):
            raise _Refused("it is no pickle of a protocol from 2 to 5")
        self.position = 2
        for _ in range(MAX_OPERATIONS):
            code = self.number("<B")
            if code in _VALUES:
                self.stack.append(_VALUES[code](self))
            elif code in _EFFECTS:
                _EFFECTS[code](self)
            elif code == pickle.STOP[0]:
                break
            else:
                name = _CODES.get(code, code)
                raise _Refused(f"the operation {name} at byte {self.position - 1} has no place in a checkpoint")
        else:
            raise _Refused(f"it has more than {MAX_OPERATIONS:,} operations")
        if self.position != len(self.data):
            raise _Refused(f"{len(self.data) - self.position} bytes follow its end")
        (result,) = self.stack
        return result

    def number(self, code: str) -> Any:
        (value,) = struct.unpack(code, self.take(struct.calcsize(code)))
        return value

    def take(self, size: int) -> memoryview:
        taken = self.data[self.position : self.position + size]
        if len(taken) < size:
            raise _Refused("it ends in the middle")
        self.position += size
        return taken

    def sized(self, length: str) -> memoryview:
        return self.take(self.number(length))

    def text(self, length: str) -> str:
        data = self.sized(length)
        # One character beyond Latin-1 makes Python take four bytes for each; a long text is bytes in protocol 2.
        if len(data) > 2**16 and np.frombuffer(data, np.uint8).max() > 0xC3:
            raise _Refused("it has a long text that is none of Latin-1")
        return str(data, "utf-8")

    def line(self) -> str:
        line, _, _ = bytes(self.data[self.position : self.position + MAX_NAME]).partition(b"\n")
        self.take(len(line) + 1)
        return line.decode()

    def pop(self, count: int) -> tuple[Any, ...]:
        start = len(self.stack) - count
        if start < 0:
            raise _Refused("it takes what it never made")
        values = tuple(self.stack[start:])
        del self.stack[start:]
        return values

    def pop_to_mark(self) -> tuple[Any, ...]:
        return self.pop(max(0, len(self.stack) - self.marks.pop()))

    def memorize(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def extend(self, values: tuple[Any, ...]) -> None:
        if type(self.stack[-1]) is not list:
            raise _Refused(f"it appends to {_describe(self.stack[-1])}")
        self.stack[-1].extend(values)

    def set_items(self, values: tuple[Any, ...]) -> None:
        target = self.stack[-1]
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Hashing goes as deep as the key does, and large ints can be chosen to collide.
            fits = len(key) <= MAX_NAME if type(key) is str else type(key) is int and abs(key) < 2**31
            if type(target) is not dict or not fits:
                raise _Refused(f"it sets the item {_describe(key)} of {_describe(target)}")
            target[key] = value

    def push_name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str or max(len(module), len(name)) > MAX_NAME:
            raise _Refused(f"it names {_describe(name)} in {_describe(module)}")
        found = _Name(f"{module.replace('numpy._core', 'numpy.core')}.{name}")  # as NumPy 2 and 1 call it
        # No array, variable or optimizer state is of Python's own classes: this is an attack or a mistake.
        if module.partition(".")[0] in _PYTHON and found.name not in _CALLS:
            raise _Refused(f"it names {_describe(found)}, which has no place in a checkpoint")
        self.stack.append(found)

    def make(self, kind: Any, arguments: Any) -> None:
        if type(kind) is not _Name or type(arguments) is not tuple:
            raise _Refused(f"it makes an instance of {_describe(kind)}")
        self.stack.append(_Object(kind, arguments))

    def call(self, function: Any, arguments: Any) -> None:
        if type(function) is not _Name or function.name not in _CALLS:
            raise _Refused(f"it calls {_describe(function)}, which makes no array")
        self.stack.append(_CALLS[function.name](self, *arguments))

    def build(self, target: Any, state: Any) -> None:
        match target, state:
            case _Array(value=None), (1, shape, dtype, bool(fortran), data):
                target.value = self.array(shape, dtype, data, "F" if fortran else "C")
            case np.dtype(), (3, "<" | "|", None, None, None, _, _, _):
                pass  # as it is already
            case np.dtype(), _:
                raise _Refused(f"it has an array of {_describe(target)}, but big-endian or with parts")
            case _Object(attributes=None), dict(attributes) | (None, dict(attributes)):  # the second of slots
                target.attributes = attributes
            case _:
                raise _Refused(f"it gives {_describe(target)} a state that has no place in a checkpoint")

    def array(self, shape: Any, dtype: Any, data: Any, order: Any = "C") -> npt.NDArray[Any]:
        if not (isinstance(dtype, np.dtype) and isinstance(data, bytes | memoryview)):
            raise _Refused(f"it has an array of {_describe(dtype)} from {_describe(data)}")
        if type(shape) is not tuple or len(shape) > 32 or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
            raise _Refused("it has an array of an impossible shape")
        if math.prod(shape) * dtype.itemsize != len(data):
            raise _Refused(f"it has {len(data)} bytes for an array of {dtype}{shape}")
        self.spend(len(data))
        return np.ndarray(shape, dtype, buffer=data, order=order)

    def spend(self, size: int) -> None:
        self.allowance -= size
        if self.allowance < 0:
            raise _Refused("it unfolds into more data than it holds")


def _make_dtype(machine: _Machine, code: Any, align: Any = False, copy: Any = True) -> np.dtype[Any]:
    del machine, align, copy
    match code:
        case str() if code in _NATIVE:
            return _NATIVE[code]
        case _Name(name=name) if name.removeprefix("ml_dtypes.") in _EXTENDED:
            return _EXTENDED[name.removeprefix("ml_dtypes.")]
    raise _Refused(f"it has an array of the dtype {_describe(code)}, which no jax array has")


def _make_array(machine: _Machine, kind: Any, shape: Any, code: Any) -> _Array:
    del machine
    if (kind, shape, code) != (_Name("numpy.ndarray"), (0,), b"b"):
        raise _Refused(f"it has an array of the class {_describe(kind)}")
    return _Array()


def _make_jax_array(machine: _Machine, function: Any, arguments: Any, state: Any, about: Any) -> _Array:
    del about  # whether it is weakly typed, which no array of a training state is
    if function != _Name("numpy.core.multiarray._reconstruct"):
        raise _Refused(f"it has an array made by {_describe(function)}")
    array = _make_array(machine, *arguments)
    machine.build(array, state)
    return array


def _make_bytes(machine: _Machine, text: Any = "", encoding: Any = "latin1") -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise _Refused(f"it encodes {_describe(text)}")
    machine.spend(len(text))
    return text.encode("latin-1")


_PYTHON = sys.stdlib_module_names | {"__builtin__"}

_CALLS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": _make_dtype,
    "numpy.core.multiarray._reconstruct": _make_array,
    "numpy.core.multiarray.scalar": lambda m, dtype, data: _Array(m.array((), dtype, data)),
    "numpy.core.numeric._frombuffer": lambda m, data, dtype, shape, order: _Array(m.array(shape, dtype, data, order)),
    "jax._src.array._reconstruct_array": _make_jax_array,
    "_codecs.encode": _make_bytes,
    "__builtin__.bytes": _make_bytes,
}

_CODES = {code[0]: name for name, code in vars(pickle).items() if type(code) is bytes and len(code) == 1}

_VALUES: dict[int, Callable[[_Machine], Any]] = {
    pickle.NONE[0]: lambda m: None,
    pickle.NEWTRUE[0]: lambda m: True,
    pickle.NEWFALSE[0]: lambda m: False,
    pickle.BININT[0]: lambda m: m.number("<i"),
    pickle.BININT1[0]: lambda m: m.number("<B"),
    pickle.BININT2[0]: lambda m: m.number("<H"),
    pickle.LONG1[0]: lambda m: int.from_bytes(m.sized("<B"), "little", signed=True),
    pickle.BINFLOAT[0]: lambda m: m.number(">d"),
    pickle.SHORT_BINUNICODE[0]: lambda m: m.text("<B"),
    pickle.BINUNICODE[0]: lambda m: m.text("<I"),
    pickle.BINUNICODE8[0]: lambda m: m.text("<Q"),
    pickle.SHORT_BINBYTES[0]: lambda m: m.sized("<B"),
    pickle.BINBYTES[0]: lambda m: m.sized("<I"),
    pickle.BINBYTES8[0]: lambda m: m.sized("<Q"),
    pickle.BYTEARRAY8[0]: lambda m: m.sized("<Q"),
    pickle.EMPTY_TUPLE[0]: lambda m: (),
    pickle.EMPTY_LIST[0]: lambda m: [],
    pickle.EMPTY_DICT[0]: lambda m: {},
    pickle.TUPLE[0]: lambda m: m.pop_to_mark(),
    pickle.TUPLE1[0]: lambda m: m.pop(1),
    pickle.TUPLE2[0]: lambda m: m.pop(2),
    pickle.TUPLE3[0]: lambda m: m.pop(3),
    pickle.BINGET[0]: lambda m: m.memo[m.number("<B")],
    pickle.LONG_BINGET[0]: lambda m: m.memo[m.number("<I")],
}

_EFFECTS: dict[int, Callable[[_Machine], Any]] = {
    pickle.FRAME[0]: lambda m: m.number("<Q"),
    pickle.MARK[0]: lambda m: m.marks.append(len(m.stack)),
    # The memo is a dict, where Python's machine fills a table as long as the largest index.
    pickle.MEMOIZE[0]: lambda m: m.memorize(len(m.memo)),
    pickle.BINPUT[0]: lambda m: m.memorize(m.number("<B")),
    pickle.LONG_BINPUT[0]: lambda m: m.memorize(m.number("<I")),
    pickle.APPEND[0]: lambda m: m.extend(m.pop(1)),
    pickle.APPENDS[0]: lambda m: m.extend(m.pop_to_mark()),
    pickle.SETITEM[0]: lambda m: m.set_items(m.pop(2)),
    pickle.SETITEMS[0]: lambda m: m.set_items(m.pop_to_mark()),
    pickle.GLOBAL[0]: lambda m: m.push_name(m.line(), m.line()),
    pickle.STACK_GLOBAL[0]: lambda m: m.push_name(*m.pop(2)),
    pickle.NEWOBJ[0]: lambda m: m.make(*m.pop(2)),
    pickle.REDUCE[0]: lambda m: m.call(*m.pop(2)),
    pickle.BUILD[0]: lambda m: m.build(m.stack[-2], *m.pop(1)),
}


def _leaves(bundle: Any, like: TrainState | None) -> dict[str, Leaf]:
    """Returns the arrays in what a machine made, by their paths in it, with the names of ``like``."""
    if type(bundle) is not dict or not {*KEYS[:4]} <= bundle.keys() <= {*KEYS}:
        keys = ", ".join(str(key) for key in itertools.islice(bundle, 10)) if type(bundle) is dict else ""
        found = f"a dict of the keys {keys or 'none'}" if type(bundle) is dict else _describe(bundle)
        raise _Refused(f"it holds {found}, and a checkpoint is a dict of the keys {', '.join(KEYS)}")
    live: dict[str, Any] = {}
    extensions: dict[str, Any] = {}
    if like is not None:
        live = {"opt_state": like.opt_state, "model_state": _merge(like.params, like.model_state)}
        extensions = like.extensions
    todo = [(key, bundle[key], live.get(key), 0) for key in KEYS[:4]]
    for name, variables in bundle.get("extensions_state", {}).items():
        todo.append((f"extensions/{name}/variables", variables, extensions.get(name, {}).get("variables"), 0))
    leaves: dict[str, Leaf] = {}
    allowance = MAX_PATHS
    while todo:
        path, node, counterpart, depth = todo.pop()
        leaf = _leaf(node)
        if leaf is not None:
            if path in leaves:
                raise _Refused(f"it has two arrays at `{path}`")
            leaves[path] = leaf
            continue
        for below, value, known in _parts(path, node, counterpart):
            allowance -= len(below)
            if allowance < 0 or depth > MAX_DEPTH:
                raise _Refused("it unfolds into a tree that is too deep or too large")
            todo.append((below, value, known, depth + 1))
    step, implementation = leaves.get("step", (np.empty(0), None))
    if implementation or step.shape != () or step.dtype.kind not in "iu" or not 0 <= int(step) < 2**31:
        raise _Refused("its `step` is no number of updates")
    leaves["step"] = np.asarray(step, np.int32), None
    return leaves


def _leaf(node: Any) -> Leaf | None:
    """Returns the array that a node is, or None if it is none."""
    match node:
        case _Array(value=np.ndarray() as array):
            return array, None
        case bool() | int() | float():
            return np.asarray(node, jax.dtypes.canonicalize_dtype(type(node))), None
        case {"dtype": str(name), "bits": _Array(value=np.ndarray() as bits)} if len(node) == 2 and name in _EXTENDED:
            return (bits.view(_EXTENDED[name]), None) if bits.dtype == _bits(_EXTENDED[name]) else None
        case {"key_impl": str(name), "key_data": _Array(value=np.ndarray() as data)} if len(node) == 2:
            return _key(data, name)
        case _Object(
            kind=_Name("jax._src.random.prng.PRNGKeyArray" | "jax._src.prng.PRNGKeyArray"),
            attributes={
                "_impl": _Object(arguments=(*_, str(name), _)),
                "_base_array": _Array(value=np.ndarray() as data),
            },
        ):
            return _key(data, name)
    return None


def _key(data: npt.NDArray[Any], implementation: str) -> Leaf | None:
    fits = data.dtype == np.uint32 and data.shape[-1:] == (_KEY_WIDTHS.get(implementation),)
    return (data, implementation) if fits else None


def _parts(path: str, node: Any, like: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yields what is below a node, or stands for it: the path, the value, and the live counterpart."""
    match node:
        case None:
            pass
        case _Object(attributes={"_mapping": mapping}):  # an nnx.State
            yield path, mapping, like
        case _Object(attributes=dict(fields)) if "_var_metadata" in fields:  # an nnx.Variable
            # What a module has sown is no part of a training state.
            if fields.get("type", node.kind) not in (_Name(f"flax.nnx.variablelib.{name}") for name in _SOWN):
                yield path, next(fields[name] for name in _RAW_VALUE if name in fields), like
        case _Object():  # a dataclass, or a named tuple
            yield path, node.arguments if node.attributes is None else node.attributes, like
        case dict():
            known = _children(like)
            for key, value in node.items():
                yield f"{path}/{key}", value, known.get(str(key))
        case list() | tuple():
            known = _children(like) if isinstance(like, list | tuple) else {}
            unknown = ((index, None) for index in range(len(known), len(node)))
            for value, (name, counterpart) in zip(node, itertools.chain(known.items(), unknown), strict=False):
                yield f"{path}/{name}", value, counterpart
        case _:
            raise _Refused(f"`{path}` is {_describe(node)}, where an array must be")


_SOWN = ("Intermediate", "Perturbation")
_RAW_VALUE = ("_raw_value", "raw_value", "value")
"""What a variable calls its value: in flax today, in 0.12.0, and before."""


def _in_state(path: str, params: set[str]) -> str:
    section, _, below = path.partition("/")
    return f"params/{below}" if section == "model_state" and below in params else path


def _merge(one: Any, other: Any) -> Any:
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return one
    return {**other, **{key: _merge(value, other.get(key)) for key, value in one.items()}}


def _children(tree: Any) -> dict[str, Any]:
    """Returns what is one level below, by the name that it has in a path, in the order of its fields."""
    below = jax.tree.leaves_with_path(tree, is_leaf=lambda node: node is not tree)
    return {leaf_path(keys): child for keys, child in below if keys}


def _bits(dtype: np.dtype[Any]) -> np.dtype[Any]:
    return np.dtype(f"u{dtype.itemsize}")


def _describe(value: Any) -> str:
    match value:
        case _Name(name=name) | _Object(kind=_Name(name=name)):
            return f"`{name[:100]}`"
        case str():
            return repr(value[:60])
        case np.dtype():
            return f"the dtype {value}"
    kind = type(value).__name__.strip("_").lower()
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
