"""How fast a state is saved and loaded, beside writing and reading the same bytes raw.

Run it with ``python benchmarks/checkpoint.py [MiB ...]``; 256 and 1024 if left out. All in one process, in
turns; rates are medians, and what counts is the ratio to the raw ones of the same turn. Files are
read from the page cache, raw ones into fresh memory as any loader must. "Memory" is how far the resident
memory rises above where it was while saving, and while loading beyond what is loaded (Linux only).
"""

import ctypes
import gc
import os
import pickle
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

import flax.serialization
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import safetensors.numpy
from flax import nnx

from trainer import OptimizerConfig, Trainer, TrainingConfig, TrainState, load_state, save_state
from trainer.bundle import Bundle


class Wide(nnx.Module):
    """Parameters of a given size, in layers of 16 MiB."""

    def __init__(self, mebibytes):
        rngs = np.random.default_rng(0)
        shape = (2048, 2048)
        self.layers = nnx.List(
            [nnx.Param(jnp.asarray(rngs.standard_normal(shape, np.float32))) for _ in range(mebibytes // 16)]
        )


def on_disk(path, write):
    """Calls ``write(file)`` and flushes, as the contenders do that say so."""
    with open(path, "wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())


def contenders(state, directory):
    """Pairs of a function that saves and one that loads; each with what it promises."""
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


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def memory(function):
    """Returns by how many bytes the resident memory rose at most while ``function`` ran, beyond what it returned."""
    status = Path("/proc/self/status")
    if not os.access("/proc/self/clear_refs", os.W_OK):
        return float("nan")

    def kibibytes(name):
        return int(re.search(rf"{name}:\s+(\d+)", status.read_text())[1])

    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed and not given back would hide a rise
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = kibibytes("VmRSS")
    kept = sum(leaf.nbytes for leaf in jax.tree.leaves(function()) if hasattr(leaf, "nbytes"))
    return (kibibytes("VmHWM") - before) * 1024 - kept


def held_up(state, directory):
    """Returns the seconds of a copy to the host, and those for which a save in the background holds training up."""
    config = TrainingConfig(optimizer=OptimizerConfig(optimizer_type="sgd", learning_rate=0.1))
    trainer = Trainer(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), config, loss_fn=lambda *_: None, workdir=directory)
    trainer.state = state
    copying = seconds(lambda: [np.array(leaf, copy=True) for leaf in jax.tree.leaves(state.params)])
    holding = seconds(lambda: trainer.save_checkpoint(background=True))
    trainer.close()
    return copying, holding


def main(sizes, turns=5):
    for mebibytes in sizes:
        state = TrainState.create(Wide(mebibytes), optax.sgd(0.1), rng=jax.random.key(0))
        with tempfile.TemporaryDirectory() as name:
            size, all_of_them = contenders(state, Path(name))
            saves = {what: [] for what in all_of_them}
            loads = {what: [] for what in all_of_them}
            for _ in range(turns):
                for what, (save, load) in all_of_them.items():
                    saves[what].append(seconds(save))
                    loads[what].append(seconds(load))
            rises = {what: [memory(one) for one in pair] for what, pair in all_of_them.items()}
            held = [held_up(state, Path(name)) for _ in range(turns)]
            header = statistics.median(seconds(lambda: Bundle(Path(name) / "ours").close()) for _ in range(turns))
        raw = next(iter(all_of_them))
        print(f"{size / 1e6:.0f} MB of state")
        for what in all_of_them:
            row = []
            for times in (saves, loads):
                rate = size / 1e9 / statistics.median(times[what])
                ratio = statistics.median(a / b for a, b in zip(times[raw], times[what], strict=True))
                row.append(f"{rate:6.2f} GB/s {ratio:5.2f}x raw")
            room = "  ".join(f"{rise / 2**20:5.0f}" for rise in rises[what])
            print(f"  {what:28s} save {row[0]}    load {row[1]}    memory {room} MiB")
        copying, ratio = statistics.median(c for c, _ in held), statistics.median(h / c for c, h in held)
        print(f"  a background save holds training up for {ratio:.2f}x the copy to the host ({copying * 1e3:.0f} ms)")
        print(f"  the tree without its arrays: {header * 1e3:.2f} ms")


if __name__ == "__main__":
    main([int(argument) for argument in sys.argv[1:]] or [256, 1024])
