"""Training mode and evaluation mode: of the model in a step, of its parts, and of `trainer.model`."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.fit.test_resume import StoppedError, Watching
from tests.problems import Busy, Linear, config, regression, squared_error
from tests.test_api import assert_same_bits, build
from trainer import Trainer, TrainState, make_eval_step, make_mesh, make_train_step

SGD = optax.sgd(0.1)


class Tuned(nnx.Module):
    """A backbone, and a head with a mode of its own."""

    def __init__(self, *, rngs=None):
        rngs = nnx.Rngs(0) if rngs is None else rngs
        self.backbone = Busy(rngs=rngs)
        self.norm = nnx.BatchNorm(1, rngs=rngs)

    def __call__(self, x):
        return self.norm(self.backbone(x)[:, None])[:, 0]


class Headed(nnx.Module):
    """A backbone in evaluation mode, and a head that has no mode."""

    def __init__(self, *, rngs=None):
        rngs = nnx.Rngs(0) if rngs is None else rngs
        self.backbone = Busy(rngs=rngs)
        self.head = nnx.Linear(1, 1, rngs=rngs)
        self.backbone.eval()

    def __call__(self, x):
        return self.head(self.backbone(x)[:, None])[:, 0]


def frozen():
    model = Tuned()
    model.backbone.eval()
    return model


def one_step(model, loss_fn=squared_error, **options):
    state = TrainState.create(model, SGD, rng=jax.random.key(0), **options)
    after, _ = make_train_step(loss_fn, SGD, **options)(state, regression())
    return state, after


def modes_in(step, model):
    """The modes that the objective finds in parts of the model."""
    found = {}

    def looking(model, batch, rng, step):
        for path, module in nnx.iter_modules(model):
            for name in ("deterministic", "use_running_average"):
                if hasattr(module, name):
                    found["/".join(map(str, path))] = getattr(module, name)
        return squared_error(model, batch, rng, step)

    state = TrainState.create(model, SGD, rng=jax.random.key(0))
    (make_train_step(looking, SGD) if step == "train" else make_eval_step(looking))(state, regression())
    return found


class TestTraining:
    def test_a_part_in_evaluation_mode_stays_in_it_and_the_others_are_trained(self):
        before, after = one_step(frozen())
        assert_same_bits(after.model_state["backbone"]["norm"], before.model_state["backbone"]["norm"])
        assert int(after.model_state["backbone"]["dropout"]["rngs"]["count"]) == 0
        assert not np.array_equal(after.model_state["norm"]["mean"], before.model_state["norm"]["mean"])

    def test_it_learns_what_a_loop_by_hand_does(self):
        model = frozen()
        _, after = one_step(model)
        grads = nnx.grad(lambda model: squared_error(model, regression(), None, None)[0])(model)
        by_hand = jax.tree.map(lambda p, g: p - 0.1 * g, nnx.state(model, nnx.Param), grads)
        for path, value in nnx.to_flat_state(by_hand):
            kept = after.params
            for key in path:
                kept = kept[key]
            np.testing.assert_allclose(kept, value[...], rtol=1e-5, atol=1e-7)

    def test_a_mode_of_one_kind_is_kept_alone(self):
        model = Busy()
        model.norm.eval()
        _, after = one_step(model)
        assert not np.any(after.model_state["norm"]["mean"])
        assert int(after.model_state["dropout"]["rngs"]["count"]) == 1

    def test_a_mode_that_is_left_open_is_training(self):
        model = Busy()
        model.dropout.deterministic = None
        assert modes_in("train", model) == {"norm": False, "dropout": False}
        assert modes_in("evaluate", model) == {"norm": True, "dropout": True}

    def test_the_caller_s_model_keeps_its_modes(self):
        model = frozen()
        one_step(model)
        assert [model.backbone.norm.use_running_average, model.norm.use_running_average] == [True, False]

    def test_extensions_see_the_same_modes(self):
        seen = []

        class Watching:
            weight = 1.0

            def is_enabled(self):
                return True

            def loss_fn(self, batch, model_outputs, *, model, **kwargs):
                seen.append((model.backbone.norm.use_running_average, model.norm.use_running_average))
                return jnp.mean(model_outputs**2)

        def silent(model, batch, rng, step):  # reports no outputs, so the model is called again for the extension
            return squared_error(model, batch, rng, step)[0], {}

        before, after = one_step_with(Watching(), silent)
        assert seen == [(True, False)]
        assert_same_bits(after.model_state["backbone"]["norm"], before.model_state["backbone"]["norm"])

    def test_fused_and_resumed_the_part_stays_too(self, tmp_path):
        data = regression()
        trainer = build(tmp_path, model=frozen(), steps_per_call=4, save_interval=3)
        before = jax.device_get(trainer.state.model_state["backbone"]["norm"])
        trainer.train(data, 2, 8)
        whole, cut = build(tmp_path / "whole", model=frozen(), callbacks=[Watching()]), tmp_path / "cut"
        whole.train(data, 2, 8)
        with pytest.raises(StoppedError):
            build(cut, model=frozen(), save_interval=3, callbacks=[Watching(7)]).train(data, 2, 8)
        assert (cut / "checkpoint_6.msgpack").exists()
        resumed = build(cut, model=frozen(), save_interval=3, callbacks=[Watching()])
        resumed.train(data, 2, 8, resume=True)
        assert_same_bits(resumed.state, whole.state)
        assert_same_bits(resumed.state.model_state["backbone"]["norm"], before)
        assert_same_bits(trainer.state.model_state["backbone"]["norm"], before)


def one_step_with(extension, loss_fn):
    extensions = {"watching": extension}
    state = TrainState.create(frozen(), SGD, rng=jax.random.key(0), extensions=extensions)
    return state, make_train_step(loss_fn, SGD, extensions=extensions)(state, regression())[0]


class TestEvaluation:
    def test_every_part_is_evaluated(self):
        assert modes_in("evaluate", frozen()) == {"backbone/norm": True, "backbone/dropout": True, "norm": True}

    def test_dropout_that_says_so_in_its_call_draws_nevertheless(self):
        class MonteCarlo(Linear):
            def __init__(self):
                super().__init__(features=4)
                self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(0))

            def __call__(self, x):
                return self.layer(self.dropout(x, deterministic=False))[:, 0]

        model, batch = MonteCarlo(), regression()
        state = TrainState.create(model, SGD, rng=jax.random.key(0))
        drawn = make_eval_step(squared_error)(state, batch)["loss"]
        assert drawn == squared_error(model, batch, None, None)[0]
        model.dropout.rate = 0.0
        assert drawn != squared_error(model, batch, None, None)[0]


class TestNames:
    @pytest.mark.parametrize("name", ["train", "eval"])
    def test_attributes_of_these_names_are_the_model_s_own(self, name):
        model = Busy()
        setattr(model, name, True)
        assert modes_in("train", model) == {"norm": False, "dropout": False}
        assert modes_in("evaluate", model) == {"norm": True, "dropout": True}

    def test_so_are_those_of_the_class(self):
        class Flagged(Busy):
            train = True
            eval = False

        assert modes_in("train", Flagged()) == {"norm": False, "dropout": False}
        assert modes_in("evaluate", Flagged()) == {"norm": True, "dropout": True}

    def test_a_method_that_a_model_overrides_is_called(self):
        class Own(Busy):
            factor = 1.0

            def train(self, **attributes):
                super().train(**attributes)
                self.factor = 2.0

        factors = []

        def looking(model, batch, rng, step):
            factors.append(model.factor)
            return squared_error(model, batch, rng, step)

        one_step(Own(), looking)
        assert factors == [2.0]


class TestAsAWhole:
    MESSAGE = r"`model` is in evaluation mode as a whole \(`{}`\) and stays in it .* call model.train\(\) before"

    def test_it_stays_and_the_trainer_says_so(self, tmp_path):
        model = Busy()
        model.eval()
        with pytest.warns(UserWarning, match=self.MESSAGE.format("dropout`, `norm")) as warned:
            trainer = build(tmp_path, model=model)
        assert warned[0].filename.endswith("test_api.py")  # where the trainer was made
        trainer.train_step(regression())
        assert not np.any(trainer.state.model_state["norm"]["mean"])

    def test_over_a_mesh_where_the_model_is_made_sharded(self, tmp_path):
        def make(rngs):
            model = Busy(rngs=rngs)
            model.eval()
            return model

        with pytest.warns(UserWarning, match="in evaluation mode as a whole"):
            Trainer(make, config(), loss_fn=squared_error, workdir=tmp_path, mesh=make_mesh({"data": 8}))

    def test_the_module_itself_may_have_the_mode(self, tmp_path):
        model = Linear(features=4)
        model.deterministic = True
        with pytest.warns(UserWarning, match=self.MESSAGE.format("Linear")):
            build(tmp_path, model=model)

    def test_many_parts_are_not_all_listed(self, tmp_path):
        model = Linear(features=4)
        model.drops = nnx.List([nnx.Dropout(0.1, deterministic=True) for _ in range(7)])
        with pytest.warns(UserWarning, match=r"`drops/4`, …\)"):
            build(tmp_path, model=model)

    def test_nothing_is_said_of_a_part_that_is_not_trained(self, tmp_path):
        build(tmp_path, model=Headed(), wrt=nnx.All(nnx.Param, nnx.PathContains("head")))

    def test_but_of_one_that_is(self, tmp_path):
        with pytest.warns(UserWarning, match="backbone/dropout"):
            build(tmp_path, model=Headed())

    @pytest.mark.parametrize("model", [frozen, Busy, lambda: Linear(features=4)])
    def test_nothing_is_said_where_some_part_trains_or_none_has_a_mode(self, tmp_path, model):
        build(tmp_path, model=model())


class TestModelOfATrainer:
    def test_it_is_in_evaluation_mode_and_new_each_time(self, tmp_path):
        trainer, data = build(tmp_path), regression()
        trainer.train(data, 2, 8)
        model = trainer.model
        np.testing.assert_array_equal(model(data["input"]), model(data["input"]))
        error = squared_error(model, data, None, None)[0]
        np.testing.assert_allclose(error, trainer.evaluate(data, 64)["loss"], rtol=1e-5)
        model.train()
        assert trainer.model.dropout.deterministic
        trainer.train_step(data)  # and it trains on
        assert int(trainer.state.model_state["dropout"]["rngs"]["count"]) == 17

    def test_the_state_has_the_model_in_the_modes_that_it_came_with(self, tmp_path):
        trainer = build(tmp_path, model=frozen())
        model = trainer.state.model()
        assert [model.backbone.norm.use_running_average, model.norm.use_running_average] == [True, False]
        again = build(tmp_path, model=model)
        assert again.state.graphdef is trainer.state.graphdef
        with pytest.warns(UserWarning, match=r"pass `trainer.state.model\(\)` in place of `trainer.model`"):
            build(tmp_path, model=trainer.model)
