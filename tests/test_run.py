"""`Run`: an immutable value, whose state may be edited until a step consumes it."""

import dataclasses
import gc
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.problems import Busy, Counting, config, regression, squared_error
from tests.test_api import assert_same_bits, build
from trainer import (
    ArgumentTypeError,
    Callback,
    CompiledStep,
    Logger,
    Run,
    StateError,
    Trainer,
    TrainState,
    ema_of_params,
    load_run,
    make_mesh,
    make_train_step,
    save_run,
)

DATA = regression(24)


def injected(**options):
    return build(optimizer=optax.inject_hyperparams(optax.sgd)(learning_rate=0.1), **options)


def kernel(trainer):
    return np.asarray(trainer.run.peek().params["inner"]["kernel"])


class TestEdits:
    """What is assigned to a container of a state takes effect in the next step, or is refused."""

    @pytest.mark.parametrize("value", [0.0, np.float64(0), jnp.zeros(()), np.zeros((), np.float16)])
    def test_a_hyperparameter_takes_effect_in_the_next_step(self, value):
        trainer = injected()
        trainer.train_step(DATA)
        before = kernel(trainer)
        trainer.opt_state.hyperparams["learning_rate"] = value
        trainer.train_step(DATA)
        np.testing.assert_array_equal(kernel(trainer), before)
        assert trainer.opt_state.hyperparams["learning_rate"].dtype == jnp.float32

    def test_it_compiles_nothing(self, compilations):
        trainer = injected()
        for rate in (0.1, 0.01, jnp.float32(0.001)):
            trainer.opt_state.hyperparams["learning_rate"] = rate
            trainer.train_step(DATA)
        assert compilations["jit(train_step)"] == 1

    def test_a_parameter_takes_effect_and_the_callers_array_outlives_the_step(self):
        trainer = build()
        new = jnp.full((4, 8), 0.5)
        trainer.state.params["inner"]["kernel"] = new
        assert (trainer.model.inner.kernel[...] == 0.5).all()
        expected = build()
        params = {**expected.state.params, "inner": {**expected.state.params["inner"], "kernel": new.copy()}}
        expected.state = expected.state.replace(params=params)
        assert trainer.evaluate(DATA, 8) == expected.evaluate(DATA, 8)
        trainer.train_step(DATA)
        expected.train_step(DATA)
        assert_same_bits(trainer.state, expected.state)
        assert (new == 0.5).all()

    @pytest.mark.parametrize("steps_per_call", [1, 3])
    @pytest.mark.few(1)
    def test_edits_of_a_callback_count_in_train_fused_or_not(self, steps_per_call):
        class Stops(Callback):
            def on_validation_end(self, trainer, logs):
                if trainer.step == 3:
                    trainer.opt_state.hyperparams["learning_rate"] = 0.0

        trainer = injected(callbacks=[Stops()], steps_per_call=steps_per_call)
        trainer.train(DATA, 1, 4, DATA, val_interval=3)
        expected = injected(steps_per_call=steps_per_call)
        expected.train(DATA, 1, 4, DATA, val_interval=3)
        stopped = injected()
        assert (kernel(trainer) != kernel(expected)).any()
        data = trainer.setup.in_memory(DATA, 4, "data").shuffled(trainer.setup.seed, 0)
        for batch, _ in zip(data, range(3), strict=False):
            stopped.train_step(batch)
        np.testing.assert_array_equal(kernel(trainer), kernel(stopped))

    def test_edits_are_saved(self, tmp_path):
        trainer = injected()
        trainer.opt_state.hyperparams["learning_rate"] = 0.25
        path = trainer.save_checkpoint(tmp_path / "s.msgpack")
        other = injected()
        other.load_checkpoint(path)
        assert other.opt_state.hyperparams["learning_rate"] == 0.25

    def test_an_edit_of_a_consumed_state_is_refused_once_and_names_the_remedy(self):
        trainer = injected()
        hyperparams = trainer.opt_state.hyperparams
        trainer.train_step(DATA)
        hyperparams["learning_rate"] = 0.0
        before = kernel(trainer)
        with pytest.raises(StateError, match="was changed after a step had consumed it, so the change would be lost"):
            trainer.train_step(DATA)
        np.testing.assert_array_equal(kernel(trainer), before)
        trainer.train_step(DATA)
        assert (kernel(trainer) != before).any()

    def test_also_where_an_earlier_edit_of_the_same_container_took_effect(self):
        trainer = injected()
        hyperparams = trainer.opt_state.hyperparams
        before = kernel(trainer)
        hyperparams["learning_rate"] = 0.0
        trainer.evaluate(DATA, 8)
        trainer.train_step(DATA)
        np.testing.assert_array_equal(kernel(trainer), before)
        hyperparams["learning_rate"] = 0.5
        with pytest.raises(StateError, match="was changed after a step had consumed it"):
            trainer.train_step(DATA)

    def test_two_edits_before_a_step_count_both(self):
        trainer, expected = injected(), injected()
        trainer.opt_state.hyperparams["learning_rate"] = 7.0
        trainer.evaluate(DATA, 8)
        trainer.opt_state.hyperparams["learning_rate"] = 0.25
        expected.opt_state.hyperparams["learning_rate"] = 0.25
        trainer.train_step(DATA)
        expected.train_step(DATA)
        assert_same_bits(trainer.state, expected.state)

    @pytest.mark.parametrize("value", [0.5, jnp.float32(0.5)])
    @pytest.mark.parametrize("by", ["load", "assignment"])
    def test_one_that_is_replaced_with_its_state_is_no_error(self, by, value, tmp_path):
        trainer = injected()
        path, state = trainer.save_checkpoint(tmp_path / "s.msgpack"), trainer.state.copy()
        trainer.opt_state.hyperparams["learning_rate"] = value
        if by == "load":
            trainer.load_checkpoint(path)
        else:
            trainer.state = state
        trainer.train_step(DATA)
        assert trainer.opt_state.hyperparams["learning_rate"] == jnp.float32(0.1)

    def test_a_wrong_shape_is_refused_by_name(self):
        trainer = build()
        trainer.state.params["inner"]["bias"] = jnp.zeros(3)
        with pytest.raises(StateError, match=r"`params/inner/bias` of shape \(8,\) was given a value of shape \(3,\)"):
            trainer.train_step(DATA)

    def test_another_structure_is_refused(self):
        trainer = build()
        trainer.state.params["more"] = jnp.zeros(3)
        with pytest.raises(StateError, match="changed to another structure"):
            trainer.train_step(DATA)

    def test_a_state_that_nobody_edits_costs_no_copy(self):
        trainer = build()
        state = trainer.state
        assert trainer.state is state
        assert trainer.run.with_edits() is trainer.run

    def test_a_key_can_be_assigned_with_the_state(self):
        trainer = build(rng=jax.random.key(0))
        trainer.state = trainer.state.replace(rng=jax.random.key(7))
        other = build(rng=jax.random.key(7))
        trainer.train_step(DATA)
        other.train_step(DATA)
        assert_same_bits(trainer.state, other.state)


