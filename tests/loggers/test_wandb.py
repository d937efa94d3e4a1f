"""`WandbLogger`, with a stand-in for the package; `third_party/test_loggers.py` has the package itself."""

import sys
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from trainer import ArgumentError, ArgumentTypeError, WandbLogger


class FakeRun:
    def __init__(self):
        self.calls, self.axes, self.id = [], {}, "1a2b"
        self.config = SimpleNamespace(update=lambda params, **how: self.calls.append(("config", params, how)))

    def define_metric(self, name, step_metric=None):
        self.axes[name] = step_metric

    def log(self, row):
        self.calls.append(("log", row))

    def log_artifact(self, artifact, aliases):
        self.calls.append(("artifact", artifact, aliases))

    def finish(self):
        self.calls.append(("finish",))


class FakeArtifact:
    def __init__(self, name, **about):
        self.name, self.about, self.files = name, about, []

    def add_file(self, path):
        self.files.append(("file", path))

    def add_dir(self, path):
        self.files.append(("directory", path))


@pytest.fixture
def wandb(monkeypatch):
    run = FakeRun()
    fake = SimpleNamespace(
        run=run,
        started=[],
        Image=lambda pixels: ("image", pixels),
        Histogram=lambda np_histogram: ("histogram", np_histogram),
        Artifact=FakeArtifact,
    )
    fake.init = lambda **how: fake.started.append(how) or run
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def test_it_gets_every_event(wandb):
    logger = WandbLogger(project="project", name="name")
    logger.log_scalar("loss", 1.0, 3)
    logger.log_scalars({"a": 1.0, "b": 2.0})
    logger.log_text("note", "text", 4)
    logger.log_hyperparams({"rate": 1e-3})
    logger.log_checkpoint("not asked for", 4)
    logger.close()
    # Its own step must never go back, and a resumed run does: ours is a metric.
    assert wandb.run.axes == {"step": None, "*": "step"}
    assert wandb.run.calls == [
        ("log", {"loss": 1.0, "step": 3}),
        ("log", {"a": 1.0, "b": 2.0}),
        ("log", {"note": "text", "step": 4}),
        ("config", {"rate": 1e-3}, {"allow_val_change": True}),
        ("finish",),
    ]


class CommError(Exception):
    """As wandb calls it; it knows a server that does not answer by the text alone."""


class AuthenticationError(CommError):
    pass


def failing(wandb, error):
    def init(mode, **how):
        if mode != "offline":
            raise error
        assert wandb.ended
        wandb.started.append({"mode": mode, **how})
        return offline

    offline, wandb.run, wandb.ended = wandb.run, None, []
    wandb.init, wandb.teardown = init, lambda: wandb.ended.append(True)
    return offline


@pytest.mark.parametrize("why", ["Timed out initializing run.", "context deadline exceeded", "x: connection refused"])
def test_a_server_that_does_not_answer_costs_a_warning_and_the_run_is_offline(wandb, tmp_path, why):
    run = failing(wandb, CommError(why))
    with pytest.warns(UserWarning, match=f"could not start a run at the server: {why} .* kept offline, .*wandb sync"):
        logger = WandbLogger(tmp_path, project="p", mode="online", id="1a2b")
    ((about),) = wandb.started
    assert about == {"mode": "offline", "dir": str(tmp_path), "project": "p", "name": None, "entity": None} | {
        "tags": None,
        "resume": "allow",
        "id": "1a2b",
    }
    logger.log_scalar("loss", 1.0, 1)
    assert run.calls == [("log", {"loss": 1.0, "step": 1})]


def test_beside_another_run_of_the_process_it_is_an_error(wandb):
    wandb.run = failing(wandb, CommError("Timed out initializing run."))
    with pytest.raises(CommError):
        WandbLogger(project="p")
    assert wandb.ended == []


@pytest.mark.parametrize(
    ("error", "how"),
    [
        (CommError("entity no-such-team not found"), {}),
        (AuthenticationError("the key timed out"), {}),
        (ValueError("timed out"), {}),
        (CommError("Timed out initializing run"), {"resume": "must", "id": "1a2b"}),
    ],
)
def test_a_server_that_refuses_is_an_error(wandb, error, how):
    failing(wandb, error)
    with pytest.raises(type(error), match=str(error)):
        WandbLogger(project="p", **how)
    assert wandb.started == []


def test_it_is_started_as_asked(wandb, tmp_path):
    about = {"project": "p", "name": "n", "entity": "team", "tags": ["a", "b"], "mode": "offline"}
    WandbLogger(tmp_path / "new", **about, resume="must", id="1a2b")
    WandbLogger(tags="one", id="1a2b")
    WandbLogger(name="")
    nothing = dict.fromkeys(("dir", "project", "name", "entity", "tags", "mode", "resume", "id"))
    assert wandb.started == [
        {"dir": str(tmp_path / "new"), **about, "resume": "must", "id": "1a2b"},
        {**nothing, "tags": ["one"], "resume": "allow", "id": "1a2b"},
        nothing,
    ]
    assert (tmp_path / "new").is_dir()


def test_it_gets_arrays_of_the_host(wandb):
    logger = WandbLogger()
    logger.log_image("x", jnp.asarray([[0.0, 1.0], [0.2, 0.4]]), 5)
    logger.log_histogram("h", jnp.asarray([0.0, 1.0, 3.0, jnp.nan]), 5)
    (_, image), (_, histogram) = wandb.run.calls
    assert image["step"] == histogram["step"] == 5
    kind, pixels = image["x"]
    assert (kind, type(pixels)) == ("image", np.ndarray)
    np.testing.assert_array_equal(pixels, np.array([[0, 255], [51, 102]], np.uint8))
    kind, (counts, edges) = histogram["h"]
    assert (kind, sum(counts), edges[0], edges[-1], histogram["h/not_finite"]) == ("histogram", 3, 0.0, 3.0, 1)


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_checkpoints_are_artifacts_where_asked_for(wandb, tmp_path, kind):
    path = tmp_path / "checkpoint_7"
    path.mkdir() if kind == "directory" else path.touch()
    WandbLogger(log_checkpoints=True).log_checkpoint(path, 7)
    ((_, artifact, aliases),) = wandb.run.calls
    assert (artifact.name, artifact.about) == ("checkpoint-1a2b", {"type": "model", "metadata": {"step": 7}})
    assert (artifact.files, aliases) == ([(kind, str(path))], ["latest", "step-7"])


def test_a_missing_package_says_how_to_get_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ArgumentError) as caught:
        WandbLogger()
    assert str(caught.value).startswith("WandbLogger needs wandb, which cannot be imported (")
    assert str(caught.value).endswith("); run `pip install 'nnx-trainer[wandb]'`.")


@pytest.mark.parametrize(
    ("how", "error", "text"),
    [
        (
            {"mode": "ofline"},
            ArgumentError,
            "`mode` is 'ofline'; it must be 'online', 'offline', 'shared' or 'disabled'",
        ),
        ({"resume": "yes"}, ArgumentError, "`resume` is 'yes'; it must be 'allow', 'must', 'never' or 'auto'"),
        ({"directory": 3}, ArgumentTypeError, "`directory` of WandbLogger is of type int; it must be a path"),
        ({"directory": __file__}, ArgumentError, "`directory` of WandbLogger is `.*`, which is a file"),
    ],
)
def test_bad_input_is_refused_by_name(wandb, how, error, text):
    with pytest.raises(error, match=text):
        WandbLogger(**how)
    assert wandb.started == []
