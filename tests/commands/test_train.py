"""``trainer train``, ``plan`` and ``demo``: configurations that name callables, overrides, and how they end."""

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from trainer import ConfigError
from trainer.commands.job import Job
from trainer.commands.main import main

ROOT = Path(__file__).parent.parent.parent

MODULE = """
import jax.numpy as jnp, numpy as np
from flax import nnx

class Net(nnx.Module):
    def __init__(self, width: int = 3, *, rngs: nnx.Rngs):
        self.inner = nnx.Linear(2, width, rngs=rngs)
        self.outer = nnx.Linear(width, 1, rngs=rngs)

    def __call__(self, x):
        return self.outer(nnx.relu(self.inner(x)))[:, 0]

class Family:
    Small = Net

def data(count=32, held_out=True):
    x = np.random.default_rng(0).normal(size=(count, 2)).astype(np.float32)
    whole = {"x": x, "y": x.sum(1)}
    return whole, whole if held_out else None

def arrays():
    return np.ones((4, 2)), np.ones(4)

def batches():
    return [data()[0]] * 3, None

def loss(model, batch, rng, step, scale=1.0):
    del rng, step
    return scale * jnp.mean((model(batch["x"]) - batch["y"]) ** 2), {}

def fails(**arguments):
    raise RuntimeError("in the caller's code")

number = 3
"""

FILE = """
model: NAME:Net
data: {factory: NAME:data}
objective: NAME:loss
num_epochs: 2
batch_size: 8
log_frequency: 1
optimizer: {optimizer_type: adam, learning_rate: 1e-2}
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A file with a configuration, beside the module that it names; the module has a name of its own in each test."""
    name = f"module_of_{tmp_path.name}".replace("-", "_")
    (tmp_path / f"{name}.py").write_text(MODULE)
    path = tmp_path / "job.yaml"
    path.write_text(FILE.replace("NAME", name))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    yield path
    sys.modules.pop(name, None)


def run(*arguments):
    out = io.StringIO()
    return main([*map(str, arguments)], out), out.getvalue()


def config_of(path, *overrides):
    return Job.from_file(path, overrides).config


def test_a_run_is_trained_and_its_directory_explains_it(job):
    status, text = run("train", job, "--quiet", "optimizer.learning_rate=2e-2", "workdir=out")
    assert status == 0
    assert text.startswith("validation after 8 steps: loss ")
    assert "`trainer plot out`" in text
    assert {path.name for path in Path("out").iterdir()} == {"checkpoint_8.msgpack", "log.jsonl", "run.json"}
    (start,) = json.loads(Path("out/run.json").read_text())["starts"]
    assert start["config"]["optimizer"]["learning_rate"] == 0.02
    assert start["config"]["model"]["factory"].endswith(":Net")
    assert sys.path[0] != str(job.parent)
    status, text = run("inspect", "out")
    assert status == 0
    assert "call         train: 2 epochs of 4 steps, batch size 8\n" in text
    assert "  optimizer.learning_rate: 0.02\n" in text
    assert "latest       checkpoint_8.msgpack, written " in text
    assert "metrics      step 8  loss " in text
    assert run("inspect", "out", "--verify")[1].endswith("verified     checkpoint_8.msgpack\n")
    assert run("plot", "out")[0] == 0


def test_resume_continues_the_run(job):
    assert run("train", job, "--quiet", "num_epochs=1")[0] == 0
    status, text = run("train", job, "--quiet", "--resume")
    assert status == 0
    assert text.startswith("validation after 8 steps")
    events = [start["event"] for start in json.loads(Path("runs/job/run.json").read_text())["starts"]]
    assert events == ["start", "resume"]


def test_progress_is_shown_unless_it_is_quiet(job, capsys):
    assert run("train", job)[0] == 0
    assert "epoch 2/2  step 8/8" in capsys.readouterr().err


def test_overrides_are_yaml_at_dotted_names(job):
    config = config_of(
        job,
        "name=a=b",
        "scheduler.scheduler_type=cosine",
        "model.arguments.width=5",
        "trainer.report=[learning_rate]",
        "gradient_clip_norm=null",
        "tags=[x, y]",
        "seed=3",
    )
    assert config.name == "a=b"
    assert config.scheduler.scheduler_type == "cosine"
    assert config.model.arguments == {"width": 5}
    assert (config.trainer, config.tags, config.seed) == ({"report": ["learning_rate"]}, ("x", "y"), 3)
    assert config_of(job, "model=other:Net").model.factory == "other:Net"
    assert config_of(job).workdir == "runs/job"


