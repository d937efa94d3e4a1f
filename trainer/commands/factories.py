"""Objects that a configuration names by import path, ``package.module:name``."""

import dataclasses
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.config.base import Config
from trainer.core.checks import did_you_mean
from trainer.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactoryConfig(Config):
    """A callable of a module that can be imported, and what it is called with.

    Attributes:
        factory: ``package.module:name``; the name may have dots, as ``models:Network.small``.
        arguments: Keyword arguments, plain values.
    """

    factory: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)


def import_factory(config: FactoryConfig, field: str) -> Callable[..., Any]:
    """Imports what a configuration names, and checks that it takes the arguments.

    Args:
        config: The name and the arguments.
        field: The field of the configuration, for messages.

    Raises:
        ConfigError: There is no such module or name, or it cannot be called so. The message says what was found. What
            the module itself raises while it is imported is raised as it is.
    """
    path, where = config.factory, f"`{field}` is {config.factory!r}"
    name, colon, attribute = path.partition(":")
    if not colon or not all(part.isidentifier() for part in (*name.split("."), *attribute.split("."))):
        raise ConfigError(f"{where}; it must be an import path, `package.module:name`.")
    _check_module(name, where)
    found: Any = importlib.import_module(name)
    for part in attribute.split("."):
        if not hasattr(found, part):
            known = [known for known in dir(found) if not known.startswith("_") and callable(getattr(found, known))]
            file = getattr(found, "__file__", None) or name
            raise ConfigError(f"{where}; `{name}` ({file}) has no {part!r}; {did_you_mean(part, known)}")
        found = getattr(found, part)
    if not callable(found):
        raise ConfigError(f"{where}, which is of type {type(found).__name__}; it must be callable.")
    return found  # type: ignore[no-any-return]


def check_call(called: Callable[..., Any], field: str, config: FactoryConfig, **given: Any) -> dict[str, Any]:
    """Returns the keyword arguments of a call, of ``given`` those that the callable takes.

    Raises:
        ConfigError: It does not take the configured arguments, or lacks one.
    """
    try:
        signature = _signature(called)
    except (TypeError, ValueError):  # some builtins tell none
        return {**config.arguments, **given}
    taken = signature.parameters
    takes_all = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values())
    keywords = config.arguments | {name: value for name, value in given.items() if takes_all or name in taken}
    for name in config.arguments:
        if not takes_all and name not in taken:
            hint = did_you_mean(name, [known for known in taken if known not in given])
            raise ConfigError(f"`{field}.arguments.{name}` is no argument of {config.factory!r}; {hint}")
    try:
        signature.bind(**keywords)
    except TypeError as error:
        names = ", ".join(sorted(keywords)) or "no arguments"
        raise ConfigError(f"`{field}` is {config.factory!r}, which cannot be called with {names}: {error}.") from error
    return keywords


def _signature(called: Callable[..., Any]) -> inspect.Signature:
    if not inspect.isclass(called):
        return inspect.signature(called)
    # That of the class itself is the one of its metaclass, which takes anything where it is that of nnx.Module.
    _, *parameters = inspect.signature(called.__init__).parameters.values()
    return inspect.Signature(parameters)


@contextmanager
def importing_from(*directories: Path) -> Iterator[None]:
    """Lets modules be imported from directories during the block, before all others, as Python does for a script."""
    before = list(sys.path)
    sys.path[:0] = [str(directory) for directory in directories if str(directory) not in sys.path]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


def _check_module(name: str, where: str) -> None:
    """Checks that each part of the path is there, so that an import error of the module's own is not taken for it."""
    parent = ""
    for part in name.split("."):
        whole = f"{parent}.{part}" if parent else part
        if not _exists(whole):
            places = list(vars(sys.modules[parent]).get("__path__", [])) if parent else sys.path[:2]
            near = {path.stem for place in places for path in Path(place or ".").glob("*.py")}
            listed = " and ".join(f"`{place or '.'}`" for place in places) or f"`{parent}`, which is no package"
            raise ConfigError(
                f"{where}; there is no module `{whole}`, neither in {listed} nor installed; {did_you_mean(part, near)}"
            )
        if whole != name:  # a package, which tells where its modules are
            importlib.import_module(whole)
        parent = whole


def _exists(module: str) -> bool:
    try:
        return module in sys.modules or importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # what is before the last dot is no package
        return False


def as_factory(value: Any) -> Any:
    """Returns the long form of a factory, of which the import path alone is the short one."""
    return {"factory": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else value
