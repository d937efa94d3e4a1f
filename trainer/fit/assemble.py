"""`assemble`: checks the arguments of a trainer, and builds its parts and initial run."""

import dataclasses
import functools
import os
import weakref
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import optax
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from trainer.callbacks.base import as_callback_list, asked_by, check_handlers, without_savers
from trainer.callbacks.dispatch import CallbackDispatcher
from trainer.callbacks.progress import progress_for
from trainer.checkpoints.checkpointer import Checkpointer
from trainer.compile.dispatch import CompiledStep, Program
from trainer.compile.fusion import FusionPolicy
from trainer.config import TrainingConfig
from trainer.config.schedules import check_horizon, needs_horizon
from trainer.core.averaged_params import resolve_eval_params
from trainer.core.checks import check_bool, check_call, check_count, check_interval
from trainer.core.modes import evaluated_as_a_whole
from trainer.core.module_views import check_view, combined
from trainer.core.objective import check_extensions, check_loss_fn, requiring_weight, with_losses
from trainer.core.own_step import check_own_step, no_loss_fn, own_step
from trainer.core.precision import Precision, as_precision, in_precision
from trainer.core.remat import in_parts, plan_of
from trainer.core.report import MEASURES, Measure, resolve_report
from trainer.data.loaders import check_loader
from trainer.data.memory import seed_from_key
from trainer.data.padding import check_pad_to
from trainer.distributed.agreement import check_agreement, gathered
from trainer.errors import ArgumentError, ArgumentTypeError, warn
from trainer.fit.constants import Constants
from trainer.fit.copies import LatestCopy
from trainer.fit.fingerprint import fingerprints_of
from trainer.fit.live import Live
from trainer.fit.rate import RateInForce, configured_rate
from trainer.fit.setup import Setup
from trainer.fit.unused_settings import warn_beside_optimizer, warn_beside_own_step
from trainer.fit.whole_optimizer import ANY_HORIZON, WholeOptimizer
from trainer.loggers.base import Logger, MetricsLoggerLike, names_checked
from trainer.loggers.fanout import MetricFanout, as_loggers, check_metrics_logger
from trainer.loggers.wandb import WandbLogger
from trainer.paths import in_home
from trainer.run import Run
from trainer.sharding.placement import Placement, placement_of
from trainer.state import TrainState, as_key, check_model, check_optimizer, step_of_one
from trainer.steps import make_eval_step, make_predict_step, make_train_step
from trainer.types import Batch, EvalParams, ExtensionLike, LogCallback, LossFn, NonFinite, Remat, StepFn

# An interval that no run reaches.
_NEVER = 2**62


