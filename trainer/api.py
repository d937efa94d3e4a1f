"""`Trainer`: holds a `Run`, and replaces it by the run that a pure function returns."""

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
from trainer.config import TrainingConfig
from trainer.core.checks import check_count
from trainer.core.other_names import takes_no
from trainer.core.precision import Precision
from trainer.core.report import Measure
from trainer.errors import ArgumentTypeError
from trainer.fit import epochs
from trainer.fit import resume as resuming
from trainer.fit.assemble import assemble
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

    All that it does is a pure function of the run that it holds; docstrings of methods show the lines they stand for.
    Metrics of a step are scalars on the device; nothing waits for them until one is read. Events: `trainer.callbacks`.

    Args:
        model: The module to train. It is copied, and never touched again. Parts in evaluation mode stay in it (frozen
            batch statistics, dropout that is off); a warning says if all are. With a ``mesh`` it may be a callable that
            makes the module, ``lambda rngs: Model(rngs=rngs)``: then no device ever holds all of it. Or a state to
            start from, of which a copy is made; its key is the state's, and ``wrt`` is that which it was created with.
        training_config: How to train.
        optimizer: Any optax transformation; if left out, it is built from ``training_config``.
        train_data_loader: What `train_epoch` trains on: an iterable of batches, or a callable that returns one and
            may take ``batch_size``. ``training_config`` bounds the passes over endless loaders.
        val_data_loader: What `train_epoch` validates on, in the same forms.
        workdir: A directory for one run; checkpoints go there unless ``checkpoint_dir`` is given, the last step's too.
        rng: The initial key, raw or typed, or an integer to make it of, by default 0. It also seeds the order of data.
        loss_fn: The objective, see `trainer.LossFn`.
        metrics_logger: Receives the metrics of training, of validation, and of the end of a run.
        logger: Receives the same as scalars, averages of epochs, texts, …; or several. The caller closes them.
        checkpoint_dir: Where checkpoints without a path go. It is made at the first save.
        save_interval: `train` saves a checkpoint at multiples of this step; None: at its end only.
        log_callback: Called as ``log_callback(step, metrics, prefix="train")``, or ``"val"``.
        callbacks: A `trainer.CallbackList`, or any sequence of callbacks.
        extensions: By name, extensions that contribute losses or handle events.
        wrt: Which variables of the model are trained: an nnx filter, or patterns of paths (`trainer.by_path`).
        eval_params: From ``(opt_state, params)`` to the params to evaluate and predict with, see `make_eval_step`.
        handle_signals: Whether SIGTERM and Ctrl-C end a run in order, saved.
        steps_per_call: How many steps to fuse into a call. "auto": many that compute little (`FusionPolicy`); 1: none.
        mesh: The devices to train on, see `trainer.make_mesh`; JAX's default device if left out. The numbers are
            those of one device, within rounding. With several processes, each makes the same calls; data in
            memory is the same in all, a batch is the part of its process, and process 0 alone logs.
        partition_rules: How the state is split over the mesh, see `trainer.partition`.
        step_fn: A step of your own in place of ``make_train_step(loss_fn, optimizer)``, see `trainer.StepFn`.
            ``loss_fn`` then only validates and evaluates, and may be None.
        nonfinite, report, accumulate_steps, precision, remat: Of the step, see `make_train_step`. Evaluations have the
            ``precision`` too; beside a ``step_fn`` only they have. With ``nonfinite="raise"`` the trainer raises
            `NonFiniteError` when it next reads metrics, validates or saves, and holds the state of before.
        pad_to: "batch" pads short batches to ``batch_size`` rows, so that they compile nothing new, and adds to every
            batch a ``mask`` by which the objective averages, see `trainer.pad_batch`.
        prefetch: How many batches of a loader, of training or validation, a thread draws ahead, see `prefetched`.
        params_average: Such as ``ema_of_params(0.999)``: last of the optimizer, and its average the ``eval_params``.
        fast_dev_run: So many batches (True is 1) of training and of validation in one epoch, to see that all works:
            nothing is logged, and nothing saved but by your own calls; callbacks that save are left out.
        overfit_batches: Train on the first so many batches only, the same in every epoch, and validate on them where
            validation data are given: a model that cannot learn these has a bug.
        debug: Look into every step before it is made, see `trainer.make_check_step`: checks of ``checkify`` in the
            objective raise, and what is not finite is traced to a module. Several times slower.
        progress: Whether to show, on standard error, how far a run is; or a `trainer.Progress`.

    Attributes:
        run: What a checkpoint holds: the state, and the record that travels with it. The only attribute that changes.
        setup: The parts that never change.

    Raises:
        ArgumentError: An argument cannot be used; nothing has happened then. One of a wrong type raises
            `ArgumentTypeError`, a contradiction with the configuration `ConfigError`.
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
        steps_per_call: int | Literal["auto"] = "auto",
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
            batch: A pytree of arrays, mostly of shape ``(batch_size, ...)``: NumPy, JAX, or what NumPy can view in
                place, such as torch tensors on the CPU.

        Returns:
            Scalars on the device: ``loss``, ``step`` (updates finished, this one included), what the objective
            reports, and ``<name>_loss`` for every enabled extension.

        Raises:
            BatchError: ``batch`` is no such tree; no event has been emitted then.
            ObjectiveError: The objective or an extension breaks its contract.
            StateError: The state was donated to a step outside this trainer, or edited after that.
        """
        drawn = self.run.drawn is not None  # by the loop, which has copied it
        batch = batch if drawn else self.setup.with_mask(batch)
        batch, _ = self.setup.placement.place_batch(batch, may_be_short=False, at_once=True, is_private=drawn)
        return epochs.train_step(self, batch)

    def validate_step(self, batch: Batch) -> Metrics:
        """Evaluates the objective on one batch, in evaluation mode, and logs it as validation.

        Arguments, results and errors are those of `train_step`. Without loggers it is::

            metrics = jax.jit(make_eval_step(loss_fn))(trainer.state, batch)
        """
        batch, _ = self.setup.placement.place_batch(self.setup.with_mask(batch), at_once=True)
        state = self.run.state_with_edits()
        metrics = evaluate_batch(self.setup.eval_step, state, batch, 0, self.setup.placement)
        self.hold(self.run.recorded(metrics, prefix="val_"))
        self.setup.fanout.report("val", self.step, metrics)
        return metrics

    def train_epoch(self, *, resume: bool | str | os.PathLike[str] = False) -> dict[str, float]:
        """Trains on one pass over ``train_data_loader``, then validates on ``val_data_loader`` (if the epoch is due).

        It is `train` of one epoch over that loader, with ``training_config.save_frequency`` in place of
        ``save_interval``. Consecutive calls are one run: early stopping counts over all of them, and
        ``trainer.should_stop`` says that it wants no more. A loop that can be interrupted anywhere is::

            while trainer.epoch < num_epochs and not trainer.should_stop:
                trainer.train_epoch(resume=True)

        A checkpoint holds the position of a loader that can tell it: the loader, or the iterator that it makes, has
        ``get_state()`` and ``set_state(state)`` (Grain, datarax), or ``state_dict()`` and ``load_state_dict(state)``
        (torchdata). Of any other the batches are drawn again and dropped, with a warning; an iterator is refused.

        Args:
            resume: As for `train`. A call that was finished when its checkpoint was saved returns what it returned
                then. True starts an epoch where there is no checkpoint, and where this trainer has just finished one.

        Returns:
            The averages of the epoch, each batch counted by its weight, and those of the validation as ``val_<name>``.

        Raises:
            ArgumentError: There is no loader, it yielded nothing, or it cannot be resumed.
            BatchError, ObjectiveError: As for `train_step`.
            CheckpointError: The checkpoint cannot be used, or the loader refuses its position; nothing has changed.
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
        """Trains on data in memory, or on a loader.

        Without events, loggers, validation and checkpoints (``save_interval``) it is::

            data = InMemoryData(train_data, batch_size)
            for epoch in range(num_epochs):
                for batch in data.shuffled(seed, epoch):
                    trainer.state, metrics = step(trainer.state, batch)

        Every example of data in memory comes exactly once an epoch, in an order that depends on the initial key and
        the number of the epoch only; the last batch may be short. Small steps are fused, many in a call. Validation,
        logging, saving and callbacks change nothing in what is learned.

        SIGTERM and Ctrl-C take effect after the current step (or the current batch of an evaluation), the same of all
        processes: the state is saved, ``on_train_end`` is emitted, and `TrainingInterrupted` or KeyboardInterrupt is
        raised. A second signal does not wait, and may cost the state in memory. A state that is not finite is never
        saved periodically, so that earlier checkpoints are kept.

        Args:
            train_data: A pytree of arrays of shape ``(num_examples, ...)``: a dict, a tuple, a registered dataclass;
                or a loader, as ``train_data_loader`` of the constructor. A list is a loader: of batches.
            num_epochs, batch_size: How many epochs to train, on top of those finished; the examples in a batch.
            val_data: Data to validate on, in the same forms.
            val_interval: Validate at multiples of this step (None: at none), and at the end of every epoch, or of every
                ``epochs_per_validation``-th.
            resume: Continue an interrupted call at its next batch, to the bit (on other devices, or in another number
                of processes, within rounding): True or "latest" from the latest undamaged checkpoint (from the start
                if there is none), or from that at a path. History, averages, and the states of callbacks are restored.
                Other data, batches or keys are refused; a warning names every other argument that differs.

        Returns:
            The final validation averages where ``val_data`` is given, else the averages of the last epoch.

        Raises:
            ArgumentError, BatchError: An argument cannot be used, or is not that of the interrupted call as far as
                ``resume`` needs it; nothing has happened then.
            CheckpointError: The checkpoint cannot be used; nothing has happened then.
            ObjectiveError: As for `train_step`.
        """
        counts = {"num_epochs": num_epochs, "batch_size": batch_size, "val_interval": val_interval}
        plan = plan_run(self.setup, self.run, train_data, val_data, resume, **counts)
        run = epochs.fit(self, plan, resume)
        return dict(run.validation.averages) if plan.held_out and run.validation else run.average.compute()

    def evaluate(self, data: Any, batch_size: int) -> dict[str, float]:
        """Averages the objective over data in memory or a loader, every example exactly once.

        It changes nothing, not even the key, and emits no event. For data in memory it is::

            evaluate(eval_step, trainer.state, InMemoryData(data, batch_size).in_order())

        Args:
            data: Data in memory or a loader, as ``train_data`` of `train`.
            batch_size: Examples in a batch; the last may be short.

        Returns:
            The averages, each batch counted by its examples or by the ``batch_weight`` that the objective reports.

        Raises:
            ArgumentError, BatchError, ObjectiveError: An argument cannot be used, or the objective breaks its contract.
        """
        batches = plan_evaluation(self.setup, self.run, data, check_count(batch_size, "batch_size"))
        state = self.run.state_with_edits()
        return evaluate(self.setup.eval_step, state, batches, placement=self.setup.placement)

    def set_learning_rate(self, value: float) -> None:
        """Sets the learning rate from the next step on; any callback may do so, and a checkpoint holds it.

        It is ``trainer.state = trainer.state.with_learning_rate(value)``, and raises as that does.
        """
        self.hold(self.setup.with_learning_rate(self.run, value))

    @takes_no("Trainer.compile")
    def compile(self, batch: Batch, *, without_remat: bool = False) -> ProgramCost:
        """Compiles `train_step` for batches like this one, without running it, and returns what it costs.

        Args:
            batch: Arrays as for `train_step`, or ``jax.ShapeDtypeStruct``: only shapes and dtypes matter.
            without_remat: Compile the step without ``remat`` as well, to tell the memory that it saves.

        Returns:
            Operations, bytes and memory by XLA's own analysis. A warning says if the device has less memory.
        """
        return epochs.compile_step(self, batch, without_remat)

    def save_checkpoint(
        self, path: str | os.PathLike[str] | None = None, *, background: bool | Literal["if_finite"] = False
    ) -> Path:
        """Writes the run under a name; it is atomic.

        It is ``save_run(path, trainer.run)``, with the states of the callbacks. Every process calls it where the
        state is spread over several. Without a path the name carries the step, and the run keeps the
        ``max_checkpoints`` of these that it wrote last. A run can be resumed from what a callback saves, at any event;
        of the callbacks behind it in the list it holds the states before the event.

        Args:
            path: The name; its ending decides the format, see `trainer.save_state`. Without one it is
                ``checkpoint_<step>.orbax`` for a state on a mesh of several devices, else ``….msgpack``.
            background: Return as soon as a copy of the arrays is dispatched, and write in a thread. At most one
                save is in flight; what it raises is raised by the next step of `train`, save or load, or by `close`.
                "if_finite", which `train` uses, writes nothing, and warns later, if the state holds NaN or infinity.

        Returns:
            The path.

        Raises:
            ArgumentError: The name promises the format of another program.
            CheckpointError: It could not be written, in any process; earlier checkpoints are untouched.
        """
        hold_if_finite(self)
        run, beside = self.setup.beside(self.run)
        target = self.setup.checkpointer.save(run, path, background=background, **beside)
        self.setup.tell_saving(target, self.step)
        return target

    def load_checkpoint(self, path: str | os.PathLike[str]) -> None:
        """Restores what `save_checkpoint` wrote: it is ``trainer.run = load_run(path, trainer.run)``.

        State, number of epochs, history and the states of callbacks come back; weights of extensions stay as set. What
        a file does not hold (a pickle, weights, one of `save_state`) stays as it is, except for rows of the history
        after its step. The next run starts with an epoch of its own; to continue an interrupted one see ``resume``.

        Raises:
            CheckpointError: The file is damaged or does not fit; the trainer is as it was.
        """
        resuming.load(self, path)

    def close(self) -> None:
        """Waits for the save in flight (`CheckpointError` if it failed); closes the loggers that this trainer made."""
        try:
            self.setup.finish_saves()
        finally:
            self.setup.fanout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def hold(self, run: Run) -> None:
        """Holds another run from now on: the one place at which a trainer changes."""
        self.run = run

    @property
    def state(self) -> TrainState:
        """The training state, which the next step consumes. Assign another one to continue from it."""
        return self.run.state

    @state.setter
    def state(self, state: TrainState) -> None:
        if not isinstance(state, TrainState):
            raise ArgumentTypeError(f"`state` is of type {type(state).__name__}; it must be a trainer.TrainState.")
        state = self.setup.placement.adopt(self.run.with_arrays(state))
        self.hold(self.run.with_state(state, keeps_position=self.setup.live.is_running))
