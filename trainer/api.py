"""The facade: a `Trainer` that holds a state and calls pure steps on it.

This is the only module that mutates a training state: a step replaces the arrays it holds, an assignment
of ``self.state`` all of it. Beside it a trainer keeps the books of its runs (``history``, ``epoch``, and
where the run is), which checkpoints hold as well.
"""

import contextlib
import copy
import dataclasses
import functools
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from trainer.callbacks.base import CallbackList, Listeners, as_callback_list
from trainer.checkpoints.background import BackgroundSaver
from trainer.checkpoints.state_io import (
    Loaded,
    Snapshot,
    default_name,
    load_latest,
    load_with_progress,
    prune,
    take_snapshot,
    write_snapshot,
)
from trainer.compile.analysis import Compilation, read_compilation
from trainer.compile.collection import scheduled_collection
from trainer.compile.dispatch import Calls, Layout, Program, StepPrograms, leaves_of
from trainer.config.optimizers import make_optimizer, make_schedule, needs_horizon
from trainer.config.training import TrainingConfig
from trainer.data.memory import EpochOfData, InMemoryData, one_pass, seed_from_key, takes_batch_size
from trainer.data.resumable import LoaderPass, LoaderPosition
from trainer.distributed.signals import Interruption
from trainer.distributed.start import check_agreement, gathered
from trainer.errors import (
    ArgumentError,
    ArgumentTypeError,
    CheckpointError,
    StateError,
    TrainingInterrupted,
    check_count,
)
from trainer.loggers.base import Logger, MetricsLoggerLike, WandbLogger, prefixed
from trainer.loggers.fanout import Reporter
from trainer.metrics.history import History, WeightedAverage, metrics_at
from trainer.metrics.throughput import Meter, Throughput
from trainer.run import Books, RunProgress
from trainer.sharding.placement import placement_of
from trainer.state import TrainState, check_model, check_optimizer
from trainer.steps import check_extensions, check_loss_fn, make_eval_step, make_train_step
from trainer.types import Batch, ExtensionLike, LogCallback, LossFn, Metrics

# Stands for the length of the run where only the structure of an optimizer's state matters.
_SOME_HORIZON = 2**31 - 1

# Where so many steps could go into a call and do not, somebody wants to know.
_MANY_STEPS = 10


