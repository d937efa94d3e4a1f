"""Trains a small transformer to reverse sequences, over data, sequence and tensor axes, by rules alone.

Neither the model nor the step mentions devices. ``python examples/transformer.py`` uses all devices, or
eight simulated ones on a CPU, and ends in about half a minute. A mesh can have these axes, in any
combination, if each size divides what it splits:

    data      the examples of a batch
    fsdp      the examples, and the state
    tensor    heads and hidden units, by the rules below                  (4 heads)
    sequence  the tokens of every sequence, by the sharding of the batch  (16 tokens)

For example, ``--mesh data=2,sequence=2,tensor=2`` uses eight devices. Along ``sequence`` each device
computes its part of every sequence, and the compiler gathers keys and values where attention needs all of
them. This divides the memory of activations, so that sequences can be longer. Pipeline parallelism (layers on
separate devices) is out of scope: it needs a schedule in the step, which no rule can express.

``--plan 64`` prints what a step would need on 64 devices and runs nothing. ``--distributed`` makes this
process one of several, started as for `many_devices.py` by ``slurm.sh`` and ``kubernetes.yaml``.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import PartitionSpec as P

from trainer import (
    abstract_state,
    batch_sharding,
    create_sharded,
    jit_step,
    make_eval_step,
    make_mesh,
    make_train_step,
    plan,
)
from trainer.distributed import check_agreement, initialize
from trainer.sharding import BATCH_AXES, check_batch_fits, describe

VOCABULARY, LENGTH, FEATURES, HEADS, LAYERS = 16, 8, 64, 4, 2
SEPARATOR = VOCABULARY - 1

# Heads and hidden units are split over `tensor`: the first product of each pair needs no communication,
# the second one sums. Leaves without a rule are small, or split over `fsdp` if the mesh has that axis.
RULES = {
    "params/blocks/.*/attention/(query|key|value)/kernel": P(None, "tensor", None),
    "params/blocks/.*/attention/(query|key|value)/bias": P("tensor", None),
    "params/blocks/.*/attention/out/kernel": P("tensor", None, None),
    "params/blocks/.*/up/kernel": P(None, "tensor"),
    "params/blocks/.*/up/bias": P("tensor"),
    "params/blocks/.*/down/kernel": P("tensor", None),
}


class Block(nnx.Module):
    """Causal attention and a perceptron, each with a normalized input and a residual connection."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.attention_norm = nnx.LayerNorm(FEATURES, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, FEATURES, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(FEATURES, rngs=rngs)
        self.up = nnx.Linear(FEATURES, 4 * FEATURES, rngs=rngs)
        self.down = nnx.Linear(4 * FEATURES, FEATURES, rngs=rngs)

    def __call__(self, x_BxTxF, mask):
        x_BxTxF += self.attention(self.attention_norm(x_BxTxF), mask=mask)
        return x_BxTxF + self.down(nnx.gelu(self.up(self.norm(x_BxTxF))))


