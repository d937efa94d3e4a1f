"""Processes that are killed at any instant, or end anywhere: the next one goes on to the same bits.

The instants come from a seeded generator; where in the work of a process one falls depends on the
machine, so a failure shows the instants and what was found. ``make kills`` runs the long versions, and a loader with
workers, `ModelCheckpoint` on eight devices, and two runs in one directory.
"""

import contextlib
import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from tests.marks import slow_unless
from trainer import latest_checkpoint
from trainer.checkpoints.file_format import Bundle
from trainer.checkpoints.listing import info_of, names_in
from trainer.checkpoints.orbax_directory import OrbaxDirectory
from trainer.checkpoints.plain_values import unpack

ROOT = Path(__file__).parent.parent

# 102 steps in two epochs, and a state that takes longer to save than a step takes.
KILLED = {"examples": 202, "mebibytes": 8, "keep": 3}
# 30 steps in two epochs, the last of each on two examples; a checkpoint of every step stays.
RESUMED = {"examples": 58, "mebibytes": 0, "save_interval": 1, "keep": 100}


class Process:
    """A process of `tests.child`, and what it has said."""

    def __init__(self):
        self.said = []
        self._child = subprocess.Popen(
            [sys.executable, "-W", "error::UserWarning", "-m", "tests.child"],
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self._timers = []
        self.kill(after=300)  # whatever happens

    def train(self, cache, directory, resume, **arguments):
        """Has it train; returns once it has begun."""
        about = {"cache": str(cache), "directory": str(directory), "resume": resume, **arguments}
        self._child.stdin.write(json.dumps(about) + "\n")
        self._child.stdin.flush()
        for expected in ("ready", "called"):
            self.listen()
            assert self.said[-1:] == [expected], self.end() or self.said

    def listen(self):
        """Waits for the next line, or for the end."""
        self.said += self._child.stdout.readline().splitlines()

    @property
    def steps(self):
        return [int(word) for word in self.said if word.isdigit()]

    def kill(self, after=0.0):
        self._timers.append(threading.Timer(after, self._kill_all))
        self._timers[-1].start()

    def _kill_all(self):
        # Workers of Grain do not notice that their parent was killed, and would live on.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._child.pid, signal.SIGKILL)

    def end(self):
        """Waits for the end, and returns the status."""
        self.said += self._child.stdout.read().splitlines()
        status = self._child.wait()
        for timer in self._timers:
            timer.cancel()
        self._child.stdin.close()
        self._child.stdout.close()
        return status


class Processes:
    """Hands out processes, and has the next one import everything meanwhile."""

    def __init__(self, directory):
        self.cache = directory / "cache"
        self._next = Process()

    def start(self, directory, resume, **arguments):
        process, self._next = self._next, Process()
        process.train(self.cache, directory, resume, **arguments)
        return process

    def close(self):
        self._next.kill()
        self._next.end()


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    made = Processes(tmp_path_factory.mktemp("processes"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def killed_never(processes, tmp_path_factory):
    """Returns what a run of a kind is like at the end, and how long it takes, all and without its start."""

    @functools.cache
    def of(kind):
        for _ in range(2):  # the first one compiles
            directory = tmp_path_factory.mktemp("whole")
            start = time.perf_counter()
            process = processes.start(directory, True, **KILLED, save_interval=3, kind=kind)
            process.listen()
            first = time.perf_counter()
            assert process.end() == 0, process.said
            end = time.perf_counter()
        return contents(directory / "end.msgpack"), best_of(directory), end - start, end - first

    return of


@pytest.fixture(scope="module")
def saved_every_step(processes, tmp_path_factory):
    directory = tmp_path_factory.mktemp("every")
    process = processes.start(directory, True, **RESUMED)
    assert process.end() == 0, process.said
    return directory


@pytest.mark.parametrize("kills", [3, pytest.param(50, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    ("save_interval", "kept"),
    slow_unless(lambda save_interval, kept: save_interval == 3, [(1, (100, 101, 102)), (3, (96, 99, 102))]),
)
def test_whenever_it_is_killed_it_goes_on_to_the_same_bits(
    save_interval, kept, kills, processes, killed_never, tmp_path
):
    names = kill_often(processes, killed_never, tmp_path, kills, save_interval)
    expected = {"end.msgpack", "run.json", *(f"checkpoint_{step}.msgpack" for step in kept)}
    assert all(found == expected for found in names)


@pytest.mark.long
@pytest.mark.parametrize(("kind", "kills"), [("workers", 25), ("best", 10)])
def test_so_it_does_over_workers_of_a_loader_and_with_the_best_on_eight_devices(
    kind, kills, processes, killed_never, tmp_path
):
    kill_often(processes, killed_never, tmp_path, kills, 3, kind=kind)


def kill_often(processes, killed_never, tmp_path, kills, save_interval, kind="in memory"):
    """Kills processes at random instants, so many times; returns the names that each run leaves in its directory."""
    expected, best, whole, stepping = killed_never(kind)
    rng = np.random.default_rng(kills)
    done, in_saves, runs, start = 0, 0, 0, time.perf_counter()
    names = []
    while done < kills:
        runs += 1
        directory = tmp_path / str(runs)
        latest, left = 0, set()
        status = None
        while status != 0:
            process = processes.start(directory, True, **KILLED, save_interval=save_interval, kind=kind)
            # Most instants are counted from the first step, since restoring and compiling take their share.
            from_first_step = rng.random() < 0.75
            delay = rng.uniform(0, stepping if from_first_step else whole)
            if from_first_step:
                process.listen()
            if done < kills:
                process.kill(after=delay)
            status = process.end()
            where = f"kill {done}, run {runs}, after {delay} s: {process.said}"
            assert status in (0, -9), where
            done += status == -9
            previous, latest = latest, look_at(directory, process.steps, save_interval, where)
            assert latest >= previous, where
            was, left = left, debris(directory)
            in_saves += bool(left - was)
            assert latest == previous or not left & was, where
        assert contents(directory / "end.msgpack") == expected, where
        assert best_of(directory) == best, where
        names.append({path.name for path in directory.iterdir() if path.name != "best"})
        shutil.rmtree(directory)
    print(f"{kind}: {kills} kills, {in_saves} of them in a save, {runs} runs, {time.perf_counter() - start:.0f} s")
    assert kind != "in memory" or in_saves >= kills // 25  # elsewhere steps take much longer than saves
    return names


@pytest.mark.long
def test_two_runs_that_are_killed_in_one_directory_lose_nothing_to_each_other(processes, killed_never, tmp_path):
    """What a run leaves stays, whatever the next ones save; of a step that several save, under another name."""
    _, _, whole, _ = killed_never("in memory")
    rng = np.random.default_rng(0)
    left: dict[tuple[str, int], bytes] = {}
    pairs = [(11, 13), (17, 19), (23, 29), (31, 37)]  # of no two, a common multiple is a step; all save the last
    for pair in pairs:
        both = [processes.start(tmp_path, False, **KILLED, save_interval=interval, shares=True) for interval in pair]
        for process in both if pair != pairs[-1] else ():
            process.kill(after=rng.uniform(0, whole))
        for process in both:
            assert process.end() in (0, -9), process.said
        found = checkpoints_of_runs(tmp_path)
        assert found.items() >= left.items(), pair
        left = found
    # The last two were not killed: each has the three that it keeps, the end among them.
    assert {f"checkpoint_{step}.msgpack" for step in (62, 93, 37, 74, 102)} <= names_in(tmp_path).keys()
    assert sum(step == 102 for _, step in left) >= 2
    assert debris(tmp_path) == set()


@pytest.mark.long
def test_runs_of_the_same_steps_that_are_killed_in_one_directory_leave_the_last_of_each(
    processes, killed_never, tmp_path
):
    """Two at once, again and again: all checkpoints have the same names."""
    _, _, whole, _ = killed_never("in memory")
    rng = np.random.default_rng(1)
    last: dict[str, int] = {}
    for turn in range(5):
        both = [processes.start(tmp_path, False, **KILLED, save_interval=3, shares=True) for _ in range(2)]
        for process in both if turn < 4 else ():
            process.kill(after=rng.uniform(whole / 3, whole))
        for process in both:
            assert process.end() in (0, -9), process.said
        found: dict[str, int] = {}
        for run, step in checkpoints_of_runs(tmp_path):
            found[run] = max(step, found.get(run, 0))
        assert found.items() >= last.items(), turn  # the last of every run that has ended
        last = found
    assert list(last.values()).count(102) >= 2
    assert debris(tmp_path) == set()


def checkpoints_of_runs(directory):
    """The bits of every checkpoint by run and step; all of them are whole."""
    found = {}
    for name, step in names_in(directory).items():
        with Bundle(directory / name) as bundle:
            bundle.verify()
        found[info_of(directory / name)["run"], step] = (directory / name).read_bytes()
    return found


@pytest.mark.parametrize(
    "k",
    [1, 15, 22] + [pytest.param(k, marks=pytest.mark.long) for k in range(1, 31) if k not in (1, 15, 22)],
)
@pytest.mark.slow
def test_a_new_process_goes_on_from_every_step(k, processes, saved_every_step, tmp_path):
    checkpoint = saved_every_step / f"checkpoint_{k}.msgpack"
    process = processes.start(tmp_path, str(checkpoint), **RESUMED)
    assert process.end() == 0, process.said
    assert process.said == ["ready", "called", *map(str, range(k + 1, 31)), "finished"]
    assert contents(tmp_path / "end.msgpack") == contents(saved_every_step / "end.msgpack")


def contents(path):
    """Everything in a checkpoint but time and id: the arrays' bits, the history, the record of the run."""
    with Bundle(path) as bundle:
        arrays = {leaf.path: bundle.read(leaf).tobytes() for leaf in bundle.leaves}
        progress = unpack(arrays.pop(("progress",)))
        assert progress["run"].pop("id") == bundle.info["run"]
        return arrays, progress, {name: value for name, value in bundle.info.items() if name not in ("time", "run")}


def best_of(directory):
    """The steps and scores that a `ModelCheckpoint` kept, where there was one."""
    found = {}
    for path in (directory / "best").glob("[0-9]*"):
        with OrbaxDirectory(path) as opened:
            opened.verify()
            found[int(path.name)] = opened.info["score"]
    return found


def debris(directory):
    return {path.name for path in directory.glob(".*.tmp")}


def look_at(directory, steps, save_interval, where):
    """Checks what a process left that has said it did these steps; returns the step of the latest checkpoint."""
    for path in directory.glob("checkpoint_*"):
        with OrbaxDirectory(path) if path.is_dir() else Bundle(path) as opened:
            opened.verify()
    path = latest_checkpoint(directory)
    latest = 0 if path is None else int(path.stem.removeprefix("checkpoint_"))
    # A save begins when the one before is on the disk; the step that was said last may not have come to its own.
    begun = (steps[-1] - 1) // save_interval if steps else 0
    assert latest >= (begun - 1) * save_interval, where
    return latest
