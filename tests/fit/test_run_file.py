"""``run.json``: what it says, when it is written, and that nothing but pictures depends on it."""

import json
import os
import shutil
import subprocess

import jax
import pytest

from tests.problems import Linear, config, regression, squared_error
from trainer import (
    Callback,
    LambdaCallback,
    SchedulerConfig,
    Trainer,
    TrainingInterrupted,
    latest_checkpoint,
    load_run,
)
from trainer.checkpoints.listing import entries_in
from trainer.commands.histories import read_rows
from trainer.fit import run_file, speeds, surroundings
from trainer.fit.surroundings import as_json, git_state, without_secrets


def build(directory, **options):
    settings = options.pop("settings", config(name="mine"))
    return Trainer(Linear(4), settings, loss_fn=squared_error, workdir=directory, **options)


def starts(directory):
    return json.loads((directory / "run.json").read_text())["starts"]


def test_a_start_tells_what_runs_where(tmp_path):
    trainer = build(tmp_path / "new" / "run")
    trainer.train(regression(32), 2, 8)
    (entry,) = starts(tmp_path / "new" / "run")
    assert (entry["event"], entry["run"], entry["name"], entry["step"]) == ("start", trainer.run.id, "mine", 0)
    assert entry["call"]["about"] == "2 epochs of 4 steps, batch size 8"
    assert entry["config"] == trainer.setup.config.to_dict() | {"tags": []}
    assert entry["versions"]["jax"] == jax.__version__
    assert entry["devices"] == {"kind": jax.devices()[0].device_kind, "count": 1, "processes": 1}
    assert entry["parameters"] == 5
    assert "training_config.batch_size" not in entry["arguments"]
    assert "PATH" not in entry
    assert os.environ["PATH"] not in json.dumps(entry)


def test_each_start_and_each_resume_has_an_entry(tmp_path):
    build(tmp_path).train(regression(32), 1, 8)
    build(tmp_path).train(regression(32), 2, 8, resume=True)
    other = build(tmp_path)
    with pytest.warns(UserWarning, match="holds checkpoints up to step 8"):
        other.train(regression(32), 1, 8)
    first, resumed, second = starts(tmp_path)
    assert [entry["event"] for entry in (first, resumed, second)] == ["start", "resume", "start"]
    assert resumed["run"] == first["run"] != second["run"] == other.run.id
    assert (resumed["step"], resumed["resumed_from"]) == (4, str(tmp_path / "checkpoint_4.msgpack"))


def test_consecutive_epochs_are_one_run(tmp_path):
    trainer = build(tmp_path, train_data_loader=[regression(8)] * 3)
    for _ in range(3):
        trainer.train_epoch(resume=True)
    assert len(starts(tmp_path)) == 1


def test_it_is_written_before_the_first_step(tmp_path):
    def interrupt(*arguments, **options):
        raise TrainingInterrupted("now")

    trainer = build(tmp_path, settings=config(log_frequency=1), log_callback=interrupt)
    with pytest.raises(TrainingInterrupted):
        trainer.train(regression(32), 1, 8)
    assert len(starts(tmp_path)) == 1


def test_nothing_is_written_without_a_workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    trainer = Trainer(Linear(4), config(), loss_fn=squared_error, checkpoint_dir=tmp_path / "c")
    trainer.train(regression(32), 1, 8)
    assert not list(tmp_path.rglob("run.json"))


def test_only_the_primary_process_writes(tmp_path, monkeypatch):
    trainer = build(tmp_path)
    monkeypatch.setattr(type(trainer.setup.placement), "is_primary_process", False)
    trainer.train(regression(32), 1, 8)
    assert not (tmp_path / "run.json").exists()


def test_the_latest_entries_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(run_file, "_MAX_STARTS", 2)
    trainer = build(tmp_path)
    for _ in range(4):
        trainer.train(regression(32), 1, 8)
    assert [entry["step"] for entry in starts(tmp_path)] == [8, 12]