class Transformer(nnx.Module):
    """Predicts the next token at each position."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.embed = nnx.Embed(VOCABULARY, FEATURES, rngs=rngs)
        self.position = nnx.Param(0.02 * jax.random.normal(rngs.params(), (2 * LENGTH, FEATURES)))
        self.blocks = nnx.List([Block(rngs) for _ in range(LAYERS)])
        self.norm = nnx.LayerNorm(FEATURES, rngs=rngs)
        self.head = nnx.Linear(FEATURES, VOCABULARY, rngs=rngs)

    def __call__(self, token_BxT):
        x_BxTxF = self.embed(token_BxT) + self.position[None]
        mask = nnx.make_causal_mask(token_BxT)
        for block in self.blocks:
            x_BxTxF = block(x_BxTxF, mask)
        return self.head(self.norm(x_BxTxF))


def cross_entropy(model, batch, rng, step):
    """The objective, over the second half only: the first is random."""
    del rng, step
    logits_BxTxC = model(batch["input"])[:, LENGTH - 1 :]
    target_BxT = batch["target"][:, LENGTH - 1 :]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits_BxTxC, target_BxT).mean()
    return loss, {"accuracy": jnp.mean(logits_BxTxC.argmax(-1) == target_BxT)}


def sequences(seed, batch_size):
    """Returns sequences like ``3 1 2 | 2 1 3``, and the same one token later."""
    first = np.random.default_rng(seed).integers(SEPARATOR, size=(batch_size, LENGTH), dtype=np.int32)
    separator = np.full((batch_size, 1), SEPARATOR, np.int32)
    whole = np.concatenate([first, separator, first[:, ::-1]], axis=1)
    return {"input": whole[:, :-1], "target": whole[:, 1:]}


def place(batch, sharding):
    """Places a batch: each process places the examples of its own devices."""
    return {
        name: jax.make_array_from_callback(column.shape, sharding, column.__getitem__) for name, column in batch.items()
    }


def sharding_of_batches(mesh):
    """Splits the examples over data axes, and the tokens of each over ``sequence``, if the mesh has these axes."""
    return batch_sharding(mesh, BATCH_AXES, "sequence")


def axes(text):
    """Reads ``data=-1,tensor=2``."""
    return {name: int(size) for name, size in (axis.split("=") for axis in text.split(","))}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mesh", type=axes, default={"data": -1, "tensor": 2}, help="data=-1,tensor=2")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=128, help="over all devices")
    parser.add_argument("--cpu-devices", type=int, default=8, help="how many this process simulates on a CPU")
    parser.add_argument("--distributed", action="store_true", help="this is one of several processes")
    parser.add_argument("--plan", type=int, metavar="DEVICES", help="run nothing; print what a step needs on this many")
    arguments = parser.parse_args(argv)

    jax.config.update("jax_num_cpu_devices", arguments.plan or arguments.cpu_devices)
    if arguments.plan:
        jax.config.update("jax_platforms", "cpu")
    if arguments.distributed:
        initialize()

    # The rules name `tensor`, so the mesh must have it; an axis of size 1 costs nothing.
    mesh = make_mesh(arguments.mesh | {"tensor": arguments.mesh.get("tensor", 1)})
    split = sharding_of_batches(mesh)
    optimizer = optax.adamw(optax.warmup_cosine_decay_schedule(0.0, 3e-3, arguments.steps // 4, arguments.steps))
    how = {"rng": jax.random.key(0), "mesh": mesh, "rules": RULES}
    step = make_train_step(cross_entropy, optimizer)
    if arguments.plan:
        abstract = abstract_state(Transformer, optimizer, **how)
        print(plan(step, abstract, sequences(0, arguments.batch_size), split))
        return None

    check_batch_fits(sequences(0, arguments.batch_size), split)
    state = create_sharded(Transformer, optimizer, **how)
    train_step = jit_step(step, state, split)
    first = place(sequences(1, arguments.batch_size), split)
    check_agreement({"step": train_step.lower(state, first).as_text()})
    is_primary_process = jax.process_index() == 0
    if is_primary_process:
        print(describe(state.params))
    for number in range(1, arguments.steps + 1):
        state, metrics = train_step(state, place(sequences(number, arguments.batch_size), split))
        if jax.default_backend() == "cpu":
            # With several CPU devices in a process, collectives of two steps in flight wait for each other.
            jax.block_until_ready(metrics)
        if number % 50 == 0 and is_primary_process:
            print(f"step {number:4}  loss {metrics['loss']:.4f}  accuracy {metrics['accuracy']:.3f}", flush=True)

    unseen = place(sequences(0, 1024), split)
    result = {name: float(value) for name, value in jax.jit(make_eval_step(cross_entropy))(state, unseen).items()}
    if is_primary_process:
        print(f"unseen sequences: loss {result['loss']:.4f}  accuracy {result['accuracy']:.3f}")
    return result


if __name__ == "__main__":
    main()