def test_overrides_may_come_after_options(job):
    assert run("train", job, "--quiet", "num_epochs=1", "--resume", "seed=1")[1].startswith("validation after 4 steps")


@pytest.mark.parametrize("objective", ["scale: 2.0", ""])
def test_factories_take_their_arguments(job, objective):
    module = config_of(job).model.factory.partition(":")[0]
    arguments = f", arguments: {{{objective}}}" if objective else ""
    job.write_text(
        job.read_text().replace(f"objective: {module}:loss", f"objective: {{factory: '{module}:loss'{arguments}}}")
    )
    with Job.from_file(job, ["model.arguments.width=7", f"model.factory={module}:Family.Small"]).opened() as opened:
        trainer, data, _ = opened
        assert trainer.model.inner.kernel.shape == (2, 7)
        loss = trainer.evaluate(data, 8)["loss"]
    with Job.from_file(job, ["model.arguments.width=7", "objective.arguments={}"]).opened() as (plain, _, _):
        assert loss == pytest.approx(plain.evaluate(data, 8)["loss"] * (2 if objective else 1))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimizer.lerning_rate=1", "`JobConfig.optimizer.lerning_rate` is no field; did you mean 'learning_rate'?"),
        ("optimizer.learning_rate=fast", "`OptimizerConfig.learning_rate` is 'fast' of type str; it must be float."),
        ("num_epoch=1", "`JobConfig.num_epoch` is no field; did you mean 'num_epochs'?"),
        ("num_epochs=1.5", "`JobConfig.num_epochs` is 1.5 of type float; it must be int."),
        ("num_epochs.x=1", "`num_epochs.x` cannot be set: `num_epochs` is 2, no mapping."),
        ("trainer.precison=x", "`JobConfig.trainer.precison` is no field; did you mean 'precision'?"),
        ("seed=-1", "`JobConfig.seed` is -1; it must be at least 0."),
        ("name=[", "the value of `name` is no YAML: while parsing"),
        ("model=Net", "`model` is 'Net'; it must be an import path, `package.module:name`."),
        ("model=NAME:Nett", "has no 'Nett'; did you mean 'Net'?"),
        ("model=NAM:Net", "there is no module `NAM`, neither in "),
        ("model=NAME.sub:Net", "there is no module `NAME.sub`, neither in `NAME`, which is no package nor installed"),
        ("model=NAME:number", "which is of type int; it must be callable."),
        ("model=NAME:data", "`model` is of type tuple"),
        ("model.arguments.with=1", "`model.arguments.with` is no argument of 'NAME:Net'; did you mean 'width'?"),
        ("data=NAME:arrays", "which returned a pair of arrays; it must return (train_data, val_data)"),
        ("data=NAME:Net", "which cannot be called with no arguments: missing a required"),
        ("objective=NAME:number", "`objective` is 'NAME:number', which is of type int; it must be callable."),
        ("mesh.data=3", "`axes` = {'data': 3} needs 3 devices, and there are 8"),
    ],
)
def test_what_cannot_be_used_is_one_line_and_status_1(job, override, message, capsys):
    module = config_of(job).model.factory.partition(":")[0]
    status, text = run("train", job, "--quiet", override.replace("NAME", module))
    error = capsys.readouterr().err
    assert (status, text) == (1, "")
    assert message.replace("NAME", module) in error
    assert error.count("\n") == 1
    assert not Path("runs").exists()


def test_files_that_cannot_be_used(job, tmp_path, capsys):
    assert run("train", "absent.yaml")[0] == 1
    assert "No such file or directory: 'absent.yaml'" in capsys.readouterr().err
    for content, message in (
        ("- 1\n", "holds no mapping of fields"),
        ("a: [", "is no YAML"),
        ("a: 1", "`JobConfig.a` is"),
    ):
        job.write_text(content)
        assert run("train", job)[0] == 1
        assert message in capsys.readouterr().err


def test_an_error_in_the_callers_code_keeps_its_traceback(job):
    module = config_of(job).model.factory.partition(":")[0]
    with pytest.raises(RuntimeError, match="in the caller's code"):
        run("train", job, "--quiet", f"data={module}:fails")
    (job.parent / f"{module}_2.py").write_text("import something_that_is_not_there")
    with pytest.raises(ModuleNotFoundError, match="something_that_is_not_there"):
        run("train", job, "--quiet", f"data={module}_2:data")


