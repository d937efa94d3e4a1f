"""Recipes twice: with this library, and by hand with Flax and optax as short as we can write them.

Each takes a model and batches and returns the trained model, or what of it is evaluated. `test_recipes.py` checks that
both learn the same, and counts their lines for the table in `docs/recipes.md`.
"""

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from trainer import (
    TrainState,
    add_lora,
    by_group,
    ema_of_params,
    jit_step,
    make_mesh,
    make_train_step,
    merge_lora,
    partition,
    with_averaged_params,
)


class Net(nnx.Module):
    def __init__(self, rngs):
        self.encoder = nnx.Linear(8, 32, rngs=rngs)
        self.head = nnx.Linear(32, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.tanh(self.encoder(x)))


def loss_fn(model, batch, rng=None, step=None):
    losses = optax.softmax_cross_entropy_with_integer_labels(model(batch["input"]), batch["label"])
    return losses.mean(), {}


class Plain:
    def ours(self, model, batches):
        optimizer = optax.sgd(0.1)
        state = TrainState.create(model, optimizer, rng=jax.random.key(0))
        step = jax.jit(make_train_step(loss_fn, optimizer), donate_argnums=0)
        for batch in batches:
            state, _ = step(state, batch)
        return state.model()

    def by_hand(self, model, batches):
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, batch):
            grads, _ = nnx.grad(loss_fn, has_aux=True)(model, batch)
            optimizer.update(model, grads)

        for batch in batches:
            step(model, optimizer, batch)
        return model


class Ema:
    def ours(self, model, batches):
        optimizer = optax.chain(optax.sgd(0.1), ema_of_params(0.9, debias=False))
        state = TrainState.create(model, optimizer, rng=jax.random.key(0))
        step = jax.jit(make_train_step(loss_fn, optimizer), donate_argnums=0)
        for batch in batches:
            state, _ = step(state, batch)
        return with_averaged_params(state).model()

    def by_hand(self, model, batches):
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
        average = jax.tree.map(jnp.copy, nnx.state(model, nnx.Param))

        @nnx.jit
        def step(model, optimizer, average, batch):
            grads, _ = nnx.grad(loss_fn, has_aux=True)(model, batch)
            optimizer.update(model, grads)
            return optax.incremental_update(nnx.state(model, nnx.Param), average, 1 - 0.9)

        for batch in batches:
            average = step(model, optimizer, average, batch)
        averaged = nnx.clone(model)
        nnx.update(averaged, average)
        return averaged


class Lora:
    def ours(self, model, batches):
        adapted, optimizer = add_lora(model, 4, paths="encoder", rngs=nnx.Rngs(1)), optax.sgd(0.1)
        state = TrainState.create(adapted, optimizer, rng=jax.random.key(0), wrt=nnx.LoRAParam)
        step = jax.jit(make_train_step(loss_fn, optimizer, wrt=nnx.LoRAParam), donate_argnums=0)
        for batch in batches:
            state, _ = step(state, batch)
        return merge_lora(state.model())

    def by_hand(self, model, batches):
        inner = model.encoder
        model.encoder = nnx.LoRA(8, 4, 32, base_module=inner, rngs=nnx.Rngs(1))
        optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.LoRAParam)

        @nnx.jit
        def step(model, optimizer, batch):
            grads, _ = nnx.grad(loss_fn, argnums=nnx.DiffState(0, nnx.LoRAParam), has_aux=True)(model, batch)
            optimizer.update(model, grads)

        for batch in batches:
            step(model, optimizer, batch)
        inner.kernel[...] += model.encoder.lora_a[...] @ model.encoder.lora_b[...]
        model.encoder = inner
        return model


class Lbfgs:
    def ours(self, model, batches):
        optimizer = optax.lbfgs()
        state = TrainState.create(model, optimizer, rng=jax.random.key(0))
        step = jax.jit(make_train_step(loss_fn, optimizer), donate_argnums=0)
        for batch in batches:
            state, _ = step(state, batch)
        return state.model()

    def by_hand(self, model, batches):
        optimizer = nnx.Optimizer(model, optax.lbfgs(), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, batch):
            graphdef, params = nnx.split(model, nnx.Param)

            def loss_of(params):
                return loss_fn(nnx.merge(graphdef, params), batch)[0]

            loss, grads = jax.value_and_grad(loss_of)(params)
            optimizer.update(model, grads, value=loss, grad=grads, value_fn=loss_of)

        for batch in batches:
            step(model, optimizer, batch)
        return model


