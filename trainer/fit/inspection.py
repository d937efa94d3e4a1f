"""The methods of a `Trainer` that do not change it: summary, predictions, and searches for good settings."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import optax

from trainer.batches import batch_length
from trainer.compile.cost import ProgramCost, cost_of
from trainer.config import make_optimizer
from trainer.core.checks import check_count
from trainer.core.optimizer import adapt_optimizer, initial_opt_state
from trainer.core.other_names import ATTRIBUTES, missing_attribute, not_assigned, takes_no
from trainer.errors import ArgumentError
from trainer.fit.plan import plan_prediction, search_batches
from trainer.fit.read_only import ReadOnly
from trainer.fit.running import check_opt_state
from trainer.loop import predict
from trainer.sharding.placement import next_batch_from
from trainer.types import Batch

if TYPE_CHECKING:
    from trainer.features.search import RateSearch


class Inspection(ReadOnly):
    """The methods of a `trainer.Trainer` that leave it bit-identical and emit no events."""

    __slots__ = ()

    # Keras and Lightning assign these; see `trainer.core.other_names`.
    should_stop = ReadOnly.should_stop.setter(not_assigned)
    stop_training = property(
        lambda self: missing_attribute(self, "stop_training"),
        lambda self, value: missing_attribute(self, "stop_training"),
    )

    def __getattr__(self, name: str) -> Any:
        return missing_attribute(self, name)

    def __dir__(self) -> list[str]:
        return [name for name in super().__dir__() if name not in ATTRIBUTES]

    def summary(self, depth: int | None = None, batch: Batch | None = None) -> str:
        """Returns a table of the model, to print, with operation counts for a batch: see `trainer.summarize`."""
        from trainer.features.summary import summarize  # here, as below: runs do not need it

        if batch is not None:
            self.setup.placement.check_context()
        return summarize(self.run.peek(), depth, loss_fn=None if batch is None else self.setup.loss_fn, batch=batch)

    @takes_no("Trainer.predict")
    def predict(self, data: Any, batch_size: int, fn: Callable[[Any, Batch], Any] | None = None) -> Any:
        """Returns the model's predictions, in evaluation mode, for every example, in order.

        It changes nothing and emits no events. For data in memory it is equivalent to::

            predict(jax.jit(make_predict_step(fn)), trainer.state, InMemoryData(data, batch_size).in_order())

        Args:
            data: Data in memory or a loader, as ``train_data`` of `train`.
            batch_size: Examples per batch; the last may be short.
            fn: ``fn(model, batch) -> outputs``, traced like ``loss_fn``; for the default see `make_predict_step`. Each
                function compiles once per batch shape, so reuse the same one instead of a new lambda.

        Returns:
            The outputs of all processes, a pytree of NumPy arrays of shape ``(num_examples, ...)``.

        Raises:
            ArgumentError, BatchError: An argument cannot be used, or an output of ``fn`` lacks one row per example.
        """
        plan = plan_prediction(self.setup, self.run, data, check_count(batch_size, "batch_size"))
        state = self.run.state_with_edits()
        with plan as batches, self.setup.evaluating(state):
            return predict(self.setup.predict_step(fn), state, batches, placement=self.setup.placement)

    def export_prediction(
        self,
        path: str | os.PathLike[str],
        example: Batch,
        fn: Callable[[Any, Batch], Any] | None = None,
        *,
        batch_size: int | None = None,
        platforms: Sequence[str] | None = None,
    ) -> Path:
        """Exports the computation of `predict` for one batch to a file that runs with JAX alone.

        It is ``export_prediction(path, make_predict_step(fn), trainer.state, example)``, with the params and precision
        of `predict`; arguments and errors as for `trainer.export_prediction`.
        """
        from trainer.checkpoints.exported import export_prediction

        step, state = self.setup.predict_step(fn), self.run.state_with_edits()
        return export_prediction(path, step, state, example, batch_size=batch_size, platforms=platforms)

    def find_learning_rate(
        self,
        train_data: Any = None,
        batch_size: int | None = None,
        *,
        low: float = 1e-6,
        high: float = 1.0,
        steps: int = 100,
    ) -> RateSearch:
        """Trains a copy for a few steps with increasing learning rates, and reports where the loss falls fastest.

        It is `trainer.find_learning_rate` with the trainer's step and state, on data in the order of a run. The trainer
        is unchanged, and so is a loader: one that reports its position is put back, a callable or an iterable starts
        over. Batches drawn from an iterator that cannot be put back are lost, with a warning.

        Args:
            train_data: Data in memory or a loader, as for `train`; by default the trainer's ``train_data_loader``.
            batch_size: Examples per batch; by default that of the configuration.
            low, high, steps: As for `trainer.find_learning_rate`.

        Raises:
            ArgumentError, ArgumentTypeError: An argument cannot be used; the caller's optimizer keeps no learning rate
                in its state; or the step is a ``step_fn``.
        """
        from trainer.features.search import rates_between, try_rates

        setup = self.setup
        setup.placement.check_context()
        if setup.make_step is None:
            raise ArgumentError("the learning rate of a `step_fn` is its own, and cannot be searched.")
        rates = rates_between(low, high, steps)
        first = float(rates[0])
        if setup.given_optimizer is not None:  # the configured one is initialized here
            check_opt_state(setup, self.run)
        state = self.run.state_with_edits().copy()
        optimizer = self.optimizer if setup.given_optimizer is not None else self._optimizer_at(first)
        if setup.given_optimizer is None:
            opt_state = jax.tree.map(jax.numpy.array, initial_opt_state(optimizer, state.params))
            state = setup.placement.adopt(state.replace(opt_state=opt_state))
        state.with_learning_rate(first)  # raises here, before anything is compiled

        def batches(opened: Callable[[int], Iterator[Batch]]) -> Iterator[Batch]:
            for epoch in range(len(rates)):
                drawn = opened(epoch)
                while (taken := next_batch_from(setup.placement, drawn)) is not None:
                    yield taken[0]

        with search_batches(setup, train_data, batch_size) as opened:
            return try_rates(setup.make_step(optimizer), state, batches(opened), rates)

    def find_batch_size(self, example: Batch, *, high: int = 65536, memory: int | None = None) -> int:
        """Returns the largest power of two as batch size whose step fits into the memory of a device.

        It is ``find_batch_size(step, trainer.state, example)`` with the trainer's own step, on its devices; arguments
        and errors as for `trainer.find_batch_size`.
        """
        from trainer.features.search import largest_that_fits

        batch_length(example, "example")
        check_opt_state(self.setup, self.run)
        step, run = self.setup.make_compiled_step(), self.setup.with_weights(self.run).with_edits()

        def cost(size: int) -> ProgramCost:
            rows = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct((size, *leaf.shape[1:]), leaf.dtype), example)
            batch, _ = self.setup.placement.abstract_batch(rows)
            program, traced = step.trace(run, batch)
            return cost_of(program.compile(traced), run.leaves, 0.0)

        return largest_that_fits(cost, self._can_be_shared, high, memory)

    def _can_be_shared(self, size: int) -> bool:
        try:
            self.setup.placement.check_batch_size(size)
        except ArgumentError:
            return False
        return True

    def _optimizer_at(self, rate: float) -> optax.GradientTransformation:
        """Returns the configured optimizer with its learning rate in its state, and no schedule."""
        config = self.setup.config
        optimizer = optax.inject_hyperparams(functools.partial(make_optimizer, config.optimizer))(learning_rate=rate)
        if config.gradient_clip_norm is None:
            return optimizer
        return optax.chain(optax.clip_by_global_norm(config.gradient_clip_norm), adapt_optimizer(optimizer))
