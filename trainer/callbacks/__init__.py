"""Callbacks: code that runs around training, outside compiled functions."""

from typing import TYPE_CHECKING

from trainer.callbacks.base import EVENTS as EVENTS
from trainer.callbacks.base import Callback as Callback
from trainer.callbacks.base import CallbackList as CallbackList
from trainer.callbacks.dispatch import CallbackDispatcher as CallbackDispatcher
from trainer.lazy_names import imported_when_used as _imported_when_used

if TYPE_CHECKING:
    from trainer.callbacks.early_stopping import EarlyStopping as EarlyStopping
    from trainer.callbacks.model_checkpoint import ModelCheckpoint as ModelCheckpoint
    from trainer.callbacks.monitor import Monitor as Monitor
    from trainer.callbacks.progress import Progress as Progress

__getattr__ = _imported_when_used(
    __name__,
    {
        "trainer.callbacks.early_stopping": ("EarlyStopping",),
        "trainer.callbacks.model_checkpoint": ("ModelCheckpoint",),
        "trainer.callbacks.monitor": ("Monitor",),
        "trainer.callbacks.progress": ("Progress",),
    },
)
