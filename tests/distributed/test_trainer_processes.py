"""The `Trainer` in several processes: they train as one does, agree at the start, and one of them logs."""

import json
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from tests.core.test_partial_metrics import Auc
from tests.distributed.test_start import JOIN, finish, run, start
from tests.sharding.test_trainer_mesh import Perceptron, config, data, objective
from trainer import (
    Callback,
    CheckpointError,
    ReduceLROnPlateau,
    Trainer,
    batch_sharding,
    ema_of_params,
    histogram,
    latest_checkpoint,
    make_mesh,
    vector,
)

COURSE = """
import tempfile
from tests.sharding.test_trainer_mesh import RULES
from tests.distributed.test_trainer_processes import course, loaders, trainer_on
from trainer import make_mesh

axes = json.loads(os.environ["FLAGS"])
told = []
trainer = trainer_on(
    make_mesh(axes), tempfile.mkdtemp(), RULES if "tensor" in axes else None,
    log_callback=lambda step, metrics, prefix: told.append(step), **loaders(parts := []),
)
found = course(trainer, parts)
kernel = trainer.state.params["outer"]["kernel"]
held = sum(shard.data.nbytes for shard in kernel.addressable_shards) / kernel.nbytes
print(json.dumps({"course": found, "told": len(told), "leads": trainer.is_primary_process, "held": held}))
"""


def trainer_on(mesh, directory, rules=None, **options):
    settings = config(log_frequency=1, gradient_clip_norm=1.0)
    fixed = {"rng": jax.random.key(3), "save_interval": 10**9, "workdir": directory, "loss_fn": objective}
    return Trainer(Perceptron, settings, mesh=mesh, partition_rules=rules, **{**fixed, **options})


def loaders(batches):
    return {"train_data_loader": batches, "val_data_loader": batches}


def course(trainer, parts):
    """Trains and evaluates in every way, with short last batches, and returns what was measured."""
    result = trainer.train(data(), 2, 16, data(13, seed=1), val_interval=7)
    evaluated = trainer.evaluate(data(83), 40)
    split = batch_sharding(trainer.state.step.sharding.mesh)
    places = split.addressable_devices_indices_map((16,)).values()
    own = sorted({row for (where,) in places for row in range(16)[where]})
    part = {name: column[own] for name, column in data().items()}
    loss = float(trainer.train_step(part)["loss"])
    parts.extend([part, part])
    return {
        "history": trainer.history.to_dict(),
        "result": result,
        "evaluated": evaluated,
        "loss": loss,
        "epoch": trainer.train_epoch(),
    }


def flat(tree):
    return {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}


@pytest.mark.parametrize(
    ("processes", "devices", "axes", "share"),
    [(2, 2, {"data": 2, "tensor": 2}, 1.0), (4, 1, {"data": 2, "fsdp": 2}, 0.5)],
)
@pytest.mark.slow
def test_processes_train_as_one_does(processes, devices, axes, share, tmp_path):
    results = run(COURSE, processes, devices=devices, flags=axes)
    assert [status for status, _, _ in results] == [0] * processes, results
    found = [json.loads(out.splitlines()[-1]) for _, out, _ in results]
    assert [one["leads"] for one in found] == [True] + [False] * (processes - 1)
    assert found[0]["told"] > 12
    assert [one["told"] for one in found[1:]] == [0] * (processes - 1)
    assert [one["held"] for one in found] == [share] * processes
    assert all(one["course"] == found[0]["course"] for one in found)

    parts = []
    alone = course(trainer_on(make_mesh({"data": 1}, jax.devices()[:1]), tmp_path, **loaders(parts)), parts)
    # Processes add in another order than one device does, in float32.
    assert flat(found[0]["course"]) == pytest.approx(flat(alone), rel=2e-5, abs=2e-6)


