"""Checkpoints: training states and runs in files and directories, atomic and verified."""

from trainer.checkpoints.state_io import save_state as save_state
from trainer.checkpoints.state_io import load_state as load_state
from trainer.checkpoints.state_io import latest_checkpoint as latest_checkpoint
from trainer.checkpoints.state_io import load_latest as load_latest
from trainer.checkpoints.state_io import load_with_progress as load_with_progress
from trainer.checkpoints.state_io import default_name as default_name
from trainer.checkpoints.run_record import save_run as save_run
from trainer.checkpoints.run_record import load_run as load_run
from trainer.checkpoints.checkpointer import Checkpointer as Checkpointer
from trainer.checkpoints.background import BackgroundSaver as BackgroundSaver
