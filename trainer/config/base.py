"""The base of every configuration: frozen, checked on creation, converted to and from plain dicts and YAML.

A field that would have no effect is an error: an unknown name, a wrong type, or a value that the chosen
optimizer or schedule does not read (``momentum`` for ``adam``).

Why no library converts: with cattrs in its place, 18 of the 35 tests of messages failed, and its import takes 24 to
55 ms. A message names the path of the field, what it got, and the closest name.
"""

import dataclasses
import math
import os
import re
import types
import typing
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp

from trainer.core.checks import did_you_mean
from trainer.errors import ConfigError, warn
from trainer.paths import in_home

_FREE_NODES = 10_000
"""How many nodes a YAML file may have in addition to one per character."""

_LABELS = ("description", "tags", "metadata")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """A frozen dataclass whose values are checked against their annotations.

    Subclasses add fields and check them in ``__post_init__``, after ``super().__post_init__()``. The
    four fields here are labels: they do not affect a run.

    Attributes:
        name: A short label.
        description: A longer text.
        tags: Keywords to search for.
        metadata: Any plain values. Not part of the configuration's hash.

    Raises:
        ConfigError: A field has the wrong type or an invalid value. The message gives its path.
    """

    name: str = ""
    description: str = ""
    tags: tuple[str, ...] = ()
    metadata: dict[str, Any] = dataclasses.field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))
        for field in dataclasses.fields(self):
            value = _coerce(getattr(self, field.name), hints[field.name], self._path(field.name))
            object.__setattr__(self, field.name, value)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Builds the configuration from nested plain mappings.

        Raises:
            ConfigError: A field is unknown, missing, mistyped or invalid. The message lists all unknown and
                missing fields of a mapping, with their paths and the nearest names.
        """
        config: Self = _from_mapping(cls, data, cls.__name__)
        return config

    def to_dict(self) -> dict[str, Any]:
        """Returns nested dicts of plain values, labels last, for `from_dict`, JSON and YAML.

        A Path becomes a string, and comes back as one: plain values do not tell which of the two it was. A number of
        NumPy or JAX becomes one of Python.

        Raises:
            ConfigError: ``metadata`` contains itself, or is nested too deeply.
        """
        names = sorted((field.name for field in _arguments(type(self))), key=_LABELS.__contains__)
        try:
            return {name: _plain(getattr(self, name)) for name in names}
        except RecursionError:
            raise ConfigError(f"`{self._path('metadata')}` contains itself, or is nested too deeply.") from None

    @classmethod
    def from_yaml(cls, path: str | os.PathLike[str]) -> Self:
        """Reads the configuration from a YAML file; ``1e-3`` is read as a number.

        Raises:
            ConfigError: As in `from_dict`; or the file is no YAML, is nested too deeply, or its aliases expand too far.
        """
        import yaml

        try:
            data = load_yaml(Path(in_home(path)).read_text(encoding="utf-8"), f"`{path}`")
        except yaml.constructor.ConstructorError:
            raise  # it is YAML, and asks for an object
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise ConfigError(f"`{path}` is no YAML: {error}") from error
        return cls.from_dict(data)

    def to_yaml(self, path: str | os.PathLike[str]) -> None:
        """Writes a YAML file: fields in declaration order, labels last.

        Raises:
            ConfigError: ``metadata`` holds an object that YAML cannot, such as an array. Nothing is written then.
        """
        import yaml

        try:
            text = yaml.safe_dump(self.to_dict(), sort_keys=False)
        except yaml.representer.RepresenterError as error:
            raise ConfigError(
                f"`{self._path('metadata')}` holds an object of type {type(error.args[-1]).__name__}, which YAML "
                f"cannot hold; take numbers, strings, lists and mappings of these."
            ) from error
        Path(in_home(path)).write_text(text, encoding="utf-8")

    def replace(self, **changes: Any) -> Self:
        """Returns a checked copy with some fields replaced."""
        return dataclasses.replace(self, **changes)

    def _path(self, field: str) -> str:
        return f"{type(self).__name__}.{field}"

    def _require(self, field: str, wanted: str, holds: bool) -> None:
        if not holds:
            raise ConfigError(f"`{self._path(field)}` is {getattr(self, field)!r:.60}; it must be {wanted}.")

    def _positive(self, *fields: str) -> None:
        for field in fields:
            value = getattr(self, field)
            self._require(field, "positive and finite", value is None or 0 < value < math.inf)

    def _within(self, field: str, low: float, high: float) -> None:
        self._require(field, f"between {low} and {high}", low <= getattr(self, field) <= high)

    def _refuse_unread(
        self, kind: str, readers: Mapping[str, Collection[str]], harmless: Mapping[str, Any] | None = None
    ) -> None:
        """Refuses a set field that only other choices of ``kind`` read, by ``readers``; only warns if "none" is chosen.

        Fields that no choice reads (labels, or added by a subclass) are kept, and so is a field that has
        its default or its value in ``harmless``.
        """
        chosen = getattr(self, kind)
        if chosen not in readers:
            raise ConfigError(f"`{self._path(kind)}` is {chosen!r:.60}; {did_you_mean(chosen, readers)}")
        unread = []
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            others = sorted(name for name, fields in readers.items() if field.name in fields)
            if not others or chosen in others or value in (field.default, (harmless or {}).get(field.name)):
                continue
            if chosen != "none":
                raise ConfigError(
                    f"`{self._path(field.name)}` is {value!r:.60}, but {chosen!r} does not read it, "
                    f"so it would do nothing; remove it, or choose one that does: {', '.join(others)}."
                )
            unread.append(f"`{self._path(field.name)}` ({value!r:.60})")
        if unread:  # switched off, with its settings left in the file
            verb = "does" if len(unread) == 1 else "do"
            warn(f"{', '.join(unread)} {verb} nothing, because `{kind}` is 'none'.")


def load_yaml(text: str, name: str) -> Any:
    """Returns the plain values in YAML text; ``1e-3`` is read as a number. ``name`` is for messages.

    Raises:
        ConfigError: It is nested too deeply, or its aliases expand too far.
        yaml.YAMLError: It is not valid YAML.
    """
    import yaml

    try:
        unfolded = _unfolded(yaml.compose(text, Loader=_loader()), {})
    except RecursionError:
        raise ConfigError(f"{name} is nested too deeply.") from None
    if unfolded > _FREE_NODES + len(text):
        raise ConfigError(f"{name} repeats its parts by aliases (`*name`) so often that they would fill the memory.")
    return yaml.load(text, Loader=_loader())  # noqa: S506 - a SafeLoader


def _arguments(cls: type[Any]) -> list[dataclasses.Field[Any]]:
    # A subclass may compute a field (`init=False`), which its constructor does not take.
    return [field for field in dataclasses.fields(cls) if field.init]


def _from_mapping(cls: type[Any], data: Any, path: str) -> Any:
    if not isinstance(data, Mapping):
        raise ConfigError(f"`{path}` is of type {type(data).__name__}; it must be a mapping of fields.")
    hints = typing.get_type_hints(cls)
    fields = {field.name: field for field in _arguments(cls)}
    problems = [
        f"`{path}.{name}` is no field; {did_you_mean(str(name), fields)}" for name in data if name not in fields
    ]
    problems += [
        f"`{path}.{name}` is required."
        for name, field in fields.items()
        if name not in data and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if problems:
        raise ConfigError(" ".join(problems))
    values = {}
    for name, value in data.items():
        if value is None and name in ("name", *_LABELS):
            continue  # an empty label
        nested = _config_class(hints[name])
        if nested is not None and isinstance(value, Mapping):
            value = _from_mapping(nested, value, f"{path}.{name}")
        values[name] = value
    return cls(**values)


def _config_class(hint: Any) -> type[Config] | None:
    for option in typing.get_args(hint) or (hint,):
        if isinstance(option, type) and issubclass(option, Config):
            return option
    return None


def _coerce(value: Any, hint: Any, path: str) -> Any:
    """Returns ``value`` as the annotated type; raises if the conversion would lose or invent information."""
    if _is_number_of_array(value):
        value = value.item()
    union = typing.get_origin(hint) in (types.UnionType, typing.Union)
    options = typing.get_args(hint) if union else (hint,)
    for option in options:
        origin = typing.get_origin(option) or option
        if option is types.NoneType and value is None:
            return None
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        if origin is tuple and isinstance(value, list | tuple):
            items = typing.get_args(option) or (Any, ...)
            items = items[:1] * len(value) if items[-1] is ... else items
            if len(items) != len(value):
                continue
            return tuple(_coerce(entry, items[i], f"{path}[{i}]") for i, entry in enumerate(value))
        if origin is dict and isinstance(value, Mapping):
            return dict(value)
        # Annotations in a subclass such as Any or Literal, which isinstance cannot check.
        if origin is Any or not isinstance(origin, type):
            return value
        # A bool is an int in Python, but as a number in a configuration it is a mistake.
        if isinstance(value, origin) and not (isinstance(value, bool) and origin is not bool):
            return value
    wanted = " or ".join("None" if option is types.NoneType else _type_name(option) for option in options)
    raise ConfigError(f"`{path}` is {value!r:.60} of type {type(value).__name__}; it must be {wanted}.")


def _is_number_of_array(value: Any) -> bool:
    """Returns whether a value is a number of NumPy or JAX. A PRNG key has a shape of () and is none."""
    if not hasattr(value, "dtype") or getattr(value, "shape", None) != () or not hasattr(value, "item"):
        return False
    return not isinstance(value, jax.Array) or not jnp.issubdtype(value.dtype, jax.dtypes.extended)


def _type_name(option: Any) -> str:
    return option.__name__ if isinstance(option, type) and not typing.get_args(option) else str(option)


def _plain(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if _is_number_of_array(value):
        return value.item()
    return str(value) if isinstance(value, Path) else value


def _unfolded(node: Any, known: dict[int, float]) -> float:
    """Returns the number of nodes in a YAML node with its aliases expanded; infinite if it contains itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        below = getattr(node, "value", ())
        parts = [part for item in below for part in (item if isinstance(item, tuple) else (item,))]
        known[id(node)] = 1 + sum(_unfolded(part, known) for part in (() if isinstance(below, str) else parts))
    return known[id(node)]


def _loader() -> type[Any]:
    """Returns a SafeLoader that reads ``1e-3`` as a number; in YAML 1.1 it is a string."""
    import yaml

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )

    def sequence(loader: Any, *about: Any) -> Any:
        return loader.construct_sequence(about[-1], deep=True)

    # The tags that PyYAML writes for tuples and paths in a configuration that is not plain data, like the reference's.
    Loader.add_constructor("tag:yaml.org,2002:python/tuple", sequence)
    Loader.add_multi_constructor(
        "tag:yaml.org,2002:python/object/apply:pathlib.", lambda *about: os.path.join("", *sequence(*about))
    )
    return Loader