@pytest.mark.parametrize("content", [b"{", b"[]", b'{"starts": []}', b"\xff\xfe", b'{"format": "nnx-trainer run 1"}'])
def test_what_another_program_wrote_stays(content, tmp_path):
    (tmp_path / "run.json").write_bytes(content)
    with pytest.warns(UserWarning, match="it is there already, and .* The run itself continues"):
        build(tmp_path).train(regression(32), 1, 8)
    assert (tmp_path / "run.json").read_bytes() == content
    assert latest_checkpoint(tmp_path).name == "checkpoint_4.msgpack"


def test_an_empty_one_is_replaced(tmp_path):
    (tmp_path / "run.json").write_bytes(b"\0" * 10)
    build(tmp_path).train(regression(32), 1, 8)
    assert len(starts(tmp_path)) == 1


def test_a_directory_that_cannot_be_written_is_a_warning(tmp_path):
    (tmp_path / "file").write_text("")
    trainer = build(tmp_path / "file" / "run", checkpoint_dir=tmp_path / "c")
    with pytest.warns(UserWarning, match=r"`.*run.json`, which tells people about this run, could not be written"):
        trainer.train(regression(32), 1, 8)
    assert trainer.step == 4


def test_no_checkpoint_is_taken_for_it_or_pruned_with_it(tmp_path):
    trainer = build(tmp_path, settings=config(max_checkpoints=1), save_interval=2)
    trainer.train(regression(32), 2, 8)
    assert [entry.name for entry in entries_in(tmp_path)] == ["checkpoint_8.msgpack"]
    assert len(starts(tmp_path)) == 1


@pytest.mark.parametrize(
    ("given", "shown"),
    [
        (["--api-key=abc", "--lr=1"], ["--api-key=***", "--lr=1"]),
        (["--token", "abc", "x"], ["--token", "***", "x"]),
        (["--token", "--flag", "x"], ["--token", "--flag", "x"]),
        (["WANDB_API_KEY=abc", "db.password=x=y"], ["WANDB_API_KEY=***", "db.password=***"]),
        (["max_tokens=5", "tokenizer=a", "monkey=b"], ["max_tokens=5", "tokenizer=a", "monkey=b"]),
        (["ghp_0123456789abcdefghij", "sk-0123456789abcdef"], ["***", "***"]),
        (["s3://key:secret@host/x"], ["s3://***@host/x"]),
    ],
)
def test_secrets_are_hidden(given, shown):
    assert without_secrets(given) == shown


def test_values_that_json_lacks_are_texts():
    given = {"a": (1, float("nan")), 2: {"password": "x", "secret": None}, "o": {1}, "path": os.sep}
    assert as_json(given) == {"a": [1, "nan"], "2": {"password": "***", "secret": None}, "o": "{1}", "path": "/"}
    endless = []
    endless.append(endless)
    json.dumps(as_json(endless))


@pytest.fixture
def compiles_at_once(monkeypatch):
    """An epoch of a few steps is spent on compiling, and its speed is left out; here it is not."""
    monkeypatch.setattr(speeds, "_COMPILING", 1.0)


