"""`Run`: the training state and the host-side record that goes with it. A checkpoint holds exactly this.

A run is immutable. A step, a validation or a restored checkpoint makes a new one, so every change is atomic without
extra code: until the new run is assigned, nothing has happened.
"""

from __future__ import annotations

import dataclasses
import operator
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp

from trainer.core.assigned_values import as_arrays, with_edits_as_arrays
from trainer.data.resumable import LoaderPass, LoaderPosition
from trainer.errors import ArgumentError, StateError
from trainer.metrics.average import WeightedAverage, metrics_at
from trainer.metrics.history import History
from trainer.state import TrainState, is_gone, step_of_one
from trainer.types import Metrics


@dataclasses.dataclass(frozen=True)
class InMemory:
    """The position of a run over arrays in memory.

    Attributes:
        seed: The key data that determines the shuffle of every epoch.
        num_examples: The number of examples in the data.
        batch_size: The number of examples in a batch.
        first_epoch: The epochs finished when the run began.
        first_step: The updates finished when the run began.
        batch: The batches finished in the current epoch.
    """

    seed: tuple[int, ...]
    num_examples: int
    batch_size: int
    first_epoch: int = 0
    first_step: int = 0
    batch: int = 0


@dataclasses.dataclass(frozen=True)
class FromLoader:
    """The position of a run over a loader, or over the batches of a custom loop.

    Attributes:
        batch_size: The batch size that the loader is called with; 0 if it takes none.
        first_epoch: The epochs finished when the run, or the call to ``train_epoch``, began.
        first_step: The updates finished when the run began. Consecutive calls to ``train_epoch`` are one run.
        run_epoch: The epochs finished when the run began. Steps cannot tell: callbacks may take some of their own.
        batch: The batches finished in the current epoch.
        loader: The open pass over the loader, queried for its position only when a checkpoint is taken (the query may
            be slow). In a restored run, the position itself. None if no loader is known.
    """

    batch_size: int = 0
    first_epoch: int = 0
    first_step: int = 0
    run_epoch: int = 0
    batch: int = 0
    loader: LoaderPass | LoaderPosition | None = None


Position = InMemory | FromLoader


@dataclasses.dataclass(frozen=True)
class Validation:
    """The averages of the latest validation, the step of the validated state, and the epoch that trained it.

    Epochs count from 0; -1 stands for a state before the first step of epoch 0.
    """

    step: int
    averages: Mapping[str, float]
    epoch: int = 0


@dataclasses.dataclass(frozen=True)
class Layout:
    """The structure that turns a flat list of arrays into a state: the treedef, and which arrays are typed keys."""

    treedef: Any
    keys: tuple[tuple[int, str], ...]

    def unflatten(self, leaves: Sequence[Any]) -> tuple[TrainState, list[Any]]:
        """Returns the state, which shares the arrays, and its leaves."""
        leaves = list(leaves)
        for index, implementation in self.keys:
            # A donated array cannot be wrapped as a key. Left unwrapped, it still shows that the state was donated.
            if not is_gone(leaves[index]):
                leaves[index] = jax.random.wrap_key_data(leaves[index], impl=implementation)
        state: TrainState = jax.tree.unflatten(self.treedef, leaves)
        return state, leaves


