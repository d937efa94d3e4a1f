"""Names of a package that import their module when they are first used, so that importing the package stays light."""

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any


def imported_when_used(package: str, names: Mapping[str, Iterable[str]]) -> Callable[[str], Any]:
    """Returns the ``__getattr__`` of a package (PEP 562), and lists the names for ``dir`` and ``import *``.

    Call it behind the imports of the package. Type checkers need the same imports under ``if TYPE_CHECKING:``.

    Args:
        package: The name of the package, ``__name__``.
        names: By module, the names that are defined there.
    """
    homes = {name: module for module, defined in names.items() for name in defined}
    held = vars(sys.modules[package])
    held["__all__"] = [*(name for name in held if not name.startswith("_")), *homes]
    held["__dir__"] = lambda: sorted({*held, *homes})

    def attribute(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}", name=name, obj=sys.modules[package])
        # Kept, so that this function is asked once.
        held[name] = getattr(importlib.import_module(homes[name]), name)
        return held[name]

    return attribute
