"""The reference trainer's pickle layout: needs only NumPy to load, and is read without executing anything."""

from trainer.checkpoints.reference_pickle.layout import KEYS as KEYS
from trainer.checkpoints.reference_pickle.reader import read_pickle as read_pickle
from trainer.checkpoints.reference_pickle.writer import write_pickle as write_pickle
