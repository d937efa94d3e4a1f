"""A training run in a process of its own, for tests that kill it or compare what it leaves.

``python -m tests.child`` says ``ready`` when everything is imported and reads one line of JSON, the
arguments of `train` and the directory of a compilation cache. It says ``called`` before it trains,
the number of every step that it has done, and ``finished`` at the end.
"""

import json
import sys
import warnings
from pathlib import Path

import datarax.sources  # noqa: F401 - a run would import it first thing
import grain
import jax
import jax.numpy as jnp
from absl import flags
from flax import nnx

from tests.problems import Busy, Counting, config, regression, squared_error
from trainer import Callback, ModelCheckpoint, SchedulerConfig, Trainer, make_mesh


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


class Rows(grain.sources.RandomAccessDataSource):
    """Data that workers of Grain read."""

    def __init__(self, data):
        self.data = data

    def __len__(self):
        return len(self.data["input"])

    def __getitem__(self, index):
        return {name: column[index] for name, column in self.data.items()}

    def __repr__(self):  # by which Grain tells whether a position fits
        return "Rows"


def over_workers(data):
    """A loader whose batches two processes of Grain make."""
    flags.FLAGS(sys.argv[:1], known_only=True)
    sampler = grain.samplers.IndexSampler(len(data["input"]), shuffle=True, seed=3, num_epochs=1)
    batches = [grain.transforms.Batch(4, drop_remainder=True)]
    return grain.DataLoader(data_source=Rows(data), sampler=sampler, operations=batches, worker_count=2)


def train(directory, resume, *, examples, mebibytes, save_interval, keep, kind="in memory"):
    """Trains two epochs with all that a run can have, and saves what it has come to at the end.

    ``kind`` is "in memory", "workers" for `train_epoch` over a loader, or "best" for a `ModelCheckpoint` on 8 devices.
    """
    schedule = SchedulerConfig(scheduler_type="cosine", warmup_steps=3, total_steps=120)
    callbacks, options = [Reporting()], {}
    data = regression(examples)
    if kind == "workers":
        options["train_data_loader"] = over_workers(data)
    if kind == "best":
        callbacks.append(ModelCheckpoint(Path(directory) / "best", save_top_k=2))
        options["mesh"] = make_mesh({"data": 8})
    trainer = Trainer(
        Busy(),
        config(scheduler=schedule, log_frequency=4, max_checkpoints=keep, save_frequency=save_interval, num_epochs=2),
        loss_fn=squared_error,
        workdir=directory,
        rng=jax.random.key(3),
        callbacks=callbacks,
        extensions={"size": Large(mebibytes * 2**18)},
        save_interval=save_interval,
        progress=False,  # what it says is read
        **options,
    )
    if kind == "workers":
        while trainer.epoch < 2:
            trainer.train_epoch(resume=resume)
    else:
        batch_size = 8 if kind == "best" else 4
        trainer.train(data, 2, batch_size, regression(10, seed=1), val_interval=7, resume=resume)
    trainer.save_checkpoint(Path(directory) / "end.msgpack")


def main():
    print("ready", flush=True)
    arguments = json.loads(sys.stdin.readline())
    jax.config.update("jax_compilation_cache_dir", arguments.pop("cache"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    if arguments.pop("shares", False):  # the directory with another run, of which it warns
        warnings.filterwarnings("ignore", message=".*(holds checkpoints|is of another run).*")
    print("called", flush=True)
    train(**arguments)
    print("finished", flush=True)


if __name__ == "__main__":
    main()
