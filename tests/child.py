"""A training run in a process of its own, for tests that kill it or compare what it leaves.

``python -m tests.child`` says ``ready`` when everything is imported and reads one line of JSON, the
arguments of `train` and the directory of a compilation cache. It says ``called`` before it trains,
the number of every step that it has done, and ``finished`` at the end.
"""

import json
import sys
from pathlib import Path

import datarax.sources  # noqa: F401 - a run would import it first thing
import jax
import jax.numpy as jnp
from flax import nnx

from tests.problems import Busy, Counting, config, regression, squared_error
from trainer import Callback, SchedulerConfig, Trainer


class Reporting(Callback):
    """Says every step, and counts them over all processes of a run."""

    def __init__(self):
        self.batches = 0

    def on_batch_end(self, trainer, step, logs):
        self.batches += 1
        print(step, flush=True)

    def state_dict(self):
        return {"batches": self.batches}

    def load_state_dict(self, state):
        self.batches = state["batches"]


class Large(Counting):
    """Makes a state of any size, of which every value is another after every step."""

    def __init__(self, length):
        super().__init__()
        self.table = nnx.Variable(jnp.arange(length, dtype=jnp.int32))

    def loss_fn(self, batch, model_outputs, **kwargs):
        self.table[...] += 1
        return super().loss_fn(batch, model_outputs, **kwargs)


def train(directory, resume, *, examples, mebibytes, save_interval, keep):
    """Trains two epochs with all that a run can have, and saves what it has come to at the end."""
    schedule = SchedulerConfig(scheduler_type="cosine", warmup_steps=3)
    trainer = Trainer(
        Busy(),
        config(scheduler=schedule, log_frequency=4, max_checkpoints=keep),
        loss_fn=squared_error,
        workdir=directory,
        rng=jax.random.key(3),
        callbacks=[Reporting()],
        extensions={"size": Large(mebibytes * 2**18)},
        save_interval=save_interval,
    )
    trainer.train(regression(examples), 2, 4, regression(10, seed=1), val_interval=7, resume=resume)
    trainer.save_checkpoint(Path(directory) / "end.msgpack")


def main():
    print("ready", flush=True)
    arguments = json.loads(sys.stdin.readline())
    jax.config.update("jax_compilation_cache_dir", arguments.pop("cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    print("called", flush=True)
    train(**arguments)
    print("finished", flush=True)


if __name__ == "__main__":
    main()
