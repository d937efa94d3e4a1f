"""What this library raises, and how it warns.

    TrainerError
    ├── ArgumentError (ValueError)        a value that a public call cannot take
    │   ├── ArgumentTypeError (TypeError) … because it is of the wrong type
    │   ├── ConfigError                   … in a configuration
    │   └── BatchError                    … in the data
    ├── ObjectiveError (ValueError)       what the objective or an extension returned
    ├── StateError (RuntimeError)         a training state that cannot be used any more
    ├── NonFiniteError (ArithmeticError)  a step that met NaN or infinity, where it was to be refused
    ├── DistributedError (RuntimeError)   processes that disagree, or wait for one that does not come
    └── CheckpointError (ValueError)      a file that cannot be written or loaded
        └── UnreadableError               … whatever it should be loaded into

    TrainingInterrupted (SystemExit)      SIGTERM came during a run, which ended in order

Every message names the argument in backticks, what came, what was wanted and what to do.
"""

import contextlib
import inspect
import signal
import warnings
from pathlib import Path
from typing import Any

# Frames of these files are not where a warning comes from; the constructor of a dataclass is in "<string>".
_OURS = (__file__.removesuffix("errors.py"), contextlib.__file__, "<string>")


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warns at the line of the caller's code, however deep in this library the reason was found."""
    level, frame = 1, inspect.currentframe()
    while frame is not None and frame.f_code.co_filename.startswith(_OURS):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


class TrainerError(Exception):
    """The root: catches everything that this library raises by itself."""


class ArgumentError(TrainerError, ValueError):
    """An argument has a value that cannot be used."""


class ArgumentTypeError(ArgumentError, TypeError):
    """An argument is of the wrong type."""


class ConfigError(ArgumentError):
    """A configuration has an unknown, mistyped or contradictory field."""


class BatchError(ArgumentError):
    """A batch or a data set cannot be used: a leaf is no numeric array, or lengths differ where they must not."""


class ObjectiveError(TrainerError, ValueError):
    """The objective, or an extension, returned or did something a step cannot use."""


class StateError(TrainerError, RuntimeError):
    """The arrays of a training state are gone, usually because it was donated."""


class NonFiniteError(TrainerError, ArithmeticError):
    """A step with ``nonfinite="raise"`` met NaN or infinity.

    Attributes:
        step: The number of the step, the first being 1.
        leaves: Names of the arrays that were not finite: ``loss``, ``grads/…``, ``model_state/…``, or ``params/…``
            where the update made them so.
        state: The state before that step.
    """

    def __init__(self, message: str, step: int, leaves: tuple[str, ...], state: Any) -> None:
        super().__init__(message)
        self.step, self.leaves, self.state = step, leaves, state


class DistributedError(TrainerError, RuntimeError):
    """The processes of a run disagree about what to do, or one of them did not come."""


class CheckpointError(TrainerError, ValueError):
    """A checkpoint could not be written, read, or fitted to the state at hand."""


class UnreadableError(CheckpointError):
    """A file is missing, damaged, or no checkpoint of a version that this release reads."""


class TrainingInterrupted(SystemExit):
    """SIGTERM ended a run, whose state was saved. Not caught, it ends the process with status 143.

    Attributes:
        path: The checkpoint with which ``train(..., resume=True)`` goes on, None if there is none.
    """

    def __init__(self, message: str) -> None:
        super().__init__(128 + signal.SIGTERM)
        self.message = message
        self.path: Path | None = None

    def __str__(self) -> str:
        return self.message
