"""Ensembles and sweeps: one program over seeds and learning rates, and the best of it as a trainer."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

from tests.fit.test_resume import StoppedError, Watching
from tests.problems import Busy, Linear, config, regression, squared_error
from tests.test_api import assert_same_bits, on_host
from trainer import (
    ArgumentError,
    ArgumentTypeError,
    InMemoryData,
    ObjectiveError,
    OptimizerConfig,
    Trainer,
    TrainingConfig,
    TrainState,
    latest_checkpoint,
    make_mesh,
    make_sweep,
    make_train_step,
    sweep_members,
)

OPTIMIZER = optax.inject_hyperparams(optax.adam)(learning_rate=1e-3)
MEMBERS = 16


def objective(model, batch, rng, step):
    logits = model(batch["image"])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    return losses.mean(), {"accuracy": jnp.mean(logits.argmax(-1) == batch["label"])}


def member(key, rate):
    made, draws = jax.random.split(key)
    hidden, out = jax.random.split(made)
    layers = nnx.Linear(64, 32, rngs=nnx.Rngs(hidden)), nnx.relu, nnx.Linear(32, 10, rngs=nnx.Rngs(out))
    return TrainState.create(nnx.Sequential(*layers), OPTIMIZER, rng=draws).with_learning_rate(rate)


def batches(size=128):
    digits = load_digits()
    image, label = (digits.data / 16).astype(np.float32), digits.target.astype(np.int32)
    return [{"image": image[i : i + size], "label": label[i : i + size]} for i in range(0, len(label) - size, size)]


@pytest.mark.slow
def test_a_sweep_is_its_members_trained_one_by_one():
    keys, rates = jax.random.split(jax.random.key(0), MEMBERS), jnp.logspace(-4, -1, MEMBERS)
    step = make_train_step(objective, OPTIMIZER)
    together, alone = jax.jit(jax.vmap(step, in_axes=(0, None))), jax.jit(step)
    members = jax.vmap(member)(keys, rates)
    singles = [member(key, rate) for key, rate in zip(keys, rates, strict=True)]
    for batch in batches():
        members, metrics = together(members, batch)
        results = [alone(state, batch) for state in singles]
        singles = [state for state, _ in results]
    losses = np.array([found["loss"] for _, found in results])
    np.testing.assert_allclose(metrics["loss"], losses, rtol=1e-3)
    for index, state in enumerate(singles):
        for one, other in zip(jax.tree.leaves(state.params), jax.tree.leaves(members.params), strict=True):
            np.testing.assert_allclose(other[index], one, rtol=1e-2, atol=1e-4)
    assert np.argmin(metrics["loss"]) == np.argmin(losses)


@pytest.mark.slow
def test_the_best_member_becomes_a_trainer(tmp_path):
    keys, rates = jax.random.split(jax.random.key(0), 4), jnp.logspace(-4, -1, 4)
    members = jax.vmap(member)(keys, rates)
    step = jax.jit(jax.vmap(make_train_step(objective, OPTIMIZER), in_axes=(0, None)))
    for batch in batches():
        members, metrics = step(members, batch)
    best = int(jnp.argmin(metrics["loss"]))
    config = TrainingConfig(optimizer=OptimizerConfig(optimizer_type="adam", learning_rate=1e-3))
    state = jax.tree.map(lambda leaf: leaf[best], members)
    trainer = Trainer(state, config, OPTIMIZER, loss_fn=objective, workdir=tmp_path, report=["learning_rate"])
    assert trainer.step == len(batches())
    everything = {name: np.concatenate([batch[name] for batch in batches()]) for name in ("image", "label")}
    before = trainer.evaluate(everything, 256)
    averages = trainer.train(everything, 3, 128)
    assert averages["learning_rate"] == pytest.approx(float(rates[best]))
    assert averages["loss"] < before["loss"]


RATES = jnp.array([0.0, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.3])
SGD = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
OVER_MEMBERS = {"data": 1, "tensor": 8}
RULES = {"step": P(), "rng": P(), "**": P("tensor")}


def busy(**options):
    """Returns the states of 8 members, stacked, and the step of one."""

    def create(key, rate):
        model = Busy(rngs=nnx.Rngs(key))
        return TrainState.create(model, SGD, rng=key, **options).with_learning_rate(rate)

    def objective(model, batch, rng, step):
        loss, metrics = squared_error(model, batch, rng, step)
        squares = jnp.sum((model(batch["input"]) - batch["target"]) ** 2)
        return loss, {**metrics, "pair": (squares / batch["target"].size, batch["target"].size)}

    members = jax.vmap(create)(jax.random.split(jax.random.key(0), len(RATES)), RATES)
    return members, make_train_step(objective, SGD, **options)


def sweeping(directory=None, *, make=busy, **options):
    members, step = make()
    state, step_fn = make_sweep(step, members)
    return Trainer(state, config(log_frequency=1), loss_fn=None, step_fn=step_fn, workdir=directory, **options)


def agree(state, other):
    """Checks that members are the same within rounding."""

    for one, two in zip(*(jax.tree.leaves(on_host(one)) for one in (state, other)), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-5)


class TestTrainer:
    """A trainer of the whole sweep, by `make_sweep`."""

    def test_each_member_learns_what_it_learns_alone(self):
        members, step = busy()
        trainer, data = sweeping(), regression(44)
        averages = trainer.train(data, 2, 8)
        alone, compiled = [jax.tree.map(lambda leaf, i=i: leaf[i], members) for i in range(len(RATES))], jax.jit(step)
        for epoch in range(2):
            rows = []
            for batch in InMemoryData(data, 8).shuffled(trainer.setup.seed, epoch):
                results = [compiled(state, batch) for state in alone]
                alone = [state for state, _ in results]
                rows.append([metrics["loss"] for _, metrics in results])
        for index, state in enumerate(alone):
            agree(sweep_members(trainer.state, index), state)
        assert trainer.step == 12
        np.testing.assert_array_equal(sweep_members(trainer.state).step, np.full(8, 12))
        wanted = np.average(rows, axis=0, weights=[8, 8, 8, 8, 8, 4])
        np.testing.assert_allclose(averages["losses"], wanted, rtol=1e-3)
        assert averages["loss"] == pytest.approx(np.average(np.min(rows, axis=1), weights=[8, 8, 8, 8, 8, 4]), rel=1e-3)
        assert averages["loss"] <= min(averages["losses"])
        np.testing.assert_allclose(trainer.history.series("losses")[1][-1], rows[-1], rtol=1e-3)
        np.testing.assert_array_equal(np.shape(averages["pair"]), [8])

    def test_a_member_that_stands_still_is_as_it_was(self):
        members, _ = busy()
        trainer = sweeping()
        trainer.train(regression(16), 1, 8)
        still = jax.tree.map(lambda leaf: leaf[0], members.params)
        assert_same_bits(sweep_members(trainer.state, 0).params, still)

    @pytest.mark.slow
    def test_over_a_mesh_devices_have_members_of_their_own(self, tmp_path):
        over, one = sweeping(tmp_path, mesh=make_mesh(OVER_MEMBERS), partition_rules=RULES), sweeping()
        for trainer in (over, one):
            trainer.train(regression(44), 2, 8)
        kernel = over.state.params["inner"]["kernel"]
        assert kernel.sharding.shard_shape(kernel.shape) == (1, *kernel.shape[1:])
        for index in (0, 5, 7):
            agree(sweep_members(over.state, index), sweep_members(one.state, index))
        best = Trainer(sweep_members(over.state, 5), config(), SGD, loss_fn=squared_error)
        best.train(regression(16), 1, 8)
        assert best.step == 14

    @pytest.mark.parametrize("layout", [{}, {"axes": {"data": 8}}, {"axes": OVER_MEMBERS, "partition_rules": RULES}])
    @pytest.mark.few(1)
    def test_killed_and_resumed_it_is_the_same_to_the_bit(self, layout, tmp_path):
        layout = {**layout, "mesh": make_mesh(layout["axes"]) if layout else None, "save_interval": 2}
        layout.pop("axes", None)
        whole = sweeping(tmp_path / "whole", **layout)
        wanted = whole.train(regression(40), 2, 8)
        with pytest.raises(StoppedError):
            sweeping(tmp_path / "cut", callbacks=[Watching(7)], **layout).train(regression(40), 2, 8)
        resumed = sweeping(tmp_path / "cut", callbacks=[Watching()], **layout)
        assert resumed.train(regression(40), 2, 8, resume=True) == wanted
        assert_same_bits(resumed.state, whole.state)

    def test_one_that_diverges_leaves_the_others_alone_and_is_counted(self, tmp_path):
        def make():
            members, step = busy(nonfinite="skip")
            rates = RATES.at[3].set(1e38)
            members.opt_state.hyperparams["learning_rate"] = rates
            return members, step

        trainer, other = sweeping(tmp_path, make=make, save_interval=2), sweeping()
        averages = trainer.train(regression(32), 1, 8)
        other.train(regression(32), 1, 8)
        assert averages["skipped"] == [0, 0, 0, 3, 0, 0, 0, 0]  # the first update is large, and finite
        agree(sweep_members(trainer.state, 4).params, sweep_members(other.state, 4).params)
        assert trainer.state.is_finite()
        assert latest_checkpoint(tmp_path) is not None

    def test_scalars_of_optimizers_that_start_at_infinity_are_saved(self, tmp_path):
        optimizer = optax.chain(optax.sgd(0.1), optax.contrib.reduce_on_plateau(accumulation_size=100))

        def make():
            create = jax.vmap(lambda key: TrainState.create(Linear(4, rngs=nnx.Rngs(key)), optimizer, rng=key))
            return create(jax.random.split(jax.random.key(0), 2)), make_train_step(squared_error, optimizer)

        trainer = sweeping(tmp_path, make=make)
        trainer.train(regression(16), 1, 8)
        assert np.isinf(trainer.state.opt_state[1].best_value).all()
        assert latest_checkpoint(tmp_path) is not None


class TestRefused:
    @pytest.mark.parametrize(
        ("make", "kind", "message"),
        [
            (lambda members, step: make_sweep(3, members), ArgumentTypeError, "`step_fn` is of type int"),
            (
                lambda members, step: make_sweep(step, {}),
                ArgumentTypeError,
                "`members` is of type dict; it must be a T",
            ),
            (
                lambda members, step: make_sweep(step, jax.tree.map(lambda leaf: leaf[0], members)),
                ArgumentError,
                "`members` is the state of one model; it must be that of all members, stacked",
            ),
            (
                lambda members, step: make_sweep(step, members.replace(rng=members.rng[:3])),
                ArgumentError,
                r"`members` has 8 members by `step`, but not by `rng` of shape \(3,\)",
            ),
            (
                lambda members, step: make_sweep(step, make_sweep(step, members)[0]),
                ArgumentError,
                "`members` is the state of one model",
            ),
            (lambda members, step: sweep_members(members), ArgumentError, "`state` is that of no sweep"),
            (
                lambda members, step: sweep_members(make_sweep(step, members)[0], 8),
                ArgumentError,
                "`index` is 8; the sweep has the members 0 to 7",
            ),
            (
                lambda members, step: sweep_members(make_sweep(step, members)[0], 1.0),
                ArgumentTypeError,
                "`index` is 1.0 of type float",
            ),
        ],
    )
    def test_by_name(self, make, kind, message):
        with pytest.raises(kind, match=message):
            make(*busy())

    def test_a_metric_of_the_name_for_all_members(self):
        state, step = make_sweep(lambda state, batch: (state, {"loss": 1.0, "losses": 2.0}), busy()[0])
        with pytest.raises(ObjectiveError, match="`step_fn` returned a metric `losses`, which is that of all members"):
            jax.eval_shape(step, state, regression(8))

    def test_a_loss_that_is_a_pair_is_averaged_by_member(self):
        def step_fn(state, batch):
            return state.replace(step=state.step + 1), {"loss": (state.params["outer"]["bias"][0] + 1.0, 4.0)}

        state, step = make_sweep(step_fn, busy()[0])
        _, metrics = jax.jit(step)(state, regression(8))
        assert np.asarray(metrics["losses"]).shape == (len(RATES),)
        assert float(metrics["loss"]) == np.asarray(metrics["losses"]).min()

    def test_a_step_that_returns_something_else(self):
        members, _ = busy()
        state, step = make_sweep(lambda state, batch: state, members)
        with pytest.raises(ObjectiveError, match="`step_fn` returned a value of type TrainState"):
            step(state, regression(8))


@pytest.mark.parametrize("call", ["predict", "evaluate", "train"])
def test_an_evaluation_of_all_members_as_one_model_says_how_to(call):
    members, step = busy()
    state, step_fn = make_sweep(step, members)
    trainer = Trainer(state, config(), loss_fn=squared_error, step_fn=step_fn, progress=False)
    data = regression(8)
    with pytest.raises(Exception, match="shape") as caught:
        {
            "predict": lambda: trainer.predict(data, 8, lambda model, batch: model(batch["input"])),
            "evaluate": lambda: trainer.evaluate(data, 8),
            "train": lambda: trainer.train(data, 1, 8, val_data=data),
        }[call]()
    assert any("sweep_members(trainer.state, 0)" in note for note in caught.value.__notes__)