def flatten_state(state: TrainState) -> tuple[list[Any], Layout]:
    """Returns the arrays of a state, with typed keys as key data, and their layout."""
    leaves, treedef = jax.tree.flatten(state)
    keys = []
    for index, leaf in enumerate(leaves):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            keys.append((index, str(jax.random.key_impl(leaf))))
            leaves[index] = jax.random.key_data(leaf)
    return leaves, Layout(treedef, tuple(keys))


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Run:
    """A training run at one step: the state, and the host-side record that goes with it.

    Make one with `start`, advance it with `trainer.run_epoch`, save it with `trainer.save_run`. A step with donation
    consumes the arrays of the run passed to it, so keep the run that it returns.

    Attributes:
        leaves: The arrays of the state, for a compiled step; see `Layout`. Do not modify the list.
        layout: The structure that turns ``leaves`` into the state.
        step: The number of updates finished. Held on the host, so reading it never waits for the device.
        epoch: The number of epochs finished.
        position: The position in the data; None outside a run, where there is nothing to resume.
        average: The weighted average over the current epoch; between epochs, over the latest one.
        metrics: The metrics of the latest step.
        validation: The latest validation, None before the first.
        logged_step: The latest step whose training metrics were logged.
        history: The logged rows.
        horizon: The step at which a computed learning-rate schedule ends; None if nothing depends on it.
        drawn: The number of examples in a batch drawn but not yet trained on; never saved.
        weights: The extension weights in the state, as known on the host; never saved.
        id: Identifies the run in its checkpoints. Random at the start, and kept when the run is resumed.
        arguments: The arguments of the current call, by name, as text; None outside a call.
    """

    # The compiled step takes a flat list of arrays: flattening a tree of 300 arrays on every call costs a tenth of a
    # step. The state is unflattened only when it is read.
    leaves: list[Any]
    layout: Layout
    step: int
    epoch: int = 0
    position: Position | None = None
    average: WeightedAverage = dataclasses.field(default_factory=WeightedAverage)
    metrics: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    validation: Validation | None = None
    logged_step: int = 0
    history: History = dataclasses.field(default_factory=History)
    horizon: int | None = None
    drawn: int | None = None
    weights: Mapping[str, Any] | None = None
    id: str = dataclasses.field(default_factory=lambda: secrets.token_hex(8))
    arguments: Mapping[str, str] | None = None
    # Two pairs [state, its leaves at the last comparison]: the state returned by the property `state`, whose mutable
    # containers the caller may edit, and the latest state consumed by a step, where edits come too late.
    _given: list[Any] | None = None
    _consumed: list[Any] | None = None
    _cached: list[TrainState] = dataclasses.field(default_factory=list)

    @classmethod
    def start(cls, state: TrainState, position: Position | None = None) -> Self:
        """Returns a run that starts at the step of ``state``.

        Args:
            state: The state. The run shares its arrays.
            position: The position in the data; by default that of a custom loop over batches.

        Raises:
            StateError: The state was donated to a step.
            ArgumentError: It is that of several models, stacked.
        """
        state.check_alive()
        leaves, layout = flatten_state(state)
        step = step_of_one(state)
        return cls(leaves, layout, step, position=position or FromLoader(first_step=step))

    @property
    def state(self) -> TrainState:
        """The training state. Assignments to its containers take effect in the next step.

        Raises:
            StateError: In the next step, if a state was edited after a step had consumed it. Only the latest consumed
                state is checked, so do not keep older ones.
        """
        if self._given is None:
            object.__setattr__(self, "_given", list(self.layout.unflatten(self.leaves)))
        assert self._given is not None
        state: TrainState = self._given[0]
        return state

    @property
    def batch(self) -> int:
        """The number of batches finished in the current epoch."""
        return 0 if self.position is None else self.position.batch

    @property
    def is_new(self) -> bool:
        """Whether the run is at its first step: neither resumed nor continued."""
        # A state that was rolled back to the first step within an epoch does not make the run a new one.
        return self.position is None or (self.step == self.position.first_step and not self.position.batch)

    @property
    def validation_of_epoch(self) -> Mapping[str, float]:
        """The averages of the latest validation if it ran in the current epoch, after a batch of it; else empty."""
        return {} if self.validation is None or self.validation.epoch != self.epoch else self.validation.averages

    @property
    def validation_of_step(self) -> Mapping[str, float]:
        """The averages of the latest validation if it ran on this state; else empty."""
        return {} if self.validation is None or self.validation.step != self.step else self.validation.averages

    def peek(self) -> TrainState:
        """Returns the state for reading only, without edits that `with_edits` has not applied yet."""
        if not self._cached:
            self._cached.append(self.layout.unflatten(self.leaves)[0])
        return self._cached[0]

    def state_with_edits(self) -> TrainState:
        """Returns the state for reading only, as the next step will see it; raises as `with_edits` does."""
        return self.with_edits().peek()

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with some fields replaced."""
        return dataclasses.replace(self, **changes)

    def with_state(self, state: TrainState, *, step: int | None = None, keeps_position: bool = False) -> Self:
        """Returns a run that continues from another state of the same structure.

        Args:
            state: The state.
            step: Its step, if known on the host; else it is read from the device.
            keeps_position: Whether to keep the position in the data. If False, the position is kept only if the state
                is at the same step; otherwise it is dropped, and there is nothing to resume.
        """
        leaves, layout = flatten_state(state)
        layout = self.layout if layout == self.layout else layout
        if step is None:
            state.check_alive()
            step = step_of_one(state)
        position = self.position if keeps_position or step == self.step else None
        changes = {"leaves": leaves, "layout": layout, "step": step, "position": position, "weights": None}
        if step != self.step:
            changes["validation"] = None  # of another state
        # The state returned earlier is replaced along with the edits made to it so far. Later edits to it would be
        # lost silently, so it is checked like a consumed state.
        replaced = self._consumed if self._given is None else [self._given[0], jax.tree.leaves(self._given[0])]
        return self.replace(**changes, _given=[state, jax.tree.leaves(state)], _consumed=replaced, _cached=[])

    def with_arrays(self, state: TrainState) -> TrainState:
        """Returns a state that was assigned with arrays in place of numbers and NumPy arrays, see `as_arrays`."""
        after: TrainState = as_arrays(state, self.peek())
        return after

    def with_edits(self) -> Self:
        """Returns the run with the caller's assignments to the containers of its `state` applied.

        Raises:
            StateError: A container of a consumed state was changed, or a new value does not fit the next step.
        """
        if self._given is None and self._consumed is None:
            return self
        if self._consumed is not None and _is_changed(self._consumed):
            # Raised once per edit: the run itself is intact, so the next step must not fail on the same edit.
            self._consumed[1] = jax.tree.leaves(self._consumed[0])
            raise StateError(
                "a `state` (or `params`, `opt_state`, …) was changed after a step had consumed it, so the change would "
                "be lost; ask the trainer for its state again after every step, and change that."
            )
        if self._given is None or not _is_changed(self._given):
            return self
        given, recorded = self._given
        _, held = self.layout.unflatten(self.leaves)
        leaves, _ = flatten_state(with_edits_as_arrays(given, recorded, held, self.layout.treedef))
        # The caller still holds the containers of `given` and may edit them again: track them, not the converted copy.
        return self.replace(leaves=leaves, _given=[given, jax.tree.leaves(given)], _cached=[])

    def drawing(self, examples: int | None) -> Self:
        """Returns the run with a batch drawn, which the next step counts; None for no batch."""
        return self._next(self.leaves, self.step, self.position, self.average, self.metrics, examples)

    def advance(self, leaves: list[Any], metrics: Metrics, examples: int | None, count: int | None = None) -> Self:
        """Returns the run after a call to a compiled step.

        Args:
            leaves: The arrays of the new state; those of this run were donated.
            metrics: Scalars; with ``count``, stacked as `trainer.fuse_steps` returns them.
            examples: The examples in each batch; None outside a run, where nothing is counted and nothing can be
                resumed afterwards.
            count: The number of fused steps, if any.
        """
        step = self.step + (count or 1)
        if examples is None:
            return self._next(leaves, step, None, self.average, metrics, None)
        average = self.average.copy()
        average.add(metrics, examples, count)
        last = metrics if count is None else metrics_at(metrics, count - 1)
        return self._next(leaves, step, _moved(self.position, count or 1), average, last, None)

    def recorded(self, metrics: Mapping[str, Any], *, step: int | None = None, prefix: str = "") -> Self:
        """Returns the run with a row added to its history.

        Args:
            metrics: The metrics.
            step: Their step; by default the current one.
            prefix: ``"val_"`` for validation averages; empty for training metrics.
        """
        return self.recorded_rows([(self.step if step is None else step, metrics)], prefix=prefix)

    def recorded_rows(
        self, rows: Sequence[tuple[int, Mapping[str, Any]]], *, prefix: str = "", logged: int | None = None
    ) -> Self:
        """Returns the run with several rows added to its history.

        Args:
            rows: The steps and their metrics, in ascending order.
            prefix: As for `recorded`.
            logged: The latest step sent to loggers, if not the step of the last row.
        """
        if not rows:
            return self
        history = self.history.copy()
        history.extend(rows, prefix)
        logged = rows[-1][0] if logged is None else logged
        if isinstance(self.position, InMemory):
            history.know_batches(self.position.first_step, self.position.num_examples, self.position.batch_size)
        return self.replace(history=history, logged_step=self.logged_step if prefix else logged)

    def validated(self, averages: Mapping[str, float]) -> Self:
        """Returns the run with the averages of a validation of its state, recorded in the history."""
        # Between epochs, as after the last of a run that a callback stopped, it belongs to the epoch that has ended.
        is_between = self.position is not None and not self.batch
        validation = Validation(self.step, dict(averages), self.epoch - is_between)
        return self.replace(validation=validation).recorded(averages, prefix="val_")

    def begin_epoch(self) -> Self:
        """Returns the run at the beginning of an epoch; a run resumed within an epoch is returned unchanged."""
        return self if self.batch else self.replace(average=WeightedAverage())

    def end_epoch(self) -> Self:
        """Returns the run after the current epoch, with the average of that epoch."""
        position = None if self.position is None else dataclasses.replace(self.position, batch=0)
        return self.replace(epoch=self.epoch + 1, position=position)

    def check_same_run(self, asked: Position) -> None:
        """Checks that the interrupted run and the requested one use the same data in the same order.

        Raises:
            ArgumentError: They differ; the message lists every difference.
        """
        names = {"seed": "rng", "num_examples": "train_data", "batch_size": "batch_size"}
        differences = [
            f"`{argument}` ({name.replace('_', ' ')}) was {getattr(self.position, name)} and is {getattr(asked, name)}"
            for name, argument in names.items()
            if hasattr(asked, name) and getattr(self.position, name, None) != getattr(asked, name)
        ]
        if differences:
            raise ArgumentError(
                f"`resume` cannot continue the interrupted run with other arguments: {'; '.join(differences)}. Pass "
                f"the same, or load_checkpoint() and start a new run."
            )

    def __repr__(self) -> str:
        return f"Run(step {self.step}, epoch {self.epoch}, batch {self.batch}, {len(self.history)} rows of history)"

    def _next(
        self,
        leaves: list[Any],
        step: int,
        position: Position | None,
        average: WeightedAverage,
        metrics: Mapping[str, Any],
        drawn: int | None,
    ) -> Self:
        # Every step makes a run. `dataclasses.replace` takes 4 µs for that, a tenth of the smallest step.
        after = object.__new__(type(self))
        after.__dict__.update(
            self.__dict__,
            leaves=leaves,
            step=step,
            position=position,
            average=average,
            metrics=metrics,
            drawn=drawn,
            _cached=[],
        )
        if leaves is not self.leaves:
            after.__dict__.update(_given=None, _consumed=self._given or self._consumed)
        return after


def _moved(position: Position | None, batches: int) -> Position | None:
    if position is None:
        return None
    return dataclasses.replace(position, batch=position.batch + batches)


def _is_changed(given: list[Any]) -> bool:
    state, leaves = given
    now = jax.tree.leaves(state)
    # By identity and without a Python loop: every step after a read of `Run.state` runs this.
    return len(now) != len(leaves) or any(map(operator.is_not, now, leaves))