class TestValue:
    def test_it_cannot_be_assigned_to(self):
        run = build().run
        with pytest.raises(dataclasses.FrozenInstanceError):
            run.epoch = 3

    def test_an_earlier_run_keeps_its_record(self):
        optimizer = optax.sgd(0.1)
        state = TrainState.create(Busy(), optimizer, rng=jax.random.key(0))
        step = CompiledStep(make_train_step(squared_error, optimizer))
        first = Run.start(state)
        second, metrics = step(first, DATA, 24)
        third = second.recorded(metrics).validated({"loss": 1.0})
        assert (first.step, second.step, third.step) == (0, 1, 1)
        assert (len(first.history), len(second.history), len(third.history)) == (0, 0, 1)
        assert first.average.compute() == {}
        assert second.average.compute()["loss"] == pytest.approx(float(metrics["loss"]))
        assert (first.batch, second.batch, third.end_epoch().batch) == (0, 1, 0)
        assert second.validation is None
        assert third.history[-1]["val_loss"] == 1.0

    def test_a_validation_belongs_to_the_epoch_that_trained_the_state(self):
        optimizer = optax.sgd(0.1)
        state = TrainState.create(Busy(), optimizer, rng=jax.random.key(0))
        step = CompiledStep(make_train_step(squared_error, optimizer))
        run = Run.start(state)
        assert run.validated({}).validation.epoch == -1
        assert run.validated({"loss": 1.0}).validation_of_epoch == {}
        for epoch in range(2):
            run = step(run, DATA, 24)[0]
            assert run.validated({}).validation.epoch == epoch
            assert run.validated({"loss": 1.0}).validation_of_epoch == {"loss": 1.0}
            run = run.end_epoch()
            assert run.validated({}).validation.epoch == epoch
            assert run.validated({"loss": 1.0}).validation_of_epoch == {}
        # Outside an epoch that anybody counts the batches of, it is the current one.
        assert run.replace(position=None).validated({}).validation.epoch == 2

    def test_saved_and_loaded_it_is_equal(self, tmp_path):
        trainer = build(settings=config(log_frequency=1))
        trainer.train(DATA, 1, 4, DATA, val_interval=2)
        path = save_run(tmp_path / "run.msgpack", trainer.run, {"note": "mine"})
        run = load_run(path, build().run)
        assert_same_bits(run.state, trainer.state)
        assert (run.step, run.epoch, run.position, run.validation) == (
            6,
            1,
            trainer.run.position,
            trainer.run.validation,
        )
        assert run.history.to_dict() == trainer.history.to_dict()
        assert run.average.compute() == trainer.run.average.compute()


