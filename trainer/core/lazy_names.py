"""Lazy imports: names whose module is imported on first use, so that importing the package stays fast."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from types import FrameType
from typing import Any

from trainer.core.other_names import NAMES


def imported_when_used(held: dict[str, Any], names: Mapping[str, Iterable[str]]) -> Callable[[str], Any]:
    """Returns the ``__getattr__`` of a package (PEP 562), and lists the names for ``dir`` and ``import *``.

    Call it after the imports of the package. Type checkers need the same imports under ``if TYPE_CHECKING:``.

    Args:
        held: The namespace of the package, ``globals()``.
        names: The lazy names, by the module that defines them.
    """
    homes = {name: module for module, defined in names.items() for name in defined}
    # Without submodules, some of which have names of the standard library, such as `types`.
    public = [name for name, value in held.items() if not name.startswith("_") and not inspect.ismodule(value)]
    held["__all__"] = [*public, *homes]
    held["__dir__"] = lambda: sorted({*held, *homes})

    def attribute(name: str) -> Any:
        if name not in homes:
            package = held["__name__"]
            if name in NAMES:
                raise _missing(inspect.currentframe())(
                    f"module {package!r} has no {name!r}; here, {NAMES[name]}.", name=name
                )
            module = __import__(package, fromlist=["__name__"])  # Python suggests one of its names
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=module)
        # Cached, so that this function runs once per name.
        held[name] = getattr(__import__(homes[name], fromlist=[name]), name)
        return held[name]

    return attribute


def _missing(frame: FrameType | None) -> type[AttributeError | ImportError]:
    """Returns what to raise for a name that is not there: an import statement drops the text of an AttributeError."""
    caller = None if frame is None else frame.f_back
    return ImportError if caller is not None and caller.f_code.co_name == "_handle_fromlist" else AttributeError
