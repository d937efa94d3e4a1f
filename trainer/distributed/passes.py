"""`CommonPass`: checks that all processes draw equally many batches, of the same shapes.

A process knows only its own part of a batch, and infers the global shape from it. If the parts differ, so do the
inferred shapes, and a step computes wrong numbers or hangs; if one process has a batch more, its step waits forever.
"""

import collections
import contextlib
import hashlib
import threading
import weakref
from collections.abc import Callable, Hashable, Mapping
from typing import Any, Self

import jax

from trainer.batches import describe, summarize
from trainer.distributed.agreement import who_holds_what
from trainer.distributed.coordination import POLL_SECONDS, count_up, delete_directory
from trainer.distributed.rounds import delete_round, exchange, leave_unfinished, values_so_far
from trainer.errors import DistributedError

_PASSES = "trainer/passes"
_MOST_SENT = 16
_LONGEST_SENT = 200


class CommonPass:
    """One pass over batches that all processes make together, each over its own parts of the batches::

        with CommonPass("training", own_examples) as common:
            for batch in batches:
                common.draw(batch, examples)  # before the collectives of its step
                state, metrics = step(state, batch)
            common.end()

    The processes exchange a message only if a batch has a shape or dtype that is new in the pass, and at the end: two
    or three times in a usual pass. Batches whose shapes are known, but come in another order than in another process,
    are found at the next exchange, at the latest at the end.

    While a process waits for an exchange, another that sees nothing new may be in a step that waits for the first. So
    each has a thread that answers for it. The first then raises, which ends the others, see `trainer.distributed`.

    Args:
        name: Names the pass, for messages. Passes that are open at the same time need different names.
        own_examples: Returns this process's share of the examples of a global batch, for messages.
        first: The number of the first batch, for messages.
        timeout_seconds: How long to wait for the other processes, whose loaders may be slow.
    """

    def __init__(
        self, name: str, own_examples: Callable[[int], int], *, first: int = 0, timeout_seconds: float = 1800.0
    ) -> None:
        self._name, self._own_examples, self._timeout_seconds = name, own_examples, timeout_seconds
        self._count = first
        self._kind: Hashable = None
        # The entry in `_changes`, and the description that `_sequence` hashes.
        self._seen: dict[Hashable, tuple[list[Any], str]] = {}
        # From which batch on: the examples in the global batch, this process's share, and the arrays.
        self._changes: collections.deque[tuple[int, list[Any]]] = collections.deque(maxlen=_MOST_SENT)
        self._sequence = hashlib.sha256()
        self._identity, self._rounds, self._has_ended = "", 0, False
        self._lock = threading.Lock()
        self._is_exchanging = self._is_answering = False
        self._failure: Exception | None = None
        self._left = threading.Event()
        self._watcher: threading.Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.leave()

    def leave(self) -> None:
        """Leaves the pass. Unless it has ended, the other processes raise at their next exchange.

        The last process to leave deletes what the pass left in the store.
        """
        self._left.set()
        if not self._identity:  # nothing was exchanged
            return
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator is gone, which ends this process too
            if not self._has_ended:
                # So that no process waits here for this one, and this one's thread for none.
                leave_unfinished(self._round(), f"left the {self._name}")
            if self._watcher is not None:
                self._watcher.join()
            counted = f"{_PASSES}/{self._identity}"
            if count_up(f"{counted}/left") == jax.process_count():
                delete_directory(counted)
                # An error may keep a process from counting a complete exchange, so the others may be one round off.
                for number in range(self._rounds - 1, self._rounds + 2):
                    delete_round(self._round(number))

    def draw(self, batch: Any, examples: int) -> None:
        """Counts a batch, after comparing it with those of the other processes if its shapes are new.

        Args:
            batch: The global batch, as this process infers it.
            examples: The number of examples in it.

        Raises:
            DistributedError: Another process has a batch of another shape, or none. It names the batch and the number
                of rows in each process.
        """
        leaves, structure = jax.tree.flatten(batch)
        kind = structure, *[(leaf.shape, leaf.dtype) for leaf in leaves]
        if kind != self._kind or self._failure is not None:
            self._change(kind, batch, examples)
        self._count += 1

    def end(self) -> None:
        """Compares the number of batches, after the last one.

        Raises:
            DistributedError: Another process has more batches, or had batches of other shapes.
        """
        self._changes.append((self._count, [0, 0, "no batch"]))
        self._exchange()
        self._has_ended = True

    def _change(self, kind: Hashable, batch: Any, examples: int) -> None:
        is_new = kind not in self._seen
        if is_new:
            entry = [examples, self._own_examples(examples), summarize(batch)[:_LONGEST_SENT]]
            self._seen[kind] = entry, describe(batch)
        entry, described = self._seen[kind]
        self._kind = kind
        self._changes.append((self._count, entry))
        self._sequence.update(f"{self._count} {described}\n".encode())
        if is_new or self._failure is not None:
            self._exchange()

    def _exchange(self) -> None:
        with self._lock:
            self._is_exchanging = True
            is_answering = self._is_answering
        if is_answering:
            assert self._watcher is not None
            self._watcher.join()
            assert self._failure is not None
            raise self._failure
        label = f"batch {self._count} of the {self._name}"
        if self._watcher is None:
            found = exchange(f"batches of the {self._name}", self._message(), self._timeout_seconds, label=label)
            self._identity = found.identity
        else:
            found = exchange(self._round(), self._message(), self._timeout_seconds, once=True, label=label)
        if (failure := self._difference(found.values)) is not None:
            raise failure
        if self._watcher is None:
            target = _watch, (weakref.ref(self), self._left)
            self._watcher = threading.Thread(target=target[0], args=target[1], name="trainer-pass", daemon=True)
            self._watcher.start()
        with self._lock:
            self._rounds += 1
            self._is_exchanging = False

    def _round(self, number: int | None = None) -> str:
        return f"batches {self._identity} {self._rounds if number is None else number}"

    def _message(self) -> dict[str, Any]:
        return {"count": self._count, "changes": list(self._changes), "sequence": self._sequence.hexdigest()}

    def _difference(self, messages: Mapping[int, Any]) -> DistributedError | None:
        """Returns the error for messages that differ: all processes are at one batch, with the same ones before it."""
        if (
            len(
                {(message["count"], message["sequence"], message["changes"][-1][1][0]) for message in messages.values()}
            )
            == 1
        ):
            return None
        last = min(message["count"] for message in messages.values())
        starts = {start for message in messages.values() for start, _ in message["changes"] if start <= last}
        found = ""
        for index in sorted(starts | {last}):
            batches = {process: _at(index, message["changes"]) for process, message in messages.items()}
            if None not in batches.values():  # else it is too long ago
                is_larger = len({batch[0] for batch in batches.values()}) > 1
                found = who_holds_what({process: _shown(one, is_larger) for process, one in batches.items()})
            if found:
                break
        return DistributedError(
            f"The processes draw different batches: batch {index} of the {self._name} (the first is batch 0) has "
            f"{found or 'other shapes in each'}. Give each process equally many batches, of the same shapes: drop or "
            f"pad the last batch, or use data in memory."
        )

    def _answer_if_asked(self) -> bool:
        """Answers for a process that draws on without seeing anything new; returns whether it has."""
        number, name = self._rounds, self._round()
        asking = values_so_far(name)
        with self._lock:
            is_asked = asking and self._count > min(message["count"] for message in asking.values())
            if not is_asked or self._is_exchanging or number != self._rounds:
                return False
            self._is_answering = True
        try:
            found = exchange(name, self._message(), self._timeout_seconds, once=True, label=f"the {self._name}")
            self._failure = self._difference(found.values)
        except Exception as failure:
            self._failure = failure
        return True


def _watch(reference: "weakref.ref[CommonPass]", left: threading.Event) -> None:
    """Answers for the pass until it has answered once, which ends the pass, or the pass is left or deleted."""
    while not left.wait(POLL_SECONDS):
        common = reference()
        try:
            if common is None or common._answer_if_asked():
                return
        except Exception:  # the coordinator is gone, which ends this process too
            return
        del common


def _at(index: int, changes: list[Any]) -> Any:
    """Returns what the batch of this number is, None if unknown."""
    return next((batch for start, batch in reversed(changes) if start <= index), None)


def _shown(batch: Any, is_larger: bool) -> str:
    examples, rows, arrays = batch
    if not examples:
        return "no rows, since it has ended,"
    return f"{rows} rows" if is_larger else str(arrays)
