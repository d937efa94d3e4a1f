"""`FitPlan`: what one call to ``Trainer.train`` or ``Trainer.train_epoch`` does, decided before anything changes."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from trainer.batches import is_indexed
from trainer.config import TrainingConfig
from trainer.core.checks import check_count, check_interval
from trainer.core.own_step import no_loss_fn
from trainer.data.loaders import check_loader, gives_batches, one_pass, takes_batch_size
from trainer.data.memory import InMemoryData
from trainer.data.resumable import LoaderPass, left_in_place
from trainer.errors import ArgumentError, ArgumentTypeError, warn
from trainer.fit.common_batches import common_pass, length_to_compare
from trainer.fit.identity import describe_call
from trainer.fit.live import Planned
from trainer.fit.setup import Setup
from trainer.fit.unused_settings import warn_of_overridden
from trainer.run import FromLoader, InMemory, Position, Run
from trainer.types import Batch


@dataclasses.dataclass(frozen=True)
class FitPlan:
    """What one call to ``train`` or ``train_epoch`` does.

    Attributes:
        caller: The name of the method, for messages.
        position: The position at the start, used to check that a checkpoint belongs to the same run.
        num_epochs: The number of epochs.
        batch_size: The number of examples in a batch; passed to a loader that takes an argument.
        data: The data in memory; None for a loader.
        loader: The loader; None for data in memory.
        name: The argument that holds the data, for messages.
        horizon: The number of steps of the call; None if unknown.
        planned: The planned length of the run that the call is part of.
        save_every: Save at multiples of this step; None for never.
        validate_every: Validate at multiples of this step, besides the ends of epochs; None for ends of epochs only.
        held_out: Opens the validation data; None for no validation.
        about: A description, for loggers.
        arguments: The arguments of the call, see `trainer.fit.identity`.
    """

    caller: str
    position: Position
    num_epochs: int
    batch_size: int
    data: InMemoryData | None
    loader: Any
    name: str
    horizon: int | None
    planned: Planned
    save_every: int | None
    validate_every: int | None
    held_out: Callable[[], Iterator[Batch]] | None
    about: str
    arguments: dict[str, str]

    @property
    def sync_every(self) -> list[int]:
        """The intervals in steps at which the host needs the state."""
        return [every for every in (self.save_every, self.validate_every) if every is not None]

    def validates_epoch(self, config: TrainingConfig, finished: int, *, is_last: bool) -> bool:
        """Returns whether to validate at the end of an epoch.

        Args:
            config: The configuration.
            finished: The epochs finished, this one included.
            is_last: Whether it is the last epoch of the call; more calls to ``train_epoch`` may follow.
        """
        every = config.epochs_per_validation
        if every is not None and finished % every == 0:
            return True
        return is_last and self.ends_run(config, finished)

    def reaches_save(self, step: int, *, if_unknown: bool) -> bool:
        """Returns whether a call from ``step`` on reaches a multiple of its interval of saves."""
        every = self.save_every
        if every is None or self.horizon is None:
            return every is not None and if_unknown
        return step // every < (step + self.horizon) // every

    def ends_run(self, config: TrainingConfig, finished: int) -> bool:
        """Returns whether the call's end ends the run, by its length: more calls to ``train_epoch`` may follow."""
        return self.caller == "train" or finished >= config.num_epochs


