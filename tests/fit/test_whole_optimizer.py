"""An optimizer state that is assigned or brought along fits the optimizer of the trainer, or is refused by name."""

import jax
import numpy as np
import optax
import pytest
from optax import contrib

from tests.problems import Linear, config, regression
from tests.test_api import assert_same_bits, build
from trainer import ArgumentError, ReduceLROnPlateau, SchedulerConfig, StateError, ema_of_params, make_mesh

DATA = regression(24)

BESIDE = {
    "alone": {},
    "clipped": {"settings": config(gradient_clip_norm=0.5)},
    "averaged": {"params_average": ema_of_params(0.5)},
    "plateau": {"callbacks": [ReduceLROnPlateau("loss")]},
    "all": {
        "settings": config(gradient_clip_norm=0.5),
        "params_average": ema_of_params(0.5),
        "callbacks": [ReduceLROnPlateau("loss")],
    },
}


def linear(optimizer=None, model=None, **options):
    return build(model=Linear(features=4) if model is None else model, optimizer=optimizer, **options)


MAKERS = {
    "adam": optax.adam,
    "schedule_free": contrib.schedule_free_sgd,  # its initial state holds the params themselves
    "chain": lambda rate: optax.chain(optax.clip(1.0), optax.adam(rate)),
}


@pytest.mark.parametrize("beside", BESIDE)
@pytest.mark.parametrize("by", ["opt_state", "state"])
@pytest.mark.parametrize("name", MAKERS)
def test_the_callers_optimizer_starts_anew(name, by, beside):
    optimizer = MAKERS[name](0.1)
    trainer, other = linear(optimizer, **BESIDE[beside]), linear(optimizer, **BESIDE[beside])
    trainer.train(DATA, 1, 8)
    params = jax.tree.map(np.asarray, trainer.state.params)
    average = jax.tree.map(np.asarray, trainer.opt_state[1]) if beside == "averaged" else None
    if by == "opt_state":
        trainer.opt_state = optimizer.init(trainer.state.params)
    else:
        trainer.state = trainer.state.replace(opt_state=optimizer.init(trainer.state.params))
    assert trainer.step == 3
    own = trainer.setup.whole_optimizer.own_state
    jax.tree.map(np.testing.assert_array_equal, own(trainer.opt_state), optimizer.init(params))
    if beside == "averaged":
        jax.tree.map(np.testing.assert_array_equal, trainer.opt_state[1], average)  # it is no part of the optimizer
    assert jax.tree.structure(trainer.opt_state) == jax.tree.structure(other.opt_state)
    trainer.train(DATA, 1, 8)
    assert trainer.step == 6


def test_lookahead_starts_anew():
    optimizer = optax.lookahead(optax.adam(0.1), 2, 0.5)
    trainer = linear(optimizer)
    trainer.train(DATA, 1, 8)
    trainer.opt_state = optimizer.init(optax.LookaheadParams.init_synced(trainer.state.params))
    jax.tree.map(np.testing.assert_array_equal, trainer.opt_state.slow, trainer.state.params)
    trainer.train(DATA, 1, 8)


def test_the_configured_optimizer_starts_anew():
    settings = config(scheduler=SchedulerConfig(scheduler_type="cosine"), gradient_clip_norm=1.0)
    trainer, other = linear(settings=settings), linear(settings=settings)
    trainer.train(DATA, 1, 8)
    trainer.opt_state = trainer.optimizer.init(trainer.state.params)
    assert_same_bits(trainer.opt_state, other.opt_state)


def test_moments_are_set_to_zero_and_taken_from_numpy():
    trainer, other = linear(), linear()
    for each in (trainer, other):
        each.train(DATA, 1, 8)
    trainer.opt_state = jax.tree.map(np.asarray, trainer.opt_state)
    for each in (trainer, other):
        each.train(DATA, 1, 8)
    assert_same_bits(trainer.state, other.state)
    trainer.opt_state = jax.tree.map(lambda leaf: leaf * 0, trainer.opt_state)
    assert not any(leaf.any() for leaf in jax.tree.leaves(trainer.opt_state))
    trainer.train_step(DATA)


@pytest.mark.parametrize("after", BESIDE)
@pytest.mark.parametrize("before", ["alone", "clipped"])
def test_a_state_of_another_trainer_is_continued_with_what_the_new_one_adds(before, after):
    first = linear(optax.adam(0.1), **BESIDE[before])
    first.train(DATA, 1, 8)
    trainer = linear(optax.adam(0.1), first.state, **BESIDE[after])
    owns = (each.setup.whole_optimizer.own_state(each.opt_state) for each in (first, trainer))
    assert_same_bits(*owns)
    trainer.train(DATA, 1, 8)
    assert trainer.step == 6


def test_one_with_the_same_arrays_is_continued_as_from_a_checkpoint():
    first = linear(optax.adam(0.1))
    first.train(DATA, 1, 8)
    trainer = linear(optax.adamw(0.1, weight_decay=0.0), first.state)
    for each in (first, trainer):
        each.train_step(DATA)
    assert_same_bits(first.state.params, trainer.state.params)


OTHERS = {
    "momentum": (
        optax.sgd(0.1, momentum=0.9),
        r"it lacks `0/trace/layer/bias`, .*; it also holds `0/count`, .* and 2 more",
    ),
    "none": (optax.sgd(0.1), r"it also holds `0/count`, `0/mu/layer/bias`, `0/mu/layer/kernel` and 2 more"),
    "configured": (None, r"it lacks `1/count`. `trainer.optimizer.init\(state.params\)` starts it anew, and so does"),
}


