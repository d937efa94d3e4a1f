"""The cost of a step that computes almost nothing: a call from Python, over states of 12 to 3,000 arrays.

The model is a stack of layers of width 32, at batch 8, trained by Adam; the arrays are parameters and both moments.
All contenders train the same model on the same batch. The first contender made in a process is a few percent faster at
300 arrays, even if it is a loop by hand. So the first one is a second loop by hand, with which nothing is compared. Run
it with ``python benchmarks/dispatch.py``; ``benchmarks/peers.py`` compares Equinox in the same way.
"""

import flax.linen
import flax.training.train_state
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import by_hand
from timing import Report, compared, in_turns, per
from trainer import Callback, ConsoleLogger, MetricsLogger, TrainState, make_train_step
from workloads import Mlp, Workload, squared_error


class Ignored:
    """A stream that discards its text, so that the cost of a logger excludes a terminal."""

    def write(self, text):
        pass

    def flush(self):
        pass


class Watching(Callback):
    def on_batch_end(self, trainer, step, logs):
        pass


def stepping(compiled, state):
    """Returns a function that trains its own state on a batch."""

    def step(batch):
        nonlocal state
        state, metrics = compiled(state, batch)
        return metrics

    return step


def plain(workload):
    state, step = by_hand.make_step(workload.make_model(), workload.loss_fn, workload.optimizer())
    return stepping(jax.jit(step, donate_argnums=0), state)


def carrying_a_key(make_key):
    """By hand with a key in the state, like every state of this library."""

    def make(workload):
        state, step = by_hand.make_step(workload.make_model(), workload.loss_fn, workload.optimizer())

        def step_beside_a_key(state_and_key, batch):
            state, key = state_and_key
            state, metrics = step(state, batch)
            return (state, key), metrics

        return stepping(jax.jit(step_beside_a_key, donate_argnums=0), (state, make_key(0)))

    return make


def pure_step(make_key):
    def make(workload):
        optimizer = workload.optimizer()
        state = TrainState.create(workload.make_model(), optimizer, rng=make_key(0))
        return stepping(jax.jit(make_train_step(workload.loss_fn, optimizer), donate_argnums=0), state)

    return make


def facade(log_frequency=10**9, **options):
    return lambda workload: workload.trainer(log_frequency, **options).train_step


def nnx_step(model, optimizer, batch):
    """The step of Flax's own guides."""
    loss, grads = nnx.value_and_grad(lambda model: squared_error(model, batch, None, None)[0])(model)
    optimizer.update(model, grads)
    return loss


def model_and_optimizer(workload):
    model = workload.make_model()
    return model, nnx.Optimizer(model, workload.optimizer(), wrt=nnx.Param)


def nnx_jit(workload):
    model, optimizer = model_and_optimizer(workload)
    compiled = nnx.jit(nnx_step, donate_argnums=(0, 1))
    return lambda batch: compiled(model, optimizer, batch)


def nnx_cached_partial(workload):
    return nnx.cached_partial(nnx.jit(nnx_step, donate_argnums=(0, 1)), *model_and_optimizer(workload))


def nnx_jit_partial(workload):
    return nnx.jit_partial(nnx_step, *model_and_optimizer(workload), graph=False, donate_argnums=0)


class LinenMlp(flax.linen.Module):
    layers: int

    @flax.linen.compact
    def __call__(self, x):
        for index in range(self.layers):
            x = flax.linen.Dense(32)(x if index == 0 else flax.linen.relu(x))
        return x


def linen_train_state(workload):
    model = LinenMlp(len(workload.make_model().layers))
    params = model.init(jax.random.key(0), workload.batch["input"])["params"]
    state = flax.training.train_state.TrainState.create(apply_fn=model.apply, params=params, tx=workload.optimizer())

    def step(state, batch):
        def objective(params):
            return jnp.mean((state.apply_fn({"params": params}, batch["input"]) - batch["target"]) ** 2)

        loss, grads = jax.value_and_grad(objective)(state.params)
        return state.apply_gradients(grads=grads), loss

    return stepping(jax.jit(step, donate_argnums=0), state)


# Makes a function of a batch from a workload; and the factor by which a slow contender gets fewer steps.
CONTENDERS = {
    "by hand, made first": (plain, 1),
    "by hand": (plain, 1),
    "by hand, with a raw key": (carrying_a_key(jax.random.PRNGKey), 1),
    "by hand, with a typed key": (carrying_a_key(jax.random.key), 1),
    "pure step, raw key": (pure_step(jax.random.PRNGKey), 1),
    "pure step, typed key": (pure_step(jax.random.key), 1),
    "Trainer.train_step": (facade(), 1),
    "  log_callback, every 100 steps": (facade(100, log_callback=lambda step, metrics, prefix: None), 1),
    "  log_callback, every step": (facade(1, log_callback=lambda step, metrics, prefix: None), 1),
    "  metrics_logger, every step": (facade(1, metrics_logger=MetricsLogger(ConsoleLogger(Ignored()))), 1),
    "  three callbacks": (facade(callbacks=[Watching(), Watching(), Watching()]), 1),
    "linen TrainState": (linen_train_state, 1),
    "nnx.jit_partial(graph=False)": (nnx_jit_partial, 5),
    "nnx.cached_partial": (nnx_cached_partial, 5),
    "nnx.jit and nnx.Optimizer": (nnx_jit, 10),
}

# With 3,000 arrays a contender compiles for 15 seconds, and these would show nothing more.
SMALL_ONLY = ("  log_callback, every 100 steps", "  metrics_logger, every step")


def stack(layers):
    """A number of layers of width 32, and one batch."""
    data = {name: np.ones((8, 32), np.float32) for name in ("input", "target")}
    return Workload(f"{layers} layers", lambda: Mlp(*[32] * (layers + 1)), squared_error, data, 8)


def contender(make, workload, steps):
    """Makes a contender that takes a number of steps and waits for the last."""
    step, batch = make(workload), workload.batch

    def run():
        for _ in range(steps):
            metrics = step(batch)
        jax.block_until_ready(metrics)

    return per(steps, run)


def run(report, contenders, sizes):
    """Prints a table for each size of the state, given as layers and steps per turn."""
    for layers, steps in sizes:
        workload = stack(layers)
        runs = {name: contender(make, workload, max(2, steps // fewer)) for name, (make, fewer) in contenders.items()}
        times = in_turns(runs, report.repeats)
        report.table(f"{6 * layers:,} arrays", compared(times, "µs a step", 1e6, {"x by hand": "by hand"}))


def small(report):
    return ((2, 20), (10, 10)) if report.quick else ((2, 1000), (50, 200))


def main():
    report = Report(__doc__, repeats=7)
    run(report, CONTENDERS, small(report))
    if not report.quick:
        run(report, {name: made for name, made in CONTENDERS.items() if name not in SMALL_ONLY}, ((500, 10),))
    report.close()


if __name__ == "__main__":
    main()
