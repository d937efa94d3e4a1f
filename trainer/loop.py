"""The loop: `run_epoch` advances a run over batches, `evaluate` averages metrics, `predict` concatenates outputs.

None of them needs a `Trainer`.

`Trainer.train`, `Trainer.train_epoch` and a custom loop are the same loop::

    for tick in run_epoch(step, run, batches):
        run = tick.run  # the previous run was donated
"""

import collections
import contextlib
import dataclasses
import gc
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from trainer.batches import is_indexed
from trainer.compile.dispatch import CompiledStep, DispatchPlan, explain_lost_state
from trainer.data.loaders import check_batches, no_batch
from trainer.data.memory import Epoch
from trainer.data.padding import PaddedBatches
from trainer.data.prefetching import Prefetched
from trainer.data.resumable import LoaderPass, LoaderPosition
from trainer.errors import ArgumentError, ArgumentTypeError, BatchError
from trainer.metrics.average import WeightedAverage
from trainer.metrics.throughput import Meter
from trainer.run import FromLoader, Run
from trainer.sharding.placement import Placement, next_batch_from
from trainer.sharding.single_device import SingleDevice
from trainer.state import TrainState
from trainer.types import Batch, Metrics

MAX_IN_FLIGHT = 2
"""The most calls in flight: one running and one queued, so that there is no gap. More would only hold memory."""

_FROZEN_BY_PYTHON = 1000  # Python 3.12 itself freezes 375 objects; a program that calls gc.freeze has tens of thousands
_COLLECT_AT = 50_000


@dataclasses.dataclass
class Tick:
    """One call to the compiled step, finished or in flight.

    Attributes:
        run: The run after the call; its state may still be computing. Assign another run to continue from it.
        metrics: Scalars on the device; with ``count``, stacked as `trainer.fuse_steps` returns them.
        count: The number of fused steps in the call; None if steps are not fused.
        examples: The examples in each batch. If fused steps end with a padded batch (``pad_to``), its padding counts.
    """

    run: Run
    metrics: Metrics
    count: int | None
    examples: int

    @property
    def steps(self) -> int:
        """The number of steps in the call."""
        return self.count or 1


class InFlight:
    """Limits the number of calls in flight, so that the host does not run too far ahead of the device."""

    def __init__(self, limit: int = MAX_IN_FLIGHT) -> None:
        self._results: collections.deque[jax.Array] = collections.deque()
        self._limit = limit

    def add(self, result: jax.Array) -> None:
        """Adds the result of a call; waits for the oldest call if the limit is exceeded."""
        self._results.append(result)
        if len(self._results) > self._limit:
            self._results.popleft().block_until_ready()