@pytest.mark.parametrize("by", ["opt_state", "state", "Trainer"])
@pytest.mark.parametrize("name", OTHERS)
def test_that_of_another_optimizer_is_refused_by_name(name, by):
    optimizer, message = OTHERS[name]
    options = {"settings": config(scheduler=SchedulerConfig(scheduler_type="cosine"))} if optimizer is None else {}
    first = linear(optax.adam(0.1))
    first.train_step(DATA)
    trainer = linear(optimizer, **options)
    brings = {
        "opt_state": lambda: setattr(trainer, "opt_state", first.opt_state),
        "state": lambda: setattr(trainer, "state", trainer.state.replace(opt_state=first.opt_state)),
        "Trainer": lambda: linear(optimizer, first.state, **options).train_step(DATA),
    }
    with pytest.raises(ArgumentError, match=r"`opt_state` is not that of the optimizer of this trainer: " + message):
        brings[by]()


def score(model, batch):
    return model(batch["input"])


def foreign_to(optimizer, **options):
    """A trainer of an optimizer, made of a state of SGD; and the trainer that the state is from."""
    first = linear(optax.sgd(0.1, momentum=0.9))
    first.train_step(DATA)
    return linear(optimizer, first.state, **options), first


REFUSED = {
    "train": lambda trainer: trainer.train(DATA, 1, 8),
    "train_epoch": lambda trainer: trainer.train_epoch(),
    "train_step": lambda trainer: trainer.train_step(DATA),
    "compile": lambda trainer: trainer.compile(DATA),
    "find_learning_rate": lambda trainer: trainer.find_learning_rate(DATA, 8),
    "find_batch_size": lambda trainer: trainer.find_batch_size(DATA, high=2),
}


class TestAStateThatIsOnlyEvaluated:
    MESSAGE = (
        r"`opt_state` is not that of the optimizer of this trainer: it lacks .*init\(state.params\)` starts it anew"
    )

    @pytest.mark.parametrize("mesh", [0, 8], ids=["no mesh", "8 devices"])
    @pytest.mark.parametrize("make", [optax.adam, None], ids=["adam", "configured"])
    def test_needs_no_optimizer_of_its_own(self, make, mesh):
        scheduler = SchedulerConfig(scheduler_type="cosine") if make is None else None
        settings = config(scheduler=scheduler, gradient_clip_norm=1.0)
        options = {"settings": settings, "mesh": make_mesh({"data": mesh}) if mesh else None}
        trainer, first = foreign_to(make and make(0.1), **options)
        assert trainer.evaluate(DATA, 8) == pytest.approx(first.evaluate(DATA, 8), rel=1e-5)
        np.testing.assert_allclose(trainer.validate_step(DATA)["loss"], first.validate_step(DATA)["loss"], rtol=1e-5)
        np.testing.assert_allclose(trainer.predict(DATA, 8, score), first.predict(DATA, 8, score), rtol=1e-5)
        trainer.state = trainer.state.replace(params=jax.tree.map(lambda leaf: leaf * 0, trainer.state.params))
        assert not trainer.predict(DATA, 8, score).any()

    @pytest.mark.parametrize("use", REFUSED)
    def test_is_refused_before_it_is_trained_and_can_be_put_right(self, use, tmp_path):
        heard = []

        class Listener:
            def on_batch_begin(self, trainer, step):
                heard.append(step)

            def on_train_begin(self, trainer):
                heard.append("train")

        optimizer = optax.inject_hyperparams(optax.adam)(0.1)
        loader = [jax.tree.map(lambda leaf: leaf[:8], DATA)]
        options = {"callbacks": [Listener()], "train_data_loader": loader, "workdir": tmp_path / "run"}
        trainer, first = foreign_to(optimizer, **options)
        for _ in range(2):
            with pytest.raises(ArgumentError, match=self.MESSAGE):
                REFUSED[use](trainer)
        with pytest.raises(ArgumentError, match="is not that of the optimizer"):
            trainer.opt_state = optax.sgd(0.1).init(trainer.state.params)
        assert_same_bits(trainer.state, first.state)
        assert not heard
        assert not (tmp_path / "run").exists()
        trainer.opt_state = optimizer.init(trainer.state.params)
        REFUSED[use](trainer)
        if use == "train_step":
            other = linear(optimizer, first.state.replace(opt_state=optimizer.init(first.state.params)))
            other.train_step(DATA)
            assert_same_bits(trainer.state, other.state)

    def test_a_configured_optimizer_is_initialized_by_the_search_for_a_rate(self):
        trainer, first = foreign_to(None)
        own = linear(model=first.state.model())
        assert trainer.find_learning_rate(DATA, 8).losses[0] == own.find_learning_rate(DATA, 8).losses[0]

    def test_is_refused_at_once_where_an_evaluation_needs_it(self):
        with pytest.raises(ArgumentError, match=self.MESSAGE):
            foreign_to(optax.adam(0.1), params_average=ema_of_params(0.5))

    def test_an_average_in_it_is_evaluated(self):
        first = linear(optax.sgd(0.1), params_average=ema_of_params(0.5))
        first.train(DATA, 1, 8)
        trainer = linear(optax.adam(0.1), first.state, params_average=ema_of_params(0.5))
        assert (
            trainer.evaluate(DATA, 8) == first.evaluate(DATA, 8) != linear(model=first.state.model()).evaluate(DATA, 8)
        )


def test_another_shape_is_refused_by_name():
    trainer, wide = linear(), build(model=Linear(features=5))
    with pytest.raises(ArgumentError, match=r"another shape has `0/mu/layer/kernel`, \(5, 1\) and not \(4, 1\)"):
        trainer.opt_state = wide.opt_state


def test_an_assigned_state_that_was_donated_is_refused():
    trainer = linear()
    old = trainer.opt_state
    trainer.train_step(DATA)
    with pytest.raises(StateError, match="`state` was donated"):
        trainer.opt_state = old
