"""The cost of a feature of the step, beside the step without it and beside the same feature written by hand.

To add a feature, write a function from the workload to its contenders, and list it in ``FEATURES``. A contender is a
state, a compiled ``(state, batch) -> (state, metrics)`` that donates it, and the batches of one update. Times are per
update; "scratch" is the memory that XLA plans besides arguments and results. Run it with
``python benchmarks/features.py``, and on an accelerator with ``--wide``, which trains a transformer instead of the
small dense network.

`find_learning_rate`, `find_batch_size`, `summary`, ``fast_dev_run`` and ``overfit_batches`` have no row: they run once
before the training or choose its data, and do not change the step.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import by_hand
import workloads
from contenders import Checked, Contender, OneByOne, hand_written, ours
from timing import Report, compared, in_turns, per
from trainer import (
    TrainState,
    add_lora,
    by_group,
    by_path,
    ema_of_params,
    make_check_step,
    make_eval_step,
    make_train_step,
    pad_batch,
    polyak_average,
)
from trainer.core.own_step import own_step
from workloads import LEARNING_RATE, Workload

MEBIBYTE = 2**20
STEPS = 16
"""The micro-batches of a batch."""
MEMBERS = 16
"""The members of a sweep."""


@dataclasses.dataclass(frozen=True)
class Feature:
    """A feature, and its contenders by name; the first is the step without it."""

    name: str
    contenders: Callable[[Workload], dict[str, Contender]]


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

    both = state, jax.tree.map(jnp.copy, state[0])
    return Contender(both, jax.jit(averaged, donate_argnums=0), [workload.batch])


def reports(workload: Workload) -> dict[str, Contender]:
    names, norm = ["gradient_norm", "update_ratio"], optax.tree.norm

    def by_definition(grads: Any, updates: Any, params: Any) -> dict[str, Any]:
        return {"gradient_norm": norm(grads), "update_ratio": norm(updates) / norm(params)}

    return {
        "plain": ours(workload),
        f"report={names}": ours(workload, report=names),
        "by hand: optax.tree.norm": hand_written(workload, report=by_definition),
    }


def precision(workload: Workload) -> dict[str, Contender]:
    def loss_fn(model: Any, *args: Any) -> Any:
        return workload.loss_fn(lambda inputs: model(inputs).astype(jnp.float32), *args)

    in_half, model = dataclasses.replace(workload, loss_fn=loss_fn), by_hand.in_bfloat16(workload.make_model())
    # On a CPU, XLA has no products of float16 that sum in float32, which attention needs.
    has_float16 = jax.default_backend() != "cpu" or not hasattr(model, "blocks")
    names = ("bfloat16", "float16") if has_float16 else ("bfloat16",)
    return {
        "plain": ours(workload),
        **{f"precision={name!r}": ours(workload, precision=name) for name in names},
        "by hand: layers with dtype=jnp.bfloat16": hand_written(in_half, model=model),
    }


LINEAR = "layers/.*|blocks/.*/(inner|outer)|head"
"""The paths of every `nnx.Linear`, in the small network or the transformer."""
HEAD = "(layers/3|head)/.*"
"""The paths of the params of the last layer."""


def low_rank(workload: Workload) -> dict[str, Contender]:
    adapted = add_lora(workload.make_model(), 4, paths=LINEAR, rngs=nnx.Rngs(1))
    by_flax = by_hand.with_lora(workload.make_model(), 4)
    return {
        "plain": ours(workload),
        "add_lora of rank 4, wrt=nnx.LoRAParam": ours(workload, model=adapted, wrt=nnx.LoRAParam),
        "by hand: nnx.LoRA around layers": hand_written(workload, model=by_flax, wrt=nnx.LoRAParam),
    }


def trained_part(workload: Workload) -> dict[str, Contender]:
    def is_head(path: Any, variable: Any) -> bool:
        del variable
        return re.fullmatch(HEAD, "/".join(map(str, path))) is not None

    return {
        "plain": ours(workload),
        "wrt=by_path(...), the last layer": ours(workload, wrt=by_path(HEAD)),
        "by hand: nnx.split by a filter": hand_written(workload, wrt=is_head),
    }


def rematerialization(workload: Workload) -> dict[str, Contender]:
    return {
        "plain": ours(workload),
        "remat='blocks'": ours(workload, remat="blocks"),
        "remat='dots_saveable'": ours(workload, remat="dots_saveable"),
        "by hand: jax.checkpoint of blocks": hand_written(
            workload, model=by_hand.with_checkpoints(workload.make_model())
        ),
    }


def groups(workload: Workload) -> dict[str, Contender]:
    def labels(params: Any) -> Any:
        return jax.tree.map_with_path(lambda path, _: "bias" if path[-1].key == "bias" else "rest", params)

    bias, rest = optax.adam(2 * LEARNING_RATE), optax.adam(LEARNING_RATE)
    return {
        "plain": ours(workload),
        "by_group, biases and the rest": ours(workload, optimizer=by_group({"*bias": bias, "*": rest})),
        "by hand: optax.partition": hand_written(workload, optax.partition({"bias": bias, "rest": rest}, labels)),
    }


def merged_metrics(workload: Workload) -> dict[str, Contender]:
    """An accuracy merged over 4 micro-batches; by hand it is the mean of means."""

    def reporting(accuracy: Callable[[Any, Any], Any]) -> Workload:
        def loss_fn(model: Any, batch: Any, rng: Any, step: Any) -> Any:
            logits = model(batch["input"])  # XLA computes it once
            return workload.loss_fn(model, batch, rng, step)[0], {"accuracy": accuracy(logits, batch["target"])}

        return dataclasses.replace(workload, loss_fn=loss_fn)

    def mean(logits: Any, labels: Any) -> Any:
        return jnp.mean(logits.argmax(-1) == labels)

    def pair(logits: Any, labels: Any) -> Any:
        return mean(logits, labels), labels.size

    def merging(logits: Any, labels: Any) -> Any:
        accuracy = nnx.metrics.Accuracy()
        accuracy.update(logits=logits, labels=labels)
        return accuracy

    return {
        "no metric": ours(workload, accumulate_steps=4),
        "a scalar": ours(reporting(mean), accumulate_steps=4),
        "a pair of value and weight": ours(reporting(pair), accumulate_steps=4),
        "an nnx.metrics.Accuracy": ours(reporting(merging), accumulate_steps=4),
    }


def padding(workload: Workload) -> dict[str, Contender]:
    def masked(model: Any, batch: Any, rng: Any, step: Any) -> Any:
        del rng, step
        losses = optax.softmax_cross_entropy_with_integer_labels(model(batch["input"]), batch["target"])
        weight = batch["mask"].sum()
        return losses.reshape(len(losses), -1).mean(1) @ batch["mask"] / weight, {"batch_weight": weight}

    half = {name: column[: workload.batch_size // 2] for name, column in workload.batch.items()}
    with_mask = dataclasses.replace(workload, loss_fn=masked)
    return {
        "plain, a full batch": ours(workload),
        "pad_to='batch', half a batch": ours(with_mask, pad_batch(half, workload.batch_size)),
        "by hand: half a batch, compiled for its shape": hand_written(workload, batch=half),
    }


def own(workload: Workload) -> dict[str, Contender]:
    optimizer = workload.optimizer()

    def step_fn(state: TrainState, batch: Any) -> Any:
        def objective(params: Any) -> Any:
            return workload.loss_fn(state.replace(params=params).model(), batch, state.rng, state.step)

        (loss, metrics), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        return state.replace(params=params, opt_state=opt_state, step=state.step + 1), {**metrics, "loss": loss}

    plain = ours(workload)
    step = jax.jit(own_step(step_fn), donate_argnums=0)
    return {
        "plain": plain,
        "step_fn": Contender(ours(workload).state, step, plain.batches),
        "by hand": hand_written(workload),
    }


def schedule_free(workload: Workload) -> dict[str, Contender]:
    """An update and an evaluation of the same batch."""
    optimizer = optax.contrib.schedule_free_adamw(LEARNING_RATE)
    eval_params = optax.contrib.schedule_free_eval_params
    graphdef = nnx.graphdef(workload.make_model())

    def evaluated(contender: Contender, evaluate: Callable[[Any, Any], Any]) -> Contender:
        def step(state: Any, batch: Any) -> Any:
            state, metrics = contender.step(state, batch)
            return state, {**metrics, "evaluated": evaluate(state, batch)}

        return Contender(contender.state, jax.jit(step, donate_argnums=0), contender.batches)

    def evaluate_by_hand(state: Any, batch: Any) -> Any:
        params, opt_state, count, _ = state
        model = nnx.merge(graphdef, eval_params(opt_state, params))
        return workload.loss_fn(model, batch, jax.random.key(0), count)[0]

    return {
        "plain": evaluated(ours(workload), make_eval_step(workload.loss_fn)),
        "schedule_free_adamw, eval_params": evaluated(
            ours(workload, optimizer=optimizer), make_eval_step(workload.loss_fn, eval_params=eval_params)
        ),
        "by hand: schedule_free_eval_params": evaluated(hand_written(workload, optimizer), evaluate_by_hand),
    }


def debugging(workload: Workload) -> dict[str, Contender]:
    """A check beside each step; finding the module in which NaN begins has no version by hand."""
    plain = ours(workload)
    check = make_check_step(workload.loss_fn)
    return {"plain": plain, "debug=True": Checked(ours(workload).state, plain.step, plain.batches, check)}


def sweep(workload: Workload) -> dict[str, Contender]:
    """Members that differ in their learning rates."""
    optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=LEARNING_RATE)
    one = ours(workload, optimizer=optimizer)
    members = [one.state.copy().with_learning_rate(rate) for rate in np.logspace(-4, -1, MEMBERS)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    step = make_train_step(workload.loss_fn, optimizer)
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
    Feature("low-rank adaptation", low_rank),
    Feature("a part of the params", trained_part),
    Feature("rematerialization", rematerialization),
    Feature("an optimizer for each group of params", groups),
    Feature("a metric, merged over 4 micro-batches", merged_metrics),
    Feature("a short batch", padding),
    Feature("a step of the caller's", own),
    Feature("schedule-free, an update and an evaluation", schedule_free),
    Feature("checks for debugging", debugging),
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
    planned = {name: contender.scratch for name, contender in contenders.items()}
    scratch = {name: "not known" if size is None else size / MEBIBYTE for name, size in planned.items()}
    runs = {name: timed(contender, updates) for name, contender in contenders.items()}
    times = in_turns(runs, report.repeats)
    rows = compared(times, "µs an update", 1e6, {f"x {plain}": plain})
    report.table(
        f"{feature.name}, {workload.name} at {workload.batch_size}",
        [{**row, "scratch, MiB": scratch[row["what"]]} for row in rows],
    )


def equality_of_sweep(report: Report, workload: Workload) -> None:
    """Prints how much members trained in one program differ from the same ones trained singly, after an epoch."""
    size = workload.batch_size
    starts = range(0, workload.num_examples - size + 1, size)
    batches = [{name: column[start : start + size] for name, column in workload.data.items()} for start in starts]
    alone, together = (dataclasses.replace(contender, batches=batches) for contender in sweep(workload).values())
    singles = np.array([metrics["loss"] for metrics in alone.update()])
    losses = np.asarray(together.update()["loss"])
    difference = np.max(np.abs(losses / singles - 1))
    row = {
        "what": f"the last losses of {MEMBERS} members",
        "largest relative difference": f"{difference:.1e}",
        "equal within rounding": str(bool(difference < 1e-3)),
        "best member": f"{losses.argmin()} and {singles.argmin()}",
    }
    report.table(f"a sweep in one program against one by one, {workload.name}, after {len(batches)} updates", [row])


def memory_of_accumulation(report: Report, workload: Workload) -> None:
    """Prints the memory of a step: flat in the number of micro-batches of one size, falling in that of one batch."""
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


def main():
    wide = {"--wide": {"action": "store_true", "help": "train a transformer of width 512, for an accelerator"}}
    report = Report(__doc__, repeats=9, options=wide)
    if report.options.wide:
        workload = workloads.wide_text(16, 32, 64, 2) if report.quick else workloads.wide_text()
    else:
        workload = workloads.dense(64 if report.quick else 4096)
    for feature in FEATURES:
        compare(report, feature, workload, 1 if report.quick else 5)
    digits = workloads.scanned_digits()
    compare(report, SWEEP, digits, 1 if report.quick else 20)
    equality_of_sweep(report, digits)
    memory_of_accumulation(report, workload)
    report.close()


if __name__ == "__main__":
    main()