def run_epoch(
    step: CompiledStep,
    run: Run,
    batches: Iterable[Batch],
    *,
    sync_every: Sequence[int] = (),
    plan: DispatchPlan | None = None,
    placement: Placement | None = None,
    meter: Meter | None = None,
    each: Callable[[Run, Batch, int], tuple[Run, Metrics]] | None = None,
) -> Iterator[Tick]:
    """Advances a run over batches, and yields after each call to the compiled step.

    A step is counted before its tick is yielded, so a checkpoint taken then is complete. Each call is dispatched while
    the previous one runs, and the next batches are prepared meanwhile. Over data in memory (`trainer.InMemoryData`)
    steps are fused: one call runs several small steps, but never crosses a multiple of ``sync_every``. Any other
    iterable takes one call per batch.

    Args:
        step: The compiled step.
        run: The run to start from. Its state is donated: afterwards only the latest ``tick.run`` can be used.
        batches: One pass over data in memory, or an iterable of batches.
        sync_every: Intervals in steps at which you need the state, to save, validate or log.
        plan: How to call the step; by default decided by `plan_dispatch`.
        placement: Where to put batches; by default JAX's default device.
        meter: Measures throughput.
        each: Called on each batch in place of ``step``; steps are then not fused.

    Yields:
        A `Tick` for each call. The loop continues from ``tick.run``, so you may assign to it.

    Raises:
        ArgumentTypeError: ``step`` is not a `CompiledStep`, such as a function returned by ``jax.jit``.
        BatchError: A batch cannot be used. The run of the latest tick is intact.
    """
    if not isinstance(step, CompiledStep):
        raise ArgumentTypeError(
            f"`step` is of type {type(step).__name__}; it must be a trainer.CompiledStep, as in "
            f"CompiledStep(make_train_step(loss_fn, optimizer)), which compiles it by itself."
        )
    placement = SingleDevice() if placement is None else placement
    batches = _iterator(batches)
    if plan is None:
        plan = plan_dispatch(step, run, batches, sync_every=sync_every, placement=placement, fuse=each is None)
    meter = Meter(plan.flops, plan.product_dtype) if meter is None else meter
    in_flight = InFlight()
    # A fused plan has counted the operations; `each` may give the step other batches than these.
    is_counted = plan.flops is not None or plan.program is not None or each is not None
    while True:
        with meter.preparing():
            drawn = _draw(batches, run, plan, placement, at_once=each is not None)
        if drawn is None:
            return
        batch, examples, count = drawn
        if count is not None:
            after, metrics = step.fused(plan, run, batch, count, placement.replicated_int(count), examples)
        elif each is not None:
            after, metrics = each(run, batch, examples)
        else:
            try:
                after, metrics = step(run, batch, examples)
            except (TypeError, ValueError) as error:  # for example batch shapes that the objective does not accept
                error.add_note(f"raised by the step on batch {run.batch}, the first being batch 0")
                raise
        # Any output shows that the call has finished, but only metrics remain valid: the next call donates the state.
        result = metrics["step"] if "step" in metrics else jax.tree.leaves(metrics)[0]
        in_flight.add(result)
        meter.dispatched(result, count or 1, examples)
        tick = Tick(after, metrics, count, examples)
        yield tick
        run = tick.run
        if not is_counted:  # the shape of a loader's batches is known only now; the call has traced the step
            meter.count(*step.work(run, batch))
            is_counted = True
        if not step.is_current(plan):  # an extension was switched on or off
            plan = plan_dispatch(step, run, batches, sync_every=sync_every, placement=placement)


def open_pass(
    run: Run, loader: Any, *, batch_size: int = 0, name: str = "loader", limit: int | None = None
) -> tuple[Run, LoaderPass]:
    """Opens a loader at the position of a run: at its start, or at the next batch of a resumed epoch.

    Args:
        run: The run, outside an epoch or restored from a checkpoint.
        loader: An iterable of batches, or a callable that returns one and may take ``batch_size`` and ``epoch``, the
            number of epochs that the run has finished.
        batch_size: The argument for a callable that takes one.
        name: Its name in error messages.
        limit: The maximum number of batches per pass; None for no limit.

    Returns:
        The run, holding the open pass so that a checkpoint can query its position; and the pass, an iterator.

    Raises:
        CheckpointError: The loader rejects the position, or has too few batches.
        ArgumentError: It is an iterator that cannot be set to a position.
    """
    position = run.position if isinstance(run.position, FromLoader) else FromLoader(first_step=run.step)
    before, where = position.loader, None
    if isinstance(before, LoaderPosition):
        # The pass has ended: the next one starts from there, with no batches drawn.
        where = dataclasses.replace(before, drawn=0) if before.over and not position.batch else before
    elif position.batch:
        where = LoaderPosition()
    previous = before if isinstance(before, LoaderPass) else None
    loader_pass = LoaderPass(
        loader, batch_size, name, limit, previous, run.epoch, _passes(run, position, loader, limit)
    )
    loader_pass.open(where, position.batch)
    return run.replace(position=dataclasses.replace(position, loader=loader_pass)), loader_pass


def _passes(run: Run, position: FromLoader, loader: Any, limit: int | None) -> int:
    """Returns the number of passes over a loader that a run has finished; of an indexed one, only whole passes."""
    # A pass that ends before the last index never ends an epoch of the loader.
    if limit is not None and is_indexed(loader) and limit < len(loader):
        return 0
    return run.epoch - position.run_epoch


