"""`Run`: the training state and everything that travels with it. A checkpoint holds exactly this.

A run is an immutable value. A step, a validation or a restored checkpoint makes a new one, so "all or nothing"
needs no code: until the new run is assigned, nothing has happened.
"""

from __future__ import annotations

import dataclasses
import operator
import secrets
from collections.abc import Mapping, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp

from trainer.core.tree_paths import leaf_path
from trainer.data.resumable import LoaderPass, LoaderPosition
from trainer.errors import ArgumentError, StateError
from trainer.metrics.average import WeightedAverage, metrics_at
from trainer.metrics.history import History
from trainer.state import TrainState, is_gone
from trainer.types import Metrics


@dataclasses.dataclass(frozen=True)
class InMemory:
    """The position of a run over arrays in memory.

    Attributes:
        seed: The key data from which the order of every epoch is drawn.
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
    """The position of a run over a loader, or over batches of your own loop.

    Attributes:
        batch_size: The batch size that the loader is called with; 0 if it takes none.
        first_epoch: The epochs finished when the run, or the call of ``train_epoch``, began.
        first_step: The updates finished when the run began. Consecutive calls of ``train_epoch`` are one run.
        batch: The batches finished in the current epoch.
        loader: The open pass over the loader, which is asked for its position when a checkpoint is taken (asking
            may be slow); or the position itself, in a run that was restored; None where no loader is known.
    """

    batch_size: int = 0
    first_epoch: int = 0
    first_step: int = 0
    batch: int = 0
    loader: LoaderPass | LoaderPosition | None = None


Position = InMemory | FromLoader


@dataclasses.dataclass(frozen=True)
class Validation:
    """The averages of the latest validation, and the step of the state that was validated."""

    step: int
    averages: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a flat list of arrays makes up a state: the tree, and the arrays that are key data of typed keys."""

    treedef: Any
    keys: tuple[tuple[int, str], ...]

    def unflatten(self, leaves: Sequence[Any]) -> tuple[TrainState, list[Any]]:
        """Returns the state, which shares the arrays, and the leaves in it."""
        leaves = list(leaves)
        for index, implementation in self.keys:
            # A donated array cannot be wrapped as a key. Left as it is, it still shows that the state is gone.
            if not is_gone(leaves[index]):
                leaves[index] = jax.random.wrap_key_data(leaves[index], impl=implementation)
        state: TrainState = jax.tree.unflatten(self.treedef, leaves)
        return state, leaves


def flatten_state(state: TrainState) -> tuple[list[Any], Layout]:
    """Returns the arrays of a state, typed keys as key data, and their layout."""
    leaves, treedef = jax.tree.flatten(state)
    keys = []
    for index, leaf in enumerate(leaves):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            keys.append((index, str(jax.random.key_impl(leaf))))
            leaves[index] = jax.random.key_data(leaf)
    return leaves, Layout(treedef, tuple(keys))


