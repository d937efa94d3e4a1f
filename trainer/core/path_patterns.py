"""Path patterns such as ``encoder/**``: the matcher shared by ``wrt``, partition rules, groups and LoRA."""

import dataclasses
import difflib
import functools
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from flax import nnx

from trainer.errors import ArgumentError, ArgumentTypeError

_REGULAR_EXPRESSION = frozenset(".^$+?{}()|\\")


@dataclasses.dataclass(frozen=True)
class ByPath:
    """The nnx filter returned by `by_path`.

    Attributes:
        patterns: A variable is selected if one of them matches its whole path.
        of: The variable must also be selected by this filter.
    """

    patterns: tuple[str, ...]
    of: nnx.filterlib.Filter = nnx.Param

    def __call__(self, path: Iterable[Any], variable: Any) -> bool:
        path = tuple(path)
        is_kind = nnx.filterlib.to_predicate(self.of)(path, variable)
        text = "/".join(map(str, path))
        return is_kind and any(matches(pattern, text) for pattern in self.patterns)

    def __repr__(self) -> str:
        kind = "" if self.of is nnx.Param else f", of={self.of!r}"
        return f"by_path({', '.join(map(repr, self.patterns))}{kind})"


def by_path(*patterns: str, of: nnx.filterlib.Filter = nnx.Param) -> ByPath:
    """Returns an nnx filter that selects variables by their path in the module.

    The path of a variable consists of the attribute names that lead to it, joined by slashes:
    ``encoder/layers/0/kernel``. A pattern must match the whole path:

    * ``*`` matches any part of a name, ``[0-3]`` one of these characters, and ``**`` any number of names:
      ``encoder/**`` is everything below ``encoder``, ``layers/*/bias`` the biases of all layers, ``**/norm/scale`` the
      ``norm/scale`` at any depth.
    * A pattern with a ``*`` and without a slash is matched against the last name: ``*`` is everything, ``*bias`` every
      bias.
    * A pattern with one of ``.^$+?{}()|\\`` is a regular expression: ``layers/(query|value)/.*``.

    Args:
        patterns: One or more patterns; a variable is selected if one of them matches.
        of: An nnx filter that restricts which variables can be selected. Batch statistics, for example, are selected
            only with ``of=nnx.BatchStat``, never by a pattern alone.

    Raises:
        ArgumentTypeError: A pattern is not a string.
        ArgumentError: There are no patterns, or one is not a valid regular expression.

    Example:
        >>> model = nnx.Sequential(nnx.Linear(2, 3, rngs=nnx.Rngs(0)), nnx.Linear(3, 1, rngs=nnx.Rngs(1)))
        >>> [path for path, _ in nnx.to_flat_state(nnx.state(model, by_path("layers/1/*")))]
        [('layers', 1, 'bias'), ('layers', 1, 'kernel')]
    """
    if not patterns:
        raise ArgumentError("`patterns` is empty; pass one or more, such as by_path('encoder/**').")
    for pattern in patterns:
        check_pattern(pattern, "patterns")
    return ByPath(patterns, of)


def check_pattern(pattern: Any, name: str) -> str:
    """Returns a pattern if it is valid.

    Args:
        pattern: The caller's value.
        name: The argument that holds it.

    Raises:
        ArgumentTypeError: It is not a string.
        ArgumentError: It is an invalid regular expression.
    """
    if not isinstance(pattern, str):
        raise ArgumentTypeError(
            f"`{name}` has the pattern {pattern!r:.60} of type {type(pattern).__name__}; it must be a string, such as "
            f"'encoder/**'."
        )
    try:
        _compiled(pattern)
    except re.error as error:
        raise ArgumentError(f"`{name}` has the pattern {pattern!r}, which is no regular expression: {error}.") from None
    return pattern


def matches(pattern: str, path: str) -> bool:
    """Returns whether a pattern matches a whole path, such as ``params/layers/0/kernel``."""
    return _compiled(pattern).fullmatch(path) is not None


def first_match(patterns: Iterable[str], path: str) -> str | None:
    """Returns the first pattern that matches a path, or None."""
    return next((pattern for pattern in patterns if matches(pattern, path)), None)


