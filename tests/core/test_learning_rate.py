"""Setting the learning rate between steps: it counts, it is saved, it compiles nothing; where it cannot, it is said."""

import warnings
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.problems import Linear, config, regression, squared_error
from tests.test_api import assert_same_bits, build
from trainer import (
    ArgumentError,
    ArgumentTypeError,
    Callback,
    InMemoryData,
    OptimizerConfig,
    ReduceLROnPlateau,
    SchedulerConfig,
    Trainer,
    TrainState,
    make_mesh,
    make_optimizer,
    make_train_step,
)

BATCH = regression()


def injected(rate=0.1, make=optax.sgd):
    return optax.inject_hyperparams(make)(learning_rate=rate)


def kernel(trainer):
    return np.asarray(trainer.state.params["layer"]["kernel"])


def linear(optimizer, tmp_path=None, **options):
    return build(tmp_path, model=Linear(features=4), optimizer=optimizer, **options)


HOLDERS = {
    "alone": injected,
    "chain": lambda rate=0.1: optax.chain(optax.clip_by_global_norm(1.0), injected(rate)),
    "MultiSteps": lambda rate=0.1: optax.MultiSteps(injected(rate), 2),
    "masked": lambda rate=0.1: optax.masked(injected(rate), True),
    "configured": lambda rate=0.1: optax.inject_hyperparams(make_optimizer)(
        OptimizerConfig(optimizer_type="adamw", learning_rate=7.0, weight_decay=0.1, gradient_clip_norm=1.0),
        learning_rate=rate,
    ),
}


class TestSetting:
    @pytest.mark.parametrize("name", HOLDERS)
    def test_it_is_the_rate_from_the_next_step_on(self, name):
        changed, other = linear(HOLDERS[name](0.1)), linear(HOLDERS[name](0.01))
        changed.set_learning_rate(0.01)
        for _ in range(3):
            changed.train_step(BATCH)
            other.train_step(BATCH)
        assert_same_bits(changed.state, other.state)

    def test_zero_moves_nothing(self):
        trainer = linear(injected())
        trainer.train_step(BATCH)
        before = kernel(trainer)
        trainer.set_learning_rate(0)
        trainer.train_step(BATCH)
        np.testing.assert_array_equal(kernel(trainer), before)

    def test_it_equals_the_functional_code(self):
        trainer, optimizer = linear(injected()), injected()
        state = TrainState.create(Linear(features=4), optimizer, rng=jax.random.PRNGKey(0))
        step = jax.jit(make_train_step(squared_error, optimizer))
        for rate in (0.1, 0.05, jnp.float32(0.025)):
            trainer.set_learning_rate(rate)
            trainer.train_step(BATCH)
            state, _ = step(state.with_learning_rate(rate), BATCH)
        assert_same_bits(trainer.state, state)

    def test_edits_before_it_count_too(self):
        trainer = linear(injected())
        trainer.state.params["layer"]["kernel"] = jnp.zeros((4, 1))
        trainer.set_learning_rate(0.0)
        trainer.train_step(BATCH)
        assert not kernel(trainer).any()

    def test_it_compiles_nothing(self, compilations):
        trainer = linear(injected())
        for rate in (0.1, 0.2, 0.3):
            trainer.set_learning_rate(rate)
            trainer.train_step(BATCH)
        assert compilations["jit(train_step)"] == 1

    def test_over_a_mesh(self, tmp_path):
        mesh = make_mesh({"data": 8})
        trainer = Trainer(Linear(features=4), config(), injected(), loss_fn=squared_error, workdir=tmp_path, mesh=mesh)
        before = kernel(trainer)
        trainer.set_learning_rate(0.0)
        trainer.train_step(BATCH)
        np.testing.assert_array_equal(kernel(trainer), before)

    def test_a_whole_ensemble_takes_it(self):
        make = lambda seed: TrainState.create(Linear(features=4), injected(), rng=jax.random.key(seed))  # noqa: E731
        states = jax.vmap(make)(jnp.arange(3)).with_learning_rate(0.5)
        np.testing.assert_array_equal(states.opt_state.hyperparams["learning_rate"], np.full(3, 0.5, np.float32))
        assert (
            float(jax.jit(lambda state: state.with_learning_rate(0.5))(make(0)).opt_state.hyperparams["learning_rate"])
            == 0.5
        )


class Halving(Callback):
    """Halves the rate with each epoch. An epoch that is resumed begins again."""

    def on_epoch_begin(self, trainer, epoch):
        trainer.set_learning_rate(0.08 / 2**epoch)