@dataclasses.dataclass(frozen=True, repr=False, eq=False)
class Run:
    """A training run at one step: the state, and the host-side record that travels with it.

    Make one with `start`, advance it with `trainer.run_epoch`, save it with `trainer.save_run`. A step that donates
    consumes the arrays of the run that it is given; the run that it returns is the one to keep.

    Attributes:
        step: The number of updates finished. Known on the host, so reading it never waits.
        epoch: The number of epochs finished.
        position: Where in the data the run is; None outside a run, where there is nothing to resume.
        average: The weighted average over the current epoch, or over the latest one between two epochs.
        metrics: The metrics of the latest step.
        validation: The latest validation, None before the first.
        logged_step: The latest step whose training metrics were logged.
        history: The rows that were logged.
        horizon: The step at which a computed learning-rate schedule ends, None where nothing depends on it.
        drawn: The number of examples in a batch that was drawn and is not trained on yet; it is never saved.
        weights: The weights of the extensions in the state, as the host knows them; they are never saved.
        id: Names the run in its checkpoints: a random one at its start, and the same after it was resumed.
        arguments: What the call in progress was made with, by name, as texts; None outside a call.
    """

    # The compiled step takes the flat list of arrays: flattening a tree of 300 arrays on every call costs a tenth
    # of a step. The state is unflattened when it is read.
    _leaves: list[Any]
    _layout: Layout
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
    # Two pairs [state, its leaves at the last comparison]: the state that the property `state` returned, whose mutable
    # containers the caller may edit, and the latest one that a step consumed, where edits come too late.
    _given: list[Any] | None = None
    _consumed: list[Any] | None = None
    _cached: list[TrainState] = dataclasses.field(default_factory=list)

    @classmethod
    def start(cls, state: TrainState, position: Position | None = None) -> Self:
        """Returns the run at its beginning, or at the step that ``state`` has come to.

        Args:
            state: The state. The run shares its arrays.
            position: The tag of the data; the default is that of batches from a loop of your own.

        Raises:
            StateError: The state was donated to a step.
        """
        state.check_alive()
        leaves, layout = flatten_state(state)
        step = int(state.step)
        return cls(leaves, layout, step, position=position or FromLoader(first_step=step))

    @property
    def state(self) -> TrainState:
        """The training state. Assignments to the containers in it take effect in the next step.

        Raises:
            StateError: From the next step, where the assignment comes after a step has consumed the state. Only the
                latest consumed state is watched, so do not keep older ones.
        """
        if self._given is None:
            object.__setattr__(self, "_given", list(self._layout.unflatten(self._leaves)))
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
        return self.position is None or self.step == self.position.first_step

    @property
    def validation_of_epoch(self) -> Mapping[str, float]:
        """The averages of the latest validation, if it was in the current epoch; else empty."""
        if self.validation is None or self.validation.step <= self.step - self.batch:
            return {}
        return self.validation.averages

    @property
    def validation_of_step(self) -> Mapping[str, float]:
        """The averages of the latest validation, if it was of this state; else empty."""
        return {} if self.validation is None or self.validation.step != self.step else self.validation.averages

    @property
    def leaves(self) -> list[Any]:
        """The arrays of the state, for a compiled step; see `Layout`. It is not to be changed."""
        return self._leaves

    @property
    def layout(self) -> Layout:
        """How `leaves` make up the state."""
        return self._layout

    def peek(self) -> TrainState:
        """Returns the state for reading only, without edits that `with_edits` has not taken over yet."""
        if not self._cached:
            self._cached.append(self._layout.unflatten(self._leaves)[0])
        return self._cached[0]

    def state_with_edits(self) -> TrainState:
        """Returns the state for reading only, as the next step takes it; raises as `with_edits` does."""
        return self.with_edits().peek()

    def replace(self, **changes: Any) -> Self:
        """Returns a copy with some fields replaced."""
        return dataclasses.replace(self, **changes)

    def with_state(self, state: TrainState, *, step: int | None = None, keeps_position: bool = False) -> Self:
        """Returns a run that continues from another state of the same structure.

        Args:
            state: The state.
            step: Its step, if the host knows it; else it is read from the device.
            keeps_position: Whether the run stays where it is in its data. If not, it does so only if the state is at
                the same step; else it is outside of any run, and there is nothing to resume.
        """
        leaves, layout = flatten_state(state)
        layout = self._layout if layout == self._layout else layout
        if step is None:
            state.check_alive()
            step = int(state.step)
        position = self.position if keeps_position or step == self.step else None
        changes = {"_leaves": leaves, "_layout": layout, "step": step, "position": position, "weights": None}
        # Edits so far to the state that was returned before are replaced with it, as asked. Later edits to it would be
        # lost silently, so it is watched as a consumed one.
        replaced = self._consumed if self._given is None else [self._given[0], jax.tree.leaves(self._given[0])]
        return self.replace(**changes, _given=[state, jax.tree.leaves(state)], _consumed=replaced, _cached=[])

    def with_edits(self) -> Self:
        """Returns the run with what the caller assigned to the containers of its `state`.

        Raises:
            StateError: A container of a state that a step has consumed was changed, or one was given values that the
                next step cannot take.
        """
        if self._given is None and self._consumed is None:
            return self
        if self._consumed is not None and _is_changed(self._consumed):
            # Raised once per edit: the run itself is intact, and its next step must not fail for the same edit.
            self._consumed[1] = jax.tree.leaves(self._consumed[0])
            raise StateError(
                "a `state` (or `params`, `opt_state`, …) was changed after a step had consumed it, so the change would "
                "be lost; ask the trainer for its state again after every step, and change that."
            )
        if self._given is None or not _is_changed(self._given):
            return self
        given, recorded = self._given
        _, held = self._layout.unflatten(self._leaves)
        leaves, _ = flatten_state(_as_arrays(given, recorded, held, self._layout))
        # The caller still holds the containers of `given` and may edit them again: watch them, not the converted copy.
        return self.replace(_leaves=leaves, _given=[given, jax.tree.leaves(given)], _cached=[])

    def drawing(self, examples: int) -> Self:
        """Returns the run with a batch that was drawn; the step that follows counts it."""
        return self._next(self._leaves, self.step, self.position, self.average, self.metrics, examples)

    def advance(self, leaves: list[Any], metrics: Metrics, examples: int | None, count: int | None = None) -> Self:
        """Returns the run after a call of a compiled step.

        Args:
            leaves: The arrays of the new state; those of this run are gone by donation.
            metrics: Scalars; where ``count`` is given, stacked as `trainer.fuse_steps` returns them.
            examples: The examples in each batch; None outside a run, where nothing is counted and nothing can be
                resumed afterwards.
            count: The number of steps, where they were fused.
        """
        step = self.step + (count or 1)
        if examples is None:
            return self._next(leaves, step, None, self.average, metrics, None)
        average = self.average.copy()
        average.add(metrics, examples, count)
        last = metrics if count is None else metrics_at(metrics, count - 1)
        return self._next(leaves, step, _moved(self.position, count or 1), average, last, None)

    def recorded(self, metrics: Mapping[str, Any], *, step: int | None = None, prefix: str = "") -> Self:
        """Returns the run with a row in its history.

        Args:
            metrics: What was measured.
            step: The step of it; the current one by default.
            prefix: ``"val_"`` for validation averages; training metrics have none.
        """
        return self.recorded_rows([(self.step if step is None else step, metrics)], prefix=prefix)

    def recorded_rows(
        self, rows: Sequence[tuple[int, Mapping[str, Any]]], *, prefix: str = "", logged: int | None = None
    ) -> Self:
        """Returns the run with several rows in its history.

        Args:
            rows: The steps and their metrics, in ascending order.
            prefix: As for `recorded`.
            logged: The latest step that loggers got, where that is not the last of the rows.
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
        return self.replace(validation=Validation(self.step, dict(averages))).recorded(averages, prefix="val_")

    def begin_epoch(self) -> Self:
        """Returns the run at the beginning of an epoch, or where it is within the epoch that it is resumed in."""
        return self if self.batch else self.replace(average=WeightedAverage())

    def end_epoch(self) -> Self:
        """Returns the run after the current epoch; its average is that of the epoch."""
        position = None if self.position is None else dataclasses.replace(self.position, batch=0)
        return self.replace(epoch=self.epoch + 1, position=position)

    def check_same_run(self, asked: Position) -> None:
        """Compares the run that was interrupted with the one that is asked for.

        Raises:
            ArgumentError: They differ in the data or its order; every difference is named.
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
        # `dataclasses.replace` takes 4 µs, a tenth of the smallest step; naming every field takes one.
        moved = leaves is not self._leaves
        return type(self)(
            leaves,
            self._layout,
            step,
            self.epoch,
            position,
            average,
            metrics,
            self.validation,
            self.logged_step,
            self.history,
            self.horizon,
            drawn,
            self.weights,
            self.id,
            self.arguments,
            None if moved else self._given,
            (self._given or self._consumed) if moved else self._consumed,
            [],
        )


