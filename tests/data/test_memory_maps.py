"""Data on disk that NumPy maps into memory: read by the row, never as a whole."""

import subprocess
import sys
from pathlib import Path

import chex
import numpy as np
import pytest

from tests.problems import Linear, config, regression, squared_error
from trainer import BatchError, InMemoryData, Trainer
from trainer import batches as checks

ROOT = Path(__file__).parents[2]


def mapped(directory, data):
    for name, array in data.items():
        np.save(directory / f"{name}.npy", array)
    return {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in data}


def test_mapped_files_train_as_arrays_do_and_stay_mapped(tmp_path):
    data = regression(30)
    files = mapped(tmp_path, data)
    trainers = [Trainer(Linear(4), config(), loss_fn=squared_error) for _ in range(2)]
    averages = [trainer.train(one, 3, 8) for trainer, one in zip(trainers, (data, files), strict=True)]
    assert averages[0] == averages[1]
    chex.assert_trees_all_equal(*[trainer.state.params for trainer in trainers])
    columns, _ = InMemoryData(files, 8).columns()
    assert all(np.shares_memory(column, files[name]) for column, name in zip(columns, sorted(files), strict=True))


def test_wide_integers_are_checked_a_part_at_a_time_and_the_first_bad_row_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "_MOST_BYTES_AT_ONCE", 64)
    ids = np.arange(60, dtype=np.int64).reshape(30, 2)
    InMemoryData(mapped(tmp_path, {"ids": ids}), 8)
    ids[17, 1] = 2**40
    ids[23, 0] = -(2**40)
    with pytest.raises(BatchError, match=r"holds -\d+ to 1099511627776 as int64, the first of them in row 17"):
        InMemoryData(mapped(tmp_path, {"ids": ids}), 8)


LARGE = """
import resource, sys
from pathlib import Path
import numpy as np, optax
from flax import nnx
from trainer import Callback, Trainer, TrainingConfig, OptimizerConfig

GIB = 2**30
directory, limit = Path(sys.argv[1]), 2 * GIB
# What the process allocates. Pages of mapped files do not count: the kernel drops them when it needs memory.
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

files = {
    "x": np.memmap(directory / "x", np.float32, "w+", shape=(2**20, 2048)),
    "ids": np.memmap(directory / "ids", np.int64, "w+", shape=(2**20, 128)),
    "y": np.memmap(directory / "y", np.float32, "w+", shape=(2**20,)),
}
files["y"][:] = 1
total = sum(file.nbytes for file in files.values())
files = {name: np.memmap(directory / name, file.dtype, "r", shape=file.shape) for name, file in files.items()}


def own_bytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) * 1024


class Peak(Callback):
    peak = 0

    def on_call_end(self, trainer, step, metrics):
        self.peak = max(self.peak, own_bytes())


def loss_fn(model, batch, rng, step):
    prediction = model(batch["x"])[:, 0] + batch["ids"].sum(axis=1)
    return optax.squared_error(prediction, batch["y"]).mean(), {}


peak = Peak()
model = nnx.Linear(2048, 1, rngs=nnx.Rngs(0))
config = TrainingConfig(optimizer=OptimizerConfig(optimizer_type="sgd", learning_rate=0.01))
trainer = Trainer(model, config, loss_fn=loss_fn, callbacks=[peak], progress=False)
trainer.train(files, num_epochs=1, batch_size=1024)
print(total, trainer.step, peak.peak, float(trainer.run.metrics["loss"]), float(trainer.state.params["bias"][0]))
"""


@pytest.mark.long
def test_eight_gibibytes_train_in_two(tmp_path):
    """Files without blocks, whose pages are read all the same; `RssAnon` is what is not of files."""
    code = tmp_path / "large.py"
    code.write_text(LARGE)
    environment = {"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "ignore", str(code), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    total, steps, peak, loss, bias = map(float, done.stdout.split())
    print(f"{total / 2**30:.1f} GiB in {steps:.0f} steps; at most {peak / 2**20:.0f} MiB of its own")
    assert total > 8 * 2**30
    assert steps == 1024
    assert peak < 1.5 * 2**30
    assert loss < 1e-3
    assert bias == pytest.approx(1, abs=0.05)
