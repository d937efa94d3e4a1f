"""`Trainer`: holds a `Run`, and replaces it with the run that a pure function returns."""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self

import jax
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from trainer.callbacks.base import CallbackList
from trainer.callbacks.progress import Progress
from trainer.compile.cost import ProgramCost
from trainer.compile.fusion import FusionPolicy
from trainer.config import TrainingConfig
from trainer.core.checks import check_count
from trainer.core.other_names import takes_no
from trainer.core.precision import Precision
from trainer.core.report import Measure
from trainer.errors import ArgumentTypeError
from trainer.fit import epochs
from trainer.fit import resume as resuming
from trainer.fit.assemble import assemble
from trainer.fit.common_batches import compare_single
from trainer.fit.compilation import compile_step
from trainer.fit.finite import hold_if_finite
from trainer.fit.inspection import Inspection
from trainer.fit.plan import plan_epoch, plan_evaluation, plan_run
from trainer.loggers.base import Logger, MetricsLoggerLike, prefixed
from trainer.loop import evaluate, evaluate_batch
from trainer.run import Run
from trainer.state import TrainState
from trainer.types import Batch, EvalParams, ExtensionLike, LogCallback, LossFn, Metrics, NonFinite, Remat, StepFn


class Trainer(Inspection):
    """Trains an NNX model on the caller's own objective.

    Each operation is a pure function of the run; the docstring of a method shows the functional lines it equals.
    Metrics of a step are scalars on the device; nothing waits for them until one is read. Events: `trainer.callbacks`.

    Args:
        model: The module to train. It is copied and never modified. Submodules in evaluation mode stay in it (frozen
            batch statistics, disabled dropout); a warning is given if all are. With a ``mesh`` it may be a callable
            that makes the module, ``lambda rngs: Model(rngs=rngs)``: then no device ever holds the whole model. Or a
            state to start from, which is copied; the key is then the state's, and ``wrt`` the one it was created with.
            ``state.replace(opt_state=optimizer.init(state.params))`` starts a new optimizer; with the ``opt_state`` of
            another optimizer, the state can be evaluated but not trained (`ArgumentError`).
        training_config: How to train.
        optimizer: Any optax transformation; if left out, it is built from ``training_config``.
        train_data_loader: What `train_epoch` trains on: an iterable of batches, or a callable that returns one and
            may take ``batch_size`` and ``epoch``. ``training_config`` limits the passes over endless loaders.
        val_data_loader: What `train_epoch` validates on, in the same forms.
        workdir: A directory for one run. Checkpoints, including the final one, go there without ``checkpoint_dir``.
        rng: The initial key, raw or typed, or an integer seed for it, by default 0. It also seeds the data order.
        loss_fn: The objective, see `trainer.LossFn`.
        metrics_logger: Receives the metrics of training, of validation, and of the end of a run.
        logger: A logger, or several: they get the same metrics, epoch averages, texts, … The caller closes them.
        checkpoint_dir: The directory for checkpoints without a path, created at the first save.
        save_interval: `train` saves a checkpoint at multiples of this step; None: only at its end. Without a directory,
            the default saves none; another number or ``resume`` asks for them.
        log_callback: Called as ``log_callback(step, metrics, prefix="train")``, or ``"val"``.
        callbacks: A `trainer.CallbackList`, or any sequence of callbacks.
        extensions: Extensions that contribute losses or handle events, by name.
        wrt: Which variables of the model are trained: an nnx filter, or path patterns (`trainer.by_path`).
        eval_params: Maps ``(opt_state, params)`` to the params for evaluation and prediction, see `make_eval_step`.
        handle_signals: Whether SIGTERM and Ctrl-C end a run cleanly, with a save.
        steps_per_call: How many steps to fuse into a call; "auto" or a `FusionPolicy` fuses small steps, 1 fuses none.
        mesh: The devices to train on, see `trainer.make_mesh`; JAX's default device if left out. Results equal those
            of one device, within rounding. With several processes, each makes the same calls; in-memory data is the
            same in all, a loader's batch is the local part, and only process 0 logs.
        partition_rules: How the state is split over the mesh, see `trainer.partition`.
        step_fn: Your own step in place of ``make_train_step(loss_fn, optimizer)``, see `trainer.StepFn`.
            ``loss_fn`` then only validates and evaluates, and may be None.
        nonfinite, report, accumulate_steps, precision, remat: See `make_train_step`. ``precision`` also applies to
            evaluation, and with a ``step_fn`` only to evaluation. With ``nonfinite="raise"`` the trainer raises
            `NonFiniteError` when it next reads metrics, validates or saves, and keeps the state before that step.
        pad_to: "batch" pads short batches to ``batch_size`` rows, so that they do not recompile, and adds a ``mask``
            to every batch for the objective to average with, see `trainer.pad_batch`.
        prefetch: How many batches of a training or validation loader a thread fetches in advance, see `prefetched`.
        params_average: Such as ``ema_of_params(0.999)``: appended to the optimizer; ``eval_params`` is its average.
        fast_dev_run: Run one epoch with this many batches (True is 1) of training and of validation, as a check:
            nothing is logged, only your own calls save, and callbacks that save are left out.
        overfit_batches: Train only on the first this many batches, the same in every epoch, and validate on them if
            validation data are given: a model that cannot learn these has a bug.
        debug: Check every step before applying it, see `trainer.make_check_step`: ``checkify`` checks in the
            objective raise, and non-finite values are traced to a module. Several times slower.
        progress: Whether to show the progress of a run on standard error; or a `trainer.Progress`.

    Attributes:
        run: The state and the record of the run; the content of a checkpoint. The only attribute that changes.
        setup: The parts that never change.

    Raises:
        ArgumentError: An argument cannot be used; nothing has happened then. `ArgumentTypeError` if its type is
            wrong, `ConfigError` if it contradicts the configuration.
    """

    __slots__ = ("__weakref__", "run", "setup")

    @takes_no("Trainer")
    def __init__(
        self,
        model: nnx.Module | Callable[[nnx.Rngs], nnx.Module] | TrainState,
        training_config: TrainingConfig,
        optimizer: optax.GradientTransformation | None = None,
        train_data_loader: Callable[..., Any] | Iterable[Batch] | None = None,
        val_data_loader: Callable[..., Any] | Iterable[Batch] | None = None,
        workdir: str | os.PathLike[str] | None = None,
        rng: jax.Array | int | None = None,
        *,
        loss_fn: LossFn | None,
        metrics_logger: MetricsLoggerLike | None = None,
        logger: Logger | Sequence[Logger] | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        save_interval: int | None = 1000,
        log_callback: LogCallback | None = None,
        callbacks: CallbackList | Iterable[Any] | None = None,
        extensions: Mapping[str, ExtensionLike] | None = None,
        wrt: nnx.filterlib.Filter = nnx.Param,
        eval_params: EvalParams | None = None,
        handle_signals: bool = True,
        steps_per_call: int | Literal["auto"] | FusionPolicy = "auto",
        mesh: Mesh | None = None,
        partition_rules: Mapping[str, PartitionSpec] | None = None,
        step_fn: StepFn | None = None,
        nonfinite: NonFinite = "ignore",
        report: Iterable[str] | Mapping[str, Measure] = (),
        accumulate_steps: int = 1,
        pad_to: Literal["batch"] | None = None,
        prefetch: int = 0,
        params_average: optax.GradientTransformation | None = None,
        precision: str | Precision | None = None,
        remat: Remat = None,
        fast_dev_run: bool | int = False,
        overfit_batches: int | None = None,
        debug: bool = False,
        progress: bool | Progress = True,
    ) -> None:
        arguments = {name: value for name, value in locals().items() if name != "self"}
        self.setup, self.run = assemble(self, **arguments)

    def train_step(self, batch: Batch) -> Metrics:
        """Runs one update.

        Without events and loggers it is::

            step = jax.jit(make_train_step(loss_fn, optimizer, extensions=extensions), donate_argnums=0)
            trainer.state, metrics = step(trainer.state, batch)

        Args:
            batch: A pytree of arrays, usually of shape ``(batch_size, ...)``: NumPy, JAX, or anything that NumPy can
                view without a copy, such as torch tensors on the CPU.

        Returns:
            Scalars on the device: ``loss``, ``step`` (updates finished, this one included), the metrics of the
            objective, and ``<name>_loss`` for every enabled extension.

        Raises:
            BatchError: ``batch`` is not such a pytree; no event has been emitted then.
            ObjectiveError: The objective or an extension breaks its contract.
            StateError: The state was donated to a step outside this trainer, or edited after that.
        """
        drawn = self.run.drawn is not None  # the loop drew this batch, and has already copied it
        batch = batch if drawn else self.setup.with_mask(batch)
        batch, _ = self.setup.placement.place_batch(batch, may_be_short=False, at_once=True, is_private=drawn)
        return epochs.train_step(self, batch)

    def validate_step(self, batch: Batch) -> Metrics:
        """Evaluates the objective on one batch, in evaluation mode, and logs it as validation.

        Arguments, results and errors are those of `train_step`. Without loggers it is::

            metrics = jax.jit(make_eval_step(loss_fn))(trainer.state, batch)
        """
        batch, _ = self.setup.placement.place_batch(self.setup.with_mask(batch), at_once=True)
        compare_single(self.setup.live.passes, self.setup.placement, "validate_step", batch)
        state = self.run.state_with_edits()
        metrics = evaluate_batch(self.setup.eval_step, state, batch, 0, self.setup.placement)
        self.hold(self.run.recorded(metrics, prefix="val_"))
        self.setup.fanout.report("val", self.step, metrics)
        return metrics

    def train_epoch(self, *, resume: bool | str | os.PathLike[str] = False) -> dict[str, float]:
        """Makes one training pass over ``train_data_loader``, then validates on ``val_data_loader`` if it is due.

        It equals `train` for one epoch over that loader, with ``training_config.save_frequency`` in place of
        ``save_interval``. Consecutive calls form one run: early stopping counts across them, and
        ``trainer.should_stop`` is true once it triggers. A loop that can be interrupted anywhere is::

            while trainer.epoch < num_epochs and not trainer.should_stop:
                trainer.train_epoch(resume=True)

        A checkpoint holds the position of a loader that exposes it: the loader, or the iterator that it makes, has
        ``get_state()`` and ``set_state(state)`` (Grain, datarax), or ``state_dict()`` and ``load_state_dict(state)``
        (torchdata). Other loaders are replayed up to the position, with a warning; an iterator is refused.

        Args:
            resume: As for `train`. A call that had finished when its checkpoint was saved returns its old result.
                True starts an epoch if there is no checkpoint, or if this trainer has just finished an epoch.

        Returns:
            The averages of the epoch, weighted by batch weight, and those of the validation as ``val_<name>``.

        Raises:
            ArgumentError: There is no loader, it yielded nothing, or it cannot be resumed.
            BatchError, ObjectiveError: As for `train_step`.
            CheckpointError: The checkpoint cannot be used, or the loader rejects its position; nothing has changed.
        """
        plan = plan_epoch(self.setup, self.run, resume)
        run = epochs.fit(self, plan, resume)
        return {**run.average.compute(), **prefixed("val_", run.validation_of_step)}

    @takes_no("Trainer.train")
    def train(
        self,
        train_data: Any | Callable[..., Any] | Iterable[Batch],
        num_epochs: int,
        batch_size: int,
        val_data: Any | Callable[..., Any] | Iterable[Batch] | None = None,
        val_interval: int | None = 100,
        *,
        resume: bool | str | os.PathLike[str] = False,
    ) -> dict[str, float]:
        """Trains on in-memory data or on a loader.

        Without events, loggers, validation and checkpoints (``save_interval``) it is::

            data = InMemoryData(train_data, batch_size)
            for epoch in range(num_epochs):
                for batch in data.shuffled(seed, epoch):
                    trainer.state, metrics = step(trainer.state, batch)

        Every in-memory example is visited exactly once per epoch, in an order that depends only on the initial key
        and the epoch number; the last batch may be short. Small steps are fused, many in a call. Validation,
        logging, saving and callbacks do not change what is learned.

        SIGTERM and Ctrl-C take effect after the current step (or the current batch of an evaluation), the same one in
        all processes: the state is saved, ``on_train_end`` is emitted, and `TrainingInterrupted` or KeyboardInterrupt
        is raised. A second signal does not wait, and may lose the state in memory. Periodic saves skip a non-finite
        state, so that earlier checkpoints are kept.

        Args:
            train_data: A pytree of arrays of shape ``(num_examples, ...)``: a dict, a tuple, a registered dataclass;
                or a loader, as ``train_data_loader`` of the constructor. A list is a loader of batches.
            num_epochs, batch_size: How many more epochs to train; the number of examples in a batch.
            val_data: Data to validate on, in the same forms.
            val_interval: Validate at multiples of this step (None: at none), and at the end of every epoch, or of every
                ``epochs_per_validation``-th.
            resume: Continue an interrupted call at its next batch, bit for bit (on other devices, or with another
                number of processes, within rounding). True or "latest": from the latest undamaged checkpoint, or from
                the start if there is none, or if this trainer has itself just trained a call to its end; a path: from
                that checkpoint. With ``fast_dev_run`` nothing is resumed, but a path must be that of a checkpoint.
                History, averages and callback states are restored.
                Different data, batches or keys are refused; a warning names any other changed argument.

        Returns:
            The final validation averages if ``val_data`` is given, else the averages of the last epoch.

        Raises:
            ArgumentError, BatchError: An argument cannot be used, or differs from the interrupted call in a way that
                ``resume`` does not allow; nothing has happened then.
            CheckpointError: The checkpoint cannot be used; nothing has happened then.
            ObjectiveError: As for `train_step`.
        """
        counts = {"num_epochs": num_epochs, "batch_size": batch_size, "val_interval": val_interval}
        plan = plan_run(self.setup, self.run, train_data, val_data, resume, **counts)
        run = epochs.fit(self, plan, resume)
        return dict(run.validation.averages) if plan.held_out and run.validation else run.average.compute()

    @takes_no("Trainer.evaluate")
    def evaluate(self, data: Any, batch_size: int) -> dict[str, float]:
        """Averages the objective over in-memory data or a loader, every example exactly once.

        It changes nothing, not even the key, and emits no event. For in-memory data it is::

            evaluate(eval_step, trainer.state, InMemoryData(data, batch_size).in_order())

        Args:
            data: In-memory data or a loader, as ``train_data`` of `train`.
            batch_size: Examples in a batch; the last may be short.

        Returns:
            The averages, weighted by example or by the ``batch_weight`` that the objective reports.

        Raises:
            ArgumentError, BatchError, ObjectiveError: An argument cannot be used, or the objective breaks its contract.
        """
        plan = plan_evaluation(self.setup, self.run, data, check_count(batch_size, "batch_size"))
        state = self.run.state_with_edits()
        with plan as batches, self.setup.evaluating(state):
            return evaluate(self.setup.eval_step, state, batches, placement=self.setup.placement)

    def set_learning_rate(self, value: float) -> None:
        """Sets the learning rate from the next step on. Callbacks may call it; checkpoints include the rate.

        It is ``trainer.state = trainer.state.with_learning_rate(value)``, and raises the same errors.
        """
        self.hold(self.setup.with_learning_rate(self.run, value))

    @takes_no("Trainer.compile")
    def compile(self, batch: Batch, *, without_remat: bool = False) -> ProgramCost:
        """Compiles `train_step` for batches like this one, without running it, and returns its cost.

        Args:
            batch: Arrays as for `train_step`, or ``jax.ShapeDtypeStruct``: only shapes and dtypes matter.
            without_remat: Also compile the step without ``remat``, to report the memory that ``remat`` saves.

        Returns:
            Operations, bytes and memory from XLA's own analysis. Warns if the device has less memory.
        """
        return compile_step(self, batch, without_remat)

    def save_checkpoint(
        self, path: str | os.PathLike[str] | None = None, *, background: bool | Literal["if_finite"] = False
    ) -> Path:
        """Saves a checkpoint of the run, atomically, and returns its path.

        It is ``save_run(path, trainer.run)``, with the states of the callbacks. If the state is spread over several
        processes, all of them call it. Without a path the name contains the step, and the run keeps the last
        ``max_checkpoints`` of these that it wrote. A callback may save in any event, and a run can resume from that
        checkpoint; for callbacks later in the list, it holds their states before the event.

        Args:
            path: The name; its extension decides the format, see `trainer.save_state`. The default is
                ``checkpoint_<step>.orbax`` for a state on a mesh of several devices, else ``….msgpack``.
            background: Return as soon as a copy of the arrays is dispatched, and write in a thread. At most one
                save is in flight; the next step of `train`, save or load, or `close`, raises its error.
                "if_finite", which `train` uses, writes nothing, and warns later, if the state holds NaN or infinity.

        Raises:
            ArgumentError: The extension is that of another program's format.
            CheckpointError: Writing failed, in any process; earlier checkpoints are untouched.
        """
        hold_if_finite(self)
        run, beside = self.setup.beside(self.run)
        target = self.setup.checkpointer.save(run, path, background=background, **beside)
        self.setup.tell_saving(target, self.step)
        return target

    def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Restores what `save_checkpoint` wrote: it is ``trainer.run = load_run(path, trainer.run)``.

        It restores state, epoch count, history and callback states; extension weights stay as set. What a file does
        not hold (a pickle, weights, a file from `save_state`) stays unchanged, except that history rows after its
        step are dropped. The next run starts a new epoch; to continue an interrupted one see ``resume``.

        Raises:
            CheckpointError: The file is damaged or does not fit; the trainer is unchanged.
        """
        resuming.load(self, path)

    def close(self) -> None:
        """Ends a run of `train_epoch`: saves it, waits (`CheckpointError` if it failed), closes the loggers it made.

        ``EarlyStopping(restore_best=True)`` restores, if params changed only in calls and no exception leaves ``with``.
        """
        epochs.finish(self)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if kind is not None:
            epochs.keep_latest(self)
        self.close()

    def hold(self, run: Run) -> None:
        """Replaces the run: the only place where a trainer changes."""
        self.run = run

    @property
    def state(self) -> TrainState:
        """The training state; the next step donates it. Assign another to continue from a copy, as to `opt_state`."""
        return self.run.state

    @state.setter
    def state(self, state: TrainState) -> None:
        if not isinstance(state, TrainState):
            raise ArgumentTypeError(f"`state` is of type {type(state).__name__}; it must be a trainer.TrainState.")
        self.hold(self.setup.with_state(self.run, state))

    @Inspection.opt_state.setter
    def opt_state(self, opt_state: Any) -> None:
        self.hold(self.setup.with_state(self.run, self.run.state.replace(opt_state=opt_state)))