def matches_nothing(pattern: str, paths: Iterable[str]) -> str:
    """Returns the end of a message about a pattern without a match, with the nearest paths."""
    paths = list(paths)
    partly = [path for path in paths if _compiled(pattern).search(path)]
    near = partly[:3] or difflib.get_close_matches(pattern, paths, n=3, cutoff=0.0)
    return f"matches no whole path; the nearest are {', '.join(near)}" if near else "matches no path, for there is none"


def is_pattern(text: str) -> bool:
    """Returns whether a string is a path pattern, as opposed to an nnx tag."""
    return "*" in text or "/" in text


def as_filter(selection: nnx.filterlib.Filter) -> nnx.filterlib.Filter:
    """Returns an nnx filter in which every path pattern is replaced by `by_path` of it.

    A string with a ``*`` or a slash is a pattern: alone, in a list, tuple or set, or in `nnx.Any`, `nnx.All` or
    `nnx.Not`.
    """
    if isinstance(selection, nnx.filterlib.WithTag):  # nnx converts strings to this
        return as_filter(selection.tag) if is_pattern(selection.tag) else selection
    if isinstance(selection, str):
        return by_path(check_pattern(selection, "wrt")) if is_pattern(selection) else selection
    if isinstance(selection, list | tuple):
        return nnx.Any(*map(as_filter, selection))
    if isinstance(selection, set | frozenset):  # sorted, since its order differs between processes
        return nnx.Any(*map(as_filter, sorted(selection, key=repr)))  # type: ignore[unreachable]
    if isinstance(selection, nnx.Any | nnx.All):
        return type(selection)(*map(as_filter, selection.predicates))
    if isinstance(selection, nnx.Not):
        return nnx.Not(as_filter(selection.predicate))
    return selection


def check_selects(selection: nnx.filterlib.Filter, variables: Mapping[tuple[Any, ...], Any]) -> None:
    """Checks that every path pattern of a filter selects something.

    Args:
        selection: A filter from `as_filter`.
        variables: All variables of a module by path.

    Raises:
        ArgumentError: Patterns select nothing (the message lists them with the nearest paths), or no variable has the
            nnx tag.
    """
    if isinstance(selection, str):
        has_tag = nnx.filterlib.WithTag(selection)
        if not any(has_tag(path, variable) for path, variable in variables.items()):
            raise ArgumentError(
                f"`wrt` is the string {selection!r}, a tag of nnx that no variable has. A pattern of paths has a `*` "
                f"or a slash, as in '{selection}/**', or is trainer.by_path({selection!r})."
            )
    problems = []
    for each in _by_paths(selection):
        is_kind = nnx.filterlib.to_predicate(each.of)
        paths = ["/".join(map(str, path)) for path, variable in variables.items() if is_kind(path, variable)]
        for pattern in each.patterns:
            if not any(matches(pattern, path) for path in paths):
                kind = getattr(each.of, "__name__", repr(each.of))
                problems.append(f"the pattern {pattern!r} for variables of {kind} {matches_nothing(pattern, paths)}")
    if problems:
        raise ArgumentError(f"`wrt` selects nothing where it should: {'; '.join(problems)}.")


def _by_paths(selection: nnx.filterlib.Filter) -> Iterator[ByPath]:
    if isinstance(selection, ByPath):
        yield selection
    elif isinstance(selection, nnx.Any | nnx.All):
        for inner in selection.predicates:
            yield from _by_paths(inner)
    elif isinstance(selection, nnx.Not):
        yield from _by_paths(selection.predicate)


@functools.lru_cache(maxsize=1024)
def _compiled(pattern: str) -> re.Pattern[str]:
    """Returns the regular expression that a pattern stands for."""
    if "*" not in pattern or _REGULAR_EXPRESSION & set(pattern):
        return re.compile(pattern)
    names = pattern.split("/")
    if len(names) == 1:
        names = ["**", *names]
    below = ".*" if names == ["**", "**"] else ".+"
    parents = ["(?:[^/]+/)*" if name == "**" else f"{_name(name)}/" for name in names[:-1]]
    return re.compile("".join(parents) + (below if names[-1] == "**" else _name(names[-1])))


def _name(glob: str) -> str:
    """Returns the regular expression of a name in which ``*`` matches any text, and ``[ab]`` one of the characters."""
    parts = re.split(r"(\*+|\[[^\]]+\])", glob)
    return "".join(
        ("[^/]*" if part[0] == "*" else part) if index % 2 else re.escape(part) for index, part in enumerate(parts)
    )