@pytest.mark.usefixtures("compiles_at_once")
class TestSpeeds:
    def speeds(self, directory):
        return json.loads((directory / "run.json").read_text()).get("steps_per_second", {})

    def test_a_call_leaves_the_speed_of_each_epoch(self, tmp_path):
        trainer = build(tmp_path)
        trainer.train(regression(32), 3, 8)
        ((run, found),) = self.speeds(tmp_path).items()
        assert run == trainer.run.id
        assert [step for step, _ in found] == [4, 8, 12]
        assert found[-1][1] == trainer.throughput.steps_per_second
        assert run_file.read_figures(tmp_path / "run.json", run) == trainer.history.figures
        assert len(starts(tmp_path)) == 1

    def test_a_resumed_run_continues_them_and_its_checkpoint_does_not_hold_them(self, tmp_path):
        build(tmp_path / "a").train(regression(32), 4, 8)
        build(tmp_path / "b", save_interval=4).train(regression(32), 3, 8)
        (tmp_path / "b" / "checkpoint_12.msgpack").unlink()
        resumed = build(tmp_path / "b")
        resumed.train(regression(32), 4, 8, resume=True)
        (found,) = self.speeds(tmp_path / "b").values()
        assert [step for step, _ in found] == [4, 8, 12, 16]
        assert resumed.history.figures.get("steps_per_second", ()) == tuple(map(tuple, found[2:]))
        whole, again = (load_run(tmp_path / name / "checkpoint_16.msgpack", resumed.run) for name in "ab")
        assert list(whole.history) == list(again.history)
        assert whole.history.packed() == again.history.packed()
        assert again.history.figures.get("steps_per_second", ()) == ()

    def test_those_of_an_interrupted_call_are_there(self, tmp_path):
        def interrupt(step, metrics, prefix):
            if step == 10:
                raise TrainingInterrupted("now")

        trainer = build(tmp_path, settings=config(log_frequency=1), log_callback=interrupt, steps_per_call=1)
        with pytest.raises(TrainingInterrupted):
            trainer.train(regression(32), 5, 8)
        (found,) = self.speeds(tmp_path).values()
        assert [step for step, _ in found] == [4, 8]

    def test_so_does_the_learning_rate(self, tmp_path, monkeypatch):
        monkeypatch.setattr(speeds, "_RATE_EVERY", 0.0)
        settings = config(scheduler=SchedulerConfig(scheduler_type="cosine", total_steps=16))

        def train(*callbacks, **options):
            trainer = build(tmp_path, settings=settings, save_interval=6, steps_per_call=1, callbacks=list(callbacks))
            trainer.train(regression(32), 4, 8, **options)
            return trainer

        def interrupt(trainer, step, logs):
            if step == 11:
                raise TrainingInterrupted("now")

        with pytest.raises(TrainingInterrupted):
            train(LambdaCallback(on_call_end=interrupt))
        resumed = train(resume=True)
        found = run_file.read_figures(tmp_path / "run.json", resumed.run.id)
        assert [step for step, _ in found["learning_rate"]] == [4, 8, 12, 16]
        assert [rate for _, rate in found["learning_rate"]] == sorted(
            (r for _, r in found["learning_rate"]), reverse=True
        )
        assert resumed.history.figures["learning_rate"] == found["learning_rate"][1:]
        rows = read_rows(tmp_path)
        assert (
            tuple((row["step"], row["learning_rate"]) for row in rows if "learning_rate" in row)
            == found["learning_rate"]
        )

    def test_each_run_of_a_directory_has_its_own(self, tmp_path):
        trainer = build(tmp_path)
        trainer.train(regression(32), 1, 8)
        other = build(tmp_path)
        with pytest.warns(UserWarning, match="holds checkpoints up to step 4"):
            other.train(regression(32), 2, 8)
        found = {run: [step for step, _ in speeds] for run, speeds in self.speeds(tmp_path).items()}
        assert found == {trainer.run.id: [4], other.run.id: [4, 8]}

    def test_an_epoch_that_is_spent_on_compiling_has_none(self, tmp_path, monkeypatch):
        monkeypatch.setattr(speeds, "_COMPILING", 0.1)
        trainer = build(tmp_path)
        trainer.train(regression(32), 3, 8)
        assert [step for step, _ in trainer.history.figures.get("steps_per_second", ())] == [8, 12]

    def test_within_a_long_call_they_are_written_every_few_seconds(self, tmp_path, monkeypatch):
        now = [0.0]
        monkeypatch.setattr(speeds.time, "monotonic", lambda: now[0])
        seen = []

        class Look(Callback):
            def on_epoch_end(self, trainer, epoch, logs):
                now[0] += 2.0
                seen.append([step for found in TestSpeeds().speeds(tmp_path).values() for step, _ in found])

        build(tmp_path, callbacks=[Look()]).train(regression(32), 5, 8)
        assert seen == [[], [], [], [4, 8, 12], [4, 8, 12]]  # not the epoch that is still being computed
        assert len(next(iter(self.speeds(tmp_path).values()))) == 5

    def test_a_file_that_is_gone_or_is_another_programs_is_left_alone(self, tmp_path):
        trainer = build(tmp_path)
        trainer.train(regression(32), 1, 8)
        (tmp_path / "run.json").unlink()
        run_file.write_figures(trainer.setup, trainer.run)
        assert not (tmp_path / "run.json").exists()
        (tmp_path / "run.json").write_text("[]")
        run_file.write_figures(trainer.setup, trainer.run)
        assert (tmp_path / "run.json").read_text() == "[]"

    @pytest.mark.parametrize("wrong", [3, [], {"a": 1}, {"a": [[1]]}, {"a": [["x", 1.0]]}, {"a": [[1, None]]}])
    def test_speeds_that_cannot_be_understood_count_as_none(self, wrong, tmp_path):
        content = {"format": run_file.FORMAT, "starts": [{"run": "a"}], "steps_per_second": wrong}
        (tmp_path / "run.json").write_text(json.dumps(content))
        assert run_file.read_figures(tmp_path / "run.json", "a") == {}
        assert run_file.read_starts(tmp_path / "run.json") == [{"run": "a"}]


