"""Stopping many processes at the same point, so that none waits in a collective for one that has stopped."""

import itertools
import json
import threading
import time
from collections.abc import Callable
from typing import Self

import jax

from trainer.distributed.coordination import POLL_SECONDS, coordination_service, name_processes, read_now, read_within
from trainer.errors import DistributedError

_stops = itertools.count()


class CommonStop:
    """Stops all processes of a run at the same point, wherever one of them was asked to stop.

    A point is a call of `passes`. All processes come to the same points in the same order, with the same
    collectives between them::

        with CommonStop(asked) as stop:
            for batch in batches:
                state, metrics = step(state, batch)
                if stop.passes() is not None:
                    break
            else:
                stop.settles()

    When one is asked to stop, each says how many points it has passed, and passes no other until all
    have. They stop at the next point of the one that is furthest: the others can still reach that, since
    it has begun its part of every collective before. A thread says it, because the main one
    may be in a collective that waits for a process which waits here.

    Args:
        asked: Returns why this process is to stop, None where it is not. It is called from a thread too.
        timeout_seconds: How long to wait for the others.
    """

    def __init__(self, asked: Callable[[], int | None], timeout_seconds: float = 300.0) -> None:
        self._asked = asked
        self._timeout_seconds = timeout_seconds
        self._passed = 0
        self._is_agreeing = self._has_left = False
        self._agreed: tuple[int, int | None] | None = None
        self._failure: Exception | None = None
        self._changed = threading.Condition()
        self._watcher = threading.Thread(target=self._watch, name="trainer-stop", daemon=True)

    def __enter__(self) -> Self:
        number = next(_stops)
        self._room = f"trainer/stop/{number}"
        if jax.process_index() == 0:
            # A process that was in the run before this one has left the run before that.
            coordination_service().key_value_delete(f"trainer/stop/{number - 2}")
        self._watcher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._changed:
            self._has_left = True
            self._changed.notify_all()
        self._watcher.join()

    def passes(self) -> int | None:
        """Passes a point, unless all are to stop at it.

        Returns:
            None, or why all stop here: what ``asked`` returned in the first process where it did.

        Raises:
            DistributedError: Another process did not answer in time. It tells which.
        """
        with self._changed:
            if self._asked() is not None:
                self._begin_to_agree()
            if self._is_agreeing:
                stop, reason = self._agreement()
                if self._passed == stop:
                    return reason
            self._passed += 1
            return None

    def settles(self) -> int | None:
        """Waits until all have passed their last point. It is called once, then.

        Returns:
            None, or why all stop: one was asked to before it came here. Later it is too late.

        Raises:
            DistributedError: Another process did not come in time, or came by another number of points.
        """
        with self._changed:
            self._begin_to_agree()
            stop, reason = self._agreement()
            if self._passed != stop:
                raise DistributedError(
                    f"Process {jax.process_index()} ended its run at point {self._passed}, where another went on to "
                    f"point {stop}. Give all of them the same number of batches, and let none stop by itself."
                )
            return reason

    def _begin_to_agree(self) -> None:
        self._is_agreeing = True
        self._changed.notify_all()

    def _agreement(self) -> tuple[int, int | None]:
        self._changed.wait_for(lambda: self._agreed is not None or self._failure is not None)
        if self._failure is not None:
            raise self._failure
        assert self._agreed is not None
        return self._agreed

    def _watch(self) -> None:
        try:
            if not self._notices():
                return
            agreed = self._agree()
            with self._changed:
                self._agreed = agreed
                self._changed.notify_all()
        except Exception as failure:  # raised in the thread that waits
            with self._changed:
                self._failure = failure
                self._changed.notify_all()

    def _notices(self) -> bool:
        """Waits until a process is asked to stop or this process ends its run; False if it has left instead."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_agreeing or self._has_left, POLL_SECONDS)
                if self._is_agreeing or self._has_left:
                    return not self._has_left
            if self._asked() is not None or read_now(f"{self._room}/notice") is not None:
                with self._changed:
                    self._is_agreeing = True

    def _agree(self) -> tuple[int, int | None]:
        client, process, reason = coordination_service(), jax.process_index(), self._asked()
        if reason is not None:
            client.key_value_set(f"{self._room}/notice", "", allow_overwrite=True)
        client.key_value_set(f"{self._room}/answers/{process}", json.dumps([self._passed, reason]))
        deadline = time.monotonic() + self._timeout_seconds
        if process == 0:
            keys = [f"{self._room}/answers/{other}" for other in range(jax.process_count())]
            answers = [json.loads(self._read(key, deadline)) for key in keys]
            reasons = [why for _, why in answers if why is not None]
            verdict = max(passed for passed, _ in answers), reasons[0] if reasons else None
            client.key_value_set(f"{self._room}/verdict", json.dumps(verdict))
        stop, reason = json.loads(self._read(f"{self._room}/verdict", deadline))
        return stop, reason

    def _read(self, key: str, deadline: float) -> str:
        """Waits for a key in short turns, so that a process that leaves the run need not wait for it."""
        while not self._has_left:
            seconds = min(POLL_SECONDS, deadline - time.monotonic())
            if seconds <= 0:
                break
            text = read_within(key, seconds)
            if text is not None:
                return text
        answers = coordination_service().key_value_dir_get(f"{self._room}/answers/")
        answered = {int(key.rsplit("/", 1)[1]) for key, _ in answers}
        missing = [other for other in range(jax.process_count()) if other not in answered] or [0]
        raise DistributedError(
            f"{name_processes(missing)} of {jax.process_count()} did not say within {self._timeout_seconds:g} s where "
            f"to stop. {'It' if len(missing) == 1 else 'They'} may have taken another way through the program, or be "
            f"busy with something else."
        )
