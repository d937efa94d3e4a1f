"""`nonfinite`: a step that is not finite is left out, or ends the run, without a wait for the device."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.problems import Busy, Linear, config, regression, squared_error
from tests.test_api import assert_same_bits
from trainer import (
    ArgumentError,
    Callback,
    NonFiniteError,
    ObjectiveError,
    Trainer,
    TrainState,
    check_finite,
    fuse_steps,
    load_state,
    make_mesh,
    make_train_step,
    save_state,
)

OPTIMIZER = optax.adam(0.01)


def spoiled_at(*steps):
    """The objective with a NaN in it before the updates of these numbers."""

    def loss_fn(model, batch, rng, step):
        loss, metrics = squared_error(model, batch, rng, step)
        return jnp.where(jnp.isin(step, jnp.array(steps)), jnp.nan, 1.0) * loss, metrics

    return loss_fn


def batches(count=6, size=8):
    return [regression(size, seed=seed) for seed in range(count)]


def created(policy, model=None):
    return TrainState.create(model or Busy(), OPTIMIZER, rng=jax.random.key(0), nonfinite=policy)


def advanced(policy, loss_fn, count=6):
    step = jax.jit(make_train_step(loss_fn, OPTIMIZER, nonfinite=policy))
    states, rows = [created(policy)], []
    for batch in batches(count):
        state, metrics = step(states[-1], batch)
        states.append(state)
        rows.append(metrics)
    return states, rows


def learned(state):
    return state.params, state.opt_state, state.model_state


def test_a_skipped_step_leaves_everything_but_the_count():
    states, rows = advanced("skip", spoiled_at(2, 4))
    assert [float(row["skipped"]) for row in rows] == [0, 0, 1, 0, 1, 0]
    for before, after in ((states[2], states[3]), (states[4], states[5])):
        assert_same_bits(learned(after), learned(before))
        assert after.step == before.step + 1
    assert [int(state.extensions["nonfinite"]["skipped"]) for state in states] == [0, 0, 0, 1, 1, 2, 2]
    assert states[-1].extensions["nonfinite"]["step"] == 5  # the latest
    assert bool(states[-1].is_finite())


@pytest.mark.slow
def test_of_finite_steps_it_changes_rounding_at_most():
    """XLA on the CPU fuses the larger program in another way, and rounds other products."""
    plain, _ = advanced("ignore", squared_error)
    for policy in ("skip", "raise"):
        guarded, _ = advanced(policy, squared_error)
        one, other = ((state.params, state.opt_state, state.model_state["norm"]) for state in (guarded[-1], plain[-1]))
        chex.assert_trees_all_close(one, other, rtol=1e-4, atol=1e-7)


def test_ignored_it_is_the_same_program_as_without():
    batch = regression(8)
    texts = {
        jax.jit(make_train_step(squared_error, OPTIMIZER, **options)).lower(created("ignore"), batch).as_text()
        for options in ({}, {"nonfinite": "ignore"})
    }
    assert len(texts) == 1


def test_after_a_raise_every_step_returns_the_state_of_before():
    states, rows = advanced("raise", spoiled_at(2))
    for state in states[3:]:
        assert_same_bits(learned(state), learned(states[2]))
        assert state.step == 2
    assert [float(row["skipped"]) for row in rows] == [0, 0, 1, 1, 1, 1]
    check_finite(states[2])
    with pytest.raises(NonFiniteError, match=r"step 3 is not finite: `loss`, `grads/inner/bias`") as caught:
        check_finite(states[-1])
    assert caught.value.step == 3
    assert "grads/outer/kernel" in caught.value.leaves
    assert not any(name.startswith("model_state") for name in caught.value.leaves)
    assert_same_bits(caught.value.state, states[2])
    step = jax.jit(make_train_step(squared_error, OPTIMIZER, nonfinite="raise"))
    after, metrics = step(caught.value.state, regression(8))
    assert (after.step, metrics["skipped"]) == (3, 0)


def test_an_update_or_a_statistic_that_overflows_is_found_too():
    huge = optax.scale(1e38)
    state = TrainState.create(Linear(4), huge, rng=jax.random.key(0), nonfinite="raise")
    step = jax.jit(make_train_step(lambda *given: (squared_error(*given)[0] * 1e3, {}), huge, nonfinite="raise"))
    with pytest.raises(NonFiniteError, match=r"step 1 is not finite: `params/layer/") as caught:
        check_finite(step(state, regression(8))[0])
    assert not any(name.startswith(("grads", "loss")) for name in caught.value.leaves)

    def statistics(model, batch, rng, step):
        model.norm.mean[...] = model.norm.mean[...] + jnp.inf
        return squared_error(model, batch, rng, step)

    step = jax.jit(make_train_step(statistics, OPTIMIZER, nonfinite="raise"))
    with pytest.raises(NonFiniteError, match=r"step 1 is not finite: `model_state/norm/mean` is NaN or infinite"):
        check_finite(step(created("raise"), regression(8))[0])


def test_fused_steps_are_single_ones():
    single, _ = advanced("skip", spoiled_at(2, 4))
    stacked = jax.tree.map(lambda *leaves: np.stack(leaves), *batches())
    step = make_train_step(spoiled_at(2, 4), OPTIMIZER, nonfinite="skip")
    state, metrics = jax.jit(fuse_steps(step, 6))(created("skip"), stacked)
    assert_same_bits(state, single[-1])
    assert metrics["skipped"].tolist() == [0, 0, 1, 0, 1, 0]


@pytest.mark.slow
def test_over_a_mapped_axis_all_devices_decide_alike():
    def loss_fn(model, batch, rng, step):
        loss, metrics = squared_error(model, batch, rng, step)
        return loss + batch["spoil"][0], metrics

    state = created("skip", Linear(4))
    step = make_train_step(loss_fn, OPTIMIZER, axis_name="data", nonfinite="skip")
    batch = {name: leaf.reshape(4, 2, *leaf.shape[1:]) for name, leaf in regression(8).items()}
    batch["spoil"] = np.array([[0.0] * 2, [np.nan] * 2, [0.0] * 2, [0.0] * 2], np.float32)
    states, metrics = jax.jit(jax.vmap(step, in_axes=(None, 0), axis_name="data"))(state, batch)
    assert metrics["skipped"].tolist() == [1] * 4
    for index in range(4):
        assert_same_bits(jax.tree.map(lambda leaf, i=index: leaf[i], learned(states)), learned(state))


@pytest.mark.slow
def test_members_of_an_ensemble_decide_for_themselves():
    def loss_fn(model, batch, rng, step):
        loss, metrics = squared_error(model, batch["data"], rng, step)
        return loss + batch["spoil"], metrics

    create = jax.vmap(lambda key: TrainState.create(Linear(4), OPTIMIZER, rng=key, nonfinite="skip"))
    states = create(jax.random.split(jax.random.key(0), 3))
    batch = {"data": regression(8), "spoil": jnp.array([0.0, jnp.nan, 0.0])}
    step = jax.vmap(make_train_step(loss_fn, OPTIMIZER, nonfinite="skip"), in_axes=(0, {"data": None, "spoil": 0}))
    _, metrics = jax.jit(step)(states, batch)
    assert metrics["skipped"].tolist() == [0, 1, 0]


def build(tmp_path, policy, loss_fn, **options):
    options = {"workdir": tmp_path / "files", "rng": jax.random.key(0), **options}
    return Trainer(Busy(), config(log_frequency=1), OPTIMIZER, loss_fn=loss_fn, nonfinite=policy, **options)


@pytest.mark.parametrize("steps_per_call", [1, "auto"])
class TestTrainer:
    @pytest.mark.few(1)
    def test_averages_leave_skipped_steps_out(self, steps_per_call, tmp_path):
        trainer = build(tmp_path, "skip", spoiled_at(2), steps_per_call=steps_per_call)
        averages = trainer.train(regression(40), 1, 8)
        assert averages["skipped"] == 1
        losses = [loss for loss in trainer.history.series("loss")[1] if not np.isnan(loss)]
        assert len(losses) == 4
        assert averages["loss"] == pytest.approx(np.mean(losses))

    @pytest.mark.parametrize("epochs", [1, 3])
    @pytest.mark.few(1)
    def test_a_raise_names_the_step_and_holds_the_state_of_before(self, epochs, steps_per_call, tmp_path):
        trainer = build(tmp_path, "raise", spoiled_at(3), steps_per_call=steps_per_call)
        with pytest.raises(NonFiniteError, match="step 4 is not finite: `loss`"):
            trainer.train(regression(40), epochs, 8)
        kept = []

        class Keep(Callback):
            def on_batch_end(self, trainer, step, logs):
                if step == 3:
                    kept.append(trainer.state.copy())

        good = build(tmp_path / "good", "raise", squared_error, callbacks=[Keep()])
        good.train(regression(40), 1, 8)
        assert (trainer.step, int(trainer.state.step)) == (3, 3)
        assert_same_bits(learned(trainer.state), learned(kept[0]))
        assert max(trainer.history.series("loss")[0]) == 3
        check_finite(trainer.state)

    @pytest.mark.few(1)
    def test_nothing_of_later_steps_is_saved_or_validated(self, steps_per_call, tmp_path):
        options = {"save_interval": 2, "steps_per_call": steps_per_call}
        trainer = build(tmp_path, "raise", spoiled_at(2), **options)
        with pytest.raises(NonFiniteError, match="step 3 is not finite"):
            trainer.train(regression(40), 1, 8, regression(8), val_interval=4)
        assert [path.name for path in (tmp_path / "files").glob("checkpoint*")] == ["checkpoint_2.msgpack"]
        assert trainer.val_metrics == []


def test_a_callback_that_saves_after_the_bad_step_hears_of_it(tmp_path):
    class Saving(Callback):
        def on_batch_end(self, trainer, step, logs):
            if step == 4:
                trainer.save_checkpoint()

    trainer = build(tmp_path, "raise", spoiled_at(2), callbacks=[Saving()])
    with pytest.raises(NonFiniteError, match="step 3 is not finite"):
        trainer.train(regression(40), 1, 8)
    assert trainer.step == 2


@pytest.mark.slow
def test_on_a_mesh(tmp_path):
    mesh = make_mesh({"data": 4, "fsdp": 2})
    trainer = build(tmp_path, "skip", spoiled_at(2), mesh=mesh)
    plain = build(tmp_path / "plain", "skip", spoiled_at(2))
    averages, wanted = (one.train(regression(64), 1, 8) for one in (trainer, plain))
    assert averages == pytest.approx(wanted, rel=1e-5)
    assert trainer.state.extensions["nonfinite"]["skipped"] == 1


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 4, "fsdp": 2}])
@pytest.mark.parametrize("accumulate_steps", [1, 2])
@pytest.mark.few(2)
def test_on_a_mesh_a_skipped_step_leaves_every_bit(axes, accumulate_steps, tmp_path):
    """NaN comes from one row, so from one device and one micro-batch."""
    options = {"mesh": make_mesh(axes), "accumulate_steps": accumulate_steps}
    trainer = build(tmp_path, "skip", squared_error, **options)
    spoiled = regression(16)
    spoiled["target"][5] = np.nan
    trainer.train_step(regression(16))
    before = jax.device_get(learned(trainer.state))
    assert trainer.train_step(spoiled)["skipped"] == 1
    assert_same_bits(jax.device_get(learned(trainer.state)), before)
    assert (trainer.step, int(trainer.state.step)) == (2, 2)
    assert trainer.train_step(regression(16))["skipped"] == 0
    after = jax.device_get(learned(trainer.state))
    assert any(np.any(one != other) for one, other in zip(*map(jax.tree.leaves, (after, before)), strict=True))


@pytest.mark.parametrize("axes", [{"data": 8}, {"data": 4, "fsdp": 2}])
@pytest.mark.few(1)
def test_on_a_mesh_a_raise_holds_the_state_of_before(axes, tmp_path):
    states = []
    for mesh in (make_mesh(axes), None):
        trainer = build(tmp_path / str(mesh), "raise", spoiled_at(2), mesh=mesh)
        with pytest.raises(NonFiniteError, match="step 3 is not finite: `loss`"):
            trainer.train(regression(64), 1, 8)
        assert trainer.step == 2
        # Before a BatchNorm a bias has no gradient but rounding, which Adam scales up.
        states.append(jax.device_get((trainer.state.params["outer"], trainer.state.model_state["norm"]["var"])))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5), *states)


class Stops(Callback):
    """Keeps the number of finished steps before each step, and stops the run at one of them."""

    def __init__(self, at=None):
        self.at, self.steps = at, []

    def on_batch_begin(self, trainer, step):
        if step == self.at:
            raise KeyboardInterrupt
        self.steps.append(step)


def cut_at_five(directory, policy, loss_fn):
    """Stops a run after step 5, and returns a new trainer for it, and what will keep the steps that it resumes with."""
    with pytest.raises(KeyboardInterrupt):
        build(directory, policy, loss_fn, callbacks=[Stops(5)], save_interval=2).train(regression(40), 2, 8)
    saved = sorted(path.name for path in (directory / "files").glob("checkpoint*"))
    assert saved == ["checkpoint_2.msgpack", "checkpoint_4.msgpack"]
    seen = Stops()
    return build(directory, policy, loss_fn, callbacks=[seen], save_interval=2), seen


def test_a_resumed_run_raises_at_the_same_step_with_the_same_state(tmp_path):
    whole = build(tmp_path / "whole", "raise", spoiled_at(6), callbacks=[Stops()])
    with pytest.raises(NonFiniteError, match="step 7 is not finite"):
        whole.train(regression(40), 2, 8)
    resumed, seen = cut_at_five(tmp_path / "cut", "raise", spoiled_at(6))
    with pytest.raises(NonFiniteError, match="step 7 is not finite"):
        resumed.train(regression(40), 2, 8, resume=True)
    assert seen.steps[0] == 4
    assert_same_bits(resumed.state, whole.state)


@pytest.mark.slow
def test_an_interrupted_run_goes_on_to_the_same_bits(tmp_path):
    whole = build(tmp_path / "whole", "skip", spoiled_at(2, 6), callbacks=[Stops()])
    whole.train(regression(40), 2, 8)
    resumed, seen = cut_at_five(tmp_path / "cut", "skip", spoiled_at(2, 6))
    resumed.train(regression(40), 2, 8, resume=True)
    assert seen.steps[0] == 4
    assert_same_bits(resumed.state, whole.state)
    assert resumed.state.extensions["nonfinite"]["skipped"] == 2


@pytest.mark.parametrize("name", ["state.msgpack", "state.orbax", "state.pkl"])
def test_a_guard_is_switched_on_and_off_between_runs(name, tmp_path):
    plain = created("ignore")
    save_state(tmp_path / name, plain)
    loaded = load_state(tmp_path / name, like=created("skip"))
    assert_same_bits(loaded.params, plain.params)
    assert loaded.extensions["nonfinite"]["skipped"] == 0
    if name != "state.pkl":  # that layout has no place for it
        save_state(tmp_path / f"guarded {name}", loaded)
        assert load_state(tmp_path / f"guarded {name}", like=plain).extensions == {}


class TestRefusals:
    def test_another_policy(self, tmp_path):
        for make in (
            lambda: make_train_step(squared_error, OPTIMIZER, nonfinite="stop"),
            lambda: created("stop"),
            lambda: build(tmp_path, "stop", squared_error),
        ):
            with pytest.raises(ArgumentError, match="`nonfinite` is 'stop'; it must be 'ignore', 'skip' or 'raise'"):
                make()

    def test_a_state_without_a_record(self):
        step = make_train_step(squared_error, OPTIMIZER, nonfinite="skip")
        with pytest.raises(ArgumentError, match="`nonfinite` = 'skip' needs a record in the state; pass it to TrainSt"):
            step(created("ignore"), regression(8))

    def test_names_that_are_taken(self):
        def loss_fn(model, batch, rng, step):
            return squared_error(model, batch, rng, step)[0], {"skipped": 1.0}

        with pytest.raises(ObjectiveError, match="a metric `skipped`, which is the name under which `nonfinite`"):
            make_train_step(loss_fn, OPTIMIZER, nonfinite="skip")(created("skip"), regression(8))
