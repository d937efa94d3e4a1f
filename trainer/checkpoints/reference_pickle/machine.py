"""A stack machine that runs the operations of a pickle but executes nothing.

A pickle is a program for a small stack machine, and Python's machine imports and calls whatever the program names. This
machine knows a closed list of operations, looks up no names, and makes plain containers, arrays over the bytes of the
file, and stand-ins for everything else.

``pickle.Unpickler`` with a ``find_class`` that returns stand-ins would not do. It hashes any value as a dict key,
recursively in C, so that a deep tuple of less than a megabyte crashes the interpreter. It copies every array, and
it cannot refuse a string before the string takes four times the memory of its bytes. `pickletools.genops` before an
``Unpickler``, tried in its place, failed 15 of 221 tests, 9 of them only by other words.
"""

import dataclasses
import math
import pickle  # for its opcodes only
import struct
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.checkpoints.reference_pickle.layout import EXTENDED_DTYPES

# A JAX array takes about 65 operations, so this allows 16,000 arrays. A hostile file of that size allocates 100 MB.
MAX_OPERATIONS = 2**20
MAX_NAME = 256

_NATIVE_DTYPES = {
    order + code: np.dtype(f"<{code}")
    for order in ("", "<", "|")
    for code in ("b1", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "f2", "f4", "f8", "c8", "c16")
}


class Refused(Exception):  # noqa: N818
    """The reason a file is refused, as part of a sentence."""


@dataclasses.dataclass(frozen=True, slots=True)
class Global:
    """The module and name of a class or function, which is never looked up."""

    name: str


@dataclasses.dataclass(eq=False, slots=True)
class Instance:
    """A stand-in for an instance of a class: what Python would build it from."""

    kind: Global
    arguments: tuple[Any, ...]
    attributes: dict[Any, Any] | None = None


@dataclasses.dataclass(eq=False, slots=True)
class ArrayNode:
    """An array; None between the operation that creates it and the one that fills it."""

    value: npt.NDArray[Any] | None = None


