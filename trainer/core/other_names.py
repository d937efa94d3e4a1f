"""Names from other training libraries, and the errors that give the equivalent name here.

Users know names from Keras, Lightning and Hugging Face. Each name that they are likely to type here has an entry: what
to write instead. For any other name, Python raises its usual error.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, ParamSpec, TypeVar

from trainer.errors import ArgumentTypeError

P = ParamSpec("P")
R = TypeVar("R")

_RESUME = "`Trainer(workdir=...)` saves, and `train(..., resume=True)` resumes at the next batch"
_AVERAGE = "`Trainer(params_average=ema_of_params(0.999))`, or `polyak_average()`"
_RATE = "a `SchedulerConfig` in the `TrainingConfig`, or a schedule of optax in your optimizer"
_DISPLAY = "`Progress`, which a trainer has by default; `Trainer(progress=False)` turns it off"
_MODEL = "a model is any `nnx.Module`, and its step a `loss_fn(model, batch, rng, step)`"
_SEED = "`nnx.Rngs(0)` for the model, and `Trainer(rng=jax.random.key(0))`"
_LOADERS = "data are one argument, arrays in memory or a loader: `train(data, num_epochs, batch_size, val_data)`"
_EPOCHS = "`train(data, num_epochs, batch_size)`"
_BATCHES = "`TrainingConfig(steps_per_epoch=..., validation_steps=...)`"
_DEVICES = '`Trainer(mesh=make_mesh({"data": -1}))`; JAX\'s default device if left out'
_SILENT = "the display says it; `Trainer(progress=False)` turns that off"
_DIRECTORY = "`directory`, one for each run"
_COMPILED = "a step is always compiled; `Trainer(debug=True)` looks into it"
_OBJECTIVE = "`Trainer(loss_fn=...)`, whose `loss_fn(model, batch, rng, step)` returns the loss and a dict of metrics"
_WEIGHTS = "weigh in the `loss_fn`, and report `batch_weight`"

NAMES = {
    "AdvancedProfiler": "`JAXProfiler`",
    "BackupAndRestore": _RESUME,
    "BatchSizeFinder": "`Trainer.find_batch_size(example)`",
    "DeviceStatsMonitor": "`MemoryProfiler`, and `Trainer.throughput`",
    "EMAWeightAveraging": _AVERAGE,
    "EarlyStoppingCallback": "`EarlyStopping`",
    "Fabric": "your own loop over pure functions: `make_train_step`, `run_epoch`",
    "GradientAccumulationScheduler": "`Trainer(accumulate_steps=4)`: four parts of a batch, one update",
    "LearningRateFinder": "`Trainer.find_learning_rate(data, batch_size)`",
    "LearningRateScheduler": f"{_RATE}; `Trainer.set_learning_rate` in a callback",
    "LightningDataModule": _LOADERS,
    "LightningModule": _MODEL,
    "MLFlowLogger": "`MLflowLogger`",
    "ModelSummary": "`Trainer.summary()`, or `summarize`",
    "OrbaxCheckpoint": "`ModelCheckpoint`, which writes that format",
    "ProgbarLogger": _DISPLAY,
    "PyTorchProfiler": "`JAXProfiler`",
    "RichModelSummary": "`Trainer.summary()`, or `summarize`",
    "RichProgressBar": _DISPLAY,
    "SimpleProfiler": "`JAXProfiler`, and `Trainer.throughput`",
    "StochasticWeightAveraging": _AVERAGE,
    "SwapEMAWeights": _AVERAGE,
    "TQDMProgressBar": _DISPLAY,
    "TensorBoard": "`TensorBoardLogger`, a logger: `Trainer(logger=TensorBoardLogger(directory))`",
    "TerminateOnNaN": '`TerminateOnNonFinite`, or `Trainer(nonfinite="raise")`, which ends at the step',
    "ThroughputMonitor": "`Trainer.throughput`, which loggers get too",
    "TrainerCallback": "`Callback`",
    "TrainingArguments": "`TrainingConfig`",
    "WandBLogger": "`WandbLogger`",
    "WeightAveraging": _AVERAGE,
    "seed_everything": _SEED,
    "set_random_seed": _SEED,
}
"""Names imported from other libraries, and what to import or write here."""

ATTRIBUTES = {
    "callback_metrics": "`run.average.compute()` of the epoch, and `run.validation.averages`; `history` has all",
    "checkpoint_callback": "the `ModelCheckpoint` that you passed in",
    "current_epoch": "`epoch`, the epochs finished",
    "fit": _EPOCHS,
    "fit_generator": _EPOCHS,
    "get_weights": "`state.params`",
    "global_step": "`step`, the updates finished",
    "is_global_zero": "`is_primary_process`",
    "lightning_module": "`model`",
    "load_weights": "`load_checkpoint(path)`, or `load_weights(path, model)` of the package",
    "logged_metrics": "`history`",
    "params": "`state.params`; assign `state`, as in `trainer.state = trainer.state.replace(params=...)`",
    "predict_on_batch": "`predict(batch, batch_size)`",
    "save": "`save_checkpoint(path)`",
    "save_weights": '`save_checkpoint("weights.safetensors")`',
    "set_weights": "assign `state`, as in `trainer.state = trainer.state.replace(params=...)`",
    "stop_training": "`should_stop`; in a callback, set `self.should_stop = True`",
    "test": "`evaluate(data, batch_size)`",
    "test_on_batch": "`validate_step(batch)`",
    "train_on_batch": "`train_step(batch)`",
    "validate": "`evaluate(data, batch_size)`",
}
"""Attributes of trainers in other libraries, and what to use here."""

_OF_TRAINER = {
    "accelerator": _DEVICES,
    "accumulate_grad_batches": "`accumulate_steps`: parts of one batch, not several batches",
    "args": "`training_config`, a `TrainingConfig`",
    "config": "`training_config`, a `TrainingConfig`",
    "batch_size": _EPOCHS,
    "check_val_every_n_epoch": "`TrainingConfig(epochs_per_validation=...)`",
    "compute_metrics": "the second result of the `loss_fn`, a dict of metrics",
    "default_root_dir": "`workdir`",
    "detect_anomaly": "`debug=True`",
    "deterministic": "runs repeat to the bit on the CPU; on a GPU set `XLA_FLAGS=--xla_gpu_deterministic_ops=true`",
    "devices": _DEVICES,
    "enable_checkpointing": "nothing is saved without a `workdir` or a `checkpoint_dir`",
    "enable_model_summary": "`trainer.summary()` returns it",
    "enable_progress_bar": "`progress=False`",
    "epochs": _EPOCHS,
    "eval_dataset": _LOADERS,
    "gradient_clip_algorithm": "`OptimizerConfig(gradient_clip_value=...)` clips by value",
    "gradient_clip_val": "`TrainingConfig(gradient_clip_norm=...)`",
    "jit_compile": _COMPILED,
    "learning_rate": "`OptimizerConfig(learning_rate=...)` in the `TrainingConfig`, or in your `optimizer`",
    "limit_train_batches": _BATCHES,
    "limit_val_batches": _BATCHES,
    "log_every_n_steps": "`TrainingConfig(log_frequency=...)`",
    "loss": "`loss_fn`",
    "lr": "`OptimizerConfig(learning_rate=...)` in the `TrainingConfig`, or in your `optimizer`",
    "lr_scheduler": _RATE,
    "max_epochs": _EPOCHS,
    "max_steps": f"{_EPOCHS}; `TrainingConfig(steps_per_epoch=...)` bounds an epoch",
    "max_time": "the callback `Timer(duration)`",
    "metrics": "the second result of the `loss_fn`, a dict of metrics",
    "num_epochs": _EPOCHS,
    "num_nodes": "start a process on each, see `trainer.distributed`; then a `mesh` of all devices",
    "num_sanity_val_steps": "`fast_dev_run` tries all of a run before it",
    "num_train_epochs": _EPOCHS,
    "profiler": "the callback `JAXProfiler(directory)`",
    "resume_from_checkpoint": "`train(..., resume=path)`",
    "run_eagerly": _COMPILED,
    "scheduler": _RATE,
    "seed": _SEED,
    "steps_per_epoch": _BATCHES,
    "steps_per_execution": "small steps are fused by themselves; `steps_per_call` says how many",
    "strategy": _DEVICES,
    "sync_batchnorm": "over a `mesh` a batch is normalized as a whole",
    "train_data": _LOADERS,
    "train_dataloaders": "`train_data_loader`, for `train_epoch`; or `train(loader, num_epochs, batch_size)`",
    "train_dataset": _LOADERS,
    "tx": "`optimizer`",
    "val_data": _LOADERS,
    "val_dataloaders": "`val_data_loader`, for `train_epoch`; or `train(..., val_data=loader)`",
    "val_check_interval": "`train(..., val_interval=...)`, in steps",
    "verbose": "`progress=False`",
}
_OF_TRAIN = {
    "callbacks": "`Trainer(callbacks=[...])`",
    "ckpt_path": "`resume=path`, or `resume=True` for the latest",
    "class_weight": _WEIGHTS,
    "datamodule": _LOADERS,
    "epochs": "`num_epochs`",
    "initial_epoch": "`resume=True` continues where a run was",
    "max_epochs": "`num_epochs`",
    "max_steps": "`num_epochs`; `TrainingConfig(steps_per_epoch=...)` bounds an epoch",
    "model": "`Trainer(model, ...)`",
    "resume_from_checkpoint": "`resume=path`, or `resume=True` for the latest",
    "sample_weight": _WEIGHTS,
    "shuffle": "data in memory are shuffled, each epoch anew; a loader has its own order",
    "steps_per_epoch": _BATCHES,
    "train_dataloaders": _LOADERS,
    "val_dataloaders": _LOADERS,
    "validation_data": "`val_data`",
    "validation_freq": "`TrainingConfig(epochs_per_validation=...)`; `val_interval` counts steps",
    "validation_split": "split the data yourself, and pass `val_data`; nothing is held out without a word",
    "validation_steps": _BATCHES,
    "verbose": _SILENT,
    "x": _LOADERS,
    "y": "all arrays of the data are one argument, the first: `{'x': x, 'y': y}`, or `(x, y)`",
}
_OF_COMPILE = {
    "jit_compile": _COMPILED,
    "loss": _OBJECTIVE,
    "metrics": _OBJECTIVE,
    "optimizer": "`Trainer(optimizer=...)`, or `TrainingConfig(optimizer=...)`",
    "run_eagerly": _COMPILED,
    "steps_per_execution": "small steps are fused by themselves; `Trainer(steps_per_call=...)` says how many",
}
_OF_EVALUATE = {
    "callbacks": "an evaluation emits no events",
    "dataloaders": "`data`, which may be a loader",
    "return_dict": "the averages are always a dict",
    "sample_weight": _WEIGHTS,
    "steps": "a part of a loader as `data`, such as itertools.islice(loader, steps)",
    "verbose": "an evaluation shows nothing",
    "x": "all arrays of the data are one argument, the first: `{'x': x, 'y': y}`, or `(x, y)`",
    "y": "all arrays of the data are one argument, the first: `{'x': x, 'y': y}`, or `(x, y)`",
}
_OF_PREDICT = {
    "callbacks": "a prediction emits no events",
    "dataloaders": "`data`, which may be a loader",
    "steps": "a part of a loader as `data`, such as itertools.islice(loader, steps)",
    "verbose": "a prediction shows nothing",
    "x": "`data`",
}
_OF_EARLY_STOPPING = {
    "baseline": "`stopping_threshold` and `divergence_threshold` compare with a value",
    "check_on_train_epoch_end": "a metric `val_<name>` is checked at validations, any other at the end of epochs",
    "restore_best_weights": "`restore_best`",
    "start_from_epoch": "a longer `patience`",
    "strict": "a metric that does not exist is an error",
    "verbose": _SILENT,
}
_OF_MODEL_CHECKPOINT = {
    "every_n_train_steps": "`Trainer(save_interval=...)` saves by steps; the best are kept at validations",
    "filename": "a checkpoint is `dirpath/<step>`",
    "filepath": "`dirpath`, a directory",
    "save_best_only": "`save_top_k=1, save_last=False`",
    "save_freq": "`every_n_epochs`, or `Trainer(save_interval=...)` in steps",
    "save_on_exception": "SIGTERM and Ctrl-C save the run by themselves, where a `workdir` is given",
    "save_weights_only": '`Trainer.save_checkpoint("weights.safetensors")`; here the whole run is saved',
    "train_time_interval": "`Trainer(save_interval=...)`, in steps",
    "verbose": _SILENT,
}

ARGUMENTS: dict[str, Mapping[str, str]] = {
    "Trainer": _OF_TRAINER,
    "Trainer.train": _OF_TRAIN,
    "Trainer.compile": _OF_COMPILE,
    "Trainer.evaluate": _OF_EVALUATE,
    "Trainer.predict": _OF_PREDICT,
    "EarlyStopping": _OF_EARLY_STOPPING,
    "ModelCheckpoint": _OF_MODEL_CHECKPOINT,
    "CSVLogger": {
        "append": "a resumed run continues its table, and a new run starts one",
        "filename": _DIRECTORY,
        "name": _DIRECTORY,
        "save_dir": _DIRECTORY,
        "separator": "the table has commas",
        "version": _DIRECTORY,
    },
    "TensorBoardLogger": dict.fromkeys(("log_dir", "name", "save_dir", "version"), _DIRECTORY),
    "ReduceLROnPlateau": {"verbose": _SILENT, "min_learning_rate": "`min_lr`", "threshold": "`min_delta`"},
}
"""By callable: the keyword arguments that it has in other libraries, and what to pass here."""

PRECISIONS = {
    **dict.fromkeys(("bf16", "bf16-mixed", "bf16-true", "mixed_bfloat16"), "bfloat16"),
    **dict.fromkeys(("fp16", "16", "16-mixed", "16-true", "mixed_float16"), "float16"),
    **dict.fromkeys(("fp32", "32", "32-true"), "float32"),
}
"""Names of precisions in other libraries, and the dtype to pass here."""


def takes_no(owner: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Returns a decorator: keyword arguments from another library's ``owner`` raise an error that says what to pass.

    The signature and all other errors stay the same. It checks only argument names, once per call, so it is
    meant for constructors and for functions that are called once in a run.

    Args:
        owner: A key of `ARGUMENTS`.
    """
    hints = ARGUMENTS[owner]

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def checked(*args: P.args, **kwargs: P.kwargs) -> R:
            if unknown := [name for name in kwargs if name in hints]:
                told = "; ".join(f"for `{name}`: {hints[name]}" for name in unknown)
                listed = ", ".join(f"`{name}`" for name in unknown)
                raise ArgumentTypeError(f"{owner}(...) takes no {listed}. Here, {told}.")
            return function(*args, **kwargs)

        return checked

    return decorate


def not_assigned(owner: Any, value: Any) -> None:
    """Raises an AttributeError: a callback that ends the run sets ``should_stop`` on itself.

    For the setter of a property.
    """
    del value
    raise AttributeError(
        f"`should_stop` of {type(owner).__name__!r} cannot be assigned; in a callback, set `self.should_stop = True`, "
        f"which ends the run after the epoch."
    )


def missing_attribute(owner: Any, name: str) -> Any:
    """Raises the AttributeError of ``owner.name``; for a name in `ATTRIBUTES` it gives the equivalent here.

    For ``__getattr__``. Python also calls that if a property raised AttributeError; that error is raised again.
    """
    if name in ATTRIBUTES:
        kind = type(owner).__name__
        raise AttributeError(f"{kind!r} object has no attribute {name!r}; here, {ATTRIBUTES[name]}.", name=name)
    return object.__getattribute__(owner, name)
