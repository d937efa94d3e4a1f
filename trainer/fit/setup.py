"""`Setup`: the parts of a trainer, which are checked once and never replaced."""

import contextlib
import dataclasses
import functools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import optax
from flax import nnx

from trainer.callbacks.dispatch import CallbackDispatcher
from trainer.checkpoints.checkpointer import Checkpointer
from trainer.checkpoints.plain_values import to_plain
from trainer.compile.dispatch import CompiledStep, Program
from trainer.config import TrainingConfig, make_schedule
from trainer.config.schedules import check_horizon, needs_horizon
from trainer.core.objective import check_weight, with_losses
from trainer.data.loaders import first_batches
from trainer.data.memory import Epoch, InMemoryData
from trainer.data.padding import PaddedBatches, with_mask
from trainer.data.resumable import LoaderPass, LoaderPosition
from trainer.distributed.agreement import check_agreement, gathered
from trainer.distributed.replicas import check_replicas
from trainer.errors import ArgumentError, CheckpointError, warn
from trainer.fit.common_batches import check_lengths, common_pass, length_of
from trainer.fit.constants import Constants
from trainer.fit.copies import LatestCopy
from trainer.fit.live import Live
from trainer.fit.rate import RateInForce
from trainer.fit.whole_optimizer import WholeOptimizer, has_same_shapes
from trainer.loggers.base import Logger, MetricsLoggerLike
from trainer.loggers.fanout import MetricFanout
from trainer.loop import prefetched
from trainer.run import FromLoader, Run
from trainer.sharding.placement import Placement
from trainer.state import TrainState, own_except, step_of_one
from trainer.types import Batch, EvalParams, ExtensionLike, LogCallback, LossFn, NonFinite, StepFn

_BYTES_COMPARED = 256 * 2**20
"""How much data in memory the processes compare, in a quarter of a second. Of larger data, evenly spread rows."""

_SECONDS_OF_AN_EVENT = 1800.0
"""How long processes wait for one whose callback samples or uploads, as long as for a batch of its loader."""


