"""`TensorBoardLogger`: TensorBoard event files, without TensorFlow."""

import atexit
import contextlib
import json
import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from trainer.core.other_names import takes_no
from trainer.loggers.base import Logger, as_directory, flattened, histogram_of, needed
from trainer.loggers.images import as_pixels

_FLUSH_SECONDS = 5.0
"""The first row after this many seconds flushes the earlier ones to disk."""


class TensorBoardLogger(Logger):
    """Writes an event file into a directory, for ``tensorboard --logdir runs``::

        trainer = Trainer(model, config, loss_fn=loss_fn, logger=TensorBoardLogger("runs/mine"))

    Scalars, images, histograms and texts appear under their names, in the TensorBoard tabs of the same name.
    Hyperparameters appear in the tab HPARAMS, nested ones as ``optimizer/learning_rate``, and as a text. Non-finite
    entries of a histogram are left out, and counted by the scalar ``<name>/not_finite``. A resumed run
    writes a new file, with an event that makes TensorBoard hide earlier events after its checkpoint.
    Rows are flushed to disk after 5 seconds, at `close` and at Python exit.

    It needs tensorboardX (the extra ``tensorboard``), which builds and writes events; TensorBoard is only needed to
    view them. The format: https://github.com/tensorflow/tensorboard/blob/master/tensorboard/compat/proto/event.proto.

    Attributes:
        directory: The directory of the event files.
    """

    @takes_no("TensorBoardLogger")
    def __init__(self, directory: str | os.PathLike[str]) -> None:
        """Makes a logger that writes into a directory. Nothing is created before the first call.

        Raises:
            ArgumentTypeError: ``directory`` is not a path.
            ArgumentError: It is a file; or tensorboardX is missing.
        """
        self.directory = as_directory(directory, "TensorBoardLogger")
        with needed("TensorBoardLogger", "tensorboardX", extra="tensorboard"):
            import tensorboardX.event_file_writer  # not at the top: it is optional
            import tensorboardX.proto.event_pb2
            import tensorboardX.summary
        self._summary: Any = tensorboardX.summary
        self._events: Any = tensorboardX.proto.event_pb2
        # Not its SummaryWriter, which writes in a thread: if that thread dies, the next calls block forever.
        self._open: Any = tensorboardX.event_file_writer.EventsWriter
        self._writer: Any = None
        self._flushed_at = 0.0

    def log_scalars(self, scalars: Mapping[str, float], step: int | None = None) -> None:
        self._write([self._summary.scalar(name, float(value)) for name, value in scalars.items()], step)

    def log_text(self, name: str, text: str, step: int | None = None) -> None:
        self._write([self._summary.text(name, text)], step)

    def log_image(self, name: str, image: Any, step: int | None = None) -> None:
        pixels = as_pixels(image, name)
        with needed("an image of TensorBoardLogger", "pillow", extra="tensorboard"):
            summary = self._summary.image(name, pixels, dataformats="HW" if pixels.ndim == 2 else "HWC")
        self._write([summary], step)

    def log_histogram(self, name: str, values: Any, step: int | None = None) -> None:
        finite, counts, edges, not_finite = histogram_of(values)
        summaries = []
        if finite.size:
            # TensorBoard stores only right edges, so an empty bin encodes the first left edge.
            about = finite.min(), finite.max(), finite.size, finite.sum(), np.square(finite).sum()
            summaries.append(self._summary.histogram_raw(name, *map(float, about), edges, [0, *counts]))
        if not_finite:
            summaries.append(self._summary.scalar(f"{name}/not_finite", float(not_finite)))
        self._write(summaries, step)

    def log_hyperparams(self, params: Mapping[str, Any]) -> None:
        text = json.dumps(params, indent=2, default=str)
        self._write(self._summary.hparams(flattened(params), {}), None)
        self._write([self._summary.text("hyperparameters", f"```json\n{text}\n```")], None)

    def rewind(self, step: int) -> None:
        log = self._events.SessionLog
        self._write_event(self._events.Event(step=step + 1, session_log=log(status=log.START)))

    def close(self) -> None:
        if self._writer is not None:
            atexit.unregister(self.close)
            writer, self._writer = self._writer, None
            writer.close()

    def _write(self, summaries: Any, step: int | None) -> None:
        if summaries:
            whole, *rest = summaries
            for summary in rest:
                whole.MergeFrom(summary)
            self._write_event(self._events.Event(step=step, summary=whole))

    def _write_event(self, event: Any) -> None:
        if self._writer is None:
            self.directory.mkdir(parents=True, exist_ok=True)
            # The default name has the time in seconds only, and an existing file of that name would be replaced. What
            # follows grows with time, as readers sort files by name.
            self._writer = self._open(str(self.directory / "events"), f".{time.time_ns()}.{os.getpid()}")
            atexit.register(self.close)
        event.wall_time = time.time()
        try:
            self._writer.write_event(event)
            if event.wall_time >= self._flushed_at + _FLUSH_SECONDS:
                self._flushed_at = event.wall_time
                self._writer.flush()
        except BaseException:
            # No reader gets past an incomplete event, so the next event goes to a new file.
            with contextlib.suppress(Exception):
                self.close()
            raise
