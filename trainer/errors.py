"""The exceptions and warnings of this library.

    TrainerError
    ├── ArgumentError (ValueError)        invalid value of an argument
    │   ├── ArgumentTypeError (TypeError) … wrong type
    │   ├── ConfigError                   … in a configuration
    │   └── BatchError                    … in the data
    ├── ObjectiveError (ValueError)       invalid result of the objective or an extension
    ├── StateError (RuntimeError)         a training state that can no longer be used
    ├── NonFiniteError (ArithmeticError)  a step that met NaN or infinity, with ``nonfinite="raise"``
    ├── DistributedError (RuntimeError)   processes that disagree, or wait for one that does not respond
    └── CheckpointError (ValueError)      a file that cannot be written or loaded
        └── UnreadableError               … into any state

    TrainingInterrupted (SystemExit)      SIGTERM during a run, which was shut down cleanly

Every message gives the argument in backticks, the actual value, what is expected and what to do.
"""

import contextlib
import inspect
import signal
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# A warning is never attributed to these files; the constructor of a dataclass is in "<string>".
_OURS = (__file__.removesuffix("errors.py"), contextlib.__file__, "<string>")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the caller's line of code, from any depth in this library."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(_OURS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def first_of(texts: Sequence[str], most: int = 5, separator: str = ", ") -> str:
    """Returns ``a, b and 3 more``: the first texts, and the number of the others, so that messages stay short."""
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return separator.join(texts[:most]) + more


class TrainerError(Exception):
    """The base class of all exceptions of this library."""


class ArgumentError(TrainerError, ValueError):
    """An argument has a value that cannot be used."""


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument is of the wrong type."""


class ConfigError(ArgumentError):
    """A configuration has an unknown, mistyped or contradictory field."""


class BatchError(ArgumentError):
    """A batch or a data set cannot be used: a leaf is not a numeric array, or lengths differ that must agree."""


class ObjectiveError(TrainerError, ValueError):
    """The objective or an extension returned or did something that a step cannot use."""


class StateError(TrainerError, RuntimeError):
    """The arrays of a training state were deleted, usually because it was donated."""


class NonFiniteError(TrainerError, ArithmeticError):
    """A step with ``nonfinite="raise"`` met NaN or infinity.

    Attributes:
        step: The number of the step; the first is 1.
        leaves: Names of the arrays that were not finite: ``loss``, ``grads/…``, ``model_state/…``, or ``params/…`` if
            only the update made them so.
        state: The state before that step.
    """

    def __init__(self, message: str, step: int, leaves: tuple[str, ...], state: Any) -> None:
        super().__init__(message)
        self.step, self.leaves, self.state = step, leaves, state


class DistributedError(TrainerError, RuntimeError):
    """The processes of a run disagree about what to do, or one of them did not respond."""


class CheckpointError(TrainerError, ValueError):
    """A checkpoint could not be written or read, or does not fit the current state."""


class UnreadableError(CheckpointError):
    """A file is missing, damaged, or not a checkpoint of a version that this release can read."""


class TrainingInterrupted(SystemExit):
    """SIGTERM ended a run, and its state was saved. If not caught, it exits the process with status 143.

    Attributes:
        path: The checkpoint from which ``train(..., resume=True)`` resumes; None if there is none.
    """

    def __init__(self, message: str) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.message = message
        self.path: Path | None = None

    def __str__(self) -> str:
        return self.message