class TestGit:
    @pytest.fixture
    def repository(self, tmp_path):
        if shutil.which("git") is None:
            pytest.fail("the tests need git")
        who = ["-c", "user.name=x", "-c", "user.email=x@y", "-c", "commit.gpgsign=false"]
        (tmp_path / "sub").mkdir()
        (tmp_path / "sub" / "a").write_text("1")
        for command in (["init", "-q", "-b", "main"], ["add", "."], [*who, "commit", "-q", "-m", "one"]):
            subprocess.run(["git", *command], cwd=tmp_path, check=True)
        git_state.cache_clear()
        return tmp_path

    def test_commit_and_changes(self, repository):
        found = dict(git_state(str(repository / "sub")))
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=repository, check=True, capture_output=True, text=True)
        assert found == {"commit": head.stdout.strip(), "branch": "main", "is_dirty": False}
        (repository / "sub" / "a").write_text("2")
        git_state.cache_clear()
        assert dict(git_state(str(repository)))["is_dirty"]

    def test_no_program_of_the_repository_is_run(self, repository):
        script = repository / "monitor"
        script.write_text(f"#!/bin/sh\ntouch {repository}/ran\n")
        script.chmod(0o755)
        subprocess.run(["git", "config", "core.fsmonitor", str(script)], cwd=repository, check=True)
        assert "commit" in dict(git_state(str(repository)))
        assert not (repository / "ran").exists()

    def test_without_git_or_a_commit_or_in_time(self, repository, tmp_path, monkeypatch):
        def slow(*arguments, timeout, **options):
            raise subprocess.TimeoutExpired("git", timeout)

        with monkeypatch.context() as patch:
            patch.setattr(surroundings.subprocess, "run", slow)
            assert git_state(str(repository)) == ()
        with monkeypatch.context() as patch:
            patch.setenv("PATH", "")
            git_state.cache_clear()
            assert git_state(str(repository)) == ()
        shutil.rmtree(repository / ".git")
        (repository / ".git").mkdir()
        git_state.cache_clear()
        assert git_state(str(repository)) == ()

    def test_git_is_not_run_without_a_repository(self, tmp_path, monkeypatch):
        monkeypatch.setattr(surroundings.subprocess, "run", None)
        git_state.cache_clear()
        assert git_state(str(tmp_path)) == ()