def plan_run(
    setup: Setup,
    run: Run,
    train_data: Any,
    val_data: Any,
    resume: Any,
    **counts: Any,
) -> FitPlan:
    """Returns the plan of a call to ``train``, on which all processes agree; ``counts`` are its other arguments."""
    num_epochs = check_count(counts["num_epochs"], "num_epochs", least=0)
    batch_size = check_count(counts["batch_size"], "batch_size")
    val_interval = check_interval(counts["val_interval"], "val_interval")
    counts = {"num_epochs": num_epochs, "batch_size": batch_size, "val_interval": val_interval}
    if setup.fast_dev_run:
        num_epochs = 1
    held_out, val_in_memory = _held_out(setup, val_data, batch_size)
    in_memory = not _is_loader(train_data)
    if isinstance(train_data, list):
        _warn_of_examples(train_data, batch_size)
    if setup.is_limited and not in_memory:
        train_data = setup.limited_loader(train_data, batch_size, "train_data")
        held_out = setup.limited_validation(held_out, _again(setup, train_data))
    common: dict[str, Any] = {
        "caller": "train",
        "num_epochs": num_epochs,
        "batch_size": batch_size,
        "save_every": setup.save_every(setup.save_interval, resume),
        "validate_every": None if held_out is None else val_interval,
        "held_out": held_out,
    }
    if setup.train_data_loader is None:  # else the configuration is meant for `train_epoch`
        warn_of_overridden(setup.config, setup.save_interval, num_epochs, batch_size)
    counts["resume"] = str(resume)
    told = {"val_interval": common["validate_every"]}
    given = {"train_data": train_data, "val_data": val_data}
    loaders = {name: one for name, one in given.items() if _is_loader(one)}
    limits = {"train_data": setup.config.steps_per_epoch, "val_data": setup.config.validation_steps}
    # With `overfit_batches`, validation is on the training batches.
    drawn = {name: one for name, one in loaders.items() if name == "train_data" or setup.overfit_batches is None}
    lengths = {name: length_to_compare(one, setup.placement, limits[name]) for name, one in drawn.items()}
    if not in_memory:
        common["arguments"] = describe_call(setup, told, val_data=val_in_memory, loaders=loaders)
        setup.agree_on_run("train", run, counts, lengths, val_data=val_in_memory)
        horizon = setup.horizon_of(train_data, num_epochs) or None
        common["planned"] = Planned(run.step, horizon, setup.horizon_of(train_data, 1), run.epoch, num_epochs)
        return _over_loader(
            run, train_data, "train_data", horizon=horizon, first_step=run.step, run_epoch=run.epoch, **common
        )
    data = setup.in_memory(train_data, batch_size, "train_data", limit=setup.config.steps_per_epoch)
    if setup.is_limited:
        data = setup.limited_data(data)
        common["held_out"] = setup.limited_validation(held_out, data.in_order)
    setup.check_micro_batches(data)
    if batch_size > data.num_examples:
        warn(
            f"`batch_size` is {batch_size} but `train_data` has {data.num_examples} examples; every epoch is "
            f"one batch of {data.num_examples}."
        )
    setup.agree_on_run("train", run, counts, lengths, train_data=data, val_data=val_in_memory)
    common["arguments"] = describe_call(setup, told, data, val_in_memory, loaders)
    return FitPlan(
        position=InMemory(setup.seed, data.examples_per_epoch, batch_size, run.epoch, run.step),
        data=data,
        loader=None,
        name="train_data",
        horizon=num_epochs * len(data) or None,
        planned=Planned(run.step, num_epochs * len(data), len(data), run.epoch, num_epochs),
        about=f"{num_epochs} epochs of {len(data)} steps, batch size {batch_size}",
        **common,
    )


def plan_epoch(setup: Setup, run: Run, resume: Any) -> FitPlan:
    """Returns the plan of a call to ``train_epoch``, on which all processes agree."""
    if setup.train_data_loader is None:
        raise ArgumentError(
            "`train_data_loader` was not given to the Trainer, and train_epoch() trains on nothing else; "
            "pass one, or call train(data, num_epochs, batch_size)."
        )
    size, loader, held_out = setup.config.batch_size, setup.val_data_loader, None
    if loader is not None:
        if setup.loss_fn is None:
            no_loss_fn()
        held_out = _passes_over(setup, loader, size, "val_data_loader")
    training = setup.train_data_loader
    if setup.is_limited:
        training = setup.limited_train_data_loader
        held_out = setup.limited_validation(held_out, _again(setup, training))
    lengths = {"train_data_loader": length_to_compare(training, setup.placement, setup.config.steps_per_epoch)}
    if loader is not None and setup.overfit_batches is None:
        limit = setup.config.validation_steps
        lengths["val_data_loader"] = length_to_compare(loader, setup.placement, limit)
    setup.agree_on_run("train_epoch", run, {"resume": str(resume)}, lengths)
    # Consecutive calls are one run, so that early stopping counts across them.
    before = run.position
    continues = isinstance(before, FromLoader) and before.batch == 0
    first_step = before.first_step if continues and before is not None else run.step
    run_epoch = run.epoch
    if isinstance(before, FromLoader) and continues and _is_over(before, training):
        run_epoch = before.run_epoch
    is_counted = setup.config.num_epochs != TrainingConfig.num_epochs
    return _over_loader(
        run,
        training,
        "train_data_loader",
        caller="train_epoch",
        num_epochs=1,
        batch_size=size,
        horizon=None,
        planned=Planned(
            first_step,
            setup.horizon_of(setup.train_data_loader) if is_counted else None,
            setup.horizon_of(setup.train_data_loader, 1),
            0,
            setup.config.num_epochs if is_counted else None,
        ),
        first_step=first_step,
        run_epoch=run_epoch,
        save_every=setup.save_every(setup.config.save_frequency, resume),
        validate_every=None,
        held_out=held_out,
        arguments=describe_call(setup, {}, loaders={"train_data_loader": training, "val_data_loader": loader}),
    )


