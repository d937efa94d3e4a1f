"""`MLflowLogger`: logs to MLflow."""

import os
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.errors import ArgumentError, ArgumentTypeError
from trainer.loggers.background import InBackground
from trainer.loggers.base import Logger, as_directory, flattened, histogram_of, needed
from trainer.loggers.images import as_pixels

_MAX_METRICS, _MAX_PARAMS, _MAX_VALUE = 1000, 100, 6000
"""The limits of MLflow: the entries of a request, and the length of a param."""


class MLflowLogger(InBackground):
    """Logs to an MLflow run, in a directory or on a server, from a thread::

        logger = MLflowLogger("runs/mine", experiment="flows", run_name="baseline")
        trainer = Trainer(model, config, loss_fn=loss_fn, logger=logger)
        trainer.train(data, num_epochs=5, batch_size=64)
        logger.close()

    writes ``runs/mine/mlflow.db``, for ``mlflow ui --backend-store-uri sqlite:///runs/mine/mlflow.db``, and files into
    ``runs/mine/artifacts``. Scalars become metrics (characters that MLflow does not allow in names become ``_``);
    hyperparameters become params, nested ones as ``optimizer/learning_rate``, and the file ``hyperparameters.json``;
    images become images of their step; texts and histograms become files ``texts/<name>/<step>.txt`` and
    ``histograms/<name>/<step>.json``. Params of a run cannot change: in a resumed run the file has the current ones.

    The run starts at the first call, in the thread, so neither the start nor a step waits for a server; failures are
    reported as by `InBackground`. It needs mlflow (the extra ``mlflow``):
    https://mlflow.org/docs/latest/api_reference/python_api/mlflow.client.html.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        tracking_uri: str | None = None,
        experiment: str = "trainer",
        run_name: str | None = None,
        run_id: str | None = None,
        tags: Mapping[str, str] | None = None,
        log_checkpoints: bool = False,
        max_calls: int = 10_000,
        close_timeout: float = 30.0,
    ) -> None:
        """Makes a logger. Nothing is created, and no server is contacted, before the first call.

        Args:
            directory: The directory for the store and the files.
            tracking_uri: A server or a store instead, such as ``http://127.0.0.1:5000``; without either, the
                environment variable ``MLFLOW_TRACKING_URI`` decides.
            experiment: The experiment; it is created if it does not exist.
            run_name: The name of the run; MLflow picks one if left out.
            run_id: The id of a run to continue.
            tags: Tags of the run.
            log_checkpoints: Upload every checkpoint of the trainer, to ``checkpoints/<name>`` of the run.
            max_calls, close_timeout: As for `InBackground`.

        Raises:
            ArgumentTypeError: ``directory`` is not a path, or a string argument is not a string.
            ArgumentError: It is a file, or given together with ``tracking_uri``; or mlflow is missing.
        """
        path = None if directory is None else as_directory(directory, "MLflowLogger")
        if path is not None and tracking_uri is not None:
            raise ArgumentError(
                f"`directory` of MLflowLogger is `{path}` and `tracking_uri` is {tracking_uri!r}; only one of them can "
                f"have the run."
            )
        texts = {"tracking_uri": tracking_uri, "experiment": experiment, "run_name": run_name, "run_id": run_id}
        for name, text in texts.items():
            if not isinstance(text, str | None):
                raise ArgumentTypeError(f"`{name}` of MLflowLogger is of type {type(text).__name__}; it must be a str.")
        with needed("MLflowLogger", "mlflow", extra="mlflow"):
            import mlflow  # not at the top: it is optional, and slow to import
        run = MLflowRun(mlflow, path, tracking_uri, experiment, run_name, run_id, dict(tags or {}), log_checkpoints)
        super().__init__(run, max_calls=max_calls, close_timeout=close_timeout)
        self._mlflow_run = run

    @property
    def run_id(self) -> str | None:
        """The id of the run; None before it has started."""
        return self._mlflow_run.id


class MLflowRun(Logger):
    """An MLflow run; its methods wait for the store or server. The arguments are those of `MLflowLogger`."""

    def __init__(
        self,
        mlflow: Any,
        directory: Path | None,
        tracking_uri: str | None,
        experiment: str,
        name: str | None,
        run_id: str | None,
        tags: dict[str, str],
        log_checkpoints: bool,
    ) -> None:
        self._mlflow = mlflow
        self._directory = directory
        self._tracking_uri = tracking_uri
        self._experiment = experiment
        self._name = name
        self._tags = tags
        self._log_checkpoints = log_checkpoints
        self._client: Any = None
        self._given_id = run_id
        self.id: str | None = None

    def log_scalars(self, scalars: Mapping[str, float], step: int | None = None) -> None:
        self.log_rows([(time.time(), scalars, step)])

    def log_rows(self, rows: Sequence[tuple[float, Mapping[str, float], int | None]]) -> None:
        """Logs rows, as tuples (time, scalars, step), in as few requests as MLflow allows."""
        metric = self._mlflow.entities.Metric
        metrics = [
            metric(_named(name), float(value), int(when * 1000), step or 0)
            for when, scalars, step in rows
            for name, value in scalars.items()
        ]
        for start in range(0, len(metrics), _MAX_METRICS):
            self._started().log_batch(self.id, metrics=metrics[start : start + _MAX_METRICS])

    def log_text(self, name: str, text: str, step: int | None = None) -> None:
        self._started().log_text(self.id, text, f"texts/{_file(name, step)}.txt")

    def log_image(self, name: str, image: Any, step: int | None = None) -> None:
        pixels = as_pixels(image, name)
        where = {"artifact_file": f"images/{_file(name, None)}.png"} if step is None else {"key": _named(name)}
        self._started().log_image(self.id, pixels, step=step, **where)

    def log_histogram(self, name: str, values: Any, step: int | None = None) -> None:
        _, counts, edges, not_finite = histogram_of(values)
        about = {"counts": counts, "edges": edges, "not_finite": not_finite}
        self._started().log_dict(self.id, about, f"histograms/{_file(name, step)}.json")

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        client = self._started()
        known = client.get_run(self.id).data.params
        flat = {_named(name): str(value)[:_MAX_VALUE] for name, value in flattened(params).items()}
        entries = [self._mlflow.entities.Param(*item) for item in flat.items() if item[0] not in known]
        for start in range(0, len(entries), _MAX_PARAMS):
            client.log_batch(self.id, params=entries[start : start + _MAX_PARAMS])
        client.log_dict(self.id, dict(params), "hyperparameters.json")

    def log_checkpoint(self, path: str | os.PathLike[str], step: int) -> None:
        del step  # it is in the name
        if self._log_checkpoints:
            folder = f"checkpoints/{Path(path).name}" if Path(path).is_dir() else "checkpoints"
            upload = self._started().log_artifacts if Path(path).is_dir() else self._started().log_artifact
            upload(self.id, str(path), folder)

    def close(self) -> None:
        if self._client is not None:
            self._client.set_terminated(self.id)

    def _started(self) -> Any:
        """Returns the client, and starts the run if necessary."""
        if self._client is None:
            uri, files = self._tracking_uri, None
            if self._directory is not None:
                self._directory.mkdir(parents=True, exist_ok=True)
                uri = f"sqlite:///{(self._directory / 'mlflow.db').absolute()}"
                files = (self._directory / "artifacts").absolute().as_uri()
            client = self._mlflow.MlflowClient(tracking_uri=uri)
            if self._given_id is not None:
                self.id = client.get_run(self._given_id).info.run_id
                client.update_run(self.id, status="RUNNING")
            else:
                found = client.get_experiment_by_name(self._experiment)
                home = client.create_experiment(self._experiment, files) if found is None else found.experiment_id
                self.id = client.create_run(home, run_name=self._name, tags=self._tags).info.run_id
            self._client = client
        return self._client


def _named(name: str) -> str:
    """Returns a name with only the characters that MLflow allows."""
    return re.sub(r"[^\w\-./: ]", "_", name)


def _file(name: str, step: int | None) -> str:
    path = re.sub(r"(^|/)\.", r"\1_", _named(name)).replace(":", "_")
    return path if step is None else f"{path}/{step:08d}"
