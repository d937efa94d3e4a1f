"""Loggers against the real packages, offline, and each file read back by what its readers use.

`make third-party` installs the packages and runs these; no other target does.
"""

import http.server
import json
import re
import threading
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest

from tests.problems import Linear, config, regression, squared_error
from trainer import MLflowLogger, TensorBoardLogger, Trainer, WandbLogger

pytestmark = [
    pytest.mark.third_party,
    # They warn of their own, and of each other's, deprecations.
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("error::UserWarning:tests"),
]

GREY = np.array([[0.0, 1.0], [0.2, 0.4]])
PIXELS = np.array([[0, 255], [51, 102]], np.uint8)
PARAMS = {"rate": 1e-3, "optimizer": {"name": "adam", "nesterov": True}, "none": None}
DATA = regression(40)


def log_everything(logger):
    logger.log_hyperparams(PARAMS)
    for step in (1, 2, 3):
        logger.log_scalars({"train/loss": 1 / step, "train/error": step}, step)
    logger.log_scalars({"val/loss": np.nan}, 3)
    logger.log_text("note", "hello *ä*", 3)
    logger.log_image("samples", np.stack([GREY] * 3, axis=-1), 3)
    logger.log_image("grey", GREY, 3)
    logger.log_histogram("weights", np.array([0.0, 1.0, 3.0, np.inf]), 3)


def train(logger, num_epochs=2, **how):
    trainer = Trainer(Linear(4), config(log_frequency=3), loss_fn=squared_error, logger=logger, **how)
    trainer.train(DATA, num_epochs, 4, regression(8), resume="workdir" in how)
    trainer.close()
    return trainer


class TestTensorBoard:
    def read(self, directory):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(directory), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
        return events.Reload()

    def scalars(self, directory, name):
        return [(event.step, event.value) for event in self.read(directory).Scalars(name)]

    def test_the_official_reader_finds_everything(self, tmp_path):
        from tensorboard.plugins.hparams import plugin_data_pb2

        logger = TensorBoardLogger(tmp_path)
        log_everything(logger)
        logger.close()
        events = self.read(tmp_path)
        tags = events.Tags()
        assert set(tags["scalars"]) == {"train/loss", "train/error", "val/loss", "weights/not_finite"}
        assert [(event.step, event.value) for event in events.Scalars("train/error")] == [(1, 1), (2, 2), (3, 3)]
        assert np.isnan(events.Scalars("val/loss")[0].value)
        assert abs(events.Scalars("train/loss")[0].wall_time - time.time()) < 600
        assert set(tags["images"]) == {"samples", "grey"}
        for name in ("samples", "grey"):
            (image,) = events.Images(name)
            path = tmp_path / f"{name}.png"
            path.write_bytes(image.encoded_image_string)
            with PIL.Image.open(path) as opened:
                assert image.step == 3
                np.testing.assert_array_equal(np.asarray(opened.convert("L")), PIXELS)
        (histogram,) = (event.histogram_value for event in events.Histograms("weights"))
        assert (histogram.min, histogram.max, histogram.num, histogram.sum) == (0, 3, 3, 4)
        assert (sum(histogram.bucket), histogram.bucket_limit[0], histogram.bucket_limit[-1]) == (3, 0, 3)
        (text,) = events.Tensors("note/text_summary")
        assert (text.step, text.tensor_proto.string_val[0].decode()) == (3, "hello *ä*")
        assert events.SummaryMetadata("note/text_summary").plugin_data.plugin_name == "text"
        content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
        held = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
        assert held["rate"].number_value == 1e-3
        assert (held["optimizer/name"].string_value, held["optimizer/nesterov"].bool_value) == ("adam", True)

    def test_a_histogram_without_a_finite_entry_is_a_count(self, tmp_path):
        logger = TensorBoardLogger(tmp_path)
        logger.log_histogram("w", [np.nan, np.nan], 1)
        logger.close()
        assert self.scalars(tmp_path, "w/not_finite") == [(1, 2.0)]
        assert self.read(tmp_path).Tags()["histograms"] == []

    def test_what_comes_after_half_an_event_is_read(self, tmp_path):
        logger = TensorBoardLogger(tmp_path)
        logger.log_scalar("loss", 1.0, 1)
        record = logger._writer._py_recordio_writer._writer

        class Full:
            def __getattr__(self, name):
                return getattr(record, name)

            def write(self, data):
                record.write(data[:3])
                raise OSError("No space left on device")

        logger._writer._py_recordio_writer._writer = Full()
        with pytest.raises(OSError, match="No space left"):
            logger.log_scalar("loss", 2.0, 2)
        logger.log_scalar("loss", 3.0, 3)
        logger.close()
        assert sorted(self.scalars(path, "loss") for path in tmp_path.iterdir()) == [[(1, 1.0)], [(3, 3.0)]]

    def test_a_run(self, tmp_path):
        logger = TensorBoardLogger(tmp_path)
        trainer = train(logger)
        logger.close()
        losses = dict(zip(*trainer.history.series("loss"), strict=True))
        read = self.scalars(tmp_path, "train/loss")
        assert [step for step, _ in read] == [1, 3, 6, 9, 12, 15, 18, 20]
        np.testing.assert_allclose([value for _, value in read], [losses[step] for step, _ in read], rtol=1e-6)
        assert [step for step, _ in self.scalars(tmp_path, "epoch/loss")] == [10, 20]
        assert [step for step, _ in self.scalars(tmp_path, "val/loss")] == [10, 20]

    def test_a_resumed_run_holds_each_step_once(self, tmp_path):
        """Also where both processes begin in the same second."""
        first = TensorBoardLogger(tmp_path / "log")
        train(first, workdir=tmp_path / "run", save_interval=10)
        first.close()
        for path in (tmp_path / "run").glob("*20*"):
            path.unlink()
        again = TensorBoardLogger(tmp_path / "log")
        train(again, workdir=tmp_path / "run", save_interval=10)
        again.close()
        steps = [step for step, _ in self.scalars(tmp_path / "log", "train/loss")]
        assert steps == [1, 3, 6, 9, 12, 15, 18, 20]
        # The end of the epoch came after the checkpoint, and comes again: with the same number.
        averages = self.scalars(tmp_path / "log", "epoch/loss")
        assert [step for step, _ in dict.fromkeys(averages)] == [10, 20]


