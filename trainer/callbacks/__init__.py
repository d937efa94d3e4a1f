"""Callbacks: code that runs around training, outside compiled functions."""

from typing import TYPE_CHECKING

from trainer.callbacks.base import EVENTS as EVENTS
from trainer.callbacks.base import Callback as Callback
from trainer.callbacks.base import CallbackList as CallbackList
from trainer.callbacks.dispatch import CallbackDispatcher as CallbackDispatcher
from trainer.core.lazy_names import imported_when_used as _imported_when_used

if TYPE_CHECKING:
    from trainer.callbacks.early_stopping import EarlyStopping as EarlyStopping
    from trainer.callbacks.model_checkpoint import ModelCheckpoint as ModelCheckpoint
    from trainer.callbacks.plateau import ReduceLROnPlateau as ReduceLROnPlateau
    from trainer.callbacks.small import LearningRateMonitor as LearningRateMonitor
    from trainer.callbacks.small import LambdaCallback as LambdaCallback
    from trainer.callbacks.small import Timer as Timer
    from trainer.callbacks.small import TerminateOnNonFinite as TerminateOnNonFinite
    from trainer.callbacks.small import GenerateSamples as GenerateSamples
    from trainer.callbacks.profilers import JAXProfiler as JAXProfiler
    from trainer.callbacks.profilers import MemoryProfiler as MemoryProfiler
    from trainer.callbacks.monitor import Monitor as Monitor
    from trainer.callbacks.progress import Progress as Progress

__getattr__ = _imported_when_used(
    globals(),
    {
        "trainer.callbacks.early_stopping": ("EarlyStopping",),
        "trainer.callbacks.model_checkpoint": ("ModelCheckpoint",),
        "trainer.callbacks.plateau": ("ReduceLROnPlateau",),
        "trainer.callbacks.small": (
            "LearningRateMonitor",
            "LambdaCallback",
            "Timer",
            "TerminateOnNonFinite",
            "GenerateSamples",
        ),
        "trainer.callbacks.profilers": ("JAXProfiler", "MemoryProfiler"),
        "trainer.callbacks.monitor": ("Monitor",),
        "trainer.callbacks.progress": ("Progress",),
    },
)