class TestInARun:
    @pytest.mark.parametrize("steps_per_call", [1, 4])
    def test_a_callback_sets_it_and_a_run_resumes_with_it(self, tmp_path, steps_per_call):
        def make():
            options = {"callbacks": [Halving()], "save_interval": 12, "steps_per_call": steps_per_call}
            return linear(injected(0.08), tmp_path, **options)

        trainer = make()
        trainer.train(BATCH, 3, 8)
        assert float(trainer.opt_state.hyperparams["learning_rate"]) == np.float32(0.02)

        optimizer, rate, data = injected(0.08), 0.08, InMemoryData(BATCH, 8)
        state = TrainState.create(Linear(features=4), optimizer, rng=jax.random.PRNGKey(0))
        step = jax.jit(make_train_step(squared_error, optimizer))
        for epoch in range(3):
            state = state.with_learning_rate(rate / 2**epoch)
            for batch in data.shuffled(trainer.setup.seed, epoch):
                state, _ = step(state, batch)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), trainer.state.params, state.params)

        resumed = make()
        resumed.train(BATCH, 3, 8, resume=tmp_path / "checkpoint_12.msgpack")  # in the second epoch
        assert_same_bits(resumed.state, trainer.state)

    def test_a_checkpoint_holds_it(self, tmp_path):
        trainer, other = linear(injected(), tmp_path), linear(injected(), tmp_path)
        trainer.set_learning_rate(0.02)
        other.load_checkpoint(trainer.save_checkpoint())
        assert other.opt_state.hyperparams["learning_rate"] == np.float32(0.02)
        for each in (trainer, other):
            each.train_step(BATCH)
        assert_same_bits(trainer.state, other.state)


class TestWhereItCannot:
    @pytest.mark.parametrize("optimizer", [None, optax.adam(1e-3), optax.chain(optax.clip(1.0), optax.sgd(0.1))])
    def test_no_rate_in_the_state(self, optimizer):
        trainer = linear(optimizer)
        with pytest.raises(
            ArgumentError, match=r"keeps none in its state: it is compiled into the step. Pass an optimizer"
        ):
            trainer.set_learning_rate(0.1)
        trainer.train_step(BATCH)  # nothing has happened

    OTHER_NAMES = {
        "polyak": (
            lambda: optax.inject_hyperparams(optax.polyak_sgd)(max_learning_rate=0.1),
            r"keeps `hyperparams/eps`, .*assign the rate in `opt_state`, as in hyperparams\['max_learning_rate'\] =",
        ),
        "in a chain": (
            lambda: optax.chain(optax.inject_hyperparams(lambda lr: optax.sgd(lr))(lr=0.1)),
            r"optax.inject_hyperparams keeps `0/hyperparams/lr`. Under another name, .* hyperparams\['lr'\] = 1e-3",
        ),
        "of NumPy": (
            lambda: optax.inject_hyperparams(optax.sgd)(np.float32(0.1)),
            r"such as np.float32\(1e-3\), is compiled into the step: pass a Python float",
        ),
    }

    @pytest.mark.parametrize("name", OTHER_NAMES)
    def test_hyperparameters_of_another_name_are_listed(self, name):
        make, message = self.OTHER_NAMES[name]
        with pytest.raises(ArgumentError, match=message):
            linear(make()).set_learning_rate(0.2)

    def test_a_report_names_them_too(self):
        optimizer = self.OTHER_NAMES["polyak"][0]()
        with pytest.raises(ArgumentError, match=r"none under that name .*opt_state.hyperparams\['max_learning_rate'\]"):
            linear(optimizer, report=["learning_rate"]).train_step(BATCH)

    def test_a_schedule_would_replace_it(self):
        with pytest.raises(ArgumentError, match=r"follows a schedule, which sets it anew in every step"):
            linear(injected(optax.linear_schedule(0.1, 0.0, 10))).set_learning_rate(0.1)

    def test_another_hyperparameter_may_follow_one(self):
        optimizer = optax.inject_hyperparams(optax.adam)(learning_rate=0.1, b1=optax.linear_schedule(0.9, 0.8, 10))
        trainer = linear(optimizer)
        trainer.set_learning_rate(0.5)
        assert float(trainer.opt_state.hyperparams["learning_rate"]) == 0.5

    def test_several_are_not_set_to_one_value(self):
        labels = lambda params: {"layer": {"kernel": "a", "bias": "b"}}  # noqa: E731
        trainer = linear(optax.partition({"a": injected(0.1), "b": injected(0.2)}, labels))
        with pytest.raises(ArgumentError, match=r"holds 2 learning rates .*hyperparams/learning_rate.*assign each one"):
            trainer.set_learning_rate(0.1)

    @pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf")])
    def test_a_value_that_is_no_rate(self, value):
        with pytest.raises(ArgumentError, match=r"`value` is .*; a learning rate must be zero or more, and finite"):
            linear(injected()).set_learning_rate(value)

    @pytest.mark.parametrize("value", ["fast", None, optax.constant_schedule(0.1)])
    def test_one_that_is_no_number(self, value):
        with pytest.raises(ArgumentTypeError, match=r"`value` is .*; a learning rate must be a number"):
            linear(injected()).set_learning_rate(value)


