"""The parts and progress of a `Trainer`, to be read by the caller, callbacks and loggers."""

from typing import Any

import optax

from trainer.checkpoints.run_record import snapshot_run
from trainer.checkpoints.saving import Snapshot
from trainer.core.averaged_params import with_eval_params
from trainer.core.modes import in_evaluation_mode
from trainer.fit.setup import Setup
from trainer.loggers.fanout import AllLoggers
from trainer.run import Run


class ReadOnly:
    """The read-only attributes of a `trainer.Trainer`."""

    __slots__ = ()  # so that assigning a name that `Trainer` does not have raises, and is not ignored

    setup: Setup
    run: Run

    step = property(lambda self: self.run.step, doc="The number of updates finished.")
    epoch = property(lambda self: self.run.epoch, doc="The number of epochs finished.")
    history = property(lambda self: self.run.history, doc="What was logged so far, see `trainer.History`.")
    train_metrics = property(lambda self: self.history.of_training(), doc="See `trainer.History.of_training`.")
    val_metrics = property(lambda self: self.history.of_validation(), doc="See `trainer.History.of_validation`.")
    rng = property(lambda self: self.run.state.rng, doc="The key from which every step draws its own.")
    opt_state = property(lambda self: self.run.state.opt_state, doc="The state of the optimizer; assignable.")
    is_new_run = property(lambda self: self.run.is_new, doc="Whether the run is neither resumed nor continued.")

    # The arguments of the trainer, or what was made from them; read-only, since they are compiled into the step.
    training_config = property(lambda self: self.setup.config)
    loss_fn = property(lambda self: self.setup.loss_fn)
    train_data_loader = property(lambda self: self.setup.train_data_loader)
    val_data_loader = property(lambda self: self.setup.val_data_loader)
    metrics_logger = property(lambda self: self.setup.metrics_logger)
    logger = property(lambda self: self.setup.logger)
    log_callback = property(lambda self: self.setup.log_callback)
    callbacks = property(lambda self: self.setup.callbacks)
    extensions = property(lambda self: self.setup.extensions)
    save_interval = property(lambda self: self.setup.save_interval)
    workdir = property(lambda self: self.setup.workdir)
    checkpoint_dir = property(lambda self: self.setup.checkpointer.directory)
    is_primary_process = property(lambda self: self.setup.placement.is_primary_process)

    # The current call, or else the latest.
    should_stop = property(lambda self: self.setup.events.should_stop, doc="Whether a callback wants the run to end.")
    planned = property(lambda self: self.setup.live.planned, doc="How far the run is meant to go, `fit.live.Planned`.")
    has_ended = property(
        lambda self: self.setup.live.has_ended and not self.setup.live.failure,
        doc="Whether the latest call came to the end of a run, and no signal or exception ended it.",
    )
    throughput = property(lambda self: self.setup.live.throughput, doc="`trainer.Throughput` of the latest epoch.")
    validates = property(lambda self: self.setup.live.validates, doc="Whether the run validates on anything.")

    @property
    def model(self) -> Any:
        """A new module in evaluation mode with a copy of the current values; `state.model()` has the original modes."""
        state = with_eval_params(self.run.state_with_edits(), self.setup.eval_params)
        model = in_evaluation_mode(state.replace(opt_state=(), extensions={}).copy().model())
        self.setup.latest_copy.add(model, self.step)
        return model

    @property
    def loggers(self) -> AllLoggers:
        """All loggers of the run as one `trainer.Logger`, for callbacks; the step defaults to the current one."""
        return AllLoggers(self.setup.fanout, self.step)

    def snapshot(self) -> Snapshot:
        """Returns the contents of a checkpoint without copying: write it before the next step, or copy it first."""
        run, beside = self.setup.beside(self.run)
        return snapshot_run(run, **beside)

    @property
    def optimizer(self) -> optax.GradientTransformation:
        """The given or configured optimizer, with gradient clipping and the average of params.

        Raises:
            ConfigError: Its schedule ends with the run, whose length is not known yet.
        """
        return self.setup.whole_optimizer.build(self.run.horizon)