def _moved(position: Position | None, batches: int) -> Position | None:
    if position is None:
        return None
    return dataclasses.replace(position, batch=position.batch + batches)


def _is_changed(given: list[Any]) -> bool:
    state, leaves = given
    now = jax.tree.leaves(state)
    # By identity and without a loop in Python: every step after `Run.state` was read comes through here.
    return len(now) != len(leaves) or any(map(operator.is_not, now, leaves))


def _as_arrays(state: TrainState, recorded: list[Any], held: list[Any], layout: Layout) -> TrainState:
    """Returns an edited state with arrays of the types that the step was compiled for.

    Args:
        state: The edited state.
        recorded: Its leaves at the last comparison.
        held: The arrays of the run for these leaves. They differ where an earlier edit was converted.
        layout: The structure that it must have.
    """
    if jax.tree.structure(state) != layout.treedef:
        raise StateError(
            "the state was changed to another structure than it had, which the next step cannot take; assign "
            "`trainer.state` of a new trainer, or change values only."
        )
    arrays = []
    for (path, new), before, old in zip(jax.tree.leaves_with_path(state), recorded, held, strict=True):
        if new is before:
            arrays.append(old)
            continue
        shape = jnp.shape(new)
        if shape != old.shape:
            raise StateError(f"`{leaf_path(path)}` of shape {old.shape} was given a value of shape {shape}.")
        array = jnp.asarray(new) if jnp.issubdtype(old.dtype, jax.dtypes.extended) else jnp.asarray(new, old.dtype)
        # Copied: the step donates it, and the caller's array must outlive that.
        array = jnp.array(array, copy=True) if array is new else array
        # An uncommitted array must stay so, or the compiled step sees another kind of argument.
        arrays.append(jax.device_put(array, old.sharding) if old.committed else array)
    edited: TrainState = jax.tree.unflatten(layout.treedef, arrays)
    return edited