DISAGREE = """
import tempfile, warnings
import numpy as np
from tests.sharding.test_trainer_mesh import Perceptron, config, data, objective
from tests.distributed.test_trainer_processes import trainer_on
from trainer import DistributedError, Trainer, make_mesh

def told(work):
    try:
        work()
    except DistributedError as error:
        return str(error)

mesh, directory = make_mesh({"data": 2}), tempfile.mkdtemp()
rates = config(optimizer={"learning_rate": 0.1 + process})
own = data()
own["target"] = own["target"] + process
found = {"config": told(lambda: Trainer(Perceptron, rates, loss_fn=objective, mesh=mesh))}
trainer = trainer_on(mesh, directory)
found["data"] = told(lambda: trainer.train(own, 1, 16))
found["epochs"] = told(lambda: trainer.train(data(), 1 + process, 16))
trainer = trainer_on(mesh, directory, loss_fn=lambda *args: (objective(*args)[0] * (1.0 + process), {}))
found["code"] = told(lambda: trainer.train(data(), 1, 16))
trainer = trainer_on(mesh, directory, train_data_loader=[data(8)], val_data_loader=None if process else [data(8)])
found["loader"] = told(lambda: trainer.train(data(), 1, 16, val_data=None if process else [data(8)]))
found["loader of epochs"] = told(trainer.train_epoch)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    Trainer(Perceptron(__import__("flax").nnx.Rngs(0)), config(), loss_fn=objective)
found["no mesh"] = [str(warning.message) for warning in caught]
print(json.dumps({**found, "step": trainer.step}))
"""


@pytest.mark.slow
def test_a_disagreement_is_told_by_all_before_the_first_step():
    results = run(DISAGREE, 2)
    assert [status for status, _, _ in results] == [0, 0], results
    for found in (json.loads(out.splitlines()[-1]) for _, out, _ in results):
        assert (
            "`Trainer/training_config/optimizer/learning_rate` is 0.1 in process 0 and 1.1 in process 1"
            in found["config"]
        )
        assert "`train/train_data` is " in found["data"]
        assert "`train/num_epochs` is 1 in process 0 and 2 in process 1" in found["epochs"]
        assert "`train_steps/program` is a text of" in found["code"]
        assert '`train/loaders` is ["val_data"] in process 0 and [] in process 1' in found["loader"]
        assert '"val_data_loader"] in process 0 and ["train_data_loader"] in process 1' in found["loader of epochs"]
        assert "there are 2 processes and no `mesh`: each trains a model of its own" in found["no mesh"][0]
        assert found["step"] == 0


INTERRUPT = """
import pathlib, signal
from tests.sharding.test_trainer_mesh import Perceptron, batch, data, objective
from tests.distributed.test_trainer_processes import Stopping, losses, resumable
from trainer import CheckpointError, TrainingInterrupted, make_mesh

directory = pathlib.Path(json.loads(os.environ["FLAGS"]))
mesh = make_mesh({"data": 1, "fsdp": 2})

# A signal to one of them, in the midst of the second epoch.
trainer = resumable(mesh, directory / "run", callbacks=[Stopping(8, process == 1)])
try:
    trainer.train(data(), 3, 16, data(13, seed=1), val_interval=7)
except TrainingInterrupted as error:
    found = {"step": trainer.step, "path": error.path.name, "losses": losses(trainer)}

# Loaders of their own: interrupted between two batches, and taken up by another trainer.
def parts():
    starts = range(8 * process, 80, 16)
    return [{name: column[start : start + 8] for name, column in data(80).items()} for start in starts]

class Saving(Stopping):
    def on_batch_end(self, trainer, step, logs):
        if step == 7:
            trainer.save_checkpoint()
            raise RuntimeError("stopped")

whole = resumable(mesh, directory / "whole", train_data_loader=parts())
whole.train_epoch()
whole.train_epoch()
broken = resumable(mesh, directory / "parts", train_data_loader=parts(), callbacks=[Saving(0, False)])
broken.train_epoch()
try:
    broken.train_epoch()
except RuntimeError:
    pass
import warnings
with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # lists are drawn again
    again = resumable(mesh, directory / "parts", train_data_loader=parts(), callbacks=[Stopping(0, False)])
    again.train_epoch(resume=True)
print(json.dumps({**found, "whole": losses(whole), "again": losses(again)}))
"""


class Stopping(Callback):
    """Sends a signal to this process at a step, if it is the one."""

    def __init__(self, step, is_the_one):
        self.step, self.is_the_one = step, is_the_one

    def on_batch_end(self, trainer, step, logs):
        if step == self.step and self.is_the_one:
            os.kill(os.getpid(), signal.SIGTERM)


def resumable(mesh, directory, **options):
    fixed = {"rng": jax.random.key(3), "save_interval": 3, "workdir": directory, "loss_fn": objective}
    return Trainer(Perceptron, config(log_frequency=1), mesh=mesh, **fixed, **options)


def losses(trainer):
    return list(zip(*trainer.history.series("loss"), strict=True))


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("interrupted")
    results = run(INTERRUPT, 2, flags=str(directory))
    assert [status for status, _, _ in results] == [0, 0], results
    return directory, [json.loads(out.splitlines()[-1]) for _, out, _ in results]


