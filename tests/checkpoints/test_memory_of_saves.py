"""How much memory of the host saving and loading take: one array at a time, beside the state itself.

Measured in processes of their own, as the peak of the resident memory above what it was before.
"""

import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.problems import Linear, config, squared_error
from trainer import Trainer, TrainState, load_state, save_state

ROOT = Path(__file__).parents[2]
SLACK = 64  # MiB beyond the largest array


def can_measure():
    return sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK)


pytestmark = pytest.mark.skipif(not can_measure(), reason="needs a Linux that lets a process reset its peak memory")


class Large(nnx.Module):
    """Eight parameters of 16 MiB."""

    def __init__(self):
        values = np.random.default_rng(0)
        self.layers = nnx.List([nnx.Param(jnp.asarray(values.random((2048, 2048), np.float32))) for _ in range(8)])


def resident(name):
    """Returns a figure of this process in MiB: VmRSS, what is resident now, or VmHWM, its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(name))


def extra(action):
    """Returns what an action returns, and the peak above what was resident before, in MiB."""
    jax.block_until_ready(jax.live_arrays())
    gc.collect()
    # What was freed but is still held would be taken without showing.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    result = jax.block_until_ready(action())
    return result, resident("VmHWM") - before


def in_a_process(function, *arguments):
    """Calls a function of this file in a new process, and returns what it returns."""
    code = f"""
        import json, sys
        from tests.checkpoints.test_memory_of_saves import {function.__name__}
        print(json.dumps({function.__name__}(*sys.argv[1:])))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=900)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def ordinary(directory):
    state = TrainState.create(Large(), optax.sgd(0.1), rng=jax.random.key(0))
    path, saving = extra(lambda: save_state(Path(directory) / "a", state))
    loaded, loading = extra(lambda: load_state(path, like=state))
    same = all(map(np.array_equal, jax.tree.leaves(loaded.params), jax.tree.leaves(state.params)))
    trainer = Trainer(state, config(), optimizer=optax.sgd(0.1), loss_fn=squared_error, workdir=directory)
    _, in_background = extra(lambda: [trainer.save_checkpoint(background=True), trainer.close()])
    _, copying = extra(lambda: [np.array(leaf) for _ in range(2) for leaf in jax.tree.leaves(state.params)])
    return {"saving": saving, "loading": loading, "in_background": in_background, "copying": copying, "same": same}


@pytest.mark.slow
def test_it_is_little_beside_the_state(tmp_path):
    found = in_a_process(ordinary, tmp_path)
    print(found)
    assert found["same"]
    assert found["saving"] <= 16 + SLACK
    assert found["loading"] <= 128 + 16 + SLACK
    assert found["in_background"] <= 128 + 16 + SLACK
    # The measure would notice copies of everything; the first one may take memory that a save has given back.
    assert found["copying"] > 16 + SLACK


def enormous(directory):
    state = TrainState.create(Linear(), optax.sgd(0.1), rng=jax.random.key(0))
    # Its length does not fit into 32 bits, and no word comes twice.
    leaf = jax.device_put(np.arange(2**30 + 2, dtype=np.uint32).view(np.uint8)[: 2**32 + 5])
    state = state.replace(model_state={"all": leaf})
    path, saving = extra(lambda: save_state(Path(directory) / "a", state))
    leaf.delete()
    loaded, loading = extra(lambda: load_state(path, like=state))
    data = np.asarray(loaded.model_state["all"])
    words, piece = data[: 2**32].view(np.uint32), 2**26
    same = all(np.array_equal(words[i : i + piece], np.arange(i, i + piece)) for i in range(0, 2**30, piece))
    return {"saving": saving, "loading": loading, "same": same, "length": len(data), "last": data[-5:].tolist()}


@pytest.mark.long
def test_an_array_of_more_than_4_gib(tmp_path):
    memory = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if memory < 10 * 2**30 or shutil.disk_usage(tmp_path).free < 5 * 2**30:
        pytest.skip("needs 10 GiB of free memory, and 5 of disk")
    try:
        found = in_a_process(enormous, tmp_path)
    finally:
        shutil.rmtree(tmp_path)
    print(found)
    assert found["same"]
    assert (found["length"], found["last"]) == (2**32 + 5, [0, 0, 0, 64, 1])
    # On the CPU nothing need be copied. The promise is one array.
    assert found["saving"] <= SLACK
    assert found["loading"] <= 4096 + SLACK
