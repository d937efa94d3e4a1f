"""The compiled steps of a trainer: one step a call, or many."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp

from trainer.batches import describe
from trainer.compile.fusion import as_function, flops, steps_worth_fusing
from trainer.errors import ArgumentError
from trainer.state import TrainState
from trainer.steps import fuse_steps
from trainer.types import Batch, Metrics

Step = Callable[[TrainState, Batch], tuple[TrainState, Metrics]]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How the arrays of a state make it up.

    A compiled function is called with the list of them, typed keys as their words, which costs a
    tenth less than with the tree; and a state is made of them where somebody looks.

    Attributes:
        structure: The tree.
        keys: Which of the arrays are words of typed keys, and of which implementation.
    """

    structure: Any
    keys: tuple[tuple[int, str], ...]

    def state(self, leaves: Sequence[Any]) -> TrainState:
        """Makes the state; it shares the arrays."""
        leaves = list(leaves)
        for index, implementation in self.keys:
            # Of an array that was donated no key can be made; as it is, it tells that the state is gone.
            if isinstance(leaves[index], jax.core.Tracer) or not leaves[index].is_deleted():
                leaves[index] = jax.random.wrap_key_data(leaves[index], impl=implementation)
        state: TrainState = jax.tree.unflatten(self.structure, leaves)
        return state


def leaves_of(state: TrainState) -> tuple[list[Any], Layout]:
    """Returns the arrays of a state, typed keys as their words, and how they make it up."""
    leaves, structure = jax.tree.flatten(state)
    keys = []
    for index, leaf in enumerate(leaves):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            keys.append((index, str(jax.random.key_impl(leaf))))
            leaves[index] = jax.random.key_data(leaf)
    return leaves, Layout(structure, tuple(keys))


@dataclasses.dataclass(frozen=True)
class Calls:
    """How the steps over some data are called.

    Attributes:
        program: Takes ``(state, batches, count)``, see `trainer.fuse_steps`; None where every step is a
            call of its own.
        room: How many steps a call has room for.
        flops: The floating-point operations of one step, None where that is not known.
        moments: The host looks at every so many steps; a call never goes beyond.
        worth: How many steps would be worth a call if nobody looked.
    """

    program: "Program | None" = None
    room: int = 1
    flops: float | None = None
    moments: tuple[int, ...] = ()
    worth: int = 1


class Program:
    """A compiled function that consumes the arrays of a state, and knows when it was compiled.

    Args:
        function: Takes the arrays and a batch, or several batches and their number.
        name: What it is called where compilations are reported.
        shardings: Where the results lie, the arrays of the state and the metrics; None leaves that to JAX.
    """

    def __init__(self, function: Callable[..., Any], name: str, shardings: Any = None) -> None:
        def counted(*args: Any) -> Any:
            self._traces += 1
            return function(*args)

        counted.__name__ = name
        self.name = name
        self._jitted = jax.jit(counted, donate_argnums=0, out_shardings=shardings)
        self._traces = self._reported = 0
        self._seconds = 0.0
        self._batch = self._previous = ""
        self._has_warned = False

    @property
    def is_new(self) -> bool:
        """Whether it was never called, so that the next call compiles."""
        return not self._reported

    def __call__(self, leaves: list[Any], *args: Any) -> Any:
        """Runs it."""
        start = time.perf_counter()
        result = self._jitted(leaves, *args)
        if self._traces != self._reported:
            self._seconds = time.perf_counter() - start
            self._previous, self._batch = self._batch, describe(args[0])
        return result

    def compilation(self) -> tuple[float, str | None] | None:
        """Tells, once, that the latest call compiled: the seconds, and a warning if that is one time too many."""
        if self._traces == self._reported:
            return None
        self._reported = self._traces
        # The short last batch of an epoch is expected to be one more.
        if self._traces <= 2 or self._has_warned or self._previous == self._batch:
            return self._seconds, None
        self._has_warned = True
        return self._seconds, (
            f"`{self.name}` was compiled {self._traces} times: the batch is {self._batch} and was {self._previous} "
            f"before. Every new shape or dtype costs a compilation: pad or crop to a few shapes, and keep "
            f"the dtypes."
        )

    def text(self, *args: Any) -> str:
        """Returns the program as it is before it is compiled: shapes, shardings and every operation."""
        text: str = self._jitted.trace(*args).lower().as_text()
        return text

    def trace(self, *args: Any) -> Any:
        """Traces it, which the first call will not do again."""
        return self._jitted.trace(*args)

    def compile(self, traced: Any) -> Any:
        """Compiles what `trace` returned, which the first call will not do again."""
        compiled = traced.lower().compile()
        self._reported = self._traces
        return compiled


