"""The learning rate where a metric no longer improves, and the rate as a metric."""

import jax
import numpy as np
import optax
import pytest

from tests.problems import Busy, Linear, config, regression, squared_error
from trainer import (
    ArgumentError,
    Callback,
    LearningRateMonitor,
    ReduceLROnPlateau,
    Trainer,
    averaged_params,
    ema_of_params,
)

RATE = 1e-2


class Scores(Callback):
    """Replaces the loss of each validation by a score, before the callbacks behind it hear of it."""

    def __init__(self, *scores):
        self.scores = list(scores)

    def on_validation_end(self, trainer, logs):
        logs["loss"] = self.scores.pop(0) if self.scores else 1.0


def trained(callbacks, epochs, tmp_path=None, *, optimizer=None, **options):
    trainer = Trainer(Linear(4), config(), optimizer, loss_fn=squared_error, callbacks=callbacks, **options)
    trainer.train(regression(16), epochs, 8, val_data=regression(8))
    return trainer


def rates(trainer):
    """The rate in force in each epoch of two steps."""
    return trainer.history.series("learning_rate")[1][::2]


class TestReduceLROnPlateau:
    def test_it_follows_the_rule_of_optax(self):
        scores = [3.0, 2.0, 2.0, 2.0, 2.0, 1.0, 1.0, 1.0]
        callbacks = [Scores(*scores), ReduceLROnPlateau(patience=2, factor=0.5), LearningRateMonitor()]
        trainer = trained(callbacks, len(scores) + 1)
        rule = optax.contrib.reduce_on_plateau(factor=0.5, patience=2, rtol=0.0, atol=1e-4)
        state, wanted = rule.init({}), [RATE]
        for score in scores:
            _, state = rule.update({}, state, value=score)
            wanted.append(RATE * float(state.scale))
        np.testing.assert_allclose(rates(trainer), wanted, rtol=1e-6)
        assert min(wanted) == pytest.approx(RATE / 4)

    def test_a_rate_set_by_hand_learns_the_same(self):
        scores = [1.0, 1.0, 1.0]
        reduced = trained([Scores(*scores), ReduceLROnPlateau(patience=1, factor=0.5)], 3, optimizer=optax.adamw(RATE))

        class Halve(Callback):
            def on_validation_end(self, trainer, logs):
                if trainer.step > 2:
                    trainer.set_learning_rate(trainer.opt_state.hyperparams["learning_rate"] / 2)

        by_hand = trained([Halve()], 3, optimizer=optax.inject_hyperparams(optax.adamw)(learning_rate=RATE))
        assert float(scale_of(reduced)) == 0.25
        for ours, theirs in zip(
            jax.tree.leaves(reduced.state.params), jax.tree.leaves(by_hand.state.params), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)

    def test_killed_and_resumed_it_goes_on(self, tmp_path):
        scores = [1.0] * 6

        class Stop(Callback):
            def on_epoch_begin(self, trainer, epoch):
                if epoch == 3:
                    raise RuntimeError("enough")

        def callbacks(*more):
            return [Scores(*scores), ReduceLROnPlateau(patience=2, factor=0.5), LearningRateMonitor(), *more]

        whole = trained(callbacks(), 6, workdir=tmp_path / "whole")
        with pytest.raises(RuntimeError, match="enough"):
            trained(callbacks(Stop()), 6, workdir=tmp_path / "own", save_interval=2)
        resumed = Trainer(
            Linear(4), config(), loss_fn=squared_error, callbacks=callbacks(), workdir=tmp_path / "own", save_interval=2
        )
        resumed.train(regression(16), 6, 8, val_data=regression(8), resume=True)
        jax.tree.map(np.testing.assert_array_equal, resumed.state.params, whole.state.params)
        assert rates(resumed) == rates(whole)
        assert rates(whole)[-1] < RATE

    @pytest.mark.parametrize(
        "options",
        [
            {"optimizer": optax.inject_hyperparams(optax.sgd)(learning_rate=RATE)},
            {"params_average": ema_of_params(0.9)},
            {"nonfinite": "skip"},
            {"steps_per_call": 1},
        ],
        ids=["given", "average", "guard", "single"],
    )
    def test_beside_other_parts(self, options):
        trainer = trained(
            [Scores(1.0, 1.0), ReduceLROnPlateau(patience=1, factor=0.1), LearningRateMonitor()], 3, **options
        )
        np.testing.assert_allclose(rates(trainer), [RATE, RATE, RATE / 10], rtol=1e-6)
        if "params_average" in options:
            assert averaged_params(trainer.opt_state, trainer.state.params) is not None

    def test_clipping_stands_before_it(self):
        trainer = Trainer(
            Linear(4),
            config(gradient_clip_norm=0.1),
            loss_fn=squared_error,
            callbacks=[Scores(1.0, 1.0), ReduceLROnPlateau(patience=1), LearningRateMonitor()],
            eval_params=lambda opt_state, params: params,
        )
        trainer.train(regression(16), 3, 8, val_data=regression(8))
        assert rates(trainer)[-1] == pytest.approx(RATE / 10)

    def test_the_rate_has_a_floor(self):
        scores = Scores(*[1.0] * 9)
        for floor in ({"min_lr": RATE / 5}, {"min_scale": 0.2}):
            callbacks = [Scores(*scores.scores), ReduceLROnPlateau(patience=1, **floor), LearningRateMonitor()]
            assert rates(trained(callbacks, 6))[-1] == pytest.approx(RATE / 5)

    def test_a_metric_of_training_and_the_largest(self):
        callbacks = [ReduceLROnPlateau("mean_error", mode="max", patience=1, min_delta=1e9), LearningRateMonitor()]
        assert rates(trained(callbacks, 3))[-1] < RATE

    def test_two_of_them(self):
        first, second = ReduceLROnPlateau(patience=1, factor=0.5), ReduceLROnPlateau("loss", patience=9)
        trainer = trained([Scores(1.0, 1.0), first, second, LearningRateMonitor()], 3)
        assert rates(trainer)[-1] == pytest.approx(RATE / 2)

    def test_a_loggers_text_says_so(self):
        said = []

        class Texts(Callback):
            log_scalar = log_scalars = log_image = log_histogram = log_hyperparams = close = lambda *args, **more: None

            def log_text(self, name, text, step=None):
                said.append((name, text, step))

        trained([Scores(1.0, 1.0), ReduceLROnPlateau(patience=1)], 2, logger=Texts())
        (one,) = [entry for entry in said if entry[0] == "learning_rate"]
        assert one[1] == "val_loss has not improved for 1 checks: the learning rate is 0.1 times what it was"
        assert one[2] == 4

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ({"factor": 1.0}, "`factor` is 1.0; it must be between 0 and 1"),
            ({"patience": 0}, "`patience`"),
            ({"cooldown": -1}, "`cooldown`"),
            ({"min_delta": -1.0}, "`min_delta`"),
            ({"min_lr": float("nan")}, "`min_lr`"),
            ({"mode": "least"}, "`mode`"),
        ],
    )
    def test_arguments_that_cannot_be_used(self, arguments, said):
        with pytest.raises(ArgumentError, match=said):
            ReduceLROnPlateau(**arguments)

    def test_added_after_the_trainer_was_made(self):
        trainer = Trainer(Linear(4), config(), loss_fn=squared_error)
        trainer.callbacks.add(ReduceLROnPlateau())
        with pytest.raises(ArgumentError, match="the Trainer is made with"):
            trainer.train(regression(16), 1, 8, val_data=regression(8))

    def test_with_a_step_of_the_callers(self):
        with pytest.raises(ArgumentError, match="`step_fn` applies by itself"):
            Trainer(
                Linear(4), config(), loss_fn=None, step_fn=lambda state, batch: (state, {}),
                callbacks=[ReduceLROnPlateau()],
            )  # fmt: skip

    def test_min_lr_beside_an_optimizer(self):
        with pytest.raises(ArgumentError, match="`min_scale`"):
            trained([ReduceLROnPlateau(min_lr=1e-5)], 1, optimizer=optax.sgd(RATE))


