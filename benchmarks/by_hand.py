"""The baselines: training code written by hand without a library, as fast as we know how.

The state is plain dicts, the graph of the module is merged only while tracing, and everything is donated. Like any
objective of this library, the one here gets a key and the step number. The key is folded from that number, which costs
nothing if the key is not used.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from workloads import Workload


def make_step(
    model: nnx.Module,
    loss_fn: Callable,
    optimizer: optax.GradientTransformation,
    *,
    wrt: nnx.filterlib.Filter = ...,
    report: Callable[[Any, Any, Any], dict[str, Any]] = lambda grads, updates, params: {},
) -> tuple[Any, Callable]:
    """Returns a state and the pure step ``(state, batch) -> (state, metrics)``.

    Args:
        model: The module, which is copied.
        loss_fn: The objective.
        optimizer: The optax optimizer.
        wrt: Which variables are params; the others stay as they are.
        report: Computes further metrics from gradients, updates and params.
    """
    graphdef, variables, others = nnx.split(model, wrt, ...)
    params, frozen = jax.tree.map(jnp.copy, (nnx.to_pure_dict(variables), nnx.to_pure_dict(others)))
    # An optimizer may keep the params themselves, and one buffer cannot be donated twice.
    state = (params, jax.tree.map(jnp.copy, optimizer.init(params)), jnp.zeros((), jnp.int32), frozen)
    rng = jax.random.key(0)

    def step(state, batch):
        params, opt_state, count, frozen = state

        def objective(params):
            return loss_fn(nnx.merge(graphdef, params, frozen), batch, jax.random.fold_in(rng, count), count)

        (loss, metrics), grads = jax.value_and_grad(objective, has_aux=True)(params)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        metrics = {**metrics, **report(grads, updates, params)}
        state = (optax.apply_updates(params, updates), opt_state, count + 1, frozen)
        return state, {**metrics, "loss": loss, "step": count + 1}

    return state, step


def in_bfloat16(model: nnx.Module) -> nnx.Module:
    """Returns a model as if its layers were made with ``dtype=jnp.bfloat16``; its params stay in float32."""
    for _, module in nnx.iter_modules(model):
        if hasattr(module, "dtype"):
            module.dtype = jnp.bfloat16
    return model


def with_lora(model: nnx.Module, rank: int) -> nnx.Module:
    """Returns a model with an `nnx.LoRA` around each `nnx.Linear`."""
    rngs = nnx.Rngs(1)

    def adapted(path, node):
        del path
        if type(node) is not nnx.Linear:
            return node
        return nnx.LoRA(node.in_features, rank, node.out_features, base_module=node, rngs=rngs)

    return nnx.recursive_map(adapted, model, graph=True)


class Checkpointed(nnx.Module):
    """A module whose activations are recomputed in the backward pass."""

    def __init__(self, inner: nnx.Module):
        self.inner = inner

    def __call__(self, *args):
        graphdef, variables = nnx.split(self.inner)
        return jax.checkpoint(lambda variables, *args: nnx.merge(graphdef, variables)(*args))(variables, *args)


def with_checkpoints(model: nnx.Module) -> nnx.Module:
    """Returns a model with a `jax.checkpoint` around each module in its list of layers or blocks."""

    def wrapped(path, node):
        is_block = len(path) == 2 and isinstance(node, nnx.Module) and path[0] in ("layers", "blocks")
        return Checkpointed(node) if is_block else node

    return nnx.recursive_map(wrapped, model, graph=True)


def batches(data: Mapping[str, np.ndarray], batch_size: int, draws: np.random.Generator) -> Iterator[dict[str, Any]]:
    """Yields the batches of a shuffled epoch; the last one may be short."""
    num_examples = len(next(iter(data.values())))
    order = draws.permutation(num_examples)
    for start in range(0, num_examples, batch_size):
        index = order[start : start + batch_size]
        yield {name: column[index] for name, column in data.items()}


def loop(workload: Workload) -> Callable[..., float]:
    """Returns a function that trains for a number of epochs, one call per step, and returns the last loss.

    It trains on the workload's data, unless it is given other data of the same form.
    """
    state, step = make_step(workload.make_model(), workload.loss_fn, workload.optimizer())
    compiled = jax.jit(step, donate_argnums=0)
    draws = np.random.default_rng(0)

    def run(epochs: int, data: Mapping[str, np.ndarray] = workload.data) -> float:
        nonlocal state
        for _ in range(epochs):
            for batch in batches(data, workload.batch_size, draws):
                state, metrics = compiled(state, batch)
        return float(metrics["loss"])

    return run


def scan(workload: Workload, *, gather_first: bool, keep: bool = True) -> Callable[[int], float]:
    """Returns the same, but with the data on the device and one call per epoch.

    Args:
        workload: What to train.
        gather_first: Whether to shuffle all of the data before the scan, or batch by batch within it.
        keep: Whether the data stays on the device between the calls of the returned function.
    """
    state, step = make_step(workload.make_model(), workload.loss_fn, workload.optimizer())
    kept = jax.device_put(dict(workload.data)) if keep else None
    size, whole = workload.batch_size, workload.num_examples // workload.batch_size
    draws = np.random.default_rng(0)

    def take(data, index):
        return {name: column.at[index].get(mode="promise_in_bounds") for name, column in data.items()}

    def epoch(state, data, order):
        index = order[: whole * size].reshape(whole, size)
        if gather_first:
            state, metrics = jax.lax.scan(step, state, take(data, index))
        else:
            state, metrics = jax.lax.scan(lambda state, index: step(state, take(data, index)), state, index)
        metrics = {name: value[-1] for name, value in metrics.items()}
        if whole * size < workload.num_examples:
            state, metrics = step(state, take(data, order[whole * size :]))
        return state, metrics

    compiled = jax.jit(epoch, donate_argnums=0)

    def run(epochs: int) -> float:
        nonlocal state
        data = jax.device_put(dict(workload.data)) if kept is None else kept
        for _ in range(epochs):
            # On a CPU, NumPy draws a permutation many times faster than the sorts of jax.random.permutation.
            order = draws.permutation(workload.num_examples).astype(np.int32)
            state, metrics = compiled(state, data, order)
        return float(metrics["loss"])

    return run
