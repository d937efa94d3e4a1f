"""`report`: what a step tells of its update, for the asking."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.problems import Busy, Linear, config, regression, squared_error
from tests.test_transforms import by_pmap, by_shard_map, masked, masked_error
from trainer import (
    ArgumentError,
    ArgumentTypeError,
    Callback,
    ObjectiveError,
    OptimizerConfig,
    SchedulerConfig,
    Trainer,
    TrainingConfig,
    TrainState,
    fuse_steps,
    make_mesh,
    make_schedule,
    make_train_step,
)

ALL = ("gradient_norm", "update_ratio", "learning_rate")


def norm(tree):
    return np.sqrt(sum(np.sum(np.square(np.asarray(leaf, np.float64))) for leaf in jax.tree.leaves(tree)))


def gradient(state, batch):
    return jax.grad(lambda params: squared_error(state.replace(params=params).model(), batch, None, 0)[0])(state.params)


def test_by_definition():
    optimizer = optax.inject_hyperparams(optax.sgd)(lambda count: 0.1 / (1 + count))
    state = TrainState.create(Linear(4), optimizer, rng=jax.random.key(0))
    step = jax.jit(make_train_step(squared_error, optimizer, report=ALL))
    for number in range(3):
        batch = regression(8, seed=number)
        grads = gradient(state, batch)
        after, metrics = step(state, batch)
        moved = jax.tree.map(jnp.subtract, after.params, state.params)
        assert metrics["gradient_norm"] == pytest.approx(norm(grads), rel=1e-5)
        assert metrics["update_ratio"] == pytest.approx(norm(moved) / norm(state.params), rel=1e-4)
        assert metrics["learning_rate"] == pytest.approx(0.1 / (1 + number), rel=1e-6)
        state = after


def test_the_gradient_norm_is_that_before_clipping():
    optimizer = optax.chain(optax.clip_by_global_norm(1e-3), optax.sgd(1.0))
    state = TrainState.create(Linear(4), optimizer, rng=jax.random.key(0))
    _, metrics = make_train_step(squared_error, optimizer, report=ALL[:2])(state, regression(8))
    assert metrics["gradient_norm"] > 0.1
    assert metrics["update_ratio"] * norm(state.params) == pytest.approx(1e-3, rel=1e-4)


def test_a_function_of_the_update():
    def largest(update):
        return jnp.max(jnp.abs(update.grads["layer"]["kernel"]))

    state = TrainState.create(Linear(4), optax.sgd(0.1), rng=jax.random.key(0))
    step = make_train_step(squared_error, optax.sgd(0.1), report={"largest": largest})
    assert step(state, regression(8))[1]["largest"] > 0


def test_nothing_asked_is_the_same_program():
    optimizer, batch = optax.adam(0.1), regression(8)
    state = TrainState.create(Busy(), optimizer, rng=jax.random.key(0))
    texts = {
        jax.jit(make_train_step(squared_error, optimizer, **options)).lower(state, batch).as_text()
        for options in ({}, {"report": ()}, {"report": {}})
    }
    assert len(texts) == 1


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        (None, {}),
        (SchedulerConfig(scheduler_type="cosine", warmup_steps=3), {}),
        (SchedulerConfig(scheduler_type="cosine", warmup_steps=3), {"nonfinite": "skip"}),
        (SchedulerConfig(scheduler_type="exponential", decay_rate=0.9, decay_steps=2), {}),
    ],
)
@pytest.mark.few(1)
def test_a_trainer_knows_the_rate_of_its_configuration(scheduler, options, tmp_path):
    rate = 0.01
    settings = TrainingConfig(
        optimizer=OptimizerConfig(optimizer_type="adam", learning_rate=rate), scheduler=scheduler, log_frequency=1
    )
    trainer = Trainer(Busy(), settings, loss_fn=squared_error, report=ALL, workdir=tmp_path, **options)
    trainer.train(regression(40), 2, 8)
    steps, rates = trainer.history.series("learning_rate")
    schedule = (lambda count: rate) if scheduler is None else make_schedule(scheduler, rate, 10)
    assert rates == pytest.approx([float(schedule(step - 1)) for step in steps], rel=1e-5)
    assert len(trainer.history.series("gradient_norm")[1]) == 10


def test_what_is_set_is_what_is_reported(tmp_path):
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    trainer = Trainer(Linear(4), config(), optimizer, loss_fn=squared_error, report=["learning_rate"])
    assert trainer.train_step(regression(8))["learning_rate"] == pytest.approx(0.1)
    trainer.set_learning_rate(0.01)
    assert trainer.train_step(regression(8))["learning_rate"] == pytest.approx(0.01)


def test_fused_and_on_a_mesh(tmp_path):
    optimizer = optax.sgd(0.1)
    state = TrainState.create(Linear(4), optimizer, rng=jax.random.key(0))
    step = make_train_step(squared_error, optimizer, report=ALL[:2])
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *[regression(8, seed=seed) for seed in range(3)])
    _, metrics = jax.jit(fuse_steps(step, 3))(state, stacked)
    assert metrics["gradient_norm"].shape == (3,)
    trainers = [
        Trainer(Linear(4), config(), optimizer, loss_fn=squared_error, report=ALL[:2], workdir=tmp_path, **options)
        for options in ({}, {"mesh": make_mesh({"data": 4, "fsdp": 2})})
    ]
    one, other = (trainer.train_step(regression(8)) for trainer in trainers)
    for name in ALL[:2]:
        assert other[name] == pytest.approx(float(one[name]), rel=1e-5)


RATED = optax.inject_hyperparams(optax.adam)(lambda count: 0.1 / (1 + count))


def by_vmap(step, state, batches):
    """Runs a step with ``axis_name`` "data" on eight parts of a batch; what is returned is that of the last part."""
    mapped = jax.jit(jax.vmap(step, in_axes=(None, 0), axis_name="data"))
    for batch in batches:
        states, metrics = mapped(state, jax.tree.map(lambda leaf: leaf.reshape(8, -1, *leaf.shape[1:]), batch))
        state, metrics = jax.tree.map(lambda leaf: leaf[7], (states, metrics))
    return state, metrics


@pytest.mark.parametrize("run", [by_vmap, by_pmap, by_shard_map])
@pytest.mark.parametrize(("loss_fn", "data"), [(squared_error, regression), (masked_error, masked)])
@pytest.mark.parametrize("accumulate_steps", [1, 2])
@pytest.mark.few(6)
def test_over_a_mapped_axis_they_are_those_of_the_whole_batch(run, loss_fn, data, accumulate_steps):
    options = {"report": ALL, "nonfinite": "skip"}
    state = TrainState.create(Linear(4), RATED, rng=jax.random.key(0), nonfinite="skip")
    batches, alone = [data(32), {**data(32), **regression(32, seed=1)}], state
    for batch in batches:
        alone, wanted = jax.jit(make_train_step(loss_fn, RATED, **options))(alone, batch)
    step = make_train_step(loss_fn, RATED, axis_name="data", accumulate_steps=accumulate_steps, **options)
    _, metrics = run(step, state, batches)
    assert metrics["learning_rate"] == pytest.approx(0.05)
    for name in ALL:
        assert float(metrics[name]) == pytest.approx(float(wanted[name]), rel=1e-4)


def test_members_of_an_ensemble_report_their_own():
    members = [TrainState.create(Linear(4, rngs=nnx.Rngs(seed)), RATED, rng=jax.random.key(seed)) for seed in range(3)]
    step = make_train_step(squared_error, RATED, report=ALL)
    together = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    _, metrics = jax.jit(jax.vmap(step, in_axes=(0, None)))(together, regression(8))
    for index, member in enumerate(members):
        _, wanted = jax.jit(step)(member, regression(8))
        for name in ALL:
            assert float(metrics[name][index]) == pytest.approx(float(wanted[name]), rel=1e-5)
    assert len(set(metrics["gradient_norm"].tolist())) == 3


def test_killed_and_resumed_the_rows_are_the_same(tmp_path):
    class Stop(Callback):
        def on_batch_end(self, trainer, step, logs):
            if step == 7:
                raise RuntimeError("enough")

    def build(name, *callbacks):
        settings = config(log_frequency=1)
        return Trainer(
            Busy(), settings, loss_fn=squared_error, workdir=tmp_path / name, save_interval=2, report=ALL,
            callbacks=callbacks,
        )  # fmt: skip

    whole = build("whole")
    whole.train(regression(40), 2, 8)
    with pytest.raises(RuntimeError, match="enough"):
        build("cut", Stop()).train(regression(40), 2, 8)
    resumed = build("cut")
    resumed.train(regression(40), 2, 8, resume=True)
    assert list(resumed.history) == list(whole.history)


class TestRefusals:
    @pytest.mark.parametrize(
        ("report", "error", "message"),
        [
            (
                ["gradientnorm"],
                ArgumentError,
                "`report` names 'gradientnorm', which no step measures; did you mean 'gra",
            ),
            ("gradient_norm", ArgumentTypeError, "`report` is 'gradient_norm'; it must be a list of names, or functio"),
            (3, ArgumentTypeError, "`report` is 3; it must be a list of names, or functions by name"),
            ({"a": 1}, ArgumentTypeError, r"`report\['a'\]` is of type int; it must be a callable of a trainer.Update"),
        ],
    )
    def test_arguments(self, report, error, message):
        with pytest.raises(error, match=message):
            make_train_step(squared_error, optax.sgd(0.1), report=report)
        with pytest.raises(error, match=message):
            Trainer(Linear(4), config(), loss_fn=squared_error, report=report)

    def test_results(self):
        def loss_fn(model, batch, rng, step):
            return squared_error(model, batch, rng, step)[0], {"gradient_norm": 1.0}

        state = TrainState.create(Linear(4), optax.sgd(0.1), rng=jax.random.key(0))
        with pytest.raises(ObjectiveError, match="a metric `gradient_norm`, which `report` asks of the step; rename"):
            make_train_step(loss_fn, optax.sgd(0.1), report=["gradient_norm"])(state, regression(8))
        report = {"a": lambda update: update.grads["layer"]["kernel"]}
        with pytest.raises(ObjectiveError, match=r"`report` returned a metric `a` of shape \(4, 1\); metrics are"):
            make_train_step(squared_error, optax.sgd(0.1), report=report)(state, regression(8))
        with pytest.raises(
            ArgumentError, match="asks for the learning rate, and the optimizer keeps none in its state"
        ):
            make_train_step(squared_error, optax.sgd(0.1), report=["learning_rate"])(state, regression(8))
