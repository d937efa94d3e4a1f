"""Which steps are logged, and which have a row in the history.

Loggers get the first step and every ``log_frequency``-th, which is a contract. The history has these rows, and enough
others to draw a curve of a short run: at least a hundred of a run that has as many steps.
"""

from trainer.fit.setup import Setup
from trainer.run import Run

MIN_ROWS = 100
"""The rows of a run's history, at least, where it has as many steps."""


def is_logged(step: int, log_frequency: int) -> bool:
    """Returns whether the training metrics of a step go to the loggers."""
    return step == 1 or step % log_frequency == 0


def row_interval(log_frequency: int, finished: int, total: int | None) -> int:
    """Returns the steps from one row of the history to the next.

    Args:
        log_frequency: The steps between rows of the loggers; rows of the history are never farther apart.
        finished: The steps of the run up to here. Where ``total`` is unknown, every step of the first 200 has a row,
            every second of the next hundred, every third of the hundred after that, and so on.
        total: The steps of the whole run, None where they are not known.
    """
    return min(log_frequency, max(1, (finished if total is None else total) // MIN_ROWS))


def steps_due(setup: Setup, run: Run, count: int) -> tuple[set[int], set[int]]:
    """Returns the steps to log, and those to record, of the latest ``count`` steps. It depends on the run alone.

    Where steps are fused the length of the run is known, so that one interval holds for all of them.
    """
    every, step = setup.config.log_frequency, run.step
    planned = setup.live.planned if setup.live.is_running else None
    total = None if planned is None else planned.num_steps
    first_step = 0 if run.position is None else run.position.first_step
    interval = row_interval(every, step - first_step, total)
    if count == 1:  # a fraction of the time of what follows
        logged = {step} if is_logged(step, every) else set()
        return logged, logged if step % interval else {step}
    logged = _multiples(step - count + 1, step, every) | ({1} if step == count else set())
    return logged, logged | _multiples(step - count + 1, step, interval)


def _multiples(first: int, last: int, of: int) -> set[int]:
    return set(range(first + -first % of, last + 1, of))
