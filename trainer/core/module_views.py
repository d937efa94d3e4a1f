"""Views of a model: context managers that temporarily change how its modules compute.

The code of the model is not edited: each affected module becomes an instance of a subclass with a
wrapped ``__call__``, and gets its class back afterwards. So ``isinstance``, attributes, methods, and splitting and
merging by nnx work as before.
"""

import contextlib
import functools
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, cast

import jax
from flax import nnx

from trainer.core.nnx_bridge import Path
from trainer.core.path_patterns import matches, matches_nothing
from trainer.errors import ArgumentError

View = Callable[[Any], AbstractContextManager[None]]
"""Maps a model, created by the step for its own use, to the context manager in which it computes differently."""

Wrapper = Callable[[Callable[..., Any], Any, tuple[Any, ...], dict[str, Any]], Any]
"""Maps ``__call__`` of a class, a module and arguments to outputs; hashable, since subclasses are cached by it."""

_NODES = "_pytree__nodes"  # seen in Flax 0.12.8


def no_view(model: Any) -> AbstractContextManager[None]:
    """The view that changes nothing."""
    del model
    return contextlib.nullcontext()


def combined(*views: View) -> View:
    """Returns a view that enters several views in order."""
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
    """Enters a view of the model of a state, so that a pattern that matches nothing raises before any step."""

    def enter(state: Any) -> None:
        with view(state.model()):
            pass

    if view is not no_view:
        jax.eval_shape(enter, state)


@contextlib.contextmanager
def called_through(wrappers: Iterable[tuple[Any, Wrapper]]) -> Iterator[None]:
    """Wraps ``__call__`` of modules, each with its own wrapper; modules without ``__call__`` are left alone."""
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
    """Returns the modules of a model by path, the model itself first; a shared module has the first of its paths."""
    found: dict[Path, nnx.Module] = dict(nnx.iter_modules(model)) if isinstance(model, nnx.Module) else {}
    return dict(sorted(found.items(), key=lambda item: (len(item[0]), [str(key) for key in item[0]])))


def owner_matches(pattern: str, path: Path) -> bool:
    """Returns whether a pattern matches a path or one of its parents, so ``head`` and ``head/**`` are equivalent."""
    names = [str(key) for key in path]
    pattern = re.sub(r"/\*+$", "", pattern)
    return pattern in ("*", "**") or any(matches(pattern, "/".join(names[:end])) for end in range(1, len(names) + 1))


def refuse_unmatched(name: str, pattern: str, paths: Any) -> None:
    """Raises `ArgumentError` for a pattern of an argument that matches no path."""
    listed = ["/".join(map(str, path)) for path in paths if path]
    raise ArgumentError(f"`{name}` has the pattern {pattern!r}, which {matches_nothing(pattern, listed)}.")


def is_of_nnx(node: Any) -> bool:
    """Returns whether a tree node is a module or a variable, to be treated as a leaf."""
    return isinstance(node, nnx.Pytree | nnx.Module | nnx.Variable)


def raw_value(leaf: Any) -> Any:
    """Returns the array in a variable; any other leaf is returned unchanged."""
    return leaf.get_raw_value() if isinstance(leaf, nnx.Variable) else leaf


def hidden_subclass(name: str, kind: Any, namespace: dict[str, Any], *mixins: type) -> type:
    """Returns a subclass of a module's class, made without ``__init_subclass__`` and metaclass of that class.

    These are the user's: they may enter every subclass in a registry by name, count them, or require keywords. So the
    class is made as a subclass of nnx's own class, and gets its bases afterwards, which calls neither.

    Args:
        name: The name of the subclass.
        kind: The class.
        namespace: The attributes of the subclass.
        *mixins: Subclasses of `nnx.Module` that come before ``kind`` in the bases.
    """
    base: Any = nnx.Module if issubclass(kind, nnx.Module) else nnx.Pytree
    # nnx collects from annotations which attributes are data. It sees only the annotations of `base` here.
    nodes = {key: is_data for each in (*mixins, kind) for key, is_data in getattr(each, _NODES, {}).items()}
    # A module declared with `pytree=False` may have plain list attributes, which a pytree may not.
    keywords = {} if getattr(kind, "_pytree__is_pytree", True) else {"pytree": False}
    made = type(base).__new__(type(kind), name, (*mixins, base), {**namespace, _NODES: nodes}, **keywords)
    made.__bases__ = (*mixins, kind)
    return cast(type, made)


@functools.cache
def _wrapped(kind: Any, wrapper: Wrapper) -> type:
    """Returns a subclass with a wrapped ``__call__``; cached, since JAX keeps every registered node class alive."""
    call = kind.__call__

    @functools.wraps(call)
    def wrapped(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        return wrapper(call, self, args, kwargs)

    kept = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    return hidden_subclass(kind.__name__, kind, {**kept, "__call__": wrapped})


def _set_class(module: Any, kind: type) -> None:
    # Bypasses `__setattr__` of nnx, which is for data attributes.
    object.__setattr__(module, "__class__", kind)
