"""What the bytecode of a function reads and changes: names of globals, attributes, keys."""

import dataclasses
import dis
import types
from collections.abc import Iterator

_MUTATORS = frozenset(
    {"add", "append", "appendleft", "clear", "discard", "extend", "insert", "pop", "popitem", "popleft", "remove"}
    | {"setdefault", "update", "__setitem__"}
)
# How far before the assignment of an item its container is loaded: in `seen[key] = value`, and in `seen[key] += 1`.
_NEAR, _FAR = 4, 12
_STORES = frozenset({"STORE_GLOBAL", "STORE_ATTR", "DELETE_GLOBAL", "DELETE_ATTR"})
# Loads of what is more than a local variable.
_LASTING = frozenset({"LOAD_GLOBAL", "LOAD_DEREF", "LOAD_ATTR", "LOAD_METHOD"})


@dataclasses.dataclass
class Reads:
    """The names that code reads and changes.

    Attributes:
        globals: Names of globals that it reads.
        names: Attributes and constant keys that it reads of anything.
        of: The same by the name of what they are read of: ``{"config": {"alpha"}}`` for ``self.config.alpha``.
        changed: Variables and attributes that it assigns, or whose items it changes, such as counters and caches.
    """

    globals: set[str] = dataclasses.field(default_factory=set)
    names: set[str] = dataclasses.field(default_factory=set)
    of: dict[str, set[str]] = dataclasses.field(default_factory=dict)
    changed: set[str] = dataclasses.field(default_factory=set)

    @property
    def size(self) -> int:
        """How many names there are: more after an `add` that found something new."""
        return sum(map(len, (self.globals, self.names, self.changed, *self.of.values())))

    def add(self, other: "Reads") -> None:
        """Adds what other code reads and changes."""
        self.globals |= other.globals
        self.names |= other.names
        self.changed |= other.changed
        for name, found in other.of.items():
            self.of.setdefault(name, set()).update(found)


def reads_of(code: types.CodeType) -> Reads:
    """Returns what a function's code reads and changes, the functions defined in it included."""
    found = Reads()
    for one in _with_nested(code):
        _read(one, found)
    return found


def _with_nested(code: types.CodeType) -> Iterator[types.CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _with_nested(constant)


def _read(code: types.CodeType, found: Reads) -> None:
    before: list[dis.Instruction] = []
    for instruction in dis.get_instructions(code):
        name, value = instruction.opname, instruction.argval
        if name in ("EXTENDED_ARG", "PUSH_NULL", "CACHE"):
            continue
        holder = _loaded(before[-1]) if before else None
        if name == "LOAD_GLOBAL":
            found.globals.add(value)
        elif name in ("LOAD_ATTR", "LOAD_METHOD"):
            _add(found, holder, value)
            if value in _MUTATORS and before and before[-1].opname in _LASTING:
                found.changed.add(before[-1].argval)
        elif name == "LOAD_CONST" and isinstance(value, str) and len(before) > 1:
            if before[-1].argval == "get":  # config.get("alpha")
                _add(found, _loaded(before[-2]), value)
            elif before[-2].argval in ("getattr", "hasattr"):
                _add(found, holder, value)
        elif name == "BINARY_SUBSCR" or (name == "BINARY_OP" and instruction.argrepr == "[]"):
            key = before[-1].argval if before and before[-1].opname == "LOAD_CONST" else None
            if isinstance(key, str) and len(before) > 1:
                _add(found, _loaded(before[-2]), key)
        elif name in _STORES or (name == "STORE_DEREF" and value in code.co_freevars):
            found.changed.add(value)
        elif name in ("STORE_SUBSCR", "DELETE_SUBSCR"):
            reach = _FAR if before and before[-1].opname == "SWAP" else _NEAR
            found.changed.update(one.argval for one in before[-reach:] if one.opname in _LASTING)
        before.append(instruction)


def _add(found: Reads, holder: str | None, name: str) -> None:
    found.names.add(name)
    if holder is not None:
        found.of.setdefault(holder, set()).add(name)


def _loaded(instruction: dis.Instruction) -> str | None:
    """Returns the name of the variable or attribute that an instruction loads."""
    name, value = instruction.opname, instruction.argval
    if isinstance(value, tuple) and name.endswith("LOAD_FAST"):  # Python 3.13 loads two variables at once
        value = value[-1]
    elif not name.startswith("LOAD_") or name == "LOAD_CONST":
        return None
    return value if isinstance(value, str) else None
