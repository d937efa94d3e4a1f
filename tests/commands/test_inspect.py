"""The command: what it prints, and how it ends."""

import io
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import trainer
from tests.problems import Linear, config, regression, squared_error
from trainer import Trainer, TrainState, save_state
from trainer.checkpoints.file_format import Leaf, write_bundle
from trainer.commands.main import main
from trainer.commands.text import human_size, shown


@pytest.fixture
def checkpoint(tmp_path):
    state = TrainState.create(Linear(), optax.sgd(0.1), rng=jax.random.key(0))
    info = {"time": "then", "versions": {}, "metrics": {"loss": 0.5}}
    return save_state(tmp_path / "s.msgpack", state, info)


def run(*arguments):
    out = io.StringIO()
    return main([str(argument) for argument in arguments], out), out.getvalue()


def test_inspect_prints_information_and_the_tree(checkpoint):
    status, printed = run("inspect", checkpoint)
    assert status == 0
    assert printed == (
        "step      0\n"
        "time      then\n"
        "versions  {}\n"
        'metrics   {"loss": 0.5}\n'
        "\n"
        "params\n"
        "  layer\n"
        "    bias  (1,) float32  4 B\n"
        "    kernel  (3, 1) float32  12 B\n"
        "rng  (2,) key<threefry2x32>  8 B\n"
        "step  () int32  4 B\n"
        "\n"
        "4 arrays, 28 B\n"
    )


def test_verify_says_that_all_is_well_or_what_is_not(checkpoint, capsys):
    assert run("inspect", checkpoint, "--verify")[1].endswith("every checksum agrees\n")
    damaged = bytearray(checkpoint.read_bytes())
    damaged[-60] ^= 1
    checkpoint.write_bytes(damaged)
    assert run("inspect", checkpoint, "--verify")[0] == 1
    assert "is damaged" in capsys.readouterr().err


def test_it_runs_as_a_module(tmp_path):
    command = [sys.executable, "-m", "trainer", "inspect", str(tmp_path / "absent")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "could not be read: [Errno 2]" in done.stderr


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**30, "3.0 GiB"), (2**52, "4096.0 TiB")]
)
def test_sizes_are_readable(size, text):
    assert human_size(size) == text


def test_a_directory_is_inspected_like_a_file(checkpoint, tmp_path):
    assert run("convert", checkpoint, tmp_path / "s.orbax") == (0, "")
    status, printed = run("inspect", tmp_path / "s.orbax", "--verify")
    assert status == 0
    assert printed == run("inspect", checkpoint, "--verify")[1]


def test_inspect_of_deep_names_and_of_keys_that_json_lacks(tmp_path):
    path = tmp_path / "a"
    leaf = Leaf(tuple("x" * 128), "int8", (1,))
    write_bundle(path, {"classes": {0: "cat", (1, 2): "dog"}}, [(leaf, lambda: np.zeros(1, np.int8))])
    status, printed = run("inspect", path)
    assert status == 0
    assert 'classes   {"$pairs": [[0, "cat"], [{"$tuple": [1, 2]}, "dog"]]}' in printed
    assert len(printed) < 40_000


@pytest.mark.parametrize("name", ["w.safetensors", "w.npz"])
def test_what_convert_writes_and_reads_is_inspected(name, checkpoint, tmp_path, capsys):
    assert run("convert", checkpoint, tmp_path / name)[0] == 0
    assert f"{name}` cannot hold and left out: rng, step" in capsys.readouterr().err
    status, printed = run("inspect", tmp_path / name)
    assert status == 0
    assert "    kernel  (3, 1) float32  12 B\n" in printed
    assert printed.endswith("2 arrays, 16 B\n")
    assert run("convert", tmp_path / name, tmp_path / "back.msgpack") == (0, "")
    assert run("inspect", tmp_path / name, "--verify")[0] == 1
    assert "has no checksums" in capsys.readouterr().err


class TestRunDirectory:
    @pytest.fixture
    def directory(self, checkpoint, tmp_path):
        entry = {
            "event": "start",
            "run": "abc",
            "name": "ni\x1bce",
            "time": "2026-01-01",
            "step": 0,
            "call": {"method": "train", "about": "2 epochs"},
            "command": ["train.py", "--x"],
            "git": {"commit": "f00", "is_dirty": True},
            "config": {"optimizer": {"learning_rate": 0.1, "beta1": None}, "tags": []},
        }
        resumed = {**entry, "event": "resume", "step": 3, "resumed_from": "/x/checkpoint_3.msgpack"}
        text = json.dumps({"format": "nnx-trainer run 1", "starts": [entry, resumed]})
        (tmp_path / "run.json").write_text(text)
        checkpoint.rename(tmp_path / "checkpoint_0.msgpack")
        return tmp_path

    def test_it_is_summed_up(self, directory):
        status, printed = run("inspect", directory)
        assert status == 0
        assert [
            line for line in printed.splitlines() if not line.startswith(("versions", "devices", "parameters"))
        ] == [
            "run          abc ni\\x1bce",
            "start        2026-01-01 at step 0",
            "resume       2026-01-01 at step 3 from checkpoint_3.msgpack",
            "call         train: 2 epochs",
            "command      train.py --x",
            "directory    ",
            "code         f00, with changes that are not committed",
            "configuration",
            "  optimizer.learning_rate: 0.1",
            f"checkpoints  1, {human_size((directory / 'checkpoint_0.msgpack').stat().st_size)}",
            "latest       checkpoint_0.msgpack, written then",
            "metrics      loss 0.5",
        ]

    def test_a_damaged_checkpoint_is_said(self, directory):
        (directory / "checkpoint_5.msgpack").write_bytes(b"no")
        status, printed = run("inspect", directory)
        assert status == 0
        assert "checkpoint_5.msgpack" in printed
        assert "latest       checkpoint_0.msgpack" in printed
        assert run("inspect", directory, "--verify")[0] == 1

    @pytest.mark.parametrize("content", ["{", '{"format": 1}', '{"format": "nnx-trainer run 1", "starts": [{}]}'])
    def test_any_run_file_leaves_the_checkpoints_shown(self, directory, content):
        (directory / "run.json").write_text(content)
        status, printed = run("inspect", directory)
        assert status == 0
        assert "latest       checkpoint_0.msgpack" in printed

    def test_an_empty_directory_is_no_checkpoint(self, tmp_path, capsys):
        assert run("inspect", tmp_path)[0] == 1
        assert str(tmp_path) in capsys.readouterr().err