@dataclasses.dataclass(frozen=True, eq=False)
class Setup:
    """The parts of a trainer, built by `trainer.fit.assemble`; attributes named like the arguments of `Trainer`.

    No attribute is ever rebound. Of what they hold, ``live`` is the one object whose fields others assign
    (``trainer.setup.live.meter = meter``); `trainer.fit` does so while a call runs. Other parts keep a record that only
    their own methods change: ``constants``, ``latest_copy`` and ``rate`` of this package, and the ``events``,
    ``fanout``, ``checkpointer`` and compiled steps.
    """

    config: TrainingConfig
    loss_fn: LossFn | None
    given_optimizer: optax.GradientTransformation | None
    whole_optimizer: WholeOptimizer
    train_data_loader: Any
    val_data_loader: Any
    metrics_logger: MetricsLoggerLike | None
    logger: Logger | Sequence[Logger] | None
    log_callback: LogCallback | None
    save_interval: int | None
    workdir: str | os.PathLike[str] | None
    handle_signals: bool
    wrt: nnx.filterlib.Filter
    callbacks: Any
    eval_params: EvalParams | None
    step_fn: StepFn | None
    make_step: Callable[[optax.GradientTransformation], Callable[..., Any]] | None
    make_compiled_step: Callable[[], CompiledStep]
    nonfinite: NonFinite
    extensions: dict[str, ExtensionLike]
    constants: Constants
    latest_copy: LatestCopy
    seed: tuple[int, ...]
    placement: Placement
    events: CallbackDispatcher
    fanout: MetricFanout
    checkpointer: Checkpointer
    is_directory_given: bool
    fingerprints: dict[str, str]
    accumulate_steps: int
    fast_dev_run: int
    overfit_batches: int | None
    debug: Callable[[TrainState, Batch], None] | None
    pad_to: Literal["batch"] | None
    prefetch: int
    step: CompiledStep
    step_without_remat: CompiledStep | None
    eval_step: Program
    predict_step: Callable[[Any], Callable[..., Any]]
    live: Live
    rate: RateInForce

    def agree(self, what: str, parts: Mapping[str, Any], **data: InMemoryData | None) -> None:
        """Checks that all processes are about to do the same thing.

        Raises:
            DistributedError: In all processes, if one of them differs.
        """
        if self.placement.num_processes > 1:
            prints = {name: None if held is None else held.fingerprint(_BYTES_COMPARED) for name, held in data.items()}
            check_agreement({what: {**parts, **prints}})

    def agree_on_run(
        self,
        what: str,
        run: Run,
        arguments: Mapping[str, Any],
        lengths: Mapping[str, int | None],
        **data: InMemoryData | None,
    ) -> None:
        """Checks that all processes have the same arguments, data and progress, before a call does anything.

        Args:
            what: The call.
            run: The run.
            arguments: The arguments to compare.
            lengths: The result of `length_to_compare` for each loader, by name.
            **data: The data in memory, by name.

        Raises:
            ArgumentError: The call is inside `jax.set_mesh` of a mesh that the state is not on.
            DistributedError: In all processes, if one of them differs.
        """
        self.placement.check_context()
        # Also which loaders there are: where one process has none, it would not take part in comparing their lengths.
        arguments = {**arguments, "loaders": sorted(lengths)}
        self.agree(what, {**arguments, "step": run.step, "epoch": run.epoch, "rng": list(self.seed)}, **data)
        if lengths and self.placement.num_processes > 1:
            check_lengths(lengths)

    def share_stop(self) -> None:
        """Makes all processes end the run after the same epoch if a callback of any of them asks for it."""
        if self.placement.num_processes > 1:
            own = self.events.own_stop_reasons()
            shared = gathered(own, name="reasons to stop", timeout_seconds=_SECONDS_OF_AN_EVENT)
            self.events.share_stop(shared)

    def agree_on_state(self, run: Run) -> None:
        """Checks that replicated arrays of the state are equal in all processes, before a run trains on it.

        Raises:
            DistributedError: In all processes, if replicated arrays differ.
        """
        if self.placement.num_processes > 1:
            check_replicas(run.with_edits().peek())

    def in_memory(
        self, data: Any, batch_size: int, name: str, *, mask: bool = True, limit: int | None = None
    ) -> InMemoryData:
        """Returns data in memory, after checking that it is valid and that the devices can share its full batches."""
        held = InMemoryData(data, batch_size, name, pad_to=self.pad_to, mask=mask, limit=limit)
        if held.num_examples >= batch_size or self.pad_to is not None:
            self.placement.check_batch_size(batch_size)
        return held

    @property
    def is_limited(self) -> bool:
        """Whether a run trains on only some batches, the same in every epoch."""
        return self.fast_dev_run > 0 or self.overfit_batches is not None

    def limited_data(self, data: InMemoryData) -> InMemoryData:
        """Returns the examples that a limited run trains on."""
        return data.head(self.fast_dev_run or self.overfit_batches or len(data))

    def limited_loader(self, loader: Any, batch_size: int, name: str) -> list[Batch]:
        """Returns the batches that a limited run trains on."""
        return first_batches(loader, batch_size, name, self.fast_dev_run or self.overfit_batches or 1)

    @functools.cached_property
    def limited_train_data_loader(self) -> list[Batch]:
        """The batches of ``train_data_loader`` that a limited run trains on, drawn once."""
        return self.limited_loader(self.train_data_loader, self.config.batch_size, "train_data_loader")

    def limited_validation(
        self, held_out: Callable[[], Iterator[Batch]] | None, training: Callable[[], Iterator[Batch]]
    ) -> Callable[[], Iterator[Batch]] | None:
        """Returns the validation batches of a run: with ``overfit_batches``, its training batches."""
        return held_out if held_out is None or self.overfit_batches is None else training

    @contextlib.contextmanager
    def evaluating(self, state: TrainState) -> Iterator[None]:
        """Adds a note to an error of an evaluation if the state is that of a sweep, of whose members it takes one."""
        try:
            yield
        except Exception as error:
            if "members" in state.extensions and not isinstance(error, ArgumentError):
                error.add_note(
                    "the state is that of a sweep, and its arrays have a leading axis of members; take one member, as "
                    "in sweep_members(trainer.state, 0), or jax.vmap(make_eval_step(loss_fn), in_axes=(0, None))"
                )
            raise

    def save_every(self, interval: int | None, resume: Any) -> int | None:
        """Returns ``interval``, or None for no saves, since nothing asks for them.

        A directory does, an interval other than the default, or ``resume``: without saves there is nothing to resume.
        """
        is_own = interval != TrainingConfig.save_frequency  # also the default of `save_interval`
        is_asked = (is_own or resume is not False) and not self.fast_dev_run
        return interval if self.is_directory_given or is_asked else None

    def with_mask(self, batch: Any) -> Any:
        """Returns a single batch, with the mask that the objective expects if batches are padded."""
        return batch if self.pad_to is None else with_mask(batch)

    def padded(self, batches: Iterator[Batch], size: int | None = None, **options: Any) -> Iterator[Batch]:
        """Returns the batches of a loader, padded if ``pad_to`` is set; arguments as for `PaddedBatches`."""
        return batches if self.pad_to is None else PaddedBatches(batches, size, **options)

    @contextlib.contextmanager
    def ahead(self, batches: Iterator[Batch], name: str, *, first: int = 0) -> Iterator[Iterator[Batch]]:
        """A context with the batches of a pass: prefetched if ``prefetch`` is set, and the same in all processes.

        Args:
            batches: The batches.
            name: Names the pass, for messages.
            first: The number of the first batch. Only batch 0 of a training pass cannot be a short last one.
        """
        may_be_short = first > 0 or name != "training"
        with contextlib.ExitStack() as exits:
            if self.prefetch and not isinstance(batches, Epoch):
                ahead = prefetched(batches, self.prefetch, placement=self.placement, may_be_short=may_be_short)
                batches = exits.enter_context(ahead)
            common = common_pass(batches, self.placement, name, first=first, may_be_short=may_be_short)
            yield exits.enter_context(common)

    def check_micro_batches(self, data: InMemoryData) -> None:
        """Checks that every training batch has enough examples for the micro-batches of a step.

        Warns if the devices of a mesh cannot share a micro-batch evenly.

        Raises:
            ArgumentError: A batch has fewer examples than micro-batches.
        """
        steps, size = self.accumulate_steps, min(data.batch_size, data.num_examples)
        last = data.examples_per_epoch % data.batch_size or size
        if self.pad_to is not None:
            size = last = data.batch_size
        if steps > min(size, last):
            which = "a batch" if size < steps else "the last batch"
            raise ArgumentError(
                f"`accumulate_steps` is {steps}, and {which} has {min(size, last)} examples (`batch_size` = "
                f"{data.batch_size}, {data.examples_per_epoch} examples in all); make it at most that"
                + (", or pad the last batch: `pad_to`='batch'." if size >= steps else ".")
            )
        try:
            self.placement.check_batch_size(-(-size // steps))
        except ArgumentError:
            if steps > 1:
                warn(
                    f"`accumulate_steps` = {steps} makes micro-batches of {-(-size // steps)} examples, which the "
                    f"devices of the mesh cannot share evenly: rows move between devices, and some wait. A "
                    f"`batch_size` that is a multiple of {steps} times the number of devices avoids that."
                )

    def with_weights(self, run: Run) -> Run:
        """Returns the run with the current weights of the extension objects."""
        if not self.extensions:
            return run
        weights = {name: extension.weight for name, extension in with_losses(self.extensions).items()}
        if weights == run.weights:
            return run
        for name, weight in weights.items():
            check_weight(weight, name)
        run = run.with_edits()
        state = run.peek()
        held = {
            name: {**state.extensions[name], "weight": jnp.asarray(weight, state.extensions[name]["weight"].dtype)}
            for name, weight in weights.items()
        }
        # Other entries, such as the loss scale, are kept.
        state = self.placement.adopt(state.replace(extensions={**state.extensions, **held}))
        return run.with_state(state, step=run.step).replace(weights=weights)

    def with_state(self, run: Run, state: TrainState) -> Run:
        """Returns the run with a state that the caller assigned, in the structure and types that the steps take."""
        state.check_alive()
        step = step_of_one(state)  # first, as it raises for a stacked state
        state, held = run.with_arrays(state), run.peek().opt_state
        if self.step_fn is None and not has_same_shapes(state.opt_state, held):
            opt_state = self.whole_optimizer.fitted(state.opt_state, state.params, held)
            state = state.replace(opt_state=opt_state)
        # Last, since arrays made of NumPy arrays, or placed on the device that they are on, may share memory with them.
        state = own_except(self.placement.adopt(state), run.leaves)
        return run.with_state(state, step=step, keeps_position=self.live.is_running)

    def with_learning_rate(self, run: Run, value: float) -> Run:
        """Returns the run with another learning rate in its state; see `TrainState.with_learning_rate`."""
        run = run.with_edits()
        state = self.placement.adopt(run.peek().with_learning_rate(value))
        return run.with_state(state, step=run.step, keeps_position=True)

    def horizon_of(self, loader: Any, num_epochs: int | None = None) -> int | None:
        """Returns the number of steps of all epochs over a loader; None if its length is unknown."""
        steps = self.config.steps_per_epoch
        if steps is None:
            steps = length_of(loader)
        num_epochs = self.config.num_epochs if num_epochs is None else num_epochs
        return None if steps is None else steps * num_epochs

    def with_horizon(self, run: Run, horizon: int | None) -> Run:
        """Returns the run with another end of its learning-rate schedule. Warns if the learning rate jumps.

        Raises:
            ConfigError: The schedule cannot end there.
        """
        scheduler = self.config.scheduler
        if horizon is None or self.given_optimizer is not None or scheduler is None or not needs_horizon(scheduler):
            return run
        if self.is_limited:  # so that its first steps are those of a run that outlasts its warm-up
            horizon = max(horizon, scheduler.warmup_steps + 1)
        check_horizon(scheduler, horizon)
        if run.horizon is not None and run.horizon != horizon and run.step > 0:
            peak = self.config.optimizer.learning_rate
            was, now = (float(make_schedule(scheduler, peak, end)(run.step)) for end in (run.horizon, horizon))
            if abs(was - now) > 1e-6 * peak:
                warn(
                    f"the end of the learning-rate schedule {scheduler.scheduler_type!r} moves from step {run.horizon} "
                    f"to step {horizon}, so the learning rate at step {run.step} jumps from {was:.3g} to {now:.3g}. "
                    f"Train all epochs in one call, or set `SchedulerConfig.total_steps`."
                )
        return run.replace(horizon=horizon)

    def beside(self, run: Run) -> tuple[Run, dict[str, Any]]:
        """Returns the run with its loader's position, and what is saved with it: see `snapshot_run`."""
        run, loaders = self._with_positions(run)
        return run, {"info": self._info, "callback_states": self.events.state_dict, "loaders": loaders}

    def tell_saving(self, path: Path, step: int) -> None:
        """Tells the loggers about a save that was written, or started in the background."""
        self.fanout.log_text("checkpoint", f"saved {path}", step)
        self.tell_saved()

    def tell_saved(self) -> None:
        """Tells the loggers about checkpoints completed since the last call; does not wait."""
        for path, step in self.checkpointer.take_complete():
            self.fanout.log_checkpoint(path, step)

    def finish_saves(self) -> None:
        """Waits for the save in flight, and tells the loggers about it; raises the exception of the save."""
        try:
            self.checkpointer.wait()
        finally:
            self.tell_saved()

    @functools.cached_property
    def _info(self) -> dict[str, Any]:
        return {"name": self.config.name, "metadata": self.config.to_dict()["metadata"]}

    def check_savable(self) -> bool:
        """Checks that checkpoints can hold the metadata and the states of callbacks and extensions.

        Returns:
            Whether all of them could be read; a callback may have no state before its first event.

        Raises:
            CheckpointError: They cannot.
        """
        to_plain(self._info, "info")
        try:
            states = self.events.state_dict()
        except Exception:
            return False
        to_plain(states, "callbacks")
        return True

    def with_known_position(self, run: Run) -> Run:
        """Returns the run with its loader's position, or without a position if the loader cannot report it.

        So a finished run can be saved, and the save need not ask the loader again, which may be slow.
        """
        position = run.position
        try:
            if self.placement.num_processes > 1:
                self._with_positions(run)  # raises in all processes or in none
            elif isinstance(position, FromLoader) and isinstance(position.loader, LoaderPass):
                found = position.loader.position(position.batch)
                return run.replace(position=dataclasses.replace(position, loader=found))
        except CheckpointError:
            return run.replace(position=None)
        return run

    def _with_positions(self, run: Run) -> tuple[Run, list[Any] | None]:
        """Returns the run, and with several processes the positions of all their loaders."""
        position = run.position
        if self.placement.num_processes == 1 or not isinstance(position, FromLoader):
            return run, None
        found, failure = LoaderPosition(), ""
        try:
            if isinstance(position.loader, LoaderPass):
                found = position.loader.position(position.batch)
        except CheckpointError as error:  # do not raise yet: the other processes wait in `gathered`
            failure = str(error)
        everyone = gathered([dataclasses.asdict(found), failure], timeout_seconds=_SECONDS_OF_AN_EVENT)
        for process, (_, problem) in enumerate(everyone):
            if problem:
                raise CheckpointError(f"the loader of process {process} cannot be resumed: {problem}")
        return run.replace(position=dataclasses.replace(position, loader=found)), [first for first, _ in everyone]