def assemble(
    trainer: Any,
    *,
    model: Any,
    training_config: TrainingConfig,
    optimizer: optax.GradientTransformation | None,
    train_data_loader: Callable[..., Any] | Iterable[Batch] | None,
    val_data_loader: Callable[..., Any] | Iterable[Batch] | None,
    workdir: str | os.PathLike[str] | None,
    rng: jax.Array | int | None,
    loss_fn: LossFn | None,
    metrics_logger: MetricsLoggerLike | None,
    logger: Logger | Sequence[Logger] | None,
    checkpoint_dir: str | os.PathLike[str] | None,
    save_interval: int | None,
    log_callback: LogCallback | None,
    callbacks: Any,
    eval_params: EvalParams | None,
    extensions: Mapping[str, ExtensionLike] | None,
    wrt: nnx.filterlib.Filter,
    handle_signals: bool,
    steps_per_call: int | Literal["auto"] | FusionPolicy,
    mesh: Mesh | None,
    partition_rules: Mapping[str, PartitionSpec] | None,
    step_fn: StepFn | None,
    nonfinite: NonFinite,
    report: Iterable[str] | Mapping[str, Measure],
    accumulate_steps: int,
    pad_to: Literal["batch"] | None,
    prefetch: int,
    params_average: optax.GradientTransformation | None,
    precision: str | Precision | None,
    remat: Remat,
    fast_dev_run: bool | int,
    overfit_batches: int | None,
    debug: bool,
    progress: Any,
) -> tuple[Setup, Run]:
    """Checks the arguments of `trainer.Trainer`, and returns its parts and initial run.

    Raises:
        ArgumentError: An argument cannot be used; nothing was changed.
    """
    if not isinstance(model, TrainState) and (mesh is None or not callable(model)):
        check_model(model)
    _check_config(training_config)
    if optimizer is not None:
        check_optimizer(optimizer)
    if step_fn is not None and isinstance(model, TrainState):
        warn_beside_own_step(training_config, optimizer, wrt)
    elif optimizer is not None:
        warn_beside_optimizer(training_config)
    if params_average is not None:
        check_optimizer(params_average, "params_average")
    for name, loader in {"train_data_loader": train_data_loader, "val_data_loader": val_data_loader}.items():
        if loader is not None:
            check_loader(loader, name, has_epoch=True)
    extensions = check_extensions(extensions)
    losses = with_losses(extensions)
    settings: dict[str, Any] = {
        "nonfinite": nonfinite,
        "accumulate_steps": check_count(accumulate_steps, "accumulate_steps"),
    }
    for name, extension in extensions.items():
        check_handlers(extension, f"extensions[{name!r}]")
    callbacks = as_callback_list(callbacks)
    optimizer_parts, asked = asked_by(callbacks)
    if step_fn is None:
        check_loss_fn(loss_fn)
    else:
        check_own_step(step_fn, loss_fn, {**settings, "extensions": losses, "report": report or asked, "remat": remat})
        if optimizer_parts:
            raise ArgumentError(
                "a callback scales the learning rate, which a `step_fn` applies by itself; leave it out."
            )
    check_pad_to(pad_to)
    prefetch = check_count(prefetch, "prefetch", least=0)
    objective = no_loss_fn if loss_fn is None else loss_fn
    objective = objective if pad_to is None else requiring_weight(objective)
    if log_callback is not None and not callable(log_callback):
        raise ArgumentTypeError(f"`log_callback` is of type {type(log_callback).__name__}; it must be callable.")
    if log_callback is not None:
        check_call(log_callback, "log_callback", 'log_callback(step, metrics, prefix="train")', 0, {}, prefix="train")
    if metrics_logger is not None:
        check_metrics_logger(metrics_logger)
    save_interval = check_interval(save_interval, "save_interval")
    dry = int(fast_dev_run) if isinstance(fast_dev_run, bool) else check_count(fast_dev_run, "fast_dev_run")
    if overfit_batches is not None:
        overfit_batches = check_count(overfit_batches, "overfit_batches")
    if dry and overfit_batches is not None:
        raise ArgumentError("`fast_dev_run` and `overfit_batches` contradict each other; pass one of them.")
    if dry:
        training_config = dataclasses.replace(training_config, validation_steps=dry, save_frequency=_NEVER)
        save_interval, workdir, checkpoint_dir = _NEVER, None, None
        log_callback = metrics_logger = logger = None
    events = CallbackDispatcher(
        without_savers(callbacks) if dry else callbacks, extensions, progress_for(progress, callbacks)
    )
    for name, path in {"workdir": workdir, "checkpoint_dir": checkpoint_dir}.items():
        if path is not None and not isinstance(path, str | os.PathLike):
            raise ArgumentTypeError(f"`{name}` is {path!r:.60} of type {type(path).__name__}; it must be a path.")
    workdir, checkpoint_dir, configured_dir = map(in_home, (workdir, checkpoint_dir, training_config.checkpoint_dir))
    placement = placement_of(mesh, partition_rules)
    rng = as_key(0 if rng is None else rng)
    precision = as_precision(precision)
    held = {"wrt": wrt, "extensions": losses, "nonfinite": nonfinite}
    whole = WholeOptimizer(training_config, optimizer, optimizer_parts, params_average)
    run, is_foreign = _initial_run(model, rng, whole, held, placement, precision, has_own_step=step_fn is not None)
    check_view(combined(in_precision(precision), in_parts(plan_of(remat))), run.peek())
    try:
        eval_params = _resolved_eval_params(eval_params, run, whole)
    except Exception:
        if is_foreign:  # an evaluation needs that of the optimizer, so it is refused at once
            whole.fitted(run.peek().opt_state, run.peek().params)  # raises
        raise
    _warn_of_mode(run.peek().model(), wrt)
    live = Live(weakref.ref(trainer), validates=val_data_loader is not None, has_foreign_opt_state=is_foreign)
    constants = Constants(losses if placement.num_processes == 1 else {})
    make = functools.partial(make_train_step, objective, wrt=wrt, extensions=losses, precision=precision, **settings)

    check_step = functools.partial(
        _check_step, loss_fn, step_fn, wrt=wrt, extensions=losses, precision=precision, remat=remat,
        accumulate_steps=accumulate_steps,
    )  # fmt: skip

    def compiled(remat: Remat) -> CompiledStep:
        step, arguments = (
            _made_step(
                functools.partial(make, remat=remat), report, asked, training_config, optimizer, whole.build, placement
            )
            if step_fn is None
            else (own_step(step_fn), None)
        )
        return _compiled_step(step, arguments, losses, constants, placement, steps_per_call, events, live)

    evaluating: dict[str, Any] = {"eval_params": eval_params, "precision": precision}
    default_directory = TrainingConfig.checkpoint_dir
    checkpointer = Checkpointer(checkpoint_dir or workdir or configured_dir, training_config.max_checkpoints)
    setup = Setup(
        config=training_config,
        loss_fn=loss_fn,
        given_optimizer=optimizer,
        whole_optimizer=whole,
        train_data_loader=train_data_loader,
        val_data_loader=val_data_loader,
        metrics_logger=metrics_logger,
        logger=logger,
        log_callback=log_callback,
        save_interval=save_interval,
        workdir=workdir,
        handle_signals=handle_signals,
        wrt=wrt,
        callbacks=callbacks,
        eval_params=eval_params,
        step_fn=step_fn,
        make_step=functools.partial(make, remat=remat) if step_fn is None else None,
        make_compiled_step=functools.partial(compiled, remat),
        nonfinite=nonfinite,
        extensions=extensions,
        constants=constants,
        latest_copy=LatestCopy(wrt, eval_params),
        seed=seed_from_key(rng),
        placement=placement,
        events=events,
        fanout=_fanout(training_config, placement, log_callback, metrics_logger, logger),
        checkpointer=checkpointer,
        is_directory_given=not dry
        and any((workdir, checkpoint_dir, training_config.checkpoint_dir != default_directory)),
        fingerprints={
            **fingerprints_of(loss_fn, step_fn, optimizer, losses, run, params_average),
            "accumulate_steps": str(accumulate_steps),
            "pad_to": str(pad_to),
            "precision": str(precision),
        },
        accumulate_steps=accumulate_steps,
        fast_dev_run=dry,
        overfit_batches=overfit_batches,
        debug=check_step() if check_bool(debug, "debug") else None,
        pad_to=pad_to,
        prefetch=prefetch,
        step=compiled(remat),
        step_without_remat=None if remat is None else compiled(None),
        eval_step=Program(
            names_checked(make_eval_step(objective, **evaluating)), "eval_step", placement.replicated, donates=False
        ),
        # Cached, so that the same function is not compiled again.
        predict_step=functools.lru_cache(maxsize=8)(
            lambda fn: jax.jit(make_predict_step(fn, **evaluating), out_shardings=placement.replicated)
        ),
        live=live,
        rate=RateInForce(training_config, is_configured=optimizer is None and step_fn is None),
    )
    if placement.num_processes > 1:
        run = run.replace(id=gathered(run.id)[0])
    about: dict[str, Any] = {"mesh": str(mesh and dict(mesh.shape)), "partition_rules": str(partition_rules)}
    about |= {"accumulate_steps": accumulate_steps, "pad_to": pad_to, "precision": str(precision)}
    setup.agree("Trainer", {"training_config": training_config.to_dict(), "save_interval": save_interval, **about})
    return setup, run.replace(horizon=setup.horizon_of(train_data_loader))