class TestLearningRateMonitor:
    def test_the_rate_of_every_step_beside_another_report(self):
        trainer = trained([LearningRateMonitor()], 2, report={"twice": lambda update: 2.0 * update.step})
        assert trainer.history.series("learning_rate")[1] == [pytest.approx(RATE)] * 4
        assert trainer.history.series("twice")[1] == [0, 2, 4, 6]

    def test_it_keeps_steps_fused(self):
        trainer = trained([LearningRateMonitor()], 2, steps_per_call=2)
        assert len(trainer.history.series("learning_rate")[1]) == 4

    def test_an_optimizer_that_keeps_no_rate(self):
        with pytest.raises(ArgumentError, match="inject_hyperparams"):
            trained([LearningRateMonitor()], 1, optimizer=optax.sgd(RATE))

    def test_the_scale_of_optax_in_the_step_counts(self):
        optimizer = optax.chain(
            optax.inject_hyperparams(optax.sgd)(learning_rate=RATE),
            optax.contrib.reduce_on_plateau(patience=1, atol=1e9),
        )
        trainer = Trainer(Busy(), config(), optimizer, loss_fn=squared_error, report=["learning_rate"])
        trainer.train(regression(32), 1, 8)
        assert trainer.history.series("learning_rate")[1][-1] < RATE


def scale_of(trainer):
    (scale,) = optax.tree_utils.tree_get_all_with_path(trainer.opt_state, "scale")
    return scale[1]
