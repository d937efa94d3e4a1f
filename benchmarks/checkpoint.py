"""How fast a state is saved and loaded, beside writing and reading the same bytes raw.

Rates count all bytes of the state; "x raw" is the ratio to the raw rate. Files are read from the page cache, raw ones
into fresh memory as in any loader. "Memory" is the rise of the resident memory during a save, and during a load beyond
what is loaded (Linux only). Run it with ``python benchmarks/checkpoint.py --mebibytes 256 1024``.
"""

import ctypes
import gc
import os
import pickle
import re
import statistics
import tempfile
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import safetensors.numpy
from flax import nnx

from timing import Report, in_turns, per, ratio
from trainer import OptimizerConfig, Trainer, TrainingConfig, TrainState, load_state, save_state
from trainer.checkpoints.file_format import Bundle


class Wide(nnx.Module):
    """Parameters of a given size, in layers of 16 MiB."""

    def __init__(self, mebibytes):
        rngs = np.random.default_rng(0)
        shape = (2048, 2048)
        self.layers = nnx.List(
            [nnx.Param(jnp.asarray(rngs.standard_normal(shape, np.float32))) for _ in range(mebibytes // 16)]
        )


def on_disk(path, write):
    """Calls ``write(file)`` and flushes to disk, for the contenders whose names say so."""
    with open(path, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def contenders(state, directory):
    """Returns the bytes of the state, and by name pairs of a save and a load function."""
    host = jax.tree.map(np.asarray, state.params)
    leaves = jax.tree.leaves(host)
    size = sum(leaf.nbytes for leaf in leaves)

    def load_raw():
        loaded = [np.empty(leaf.nbytes, np.uint8) for leaf in leaves]
        with open(directory / "raw", "rb") as file:
            for array in loaded:
                file.readinto(array.data)
        return loaded

    def load_flax():
        return flax.serialization.from_bytes(host, (directory / "flax").read_bytes())

    def load_pickle():
        with open(directory / "pickle", "rb") as file:
            return pickle.load(file)

    def save_orbax():
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(directory / "orbax", state.params, force=True)

    def load_orbax():
        with ocp.StandardCheckpointer() as checkpointer:
            return jax.block_until_ready(checkpointer.restore(directory / "orbax", state.params))

    named = {str(i): leaf for i, leaf in enumerate(leaves)}

    return size, {
        "raw write + fsync": (
            lambda: on_disk(directory / "raw", lambda file: [file.write(leaf.data) for leaf in leaves]),
            load_raw,
        ),
        "save_state, load_state": (
            lambda: save_state(directory / "ours", state),
            lambda: jax.block_until_ready(load_state(directory / "ours", like=state)),
        ),
        "pickle + fsync": (lambda: on_disk(directory / "pickle", lambda f: pickle.dump(host, f, 5)), load_pickle),
        "flax msgpack + fsync": (
            lambda: on_disk(directory / "flax", lambda f: f.write(flax.serialization.to_bytes(host))),
            load_flax,
        ),
        "Orbax (StandardCheckpointer)": (save_orbax, load_orbax),
        "safetensors, no fsync": (
            lambda: safetensors.numpy.save_file(named, directory / "safetensors"),
            lambda: safetensors.numpy.load_file(directory / "safetensors"),
        ),
    }


def memory(function):
    """Returns the largest rise of the resident memory in bytes while ``function`` ran, beyond its result."""
    status = Path("/proc/self/status")
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return float("nan")

    def kibibytes(name):
        return int(re.search(rf"{name}:\s+(\d+)", status.read_text())[1])

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the process still holds would hide a rise
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = kibibytes("VmRSS")
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(function()) if hasattr(leaf, "nbytes"))
    return (kibibytes("VmHWM") - before) * 1024 - kept


def held_up(state, directory):
    """Returns contenders: a copy to the host, and the part of a background save that blocks training."""
    config = TrainingConfig(optimizer=OptimizerConfig(optimizer_type="sgd", learning_rate=0.1))
    trainer = Trainer(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), config, loss_fn=lambda *_: None, workdir=directory)
    trainer.state = state
    copy = per(1, lambda: [np.array(leaf, copy=True) for leaf in jax.tree.leaves(state.params)])
    save = per(1, lambda: trainer.save_checkpoint(background=True))

    def save_and_finish():
        waited = save()
        trainer.close()
        return waited

    return {"copy": copy, "background save": save_and_finish}


def main():
    sizes = {"type": int, "nargs": "+", "default": [256], "help": "sizes of the state in MiB, multiples of 16"}
    report = Report(__doc__, repeats=5, options={"--mebibytes": sizes})
    for mebibytes in [32] if report.quick else report.options.mebibytes:
        state = TrainState.create(Wide(mebibytes), optax.sgd(0.1), rng=jax.random.key(0))
        with tempfile.TemporaryDirectory() as name:
            size, pairs = contenders(state, Path(name))
            saves = in_turns({what: per(1, save) for what, (save, _) in pairs.items()}, report.repeats)
            loads = in_turns({what: per(1, load) for what, (_, load) in pairs.items()}, report.repeats)
            rises = {what: [memory(one) / 2**20 for one in pair] for what, pair in pairs.items()}
            held = in_turns(held_up(state, Path(name)), report.repeats)
            header = in_turns({"header": per(1, lambda: Bundle(Path(name) / "ours").close())}, report.repeats)
        raw = next(iter(pairs))
        rows = [
            {
                "what": what,
                "save GB/s": size / 1e9 / statistics.median(saves[what]),
                "save x raw": 1 / ratio(saves[what], saves[raw]),
                "load GB/s": size / 1e9 / statistics.median(loads[what]),
                "load x raw": 1 / ratio(loads[what], loads[raw]),
                "memory saving, MiB": rises[what][0],
                "memory loading, MiB": rises[what][1],
                "turns": [saves[what], loads[what]],
            }
            for what in pairs
        ]
        report.table(f"{size / 1e6:.0f} MB of state", rows)
        waits = [
            {
                "what": "training waits for a save in the background, x the copy to the host",
                "value": ratio(held["background save"], held["copy"]),
            },
            {
                "what": "the tree of a file without its arrays, ms",
                "value": statistics.median(header["header"]) * 1e3,
            },
        ]
        report.table(f"{size / 1e6:.0f} MB of state, beside", waits)
    report.close()


if __name__ == "__main__":
    main()