def _initial_run(
    model: Any,
    rng: jax.Array,
    whole: WholeOptimizer,
    held: Mapping[str, Any],
    placement: Placement,
    precision: Precision | None,
    has_own_step: bool,
) -> tuple[Run, bool]:
    """Returns the initial run, and whether its optimizer state is that of another optimizer."""
    is_foreign = False
    if isinstance(model, TrainState):
        state = model.copy()
        step_of_one(state)  # raises if the state is stacked
        if not has_own_step:
            try:
                state = state.replace(opt_state=whole.fitted(state.opt_state, state.params))
            except ArgumentError:
                is_foreign = True  # `check_opt_state` raises it before a step; an evaluation does not need it
        return Run.start(placement.adopt(state)).replace(position=None), is_foreign
    state = placement.create(model, whole.build(ANY_HORIZON), rng, held)
    if not jax.tree.leaves(state.params):
        raise ArgumentError(
            f"`model` has no parameters: `wrt` = {held['wrt']!r} selects none of its variables, so there is nothing to "
            f"train."
        )
    return Run.start(placement.adopt(state.with_precision(precision))).replace(position=None), is_foreign


def _resolved_eval_params(given: EvalParams | None, run: Run, whole: WholeOptimizer) -> EvalParams | None:
    """Returns the function for evaluation params: the caller's, else one for the average that the optimizer keeps."""
    if whole.average is None:
        return resolve_eval_params(given, run.peek(), whole.own_state)
    from trainer.features.averages import averaged_params  # few runs need it

    if given is None or given is averaged_params:
        return resolve_eval_params(averaged_params, run.peek(), lambda opt_state: opt_state)
    try:
        return resolve_eval_params(given, run.peek(), whole.own_state)
    except Exception as error:
        error.add_note(
            "`eval_params` is given the state of `optimizer` without that of `params_average`; leave it out, and that "
            "average is evaluated"
        )
        raise


