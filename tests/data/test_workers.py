"""Loaders whose batches other processes make; those of torch are in `third_party/test_sources.py`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TRAINS = """
import json
import sys

import grain
import jax
import numpy as np
from absl import flags

from tests.fit.test_resume_epoch import grain_map
from tests.problems import Linear, config, squared_error
from trainer import Callback, Trainer


class Interrupts(Callback):
    def on_batch_end(self, trainer, step, logs):
        if step == 6:
            raise KeyboardInterrupt


def build(directory, **options):
    settings = config(log_frequency=1)
    return Trainer(Linear(4), settings, loss_fn=squared_error, workdir=directory, progress=False, **options)


def bits(trainer):
    return [np.asarray(leaf).tobytes().hex() for leaf in jax.tree.leaves(trainer.state.params)]


if __name__ == "__main__":
    directory, prefetch = sys.argv[1], int(sys.argv[2])
    flags.FLAGS(sys.argv[:1], known_only=True)
    plain = build(directory + "/plain")
    plain.train(grain_map(), 2, 4)
    loader = grain_map().to_iter_dataset().mp_prefetch(grain.MultiprocessingOptions(num_workers=2))
    options = {"prefetch": prefetch, "save_interval": 1}
    try:
        build(directory + "/workers", callbacks=[Interrupts()], **options).train(loader, 2, 4)
    except KeyboardInterrupt:
        pass
    resumed = build(directory + "/workers", **options)
    resumed.train(loader, 2, 4, resume=True)
    print(json.dumps([[bits(one), one.step, one.history.to_dict()["loss"]] for one in (plain, resumed)]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("prefetch", [0, 2])
def test_grain_with_workers_trains_and_resumes(prefetch, tmp_path):
    """The batches come in the order that they have without workers, and a resumed run draws none again."""
    script = tmp_path / "script.py"
    script.write_text(TRAINS)
    command = [sys.executable, "-W", "error::UserWarning:trainer", str(script), str(tmp_path), str(prefetch)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), *sys.path])}
    done = subprocess.run(command, capture_output=True, text=True, timeout=180, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    plain, resumed = json.loads(done.stdout.splitlines()[-1])
    assert plain[1] == 8
    assert plain == resumed
