"""Batches as people have them, through the steps, the loaders and the trainer."""

import dataclasses
import functools
from collections import namedtuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.problems import Linear, config, regression, squared_error
from trainer import (
    BatchError,
    CompiledStep,
    Run,
    Trainer,
    TrainState,
    evaluate,
    make_eval_step,
    make_mesh,
    make_train_step,
    run_epoch,
)

Pair = namedtuple("Pair", "input target")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Examples:
    input: jax.Array
    target: jax.Array


def as_tuple(batch):
    return batch["input"], batch["target"]


def nested(batch):
    return {"deep": [batch["input"], {"target": batch["target"]}]}


# How a batch is made from a dict, and how the objective reads it.
KINDS = {
    "tuple": (as_tuple, lambda batch: {"input": batch[0], "target": batch[1]}),
    "namedtuple": (lambda batch: Pair(**batch), lambda batch: {"input": batch.input, "target": batch.target}),
    "dataclass": (lambda batch: Examples(**batch), lambda batch: {"input": batch.input, "target": batch.target}),
    "nested": (nested, lambda batch: {"input": batch["deep"][0], "target": batch["deep"][1]["target"]}),
    "array": (
        lambda batch: np.concatenate([batch["input"], batch["target"][:, None]], 1),
        lambda batch: {"input": batch[:, :3], "target": batch[:, 3]},
    ),
}


def objective(read):
    return lambda model, batch, rng, step: squared_error(model, read(batch), rng, step)


def build(loss_fn=squared_error, settings=None, **arguments):
    return Trainer(Linear(), settings or config(), loss_fn=loss_fn, **arguments)


def batches_of(data, size):
    return [{name: leaf[i : i + size] for name, leaf in data.items()} for i in range(0, len(data["target"]), size)]


def params(trainer):
    return jax.tree.map(np.asarray, trainer.state.params)


def over(devices):
    """Returns the arguments of a trainer over so many devices; none for the default device."""
    return {"mesh": make_mesh({"data": devices}, jax.devices()[:devices])} if devices else {}


def trained(make, read, devices):
    """Returns what a trainer reports and learns on batches that ``make`` makes of dicts."""
    data, held = regression(24, 3), regression(16, 3, seed=1)
    trainer = build(objective(read), steps_per_call=2, **over(devices))
    averages = [trainer.train(make(data), 1, 8, make(held)), trainer.evaluate(make(held), 8)]
    batch, *others = [make(batch) for batch in batches_of(data, 8)]
    averages.append(trainer.train(others, 1, 8, [batch]))
    losses = [trainer.validate_step(batch)["loss"], trainer.train_step(batch)["loss"]]
    return averages, jax.tree.map(np.asarray, losses), params(trainer)


def plain(batch):
    return batch


@functools.cache
def trained_on_dicts(devices):
    return trained(plain, plain, devices)


@pytest.mark.parametrize(("kind", "devices"), [*((kind, None) for kind in KINDS), ("tuple", 4)])
@pytest.mark.few(2)
def test_any_tree_trains_as_a_dict_does(kind, devices):
    chex.assert_trees_all_equal(trained(*KINDS[kind], devices), trained_on_dicts(devices))


def ragged(model, batch, rng, step):
    inside = jnp.mean(model(batch["inside"]) ** 2)
    return inside + batch["weight"] * jnp.mean(model(batch["edge"]) ** 2), {"inside": inside}


def ragged_batch(weight=0.5, edge=5, seed=0):
    draw = np.random.default_rng(seed)
    x, y = (draw.normal(size=(size, 3)).astype(np.float32) for size in (8, edge))
    return {"inside": x, "edge": y, "weight": weight}


@pytest.mark.parametrize(("weight", "devices"), [(0.5, None), (np.float32(0.5), None), (0.5, 4)])
@pytest.mark.few(1)
def test_ragged_leaves_and_numbers_train(weight, devices):
    batches = [ragged_batch(weight, seed=seed) for seed in range(3)]
    trainer = build(ragged, train_data_loader=batches, val_data_loader=batches[:2], **over(devices))
    before = trainer.run.state.copy()
    averages = trainer.train_epoch()

    optimizer = trainer.optimizer
    step, losses = jax.jit(make_train_step(ragged, optimizer)), []
    for batch in batches:
        before, metrics = step(before, batch)
        losses.append(float(metrics["loss"]))
    # Each batch counts as one.
    np.testing.assert_allclose(averages["loss"], np.mean(losses), rtol=1e-6)
    chex.assert_trees_all_close(params(trainer), jax.tree.map(np.asarray, before.params), rtol=1e-6)
    assert trainer.compile(batches[0]).total > 0


def test_ragged_batches_count_by_their_weight():
    def weighted(model, batch, rng, step):
        loss, metrics = ragged(model, batch, rng, step)
        return loss, {**metrics, "batch_weight": batch["edge"].shape[0]}

    batches = [ragged_batch(edge=edge, seed=edge) for edge in (1, 6)]
    trainer = build(weighted)
    step, state = jax.jit(make_eval_step(weighted)), trainer.state
    losses = [float(step(state, batch, index)["loss"]) for index, batch in enumerate(batches)]
    averages = evaluate(step, state, batches)
    np.testing.assert_allclose(averages["loss"], (losses[0] + 6 * losses[1]) / 7, rtol=1e-6)


