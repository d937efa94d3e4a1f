"""Where progress is shown: a terminal, a notebook, or a file. A display decides how content looks, not what it is.

A display never ends training: if its stream is gone, it falls silent.
"""

from __future__ import annotations

import contextlib
import dataclasses
import html
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

NOTEBOOK_WIDTH = 100
"""The width of a notebook's output, in columns."""

_KEPT = 200
"""The number of lines that a notebook keeps for a run."""

# Pages exported from notebooks use proportional fonts for HTML, which would misalign the columns.
_TABLE_STYLE = "white-space: pre; font-family: Menlo, 'DejaVu Sans Mono', Consolas, 'Courier New', monospace"


@dataclasses.dataclass(frozen=True)
class Part:
    """A part of the live line.

    Attributes:
        text: The text.
        rank: Parts with the highest rank are dropped first if the line is too narrow for all.
        fraction: For a bar in place of a text: the filled fraction, from 0 to 1.
    """

    text: str
    rank: int
    fraction: float | None = None


class Display:
    """A display of whole lines: a file, a pipe, or a dumb terminal. It writes no control characters.

    Attributes:
        line_every: The seconds between two draws of the status line.
        has_table: Whether finished epochs are rows under a heading; else each row names its values.
    """

    line_every = 30.0
    has_table = False

    def __init__(self, stream: TextIO) -> None:
        self._stream: TextIO | None = stream

    @property
    def width(self) -> int:
        """The number of columns of a line."""
        return 10**6

    @property
    def encoding(self) -> str:
        """The encoding of the stream, UTF-8 if unknown."""
        return getattr(self._stream, "encoding", None) or "utf-8"

    def say(self, lines: Sequence[str], style: str = "") -> None:
        """Shows permanent lines, in a rich style if styles are supported."""

        def write(stream: TextIO) -> None:
            stream.write("".join(f"{printable(line, self.encoding)}\n" for line in lines))
            if hasattr(stream, "flush"):
                stream.flush()

        self._attempt(write)

    def draw(self, parts: Sequence[Part]) -> None:
        """Shows the status line, replacing the previous one if the display can."""
        self.say(["  ".join(part.text for part in parts if part.fraction is None)])

    def close(self) -> None:
        """Keeps the permanent lines and releases everything else. It may be called again."""

    def _attempt(self, write: Callable[[TextIO], None]) -> None:
        """Writes, and falls silent for good if the stream is closed or full."""
        if self._stream is None:
            return
        try:
            write(self._stream)
        except (OSError, ValueError):  # the latter from a closed stream
            self._stream = None
            self.close()


class Terminal(Display):
    """A terminal: lines stay above one line that is drawn in place.

    It is drawn only from the training thread; a refresh thread would take the interpreter from the loop.
    While it is shown, printed text, warnings and log messages appear above it.
    """

    line_every = 0.2
    has_table = True

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        from rich.console import Console
        from rich.live import Live

        class Surviving(Console):
            def on_broken_pipe(self) -> None:
                """Raises the error; rich itself would end the process."""
                raise

        self._console = Surviving(
            file=stream, force_terminal=True, force_jupyter=False, highlight=False, markup=False, emoji=False
        )
        # Output to a file must stay in the file: a stream is redirected to the terminal only if it is a terminal.
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=is_terminal(sys.stdout),
            redirect_stderr=is_terminal(sys.stderr),
        )
        self._handlers: list[tuple[Any, Any]] = []

    @property
    def width(self) -> int:
        # The last column stays free, since some terminals wrap as soon as it is written.
        return max(self._console.width - 1, 1)

    def say(self, lines: Sequence[str], style: str = "") -> None:
        from rich.text import Text

        def write(stream: TextIO) -> None:
            shown = "\n".join(printable(line, self.encoding) for line in lines)
            self._console.print(Text(shown, style), soft_wrap=True)

        self._attempt(write)

    def draw(self, parts: Sequence[Part]) -> None:
        def write(stream: TextIO) -> None:
            line = self._line(parts, self.encoding)
            if not self._live.is_started:
                self._start()
            self._live.update(line, refresh=True)

        self._attempt(write)

    def close(self) -> None:
        for handler, stream in self._handlers:
            handler.setStream(stream)
        self._handlers = []
        with contextlib.suppress(OSError, ValueError):
            self._live.stop()

    def _start(self) -> None:
        before = {id(sys.stdout): "stdout", id(sys.stderr): "stderr"}
        self._live.start()
        # A killed process cannot restore the terminal, so the cursor stays visible.
        self._console.show_cursor(True)
        for handler in _stream_handlers():
            name = before.get(id(handler.stream))
            if name is not None and getattr(sys, name) is not handler.stream:
                self._handlers.append((handler, handler.setStream(getattr(sys, name))))

    def _line(self, parts: Sequence[Part], encoding: str) -> Any:
        from rich.cells import cell_len
        from rich.text import Text

        texts = [printable(part.text, encoding) for part in parts]
        left, shown = self.width + 2, []
        for index in sorted(range(len(parts)), key=lambda index: parts[index].rank):
            needed = cell_len(texts[index]) + 2
            if needed <= left:
                left -= needed
                shown.append(index)
        line = Text(no_wrap=True, overflow="crop")
        done, rest = ("━", "─") if _can_encode("━─", encoding) else ("=", "-")
        for index in sorted(shown):
            line.append("  " if line.plain else "")
            fraction, length = parts[index].fraction, len(texts[index])
            if fraction is None:
                line.append(texts[index])
            else:
                filled = round(min(fraction, 1.0) * length)
                line.append(done * filled, "green").append(rest * (length - filled), "dim")
        return line


