"""What processes hold together is the same in each, or all of them hear of it before they train."""

import json

import numpy as np
import pytest

from tests.distributed.test_start import JOIN, finish, run, start
from trainer.data.memory import InMemoryData
from trainer.distributed import check_replicas

CHECK = """
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec
from trainer import DistributedError, make_mesh
from trainer.distributed import check_replicas

mesh = make_mesh({"data": 2, "tensor": 2})  # each process has one place of "data"

def spread(value, *axes):
    sharding = NamedSharding(mesh, PartitionSpec(*axes))
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])

def told(whole, columns, rows, key=0):
    keys = jax.random.wrap_key_data(spread(np.asarray([0, key], np.uint32)))
    tree = {"whole": spread(whole), "columns": spread(columns, None, "tensor"), "rows": spread(rows, "data"),
            "key": keys, "own": np.full(3, process)}
    try:
        check_replicas(tree)
    except DistributedError as error:
        return str(error)

table = np.arange(32, dtype=np.float32).reshape(4, 8)
one_bit = table.copy()
one_bit.view(np.uint32)[1, 6] += process
print(json.dumps({
    "equal": told(table, table, table),
    "rows": told(table, table, table + process),
    "whole": told(one_bit, table, table),
    "columns": told(table, one_bit, table),
    "key": told(table, table, table, process),
    "again": told(table, table, table),
}))
"""


def test_every_difference_of_what_they_share_is_told_by_all():
    results = run(CHECK, 2, devices=2)
    assert [status for status, _, _ in results] == [0, 0], results
    first, second = (json.loads(out.splitlines()[-1]) for _, out, _ in results)
    assert first == second
    assert first["equal"] is first["again"] is None
    assert first["rows"] is None  # each process has rows of its own
    assert "same arrays (told by checksums): `whole` is " in first["whole"]
    assert first["whole"].count(" in process ") == 2
    # Columns 4 to 7 are on the second device of each process; the others are equal.
    assert "checksums): `columns[0:4, 4:8]` is " in first["columns"]
    assert first["columns"].count("`") == 2
    assert "checksums): `key` is " in first["key"]


FAILING = """
import time
from trainer.distributed import replicas

def broken(*_):
    raise MemoryError("no room for a copy")

found, whole = [], replicas.digests_as_text
start = time.monotonic()
for failing in (0, 1):
    if process == failing:
        replicas.digests_as_text = broken
    try:
        check_replicas({"whole": spread(table)})
    except (DistributedError, MemoryError) as error:
        found.append(f"{type(error).__name__}: {error}")
    replicas.digests_as_text = whole
print(json.dumps({"found": found, "after": told(table, table, table), "seconds": time.monotonic() - start}))
"""


def test_checksums_that_one_process_cannot_compute_fail_in_all_at_once():
    setup, _, _ = CHECK.partition("print(")
    results = run(setup + FAILING, 2, devices=2)
    assert [status for status, _, _ in results] == [0, 0], results
    for process, (_, out, _) in enumerate(results):
        said = json.loads(out.splitlines()[-1])
        expected = ["MemoryError: no room for a copy", "DistributedError: process 1 failed: no room for a copy"]
        other = ["DistributedError: process 0 failed: no room for a copy", "MemoryError: no room for a copy"]
        assert said["found"] == (expected if process == 0 else other)
        assert said["after"] is None
        assert said["seconds"] < 30  # the timeout is 300


def test_one_process_has_nothing_to_compare():
    check_replicas({"a": np.zeros(3)})


TRAINER = """
import pathlib, shutil
import flax.nnx as nnx
from tests.distributed.test_trainer_processes import trainer_on
from tests.sharding.test_trainer_mesh import Perceptron, config, data, objective
from trainer import DistributedError, Trainer, make_mesh

directory = pathlib.Path(json.loads(os.environ["FLAGS"]))
mesh = make_mesh({"data": 2})

def told(work):
    try:
        work()
    except DistributedError as error:
        return str(error)

found = {}
part = {name: column[process * 8 : process * 8 + 8] for name, column in data(16).items()}
for kind, seed in (("other", process), ("same", 0)):
    made = Trainer(
        Perceptron(nnx.Rngs(seed)), config(), loss_fn=objective, mesh=mesh, workdir=directory / kind,
        train_data_loader=[part],
    )
    found["train", kind] = told(lambda: made.train(data(), 1, 16))
    found["epoch", kind] = told(made.train_epoch)
steps = made.step

# An edit that each process makes in its own way.
made.state = made.state.replace(params=jax.tree.map(lambda leaf: leaf + process, made.state.params))
found["edited"] = told(lambda: made.train(data(), 1, 16))

# One bad row of 10,000.
columns = data(10_000)
columns["target"] = columns["target"].copy()
columns["target"][4_321] += process
trainer = trainer_on(mesh, directory / "rows")
found["rows"] = told(lambda: trainer.train(columns, 1, 100))
print(json.dumps({**{str(name): text for name, text in found.items()}, "steps": steps, "step": trainer.step}))
"""