@contextlib.contextmanager
def plan_evaluation(setup: Setup, run: Run, data: Any, batch_size: int) -> Iterator[Iterator[Batch]]:
    """A context with the batches of a call to ``evaluate``, on which all processes agree.

    Raises:
        ArgumentTypeError: The data are a list of arrays of one length: columns of a data set, or batches.
    """
    arrays = isinstance(data, list) and all(hasattr(one, "__array__") and np.ndim(one) for one in data)
    if arrays and len(data) > 1 and len(set(map(len, data))) == 1:
        raise ArgumentTypeError(
            f"`data` is a list of {len(data)} arrays of one length; pass a tuple if they are the columns of a data "
            f"set, (x, y), or iter(...) of it if they are batches."
        )
    held = None if _is_loader(data) else setup.in_memory(data, batch_size, "data")
    if held is None:
        batches = _all_of(data, batch_size)
        batches = setup.padded(batches, _rows_of(setup, data, "data", batch_size), grows=True)
    else:
        batches = held.in_order()
    lengths = {"data": length_to_compare(data, setup.placement)} if held is None else {}
    setup.agree_on_run("evaluate", run, {"batch_size": batch_size}, lengths, data=held)
    with common_pass(batches, setup.placement, "evaluation") as common:
        yield common


@contextlib.contextmanager
def plan_prediction(setup: Setup, run: Run, data: Any, batch_size: int) -> Iterator[Iterator[Batch]]:
    """A context with the batches of a call to ``predict``, on which all processes agree."""
    if _is_loader(data):
        batches = _all_of(data, batch_size)
        lengths = {"data": length_to_compare(data, setup.placement)}
        setup.agree_on_run("predict", run, {"batch_size": batch_size}, lengths)
        # With several processes, none knows which rows of a batch are the padding of another process.
        if setup.placement.num_processes == 1:
            batches = setup.padded(batches, _rows_of(setup, data, "data", batch_size), mask=False, grows=True)
        with common_pass(batches, setup.placement, "prediction") as common:
            yield common
        return
    held = setup.in_memory(data, batch_size, "data", mask=False)
    setup.agree_on_run("predict", run, {"batch_size": batch_size}, {}, data=held)
    yield held.in_order()


@contextlib.contextmanager
def search_batches(setup: Setup, data: Any, batch_size: int | None) -> Iterator[Callable[[int], Iterator[Batch]]]:
    """A context with a function that opens a pass, by its number, over data in the order of a run.

    Args:
        setup: The parts of the trainer.
        data: Data in memory or a loader; None for ``train_data_loader``, which is put back at the end of the context.
        batch_size: The number of examples in a batch; None for that of the configuration.
    """
    name = "train_data_loader" if data is None else "train_data"
    data = setup.train_data_loader if data is None else data
    if data is None:
        raise ArgumentError("`train_data` is missing, and the Trainer has no `train_data_loader`; pass either.")
    size = setup.config.batch_size if batch_size is None else check_count(batch_size, "batch_size")
    if not _is_loader(data):
        held = setup.in_memory(data, size, name)
        yield lambda number: held.shuffled(setup.seed, number)
        return
    check_loader(data, name, has_epoch=True)
    limit = setup.config.steps_per_epoch
    with left_in_place(data, name), contextlib.ExitStack() as passes:

        def opened(number: int) -> Iterator[Batch]:
            batches = setup.padded(one_pass(data, size, name, limit, bound="", epoch=number), size)
            return passes.enter_context(common_pass(batches, setup.placement, "range test"))

        yield opened


def first_batch(setup: Setup, plan: FitPlan) -> Batch:
    """Returns the first batch of a plan from a separate pass, for `Trainer.compile`."""
    if plan.data is not None:
        return next(plan.data.in_order())
    batches = one_pass(plan.loader, plan.batch_size, plan.name, 1, bound="", epoch=0)
    return next(setup.padded(batches, plan.batch_size))