def prefetched(
    batches: Iterable[Batch], count: int = 2, *, placement: Placement | None = None, may_be_short: bool = True
) -> Prefetched:
    """Prefetches batches in a thread: draws them and places them on the device ahead of use.

    `run_epoch` dispatches asynchronously, so it already draws while the device computes. Prefetching helps if the loop
    waits for each step (for example to print its loss), or if some batches take much longer than others. Order and
    results stay the same. The loader runs in a thread, so it must not need the main thread or change during the pass::

        with prefetched(batches, 2) as ahead:
            for tick in run_epoch(step, run, ahead):
                run = tick.run

    Args:
        batches: An iterable of batches. The position of a pass from `open_pass` counts only the batches trained on.
            Data in memory (`trainer.InMemoryData`) gains nothing.
        count: The maximum number of batches drawn ahead; each takes device memory.
        placement: Where to put batches; by default JAX's default device.
        may_be_short: Whether the first batch may be a short last one, see `Placement.place_batch`.

    Returns:
        An iterator of batches; see `trainer.data.Prefetched`. An iterator dropped early loses its prefetched batches.

    Raises:
        ArgumentError: ``count`` is not a positive integer.
        BatchError: A batch cannot be used; raised when the iterator reaches it.
    """
    where = SingleDevice() if placement is None else placement
    numbers = itertools.count()

    def place(batch: Batch) -> Batch:
        return where.place_batch(batch, may_be_short=may_be_short or next(numbers) > 0)[0]

    return Prefetched(batches, count, place)


def plan_dispatch(
    step: CompiledStep,
    run: Run,
    batches: Iterable[Batch],
    *,
    sync_every: Sequence[int] = (),
    placement: Placement | None = None,
    fuse: bool = True,
) -> DispatchPlan:
    """Decides how many steps over these batches to fuse into one call; arguments as for `run_epoch`.

    Batches that are not in memory are unknown until they are drawn, so their steps are not fused. With
    ``jax_debug_nans`` or ``jax_debug_infs`` on, steps are not fused either, so that the error identifies the step.
    """
    debugs = jax.config.jax_debug_nans or jax.config.jax_debug_infs  # type: ignore[attr-defined]
    if not isinstance(batches, Epoch) or not batches.full_batches:
        return DispatchPlan()
    placement = SingleDevice() if placement is None else placement
    most = min(*sync_every, batches.full_batches_in_epoch) if sync_every else batches.full_batches_in_epoch
    return step.plan(run, placement.abstract_batch_of(batches), most if fuse and not debugs else 1, sync_every)


def evaluate(
    eval_step: Callable[..., Metrics],
    state: TrainState,
    batches: Iterable[Batch],
    *,
    placement: Placement | None = None,
    check: Callable[[], None] | None = None,
) -> dict[str, float]:
    """Returns the weighted averages of the metrics over batches. Changes nothing, not even the key.

    Equivalent to::

        average = WeightedAverage()
        for index, batch in enumerate(batches):
            average.add(eval_step(state, batch, index), examples_in(batch))
        return average.compute()

    Args:
        eval_step: ``jax.jit(make_eval_step(loss_fn))``.
        state: The state. It is not donated.
        batches: An iterable of batches; the last may be short.
        placement: Where to put batches; by default JAX's default device.
        check: Called after each batch, for signals; an exception that it raises ends the evaluation.
    """
    placement = SingleDevice() if placement is None else placement
    average, batches, index = WeightedAverage(), _iterator(batches), 0
    while (taken := _next_batch(batches, index, placement)) is not None:
        batch, examples = taken
        average.add(evaluate_batch(eval_step, state, batch, index, placement), examples)
        index += 1
        if check is not None:
            check()
    return average.compute()


def evaluate_batch(
    eval_step: Callable[..., Metrics], state: TrainState, batch: Batch, index: int, placement: Placement
) -> Metrics:
    """Returns the metrics of one batch; ``index`` is its number within the evaluation."""
    metrics: Metrics = _called(eval_step, placement, state, batch, placement.replicated_int(index))
    return metrics


