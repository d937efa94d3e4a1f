"""What a feature of the step costs, beside the step without it and beside the same written by hand.

To add a feature, write a function from the workload to its contenders, and list it in ``FEATURES``. A contender is a
state, a compiled ``(state, batch) -> (state, metrics)`` that donates it, and the batches of one update. Times are of
one update; "scratch" is what XLA plans beside arguments and results. Run it with ``python benchmarks/features.py``, and
on an accelerator with ``--wide``, which trains a transformer in place of the small dense network.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import optax
from flax import nnx

import by_hand
import workloads
from timing import Report, compared, in_turns, per
from trainer import TrainState, add_lora, ema_of_params, make_train_step, polyak_average
from workloads import Workload

MEBIBYTE = 2**20
STEPS = 16
"""The micro-batches of a batch."""
MEMBERS = 16
"""The members of a sweep."""


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
    def scratch(self) -> int:
        """Bytes that XLA plans for a call, beside arguments and results."""
        return self.step.lower(self.state, self.batches[0]).compile().memory_analysis().temp_size_in_bytes


@dataclasses.dataclass(frozen=True)
class Feature:
    """A feature, and its contenders by name; the first is the step without it."""

    name: str
    contenders: Callable[[Workload], dict[str, Contender]]


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


def hand_written(workload: Workload, optimizer: optax.GradientTransformation, parts: int = 1) -> Contender:
    """The step by hand, called on so many parts of the batch."""
    state, step = by_hand.make_step(workload.make_model(), workload.loss_fn, optimizer)
    batches = [{name: column[i::parts] for name, column in workload.batch.items()} for i in range(parts)]
    return Contender(state, jax.jit(step, donate_argnums=0), batches)


def accumulation(workload: Workload) -> dict[str, Contender]:
    multi = optax.MultiSteps(workload.optimizer(), STEPS).gradient_transformation()
    return {
        "plain": ours(workload),
        f"accumulate_steps={STEPS // 4}": ours(workload, accumulate_steps=STEPS // 4),
        f"accumulate_steps={STEPS}": ours(workload, accumulate_steps=STEPS),
        f"by hand: optax.MultiSteps, {STEPS} calls": hand_written(workload, multi, STEPS),
    }


def guard(workload: Workload) -> dict[str, Contender]:
    guarded = optax.apply_if_finite(workload.optimizer(), 1000)
    return {
        "plain": ours(workload),
        "nonfinite='skip'": ours(workload, nonfinite="skip"),
        "nonfinite='raise'": ours(workload, nonfinite="raise"),
        "by hand: optax.apply_if_finite": hand_written(workload, guarded),
    }


def average(workload: Workload) -> dict[str, Contender]:
    return {
        "plain": ours(workload),
        "ema_of_params": ours(workload, optimizer=optax.chain(workload.optimizer(), ema_of_params(0.999))),
        "polyak_average": ours(workload, optimizer=optax.chain(workload.optimizer(), polyak_average())),
        "by hand: optax.incremental_update": averaged_by_hand(workload),
    }


def averaged_by_hand(workload: Workload) -> Contender:
    """The step by hand, with an exponential average of the params beside it."""
    state, step = by_hand.make_step(workload.make_model(), workload.loss_fn, workload.optimizer())

    def averaged(both: Any, batch: Any) -> tuple[Any, Any]:
        state, kept = both
        (params, *rest), metrics = step(state, batch)
        return ((params, *rest), optax.incremental_update(params, kept, 1e-3)), metrics

    both = state, jax.tree.map(jax.numpy.copy, state[0])
    return Contender(both, jax.jit(averaged, donate_argnums=0), [workload.batch])


def reports(workload: Workload) -> dict[str, Contender]:
    names = ["gradient_norm", "update_ratio"]
    return {"plain": ours(workload), f"report={names}": ours(workload, report=names)}


def precision(workload: Workload) -> dict[str, Contender]:
    return {"plain": ours(workload)} | {
        f"precision={name!r}": ours(workload, precision=name) for name in ("bfloat16", "float16")
    }


def trained_part(workload: Workload) -> dict[str, Contender]:
    adapted = add_lora(workload.make_model(), 4, paths="**", rngs=nnx.Rngs(1))
    return {
        "plain": ours(workload),
        "LoRA of rank 4, wrt=nnx.LoRAParam": ours(workload, model=adapted, wrt=nnx.LoRAParam),
    }


def rematerialization(workload: Workload) -> dict[str, Contender]:
    names = ("blocks", "dots_saveable")
    return {"plain": ours(workload)} | {f"remat={name!r}": ours(workload, remat=name) for name in names}


class OneByOne(Contender):
    """Members that are trained one after the other."""

    def update(self) -> Any:
        results = [self.step(state, self.batches[0]) for state in self.state]
        self.state = [state for state, _ in results]
        return [metrics for _, metrics in results]

    @property
    def scratch(self) -> int:
        return self.step.lower(self.state[0], self.batches[0]).compile().memory_analysis().temp_size_in_bytes


def sweep(workload: Workload) -> dict[str, Contender]:
    one = ours(workload)
    step = make_train_step(workload.loss_fn, workload.optimizer())
    members = [jax.tree.map(jax.numpy.copy, one.state) for _ in range(MEMBERS)]
    stacked = jax.tree.map(lambda *leaves: jax.numpy.stack(leaves), *members)
    together = jax.jit(jax.vmap(step, in_axes=(0, None)), donate_argnums=0)
    return {
        f"{MEMBERS} members, one after the other": OneByOne(members, one.step, [workload.batch]),
        f"{MEMBERS} members in one program": Contender(stacked, together, [workload.batch]),
    }


FEATURES = [
    Feature(f"gradient accumulation, {STEPS} micro-batches of a batch", accumulation),
    Feature("a guard against what is not finite", guard),
    Feature("averages of params", average),
    Feature("reports of the update", reports),
    Feature("mixed precision", precision),
    Feature("low-rank adaptation", trained_part),
    Feature("rematerialization", rematerialization),
]
SWEEP = Feature("a sweep", sweep)


def timed(contender: Contender, updates: int) -> Callable[[], float]:
    def work():
        for _ in range(updates):
            metrics = contender.update()
        jax.block_until_ready(metrics)

    return per(updates, work)


def compare(report: Report, feature: Feature, workload: Workload, updates: int) -> None:
    """Prints the times and the memory of the contenders of a feature."""
    contenders = feature.contenders(workload)
    plain = next(iter(contenders))
    scratch = {name: contender.scratch for name, contender in contenders.items()}
    runs = {name: timed(contender, updates) for name, contender in contenders.items()}
    times = in_turns(runs, report.repeats)
    rows = compared(times, "µs an update", 1e6, {f"x {plain}": plain})
    report.table(
        f"{feature.name}, {workload.name} at {workload.batch_size}",
        [{**row, "scratch, MiB": scratch[row["what"]] / MEBIBYTE} for row in rows],
    )


def memory_of_accumulation(report: Report, workload: Workload) -> None:
    """Prints what memory a step takes: flat in the micro-batches of one size, falling in those of one batch."""
    size, rows = workload.batch_size // STEPS, []
    for steps in (1, 4, STEPS):
        growing = {name: column[: size * steps] for name, column in workload.batch.items()}
        by_size, by_batch = (ours(workload, batch, accumulate_steps=steps) for batch in (growing, workload.batch))
        rows.append(
            {
                "accumulate_steps": str(steps),
                f"micro-batches of {size}, MiB": by_size.scratch / MEBIBYTE,
                f"a batch of {workload.batch_size}, MiB": by_batch.scratch / MEBIBYTE,
            }
        )
    report.table(f"scratch of a step under gradient accumulation, {workload.name}", rows)


def dense(batch_size: int) -> Workload:
    """Four layers at a large batch, enough for a processor to work on."""
    return dataclasses.replace(
        workloads.digits(batch_size),
        name="MLP 784-256-256-256-10",
        make_model=lambda: workloads.Mlp(784, 256, 256, 256, 10),
        batch_size=batch_size,
    )


def main():
    wide = {"--wide": {"action": "store_true", "help": "train a transformer of width 512, for an accelerator"}}
    report = Report(__doc__, repeats=9, options=wide)
    if report.options.wide:
        workload = workloads.wide_text(16, 32, 64, 2) if report.quick else workloads.wide_text()
    else:
        workload = dense(64 if report.quick else 4096)
    for feature in FEATURES:
        compare(report, feature, workload, 1 if report.quick else 5)
    compare(report, SWEEP, workloads.digits(64), 1 if report.quick else 20)
    memory_of_accumulation(report, workload)
    report.close()


if __name__ == "__main__":
    main()
