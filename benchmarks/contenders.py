"""Contenders: ways to make an update, ours and by hand, that a benchmark compares."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax

import by_hand
from trainer import TrainState, make_train_step
from workloads import Workload


@dataclasses.dataclass
class Contender:
    """A way to make one update of the params."""

    state: Any
    step: Callable[..., Any]
    batches: Sequence[Mapping[str, Any]]

    def update(self) -> Any:
        for batch in self.batches:
            self.state, metrics = self.step(self.state, batch)
        return metrics

    @property
    def scratch(self) -> int | None:
        """Bytes that XLA plans for a call, besides arguments and results; None if unknown."""
        return self.step.lower(self.state, self.batches[0]).compile().memory_analysis().temp_size_in_bytes


class OneByOne(Contender):
    """Members that are trained one after the other."""

    def update(self) -> Any:
        members = [Contender(state, self.step, self.batches) for state in self.state]
        metrics = [member.update() for member in members]
        self.state = [member.state for member in members]
        return metrics

    @property
    def scratch(self) -> int:
        return self.step.lower(self.state[0], self.batches[0]).compile().memory_analysis().temp_size_in_bytes


@dataclasses.dataclass
class Checked(Contender):
    """Steps with a check before each of them; the check has its own compiled programs."""

    check: Callable[[Any, Any], None]
    scratch = None

    def update(self) -> Any:
        for batch in self.batches:
            self.check(self.state, batch)
        return super().update()


def ours(
    workload: Workload,
    batch: Mapping[str, Any] | None = None,
    optimizer: optax.GradientTransformation | None = None,
    model: Any = None,
    **options: Any,
) -> Contender:
    """The step of this library with keywords of `make_train_step`."""
    optimizer = workload.optimizer() if optimizer is None else optimizer
    held = {name: options[name] for name in ("nonfinite", "precision", "wrt") if name in options}
    model = workload.make_model() if model is None else model
    state = TrainState.create(model, optimizer, rng=jax.random.key(0), **held)
    step = jax.jit(make_train_step(workload.loss_fn, optimizer, **options), donate_argnums=0)
    return Contender(state, step, [workload.batch if batch is None else batch])


def hand_written(
    workload: Workload,
    optimizer: optax.GradientTransformation | None = None,
    parts: int = 1,
    batch: Mapping[str, Any] | None = None,
    model: Any = None,
    **options: Any,
) -> Contender:
    """The step by hand with keywords of `by_hand.make_step`, called on each of several parts of the batch."""
    optimizer = workload.optimizer() if optimizer is None else optimizer
    model = workload.make_model() if model is None else model
    state, step = by_hand.make_step(model, workload.loss_fn, optimizer, **options)
    batch = workload.batch if batch is None else batch
    batches = [{name: column[i::parts] for name, column in batch.items()} for i in range(parts)]
    return Contender(state, jax.jit(step, donate_argnums=0), batches)
