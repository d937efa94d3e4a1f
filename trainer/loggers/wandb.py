"""`WandbLogger`: logs to Weights & Biases."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from trainer.core.checks import check_choice
from trainer.errors import warn
from trainer.loggers.base import Logger, as_directory, histogram_of, needed
from trainer.loggers.images import as_pixels

# Texts of wandb errors for an unreachable server; wandb has one error class for all server failures.
_UNREACHABLE = ("timed out", "deadline exceeded", "connection refused", "no such host")


class WandbLogger(Logger):
    """Logs to a Weights & Biases run::

        logger = WandbLogger("runs/mine", project="flows", tags=["baseline"], mode="offline")
        trainer = Trainer(model, config, loss_fn=loss_fn, logger=logger)
        trainer.train(data, num_epochs=5, batch_size=64)
        logger.close()

    Everything appears under its name. Files are in ``runs/mine/wandb``; ``wandb sync`` uploads an offline run from
    there. The step is logged as a metric ``step``, and wandb plots all others over it. The step of wandb itself, the
    row number, is not used for it: that must never decrease. wandb drops rows of earlier steps, which a resumed run
    has, and increments its step at every row without one.

    wandb sends from its own process, so a stalled server never blocks a step. If the server does not answer within
    ``WANDB_INIT_TIMEOUT`` seconds (wandb's default is 90) while the run starts, a warning is given and the run is
    kept offline. `close` waits until everything is sent, at most ``WANDB_FINISH_TIMEOUT`` seconds if that is set;
    unsent data stays in the directory.

    It needs wandb (the extra ``wandb``): https://docs.wandb.ai/models/ref/python/functions/init. With several
    processes, create it in process 0 only, since it starts the run immediately.
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
            directory: The directory for its files, in a subfolder ``wandb``; the current directory if left out.
            project: The project.
            name: The name of the run; wandb picks one if left out.
            entity: The user or team.
            tags: Tags of the run.
            mode: Whether to send data; by default the environment variable ``WANDB_MODE`` decides.
            resume: Whether to continue the run ``id``, see ``wandb.init``. By default "allow" if an ``id`` is given,
                since wandb itself would replace that run.
            id: The id of the run; needed to resume it.
            log_checkpoints: Upload every checkpoint of the trainer, as a version of an artifact
                ``checkpoint-<id>`` of type "model" with the alias ``step-<step>``. wandb copies it first, while
                training waits; for large checkpoints wrap this logger in `InBackground`.

        Raises:
            ArgumentError: The package is missing, ``directory`` is a file, or ``mode`` or ``resume`` is invalid.
            Exception: Raised by ``wandb.init``, for example if nobody is logged in; with ``resume="must"`` also if
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
            # The wandb process still holds the id of the failed run, and other runs of the caller.
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
        # A resumed run may train for more epochs; the config must describe the current call.
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
    """Returns whether the server did not answer; a refusal (AuthenticationError) is a subclass of CommError."""
    return type(error).__name__ == "CommError" and any(text in str(error).lower() for text in _UNREACHABLE)