class TestWandb:
    @pytest.fixture(autouse=True)
    def quiet(self, monkeypatch, tmp_path):
        monkeypatch.setenv("WANDB_SILENT", "true")
        monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "config"))
        monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "data"))

    def start(self, directory, **how):
        return WandbLogger(directory, project="flows", mode="offline", **how)

    def records(self, directory):
        """Reads the file of an offline run, whose process may finish a little later than the call that ends it."""
        (path,) = directory.glob("wandb/offline-run-*/run-*.wandb")
        for _ in range(600):
            found = list(self.parsed(path.read_bytes()))
            if found and found[-1].HasField("exit"):
                break
            time.sleep(0.05)
        return found

    def parsed(self, data):
        """Yields the entries of a file in the log format of LevelDB, which are protocol buffers."""
        from wandb.proto import wandb_internal_pb2

        at, entry = 7, b""
        while at < len(data):
            left = 32768 - at % 32768
            if left < 7:
                at += left
                continue
            length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            entry += data[at + 7 : at + 7 + length]
            at += 7 + length
            if kind in (1, 4):  # a whole entry, or its last part
                yield wandb_internal_pb2.Record.FromString(entry)
                entry = b""

    def rows(self, directory):
        for record in self.records(directory):
            if record.WhichOneof("record_type") == "history":
                row = {}
                for item in record.history.item:
                    row[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
                yield row

    def config(self, directory):
        """Returns the configuration of an offline run, of which each record changes some entries."""
        held = {}
        for record in self.records(directory):
            about = {"config": record.config, "run": record.run.config}.get(record.WhichOneof("record_type"))
            for item in () if about is None else about.update:
                held[item.key or "/".join(item.nested_key)] = json.loads(item.value_json)
        return held

    def test_an_offline_run_holds_everything(self, tmp_path):
        logger = self.start(tmp_path, name="mine", entity="team", tags=["a"], id="abc123")
        log_everything(logger)
        logger.close()
        rows = list(self.rows(tmp_path))
        assert [row["step"] for row in rows] == [1, 2, 3, 3, 3, 3, 3, 3]
        assert [row["train/error"] for row in rows if "train/error" in row] == [1, 2, 3]
        text = next(row["note"] for row in rows if "note" in row)
        assert text == "hello *ä*"
        merged = {name: value for row in rows for name, value in row.items()}
        assert merged["weights/not_finite"] == 1
        (run,) = [record.run for record in self.records(tmp_path) if record.WhichOneof("record_type") == "run"][:1]
        assert (run.project, run.display_name, run.entity, run.run_id, list(run.tags)) == (
            "flows",
            "mine",
            "team",
            "abc123",
            ["a"],
        )
        kind, counts, edges = (merged[f"weights/{part}"] for part in ("_type", "values", "bins"))
        assert kind == "histogram"
        assert (sum(counts), counts[0], counts[-1], len(edges) - len(counts)) == (3, 1, 1, 1)
        assert (edges[0], edges[-1]) == (0, 3)
        held = self.config(tmp_path)
        assert {name: held[name] for name in PARAMS} == PARAMS
        images = sorted(tmp_path.glob("wandb/offline-run-*/files/media/images/*.png"))
        assert [re.match(r"[a-z]+", image.name)[0] for image in images] == ["grey", "samples"]
        with PIL.Image.open(images[0]) as opened:
            np.testing.assert_array_equal(np.asarray(opened.convert("L")), PIXELS)

    def test_a_run_and_its_resumption(self, tmp_path):
        """A row of an earlier step is kept: the step is a metric."""
        logger = self.start(tmp_path, id="abc123")
        train(logger)
        logger.log_hyperparams({"num_epochs": 3})
        logger.log_hyperparams({"num_epochs": 4})  # wandb alone refuses that
        logger.log_scalar("train/loss", 1.0, 5)
        logger.close()
        rows = list(self.rows(tmp_path))
        assert [row["step"] for row in rows if "train/loss" in row] == [1, 3, 6, 9, 12, 15, 18, 20, 5]
        assert [row["step"] for row in rows if "epoch/loss" in row] == [10, 20]
        held = self.config(tmp_path)
        assert held["num_epochs"] == 4
        assert held["optimizer"]["learning_rate"] == config().optimizer.learning_rate
        assert held["log_frequency"] == 3

    @pytest.fixture
    def server(self, monkeypatch, request):
        """A server on 127.0.0.1 that answers as that of wandb does while a run starts, and then nothing any more."""
        import wandb

        stalls, over, seen = threading.Event(), threading.Event(), []

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                asked = self.rfile.read(int(self.headers.get("content-length") or 0))
                if stalls.is_set():
                    seen.append(self.path)
                    over.wait(120)
                    return
                project = {"id": "p", "name": "flows", "entity": {"id": "e", "name": "e"}}
                bucket = {"id": "b", "name": "abc123", "displayName": "d", "config": "{}", "historyLineCount": 0}
                data = {"upsertBucket": {"bucket": bucket | {"project": project}, "inserted": True}}
                found = json.dumps({"data": data if b"UpsertBucket" in asked else {}}).encode()
                self.send_response(200)
                self.send_header("content-length", str(len(found)))
                self.end_headers()
                self.wfile.write(found)

            do_GET = do_POST = do_PUT = answer  # noqa: N815

            def log_message(self, *about):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", "0123456789" * 4)
        monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
        monkeypatch.setenv("WANDB_INIT_TIMEOUT", "3" if "start" in request.node.name else "60")
        monkeypatch.setenv("WANDB_FINISH_TIMEOUT", "1")
        wandb.teardown()  # it reads the environment once
        yield stalls, seen
        wandb.teardown()
        over.set()
        server.shutdown()
        thread.join()
        server.server_close()

    def test_a_server_that_stalls_does_not_slow_the_steps(self, tmp_path, server):
        stalls, seen = server
        logger = WandbLogger(tmp_path, project="flows", mode="online", id="abc123")
        stalls.set()
        logger.log_scalar("train/loss", 1.0, 0)  # what wandb does once
        longest = []
        started = time.monotonic()
        while not seen or time.monotonic() - started < 5:  # until it waits for an answer, and some seconds longer
            before = time.monotonic()
            logger.log_scalars({"train/loss": 1.0}, len(longest) + 1)
            longest.append(time.monotonic() - before)
            assert time.monotonic() - started < 100
        trainer = train(logger)
        assert trainer.step == 20
        assert max(longest) < 5  # an answer comes after 120 seconds
        assert np.median(longest) < 0.1
        before = time.monotonic()
        logger.close()
        assert time.monotonic() - before < 20

    def test_a_server_that_does_not_answer_at_the_start_costs_its_timeout_and_a_warning(self, tmp_path, server):
        stalls, seen = server
        stalls.set()
        before = time.monotonic()
        with pytest.warns(UserWarning, match=r"WandbLogger could not start a run at the server: "):
            logger = WandbLogger(tmp_path, project="flows", mode="online", id="abc123")
        assert time.monotonic() - before < 30
        assert seen
        train(logger)
        logger.close()
        assert [row["step"] for row in self.rows(tmp_path) if "epoch/loss" in row] == [10, 20]

    @pytest.mark.parametrize("suffix", [".msgpack", ".orbax"])
    def test_checkpoints_are_artifacts_where_asked_for(self, tmp_path, suffix):
        logger = self.start(tmp_path, id="abc123", log_checkpoints=True)
        trainer = train(logger)
        trainer.save_checkpoint(tmp_path / f"mine{suffix}")
        logger.close()
        requests = [
            record.request for record in self.records(tmp_path) if record.WhichOneof("record_type") == "request"
        ]
        artifacts = [record.artifact for record in self.records(tmp_path) if record.HasField("artifact")]
        artifacts += [request.log_artifact.artifact for request in requests if request.HasField("log_artifact")]
        (artifact,) = artifacts
        assert (artifact.name, artifact.type) == ("checkpoint-abc123", "model")
        assert set(artifact.aliases) == {"latest", "step-20"}
        assert len(artifact.manifest.contents) >= 1


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A directory with an empty store of MLflow, which takes seconds to make."""
    directory = tmp_path_factory.mktemp("mlflow")
    logger = MLflowLogger(directory, experiment="empty")
    logger.log_text("note", "text")
    logger.close()
    return directory


class TestMLflow:
    @pytest.fixture(autouse=True)
    def quiet(self, monkeypatch):
        monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")

    def client(self, directory):
        from mlflow import MlflowClient

        return MlflowClient(tracking_uri=f"sqlite:///{directory / 'mlflow.db'}")

    def test_a_store_in_a_directory_holds_everything(self, store):
        logger = MLflowLogger(store, experiment="flows", run_name="mine", tags={"kind": "test"})
        assert logger.run_id is None
        log_everything(logger)
        logger.log_scalars({"val/hits@5 (%)": 0.5}, 3)
        logger.log_image("without a step", GREY)
        logger.close()
        client = self.client(store)
        run = client.get_run(logger.run_id)
        assert client.get_experiment(run.info.experiment_id).name == "flows"
        assert (run.info.run_name, run.info.status, run.data.tags["kind"]) == ("mine", "FINISHED", "test")
        history = client.get_metric_history(logger.run_id, "train/error")
        assert [(metric.step, metric.value) for metric in history] == [(1, 1), (2, 2), (3, 3)]
        assert abs(history[0].timestamp / 1000 - time.time()) < 600
        assert run.data.metrics["val/hits_5 ___"] == 0.5
        assert run.data.params == {
            "rate": "0.001",
            "optimizer/name": "adam",
            "optimizer/nesterov": "True",
            "none": "None",
        }
        files = Path(run.info.artifact_uri.removeprefix("file://"))
        assert files.is_relative_to(store / "artifacts")
        assert (files / "texts" / "note" / "00000003.txt").read_text(encoding="utf-8") == "hello *ä*"
        assert '"not_finite": 1' in (files / "histograms" / "weights" / "00000003.json").read_text()
        assert '"nesterov": true' in (files / "hyperparameters.json").read_text()
        (grey,) = files.glob("images/grey*.png")
        for path in (grey, files / "images" / "without a step.png"):
            with PIL.Image.open(path) as opened:
                np.testing.assert_array_equal(np.asarray(opened.convert("L")), PIXELS)

    def test_a_run_is_continued(self, store):
        first = MLflowLogger(store)
        train(first)
        first.close()
        again = MLflowLogger(store, run_id=first.run_id)
        again.log_hyperparams({"num_epochs": 9, "new": 1})  # a param cannot change, and the file tells
        again.log_scalar("train/loss", 1.0, 21)
        again.close()
        client = self.client(store)
        steps = [metric.step for metric in client.get_metric_history(first.run_id, "train/loss")]
        assert steps == [1, 3, 6, 9, 12, 15, 18, 20, 21]
        assert [metric.step for metric in client.get_metric_history(first.run_id, "epoch/loss")] == [10, 20]
        run = client.get_run(first.run_id)
        assert (run.data.params["num_epochs"], run.data.params["new"]) == ("100", "1")

    @pytest.mark.parametrize("suffix", [".msgpack", ".orbax"])
    def test_checkpoints_are_uploaded_where_asked_for(self, store, tmp_path, suffix):
        logger = MLflowLogger(store, log_checkpoints=True)
        trainer = train(logger)
        saved = trainer.save_checkpoint(tmp_path / f"mine{suffix}")
        logger.close()
        files = Path(self.client(store).get_run(logger.run_id).info.artifact_uri.removeprefix("file://"))
        uploaded = files / "checkpoints" / saved.name
        step = trainer.step
        other = Trainer(Linear(4), config(), loss_fn=squared_error)
        other.load_checkpoint(uploaded)
        assert other.step == step

    def test_bad_input_is_refused_by_name(self, tmp_path):
        with pytest.raises(
            ValueError, match=r"`directory` of MLflowLogger is .* and `tracking_uri` is 'http://x'; only"
        ):
            MLflowLogger(tmp_path, tracking_uri="http://x")
        with pytest.raises(TypeError, match="`run_id` of MLflowLogger is of type int; it must be a str"):
            MLflowLogger(tmp_path / "new", run_id=3)
        (tmp_path / "file").touch()
        with pytest.raises(ValueError, match=r"`directory` of MLflowLogger is .* which is a file"):
            MLflowLogger(tmp_path / "file")
        assert not (tmp_path / "new").exists()

    def test_a_server_that_stalls_does_not_slow_the_steps(self):
        over, asked = threading.Event(), threading.Event()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                asked.set()
                over.wait(60)
                self.send_error(503)

            def log_message(self, *about):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        logger = MLflowLogger(tracking_uri=f"http://127.0.0.1:{server.server_port}", close_timeout=0.2)
        logger.log_text("note", "text", 0)
        assert asked.wait(60)
        start = time.monotonic()
        for step in range(5000):
            logger.log_scalars({"train/loss": 1.0}, step)
        assert time.monotonic() - start < 2  # each would wait for 5 seconds, and more
        with pytest.warns(UserWarning, match=r"of 5001 calls of MLflowRun, 5001 were not sent within 0.2 s"):
            logger.close()
        over.set()
        server.shutdown()
        thread.join()
        server.server_close()
        logger._thread.join(30)


def test_the_page_of_loggers_runs(tmp_path, monkeypatch):
    """Every block, also those that `test_docs.py` runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    text = (Path(__file__).parents[2] / "docs" / "loggers.md").read_text(encoding="utf-8")
    names = {}
    for number, block in enumerate(re.findall(r"```python[^\n]*\n(.*?)```", text, re.DOTALL)):
        exec(compile(block, f"block {number}", "exec"), names)
    found = {path.name.split(".")[0] for path in (tmp_path / "runs" / "third").iterdir()}
    assert found >= {"events", "wandb", "mlflow", "artifacts"}


@pytest.mark.parametrize(
    ("make", "package", "extra"),
    [
        (TensorBoardLogger, "tensorboardX", "tensorboard"),
        (WandbLogger, "wandb", "wandb"),
        (MLflowLogger, "mlflow", "mlflow"),
    ],
)
def test_a_missing_package_says_how_to_get_it(make, package, extra, tmp_path, monkeypatch):
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(
        ValueError, match=rf"{make.__name__} needs {package}, .* `pip install 'nnx-trainer\[{extra}\]'`"
    ):
        make(tmp_path / "new")
    assert not (tmp_path / "new").exists()