class Trainer:
    """Trains an NNX model on the caller's own objective.

    Everything it does is a pure step applied to a state; the docstring of each method shows the
    lines that it stands for. Metrics that it returns from a step are scalars on the device, and
    nothing waits for them until one is read: by the caller, by a logger, or for an average.

    Events are emitted in the order given in `trainer.callbacks`.

    Args:
        model: The module to train. It is copied, and never touched again. With a ``mesh`` it may be a
            callable that makes the module from random streams, ``lambda rngs: Model(rngs=rngs)``, which no
            device ever holds whole then: see `trainer.create_sharded`.
        training_config: How to train.
        optimizer: Any optax transformation; if left out, built from ``training_config``.
        train_data_loader: What `train_epoch` trains on: an iterable of batches, or a callable that
            returns one and may take the batch size.
        val_data_loader: What `train_epoch` validates on, in the same forms.
        workdir: A directory for output; checkpoints go there unless ``checkpoint_dir`` is given.
        rng: The initial key, raw or typed; ``jax.random.PRNGKey(0)`` if left out. It also seeds
            the order in which `train` visits its data.
        loss_fn: The objective, see `trainer.LossFn`.
        metrics_logger: Is told the metrics of training, validation and the end of a run.
        logger: Is told the same as scalars, with the hyperparameters and remarks on the run.
        checkpoint_dir: Where checkpoints without a path go. Made at the first save.
        save_interval: `train` saves a checkpoint every so many steps.
        log_callback: Called as ``log_callback(step, metrics, prefix="train")``, or ``"val"``.
        callbacks: A `trainer.CallbackList`, or any sequence of callbacks.
        extensions: By name, extensions that contribute losses or hooks.
        wrt: Which variables of the model are trained, an nnx filter.
        handle_signals: Whether SIGTERM and Ctrl-C during `train` end it in order.
        steps_per_call: How many steps `train` runs in one call where nothing has to look between them
            (`trainer.fuse_steps`): a validation, a checkpoint, a callback that listens to the events of
            a batch. Logs are told after the call, of every step that is due. "auto" fuses steps that
            compute little, which it tells from the traced step and not from a clock
            (`trainer.fusing`); 1 never does.
        mesh: The devices to train on, see `trainer.make_mesh`; JAX's default device if left out. The numbers
            are those of one device, within rounding. Batches are split over its axes ``data`` and ``fsdp``. Where
            there are several processes each makes the same calls: `train` and `evaluate` are given the same
            data, of which each process takes its part of every batch; any other batch is the part of
            its process. Only process 0 tells loggers anything.
        partition_rules: How the state is split over the mesh, as for `trainer.partition`: names in the model's
            metadata first, then these rules, then the axis ``fsdp``, if the mesh has it.

    Attributes:
        state: The training state. Steps consume it: whoever wants to keep one copies it first.
        history: What was logged, see `trainer.History`.
        epoch: How many epochs this trainer has finished.
        validates: Whether the run that is under way, or the one before, validates on anything.
        throughput: How fast the latest epoch was, see `trainer.Throughput`; None before the first.
        is_primary_process: Whether this process is the one that writes logs, of several that train together.

    Raises:
        ArgumentError: An argument cannot be used; nothing has happened then. Those of a wrong type
            raise `ArgumentTypeError`, contradictions with the configuration `ConfigError`.
    """

    # The arrays, and the state that they make up, once somebody has looked at it.
    _leaves: list[Any]
    _layout: Layout
    _state: TrainState | None

    def __init__(
        self,
        model: nnx.Module | Callable[[nnx.Rngs], nnx.Module],
        training_config: TrainingConfig,
        optimizer: optax.GradientTransformation | None = None,
        train_data_loader: Callable[..., Any] | Iterable[Batch] | None = None,
        val_data_loader: Callable[..., Any] | Iterable[Batch] | None = None,
        workdir: str | os.PathLike[str] | None = None,
        rng: jax.Array | None = None,
        *,
        loss_fn: LossFn,
        metrics_logger: MetricsLoggerLike | None = None,
        logger: Logger | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        save_interval: int = 1000,
        log_callback: LogCallback | None = None,
        callbacks: CallbackList | Iterable[Any] | None = None,
        extensions: Mapping[str, ExtensionLike] | None = None,
        wrt: nnx.filterlib.Filter = nnx.Param,
        handle_signals: bool = True,
        steps_per_call: int | Literal["auto"] = "auto",
        mesh: Mesh | None = None,
        partition_rules: Mapping[str, PartitionSpec] | None = None,
    ) -> None:
        if mesh is None or not callable(model):
            check_model(model)
        _check_config(training_config)
        if optimizer is not None:
            check_optimizer(optimizer)
            _warn_of_unused_schedule(training_config)
        _check_loader(train_data_loader, "train_data_loader")
        _check_loader(val_data_loader, "val_data_loader")
        check_loss_fn(loss_fn)
        if log_callback is not None and not callable(log_callback):
            raise ArgumentTypeError(f"`log_callback` is of type {type(log_callback).__name__}; it must be callable.")

        self.training_config = training_config
        self.train_data_loader = train_data_loader
        self.val_data_loader = val_data_loader
        self.loss_fn = loss_fn
        self.metrics_logger = metrics_logger
        self.logger = logger
        self.log_callback = log_callback
        self.save_interval = check_count(save_interval, "save_interval")
        if steps_per_call != "auto":
            steps_per_call = check_count(steps_per_call, "steps_per_call")
        self.checkpoint_dir = Path(checkpoint_dir or workdir or training_config.checkpoint_dir)
        self.extensions = check_extensions(extensions)
        self.callbacks = as_callback_list(callbacks)
        self._listeners = Listeners((self.callbacks, *self.extensions.values()))
        self.history = History()
        self.epoch = 0
        self._placement = placement_of(mesh, partition_rules)
        self.is_primary_process = self._placement.is_primary_process
        rng = jax.random.PRNGKey(0) if rng is None else rng
        about = {"mesh": str(mesh and dict(mesh.shape)), "partition_rules": str(partition_rules)}
        self._agree("Trainer", {"training_config": training_config.to_dict(), "save_interval": save_interval, **about})
        self._wrt = wrt
        self._given_optimizer = optimizer
        self._horizon = self._horizon_of_loader()
        self._programs = StepPrograms(self._make_step, self._enabled, steps_per_call)
        optimizer = self._build_optimizer(self._horizon or _SOME_HORIZON)
        self.state = self._placement.create(model, optimizer, rng, wrt, self.extensions)
        if not jax.tree.leaves(self.state.params):
            raise ArgumentError(
                f"`model` has no parameters: `wrt` = {wrt!r} selects none of its variables, so there is nothing "
                f"to train."
            )
        self._seed = seed_from_key(rng)
        loggers = [logger] if logger is not None else []
        if training_config.use_wandb and self.is_primary_process:
            loggers.append(WandbLogger(training_config.wandb_project, training_config.name))
        self._reporter = (
            Reporter(log_callback, metrics_logger, loggers) if self.is_primary_process else Reporter(None, None, ())
        )
        self._run = RunProgress()
        self.validates = val_data_loader is not None
        self._pass: LoaderPass | None = None
        # The step that the batch under way will be, and what is to be counted once it is finished.
        self._awaited_step = 0
        self._latest: tuple[int, Metrics, int] = (0, {}, 0)
        self._interruption = Interruption()
        self._saver = BackgroundSaver()
        self._handle_signals = handle_signals
        self.throughput: Throughput | None = None
        self._has_advised = False
        self._compiled_eval_step = jax.jit(make_eval_step(loss_fn), out_shardings=self._placement.replicated)

    @property
    def state(self) -> TrainState:
        """The training state. Assign another one of the same structure to continue from it."""
        if self._state is None:
            self._state = self._layout.state(self._leaves)
        return self._state

    @state.setter
    def state(self, state: TrainState) -> None:
        if not isinstance(state, TrainState):
            raise ArgumentTypeError(f"`state` is of type {type(state).__name__}; it must be a trainer.TrainState.")
        self._state = state = self._placement.adopt(state)
        self._leaves, layout = leaves_of(state)
        replicated = self._placement.replicated
        self._programs.set_layout(
            layout, None if replicated is None else ([leaf.sharding for leaf in self._leaves], replicated)
        )
        self._layout = layout
        # Both are read off the state again when next needed, since this one may come from anywhere.
        self._known_step: int | None = None
        self._known_weights: dict[str, Any] = {}

    @property
    def model(self) -> Any:
        """A new module with a copy of the current values, which training on leaves alone.

        The module that was passed in stays as it was. ``trainer.state.model()`` copies nothing, and
        is gone after the next step.
        """
        return self.state.replace(opt_state=(), extensions={}).copy().model()

    @property
    def step(self) -> int:
        """The number of updates finished. Counted on the host, so asking does not wait."""
        if self._known_step is None:
            self.state.check_alive()
            self._known_step = int(self.state.step)
        return self._known_step

    @property
    def rng(self) -> jax.Array:
        """The key from which every step draws one of its own."""
        return self.state.rng

    @property
    def opt_state(self) -> optax.OptState:
        """The state of the optimizer."""
        return self.state.opt_state

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """What `train_step` updates with: the given or configured optimizer, and gradient clipping.

        Raises:
            ConfigError: Its schedule needs to know when the run ends, and that is not known yet.
        """
        return self._build_optimizer(self._horizon)

    def train_step(self, batch: Batch) -> Metrics:
        """Runs one update.

        Without hooks and loggers it is::

            step = jax.jit(make_train_step(loss_fn, optimizer, extensions=extensions), donate_argnums=0)
            trainer.state, metrics = step(trainer.state, batch)

        Args:
            batch: A mapping of arrays of shape ``(batch_size, ...)``: NumPy, JAX, or whatever NumPy
                can look at in place, such as torch tensors on the CPU.

        Returns:
            Scalars on the device: ``loss``, ``step`` (updates finished, this one included), what
            the objective reports, and ``<name>_loss`` for every enabled extension.

        Raises:
            BatchError: ``batch`` is no such mapping; no hook has been called then.
            ObjectiveError: The objective or an extension breaks its contract.
            StateError: The state was donated to a step outside this trainer.
        """
        batch, examples = self._placement.place_batch(batch, may_be_short=False, at_once=True)
        return self._train_step(batch, examples)

    def compile(self, batch: Batch) -> Compilation:
        """Compiles `train_step` for batches like this one, without running it, and tells what it needs.

        The first step on such a batch compiles nothing then. `train` may fuse steps, which is another
        program of the same memory, but for the batches of a call.

        Args:
            batch: Arrays as for `train_step`, or ``jax.ShapeDtypeStruct``: only shapes and dtypes matter.

        Returns:
            Operations, bytes and memory by XLA's own analysis. A warning says if the device has less.

        Raises:
            BatchError, ObjectiveError, StateError: As for `train_step`.
        """
        batch, _ = self._placement.abstract_batch(batch)
        self.state.check_alive()
        start = time.perf_counter()
        program = self._programs.single()
        compiled = program.compile(self._programs.trace(self._leaves, batch))
        devices = self.state.step.sharding.addressable_devices
        compilation = read_compilation(compiled, time.perf_counter() - start, next(iter(devices)))
        self._tell_compilation(program.name, compilation.seconds, None)
        if not compilation.fits:
            warnings.warn(
                f"a step needs {compilation.total:,} bytes and the device has {compilation.available:,}: it will not "
                f"fit. Smaller batches, jax.checkpoint in the model, or more devices (trainer.sharding) help.",
                stacklevel=2,
            )
        return compilation

    def validate_step(self, batch: Batch) -> Metrics:
        """Evaluates the objective on one batch, in evaluation mode, and logs it as validation.

        Without loggers it is::

            metrics = jax.jit(make_eval_step(loss_fn))(trainer.state, batch)

        Args:
            batch: As for `train_step`.

        Returns:
            Scalars on the device: ``loss``, ``step``, and what the objective reports.

        Raises:
            BatchError, ObjectiveError, StateError: As for `train_step`.
        """
        batch, _ = self._placement.place_batch(batch, at_once=True)
        metrics = self._eval_step(batch, 0)
        self._log("val", self.step, metrics)
        return metrics

    def train_epoch(self, *, resume: bool | str | os.PathLike[str] = False) -> dict[str, float]:
        """Trains on one pass over ``train_data_loader``, then validates on ``val_data_loader``.

        Without hooks, loggers and checkpoints (``save_frequency``) it is::

            for batch in loader(batch_size):
                trainer.state, metrics = step(trainer.state, batch)

        A run that may be interrupted anywhere, and goes on where it was, is::

            while trainer.epoch < num_epochs:
                trainer.train_epoch(resume=True)

        A checkpoint holds the position of a loader that can tell it: the loader, or the iterator
        that it makes, has ``get_state()`` and ``set_state(state)`` (Grain, datarax), or
        ``state_dict()`` and ``load_state_dict(state)`` (torchdata). The batches of any other are
        drawn again and dropped, with a warning, which is right if they come in the same order. An
        iterator without these methods cannot be resumed. A callable is called again for every epoch,
        also for the one that is resumed; ``trainer.epoch`` is its number then.

        Args:
            resume: Continue an interrupted call at its next batch, to the bit, with all that
                ``resume`` of `train` brings back: True or "latest" from the latest undamaged
                checkpoint, or from the checkpoint at a path. A call that was finished when its
                checkpoint was saved returns what it returned then, and the next call goes on. True
                starts an epoch where no checkpoint is, and where this trainer has just finished one.

        Returns:
            The averages of the epoch, each batch counted by its weight, and those of the
            validation as ``val_<name>``.

        Raises:
            ArgumentError: There is no loader, it yielded nothing, or it cannot be resumed.
            BatchError, ObjectiveError: As for `train_step`.
            CheckpointError: The checkpoint cannot be used, or the loader refuses the position in it;
                the trainer is as it was.
        """
        if self.train_data_loader is None:
            raise ArgumentError(
                "`train_data_loader` was not given to the Trainer, and train_epoch() trains on nothing else; "
                "pass one, or call train(data, num_epochs, batch_size)."
            )
        config = self.training_config
        run = RunProgress(
            batch_size=config.batch_size if takes_batch_size(self.train_data_loader) else 0,
            first_epoch=self.epoch,
            first_step=self.step,
            step=self.step,
        )
        self._agree_on_run("train_epoch", {"resume": str(resume)})
        has_finished_one = self._pass is not None and self._pass.over and self._run.batch == 0
        # What this trainer has done itself is not taken back: `while trainer.epoch < n` must come to an end.
        goes_on = has_finished_one and resume in (True, "latest")
        checkpoint = None if goes_on else self._checkpoint_to_resume(resume)
        if checkpoint is None:
            self._reporter.introduce(config.to_dict())
            self._run, self._pass = run, self._pass_over_loader()
            self._begin_epoch()
            self._pass.open()
        else:
            self._resume_epoch(checkpoint, run)
            run = self._run

        def validate() -> None:
            self._validate(one_pass(self.val_data_loader, config.batch_size, "val_data_loader", None))

        self.validates = self.val_data_loader is not None
        if self.epoch == run.first_epoch:
            assert self._pass is not None
            self._run_epoch(
                self._pass,
                save_every=config.save_frequency,
                validate_at_end=validate if self.val_data_loader is not None else None,
            )
            self._saver.wait()
        return {**run.average.compute(), **prefixed("val_", run.validation)}

    def train(
        self,
        train_data: Mapping[str, Any],
        num_epochs: int,
        batch_size: int,
        val_data: Mapping[str, Any] | None = None,
        val_interval: int = 100,
        *,
        resume: bool | str | os.PathLike[str] = False,
    ) -> dict[str, float]:
        """Trains on data in memory.

        Without hooks, loggers, validation and checkpoints (``save_interval``) it is::

            data = InMemoryData(train_data, batch_size)
            for epoch in range(num_epochs):
                for batch in data.shuffled(seed, epoch):
                    trainer.state, metrics = step(trainer.state, batch)

        Small steps are fused, many in a call (``steps_per_call``), which gives the same numbers.

        Every example comes exactly once an epoch, in an order that depends on the initial key and
        the number of the epoch only; the last batch may be short. Validation, logging, saving and
        callbacks change nothing in what is learned.

        SIGTERM and Ctrl-C are obeyed after the step (or the batch of an evaluation) that is under
        way: the state is saved, ``on_train_end`` is emitted, the handlers that were there before are
        restored, and `TrainingInterrupted` or KeyboardInterrupt is raised. A second signal does not
        wait, and may cost the state in memory if it comes in the midst of a step. Where the state is
        not finite any more nothing is saved, so that the checkpoints of before are kept;
        `save_checkpoint` saves whatever there is. Of several processes that train together all stop at
        the same step, whichever got the signal; a second one ends all of them, unsaved.

        Args:
            train_data: A mapping of names to arrays of shape ``(num_examples, ...)``.
            num_epochs: How many epochs to train, on top of those finished.
            batch_size: Examples in a batch.
            val_data: Data to validate on, in the same form.
            val_interval: Validate every so many steps, and at the end.
            resume: Continue an interrupted call with the same arguments at its next batch, to the bit
                (on other devices, or in another number of processes, within rounding): True or
                "latest" from the latest undamaged checkpoint (from the start if there is none), or from
                the checkpoint at a path. History, averages, and callbacks that have ``state_dict()`` and
                ``load_state_dict(state)`` go on as if nothing had happened.

        Returns:
            The final validation averages where ``val_data`` is given, else the averages of the last
            epoch. The whole course is in ``history``.

        Raises:
            ArgumentError, BatchError: An argument cannot be used, or is not that of the interrupted
                call; nothing has happened then.
            CheckpointError: The checkpoint cannot be used; nothing has happened then.
            ObjectiveError: As for `train_step`.
        """
        num_epochs = check_count(num_epochs, "num_epochs")
        batch_size = check_count(batch_size, "batch_size")
        val_interval = check_count(val_interval, "val_interval")
        data = self._in_memory(train_data, batch_size, "train_data")
        held_out = None if val_data is None else self._in_memory(val_data, batch_size, "val_data")
        if batch_size > data.num_examples:
            warnings.warn(
                f"`batch_size` is {batch_size} but `train_data` has {data.num_examples} examples; every epoch is "
                f"one batch of {data.num_examples}.",
                stacklevel=2,
            )
        run = RunProgress(self._seed, data.num_examples, batch_size, self.epoch, self.step, self.step)
        arguments = {"num_epochs": num_epochs, "batch_size": batch_size, "val_interval": val_interval}
        self._agree_on_run("train", {**arguments, "resume": str(resume)}, train_data=data, val_data=held_out)
        checkpoint = self._checkpoint_to_resume(resume)
        if checkpoint is None:
            self._plan(self.step + num_epochs * len(data))
            self._run, self._pass = run, None
        else:
            self._resume(checkpoint, run, num_epochs * len(data))
        run = self._run
        self.validates = held_out is not None

        def validate() -> None:
            assert held_out is not None
            self._validate(held_out.in_order())

        with self._running():
            self._reporter.introduce(self.training_config.to_dict())
            about = f"{num_epochs} epochs of {len(data)} steps, batch size {batch_size}"
            self._reporter.remark("training", about, self.step)
            for epoch in range(self.epoch, run.first_epoch + num_epochs):
                # A run that was to stop there and is resumed at its end stays stopped.
                if run.batch == 0 and epoch > run.first_epoch and self._listeners.should_stop:
                    break
                self._begin_epoch()
                self._run_epoch(
                    data.shuffled(self._seed, epoch, skip=run.batch),
                    save_every=self.save_interval,
                    validate=validate if held_out is not None else None,
                    validate_every=val_interval,
                )
            if run.logged_step != self.step:
                self._log("train", self.step, run.metrics)
            if held_out is None:
                return run.average.compute()
            if run.validation_step != self.step:
                validate()
            if self.metrics_logger is not None and self.is_primary_process:
                self.metrics_logger.log_test_metrics(run.validation)
            return dict(run.validation)

    def evaluate(self, data: Mapping[str, Any], batch_size: int) -> dict[str, float]:
        """Averages the objective over data in memory, every example exactly once.

        It changes nothing, not even the key, and calls no hook and no logger::

            average = WeightedAverage()
            for index, batch in enumerate(InMemoryData(data, batch_size).in_order()):
                average.add(eval_step(trainer.state, batch, index), examples_in(batch))

        Args:
            data: A mapping of names to arrays of shape ``(num_examples, ...)``.
            batch_size: Examples in a batch; the last may be short.

        Returns:
            The averages, each batch counted by its examples or by the ``batch_weight`` that the
            objective reports.

        Raises:
            ArgumentError, BatchError: An argument cannot be used.
            ObjectiveError: The objective breaks its contract.
        """
        held = self._in_memory(data, check_count(batch_size, "batch_size"), "data")
        self._agree_on_run("evaluate", {"batch_size": batch_size}, data=held)
        return self._evaluate(held.in_order())

    def save_checkpoint(self, path: str | os.PathLike[str] | None = None, *, background: bool = False) -> Path:
        """Writes the state under a name, whole or not at all.

        It is ``save_state(path, trainer.state)``, which the name tells the format, and every process
        calls it where the state is spread over several. Without a path the name carries the step, and
        only the latest ``max_checkpoints`` of these are kept. A run can be resumed from one that a
        callback saves, at any event; of the states of callbacks it holds those of that moment, in
        which the ones behind it in the list have not heard of the event yet.

        Args:
            path: The name; ``.orbax`` is for a state on a mesh, ``.pkl`` the reference's pickle layout.
                Without one it is ``checkpoint_<step>.orbax`` where the state lies on a mesh of several
                devices, else ``checkpoint_<step>.msgpack``.
            background: Return as soon as the arrays are copied to the host, and write beside the
                training. What is saved is the state of now. One save is under way at most; what it
                raises is raised by the next step of `train`, the next save or load, or `close`. An
                interpreter that exits waits for it. A pickle is always written at once.

        Returns:
            The path.

        Raises:
            CheckpointError: It could not be written, in any process, or the loader cannot say where it is; earlier
                checkpoints are untouched.
        """
        target = self.checkpoint_dir / default_name(self.step, self.state) if path is None else Path(path)
        snapshot = self.snapshot()

        def write() -> None:
            write_snapshot(target, snapshot)
            if path is None:
                prune(target.parent, self.training_config.max_checkpoints)

        self._saver.wait()
        if background and target.suffix != ".pkl":
            snapshot = snapshot.on_host(target)
            self._saver.start(write)
        else:
            write()
        self._reporter.remark("checkpoint", f"saved {target}", self.step)
        return target

    def snapshot(self) -> Snapshot:
        """Returns what a checkpoint of now holds: the state, the books of the run, and a word about both.

        Nothing is copied: it is to be written before the next step, or copied first.
        """
        config = self.training_config
        info = {
            "name": config.name,
            "metadata": config.to_dict()["metadata"],
            "epoch": self.epoch,
            "metrics": self.history[-1] if self.history else {},
        }
        run, loaders = self._run_to_save()
        progress = {
            "epoch": self.epoch,
            "history": list(self.history),
            "run": run,
            "loaders": loaders,
            "listeners": self._listeners.state_dict(),
        }
        return take_snapshot(self.state, info, progress=progress)

    def close(self) -> None:
        """Waits for a save in the background.

        Raises:
            CheckpointError: It could not be written.
        """
        self._saver.wait()

    def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Restores the state from a file that `save_checkpoint` wrote.

        It is ``trainer.state = load_state(path, like=trainer.state)``: step, parameters, optimizer,
        key, every other variable, and the variables of the extensions, whose weights stay as set.
        The number of epochs, the history and the callbacks' states come back as well. A file that
        does not hold these (a pickle, or one of `save_state`) leaves them as they are, but for the
        rows of the history after its step: they tell of a course that is given up here.

        The next run starts with an epoch of its own. To continue an interrupted one in the middle of
        an epoch, see ``resume`` of `train` and `train_epoch`.

        Raises:
            CheckpointError: The file is damaged or does not fit; the trainer is as it was.
        """
        self._saver.wait()
        self._restore(load_with_progress(path, self.state), RunProgress())
        self._reporter.remark("checkpoint", f"loaded {path}", self.step)

    def _begin_epoch(self) -> None:
        if self._run.batch == 0:
            self._run.average = WeightedAverage()
        self._emit("on_epoch_begin", self.epoch)

    def _run_epoch(
        self,
        batches: Iterator[Batch],
        *,
        save_every: int,
        validate: Callable[[], None] | None = None,
        validate_every: int = 1,
        validate_at_end: Callable[[], None] | None = None,
    ) -> None:
        """Trains on ``batches``, and keeps the books of it in ``self._run``.

        The device is waited for only where somebody reads: each call is dispatched while the one before
        is running, and the batches of the next are made meanwhile.
        """
        epoch, run = self.epoch, self._run
        # An interruption may have come between a step and the validation that was due after it.
        due = run.batch > 0 and self.step % validate_every == 0 and run.validation_step != self.step
        if validate is not None and due:
            validate()
        calls, looking = self._plan_calls(batches, [save_every, *([] if validate is None else [validate_every])])
        meter = Meter(calls.flops)
        with scheduled_collection() as collect:
            while True:
                with meter.preparing():
                    prepared = self._prepare(batches, calls, looking)
                if prepared is None:
                    break
                batch, examples, count = prepared
                if calls.program is not None and count is not None:
                    metrics = self._train_steps(calls.program, batch, count)
                else:
                    self._awaited_step = self.step + 1
                    metrics = self.train_step(batch) if looking else self._train_step(batch, examples, postpone=True)
                run.count(self.step, metrics, examples, count)
                meter.dispatched(metrics["loss"], count or 1, examples)
                with meter.pausing():
                    # A checkpoint comes after the validation of its step, so that the two belong together.
                    if validate is not None and self.step % validate_every == 0:
                        validate()
                    if self.step % save_every == 0:
                        self._save_if_finite(background=True)
                if self._placement.num_processes == 1:  # several wait for it at the same point, before the next save
                    self._saver.check()
                self._interruption.check()
                collect()
        self._reporter.catch_up()
        self.throughput = meter.read(self.state.step.sharding.device_set)
        if validate_at_end is not None and run.validation_step != self.step:
            validate_at_end()
        validation = prefixed("val_", run.validation_of_epoch)
        self.epoch, run.batch = epoch + 1, 0
        self._reporter.report_speed(self.step, self.throughput)
        # Averages wait for the device, so they are taken only where somebody looks.
        if self._listeners.listen("on_epoch_end"):
            self._emit("on_epoch_end", epoch, {**run.average.compute(), **validation})

    def _plan_calls(self, batches: Iterator[Batch], moments: list[int]) -> tuple[Calls, bool]:
        """Decides how many steps go into a call; tells as well whether somebody looks at every batch.

        That is a listener to its events, or a subclass with a ``train_step`` of its own.
        """
        looking = self._listeners.listen("on_batch_begin") or self._listeners.listen("on_batch_end")
        looking = looking or type(self).train_step is not Trainer.train_step
        if not isinstance(batches, EpochOfData) or not batches.full_batches:
            return Calls(), looking
        most = 1 if looking else min(*moments, batches.full_batches_in_epoch)
        batch = self._placement.abstract_batch_of(batches)
        calls = self._programs.calls(self._leaves, batch, most, tuple(moments))
        if looking and calls.worth >= _MANY_STEPS and not self._has_advised:
            self._has_advised = True
            self._reporter.remark(
                "advice",
                f"a step computes so little that {calls.worth} could run in one call, many times faster, but somebody "
                f"listens to on_batch_begin or on_batch_end; on_call_end does not ask for a call a step",
                self.step,
            )
        return calls, looking

    def _prepare(self, batches: Iterator[Batch], calls: Calls, looking: bool) -> tuple[Any, int, int | None] | None:
        """Returns what the next call trains on, the examples in a batch, and the steps if it may be several.

        It is on its way to the device when this returns, unless somebody looks at every batch: then the
        next call waits anyway, and hands it over faster itself.
        """
        if calls.program is not None and isinstance(batches, EpochOfData) and batches.full_batches:
            count = min(calls.room, batches.full_batches, *(every - self.step % every for every in calls.moments))
            return self._placement.next_batches(batches, count, calls.room), batches.batch_size, count
        taken = self._placement.next_batch_from(batches, may_be_short=self._run.batch > 0, at_once=looking)
        return None if taken is None else (*taken, None)

    def _train_step(self, batch: Batch, examples: int, *, postpone: bool = False) -> Metrics:
        """Runs one step with its events. ``postpone``: log it when the next one has been dispatched."""
        self._emit("on_batch_begin", self.step)
        metrics = self._advance(self._programs.single(), 1, batch)
        step = self.step
        self._reporter.catch_up()
        if step == 1 or step % self.training_config.log_frequency == 0:
            self._log("train", step, metrics, postpone=postpone)
        self._latest = step, metrics, examples
        self._emit("on_batch_end", step, metrics)
        self._emit("on_call_end", step, metrics)
        return metrics

    def _train_steps(self, program: Program, batches: Batch, count: int) -> Metrics:
        """Runs several steps in one call; nobody listens to the events of their batches."""
        first, every = self.step + 1, self.training_config.log_frequency
        metrics = self._advance(program, count, batches, self._placement.replicated_int(count))
        self._reporter.catch_up()
        due = set(range(first + -first % every, self.step + 1, every)) | ({1} if first == 1 else set())
        for step in sorted(due):
            self._log("train", step, metrics_at(metrics, step - first), postpone=True)
        self._emit("on_call_end", self.step, metrics_at(metrics, count - 1))
        return metrics

    def _advance(self, program: Program, count: int, *arguments: Any) -> Metrics:
        """Calls a program of ``count`` steps on the state, which it consumes."""
        self._sync_weights()
        step, weights = self.step + count, self._known_weights
        if program.is_new:
            self._emit("on_compile_begin", program.name)
            if self._placement.num_processes > 1:
                self._agree(program.name, {"program": program.text(self._leaves, *arguments)})
        try:
            self._leaves, metrics = program(self._leaves, *arguments)
        except Exception as error:
            self._explain_lost_state(error)
            raise
        self._state, self._known_step, self._known_weights = None, step, weights
        if self._placement.one_call_at_a_time:
            jax.block_until_ready(metrics)
        # Told when the new state is in place: whatever anybody raises at it, nothing is lost.
        if (compilation := program.compilation()) is not None:
            self._tell_compilation(program.name, *compilation)
        found: Metrics = metrics
        return found

    def _tell_compilation(self, what: str, seconds: float, warning: str | None) -> None:
        self._emit("on_compile_end", what, seconds)
        self._reporter.remark("compilation", f"{what} took {seconds:.1f} s to compile", self.step)
        if warning is not None:
            warnings.warn(warning, stacklevel=6)

    def _agree(self, what: str, parts: Mapping[str, Any]) -> None:
        """Compares with the other processes what all are about to do, if they train together.

        Raises:
            DistributedError: In all of them, if one is about to do something else.
        """
        if self._placement.num_processes > 1:
            check_agreement({what: dict(parts)})

    def _agree_on_run(self, what: str, arguments: Mapping[str, Any], **data: InMemoryData | None) -> None:
        if self._placement.num_processes > 1:
            prints = {name: None if one is None else one.fingerprint() for name, one in data.items()}
            place = {"step": self.step, "epoch": self.epoch, "rng": list(self._seed)}
            self._agree(what, {**arguments, **prints, **place})

    def _in_memory(self, data: Mapping[str, Any], batch_size: int, name: str) -> InMemoryData:
        held = InMemoryData(data, batch_size, name)
        if held.num_examples >= batch_size:
            self._placement.check_batch_size(batch_size)
        return held

    def _pass_over_loader(self) -> LoaderPass:
        config = self.training_config
        return LoaderPass(
            self.train_data_loader, config.batch_size, "train_data_loader", config.steps_per_epoch, self._pass
        )

    def _run_to_save(self) -> tuple[dict[str, Any] | None, list[Any] | None]:
        """Returns the run that the state belongs to, None where there is none to resume, and `Books.loaders`."""
        run = self._run
        if run.step != self.step == self._awaited_step == self._latest[0]:
            # The step is done and its batch is not counted yet: on_batch_end is being emitted.
            run = run.copy()
            run.count(*self._latest)
        if run.step != self.step or (run.num_examples == 0 and self._pass is None):
            return None, None
        if self._pass is None:
            return run.to_dict(), None
        run.loader, loaders = self._positions(self._pass, run.batch)
        return run.to_dict(), loaders

    def _positions(self, loader_pass: LoaderPass, finished: int) -> tuple[LoaderPosition, list[Any] | None]:
        """Returns where the loader is, and those of all processes where there are several."""
        if self._placement.num_processes == 1:
            return loader_pass.position(finished), None
        position, failure = LoaderPosition(), ""
        try:
            position = loader_pass.position(finished)
        except CheckpointError as error:  # which the others have to hear of
            failure = str(error)
        found = gathered([dataclasses.asdict(position), failure])
        for process, (_, problem) in enumerate(found):
            if problem:
                raise CheckpointError(f"the loader of process {process} cannot be resumed: {problem}")
        return position, [one for one, _ in found]

    def _checkpoint_to_resume(self, resume: bool | str | os.PathLike[str]) -> Loaded | None:
        if resume is False:
            return None
        self._saver.wait()
        if resume is True or resume == "latest":
            return load_latest(self.checkpoint_dir, self.state)
        return load_with_progress(resume, self.state)

    def _resume(self, checkpoint: Loaded, asked: RunProgress, length: int) -> None:
        """Takes up the run that a checkpoint was saved in, if it is the one that is asked for."""
        run = _run_in(checkpoint)
        if run is None or run.num_examples == 0:
            raise CheckpointError(
                f"`{checkpoint.path}` was not saved during train(), so there is no run to resume; load_checkpoint() "
                f"and train on."
            )
        run.check_same_run(asked)
        self._plan(run.first_step + length)
        self._restore(checkpoint, run)
        self._remark_resumed(checkpoint)

    def _resume_epoch(self, checkpoint: Loaded, asked: RunProgress) -> None:
        """Takes up the call of ``train_epoch`` that a checkpoint was saved in."""
        run = _run_in(checkpoint)
        if run is None or run.num_examples != 0:
            raise CheckpointError(
                f"`{checkpoint.path}` was not saved during train_epoch(), so there is no epoch to resume; "
                f"load_checkpoint() and train on."
            )
        run.check_same_run(asked)
        run.loader = self._own_position(checkpoint, run)
        with self._put_back_on_failure():
            self._restore(checkpoint, run)
            self._pass = self._pass_over_loader()
            if self.epoch == run.first_epoch:
                self._begin_epoch()
            self._pass.open(run.loader or LoaderPosition(), run.batch)
        self._reporter.introduce(self.training_config.to_dict())
        self._remark_resumed(checkpoint)

    def _own_position(self, checkpoint: Loaded, run: RunProgress) -> LoaderPosition | None:
        """Returns where the loader of this process was."""
        loaders = _books_in(checkpoint).loaders or [None]
        if len(loaders) != self._placement.num_processes:
            raise CheckpointError(
                f"`{checkpoint.path}` was saved by {len(loaders)} processes, each with a loader of its own, and there "
                f"are {self._placement.num_processes}; start as many, or train(data), whose order does not depend on "
                f"them."
            )
        if len(loaders) == 1:
            return run.loader
        try:
            return LoaderPosition.from_dict(loaders[jax.process_index()])
        except ValueError as error:
            raise CheckpointError(
                f"`{checkpoint.path}` holds a position that cannot be understood: {error}."
            ) from error

    def _remark_resumed(self, checkpoint: Loaded) -> None:
        where = f"epoch {self.epoch}, batch {self._run.batch}"
        self._reporter.remark("checkpoint", f"resumed {checkpoint.path}, {where}", self.step)

    def _restore(self, checkpoint: Loaded, run: RunProgress) -> None:
        books = _books_in(checkpoint)
        with self._put_back_on_failure():
            self._listeners.load_state_dict(books.listeners)
            self.state = checkpoint.state
            self._run, self._pass = run, None
            self.epoch = self.epoch if books.epoch is None else books.epoch
            if books.history is None:
                self.history.rewind(self.step)
            else:
                self.history.restore(books.history)

    @contextlib.contextmanager
    def _put_back_on_failure(self) -> Iterator[None]:
        """Makes what is restored within it all or nothing."""
        state, run, loader_pass, epoch, rows = self.state, self._run, self._pass, self.epoch, list(self.history)
        listeners = copy.deepcopy(self._listeners.state_dict())
        try:
            yield
        except BaseException:
            self.state = state
            self._run, self._pass, self.epoch = run, loader_pass, epoch
            self.history.restore(rows)
            with contextlib.suppress(CheckpointError):  # from one that refuses its own state
                self._listeners.load_state_dict(listeners)
            raise

    def _validate(self, batches: Iterator[Batch]) -> None:
        self._emit("on_validation_begin")
        averages = self._evaluate(batches)
        self._run.validation_step, self._run.validation = self.step, averages
        self._log("val", self.step, averages)
        self._emit("on_validation_end", averages)

    def _evaluate(self, batches: Iterator[Batch]) -> dict[str, float]:
        average = WeightedAverage()
        for index, (batch, examples) in enumerate(
            iter(functools.partial(self._placement.next_batch_from, batches), None)
        ):
            average.add(self._eval_step(batch, index), examples)
            self._interruption.check()
        return average.compute()

    def _eval_step(self, batch: Batch, index: int) -> Metrics:
        try:
            metrics: Metrics = self._compiled_eval_step(self.state, batch, self._placement.replicated_int(index))
            return jax.block_until_ready(metrics) if self._placement.one_call_at_a_time else metrics
        except Exception as error:
            self._explain_lost_state(error)
            raise

    def _make_step(self) -> Callable[..., tuple[TrainState, Metrics]]:
        return make_train_step(self.loss_fn, self.optimizer, wrt=self._wrt, extensions=self.extensions)

    def _enabled(self) -> tuple[str, ...]:
        return tuple(name for name, extension in self.extensions.items() if extension.is_enabled())

    def _sync_weights(self) -> None:
        """Brings the weights that the extension objects have now into the state, if any changed."""
        weights = {name: extension.weight for name, extension in self.extensions.items()}
        if weights == self._known_weights:
            return
        held = self.state.extensions
        step = self._known_step
        self.state = self.state.replace(
            extensions={
                name: {**held[name], "weight": jnp.asarray(weight, held[name]["weight"].dtype)}
                for name, weight in weights.items()
            }
        )
        self._known_step, self._known_weights = step, weights

    def _build_optimizer(self, total_steps: int | None) -> optax.GradientTransformation:
        config = self.training_config
        optimizer = self._given_optimizer
        if optimizer is None:
            rate = config.optimizer.learning_rate
            schedule = None if config.scheduler is None else make_schedule(config.scheduler, rate, total_steps)
            optimizer = make_optimizer(config.optimizer, schedule)
        if config.gradient_clip_norm is None:
            return optimizer
        return optax.chain(optax.clip_by_global_norm(config.gradient_clip_norm), optimizer)

    def _horizon_of_loader(self) -> int | None:
        config = self.training_config
        loader: Any = self.train_data_loader
        steps = config.steps_per_epoch
        if steps is None and isinstance(loader, Iterable) and isinstance(loader, Sized):
            with contextlib.suppress(TypeError):  # an iterable-style torch loader has no length after all
                steps = len(loader)
        return None if steps is None else steps * config.num_epochs

    def _plan(self, total_steps: int) -> None:
        """Tells the schedule when the run will end, if it depends on that."""
        scheduler = self.training_config.scheduler
        if self._given_optimizer is not None or scheduler is None or not needs_horizon(scheduler):
            return
        if total_steps != self._horizon:
            self._build_optimizer(total_steps)  # raises before anything is changed
            self._horizon = total_steps
            self._programs.clear()

    def _emit(self, event: str, *args: Any) -> None:
        self._listeners.emit(event, self, *args)

    @contextlib.contextmanager
    def _running(self) -> Iterator[None]:
        """Emits the first and the last event of a run, whatever happens between, and minds signals."""
        together = self._placement.num_processes > 1
        watching = self._interruption.watching(together=together) if self._handle_signals else contextlib.nullcontext()
        with watching:
            try:
                self._emit("on_train_begin")
                yield
                self._saver.wait()
                # One that came after the last step must not be lost: somebody wants the process to end.
                self._interruption.check()
            except BaseException as error:
                with contextlib.suppress(Exception):  # what was measured before is told, if it can be
                    self._reporter.catch_up()
                try:
                    self._finish_saves(error)
                finally:  # also where a second signal ends the saving
                    for failure in self._listeners.emit_to_all("on_train_end", self):
                        error.add_note(f"and on_train_end raised {failure!r}")
                # XLA makes an error of its own of one that is raised in a host callback of the objective.
                if self._interruption.insisted and isinstance(error, Exception):
                    raise self._interruption.exception() from error
                raise
            else:
                for failure in self._listeners.emit_to_all("on_train_end", self):
                    raise failure
                if self._interruption.settle():  # during that
                    late = self._interruption.exception()
                    self._finish_saves(late)
                    raise late
            finally:
                self._interruption.received = None

    def _finish_saves(self, error: BaseException) -> None:
        """Waits for the save under way and, if a signal came, saves for `resume`; no failure hides the error."""
        try:
            self._saver.wait()
        except Exception as unsaved:
            error.add_note(f"and a save in the background raised {unsaved!r}")
        if self._interruption.received is None:
            return
        try:
            path = self._save_if_finite()
        except Exception as failure:
            error.add_note(f"the state could not be saved: {failure}")
            return
        if path is not None:
            error.add_note(f"the state was saved to {path}; train(..., resume=True) goes on from it")
        if isinstance(error, TrainingInterrupted):
            error.path = path

    def _save_if_finite(self, *, background: bool = False) -> Path | None:
        if bool(self.state.is_finite()):
            return self.save_checkpoint(background=background)
        warnings.warn(
            f"the state is not finite any more at step {self.step}; it was not saved, and earlier checkpoints stay.",
            stacklevel=2,
        )
        return None

    def _log(self, prefix: str, step: int, metrics: Mapping[str, Any], *, postpone: bool = False) -> None:
        """Records metrics, and tells them to everyone who asked. ``prefix``: "train" or "val"."""
        self.history.record(step, metrics, prefix="" if prefix == "train" else "val_")
        if prefix == "train":
            self._run.logged_step = step
        (self._reporter.postpone if postpone else self._reporter.report)(prefix, step, metrics)

    def _explain_lost_state(self, error: Exception) -> None:
        try:
            self.state.check_alive()
        except StateError as lost:
            if "deleted" in str(error) or "donated" in str(error):
                raise lost from error
            error.add_note("the state was donated to the step that failed and is gone; load a checkpoint to go on")


def _books_in(checkpoint: Loaded) -> Books:
    try:
        return Books.from_dict(checkpoint.progress or {})
    except ValueError as error:
        raise CheckpointError(f"`{checkpoint.path}` holds a progress that cannot be used: {error}.") from error


def _run_in(checkpoint: Loaded) -> RunProgress | None:
    """Returns the run that a checkpoint was saved in, None if it was saved in none."""
    books = _books_in(checkpoint)
    if not books.run:
        return None
    try:
        run = RunProgress.from_dict(books.run)
    except ValueError as error:
        raise CheckpointError(f"`{checkpoint.path}` holds a run that cannot be understood: {error}.") from error
    if run.step != int(checkpoint.state.step) or books.epoch is None or run.first_epoch > books.epoch:
        raise CheckpointError(
            f"`{checkpoint.path}` holds a run that cannot be understood: it is at step {run.step} and began in epoch "
            f"{run.first_epoch}, but the state is at step {int(checkpoint.state.step)} in epoch {books.epoch}."
        )
    return run


def _check_config(config: Any) -> None:
    if not isinstance(config, TrainingConfig):
        hint = " TrainingConfig.from_dict makes one." if isinstance(config, Mapping) else ""
        raise ArgumentTypeError(
            f"`training_config` is of type {type(config).__name__}; it must be a trainer.TrainingConfig.{hint}"
        )


def _check_loader(loader: Any, name: str) -> None:
    if loader is not None and not callable(loader) and not isinstance(loader, Iterable):
        raise ArgumentTypeError(
            f"`{name}` is of type {type(loader).__name__}; it must be an iterable of batches, or a callable that "
            f"returns one."
        )


def _warn_of_unused_schedule(config: TrainingConfig) -> None:
    if config.scheduler is not None:
        warnings.warn(
            "`training_config.scheduler` does nothing, because an `optimizer` was given; put the schedule into "
            "that one, for example with trainer.make_schedule.",
            stacklevel=3,
        )
