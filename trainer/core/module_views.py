"""Views of a model: for a while its modules compute in another way, and nothing of that outlasts it.

A model is changed without an edit of its code: each module concerned becomes an instance of a
subclass whose ``__call__`` is wrapped, and is given back its class afterwards. So ``isinstance``, attributes, methods,
and splitting and merging by nnx work as before.
"""

import contextlib
import functools
import re
import types
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import jax
from flax import nnx

from trainer.core.nnx_bridge import Path
from trainer.core.path_patterns import matches, matches_nothing
from trainer.errors import ArgumentError

View = Callable[[Any], AbstractContextManager[None]]
"""From a model, which the step has made for itself, to the context within which it computes in another way."""

Wrapper = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]
"""From ``__call__`` of a class, a module and arguments to the outputs; hashable, since classes are kept by it."""


def no_view(model: Any) -> AbstractContextManager[None]:
    """The view that changes nothing."""
    del model
    return contextlib.nullcontext()


def combined(*views: View) -> View:
    """Returns the view that enters several, one after the other."""
    views = tuple(view for view in views if view is not no_view)
    if len(views) < 2:
        return views[0] if views else no_view

    @contextlib.contextmanager
    def enter(model: Any) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for view in views:
                stack.enter_context(view(model))
            yield

    return enter


def check_view(view: View, state: Any) -> None:
    """Enters a view of the model of a state, so that a pattern that matches nothing is refused before any step."""

    def enter(state: Any) -> None:
        with view(state.model()):
            pass

    if view is not no_view:
        jax.eval_shape(enter, state)


@contextlib.contextmanager
def called_through(wrappers: Iterable[tuple[Any, Wrapper]]) -> Iterator[None]:
    """Wraps ``__call__`` of modules, each in its own way; a module whose class has none is left alone."""
    kinds: list[tuple[Any, Any, Wrapper]] = [
        (module, type(module), wrapper) for module, wrapper in wrappers if callable(module)
    ]
    try:
        for module, kind, wrapper in kinds:
            _set_class(module, _wrapped(kind, wrapper))
        yield
    finally:
        for module, kind, _ in kinds:
            _set_class(module, kind)


def modules_of(model: Any) -> dict[Path, nnx.Module]:
    """Returns the modules of a model by path, the model itself first; one that is shared has the first of its paths."""
    found: dict[Path, nnx.Module] = dict(nnx.iter_modules(model)) if isinstance(model, nnx.Module) else {}
    return dict(sorted(found.items(), key=lambda item: (len(item[0]), [str(key) for key in item[0]])))


def owner_matches(pattern: str, path: Path) -> bool:
    """Tells whether a pattern matches a path, or that of what holds it, so ``head`` and ``head/**`` are alike."""
    names = [str(key) for key in path]
    pattern = re.sub(r"/\*+$", "", pattern)
    return pattern in ("*", "**") or any(matches(pattern, "/".join(names[:end])) for end in range(1, len(names) + 1))


def refuse_unmatched(name: str, pattern: str, paths: Any) -> None:
    """Raises `ArgumentError` for a pattern of an argument that matches no path."""
    listed = ["/".join(map(str, path)) for path in paths if path]
    raise ArgumentError(f"`{name}` has the pattern {pattern!r}, which {matches_nothing(pattern, listed)}.")


def is_of_nnx(node: Any) -> bool:
    """Tells whether a node of a tree is a module or a variable, to be left whole."""
    return isinstance(node, nnx.Pytree | nnx.Module | nnx.Variable)


def raw_value(leaf: Any) -> Any:
    """Returns the array that a variable holds; any other leaf is returned as it is."""
    return leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf


@functools.cache
def _wrapped(kind: Any, wrapper: Wrapper) -> type:
    """Returns a subclass with a wrapped ``__call__``, one for each class and wrapper: JAX keeps classes of nodes."""
    call = kind.__call__

    @functools.wraps(call)
    def wrapped(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        return wrapper(call, self, args, kwargs)

    def fill(namespace: dict[str, Any]) -> None:
        kept = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
        namespace.update(kept, __call__=wrapped)

    # A module that was declared to be no pytree has list attributes of its own, which a pytree may not.
    keywords = {} if getattr(kind, "_pytree__is_pytree", True) else {"pytree": False}
    return types.new_class(kind.__name__, (kind,), keywords, fill)


def _set_class(module: Any, kind: type) -> None:
    # Past `__setattr__` of nnx, which is for attributes that hold data.
    object.__setattr__(module, "__class__", kind)