def test_a_number_beside_arrays_leaves_the_count_of_examples():
    def scaled(model, batch, rng, step):
        loss, _ = squared_error(model, batch, rng, step)
        return batch["scale"] * loss, {}

    data = regression(12, 3)
    batches = [{**batch, "scale": 2.0} for batch in batches_of(data, 8)]
    trainer = build(scaled)
    averages = evaluate(jax.jit(make_eval_step(scaled)), trainer.state, batches)
    np.testing.assert_allclose(averages["loss"], 2 * build().evaluate(data, 12)["loss"], rtol=1e-6)


@pytest.mark.parametrize("devices", [None, 4])
@pytest.mark.few(1)
def test_a_column_of_typed_keys_trains(devices):
    def noisy(model, batch, rng, step):
        noise = jax.vmap(lambda key: jax.random.normal(key, (3,)))(batch["key"])
        return squared_error(model, {**batch, "input": batch["input"] + noise}, rng, step)

    def words(model, batch, rng, step):
        return noisy(model, {**batch, "key": jax.random.wrap_key_data(batch["key"])}, rng, step)

    keys = jax.random.split(jax.random.key(3), 32)
    typed = {**regression(32, 3), "key": keys}
    raw = {**typed, "key": np.asarray(jax.random.key_data(keys))}
    found, expected = (build(loss_fn, steps_per_call=2, **over(devices)) for loss_fn in (noisy, words))
    assert found.train(typed, 1, 8, typed) == expected.train(raw, 1, 8, raw)
    chex.assert_trees_all_equal(params(found), params(expected))


def aligned(shape, dtype=np.float32):
    """Returns memory that JAX takes without a copy on the CPU."""
    memory = np.empty(int(np.prod(shape)) * np.dtype(dtype).itemsize + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : len(memory) - 64 + start].view(dtype).reshape(shape)


class Reusing:
    """Fills the same buffers again and again."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        buffers = {name: aligned(leaf.shape, leaf.dtype) for name, leaf in self.batches[0].items()}
        for batch in self.batches:
            for name, leaf in batch.items():
                buffers[name][:] = leaf
            yield buffers


@pytest.mark.parametrize("features", [3, 5000])
def test_a_reused_buffer_gives_the_numbers_of_fresh_ones(features):
    def loss_fn(model, batch, rng, step):
        return squared_error(model, {**batch, "input": batch["input"][:, :3]}, rng, step)

    batches = batches_of(regression(16 * 40, features), 16)
    trainers = [
        build(loss_fn, train_data_loader=loader, val_data_loader=loader) for loader in (batches, Reusing(batches))
    ]
    averages = [trainer.train_epoch() for trainer in trainers]
    assert averages[0] == averages[1]
    chex.assert_trees_all_equal(*map(params, trainers))


def test_a_batch_may_be_overwritten_after_a_step():
    batches = batches_of(regression(16 * 40, 3), 16)
    fresh, reused = build(), build()
    for batch in batches:
        fresh.train_step(batch)
    metrics = [reused.validate_step(batch) for batch in Reusing(batches)]
    expected = [build().validate_step(batch) for batch in batches[:1]]
    assert float(metrics[0]["loss"]) == float(expected[0]["loss"])
    for batch in Reusing(batches):
        reused.train_step(batch)
    chex.assert_trees_all_equal(params(fresh), params(reused))


def test_none_from_a_loader_is_an_error_with_its_position():
    batch = regression(8, 3)
    trainer = build(train_data_loader=[batch, None, batch])
    with pytest.raises(BatchError, match=r"^`train_data_loader` yielded None in place of batch 1 of its pass"):
        trainer.train_epoch()
    assert trainer.step == 1
    trainer = build(train_data_loader=[batch], val_data_loader=[batch, batch, None])
    with pytest.raises(BatchError, match=r"^`val_data_loader` yielded None in place of batch 2 of its pass"):
        trainer.train_epoch()


def test_a_bad_batch_of_ones_own_loop_is_located():
    batch, optimizer = regression(8, 3), optax.sgd(0.1)
    state = TrainState.create(Linear(), optimizer, rng=jax.random.key(0))
    step = CompiledStep(make_train_step(squared_error, optimizer))
    with pytest.raises(BatchError, match=r"^`batch` is None") as caught:
        for _ in run_epoch(step, Run.start(state), [batch, batch, None]):
            pass
    assert caught.value.__notes__ == ["raised for batch 2, the first being batch 0"]


def test_a_batch_of_other_shapes_is_located():
    trainer = build(train_data_loader=[regression(8, 3), regression(8, 3), regression(8, 5)])
    with pytest.raises(TypeError, match="raised in `loss_fn` on a batch of input: float32\\(8, 5\\)") as caught:
        trainer.train_epoch()
    assert trainer.step == 2
    assert "raised by the step on batch 2, the first being batch 0" in caught.value.__notes__


def test_what_trains_on_arrays_refuses_what_cannot_be_right():
    data = regression(8, 3)
    masked = {**data, "target": np.ma.masked_array(data["target"])}
    for call in (
        lambda trainer: trainer.train(masked, 1, 4),
        lambda trainer: trainer.evaluate(masked, 4),
        lambda trainer: trainer.train_step(masked),
        lambda trainer: trainer.validate_step(masked),
        lambda trainer: trainer.train([masked], 1, 4),
    ):
        trainer = build()
        with pytest.raises(BatchError, match="is a masked array, whose mask JAX drops"):
            call(trainer)
        assert trainer.step == 0