class Machine:
    """Runs the operations of a pickle. The stack holds plain values, NumPy dtypes and the classes above."""

    def __init__(self, data: bytes) -> None:
        self.data = memoryview(data)
        self.position = 0
        # Each byte may go into one array and, since protocol 2 has no bytes, into one string before that.
        self.allowance = 2 * len(data)
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        """Returns the value that the program leaves on the stack.

        Raises:
            Refused: An operation, name or value does not belong in a checkpoint.
            Exception: Any other type, if the bytes are malformed.
        """
        if bytes(self.data[:2]) not in (b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5"):
            raise Refused("it is no pickle of a protocol from 2 to 5")
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
                raise Refused(f"the operation {name} at byte {self.position - 1} has no place in a checkpoint")
        else:
            raise Refused(f"it has more than {MAX_OPERATIONS:,} operations")
        if self.position != len(self.data):
            raise Refused(f"{len(self.data) - self.position} bytes follow its end")
        (result,) = self.stack
        return result

    def number(self, code: str) -> Any:
        (value,) = struct.unpack(code, self.take(struct.calcsize(code)))
        return value

    def take(self, size: int) -> memoryview:
        taken = self.data[self.position : self.position + size]
        if len(taken) < size:
            raise Refused("it ends in the middle")
        self.position += size
        return taken

    def sized(self, length: str) -> memoryview:
        return self.take(self.number(length))

    def text(self, length: str) -> str:
        data = self.sized(length)
        # One character beyond Latin-1 makes Python use four bytes for each. Long strings are protocol 2's bytes.
        if len(data) > 2**16 and np.frombuffer(data, np.uint8).max() > 0xC3:
            raise Refused("it has a long text that is not Latin-1")
        return str(data, "utf-8")

    def line(self) -> str:
        line, _, _ = bytes(self.data[self.position : self.position + MAX_NAME]).partition(b"\n")
        self.take(len(line) + 1)
        return line.decode()

    def pop(self, count: int) -> tuple[Any, ...]:
        start = len(self.stack) - count
        if start < 0:
            raise Refused("it takes what it never made")
        values = tuple(self.stack[start:])
        del self.stack[start:]
        return values

    def pop_to_mark(self) -> tuple[Any, ...]:
        return self.pop(max(0, len(self.stack) - self.marks.pop()))

    def memorize(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    def extend(self, values: tuple[Any, ...]) -> None:
        if type(self.stack[-1]) is not list:
            raise Refused(f"it appends to {describe_value(self.stack[-1])}")
        self.stack[-1].extend(values)

    def set_items(self, values: tuple[Any, ...]) -> None:
        target = self.stack[-1]
        for key, value in zip(values[::2], values[1::2], strict=True):
            # The hash of a tuple recurses as deep as the tuple, and large ints can be chosen to collide.
            fits = len(key) <= MAX_NAME if type(key) is str else type(key) is int and abs(key) < 2**31
            if type(target) is not dict or not fits:
                raise Refused(f"it sets the item {describe_value(key)} of {describe_value(target)}")
            target[key] = value

    def push_name(self, module: Any, name: Any) -> None:
        if type(module) is not str or type(name) is not str or max(len(module), len(name)) > MAX_NAME:
            raise Refused(f"it names {describe_value(name)} in {describe_value(module)}")
        # NumPy 2 writes `numpy._core` where NumPy 1 wrote `numpy.core`.
        found = Global(f"{module.replace('numpy._core', 'numpy.core')}.{name}")
        # No array, variable or optimizer state has a class from the standard library: an attack or a mistake.
        if module.partition(".")[0] in _PYTHON and found.name not in _CALLS:
            raise Refused(f"it names {describe_value(found)}, which has no place in a checkpoint")
        self.stack.append(found)

    def make(self, kind: Any, arguments: Any) -> None:
        if type(kind) is not Global or type(arguments) is not tuple:
            raise Refused(f"it makes an instance of {describe_value(kind)}")
        self.stack.append(Instance(kind, arguments))

    def call(self, function: Any, arguments: Any) -> None:
        if type(function) is not Global or function.name not in _CALLS:
            raise Refused(f"it calls {describe_value(function)}, which makes no array")
        self.stack.append(_CALLS[function.name](self, *arguments))

    def build(self, target: Any, state: Any) -> None:
        match target, state:
            case ArrayNode(value=None), (1, shape, dtype, bool(fortran), data):
                target.value = self.array(shape, dtype, data, "F" if fortran else "C")
            case np.dtype(), (3, "<" | "|", None, None, None, _, _, _):
                pass  # the dtype already has this state
            case np.dtype(), _:
                # NumPy's own `dtype.__setstate__` can be made to read memory out of bounds, so it is never called.
                raise Refused(f"it has an array of {describe_value(target)}, but big-endian or with parts")
            case Instance(attributes=None), dict(attributes) | (None, dict(attributes)):  # a pair if it has slots
                target.attributes = attributes
            case _:
                raise Refused(f"it gives {describe_value(target)} a state that has no place in a checkpoint")

    def array(self, shape: Any, dtype: Any, data: Any, order: Any = "C") -> npt.NDArray[Any]:
        if not (isinstance(dtype, np.dtype) and isinstance(data, bytes | memoryview)):
            raise Refused(f"it has an array of {describe_value(dtype)} from {describe_value(data)}")
        if type(shape) is not tuple or len(shape) > 32 or not all(type(n) is int and 0 <= n < 2**48 for n in shape):
            raise Refused("it has an array of an impossible shape")
        if math.prod(shape) * dtype.itemsize != len(data):
            raise Refused(f"it has {len(data)} bytes for an array of {dtype}{shape}")
        self.spend(len(data))
        return np.ndarray(shape, dtype, buffer=data, order=order)

    def spend(self, size: int) -> None:
        self.allowance -= size
        if self.allowance < 0:
            raise Refused("it unfolds into more data than it holds")


def _make_dtype(machine: Machine, code: Any, align: Any = False, copy: Any = True) -> np.dtype[Any]:
    del machine, align, copy
    match code:
        case str() if code in _NATIVE_DTYPES:
            return _NATIVE_DTYPES[code]
        case Global(name=name) if name.removeprefix("ml_dtypes.") in EXTENDED_DTYPES:
            return EXTENDED_DTYPES[name.removeprefix("ml_dtypes.")]
    raise Refused(f"it has an array of the dtype {describe_value(code)}, which no jax array has")


def _make_array(machine: Machine, kind: Any, shape: Any, code: Any) -> ArrayNode:
    del machine
    if (kind, shape, code) != (Global("numpy.ndarray"), (0,), b"b"):
        raise Refused(f"it has an array of the class {describe_value(kind)}")
    return ArrayNode()


def _make_jax_array(machine: Machine, function: Any, arguments: Any, state: Any, about: Any) -> ArrayNode:
    del about  # weak type, which no array of a training state has
    if function != Global("numpy.core.multiarray._reconstruct"):
        raise Refused(f"it has an array made by {describe_value(function)}")
    array = _make_array(machine, *arguments)
    machine.build(array, state)
    return array


def _make_bytes(machine: Machine, text: Any = "", encoding: Any = "latin1") -> bytes:
    if type(text) is not str or encoding != "latin1":
        raise Refused(f"it encodes {describe_value(text)}")
    machine.spend(len(text))
    return text.encode("latin-1")


_PYTHON = sys.stdlib_module_names | {"__builtin__"}

_CALLS: dict[str, Callable[..., Any]] = {
    "numpy.dtype": _make_dtype,
    "numpy.core.multiarray._reconstruct": _make_array,
    "numpy.core.multiarray.scalar": lambda m, dtype, data: ArrayNode(m.array((), dtype, data)),
    "numpy.core.numeric._frombuffer": lambda m, data, dtype, shape, order: ArrayNode(
        m.array(shape, dtype, data, order)
    ),
    "jax._src.array._reconstruct_array": _make_jax_array,
    "_codecs.encode": _make_bytes,
    "__builtin__.bytes": _make_bytes,
}
"""The functions that a pickle may call, each with its stand-in."""

_CODES = {code[0]: name for name, code in vars(pickle).items() if type(code) is bytes and len(code) == 1}

# Operations that push a value.
_VALUES: dict[int, Callable[[Machine], Any]] = {
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

# All other operations.
_EFFECTS: dict[int, Callable[[Machine], Any]] = {
    pickle.FRAME[0]: lambda m: m.number("<Q"),
    pickle.MARK[0]: lambda m: m.marks.append(len(m.stack)),
    # The memo is a dict; Python's machine allocates a table as long as the largest index.
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


def describe_value(value: Any) -> str:
    """Formats a value for a message, shortened."""
    match value:
        case Global(name=name) | Instance(kind=Global(name=name)):
            return f"`{name[:100]}`"
        case str():
            return repr(value[:60])
        case np.dtype():
            return f"the dtype {value}"
        case ArrayNode():
            return "an array"
    kind = type(value).__name__.lower()
    return f"an {kind}" if kind[0] in "aeiou" else f"a {kind}"