def _made_step(
    make: Callable[..., Any],
    report: Iterable[str] | Mapping[str, Measure],
    asked: Sequence[str],
    config: TrainingConfig,
    optimizer: optax.GradientTransformation | None,
    make_whole: Callable[[Any], optax.GradientTransformation],
    placement: Placement,
) -> tuple[Any, Callable[[Run], tuple[Any, ...]] | None]:
    """Returns the step built by ``make``, and the function that returns its extra arguments, if any."""
    scheduler = config.scheduler

    def make_until(horizon: Any) -> Any:
        known = MEASURES
        if optimizer is None:
            known = {**MEASURES, "learning_rate": functools.partial(configured_rate, config, horizon)}
        reported = {**resolve_report(asked, known), **resolve_report(report, known)}
        return make(make_whole(horizon), report=reported)

    if optimizer is not None or scheduler is None or not needs_horizon(scheduler):
        return make_until(None), None

    def step_until(state: Any, batch: Any, horizon: Any) -> Any:
        return make_until(horizon)(state, batch)

    def horizon_of(run: Run) -> tuple[Any, ...]:
        if run.horizon is None:
            check_horizon(scheduler, None)  # raises
        return (placement.replicated_int(run.horizon or 0),)

    return step_until, horizon_of


def _check_step(
    loss_fn: LossFn | None,
    step_fn: StepFn | None,
    **options: Any,
) -> Callable[[TrainState, Batch], None]:
    """Returns the function that checks each step before it runs, for ``debug``."""
    from trainer.features.debugging import make_check_own_step, make_check_step  # few runs need it

    if step_fn is not None:
        return make_check_own_step(own_step(step_fn))
    assert loss_fn is not None
    return make_check_step(loss_fn, **options)


def _compiled_step(
    step: Any,
    arguments: Callable[[Run], tuple[Any, ...]] | None,
    extensions: dict[str, ExtensionLike],
    constants: Constants,
    placement: Placement,
    steps_per_call: int | Literal["auto"] | FusionPolicy,
    events: CallbackDispatcher,
    live: Live,
) -> CompiledStep:
    def variant() -> Hashable:
        return constants.token, *(name for name, extension in extensions.items() if extension.is_enabled())

    def before_compile(name: str, text: Callable[[], str]) -> None:
        events.emit("on_compile_begin", live.trainer(), name)
        if placement.num_processes > 1:
            check_agreement({name: {"program": text()}})

    return CompiledStep(
        constants.traced(names_checked(step)),
        steps_per_call=steps_per_call,
        variant=variant if extensions else None,
        arguments=arguments,
        replicated=placement.replicated,
        one_call_at_a_time=placement.one_call_at_a_time,
        before_compile=before_compile,
    )


def _fanout(
    config: TrainingConfig,
    placement: Placement,
    log_callback: LogCallback | None,
    metrics_logger: MetricsLoggerLike | None,
    logger: Logger | Sequence[Logger] | None,
) -> MetricFanout:
    """Returns the destinations of metrics: none except in the primary process."""
    loggers = as_loggers(logger)
    if not placement.is_primary_process:
        return MetricFanout(None, None, ())
    owned = [WandbLogger(project=config.wandb_project, name=config.name)] if config.use_wandb else []
    return MetricFanout(log_callback, metrics_logger, [*loggers, *owned], owned)


def _check_config(config: Any) -> None:
    if not isinstance(config, TrainingConfig):
        hint = " TrainingConfig.from_dict makes one." if isinstance(config, Mapping) else ""
        raise ArgumentTypeError(
            f"`training_config` is of type {type(config).__name__}; it must be a trainer.TrainingConfig.{hint}"
        )


def _warn_of_mode(model: nnx.Module, wrt: nnx.filterlib.Filter) -> None:
    if parts := evaluated_as_a_whole(model, wrt):
        listed = ", ".join(f"`{part}`" for part in parts[:5]) + (", …" if len(parts) > 5 else "")
        warn(
            f"`model` is in evaluation mode as a whole ({listed}) and stays in it while it is trained: no dropout, and "
            f"batch statistics do not move. If that is not meant, call model.train() before, or pass "
            f"`trainer.state.model()` in place of `trainer.model` of another trainer."
        )
