"""Rounds: all processes of a run exchange values under a name, and all get the same outcome.

The name says what is agreed on, such as ``save runs/mine/checkpoint_7.orbax``. Rounds of the same name are numbered by
the contents of the store, never by a counter in a process, so a process that failed before a round does not fall
behind. In the store of the coordination service, a round is a directory ``trainer/rounds/<name>/<number>``:

* ``value/<process>``: the value of that process, written once.
* ``verdict``: the outcome, written once, by the first process that knows it. It is *complete* when all values are
  there; *given up* by a process whose timeout has expired, naming the missing processes; or *passed* if a process
  is already in a later round and will not come to this one. Only the verdict in the store counts, never what a
  process concludes by itself.
* ``left``: how many processes have read a complete round. The last one deletes it and all earlier rounds of the name.

A process joins the lowest round that has no verdict and no value of its own, so all skip a round that was given up. Two
processes may number a new round differently, if one looked before the last round was deleted and one after. Each
looks again after writing its value, so at least one of them notices, and marks the lower round as passed.

A successful round leaves no keys behind. One that is given up leaves its values and verdict until the next round
of that name completes; forever, if there is none.

A process that is too late for a round takes part in the next one, as if it had failed before. So the name should
identify the save or the step.
"""

import base64
import dataclasses
import json
import time
import uuid
from collections.abc import Mapping
from typing import Any, Self
from urllib.parse import quote, unquote

import jax
import msgpack

from trainer.distributed.coordination import (
    count_up,
    delete_directory,
    name_processes,
    read_directory,
    read_now,
    read_within,
    write_once,
)
from trainer.errors import DistributedError

_ROUNDS = "trainer/rounds"
_ENDED = "trainer/ended"

_COMPLETE, _GIVEN_UP, _PASSED = "complete", "given up", "passed"

_ENDED_BEFORE = ", having ended before"


@dataclasses.dataclass(frozen=True)
class Exchanged:
    """The result of a complete round.

    Attributes:
        values: The value of each process, by process index.
        identity: A text unique to this round and the same in all processes.
    """

    values: Mapping[int, Any]
    identity: str


@dataclasses.dataclass(frozen=True)
class _Verdict:
    """The outcome of a round: how it ended, its identity, and which processes were missing and why."""

    outcome: str
    identity: str = ""
    missing: tuple[int, ...] = ()
    reason: str = ""

    @classmethod
    def parse(cls, text: str) -> Self:
        fields = json.loads(text)
        return cls(**{**fields, "missing": tuple(fields["missing"])})


@dataclasses.dataclass
class _Seen:
    """The contents of a round in the store: packed values by process, and the verdict."""

    values: dict[int, str] = dataclasses.field(default_factory=dict)
    verdict: _Verdict | None = None


def exchange(name: str, value: Any, timeout_seconds: float, *, once: bool = False, label: str = "") -> Exchanged:
    """Returns the value of each process. All processes must call it with the same name.

    Two threads may be in rounds at the same time if the names differ.

    Args:
        name: What is agreed on.
        value: A MessagePack-serializable value.
        timeout_seconds: How long to wait for the other processes.
        once: Whether this name has only one round, so that a process that is too late raises at once.
        label: The name in messages; by default ``name``.

    Raises:
        DistributedError: Not all processes arrived in time. It names the missing ones, and is raised in every
            process that arrived.
    """
    if jax.process_count() == 1:
        return Exchanged({0: value}, uuid.uuid4().hex)
    directory, process, shown = _directory_of(name), jax.process_index(), label or repr(name)
    packed, deadline = base64.b64encode(msgpack.packb(value)).decode(), time.monotonic() + timeout_seconds
    try:
        while True:
            number = _join(directory, packed, once)
            verdict = _verdict(directory, number, deadline, timeout_seconds)
            if verdict.outcome == _COMPLETE:
                held = _look(directory)[number].values
                _leave(directory, number)
                values = {other: _unpacked(text) for other, text in sorted(held.items())}
                return Exchanged(values, verdict.identity)
            # A process that was given up on is late, and joins the next round.
            if verdict.outcome == _GIVEN_UP and (once or process not in verdict.missing):
                raise DistributedError(
                    f"{name_processes(verdict.missing)} of {jax.process_count()} did not come to "
                    f"{shown}{verdict.reason}."
                )
    except jax.errors.JaxRuntimeError as error:
        raise DistributedError(
            f"The processes could not meet at {shown}, since the coordination service, which process 0 "
            f"runs, failed: {error}"
        ) from error


def leave_unfinished(name: str, reason: str) -> None:
    """Gives up a one-time round that this process will not join. Processes waiting for it raise.

    Args:
        name: As for `exchange`.
        reason: Follows "process 1 of 2 did not come to 'stop', since it ".
    """
    _decide(_directory_of(name), 0, _given_up([jax.process_index()], f", since it {reason}"))


