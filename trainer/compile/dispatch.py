"""Compiled steps: one step per call, or many small ones fused into one."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Hashable, Sequence
from typing import Any, Literal

import jax

from trainer.batches import describe
from trainer.compile.fusion import FusionPolicy, as_function
from trainer.core.checks import check_count
from trainer.core.flops import known_flops, product_dtype
from trainer.core.private_api import is_about_lost_array
from trainer.core.tree_paths import leaf_path
from trainer.errors import ArgumentError, StateError, first_of
from trainer.run import Layout, Run, flatten_state
from trainer.state import TrainState
from trainer.steps import fuse_steps
from trainer.types import Batch, Metrics

_MOST_VARIANTS = 4
"""How many variants of a step keep their programs: an attribute of an extension may have a new value in every epoch."""

Step = Callable[..., tuple[TrainState, Metrics]]
"""``(state, batch, *arguments) -> (state, metrics)``; the arguments are those of `CompiledStep`."""


@dataclasses.dataclass(frozen=True)
class CompileReport:
    """A compilation caused by a call of a program.

    Attributes:
        name: The compiled function: ``train_step``, ``train_steps`` or ``eval_step``.
        seconds: The time for tracing, compiling and dispatching.
        warning: The warning to show if it was compiled too often; usually None.
    """

    name: str
    seconds: float
    warning: str | None


@dataclasses.dataclass(frozen=True)
class DispatchPlan:
    """How steps over batches of one shape are grouped into calls.

    Attributes:
        program: The fused program, which takes ``(leaves, batches, count)``; None if every step is its own call.
        capacity: The maximum number of steps in one call.
        flops: The floating-point operations of one step over all devices, None if unknown.
        product_dtype: The dtype of the operands of its matrix products, None if unknown or mixed.
        sync_every: The host needs the state at multiples of these steps; no call crosses one.
        fusable_steps: The number of steps per call if the host never needed the state.
        variant: The step variant that the program was traced for; see `CompiledStep`.
    """

    program: Program | None = None
    capacity: int = 1
    flops: float | None = None
    product_dtype: Any = None
    sync_every: tuple[int, ...] = ()
    fusable_steps: int = 1
    variant: Hashable = None

    def steps_before_sync(self, step: int) -> int:
        """Returns how many steps a call may take after ``step``."""
        return min([self.capacity, *(every - step % every for every in self.sync_every)])


class Program:
    """A jitted function that reports its compilations.

    Args:
        function: Takes a state or its leaves, a batch (or stacked batches and their number), and further arguments.
        name: Its name in compilation reports.
        out_shardings: Shardings of the results; None leaves them to JAX.
        donates: Whether a call consumes its first argument.
    """

    def __init__(
        self, function: Callable[..., Any], name: str, out_shardings: Any = None, *, donates: bool = True
    ) -> None:
        # The closure holds this list rather than the program, to avoid a reference cycle: the program's arrays would
        # then live until the garbage collector runs.
        traces = [0]

        def counted(*args: Any) -> Any:
            # Without jit every call comes here, and none compiles.
            traces[0] += not (jax.config.jax_disable_jit and traces[0])  # type: ignore[attr-defined]
            return function(*args)

        counted.__name__ = name
        self.name = name
        donated = (0,) if donates else ()
        self._jitted = jax.jit(counted, donate_argnums=donated, out_shardings=out_shardings)
        self._traces, self._described, self._reported = traces, 0, 0
        self._seconds, self._num_compiled = 0.0, 0
        self._batch = self._previous = ""
        self._has_warned = False

    @property
    def is_new(self) -> bool:
        """Whether the program has not been called yet, so that the next call compiles."""
        return not self._reported

    def __call__(self, state: Any, *args: Any) -> Any:
        """Runs the function."""
        start = time.perf_counter()
        result = self._jitted(state, *args)
        if self._traces[0] != self._described:  # `report` is not called after every call
            self._described = self._traces[0]
            self._seconds, self._num_compiled = time.perf_counter() - start, self._num_compiled + 1
            self._previous, self._batch = self._batch, describe(args[0])
        return result

    def report(self) -> CompileReport | None:
        """Returns the compilation caused by the latest call, once; otherwise None."""
        if self._traces[0] == self._reported:
            return None
        self._reported = self._traces[0]
        warning = None
        # The short last batch of an epoch is an expected second shape. A trace that only plans is no compilation.
        if self._num_compiled > 2 and not self._has_warned and self._previous not in ("", self._batch):
            self._has_warned = True
            warning = (
                f"`{self.name}` was compiled {self._num_compiled} times: the batch is {self._batch} and was "
                f"{self._previous} before. Every new shape or dtype costs a compilation: pad or crop to a few shapes, "
                f"and keep the dtypes."
            )
        return CompileReport(self.name, self._seconds, warning)

    def text(self, *args: Any) -> str:
        """Returns the program before compilation: shapes, shardings and every operation."""
        text: str = self._jitted.trace(*args).lower().as_text()
        return text

    def trace(self, *args: Any) -> Any:
        """Traces the program; a later call with such arguments does not trace again."""
        return self._jitted.trace(*args)

    def compile(self, traced: Any) -> Any:
        """Compiles the result of `trace`; a later call does not compile again."""
        compiled = traced.lower().compile()
        # The caller reports this compilation, so `report` must not.
        self._described = self._reported = self._traces[0]
        return compiled


class CompiledStep:
    """A pure step, compiled with donation, that advances a `Run`; many small steps are fused into one call.

    Fusing does not change the results: the steps are the same operations in a loop. (The exception is convolutions
    in XLA on the CPU; steps with convolutions are fused only on request.)

    Args:
        step: ``(state, batch) -> (state, metrics)``, not jitted: see `trainer.make_train_step`.
        steps_per_call: How many steps to fuse if the host does not need the state in between. "auto" fuses
            steps that compute little, judged from the traced step and never by timing; a `FusionPolicy` does so with
            limits of your own; 1 never fuses.
        variant: Returns what the traced step depends on besides its arguments, such as which extensions are
            enabled. Each new value compiles its own program; the programs of the last four values are kept.
        arguments: More traced arguments of the step, computed from the run.
        replicated: The sharding of metrics on a mesh. With it, a step keeps the shardings of its state.
        one_call_at_a_time: Whether a call must finish before the next is dispatched.
        before_compile: Called before a program is first compiled, with its name and a function that
            returns its text.

    Example::

        step = CompiledStep(make_train_step(loss_fn, optimizer))
        run, metrics = step(run, batch)
    """

    def __init__(
        self,
        step: Step,
        *,
        steps_per_call: int | Literal["auto"] | FusionPolicy = "auto",
        variant: Callable[[], Hashable] | None = None,
        arguments: Callable[[Run], tuple[Any, ...]] | None = None,
        replicated: Any = None,
        one_call_at_a_time: bool = False,
        before_compile: Callable[[str, Callable[[], str]], None] | None = None,
    ) -> None:
        self.policy = steps_per_call if isinstance(steps_per_call, FusionPolicy) else FusionPolicy()
        self._step, self._count = step, None
        if not isinstance(steps_per_call, FusionPolicy) and steps_per_call != "auto":
            otherwise = ', "auto", or a trainer.compile.FusionPolicy'
            self._count = check_count(steps_per_call, "steps_per_call", otherwise=otherwise)
        self._variant, self._arguments = variant, arguments
        self._replicated, self._one_call_at_a_time = replicated, one_call_at_a_time
        self._before_compile = before_compile
        self._layout: Layout | None = None
        self._shardings: Any = None
        self._single: dict[Hashable, Program] = {}
        self._fused: dict[Any, Program] = {}
        self._traced: dict[Any, Any] = {}
        self._work: dict[Any, tuple[float | None, Any]] = {}
        self._plans: dict[Any, DispatchPlan] = {}
        self._recent: list[Hashable] = []
        self._latest: Program | None = None

    def __call__(self, run: Run, batch: Batch, examples: int | None = None) -> tuple[Run, Metrics]:
        """Runs one step, which donates the state of ``run``.

        Args:
            run: The run to advance.
            batch: The batch.
            examples: The number of examples in it; if None, the step counts for no epoch and cannot be resumed from.

        Returns:
            The run after the step, and its metrics as scalars on the device.
        """
        run = run.with_edits()
        return self._call(self._program(run), run, (batch, *self._more(run)), examples, None)

    def fused(
        self, plan: DispatchPlan, run: Run, batches: Batch, count: int, count_array: jax.Array, examples: int
    ) -> tuple[Run, Metrics]:
        """Runs several steps in one call, which donates the state of ``run``.

        Args:
            plan: A result of `plan`, with a program.
            run: The run to advance.
            batches: Stacked batches, of shape ``(capacity, batch_size, ...)``.
            count: The number of batches to use.
            count_array: ``count`` as an int32 array on the devices.
            examples: The number of examples in each batch.
        """
        run = run.with_edits()
        assert plan.program is not None
        return self._call(plan.program, run, (batches, count_array, *self._more(run)), examples, count)

    def report(self) -> CompileReport | None:
        """Returns the compilation caused by the latest call, once; otherwise None.

        Call it once the new run is stored: handlers of the compile event may save, and the previous run was donated.
        """
        return None if self._latest is None else self._latest.report()

    def is_current(self, plan: DispatchPlan) -> bool:
        """Whether a plan is still valid for the current variant of the step."""
        return plan.program is None or plan.variant == self._current_variant()

    def plan(self, run: Run, batch: Any, most: int, sync_every: Sequence[int]) -> DispatchPlan:
        """Decides how steps over batches of this shape are grouped into calls.

        Args:
            run: The run.
            batch: Shapes and dtypes of a batch.
            most: The maximum number of steps in a call.
            sync_every: The host needs the state at multiples of these steps.
        """
        key = (*self._key(run, batch), most, tuple(sync_every))
        if key not in self._plans:
            self._plans[key] = self._decide(run, batch, most, tuple(sync_every))
        return self._plans[key]

    def trace(self, run: Run, batch: Any) -> tuple[Program, Any]:
        """Returns the program of one step, and its trace; only shapes and dtypes of the batch matter."""
        key = self._key(run, batch)
        program = self._program(run)
        if key not in self._traced:
            self._traced[key] = program.trace(run.leaves, batch, *self._more(run))
        return program, self._traced[key]

    def work(self, run: Run, batch: Any) -> tuple[float | None, Any]:
        """Returns ``flops`` and ``product_dtype`` of a step over batches of this shape; see `DispatchPlan`."""
        key = self._key(run, batch)
        if key not in self._work:
            jaxpr = self.trace(run, batch)[1].jaxpr.jaxpr
            self._work[key] = known_flops(jaxpr), product_dtype(jaxpr)
        return self._work[key]

    def _call(
        self, program: Program, run: Run, arguments: tuple[Any, ...], examples: int | None, count: int | None
    ) -> tuple[Run, Metrics]:
        if program.is_new and self._before_compile is not None:
            self._before_compile(program.name, lambda: program.text(run.leaves, *arguments))
        try:
            leaves, metrics = program(run.leaves, *arguments)
        except Exception as error:
            if isinstance(error, FloatingPointError):  # from `jax_debug_nans`
                error.add_note(f"in step {run.step + 1}" if count in (None, 1) else f"in steps from {run.step + 1} on")
            explain_lost_state(run.peek(), error)
            raise
        self._latest = program
        if self._one_call_at_a_time:
            jax.block_until_ready(metrics)
        return run.advance(leaves, metrics, examples, count), metrics

    def _program(self, run: Run) -> Program:
        if run.layout is not self._layout:
            self._adopt(run)
        variant = self._used_variant()
        program = self._single.get(variant)
        if program is None:
            function = _on_leaves(self._step, run.layout)
            program = self._single[variant] = Program(function, "train_step", self._shardings)
        return program

    def _current_variant(self) -> Hashable:
        return None if self._variant is None else self._variant()

    def _used_variant(self) -> Hashable:
        """Returns the current variant, and drops the programs of the one that was not used for longest."""
        variant = self._current_variant()
        if not self._recent or self._recent[-1] != variant:
            self._recent = [*(one for one in self._recent if one != variant), variant]
            if len(self._recent) > _MOST_VARIANTS:
                dropped = self._recent.pop(0)
                self._single.pop(dropped, None)
                for programs in (self._fused, self._traced, self._work, self._plans):
                    for key in [key for key in programs if key[0] == dropped]:
                        del programs[key]
        return variant

    def _more(self, run: Run) -> tuple[Any, ...]:
        return () if self._arguments is None else self._arguments(run)

    def _adopt(self, run: Run) -> None:
        """Drops all programs if the structure or the shardings of the state have changed."""
        shardings = None
        if self._replicated is not None:
            shardings = ([leaf.sharding for leaf in run.leaves], self._replicated)
        if (run.layout, shardings) != (self._layout, self._shardings):
            for programs in (self._single, self._fused, self._traced, self._work, self._plans):
                programs.clear()
        self._layout, self._shardings = run.layout, shardings

    def _decide(self, run: Run, batch: Any, most: int, sync_every: tuple[int, ...]) -> DispatchPlan:
        _, traced = self.trace(run, batch)
        work, dtype = self.work(run, batch)
        fusable = self._count
        if fusable is None:
            # Ask the state's devices: a mesh of CPU devices on a machine with a GPU is still a CPU.
            platform = next(iter(run.leaves[0].devices())).platform
            size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(batch))
            fusable = self.policy.fusable_steps(traced.jaxpr, size, platform)
        capacity = min(fusable, most)
        if capacity <= 1:
            return DispatchPlan(None, 1, work, dtype, sync_every, fusable, self._current_variant())
        key = *self._key(run, batch), capacity
        if key not in self._fused:
            function = _fused_on_leaves(as_function(traced), capacity)
            self._fused[key] = Program(function, "train_steps", self._shardings)
        return DispatchPlan(self._fused[key], capacity, work, dtype, sync_every, fusable, self._current_variant())

    def _key(self, run: Run, batch: Any) -> tuple[Any, ...]:
        if run.layout is not self._layout:
            self._adopt(run)
        return self._used_variant(), str(jax.tree.structure(batch)), describe(batch)


def explain_lost_state(state: TrainState, error: Exception) -> None:
    """Adds a note to an error of a compiled function if the call consumed the state by donation.

    Raises:
        StateError: The state was donated earlier, which is why this call failed.
    """
    try:
        state.check_alive()
    except StateError as lost:
        if is_about_lost_array(error):
            raise lost from error
        error.add_note("the state was donated to the step that failed and is gone; load a checkpoint to continue")


def _on_leaves(step: Step, layout: Layout) -> Callable[..., Any]:
    """Returns the step as a function of the flat list of leaves."""

    def on_leaves(leaves: list[Any], batch: Batch, *arguments: Any) -> tuple[list[Any], Metrics]:
        state, metrics = step(layout.unflatten(leaves)[0], batch, *arguments)
        after, found = flatten_state(state)
        if found != layout:
            raise ArgumentError(
                f"`optimizer` returned a state of another structure than the one it started with: "
                f"{_differences(layout.unflatten(leaves)[0], state)}. A step must be able to follow itself."
            )
        return after, metrics

    return on_leaves


def _differences(before: TrainState, after: TrainState) -> str:
    """Returns which leaves are new and which are missing, at most five of each."""
    old, new = ([leaf_path(path) for path, _ in jax.tree.leaves_with_path(state)] for state in (before, after))
    parts = []
    for paths, others, is_what in ((new, set(old), "new"), (old, set(new), "missing")):
        if one_sided := [f"`{path}`" for path in paths if path not in others]:
            parts.append(f"{first_of(one_sided)} {'is' if len(one_sided) == 1 else 'are'} {is_what}")
    return "; ".join(parts) or "the leaves are the same, but their containers, or data beside the arrays, are not"


def _fused_on_leaves(step: Callable[..., Any], capacity: int) -> Callable[..., Any]:
    """Returns up to ``capacity`` steps as one traceable function."""

    def fused(leaves: list[Any], batches: Batch, count: Any, *arguments: Any) -> Any:
        return fuse_steps(lambda leaves, batch: step(leaves, batch, *arguments), capacity)(leaves, batches, count)

    return fused