@pytest.mark.parametrize("arguments", [["train"], ["train", "a.yaml", "nope"], ["fly"], [], ["plan", "a.yaml", "--x"]])
def test_a_command_line_that_cannot_be_understood_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    assert "usage: trainer" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["", "train", "plan", "plot", "inspect", "convert", "demo"])
def test_help_has_an_example(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*filter(None, [command]), "--help"])
    assert ended.value.code == 0
    assert ("example:\n  trainer " if command else "exit status:\n  0    done") in capsys.readouterr().out


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_a_run_saved_and_with_its_status(job, number, status):
    module = config_of(job).model.factory.partition(":")[0]
    code = f"""
    import os
    from {module} import *

    def signalling(count=32):
        def batches():
            for index in range(6):
                if index == 3:
                    os.kill(os.getpid(), {int(number)})
                yield {{name: rows[:8] for name, rows in data()[0].items()}}
        return batches, None
    """
    (job.parent / f"{module}_s.py").write_text(textwrap.dedent(code))
    command = [sys.executable, "-m", "trainer", "train", str(job), "--quiet", f"data={module}_s:signalling"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == status, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "the state was saved to runs/job/checkpoint_" in last
    assert "Traceback" not in done.stderr


class TestPlan:
    def test_it_prints_memory_and_operations(self, job):
        status, text = run("plan", job, "batch_size=16")
        assert status == 0
        assert text.startswith("a step of 16 examples\non one device\nstate ")
        assert "operations" in text
        assert not Path("runs").exists()

    def test_devices_stand_for_those_of_a_mesh(self, job, capsys):
        status, text = run("plan", job, "--devices", "8", "mesh.data=4", "mesh.fsdp=2")
        assert status == 0
        assert "on each of 8 devices (data 4 x fsdp 2)" in text
        assert "available" not in text
        assert run("plan", job, "--devices", "3")[0] == 1
        assert "`--devices` is 3, but JAX has started with 8" in capsys.readouterr().err
        assert run("plan", job, "--devices", "0")[0] == 1

    def test_a_loader_and_a_schedule_of_the_whole_run(self, job):
        module = config_of(job).model.factory.partition(":")[0]
        assert run("plan", job, f"data={module}:batches", "scheduler.scheduler_type=cosine")[0] == 0


def test_a_job_is_refused_without_its_callables(job):
    job.write_text("optimizer: {optimizer_type: adam, learning_rate: 1e-2}")
    with pytest.raises(ConfigError, match=r"`JobConfig.model` is required. `JobConfig.data` is required."):
        Job.from_file(job)


@pytest.mark.slow
def test_the_example_file_trains(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, text = run("train", ROOT / "examples" / "digits.yaml", "--quiet", "num_epochs=4")
    sys.modules.pop("digits", None)
    assert status == 0
    assert float(text.split("accuracy ")[1].split()[0]) > 0.9
    assert Path("runs/digits/checkpoint_48.msgpack").exists()


def test_the_demo_learns_digits_and_draws_its_curves(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, text = run("demo", "--quiet", "--epochs", "6")
    assert status == 0
    assert float(text.split("accuracy ")[1].split()[0]) > 0.9
    assert "\nloss (log scale)\n" in text
    assert (tmp_path / "runs" / "demo-1" / "run.json").exists()


def test_the_demo_without_scikit_learn_names_the_extra(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert run("demo")[0] == 1
    assert capsys.readouterr().err == "the demo needs scikit-learn: pip install 'nnx-trainer[demo]'\n"


@pytest.mark.parametrize("given", ["workdir=null", "workdir="])
def test_an_empty_directory_of_a_job_is_one_left_out(given, job):
    assert config_of(job, given).workdir == "runs/job"


def test_a_file_that_is_not_utf_8(job, capsys):
    job.write_bytes(b"\xff\xfe\x00")
    assert run("train", job)[0] == 1
    assert "is no YAML: it is not UTF-8" in capsys.readouterr().err


def test_a_module_that_is_not_there_names_each_place_once(job, monkeypatch, capsys):
    monkeypatch.chdir(job.parent)
    assert run("train", job, "model=no_such_module:Net")[0] == 1
    assert capsys.readouterr().err.count(f"`{job.parent}`") == 1
