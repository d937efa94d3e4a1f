"""Stops several processes at the same point, so that none waits in a collective for one that has stopped.

`jax.experimental.multihost_utils.reached_preemption_sync_point` has the same aim, but is not used. In jax 0.10.2:

* It reacts only to SIGTERM, through a handler that JAX installs below Python's. A handler that Python installs later
  replaces JAX's; conversely, JAX's handler keeps signals from the user's.
* Ctrl-C does not reach it.
* It does not handle the end of a run: after its last step, a process no longer calls it, so a later signal
  stops the others at a point which that process never reaches. `CommonStop.finish` decides this case for all.
* Its timeout cannot be set, and its error does not name the missing process.
"""

import contextlib
import threading
from collections.abc import Callable
from typing import Self

import jax

from trainer.distributed.coordination import POLL_SECONDS, count_up, delete_directory, read_now, write_once
from trainer.distributed.rounds import delete_round, exchange, leave_unfinished
from trainer.errors import DistributedError


class CommonStop:
    """Stops all processes of a run at the same point, whichever of them got a reason to stop.

    A point is a call of `pass_point`. All processes reach the same points in the same order, with the same
    collectives between them::

        with CommonStop(stop_reason) as stop:
            for batch in batches:
                state, metrics = step(state, batch)
                if stop.pass_point() is not None:
                    break
            else:
                stop.finish()

    Once a process has a reason to stop, each process publishes how many points it has passed, and passes no other
    until all have published theirs. All stop at the next point of the process that is furthest ahead: the others can
    still reach it, since that process has begun its part of every collective before it. A thread publishes,
    because the main thread may be in a collective that waits for a process which already waits here.

    On entry, it waits for the other processes to enter, and gives the run an identity that all share.

    Args:
        stop_reason: Returns why this process must stop, or None. It is also called from a thread.
        timeout_seconds: How long to wait for the other processes.

    Raises:
        DistributedError: On entry, not all processes arrived in time. It names the missing ones.
    """

    def __init__(self, stop_reason: Callable[[], int | None], timeout_seconds: float = 300.0) -> None:
        self._stop_reason = stop_reason
        self._timeout_seconds = timeout_seconds
        self._passed = 0
        self._is_agreeing = self._has_left = False
        self._agreed: tuple[int, int | None] | None = None
        self._failure: Exception | None = None
        self._changed = threading.Condition()
        self._watcher = threading.Thread(target=self._watch, name="trainer-stop", daemon=True)

    def __enter__(self) -> Self:
        identity = exchange("run", None, self._timeout_seconds, label="the start of the run").identity
        self._directory, self._answers = f"trainer/stop/{identity}", f"stop {identity}"
        self._watcher.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._changed:
            self._has_left = True
            self._changed.notify_all()
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # the coordinator is gone, which ends this process too
            if self._agreed is None:
                # So that no process waits for this one's answer, nor this one's thread for theirs.
                leave_unfinished(self._answers, "left the run")
            self._watcher.join()
            if count_up(f"{self._directory}/left") == jax.process_count():
                delete_directory(self._directory)
                delete_round(self._answers)

    def pass_point(self) -> int | None:
        """Passes a point, unless all processes are to stop at it.

        Returns:
            None, or the reason why all stop here: that of the first process that had one.

        Raises:
            DistributedError: Another process did not answer in time, or has left the run. It names the process.
        """
        with self._changed:
            if self._stop_reason() is not None:
                self._begin_to_agree()
            if self._is_agreeing:
                stop, reason = self._agreement()
                if self._passed == stop:
                    return reason
            self._passed += 1
            return None

    def finish(self) -> int | None:
        """Waits until all processes have passed their last point. Call it once, after the last point.

        Returns:
            None, or the reason why all stop, if a process had one before calling this. A later one has no effect.

        Raises:
            DistributedError: Another process did not arrive in time, has left the run, or passed a different
                number of points.
        """
        with self._changed:
            self._begin_to_agree()
            stop, reason = self._agreement()
            if self._passed != stop:
                raise DistributedError(
                    f"Process {jax.process_index()} ended its run at point {self._passed}, where another continued "
                    f"to point {stop}. Give all processes the same number of batches, and let none stop by itself."
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
            if not self._wait_for_a_reason():
                return
            agreed = self._agree()
            with self._changed:
                self._agreed = agreed
                self._changed.notify_all()
        except Exception as failure:  # raised in the thread that waits
            with self._changed:
                self._failure = failure
                self._changed.notify_all()

    def _wait_for_a_reason(self) -> bool:
        """Waits until a process has a reason to stop or this one calls `finish`; returns False if it leaves instead."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._is_agreeing or self._has_left, POLL_SECONDS)
                if self._is_agreeing or self._has_left:
                    return not self._has_left
            if self._stop_reason() is not None or read_now(f"{self._directory}/notice") is not None:
                with self._changed:
                    self._is_agreeing = True

    def _agree(self) -> tuple[int, int | None]:
        reason = self._stop_reason()
        if reason is not None:
            write_once(f"{self._directory}/notice", "")
        answer = [self._passed, reason]
        found = exchange(self._answers, answer, self._timeout_seconds, once=True, label="the agreement where to stop")
        answers = found.values.values()
        reasons = [why for _, why in answers if why is not None]
        return max(passed for passed, _ in answers), reasons[0] if reasons else None