class TestInterruption:
    @pytest.mark.slow
    def test_all_stop_after_the_same_step_and_save(self, interrupted):
        directory, (first, second) = interrupted
        assert first == second
        assert 8 <= first["step"] < 18
        assert first["path"] == f"checkpoint_{first['step']}.orbax"
        assert latest_checkpoint(directory / "run").name == first["path"]

    @pytest.mark.slow
    def test_another_number_of_processes_and_devices_goes_on_with_what_is_left(self, interrupted, tmp_path):
        directory, (first, _) = interrupted
        shutil.copytree(directory / "run", tmp_path / "run")
        trainer = resumable(make_mesh({"fsdp": 8}), tmp_path / "run", callbacks=[Stopping(0, False)])
        result = trainer.train(data(), 3, 16, data(13, seed=1), val_interval=7, resume=True)

        never = resumable(make_mesh({"data": 1}, jax.devices()[:1]), tmp_path / "never")
        expected = never.train(data(), 3, 16, data(13, seed=1), val_interval=7)
        # The same batches step by step, in other parts and so summed in another order.
        np.testing.assert_allclose(losses(trainer), losses(never), rtol=2e-5)
        assert losses(trainer)[: first["step"]] == [tuple(row) for row in first["losses"]]
        assert result == pytest.approx(expected, rel=2e-5, abs=2e-6)

    @pytest.mark.slow
    def test_loaders_of_several_processes_are_taken_up(self, interrupted):
        _, found = interrupted
        for one in found:
            assert one["again"] == one["whole"]
            assert len(one["whole"]) == 10

    @pytest.mark.slow
    def test_loaders_of_other_processes_are_refused(self, interrupted, tmp_path):
        directory, _ = interrupted
        shutil.copytree(directory / "parts", tmp_path / "parts")
        trainer = resumable(make_mesh({"data": 8}), tmp_path / "parts", train_data_loader=[data(16)])
        with pytest.raises(CheckpointError, match="was saved by 2 processes, each with a loader of its own"):
            trainer.train_epoch(resume=True)
        assert trainer.step == 0


EXAMPLE = """
import contextlib, io
sys.path.insert(0, "examples")
import many_devices

flags = ["--distributed", "--cpu-devices", "1", "--mesh", "data=-1,fsdp=2", "--epochs", "2", "--workdir"]
printed = io.StringIO()
with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(printed):
    result = many_devices.main([*flags, json.loads(os.environ["FLAGS"])])
print(json.dumps({"accuracy": result["accuracy"], "printed": printed.getvalue()}))
"""


@pytest.mark.slow
def test_the_example_trains_and_one_process_tells(tmp_path):
    results, _ = finish(start(EXAMPLE, 2, flags=str(tmp_path)), timeout=120)
    assert [status for status, _, _ in results] == [0, 0], results
    first, second = (json.loads(out.splitlines()[-1]) for _, out, _ in results)
    assert first["accuracy"] == second["accuracy"] > 0.7
    assert "after 24 steps on 2 devices" in first["printed"]
    assert second["printed"] == ""
    assert latest_checkpoint(tmp_path).name == "checkpoint_24.orbax"


PADDED = """
from tests.distributed.test_trainer_processes import padded_course
from trainer import make_mesh
print(json.dumps(padded_course(make_mesh({"data": 4}))))
"""