@pytest.mark.slow
def test_other_weights_and_bad_rows_are_told_before_the_first_step(tmp_path):
    results = run(TRAINER, 2, flags=str(tmp_path))
    assert [status for status, _, _ in results] == [0, 0], results
    first, second = (json.loads(out.splitlines()[-1]) for _, out, _ in results)
    assert first == second
    for call in ("train", "epoch"):
        assert "`params/inner/bias` is " not in first[str((call, "other"))]  # zeros in both
        assert "`params/inner/kernel` is " in first[str((call, "other"))]
        assert first[str((call, "same"))] is None
    assert first["steps"] > 0
    assert "`params/inner/bias` is " in first["edited"]
    assert "`train/train_data` is " in first["rows"]
    assert first["step"] == 0


RESTORED = """
import pathlib, shutil
import flax.nnx as nnx
from tests.sharding.test_trainer_mesh import Perceptron, config, data, objective
from trainer import DistributedError, Trainer, make_mesh
from trainer.distributed import barrier

directory = pathlib.Path(json.loads(os.environ["FLAGS"]))

def build():
    mesh = make_mesh({"data": 2})
    return Trainer(Perceptron(nnx.Rngs(0)), config(), loss_fn=objective, mesh=mesh, workdir=directory, progress=False)

one = build()
for name in ("0.orbax", "1.orbax"):  # of the same steps, and of other weights
    other = build()
    other.state = other.state.replace(params=jax.tree.map(lambda leaf: leaf + int(name[0]), other.state.params))
    other.train(data(), 1, 16)
    other.save_checkpoint(directory / name)
barrier("saved")
own = directory / f"process {process}"  # as a local disk would be: the same name, and another file
own.mkdir()
shutil.copytree(directory / f"{process}.orbax", own / "own.orbax")
os.chdir(own)

def told(work):
    try:
        work()
    except DistributedError as error:
        return str(error)

resumed, loaded, same = build(), build(), build()
found = {"resume": told(lambda: resumed.train(data(), 2, 16, resume="own.orbax"))}
loaded.load_checkpoint("own.orbax")
before = loaded.step
found["load"] = told(lambda: loaded.train(data(), 2, 16))
found["steps"] = [resumed.step, loaded.step - before]
found["same"] = told(lambda: same.train(data(), 2, 16, resume=directory / "0.orbax"))
print(json.dumps({**found, "went on": same.step > before}))
"""


@pytest.mark.slow
def test_other_checkpoints_are_told_before_the_first_step_after_a_restore(tmp_path):
    results = run(RESTORED, 2, flags=str(tmp_path))
    assert [status for status, _, _ in results] == [0, 0], results
    first, second = (json.loads(out.splitlines()[-1]) for _, out, _ in results)
    assert first == second
    assert "`params/inner/kernel` is " in first["resume"]
    assert "`params/inner/kernel` is " in first["load"]
    assert first["steps"] == [0, 0]
    assert (first["same"], first["went on"]) == (None, True)


EXIT = """
import tempfile
from tests.distributed.test_trainer_processes import trainer_on
from tests.sharding.test_trainer_mesh import data
from trainer import Callback, make_mesh

class Leaving(Callback):
    def on_batch_end(self, trainer, step, logs):
        if step == 3 and process in json.loads(os.environ["FLAGS"]):
            sys.exit(5)

trainer_on(make_mesh({"data": 2}), tempfile.mkdtemp(), callbacks=[Leaving()]).train(data(), 3, 16)
"""


@pytest.mark.parametrize("leaving", [[0], [1]])
@pytest.mark.slow
def test_sys_exit_in_one_process_ends_the_other_and_is_named(leaving):
    results, seconds = finish(start(JOIN + EXIT, 2, flags=leaving))
    (left,) = leaving
    assert results[left][0] == 5, results
    status, _, errors = results[1 - left]
    assert status == 1
    assert f"process {1 - left} ends, since process {left} left its run by SystemExit(5)" in errors
    assert seconds < 40  # to start, on a busy machine; then some seconds


@pytest.mark.slow
def test_sys_exit_in_all_is_an_ordinary_end():
    results, _ = finish(start(JOIN + EXIT, 2, flags=[0, 1]))
    assert [status for status, _, _ in results] == [5, 5], results


def test_data_are_hashed_whole_up_to_a_size():
    rows = np.zeros((10_000, 3), np.float32)
    other = rows.copy()
    other[4_321, 1] = 1
    bytes_of_all = rows.nbytes
    prints = {size: [InMemoryData(data, 10).fingerprint(size) for data in (rows, other)] for size in (0, bytes_of_all)}
    assert prints[0][0] == prints[0][1]
    assert prints[bytes_of_all][0] != prints[bytes_of_all][1]