class TestOwnership:
    @pytest.mark.parametrize("extensions", [None, {"size": Counting}])
    @pytest.mark.few(1)
    def test_a_deleted_trainer_frees_its_arrays_at_once(self, extensions):
        made = None if extensions is None else {name: kind() for name, kind in extensions.items()}
        trainer = build(callbacks=[Callback()], extensions=made)
        trainer.train(DATA, 1, 4, DATA)
        trainer.train_step(DATA)
        trainer.state.check_alive()
        array = weakref.ref(trainer.run.leaves[0])
        gc.collect()
        gc.disable()
        try:
            del trainer
            assert array() is None
        finally:
            gc.enable()

    @pytest.mark.parametrize(
        "name",
        [
            "loss_fn",
            "callbacks",
            "extensions",
            "training_config",
            "train_data_loader",
            "logger",
            "checkpoint_dir",
            "step",
        ],
    )
    def test_what_was_captured_at_construction_is_read_only(self, name):
        trainer = build()
        with pytest.raises(AttributeError):
            setattr(trainer, name, None)

    @pytest.mark.parametrize("name", ["stop_training", "learning_rate", "train_data", "max_epochs"])
    def test_what_it_does_not_have_cannot_be_assigned(self, name):
        trainer = build()
        with pytest.raises(AttributeError, match=f"'Trainer' object has no attribute '{name}'"):
            setattr(trainer, name, True)

    def test_a_subclass_has_attributes_of_its_own(self):
        class Mine(Trainer):
            pass

        trainer = Mine(Busy(), config(), loss_fn=squared_error)
        trainer.mine = 3
        trainer.train_step(DATA)
        assert (trainer.mine, trainer.step) == (3, 1)

    def test_leaving_the_block_waits_for_saves_and_closes_the_loggers_that_it_made(self, tmp_path, monkeypatch):
        class Closing(Logger):
            closed = 0

            def close(self):
                self.closed += 1

        own, given = Closing(), Closing()
        monkeypatch.setattr("trainer.fit.assemble.WandbLogger", lambda project, name: own)
        with build(tmp_path, settings=config(use_wandb=True), logger=given) as trainer:
            trainer.train_step(DATA)
            path = trainer.save_checkpoint(background=True)
        assert path.exists()
        assert (own.closed, given.closed) == (1, 0)

    @pytest.mark.parametrize("resume", [None, 0, "", 1.5])
    def test_resume_must_be_a_bool_or_a_path(self, resume):
        trainer = build(train_data_loader=[DATA])
        with pytest.raises(ArgumentTypeError, match=r"`resume` is .*; it must be a bool, 'latest', or the path"):
            trainer.train(DATA, 1, 4, resume=resume)
        with pytest.raises(ArgumentTypeError, match="`resume` is"):
            trainer.train_epoch(resume=resume)


def test_the_length_of_a_history_hardly_matters_to_a_save(tmp_path):
    """Rows that were packed once are not packed again."""
    trainer = Trainer(Busy(), config(), loss_fn=squared_error, workdir=tmp_path)
    history = trainer.history.copy()
    for step in range(5000):
        history.record(step, {"loss": float(step)})
    count, pieces = history.packed()
    again, more = history.copy().packed()
    assert count == again == 5000
    assert sum(one is other for one, other in zip(pieces, more, strict=True)) >= len(pieces) - 1


class TestAssignedStates:
    """What the caller holds survives the steps after the assignment, which donate the state."""

    def pretrained(self):
        return Busy(rngs=nnx.Rngs(7))

    @pytest.mark.parametrize("mesh", [None, {"data": 8}], ids=["one device", "a mesh"])
    def test_arrays_of_the_caller_are_copied(self, mesh):
        trainer = build(**({} if mesh is None else {"mesh": make_mesh(mesh)}))
        trainer.train_step(DATA)
        given = nnx.to_pure_dict(nnx.state(self.pretrained(), nnx.Param))
        trainer.state = trainer.state.replace(params=given)
        for _ in range(2):
            trainer.train_step(DATA)
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(given))

    def test_two_trainers_do_not_share_a_state(self):
        one, other = build(), build()
        one.train_step(DATA)
        other.state = one.state
        other.train_step(DATA)
        one.train_step(DATA)
        assert_same_bits(one.state, other.state)

    @pytest.mark.parametrize(
        "optimizer",
        [optax.lbfgs(), optax.contrib.prodigy(), optax.chain(optax.adam(1e-2), ema_of_params(0.9))],
        ids=["lbfgs", "prodigy", "an average"],
    )
    def test_an_optimizer_state_that_shares_the_params(self, optimizer):
        trainer = Trainer(Busy(), config(), optimizer, loss_fn=squared_error)
        trainer.train_step(DATA)
        trainer.state = trainer.state.replace(opt_state=optimizer.init(trainer.state.params))
        for _ in range(2):
            trainer.train_step(DATA)
        assert trainer.step == 3

    def test_arrays_of_the_run_are_not_copied(self):
        trainer = build()
        leaves = trainer.run.leaves
        trainer.state = trainer.state.replace(step=4)
        kept = {id(leaf) for leaf in leaves} & {id(leaf) for leaf in trainer.run.leaves}
        assert len(kept) >= len(leaves) - 2  # the step is another, and a typed key is wrapped anew

    def test_a_donated_one_is_refused(self):
        one, other = build(), build()
        state = one.state
        one.train_step(DATA)
        with pytest.raises(StateError, match="`state` was donated"):
            other.state = state