class StepPrograms:
    """Makes the programs of a trainer, each once.

    Args:
        make_step: Returns the step, with the extensions that are enabled.
        enabled: Returns their names.
        steps_per_call: How many steps to fuse where nothing looks between them.
    """

    def __init__(
        self,
        make_step: Callable[[], Step],
        enabled: Callable[[], tuple[str, ...]],
        steps_per_call: int | Literal["auto"],
    ) -> None:
        self._make_step, self._enabled, self._steps_per_call = make_step, enabled, steps_per_call
        self._layout: Layout | None = None
        self._shardings: Any = None
        self._single: dict[tuple[str, ...], Program] = {}
        self._fused: dict[Any, Program] = {}
        self._traced: dict[Any, Any] = {}
        self._calls: dict[Any, Calls] = {}

    def set_layout(self, layout: Layout, shardings: Any) -> None:
        """Forgets all programs, if the state is made up or spread over the devices in another way now.

        Args:
            layout: How it is made up.
            shardings: See `Program`.
        """
        if (layout, shardings) != (self._layout, self._shardings):
            self._layout, self._shardings = layout, shardings
            self.clear()

    def clear(self) -> None:
        """Forgets all of them, because the optimizer is another one."""
        self._single.clear()
        self._fused.clear()
        self._traced.clear()
        self._calls.clear()

    def single(self) -> Program:
        """Returns the program of one step, with the extensions that are enabled now."""
        enabled = self._enabled()
        if enabled not in self._single:
            self._single[enabled] = Program(_on_leaves(self._make_step(), self._layout), "train_step", self._shardings)
        return self._single[enabled]

    def trace(self, leaves: list[Any], batch: Any) -> Any:
        """Returns the traced step for a batch of which only shapes and dtypes matter; each is traced once."""
        key = self._key(batch)
        if key not in self._traced:
            self._traced[key] = self.single().trace(leaves, batch)
        return self._traced[key]

    def calls(self, leaves: list[Any], batch: Any, most: int, moments: tuple[int, ...]) -> Calls:
        """Decides how steps over batches like this one are called.

        Args:
            leaves: The arrays of the state.
            batch: Shapes and dtypes of a batch.
            most: How many steps there are at most before somebody looks.
            moments: At what multiples of steps somebody does.
        """
        key = *self._key(batch), most, moments
        if key not in self._calls:
            self._calls[key] = self._decide(self.trace(leaves, batch), batch, most, moments)
        return self._calls[key]

    def _decide(self, traced: Any, batch: Any, most: int, moments: tuple[int, ...]) -> Calls:
        size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
        chosen = self._steps_per_call
        if chosen == "auto":
            chosen = steps_worth_fusing(traced.jaxpr, size, jax.default_backend())
        room = min(chosen, most)
        work = flops(traced.jaxpr.jaxpr)
        if room <= 1:
            return Calls(None, 1, work, moments, chosen)
        key = *self._key(batch), room
        if key not in self._fused:
            self._fused[key] = Program(fuse_steps(as_function(traced), room), "train_steps", self._shardings)
        return Calls(self._fused[key], room, work, moments, chosen)

    def _key(self, batch: Any) -> tuple[Any, ...]:
        return self._enabled(), str(jax.tree.structure(batch)), describe(batch)


def _on_leaves(step: Step, layout: Layout | None) -> Callable[..., Any]:
    """Returns the step as a function of the arrays of a state."""
    assert layout is not None

    def on_leaves(leaves: list[Any], batch: Batch) -> tuple[list[Any], Metrics]:
        state, metrics = step(layout.state(leaves), batch)
        after, found = leaves_of(state)
        if found != layout:
            raise ArgumentError(
                f"`optimizer` returned a state of another structure than the one it started with: {found.structure} "
                f"after {layout.structure}. A step must be able to follow itself."
            )
        return after, metrics

    return on_leaves