class RatesByGroup:
    def ours(self, model, batches):
        optimizer = by_group({"*bias": optax.sgd(0.2), "encoder/**": optax.sgd(0.01), "*": optax.sgd(0.1)})
        state = TrainState.create(model, optimizer, rng=jax.random.key(0))
        step = jax.jit(make_train_step(loss_fn, optimizer), donate_argnums=0)
        for batch in batches:
            state, _ = step(state, batch)
        return state.model()

    def by_hand(self, model, batches):
        def group(path, _):
            names = jax.tree_util.keystr(path)
            return "bias" if "bias" in names else "encoder" if "encoder" in names else "rest"

        rates = {"bias": optax.sgd(0.2), "encoder": optax.sgd(0.01), "rest": optax.sgd(0.1)}
        transformation = optax.partition(rates, lambda params: jax.tree.map_with_path(group, params))
        optimizer = nnx.Optimizer(model, transformation, wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, batch):
            grads, _ = nnx.grad(loss_fn, has_aux=True)(model, batch)
            optimizer.update(model, grads)

        for batch in batches:
            step(model, optimizer, batch)
        return model


class Accumulation:
    def ours(self, model, batches):
        optimizer = optax.sgd(0.1)
        state = TrainState.create(model, optimizer, rng=jax.random.key(0))
        step = jax.jit(make_train_step(loss_fn, optimizer, accumulate_steps=4), donate_argnums=0)
        for batch in batches:
            state, _ = step(state, batch)
        return state.model()

    def by_hand(self, model, batches):
        optimizer = nnx.Optimizer(model, optax.MultiSteps(optax.sgd(0.1), 4), wrt=nnx.Param)

        @nnx.jit
        def step(model, optimizer, batch):
            grads, _ = nnx.grad(loss_fn, has_aux=True)(model, batch)
            optimizer.update(model, grads)

        for batch in batches:
            for start in range(0, len(batch["label"]), len(batch["label"]) // 4):
                rows = slice(start, start + len(batch["label"]) // 4)
                step(model, optimizer, {name: column[rows] for name, column in batch.items()})
        return model


class ShardedOptimizer:
    """The momentum of one kernel is split over the devices, the params are not."""

    def ours(self, model, batches):
        optimizer = optax.sgd(0.1, momentum=0.9)
        state = TrainState.create(model, optimizer, rng=jax.random.key(0))
        rules = {"opt_state/**/encoder/kernel": P(None, "data"), "**": P()}
        state = jax.device_put(state, partition(state, make_mesh({"data": -1}), rules))
        step = jit_step(make_train_step(loss_fn, optimizer), state)
        for batch in batches:
            state, _ = step(state, batch)
        return state.model()

    def by_hand(self, model, batches):
        mesh, optimizer = Mesh(jax.devices(), ("data",)), optax.sgd(0.1, momentum=0.9)
        graphdef, params = nnx.split(model)
        opt_state = optimizer.init(params)

        def split(path, _):
            names = jax.tree_util.keystr(path, simple=True, separator="/")
            return NamedSharding(mesh, P(None, "data") if "encoder/kernel" in names else P())

        shardings = NamedSharding(mesh, P()), jax.tree.map_with_path(split, opt_state)
        params, opt_state = jax.device_put((params, opt_state), shardings)

        def update(params, opt_state, batch):
            grads = jax.grad(lambda params: loss_fn(nnx.merge(graphdef, params), batch)[0])(params)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        step = jax.jit(update, out_shardings=shardings, donate_argnums=(0, 1))
        for batch in batches:
            batch = jax.device_put(batch, NamedSharding(mesh, P("data")))
            params, opt_state = step(params, opt_state, batch)
        return nnx.merge(graphdef, params)


RECIPES = {
    "a plain step": Plain,
    "an average of the params (EMA)": Ema,
    "low-rank adaptation, merged": Lora,
    "L-BFGS": Lbfgs,
    "a rate for each group": RatesByGroup,
    "gradient accumulation": Accumulation,
    "a sharded optimizer": ShardedOptimizer,
}