def values_so_far(name: str) -> dict[int, Any]:
    """Returns the value of each process that has come to a one-time round which is not complete; does not wait."""
    seen = _look(_directory_of(name)).get(0, _Seen())
    return {} if seen.verdict else {process: _unpacked(text) for process, text in seen.values.items()}


def delete_round(name: str) -> None:
    """Deletes the rest of a one-time round, once all processes are done with it."""
    delete_directory(_directory_of(name))


def announce_end() -> None:
    """Announces that this process ends, so that no other waits for it in a round, now or later."""
    process = jax.process_index()
    write_once(f"{_ENDED}/{process}", "")
    # A round that starts after this lookup will read the key just written.
    for name in {key.split("/", 1)[0] for key in read_directory(_ROUNDS)}:
        for number, seen in _look(f"{_ROUNDS}/{name}").items():
            if seen.verdict is None and process not in seen.values:
                _decide(f"{_ROUNDS}/{name}", number, _given_up([process], _ENDED_BEFORE))


def rounds_in_store() -> list[str]:
    """Returns the keys of all rounds, for tests and for inspecting what a run left behind."""
    return sorted(unquote(key) for key in read_directory(_ROUNDS))


def _unpacked(text: str) -> Any:
    return msgpack.unpackb(base64.b64decode(text))


def _directory_of(name: str) -> str:
    return f"{_ROUNDS}/{quote(name, safe='')}"


def _look(directory: str) -> dict[int, _Seen]:
    """Returns the contents of each round of a name in the store."""
    found: dict[int, _Seen] = {}
    for key, text in read_directory(directory).items():
        number, kind, *rest = key.split("/")
        seen = found.setdefault(int(number), _Seen())
        if kind == "value":
            seen.values[int(rest[0])] = text
        elif kind == "verdict":
            seen.verdict = _Verdict.parse(text)
    return found


def _join(directory: str, packed: str, once: bool) -> int:
    """Writes this process's value to the round that it can join, and returns the round's number."""
    process, number = jax.process_index(), 0
    while True:
        if not once:
            found = _look(directory)
            first = 1 + max((n for n, seen in found.items() if seen.verdict or process in seen.values), default=-1)
            number = min((n for n in found if n >= first), default=first)
        # Another thread of this process may have taken the round; this one then joins the next.
        if write_once(f"{directory}/{number}/value/{process}", packed):
            return number


def _verdict(directory: str, number: int, deadline: float, timeout_seconds: float) -> _Verdict:
    """Waits for the verdict of a round, or decides it."""
    process = jax.process_index()
    try:
        found = _look(directory)
        for other, seen in found.items():
            later = {who for n, one in found.items() if n > other for who in one.values}
            if seen.verdict is None and later - seen.values.keys():
                _decide(directory, other, _Verdict(_PASSED))
        if not _decide_if_complete(directory, number, found):
            ended = [other for other in map(int, read_directory(_ENDED)) if other not in found[number].values]
            if ended:
                _decide(directory, number, _given_up(ended, _ENDED_BEFORE))
        text = read_within(f"{directory}/{number}/verdict", deadline - time.monotonic())
        if text is None:
            found = _look(directory)
            if not _decide_if_complete(directory, number, found):
                missing = [other for other in range(jax.process_count()) if other not in found[number].values]
                who = "It" if len(missing) == 1 else "They"
                reason = (
                    f" within {timeout_seconds:g} s. {who} may have raised an error, or be busy with something else"
                )
                _decide(directory, number, _given_up(missing, reason))
            text = read_now(f"{directory}/{number}/verdict")
            assert text is not None
        return _Verdict.parse(text)
    except jax.errors.JaxRuntimeError:
        raise
    except BaseException as error:
        _decide(directory, number, _given_up([process], f", since it was interrupted ({type(error).__name__})"))
        raise


def _decide_if_complete(directory: str, number: int, found: Mapping[int, _Seen]) -> bool:
    is_complete = len(found[number].values) == int(jax.process_count())
    if is_complete:
        _decide(directory, number, _Verdict(_COMPLETE, uuid.uuid4().hex))
    return is_complete


def _given_up(missing: list[int], reason: str) -> _Verdict:
    return _Verdict(_GIVEN_UP, missing=tuple(sorted(missing)), reason=reason)


def _decide(directory: str, number: int, verdict: _Verdict) -> None:
    """Writes the verdict of a round, unless it has one."""
    write_once(f"{directory}/{number}/verdict", json.dumps(dataclasses.asdict(verdict)))


def _leave(directory: str, number: int) -> None:
    """Deletes a complete round if all other processes have read it.

    Earlier rounds go first: while this one exists, no process restarts at number 0.
    """
    if count_up(f"{directory}/{number}/left") == jax.process_count():
        for earlier in sorted(n for n in _look(directory) if n < number):
            delete_directory(f"{directory}/{earlier}")
        delete_directory(f"{directory}/{number}")
