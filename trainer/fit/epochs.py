"""What `Trainer.train` and `Trainer.train_epoch` add to the loop: events, logs, validation, saves, stops and signals.

Both build a `FitPlan` that `fit` executes. The trainer always holds a new run before events are emitted, so a
checkpoint saved by a callback is complete.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from trainer.callbacks.base import flatten
from trainer.callbacks.early_stopping import EarlyStopping
from trainer.checkpoints.run_record import Restored
from trainer.distributed.signals import Signals
from trainer.errors import ObjectiveError
from trainer.fit.cadence import steps_due
from trainer.fit.common_batches import compare_single, leave_single
from trainer.fit.compilation import tell_compilation
from trainer.fit.ends import is_end, is_to_be_saved, leave, may_save, save_end
from trainer.fit.finite import hold_if_finite, react_if_not_finite
from trainer.fit.live import End, Planned
from trainer.fit.plan import FitPlan
from trainer.fit.resume import checked, find, planned_end, put_back
from trainer.fit.run_file import write_start
from trainer.fit.running import check_not_running, check_opt_state, running
from trainer.fit.setup import Setup
from trainer.fit.speeds import figures_written, note_epoch
from trainer.loggers.base import prefixed
from trainer.loop import evaluate, open_pass, plan_dispatch, rare_collections, run_epoch
from trainer.metrics.average import metrics_at
from trainer.metrics.throughput import Meter
from trainer.run import Position, Run
from trainer.state import TrainState
from trainer.types import Batch, Metrics

if TYPE_CHECKING:
    from trainer.api import Trainer


def fit(trainer: Trainer, plan: FitPlan, resume: bool | str | os.PathLike[str]) -> Run:
    """Executes a plan, from its start or from a checkpoint, and returns the final run."""
    check_not_running(trainer, plan.caller)
    setup, before = trainer.setup, trainer.run
    check_opt_state(setup, before)
    setup.live.validates = plan.held_out is not None
    setup.latest_copy.check(before)
    if not setup.live.is_savable and may_save(setup, plan, before):
        setup.live.is_savable = setup.check_savable()
    restored = find(setup, before, plan, resume)
    setup.live.planned, setup.live.failure, setup.live.has_ended = plan.planned, "", False
    setup.live.unsaved_step = None
    opening: contextlib.AbstractContextManager[None] = contextlib.nullcontext()
    if restored is None:
        run = before.replace(position=plan.position, arguments=plan.arguments)
        may_be_saved = setup.is_directory_given or plan.reaches_save(run.step, if_unknown=True)
        if run.is_new and may_be_saved and not setup.fast_dev_run:
            setup.checkpointer.warn_of_later(run)
        setup.agree_on_state(run)
        trainer.hold(setup.with_horizon(run, planned_end(run.step, plan)))
    else:
        run = checked(setup, plan, restored)
        setup.live.planned = _resumed(plan, _position(run))
        setup.agree_on_state(run)
        callback_states = copy.deepcopy(setup.events.state_dict())
        with put_back(trainer, before, callback_states):
            if restored.callback_states is not None:
                setup.events.load_state_dict(restored.callback_states)
        trainer.hold(run)
        # A finished epoch or run still gets the events of a call: callbacks may not have handled its last step.
        if not _is_finished(plan, run) and plan.loader is not None:
            # The loader may reject its position when it is opened.
            opening = put_back(trainer, before, callback_states)
    setup.live.start_step = trainer.run.step
    try:
        _run_epochs(trainer, plan, restored, opening)
    except BaseException:
        if plan.data is not None:
            plan.data.finish_import()
        raise
    leave(trainer, plan)
    setup.live.end = End.of(trainer.run)
    return trainer.run


def train_step(trainer: Trainer, batch: Batch) -> Metrics:
    """Runs one step on a placed batch and emits its events; see `Trainer.train_step`."""
    setup, drawn = trainer.setup, trainer.run.drawn
    if setup.live.has_foreign_opt_state:
        check_opt_state(setup, trainer.run)
    # Within a call the loop has compared its own batches; those of a callback's own steps are not compared.
    if setup.placement.num_processes > 1 and not setup.live.is_running:
        compare_single(setup.live.passes, setup.placement, "train_step", batch)
    if drawn is not None and setup.events.handles("on_batch_begin"):
        trainer.hold(trainer.run.drawing(None))  # a callback may run a step of its own
    setup.events.emit("on_batch_begin", trainer, trainer.run.step)
    if not setup.live.is_running:  # else the run has done both
        setup.latest_copy.check(trainer.run)
        setup.constants.update()
    run = setup.with_weights(trainer.run)
    if setup.debug is not None:
        run = run.with_edits()
        setup.debug(run.peek(), batch)
    position = run.position
    run, metrics = setup.step(run, batch, drawn)
    if drawn is None and setup.live.is_running:
        run = run.replace(position=position)  # a step beside those of the loop moves nothing in the data
    trainer.hold(run)
    _after_call(trainer, metrics, None, defer=False)
    return metrics


def finish(trainer: Trainer) -> None:
    """Saves what `train_epoch` left to a later call, waits for saves, restores best params; see `Trainer.close`."""
    try:
        _finish(trainer)
    finally:
        trainer.setup.fanout.close()


def keep_latest(trainer: Trainer) -> None:
    """Makes the latest state stay when the trainer is closed: an exception of the caller is not the end of a run."""
    trainer.setup.live.end = None


def _finish(trainer: Trainer) -> None:
    setup, run, live = trainer.setup, trainer.run, trainer.setup.live
    leave_single(live.passes)
    # Of several processes, one may close because of an exception, and the others would not take part in the save.
    if live.unsaved_step == run.step and run.position is not None and setup.placement.num_processes == 1:
        setup.live.unsaved_step = None
        save_end(trainer)
    setup.finish_saves()
    # A loop over `train_epoch` whose number of epochs the configuration does not hold ends here.
    if live.has_ended or live.failure or live.is_running or live.end is None:
        return
    # What the caller has assigned, loaded or trained since the last call stays.
    if live.end.is_still(trainer.run):
        setup.live.has_ended = True
        for callback in flatten([setup.callbacks]):
            if isinstance(callback, EarlyStopping):
                # All processes read a checkpoint together, but one of several may close alone.
                callback.restore(trainer, from_disk=setup.placement.num_processes == 1)


def validate(trainer: Trainer, held_out: Callable[[], Iterator[Batch]], check: Callable[[], None]) -> None:
    """Evaluates the state, records and logs the averages, and emits the validation events."""
    setup = trainer.setup
    hold_if_finite(trainer)
    setup.events.emit("on_validation_begin", trainer)
    state = trainer.run.state_with_edits()
    with setup.evaluating(state), setup.ahead(held_out(), "validation") as batches:
        averages = evaluate(_telling(trainer), state, batches, placement=setup.placement, check=check)
    trainer.hold(trainer.run.validated(averages))
    setup.fanout.report("val", trainer.run.step, averages)
    setup.events.emit("on_validation_end", trainer, averages)


def _telling(trainer: Trainer) -> Callable[..., Metrics]:
    """Returns the evaluation step, which reports its compilations to callbacks and loggers."""
    setup, program = trainer.setup, trainer.setup.eval_step
    program.report()  # what `Trainer.evaluate` compiled belongs to no run

    def eval_step(state: TrainState, batch: Batch, index: Any) -> Metrics:
        if program.is_new:
            setup.events.emit("on_compile_begin", trainer, program.name)
        metrics: Metrics = program(state, batch, index)
        if (report := program.report()) is not None:
            # Without its warning: evaluations of other data or batch sizes are no mistake.
            tell_compilation(trainer, dataclasses.replace(report, warning=None), trainer.run.step)
        return metrics

    return eval_step


def _run_epochs(
    trainer: Trainer, plan: FitPlan, restored: Restored | None, opening: contextlib.AbstractContextManager[None]
) -> None:
    setup = trainer.setup
    if restored is not None or trainer.run.is_new:
        write_start(setup, plan, trainer.run, None if restored is None else restored.path)
    with running(trainer) as signals, figures_written(trainer, plan):
        setup.fanout.log_hyperparams(setup.config.to_dict())
        if restored is not None:
            where = f"epoch {trainer.run.epoch}, batch {trainer.run.batch}"
            setup.fanout.rewind(trainer.run.step)
            setup.fanout.log_text("checkpoint", f"resumed {restored.path}, {where}", trainer.run.step)
        if trainer.run.is_new or plan.caller == "train":
            setup.fanout.log_text("training", plan.about, trainer.run.step)
        first = plan.position.first_epoch if restored is None else _position(trainer.run).first_epoch
        average = None
        setup.share_stop()
        for epoch in range(trainer.run.epoch, first + plan.num_epochs):
            # A run that was asked to stop after its last epoch, and is resumed there, stays stopped.
            if trainer.run.batch == 0 and epoch > first and setup.events.should_stop:
                why = "; ".join(setup.events.stop_reasons())
                done = f"stopped after {epoch - first} of {plan.num_epochs} epochs"
                setup.fanout.log_text("training", f"{done}: {why}", trainer.run.step)
                break
            batches = _open_epoch(trainer, plan, opening)
            with rare_collections(), setup.ahead(batches, "training", first=trainer.run.batch) as batches:
                _run_epoch(trainer, plan, signals, batches, is_last=epoch + 1 == first + plan.num_epochs)
            opening = contextlib.nullcontext()
            # The average of the previous epoch: the device has finished it, so reading does not wait.
            if average is not None:
                average.compute()
                react_if_not_finite(trainer, average)
            average = trainer.run.average
        _log_last_step(trainer)
        trainer.run.average.compute()  # the caller reads it next
        react_if_not_finite(trainer, trainer.run.average)
        setup.fanout.flush()
        # A callback may have stopped the run before the end of the epoch at which validation was due.
        if plan.held_out is not None and _not_validated(trainer.run) and is_end(setup, plan, trainer.run):
            validate(trainer, plan.held_out, signals.check)
        if plan.caller == "train" and trainer.run.validation is not None and plan.held_out is not None:
            setup.fanout.log_test_metrics(trainer.run.validation.averages)
        if is_to_be_saved(setup, plan, trainer.run):
            save_end(trainer)
        elif restored is not None and restored.run.step == trainer.run.step and setup.placement.num_processes == 1:
            setup.checkpointer.prune(trainer.run)  # no save follows that would
        setup.live.has_ended = is_end(setup, plan, trainer.run)


def _run_epoch(trainer: Trainer, plan: FitPlan, signals: Signals, batches: Iterator[Batch], *, is_last: bool) -> None:
    setup, run = trainer.setup, trainer.run
    epoch = run.epoch
    # The run may have been interrupted between a step and the validation due after it.
    if run.batch and _is_due(plan.validate_every, run) and _not_validated(run):
        assert plan.held_out is not None
        validate(trainer, plan.held_out, signals.check)
    overridden = _overrides_train_step(trainer)
    listens = setup.events.handles("on_batch_begin") or setup.events.handles("on_batch_end")
    observed = overridden or listens or setup.debug is not None
    setup.constants.update()
    run = setup.with_weights(trainer.run)
    dispatch = plan_dispatch(
        setup.step, run, batches, sync_every=plan.sync_every, placement=setup.placement, fuse=not observed
    )
    if overridden or listens:
        _advise(setup, dispatch.fusable_steps, run.step)

    def each(run: Run, batch: Batch, examples: int) -> tuple[Run, Metrics]:
        # The public method, since a subclass may override it. `drawing` lets it count the batch's examples.
        trainer.hold(run.drawing(examples))
        metrics = trainer.train_step(batch)
        return trainer.run, metrics

    setup.live.meter = meter = Meter(dispatch.flops, dispatch.product_dtype)
    ticks = run_epoch(
        setup.step,
        run,
        batches,
        sync_every=plan.sync_every,
        plan=dispatch,
        placement=setup.placement,
        meter=meter,
        each=each if observed else None,
    )
    for tick in ticks:
        if not observed:
            trainer.hold(tick.run)
            _after_call(trainer, tick.metrics, tick.count, defer=True)
        with meter.pausing():
            # Validate before saving, so that the checkpoint includes the validation of its step.
            if plan.held_out is not None and _is_due(plan.validate_every, trainer.run):
                validate(trainer, plan.held_out, signals.check)
            if _is_due(plan.save_every, trainer.run):
                trainer.save_checkpoint(background="if_finite")
        # With several processes, all wait for a save at the same point: before the next save.
        if setup.placement.num_processes == 1:
            setup.checkpointer.check()
        setup.tell_saved()
        signals.check()
        tick.run = setup.with_weights(trainer.run)
    setup.fanout.flush()
    note_epoch(trainer, meter)
    if is_last:
        _log_last_step(trainer)
    is_due = plan.validates_epoch(setup.config, epoch + 1, is_last=is_last)
    if plan.held_out is not None and is_due and _not_validated(trainer.run):
        validate(trainer, plan.held_out, signals.check)
    validation = prefixed("val_", trainer.run.validation_of_epoch)
    trainer.hold(trainer.run.end_epoch())
    setup.fanout.defer_average(trainer.run.step, trainer.run.average)
    # Computing the average waits for the device, so it is done only if the event is handled.
    if setup.events.handles("on_epoch_end"):
        setup.events.emit("on_epoch_end", trainer, epoch, {**trainer.run.average.compute(), **validation})
    setup.share_stop()


def _open_epoch(trainer: Trainer, plan: FitPlan, opening: contextlib.AbstractContextManager[None]) -> Iterator[Batch]:
    """Begins an epoch, or continues a resumed one, and returns its batches."""
    setup = trainer.setup
    trainer.hold(trainer.run.begin_epoch())
    setup.events.emit("on_epoch_begin", trainer, trainer.run.epoch)
    if plan.data is not None:
        return plan.data.shuffled(setup.seed, trainer.run.epoch, skip=trainer.run.batch)
    # Opened after the event, in which a callback may set the epoch of the loader.
    with opening:
        run, batches = open_pass(
            trainer.run, plan.loader, batch_size=plan.batch_size, name=plan.name, limit=setup.config.steps_per_epoch
        )
    trainer.hold(run)
    # Only the first batch of an epoch cannot be a short last one.
    setting = None if run.batch else "`batch_size`" + " of `training_config`" * (plan.caller == "train_epoch")
    return setup.padded(batches, plan.batch_size, setting=setting)


def _after_call(trainer: Trainer, metrics: Metrics, count: int | None, *, defer: bool) -> None:
    """Reports any compilation, logs the steps that are due, and emits the events of a call."""
    setup, run = trainer.setup, trainer.run
    report = setup.step.report()
    if report is not None:
        # Logged at the step before the call: rows of fused steps follow, and some loggers drop rows of earlier steps.
        tell_compilation(trainer, report, run.step - (count or 1), setup.live.meter)
        _check_counted(trainer)
    setup.fanout.flush_rows()
    react_if_not_finite(trainer, run.average)
    step, first = run.step, run.step - (count or 1) + 1
    logged, due = steps_due(setup, run, count or 1)
    if due:
        rows = [(number, metrics if count is None else metrics_at(metrics, number - first)) for number in sorted(due)]
        trainer.hold(trainer.run.recorded_rows(rows, logged=max(logged, default=run.logged_step)))
        for number, row in rows:
            if number in logged:
                (setup.fanout.defer if defer else setup.fanout.report)("train", number, row)
    if count is None:
        setup.events.emit("on_batch_end", trainer, step, metrics)
    setup.events.emit("on_call_end", trainer, step, metrics if count is None else metrics_at(metrics, count - 1))


def _check_counted(trainer: Trainer) -> None:
    """Checks that a ``step_fn`` increments ``step``. Waits for the device, so it runs only after a compilation."""
    counted = None if trainer.setup.step_fn is None else int(trainer.run.peek().step)
    if counted not in (None, trainer.run.step):
        raise ObjectiveError(
            f"`step_fn` returned a state with `step` {counted} where {trainer.run.step} was due; every step adds one: "
            f"state.replace(…, step=state.step + 1)."
        )


def _log_last_step(trainer: Trainer) -> None:
    """Logs the training metrics of the latest step if they have not been logged yet."""
    run = trainer.run
    if run.logged_step != run.step and run.metrics:  # a state that was loaded comes without
        trainer.hold(run.recorded(run.metrics))
        trainer.setup.fanout.report("train", run.step, run.metrics)


def _resumed(plan: FitPlan, position: Position) -> Planned:
    """Returns the planned length of a resumed run."""
    first_epoch = position.first_epoch if plan.caller == "train" else plan.planned.first_epoch
    return dataclasses.replace(plan.planned, first_step=position.first_step, first_epoch=first_epoch)


def _is_finished(plan: FitPlan, run: Run) -> bool:
    return run.epoch >= _position(run).first_epoch + plan.num_epochs


def _position(run: Run) -> Position:
    assert run.position is not None, "a run has a position from its beginning to its end"
    return run.position


def _is_due(every: int | None, run: Run) -> bool:
    return every is not None and run.step % every == 0


def _not_validated(run: Run) -> bool:
    return run.validation is None or run.validation.step != run.step


def _overrides_train_step(trainer: Trainer) -> bool:
    return type(trainer).train_step.__module__ != "trainer.api"


def _advise(setup: Setup, fusable_steps: int, step: int) -> None:
    """Logs advice once if a callback's events prevent the fusing of many steps."""
    if fusable_steps >= setup.step.policy.advise_at and not setup.live.has_advised:
        setup.live.has_advised = True
        setup.fanout.log_text(
            "advice",
            f"a step computes so little that {fusable_steps} could run in one call, many times faster, but a callback "
            f"handles on_batch_begin or on_batch_end; on_call_end does not ask for a call a step",
            step,
        )
