"""`WandbLogger`: runs of Weights & Biases."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from trainer.core.checks import check_choice
from trainer.errors import warn
from trainer.loggers.base import Logger, as_directory, histogram_of, needed
from trainer.loggers.images import as_pixels

# What errors of wandb say of a server that does not answer; all that a server may do is one class of errors.
_UNREACHABLE = ("timed out", "deadline exceeded", "connection refused", "no such host")


class WandbLogger(Logger):
    """Logs to a run of Weights & Biases::

        logger = WandbLogger("runs/mine", project="flows", tags=["baseline"], mode="offline")
        trainer = Trainer(model, config, loss_fn=loss_fn, logger=logger)
        trainer.train(data, num_epochs=5, batch_size=64)
        logger.close()

    Everything is under its name; files are in ``runs/mine/wandb``, from where ``wandb sync`` uploads a run that was
    offline. The step is a metric ``step``, over which wandb plots all others. Its own step, the number of the row, must
    never go back: wandb drops rows of earlier steps, as a resumed run has them, and counts on at every row without a
    step.

    wandb sends from a process of its own, so a server that stalls keeps no step waiting. A server that does not answer
    while the run starts, within the seconds of ``WANDB_INIT_TIMEOUT`` (wandb's default is 90), costs a warning, and the
    run is kept offline. `close` waits until all is sent, for ``WANDB_FINISH_TIMEOUT`` seconds where that is set; what
    was not sent by then stays in its directory.

    It needs wandb (the extra ``wandb``): https://docs.wandb.ai/models/ref/python/functions/init. With several
    processes, make it in process 0 only, since it starts the run at once.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str] | None = None,
        *,
        project: str | None = None,
        name: str | None = None,
        entity: str | None = None,
        tags: Sequence[str] | None = None,
        mode: Literal["online", "offline", "shared", "disabled"] | None = None,
        resume: bool | Literal["allow", "must", "never", "auto"] | None = None,
        id: str | None = None,
        log_checkpoints: bool = False,
    ) -> None:
        """Starts a run.

        Args:
            directory: Where its files go, in a folder ``wandb``; the current directory if left out.
            project: The project.
            name: The name of the run, which wandb draws if it is left out.
            entity: The user or team.
            tags: Tags of the run.
            mode: Whether to send; by default as the environment variable ``WANDB_MODE`` says.
            resume: Whether to continue the run ``id``, see ``wandb.init``. By default "allow" where an ``id`` is given,
                since wandb by itself would replace that run.
            id: The id of the run, which a resumed run needs.
            log_checkpoints: Upload every checkpoint of the trainer, as a version of an artifact
                ``checkpoint-<id>`` of type "model" with the alias ``step-<step>``. wandb copies it first, while the
                training waits; for large ones put `InBackground` around this logger.

        Raises:
            ArgumentError: The package is missing, ``directory`` is a file, or ``mode`` or ``resume`` is none of these.
            Exception: What ``wandb.init`` raises, such as that nobody is logged in; with ``resume="must"`` also where
                the server does not answer.
        """
        if mode is not None:
            check_choice(mode, ("online", "offline", "shared", "disabled"), "mode")
        if not isinstance(resume, bool | None):
            check_choice(resume, ("allow", "must", "never", "auto"), "resume")
        path = None if directory is None else as_directory(directory, "WandbLogger")
        if isinstance(tags, str):
            tags = [tags]
        with needed("WandbLogger", "wandb", extra="wandb"):
            import wandb  # not at the top: it is optional, and slow to import
        self._wandb: Any = wandb
        self._log_checkpoints = log_checkpoints
        if path is not None:
            path.mkdir(parents=True, exist_ok=True)  # where it is missing, wandb writes to a temporary one
        about: dict[str, Any] = {
            "dir": None if path is None else str(path),
            "project": project,
            "name": name or None,
            "entity": entity,
            "tags": tags,
            "resume": "allow" if resume is None and id is not None else resume,
            "id": id,
        }
        try:
            self._run = self._wandb.init(mode=mode, **about)
        except Exception as error:
            # The process of wandb holds the id of the run that failed, and other runs of the caller's.
            if not _is_unreachable(error) or resume == "must" or self._wandb.run is not None:
                raise
            self._wandb.teardown()
            warn(
                f"WandbLogger could not start a run at the server: {error} The run is kept offline, from where "
                f"`wandb sync` uploads it."
            )
            self._run = self._wandb.init(mode="offline", **about)
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def log_scalars(self, scalars: Mapping[str, float], step: int | None = None) -> None:
        self._log(dict(scalars), step)

    def log_text(self, name: str, text: str, step: int | None = None) -> None:
        self._log({name: text}, step)

    def log_image(self, name: str, image: Any, step: int | None = None) -> None:
        self._log({name: self._wandb.Image(as_pixels(image, name))}, step)

    def log_histogram(self, name: str, values: Any, step: int | None = None) -> None:
        _, counts, edges, not_finite = histogram_of(values)
        row = {name: self._wandb.Histogram(np_histogram=(counts, edges))}
        self._log(row | ({f"{name}/not_finite": not_finite} if not_finite else {}), step)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        # A resumed run may train for more epochs, and the config tells what it does now.
        self._run.config.update(dict(params), allow_val_change=True)

    def log_checkpoint(self, path: str | os.PathLike[str], step: int) -> None:
        if self._log_checkpoints:
            artifact = self._wandb.Artifact(f"checkpoint-{self._run.id}", type="model", metadata={"step": step})
            (artifact.add_dir if Path(path).is_dir() else artifact.add_file)(str(path))
            self._run.log_artifact(artifact, aliases=["latest", f"step-{step}"])

    def close(self) -> None:
        self._run.finish()

    def _log(self, row: dict[str, Any], step: int | None) -> None:
        self._run.log(row if step is None else {**row, "step": step})


def _is_unreachable(error: Exception) -> bool:
    """Tells a server that does not answer from one that refuses, as by an AuthenticationError, a kind of CommError."""
    return type(error).__name__ == "CommError" and any(text in str(error).lower() for text in _UNREACHABLE)
