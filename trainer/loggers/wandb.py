"""`WandbLogger`: runs of Weights & Biases."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from trainer.errors import ArgumentError
from trainer.loggers.base import Logger


class WandbLogger(Logger):
    """Logs to a run of Weights & Biases. Needs the package ``wandb``.

    The step is a metric ``step``, over which wandb plots all others. Its own step, the number of the row, must never
    go back: wandb drops rows of earlier steps, as a resumed run has them, and counts on at every row without a step.
    """

    def __init__(self, project: str | None = None, name: str | None = None) -> None:
        """Starts a run in ``project``, with a name that wandb draws if ``name`` is left out.

        Raises:
            ArgumentError: The package is not installed.
        """
        try:
            import wandb  # not at the top: it is optional, and slow to import
        except ImportError as error:
            raise ArgumentError("WandbLogger needs wandb, which is not installed; run `pip install wandb`.") from error
        self._wandb: Any = wandb
        self._run = self._wandb.init(project=project, name=name or None)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log_scalars(self, scalars: Mapping[str, float], step: int | None = None) -> None:
        self._log(dict(scalars), step)

    def log_text(self, name: str, text: str, step: int | None = None) -> None:
        self._log({name: text}, step)

    def log_image(self, name: str, image: Any, step: int | None = None) -> None:
        self._log({name: self._wandb.Image(np.asarray(image))}, step)

    def log_histogram(self, name: str, values: Any, step: int | None = None) -> None:
        self._log({name: self._wandb.Histogram(np.asarray(values))}, step)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        self._run.config.update(dict(params))

    def close(self) -> None:
        self._run.finish()

    def _log(self, row: dict[str, Any], step: int | None) -> None:
        self._run.log(row if step is None else {**row, "step": step})
