"""Callbacks that profile time and memory."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from trainer.callbacks.base import Callback
from trainer.core.checks import check_count
from trainer.errors import warn
from trainer.paths import in_home


class JAXProfiler(Callback):
    """Records a `jax.profiler` trace of some steps, for XProf, TensorBoard and Perfetto.

    The files are in ``directory/plugins/profile``: ``*.xplane.pb`` for ``xprof --logdir directory`` (or TensorBoard
    with its profile plugin), and ``perfetto_trace.json.gz`` for https://ui.perfetto.dev. Fused steps are traced in
    whole calls: the trace starts with the first call that has no step before ``first_step``, and may hold more steps;
    ``steps_per_call=1`` of the trainer gives exactly these. With several processes, each records its own devices.

    Args:
        directory: Where to write. It is created when the trace starts.
        first_step: The first step of the trace, after compilation and warm-up.
        num_steps: The number of steps.

    Raises:
        ArgumentError: ``first_step`` or ``num_steps`` is not positive.
    """

    def __init__(self, directory: str | os.PathLike[str], first_step: int = 10, num_steps: int = 5) -> None:
        self.directory = Path(in_home(directory))
        self._first = check_count(first_step, "first_step")
        self._last = self._first + check_count(num_steps, "num_steps") - 1
        self._is_tracing = self._is_done = False

    def on_train_begin(self, trainer: Any) -> None:
        self._is_done = False
        self._begin_if_due(trainer.step)

    def on_call_end(self, trainer: Any, step: int, logs: Mapping[str, Any]) -> None:
        del trainer
        if self._is_tracing and step >= self._last:
            self._end(logs)
        self._begin_if_due(step)

    def on_train_end(self, trainer: Any) -> None:
        if self._is_tracing:
            self._end(trainer.run.metrics)
            warn(f"JAXProfiler recorded fewer steps than it was asked for: the run ended at step {trainer.step}.")
        elif not self._is_done:
            warn(f"JAXProfiler recorded nothing: the run ended at step {trainer.step}, before step {self._first}.")

    def _begin_if_due(self, step: int) -> None:
        if not (self._is_tracing or self._is_done) and step + 1 >= self._first:
            jax.profiler.start_trace(self.directory, create_perfetto_trace=True)
            self._is_tracing = True

    def _end(self, metrics: Any) -> None:
        jax.block_until_ready(metrics)  # include steps that are still running
        jax.profiler.stop_trace()
        self._is_tracing, self._is_done = False, True


class MemoryProfiler(Callback):
    """Writes profiles of device memory by the line that allocated it, and logs how much is in use.

    ``directory/memory_<step>.prof`` is written at the end of every ``every``-th epoch, for ``pprof -http : FILE``
    (https://docs.jax.dev/en/latest/device_memory_profiling.html); with several processes each writes
    ``memory_<step>_<process>.prof``. The trainer's loggers get ``memory/bytes_in_use`` and ``memory/peak_bytes``, the
    maximum over the devices of the primary process, if the platform reports them; the CPU does not.

    Args:
        directory: Where to write. It is created on first use.
        every: The number of epochs between profiles.

    Raises:
        ArgumentError: ``every`` is not positive.
    """

    def __init__(self, directory: str | os.PathLike[str], every: int = 1) -> None:
        self.directory, self._every = Path(in_home(directory)), check_count(every, "every")

    def on_epoch_end(self, trainer: Any, epoch: int, logs: dict[str, float]) -> None:
        del logs
        if (epoch + 1) % self._every:
            return
        stats = [device.memory_stats() for device in jax.local_devices()]
        known = {"bytes_in_use": "memory/bytes_in_use", "peak_bytes_in_use": "memory/peak_bytes"}
        used = {
            name: float(max(one[key] for one in stats))
            for key, name in known.items()
            if all(one and key in one for one in stats)
        }
        if used:
            trainer.loggers.log_scalars(used)
        self.directory.mkdir(parents=True, exist_ok=True)
        process = f"_{jax.process_index()}" if jax.process_count() > 1 else ""
        jax.profiler.save_device_memory_profile(os.fspath(self.directory / f"memory_{trainer.step}{process}.prof"))
