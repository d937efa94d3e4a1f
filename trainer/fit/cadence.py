"""Which steps are logged, and which have a row in the history.

Loggers get the first step and every ``log_frequency``-th one; this is a contract. The history has these rows, and more
in short runs, so that a curve can be plotted: at least 100 rows, or one per step in a run of fewer steps.
"""

from collections.abc import Set

from trainer.fit.setup import Setup
from trainer.run import Run

MIN_ROWS = 100
"""The minimum number of rows in the history of a run with at least as many steps."""


_NONE: frozenset[int] = frozenset()


def is_logged(step: int, log_frequency: int) -> bool:
    """Returns whether the training metrics of a step are sent to the loggers."""
    return step == 1 or step % log_frequency == 0


def row_interval(log_frequency: int, finished: int, total: int | None) -> int:
    """Returns the number of steps between rows of the history.

    Args:
        log_frequency: The number of steps between logged rows, an upper bound of the result.
        finished: The steps of the run so far. If ``total`` is unknown, every step of the first 200 has a row, every
            second of the next 100, every third of the 100 after that, and so on.
        total: The total steps of the run; None if unknown.
    """
    return min(log_frequency, max(1, (finished if total is None else total) // MIN_ROWS))


def steps_due(setup: Setup, run: Run, count: int) -> tuple[Set[int], Set[int]]:
    """Returns which of the latest ``count`` steps to log and which to record. The result depends only on the run.

    If steps are fused, the length of the run is known, so one interval applies to all of them.
    """
    every, step, live = setup.config.log_frequency, run.step, setup.live
    planned = live.planned if live.is_running else None
    total = None if planned is None else planned.num_steps
    first_step = 0 if run.position is None else run.position.first_step
    interval = row_interval(every, step - first_step, total)
    if count == 1:  # after every step that is not fused: most are not due
        if is_logged(step, every):
            return {step}, {step}
        return _NONE, _NONE if step % interval else {step}
    logged = _multiples(step - count + 1, step, every) | ({1} if step == count else set())
    return logged, logged | _multiples(step - count + 1, step, interval)


def _multiples(first: int, last: int, of: int) -> set[int]:
    return set(range(first + -first % of, last + 1, of))
