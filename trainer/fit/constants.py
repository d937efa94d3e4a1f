"""The Python attributes of extensions that their losses read, which are constants of the compiled step."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from trainer.core.fingerprint import fingerprint_and_reads
from trainer.errors import warn

_NO_CONSTANTS = {"weight", "enabled"}
"""Attributes of extensions that a step takes as an argument, or that select its program."""

_PLAIN = (bool, int, float, str, bytes, type(None))


class Constants:
    """The plain attributes that the losses of extensions read, as they were when `update` was last called.

    Every program of an epoch must have the same: also one that is compiled for a short last batch, after a hook has
    changed an attribute. So `update` is called when an epoch begins, and steps are traced within `in_force`.

    Args:
        extensions: The extensions with a loss, by name. Empty with several processes, which may differ in an
            attribute and would not compile together: their steps keep the values with which they were traced first.

    Attributes:
        token: Identifies the values; part of the variant of a step.
    """

    def __init__(self, extensions: Mapping[str, Any]) -> None:
        self._extensions = extensions
        self._read: dict[str, set[str]] | None = None
        self._values: dict[tuple[str, str], Any] = {}
        self._is_traced = self._has_warned = False
        self.token = ""
        if extensions:
            self.update()

    def update(self) -> None:
        """Takes the current values. Warns, once, if they are not those that a step was compiled with."""
        if not self._extensions:
            return
        before, self._values = self._values, self._current()
        self.token = repr(list(self._values.items()))
        if not self._is_traced or self._has_warned:
            return
        changed = [key for key, value in self._values.items() if repr(before.get(key)) != repr(value)]
        if changed:
            self._has_warned = True
            listed = ", ".join(f"`extensions[{name!r}].{attribute}`" for name, attribute in changed[:3])
            warn(
                f"{listed} changed, which a compiled step holds as a constant: each new value takes effect when an "
                f"epoch begins, and compiles the step again. Changing `weight`, or computing the value from the `step` "
                f"that `loss_fn` may take, compiles nothing."
            )

    @contextlib.contextmanager
    def in_force(self) -> Iterator[None]:
        """Gives the extensions the values of `update` while a step is traced."""
        self._is_traced = True
        now = self._current()
        others = {key: value for key, value in self._values.items() if key in now and repr(now[key]) != repr(value)}
        try:
            for (name, attribute), value in others.items():
                vars(self._extensions[name])[attribute] = value  # nnx refuses `setattr` within a trace
            yield
        finally:
            for name, attribute in others:
                vars(self._extensions[name])[attribute] = now[name, attribute]

    def traced(self, step: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a step, not jitted, that is traced with the values of `update`."""
        if not self._extensions:
            return step

        def with_constants(*args: Any) -> Any:
            with self.in_force():
                return step(*args)

        return with_constants

    def _current(self) -> dict[tuple[str, str], Any]:
        if self._read is None:
            self._read = {
                name: fingerprint_and_reads(extension, ["loss_fn"])[1].of.get("self", set()) - _NO_CONSTANTS
                for name, extension in self._extensions.items()
            }
        return {
            (name, attribute): value
            for name, extension in self._extensions.items()
            for attribute, value in sorted(getattr(extension, "__dict__", {}).items())
            if attribute in self._read[name] and type(value) in _PLAIN
        }
