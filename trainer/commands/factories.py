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
    """An importable callable, and its arguments.

    Attributes:
        factory: ``package.module:name``; the name may contain dots, as in ``models:Network.small``.
        arguments: Keyword arguments, as plain values.
    """

    factory: str
    arguments: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)


def import_factory(config: FactoryConfig, field: str) -> Callable[..., Any]:
    """Imports the callable that a configuration names, and checks that it accepts the arguments.

    Args:
        config: The name and the arguments.
        field: The field of the configuration, for messages.

    Raises:
        ConfigError: There is no such module or name, or it cannot be called this way. The message says what was found.
            Exceptions that the module raises during import propagate unchanged.
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
    """Returns the keyword arguments of a call: the configured ones, and those of ``given`` that the callable accepts.

    Raises:
        ConfigError: It does not accept the configured arguments, or one is missing.
    """
    try:
        signature = _signature(called)
    except (TypeError, ValueError):  # some builtins have no signature
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
    # The signature of the class itself would be that of its metaclass, and the one of nnx.Module accepts anything.
    _, *parameters = inspect.signature(called.__init__).parameters.values()
    return inspect.Signature(parameters)


@contextmanager
def importing_from(*directories: Path) -> Iterator[None]:
    """Puts directories first on the import path during the block, as Python does for a script's directory."""
    before = list(sys.path)
    sys.path[:0] = [str(directory) for directory in directories if str(directory) not in sys.path]
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path[:] = before


def _check_module(name: str, where: str) -> None:
    """Checks that each part of the path exists, so that import errors inside the module are not mistaken for that."""
    parent = ""
    for part in name.split("."):
        whole = f"{parent}.{part}" if parent else part
        if not _exists(whole):
            places = list(vars(sys.modules[parent]).get("__path__", [])) if parent else dict.fromkeys(sys.path[:2])
            near = {path.stem for place in places for path in Path(place or ".").glob("*.py")}
            listed = " and ".join(f"`{place or '.'}`" for place in places) or f"`{parent}`, which is no package"
            raise ConfigError(
                f"{where}; there is no module `{whole}`, neither in {listed} nor installed; {did_you_mean(part, near)}"
            )
        if whole != name:  # a package, which knows where its modules are
            importlib.import_module(whole)
        parent = whole


def _exists(module: str) -> bool:
    try:
        return module in sys.modules or importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # the part before the last dot is not a package
        return False


def as_factory(value: Any) -> Any:
    """Returns the long form of a factory; the short form is only the import path."""
    return {"factory": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else value
