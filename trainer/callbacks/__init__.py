"""Callbacks: code that runs around training, outside compiled functions."""

from trainer.callbacks.base import EVENTS as EVENTS
from trainer.callbacks.base import Callback as Callback
from trainer.callbacks.base import CallbackList as CallbackList
from trainer.callbacks.dispatch import CallbackDispatcher as CallbackDispatcher
from trainer.callbacks.early_stopping import EarlyStopping as EarlyStopping
from trainer.callbacks.model_checkpoint import ModelCheckpoint as ModelCheckpoint
from trainer.callbacks.monitor import Monitor as Monitor
from trainer.callbacks.progress import Progress as Progress