def predict(
    predict_step: Callable[[TrainState, Batch], Any],
    state: TrainState,
    batches: Iterable[Batch],
    *,
    placement: Placement | None = None,
) -> Any:
    """Returns the model's predictions for all examples, in their order. Changes nothing.

    Equivalent to::

        outputs = [predict_step(state, batch) for batch in batches]
        return jax.tree.map(lambda *parts: np.concatenate(parts), *outputs)

    Args:
        predict_step: ``jax.jit(make_predict_step(fn))``. Over a mesh of several processes its outputs must be
            replicated (``out_shardings``).
        state: The state. It is not donated.
        batches: An iterable of batches; the last may be short. Padding added by the data or the loader (``pad_to``)
            is removed from the outputs.
        placement: Where to put batches; by default JAX's default device.

    Returns:
        The outputs, as NumPy arrays of shape ``(num_examples, ...)`` in host memory. The device holds those of a few
        batches at a time.

    Raises:
        ArgumentError: There was no batch, an output lacks one row per example, or the outputs of two batches differ
            in shape beyond the first dimension.
    """
    placement = SingleDevice() if placement is None else placement
    batches = _iterator(batches)
    parts: list[Any] = []
    in_flight: collections.deque[tuple[Any, int | None]] = collections.deque()
    while (taken := _next_batch(batches, len(parts) + len(in_flight), placement)) is not None:
        examples = batches.drawn if isinstance(batches, Epoch | PaddedBatches) else None
        in_flight.append((_called(predict_step, placement, state, taken[0]), examples))
        if len(in_flight) > MAX_IN_FLIGHT:
            parts.append(_without_padding(*in_flight.popleft()))
    parts.extend(_without_padding(*one) for one in in_flight)
    if not parts:
        raise no_batch("batches")
    return jax.tree.map(_joined, *parts)


def _iterator(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Opens an iterable of batches; raises `ArgumentTypeError` for data, whose iterator yields keys or columns."""
    check_batches(batches, "`batches`")
    return iter(batches)


def _called(step: Callable[..., Any], placement: Placement, state: TrainState, *arguments: Any) -> Any:
    try:
        result = step(state, *arguments)
        return jax.block_until_ready(result) if placement.one_call_at_a_time else result
    except Exception as error:
        explain_lost_state(state, error)
        raise


def _without_padding(outputs: Any, examples: int | None) -> Any:
    return jax.tree.map(lambda leaf: leaf[:examples], jax.device_get(outputs))


def _joined(*parts: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    shapes = {part.shape[1:]: part.shape for part in parts}
    if len(shapes) > 1:
        raise ArgumentError(
            f"`fn` returned outputs of shapes {' and '.join(map(str, list(shapes.values())[:2]))} for two batches, "
            f"which cannot be put together; pad them to one size."
        )
    return np.concatenate(parts)


@contextlib.contextmanager
def rare_collections() -> Iterator[None]:
    """Makes garbage collection cheap inside the block, and restores its settings afterwards.

    A full collection traverses every object of the process, which takes 100 ms with JAX loaded. Existing objects are
    frozen, so collections inside the block traverse new objects only. A disabled collector stays disabled.
    """
    if not gc.isenabled() or gc.get_freeze_count() > _FROZEN_BY_PYTHON:
        yield
        return
    thresholds = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(_COLLECT_AT, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)
        gc.unfreeze()


def _draw(
    batches: Iterator[Batch], run: Run, plan: DispatchPlan, placement: Placement, *, at_once: bool
) -> tuple[Any, int, int | None] | None:
    """Returns the input of the next call, the examples per batch, and the number of fused steps (None if not fused)."""
    if plan.program is not None and isinstance(batches, Epoch) and batches.full_batches:
        count = min(plan.steps_before_sync(run.step), batches.full_batches)
        return placement.next_batches(batches, count, plan.capacity), batches.batch_size, count
    # Only the first batch of an epoch cannot be a short last one.
    taken = _next_batch(batches, run.batch, placement, may_be_short=run.batch > 0, at_once=at_once)
    return None if taken is None else (*taken, None)


def _next_batch(
    batches: Iterator[Batch], index: int, placement: Placement, *, may_be_short: bool = True, at_once: bool = False
) -> tuple[Batch, int] | None:
    try:
        return next_batch_from(placement, batches, may_be_short=may_be_short, at_once=at_once)
    except BatchError as error:
        error.add_note(f"raised for batch {index}, the first being batch 0")
        raise