class Notebook(Display):
    """The output of a notebook cell: one display that is replaced, and grows only by one line per epoch."""

    line_every = 0.5
    has_table = True

    def __init__(self, ipython: Any) -> None:
        super().__init__(sys.stderr)
        self._ipython = ipython
        self._handle: Any = None
        self._kept: list[str] = []
        self._line = ""
        self.cell = ipython.get_ipython().execution_count

    @property
    def width(self) -> int:
        return NOTEBOOK_WIDTH

    def say(self, lines: Sequence[str], style: str = "") -> None:
        self._kept = [*self._kept, *(printable(line) for line in lines)][-_KEPT:]
        self._update()

    def draw(self, parts: Sequence[Part]) -> None:
        texts: list[str] = []
        for part in parts:
            filled = 0 if part.fraction is None else round(part.fraction * len(part.text))
            text = part.text if part.fraction is None else "━" * filled + "─" * (len(part.text) - filled)
            texts.append(printable(text))
        self._line = "  ".join(texts)
        self._update()

    def close(self) -> None:
        if self._line:
            self._line = ""
            self._update()

    def _update(self) -> None:
        text = "\n".join([*self._kept, self._line] if self._line else self._kept)
        bundle = {"text/plain": text, "text/html": f'<pre style="{_TABLE_STYLE}">{html.escape(text)}</pre>'}
        display = self._ipython.display
        if self._handle is None:
            self._handle = display.display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)


def open_display(stream: TextIO | None) -> Display | None:
    """Returns the display that suits a stream, standard error by default; None if the stream does not exist."""
    ipython = sys.modules.get("IPython")
    if stream is None and ipython is not None:
        shell = ipython.get_ipython()
        if getattr(shell, "kernel", None) is not None:
            return Notebook(ipython)
    stream = sys.stderr if stream is None else stream
    if stream is None or getattr(stream, "closed", False):
        return None
    # Inside another live display, which shows our lines above its own.
    is_taken = type(stream).__module__.startswith("rich.")
    if is_taken or not is_terminal(stream) or os.environ.get("TERM", "").lower() in ("dumb", "unknown"):
        return Display(stream)
    return Terminal(stream)


def is_terminal(stream: Any) -> bool:
    """Returns whether a stream is an open terminal."""
    try:
        return bool(stream.isatty())
    except (AttributeError, OSError, ValueError):
        return False


def printable(text: str, encoding: str = "utf-8") -> str:
    """Returns text with control characters, and characters that the encoding lacks, escaped."""
    if text.isprintable() and _can_encode(text, encoding):
        return text
    return "".join(
        character
        if character.isprintable() and _can_encode(character, encoding)
        else character.encode("ascii", "backslashreplace").decode("ascii")
        if not character.isascii()
        else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def _can_encode(text: str, encoding: str) -> bool:
    try:
        text.encode(encoding)
    except (UnicodeEncodeError, LookupError):
        return False
    return True


def _stream_handlers() -> Iterator[Any]:
    """Yields the handlers of all loggers that hold a stream of their own, such as those of `logging.basicConfig`."""
    found = [logging.root, *logging.root.manager.loggerDict.values()]
    seen: set[int] = set()
    for logger in found:
        for handler in getattr(logger, "handlers", ()):
            is_stream = isinstance(handler, logging.StreamHandler) and not isinstance(handler, logging.FileHandler)
            if is_stream and id(handler) not in seen:
                seen.add(id(handler))
                yield handler