def _over_loader(
    run: Run,
    loader: Any,
    name: str,
    *,
    batch_size: int,
    num_epochs: int,
    first_step: int,
    run_epoch: int,
    **more: Any,
) -> FitPlan:
    position = FromLoader(
        batch_size=batch_size if takes_batch_size(loader, name) else 0,
        first_epoch=run.epoch,
        first_step=first_step,
        run_epoch=run_epoch,
        # An iterator continues from where the previous pass left it.
        loader=run.position.loader if isinstance(run.position, FromLoader) else None,
    )
    about = f"{num_epochs} epoch{'s' * (num_epochs > 1)} over `{name}`"
    return FitPlan(
        position=position,
        data=None,
        loader=loader,
        name=name,
        num_epochs=num_epochs,
        batch_size=batch_size,
        about=about,
        **more,
    )


def _is_over(position: FromLoader, loader: Any) -> bool:
    """Returns whether the latest epoch was over this loader; that of a resumed run is taken to be."""
    return not isinstance(position.loader, LoaderPass) or position.loader.is_over(loader)


def _warn_of_examples(batches: list[Any], batch_size: int) -> None:
    """Warns if the items of a list seem to be examples: they are as many as a batch has, and are trained one by one."""
    if not 1 < batch_size <= len(batches):
        return
    try:
        shapes = [leaf.shape for leaf in jax.tree.leaves(batches[0]) if hasattr(leaf, "shape")]
    except Exception:  # keys that cannot be sorted, of which the pass tells
        return
    if not shapes or gives_batches(batches) or batch_size in {shape[0] for shape in shapes if shape}:
        return
    warn(
        f"`train_data` is a list of {len(batches)} items that look like examples, and each is trained as a batch: "
        f"`batch_size` = {batch_size} counts for nothing. For batches of examples, stack them: "
        f"jax.tree.map(lambda *rows: np.stack(rows), *train_data)."
    )


def _is_loader(data: Any) -> bool:
    """Returns whether the data is a loader (callable or iterable), not an array or a pytree other than a list."""
    if isinstance(data, Mapping | str | bytes) or hasattr(data, "__array__"):
        return False
    if not isinstance(data, list) and not jax.tree_util.all_leaves([data]):
        return False
    return callable(data) or isinstance(data, Iterable) or (is_indexed(data) and gives_batches(data))


def _all_of(loader: Any, batch_size: int) -> Iterator[Batch]:
    """Returns one pass over the loader passed as ``data``."""
    check_loader(loader, "data")
    return one_pass(loader, batch_size, "data", None, bound="pass itertools.islice(data, num_batches)")


def _passes_over(setup: Setup, loader: Any, batch_size: int, name: str) -> Callable[[], Iterator[Batch]]:
    """Returns a function that opens a pass over a validation loader, limited to ``validation_steps`` batches."""
    check_loader(loader, name, has_epoch=True)
    limit, rows = setup.config.validation_steps, _rows_of(setup, loader, name, batch_size)

    def opened() -> Iterator[Batch]:
        bound, epoch = "set `TrainingConfig.validation_steps`", setup.live.trainer().run.epoch
        batches = one_pass(loader, batch_size, name, limit, bound=bound, epoch=epoch)
        return setup.padded(batches, rows, grows=True)

    return opened


def _rows_of(setup: Setup, loader: Any, name: str, batch_size: int) -> int | None:
    """Returns how many rows to pad batches to that are only evaluated; None for as many as the first has.

    A loader that is not given ``batch_size`` has its own. But several processes pad to ``batch_size``, since none knows
    the first batch of another.
    """
    return batch_size if setup.placement.num_processes > 1 or takes_batch_size(loader, name) else None


def _again(setup: Setup, batches: list[Batch]) -> Callable[[], Iterator[Batch]]:
    return lambda: setup.padded(iter(batches))


def _held_out(
    setup: Setup, val_data: Any, batch_size: int
) -> tuple[Callable[[], Iterator[Batch]] | None, InMemoryData | None]:
    """Returns the function that opens the validation data, and the data itself if it is in memory."""
    if val_data is None:
        return None, None
    if setup.loss_fn is None:
        no_loss_fn()  # raises before an epoch is trained
    if _is_loader(val_data):
        return _passes_over(setup, val_data, batch_size, "val_data"), None
    held_out = setup.in_memory(val_data, batch_size, "val_data", limit=setup.config.validation_steps)
    return held_out.in_order, held_out