def test_the_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"nnx-trainer {trainer.__version__}\n"


def test_control_characters_are_shown_escaped(tmp_path, capsys):
    leaf = Leaf(("params", "a\x1b[31mb\n", "ü"), "int8", (1,))
    write_bundle(tmp_path / "a", {"note": "\x1b]0;title\x07", "n\rm": 1}, [(leaf, lambda: np.zeros(1, np.int8))])
    _, printed = run("inspect", tmp_path / "a")
    assert "  a\\x1b[31mb\\n\n    ü  (1,) int8  1 B\n" in printed
    assert "note      \\x1b]0;title\\x07\n" in printed
    assert all(line.isprintable() for line in printed.splitlines())
    assert run("inspect", tmp_path / "b\x1b[2J")[0] == 1
    assert "b\\x1b[2J" in capsys.readouterr().err


@pytest.mark.slow
def test_a_broken_pipe_is_quiet(tmp_path):
    leaves = [(Leaf(("params", "x" * 100, i), "int8", (1,)), lambda: np.zeros(1, np.int8)) for i in range(20_000)]
    write_bundle(tmp_path / "a", {}, leaves)
    command = [sys.executable, "-m", "trainer", "inspect", str(tmp_path / "a")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() == 141


def test_a_terminal_that_lacks_letters_gets_escapes(tmp_path):
    leaf = Leaf(("params", "größe"), "int8", (1,))
    write_bundle(tmp_path / "a", {}, [(leaf, lambda: np.zeros(1, np.int8))])
    command = [sys.executable, "-m", "trainer", "inspect", str(tmp_path / "a")]
    done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"gr\\xf6\\xdfe  (1,) int8" in done.stdout


def test_arrays_are_printed_as_lists():
    assert shown({"weights": np.arange(2.0), "more": [(np.ones(1, int),)]}) == (
        '{"weights": [0.0, 1.0], "more": [{"$tuple": [[1]]}]}'
    )


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([[1 + 2j], [-0.5j]], np.complex64), '[["(1+2j)"], ["(-0-0.5j)"]]'),
        (np.array([1], np.complex128), '["(1+0j)"]'),
        (np.array([90, "NaT"], "m8[s]"), '["90 seconds", "NaT"]'),
        (np.array(["2026-11-02T01:02:03.000000004"], "M8[ns]"), '["2026-11-02T01:02:03.000000004"]'),
        (np.ones(2, jnp.bfloat16), "[1.0, 1.0]"),
        (np.array([b"a"]), '[{"$bytes": "YQ=="}]'),
    ],
)
def test_arrays_of_every_kind_that_a_checkpoint_holds_are_printed(array, expected, tmp_path):
    state = TrainState.create(Linear(), optax.sgd(0.1), rng=jax.random.key(0))
    status, printed = run("inspect", save_state(tmp_path / "s.msgpack", state, {"metrics": {"loss": array}}))
    assert status == 0
    assert f'{{"loss": {expected}}}' in printed


def test_a_run_directory_is_converted_by_its_newest_checkpoint(tmp_path):
    trainer = Trainer(Linear(4), config(), loss_fn=squared_error, workdir=tmp_path / "run", progress=False)
    trainer.train(regression(16), 1, 8)
    for source, target in (("run", "a.npz"), ("run/checkpoint_2.msgpack", "b.npz")):
        assert run("convert", tmp_path / source, tmp_path / target)[0] == 0
    one, two = (np.load(tmp_path / name) for name in ("a.npz", "b.npz"))
    assert one.files == two.files
    np.testing.assert_array_equal(one[one.files[0]], two[one.files[0]])


@pytest.mark.parametrize(("name", "what"), [("a.txt", "since it has no `about`"), (None, "since it is empty")])
def test_a_directory_without_a_checkpoint_says_so(name, what, tmp_path, capsys):
    if name is not None:
        (tmp_path / name).touch()
    assert run("inspect", tmp_path)[0] == 1
    assert what in capsys.readouterr().err