def padded_course(mesh):
    """Trains and evaluates with padding and accumulation; of a loader's batch each process has its part."""
    tall, processes = data(42), jax.process_count()
    parts = [
        {name: column[start + jax.process_index() : end : processes] for name, column in tall.items()}
        for start, end in ((0, 16), (16, 32), (32, 42))
    ]
    settings = config(batch_size=16 // processes, log_frequency=1)
    trainer = Trainer(
        Perceptron,
        settings,
        mesh=mesh,
        loss_fn=masked_objective,
        rng=jax.random.key(3),
        save_interval=10**9,
        train_data_loader=parts,
        val_data_loader=parts,
        accumulate_steps=2,
        pad_to="batch",
    )
    result = trainer.train(data(42), 1, 16, data(13, seed=1))
    return {
        "result": result,
        "epoch": trainer.run.average.compute(),
        "evaluated": trainer.evaluate(data(21), 16),
        "predicted": trainer.predict(data(21)["input"], 16).sum(axis=1).tolist(),
        "weights": [trainer.train_epoch()[name] for name in ("batch_weight", "val_batch_weight")],
    }


def masked_objective(model, batch, rng, step):
    del rng, step
    weight = batch["mask"].sum()
    losses = ((model(batch["input"]) - batch["target"]) ** 2).mean(axis=1)
    return (losses * batch["mask"]).sum() / weight, {"batch_weight": weight}


@pytest.mark.slow
def test_processes_pad_and_accumulate_as_one_does(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results, _ = finish(start(JOIN + PADDED, 2, devices=2), timeout=200)  # three programs, compiled by both
    assert [status for status, _, _ in results] == [0] * 2, results
    found = [json.loads(out.splitlines()[-1]) for _, out, _ in results]
    assert found[0] == found[1]
    assert found[0]["weights"] == [42, 42]
    alone = padded_course(make_mesh({"data": 4}, jax.devices()[:4]))
    # Dropout draws over all rows of a micro-batch, so the same rows in the same places learn the same.
    assert flat(found[0]) == pytest.approx(flat(alone), rel=2e-4, abs=2e-5)


FEATURES = """
import json
from tests.distributed.test_trainer_processes import course_with_features
from trainer import make_mesh
print(json.dumps(course_with_features(make_mesh({"data": 4}))))
"""


def reported_objective(model, batch, rng, step):
    loss, _ = objective(model, batch, rng, step)
    bad = jnp.where(step == 2, jnp.nan, 0.0)  # the guard leaves this step out, in all processes
    outputs = model(batch["input"])
    errors = jnp.abs(outputs - batch["target"])
    return loss + bad, {
        "errors": histogram(errors, 0.0, 4.0, bins=4),
        "by_output": vector(errors.mean(axis=0)),
        **merging(outputs, batch["target"]),
    }


def merging(outputs, targets):
    """Metrics of the sign of a target that are no averages over batches."""
    clear = jnp.abs(targets) > 0.9
    right = (outputs > 0) == (targets > 0)
    signs = (targets > 0).astype(jnp.float32)
    spread = nnx.metrics.Welford()
    spread.update(values=outputs.astype(jnp.float32))
    return {
        "accuracy": ((right & clear).sum() / clear.sum(), clear.sum()),
        "auc": Auc.of(outputs.astype(jnp.float32).ravel(), signs.ravel()),
        "output": spread,
    }


def course_with_features(mesh):
    """Trains with what composes with a step, all of it at once."""
    trainer = Trainer(
        Perceptron,
        config(log_frequency=1),
        mesh=mesh,
        loss_fn=reported_objective,
        rng=jax.random.key(3),
        save_interval=10**9,
        nonfinite="skip",
        report=["gradient_norm", "update_ratio", "learning_rate"],
        params_average=ema_of_params(0.9),
        precision="bfloat16",
        remat={"inner": "nothing_saveable"},
        callbacks=[ReduceLROnPlateau(patience=1, factor=0.5, min_delta=1e9)],
    )
    held_out = data(27, seed=1)
    trainer.train(data(32), 3, 16, held_out)
    at_once = merging(jnp.array(trainer.predict(held_out, 16)), jnp.array(held_out["target"]))
    return {
        "at_once": {
            "accuracy": float(at_once["accuracy"][0]),
            "auc": float(at_once["auc"].compute()),
            **{f"output_{name}": float(value) for name, value in vars(at_once["output"].compute()).items()},
        },
        "rates": trainer.history.series("learning_rate")[1],
        "norms": trainer.history.series("gradient_norm")[1],
        "averages": trainer.run.average.compute(),
        "validation": dict(trainer.run.validation.averages),
        "skipped": trainer.history.series("skipped")[1],
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:the loss is nan")
def test_what_composes_with_a_step_is_the_same_in_processes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results, _ = finish(start(JOIN + FEATURES, 2, devices=2), timeout=200)
    assert [status for status, _, _ in results] == [0] * 2, results
    found = [json.loads(out.splitlines()[-1]) for _, out, _ in results]
    assert found[0] == found[1]
    alone = course_with_features(make_mesh({"data": 4}, jax.devices()[:4]))
    assert found[0]["skipped"] == alone["skipped"] == [0, 0, 1, 0, 0, 0]
    assert found[0]["rates"] == pytest.approx(alone["rates"])
    assert len(set(alone["rates"])) == 2  # reduced once, after the second validation
    for one in (found[0], alone):
        assert {name: one["validation"][name] for name in one["at_once"]} == pytest.approx(one["at_once"], rel=1e-5)
    assert sum(found[0]["averages"]["errors"]) == sum(alone["averages"]["errors"])
    for name in ("validation", "norms"):
        assert flat(found[0][name]) == pytest.approx(flat(alone[name]), rel=2e-2, abs=1e-2, nan_ok=True)


TIMED = """
import tempfile
from tests.distributed.test_trainer_processes import trainer_on
from tests.sharding.test_trainer_mesh import data
from trainer import LambdaCallback, Timer, make_mesh

now = [0.0]
ticks = LambdaCallback(on_epoch_begin=lambda trainer, epoch: now.append(now[-1] + 6.0 * process))
timer = Timer(10, clock=lambda: now[-1])
trainer = trainer_on(make_mesh({"data": 2}), tempfile.mkdtemp(), callbacks=[ticks, timer])
trainer.train(data(), 5, 16)
print(json.dumps([timer.elapsed, trainer.epoch, trainer.step, timer.reason, trainer.should_stop]))
"""


@pytest.mark.slow
def test_where_the_time_of_one_process_is_up_all_end_after_the_same_epoch():
    """The clock of process 0 stands still: alone it would train on, and wait for the other."""
    results = run(TIMED, 2)
    assert [status for status, _, _ in results] == [0, 0], results
    found = [json.loads(out.splitlines()[-1]) for _, out, _ in results]
    assert [elapsed for elapsed, *_ in found] == [0.0, 12.0]
    assert found[0][1:] == found[1][1:] == [2, 2 * -(-len(data()["input"]) // 16), "the time of 0:00:10 is up", True]


LATE = """
import tempfile
from tests.distributed.test_trainer_processes import trainer_on
from tests.sharding.test_trainer_mesh import data
from trainer import Callback, make_mesh
from trainer.fit import setup as fit_setup
from trainer.fit.setup import Setup

late, share, shared, gathered, waits = Callback(), Setup.share_stop, [], fit_setup.gathered, []

def gathering(*values, timeout_seconds=300.0, **options):
    waits.append(timeout_seconds)
    return gathered(*values, timeout_seconds=timeout_seconds, **options)

def sharing(setup):
    share(setup)
    shared.append(setup)  # at the start of the run, and after each epoch
    late.should_stop = process == 1 and len(shared) >= 2

Setup.share_stop, fit_setup.gathered = sharing, gathering
trainer = trainer_on(make_mesh({"data": 2}), tempfile.mkdtemp(), callbacks=[late])
trainer.train(data(32), 5, 16)
print(json.dumps([trainer.epoch, trainer.step, trainer.should_stop, set(waits) == {1800.0}]))
"""


STOPPED = """
import tempfile
from tests.distributed.test_trainer_processes import trainer_on
from tests.sharding.test_trainer_mesh import data
from trainer import Callback, make_mesh

class Stops(Callback):
    def on_epoch_end(self, trainer, epoch, logs):
        self.should_stop = process == 1 and epoch >= 1

parts = [{name: column[process::2] for name, column in data(16).items()}] * 2
trainer = trainer_on(make_mesh({"data": 2}), tempfile.mkdtemp(), callbacks=[Stops()], train_data_loader=parts)
trainer.train(data(), 5, 16)
found = [trainer.epoch, trainer.should_stop, trainer.setup.events.stop_reasons()]
trainer = trainer_on(make_mesh({"data": 2}), tempfile.mkdtemp(), callbacks=[Stops()], train_data_loader=parts)
while trainer.epoch < 5 and not trainer.should_stop:
    trainer.train_epoch()
print(json.dumps([*found, trainer.epoch]))
"""


@pytest.mark.slow
def test_a_wish_that_comes_after_it_was_shared_ends_all_after_the_next_epoch():
    results, _ = finish(start(JOIN + LATE, 2), timeout=90)
    assert [status for status, _, _ in results] == [0, 0], results
    found = [json.loads(out.splitlines()[-1]) for _, out, _ in results]
    assert found == [[2, 4, True, True]] * 2


@pytest.mark.slow
def test_where_a_callback_of_one_process_asks_to_stop_all_end_after_the_same_epoch():
    results, _ = finish(start(JOIN + STOPPED, 2), timeout=90)
    assert [status for status, _, _ in results] == [0, 0], results
    found = [json.loads(out.splitlines()[-1]) for _, out, _ in results]
    assert found[0] == [2, True, ["Stops asked for it, in process 1"], 2]
    assert found[1] == [2, True, ["Stops asked for it"], 2]