def warming(rate=0.1):
    scheduler = SchedulerConfig(scheduler_type="cosine", warmup_steps=3)
    return config(optimizer={"learning_rate": rate}, scheduler=scheduler, gradient_clip_norm=1.0)


def every(**kind):
    return config(optimizer={"optimizer_type": "sgd"}, scheduler=SchedulerConfig(**kind))


class TestInForce:
    """The rate that the display shows: computed beside the steps, the same as a step would report."""

    CASES = {
        "constant": {"training_config": config()},
        "schedule": {"training_config": warming()},
        "schedule of all steps": {"training_config": every(scheduler_type="step", step_size=4, gamma=0.5)},
        "plateau": {"training_config": warming(), "callbacks": [ReduceLROnPlateau("loss", patience=1, min_delta=9.0)]},
        "constant and plateau": {"callbacks": [ReduceLROnPlateau("loss", patience=1, min_delta=9.0)]},
        "skipped steps": {"training_config": warming(), "nonfinite": "skip", "steps_per_call": 1},
        "kept in the state": {"optimizer": injected(0.25)},
        "scheduled in the state": {"optimizer": injected(optax.linear_schedule(0.1, 0.0, 12), optax.adam)},
        "on a mesh": {"training_config": warming(), "mesh": make_mesh({"data": 8})},
    }

    def trained(self, **options):
        shown = {}

        class Look(Callback):
            def on_call_end(self, trainer, step, logs):
                if np.isfinite(logs["loss"]):  # an update that is left out has no rate
                    shown[step] = (float(trainer.setup.rate(trainer.run)), float(logs["learning_rate"]))

        settings = {"loss_fn": squared_error, "report": ["learning_rate"], "training_config": config(), **options}
        return Trainer(Linear(features=4), **settings | {"callbacks": [*options.get("callbacks", ()), Look()]}), shown

    @pytest.mark.parametrize("name", CASES)
    def test_it_is_what_a_step_reports(self, name):
        trainer, shown = self.trained(**self.CASES[name])
        batch = regression(64)
        if name == "skipped steps":
            batch = {**batch, "input": batch["input"].copy()}
            batch["input"][0] = np.nan  # of one batch in each epoch
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.train(batch, 3, 16)
        assert len(shown) >= 2
        for step, (rate, reported) in shown.items():
            assert rate == pytest.approx(reported, rel=1e-6, abs=1e-9), step
        if name == "constant and plateau":
            assert [rate for rate, _ in shown.values()] == pytest.approx([0.01, 0.01, 0.001])

    def test_a_rate_that_nobody_knows_is_none(self):
        groups = optax.multi_transform(
            {"a": injected(0.1), "b": injected(0.2)}, {"layer": {"kernel": "a", "bias": "b"}}
        )
        for optimizer in (optax.adam(1e-3), groups):
            trainer = linear(optimizer)
            assert trainer.setup.rate(trainer.run) is None

    def test_it_compiles_once_and_a_constant_never(self, compilations):
        trainer, _ = self.trained(**self.CASES["schedule"])
        trainer.train(BATCH, 2, 8)
        trainer.state = trainer.state.replace(opt_state=jax.tree.map(jnp.copy, trainer.opt_state))
        with pytest.warns(UserWarning, match="the end of the learning-rate schedule"):
            trainer.train(BATCH, 2, 8)
        assert compilations["jit(rate_in_force)"] == 1
        other, _ = self.trained()
        assert type(other.setup.rate(other.run)) is float
        assert compilations["jit(rate_in_force)"] == 1

    def test_the_step_is_the_same_program(self):
        texts = set()
        for progress in (False, True):
            trainer = Trainer(Linear(features=4), warming(), loss_fn=squared_error, progress=progress)
            trainer.setup.rate(trainer.run.replace(horizon=9))
            texts.add(trainer.setup.step.trace(trainer.run.replace(horizon=9), BATCH)[1].lower().as_text())
        assert len(texts) == 1

    def test_it_transfers_nothing_unasked_and_keeps_no_state(self):
        trainer = Trainer(Linear(features=4), warming(), loss_fn=squared_error, progress=False)
        run = trainer.run.replace(horizon=9)
        with jax.transfer_guard("disallow"):
            trainer.setup.rate(run)
        held = weakref.ref(run.leaves[0])
        del run
        trainer.state = jax.tree.map(jnp.copy, trainer.state)
        trainer.train(BATCH, 1, 8)
        assert held() is None
