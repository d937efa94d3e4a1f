"""Habits from elsewhere, the reference and Keras among them: taken as they are meant, or answered in one sentence."""

import functools
import inspect
import pickle
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import yaml
from flax import nnx

from tests.problems import Busy, Linear, config, regression, squared_error
from tests.test_api import assert_same_bits
from trainer import (
    ArgumentError,
    ArgumentTypeError,
    Callback,
    Checkpointer,
    ConfigError,
    CSVLogger,
    FileLogger,
    MemoryProfiler,
    MetricsLogger,
    ModelCheckpoint,
    ObjectiveError,
    OptimizerConfig,
    SchedulerConfig,
    StateError,
    Trainer,
    TrainingConfig,
    latest_checkpoint,
    load_run,
    load_state,
    save_run,
    save_state,
)
from trainer.checkpoints.export import convert
from trainer.core.checks import check_count, did_you_mean

LABELS = {"name": "a", "description": "b", "tags": ["c"], "metadata": {"d": 1}}


def make(tmp_path, settings=None, optimizer=None, **options):
    options = {"loss_fn": squared_error, "workdir": tmp_path, **options}
    return Trainer(options.pop("model", None) or Linear(4), settings or config(), optimizer, **options)


class TestConfigurationsOfTheReference:
    plain = {
        **LABELS,
        "optimizer": {**LABELS, "optimizer_type": "adam", "learning_rate": 1e-3, "momentum": 0.0, "beta1": 0.9},
        "scheduler": {**LABELS, "scheduler_type": "none", "warmup_steps": 0, "milestones": []},
        "batch_size": 8,
        "num_epochs": 2,
        "checkpoint_dir": "checkpoints",
    }

    def test_labels_on_every_level_are_kept_and_written_back(self):
        read = TrainingConfig.from_dict(self.plain)
        for level in (read, read.optimizer, read.scheduler):
            assert (level.description, level.tags, level.metadata) == ("b", ("c",), {"d": 1})
        again = read.to_dict()
        assert {name: again["scheduler"][name] for name in LABELS} == LABELS
        assert TrainingConfig.from_dict(again) == read

    def test_labels_that_are_null_are_empty(self):
        none = dict.fromkeys(LABELS)
        read = OptimizerConfig.from_dict({**none, "optimizer_type": "adam", "learning_rate": 1e-3})
        assert (read.name, read.description, read.tags, read.metadata) == ("", "", (), {})

    def test_a_dump_with_tuples_and_paths_is_read_and_nothing_else_is_made(self, tmp_path):
        from pathlib import Path

        path = tmp_path / "c.yaml"
        path.write_text(yaml.dump({**self.plain, "tags": ("c", "e"), "checkpoint_dir": Path("/runs/one")}))
        assert "!!python/tuple" in path.read_text()
        read = TrainingConfig.from_yaml(path)
        assert (read.tags, str(read.checkpoint_dir)) == (("c", "e"), "/runs/one")
        path.write_text("name: !!python/object/apply:os.getcwd []\n")
        with pytest.raises(yaml.constructor.ConstructorError):
            TrainingConfig.from_yaml(path)

    def test_a_schedule_that_is_switched_off_says_what_does_nothing(self):
        with pytest.warns(UserWarning, match="SchedulerConfig") as warned:
            off = SchedulerConfig(scheduler_type="none", warmup_steps=5, power=2.0, gamma=0.1)
        assert [str(one.message) for one in warned] == [
            "`SchedulerConfig.warmup_steps` (5), `SchedulerConfig.power` (2.0) do nothing, because `scheduler_type` is "
            "'none'."
        ]
        assert warned[0].filename == __file__
        assert off.warmup_steps == 5
        with pytest.raises(ConfigError, match="remove it, or choose one that does: multistep"):
            SchedulerConfig(scheduler_type="cosine", milestones=(5,))

    def test_none_trains_at_a_constant_rate(self, tmp_path):
        trained = []
        for scheduler in ({"scheduler_type": "none"}, None):
            settings = TrainingConfig.from_dict(
                {"optimizer": {"optimizer_type": "sgd", "learning_rate": 0.1}, "scheduler": scheduler}
            )
            trainer = make(tmp_path / str(len(trained)), settings)
            trainer.train(regression(), 1, 16)
            trained.append(np.asarray(trainer.state.params["layer"]["kernel"]))
        np.testing.assert_array_equal(*trained)


class Hooks:
    """An extension of the reference that has hooks alone."""

    def __init__(self):
        self.epochs = 0

    def is_enabled(self):
        return True

    def on_epoch_end(self, trainer, epoch, logs):
        self.epochs += 1


class TestExtensionsOfTheReference:
    def test_hooks_alone_are_enough(self, tmp_path):
        hooks = Hooks()
        trainer = make(tmp_path, extensions={"hooks": hooks})
        trainer.train(regression(), 2, 16)
        assert hooks.epochs == 2
        assert trainer.extensions == {"hooks": hooks}
        assert trainer.state.extensions == {}
        assert "hooks_loss" not in trainer.history[-1]
        # It leaves no trace in a checkpoint, so one without it fits.
        make(tmp_path).load_checkpoint(trainer.save_checkpoint(tmp_path / "a.msgpack"))

    def test_a_loss_under_another_name_is_no_hook(self, tmp_path):
        class Misspelt(Hooks):
            def loss_func(self, batch, outputs):
                return 0.0

        with pytest.raises(ArgumentTypeError, match=r"has no weight, no loss_fn\(batch, model_outputs, \*\*kwargs\)"):
            make(tmp_path, extensions={"a": Misspelt()})

    @pytest.mark.parametrize(
        "loss_fn",
        [
            lambda batch, model_outputs: jnp.mean(model_outputs**2),
            lambda batch, outputs, step: jnp.mean(outputs**2) + 0 * step,
            lambda batch, outputs, *, model: jnp.mean(outputs**2) + 0 * model.outer.bias.sum(),
            lambda data, model: jnp.mean(model**2),  # the second argument, whatever its name
            lambda batch, outputs, **kwargs: jnp.mean(outputs**2) + 0 * kwargs["step"],
        ],
    )
    @pytest.mark.few(2)
    def test_a_loss_gets_the_arguments_that_it_has(self, loss_fn, tmp_path):
        class Plain:
            weight = 0.5

            def is_enabled(self):
                return True

        Plain.loss_fn = staticmethod(loss_fn)
        trainer = make(tmp_path, model=Busy(), extensions={"plain": Plain()})
        metrics = trainer.train_step(regression())
        assert float(metrics["plain_loss"]) > 0

    def test_a_hook_may_draw_losses(self, tmp_path):
        class Drawing(Hooks):
            def plot_losses(self, path):
                raise NotImplementedError

        make(tmp_path, extensions={"a": Drawing()})


class TestAttributesOfTheReference:
    def test_workdir_and_metrics_by_kind(self, tmp_path):
        trainer = make(tmp_path, config(log_frequency=1))
        assert trainer.workdir == tmp_path
        assert (trainer.train_metrics, trainer.val_metrics) == ([], [])
        trainer.train(regression(), 2, 32, regression(32, seed=1))
        assert [row["step"] for row in trainer.train_metrics] == [1, 2, 3, 4]
        assert all({"step", "loss", "mean_error"} <= set(row) for row in trainer.train_metrics)
        assert not any(name.startswith("val_") for row in trainer.train_metrics for name in row)
        assert [row["step"] for row in trainer.val_metrics] == [2, 4]
        assert trainer.val_metrics[-1]["loss"] == trainer.history[-1]["val_loss"]
        assert make(tmp_path, workdir=None).workdir is None

    @pytest.mark.parametrize("dispatches", [True, False])
    def test_a_list_of_callbacks_of_its_own_class(self, dispatches, tmp_path):
        class Epochs(Callback):
            seen = 0

            def on_epoch_end(self, trainer, epoch, logs):
                self.seen += 1
                self.should_stop = self.seen == 2

        class Holding:
            def __init__(self, callbacks):
                self.callbacks = callbacks

        class Dispatching(Holding):
            def on_epoch_end(self, trainer, epoch, logs):
                for callback in self.callbacks:
                    callback.on_epoch_end(trainer, epoch, logs)

        first, later = Epochs(), Epochs()
        held = (Dispatching if dispatches else Holding)([first])
        trainer = make(tmp_path, callbacks=held)
        held.callbacks.append(later)
        trainer.train(regression(), 3, 32)
        assert (first.seen, later.seen) == (2, 2)

    def test_what_is_no_callback_in_such_a_list_is_refused(self, tmp_path):
        class Holding:
            callbacks = (3,)

        with pytest.raises(ArgumentTypeError, match=r"`callbacks\[0\]` is of type int, which is no callback"):
            make(tmp_path, callbacks=Holding())


def test_a_pickle_of_ours_needs_no_class_and_is_documented_as_no_continuation(tmp_path):

    trainer = make(tmp_path)
    held = pickle.loads(save_state(tmp_path / "a.pkl", trainer.state).read_bytes())
    assert type(held["opt_state"]) is tuple
    assert type(held["model_state"]["layer"]) is dict
    page = (Path(__file__).parent.parent / "docs" / "from-reference.md").read_text(encoding="utf-8")
    assert "The reference reads the weights of ours and does not continue the run" in page


class TestKeras:
    @pytest.mark.parametrize("as_array", [np.asarray, jnp.asarray])
    def test_arrays_by_position(self, as_array, tmp_path):
        data = regression()
        with pytest.raises(ArgumentTypeError) as raised:
            make(tmp_path).train(as_array(data["input"]), as_array(data["target"]), 1, 64)
        assert str(raised.value) == (
            "`num_epochs` is an array of shape (64,); it must be an integer of at least 0. All arrays of the data are "
            "one argument, the first: {'x': x, 'y': y}, or (x, y)."
        )

    def test_evaluate_says_the_same(self, tmp_path):
        data = regression()
        with pytest.raises(ArgumentTypeError, match=r"`batch_size` is an array of shape \(64,\); .* or \(x, y\)"):
            make(tmp_path).evaluate(data["input"], data["target"])

    def test_a_long_list_costs_a_short_message(self):
        with pytest.raises(ArgumentTypeError) as raised:
            check_count(list(range(10_000)), "num_epochs")
        assert len(str(raised.value)) < 150

    def test_an_array_without_dimensions_is_a_count(self):
        assert check_count(jnp.asarray(3), "n") == check_count(np.int64(3), "n") == 3


class TestNamesInAnotherCase:
    @pytest.mark.parametrize(
        ("name", "meant"),
        [("AdamW", "adamw"), ("Adam", "adam"), ("SGD", "sgd"), ("RMSProp", "rmsprop"), ("N-Adam", "nadam")],
    )
    def test_of_optimizers(self, name, meant):
        with pytest.raises(ConfigError, match=f"is '{name}'; did you mean '{meant}'"):
            OptimizerConfig(optimizer_type=name, learning_rate=1e-3)

    @pytest.mark.parametrize(
        ("name", "meant"), [("One-Cycle", "one_cycle"), ("OneCycle", "one_cycle"), ("COSINE", "cosine")]
    )
    def test_of_schedules(self, name, meant):
        with pytest.raises(ConfigError, match=f"is '{name}'; did you mean '{meant}'"):
            SchedulerConfig(scheduler_type=name)

    def test_of_fields(self):
        with pytest.raises(ConfigError, match=r"learningRate` is no field; did you mean 'learning_rate'"):
            OptimizerConfig.from_dict({"optimizer_type": "adam", "learning_rate": 1e-3, "learningRate": 1})

    def test_nothing_near_lists_all(self):
        assert did_you_mean("xyz", ["b", "a"]) == "known: a, b."


class TestSettingsThatDoNothing:
    def test_hyperparameters_beside_an_optimizer(self, tmp_path):
        settings = config(optimizer={"weight_decay": 0.1, "gradient_clip_norm": 1.0, "momentum": 0.0})
        with pytest.warns(UserWarning, match="training_config") as warned:
            make(tmp_path, settings, optax.sgd(0.1))
        assert [str(one.message) for one in warned] == [
            "in `training_config.optimizer` `weight_decay` (0.1), `gradient_clip_norm` (1.0) do nothing, because an "
            "`optimizer` was given, which has its own."
        ]

    def test_the_required_fields_beside_an_optimizer_are_no_settings(self, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            off = SchedulerConfig(scheduler_type="none")
            make(tmp_path, config(gradient_clip_norm=1.0, scheduler=off), optax.sgd(0.1))

    def test_arguments_of_train(self, tmp_path):
        settings = config(batch_size=8, num_epochs=7, save_frequency=5)
        with pytest.warns(UserWarning, match="training_config") as warned:
            make(tmp_path, settings).train(regression(), 1, 16)
        assert [str(one.message) for one in warned] == [
            "train() does not use of `training_config`: `num_epochs` = 7 (the argument of train() is 1), `batch_size` "
            "= 8 (the argument of train() is 16), `save_frequency` = 5 (`save_interval` of the Trainer is 1000)."
        ]

    def test_settings_that_agree_or_are_defaults_are_not_said(self, tmp_path):
        settings = config(batch_size=16, num_epochs=1, save_frequency=50)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make(tmp_path / "a", settings, save_interval=50).train(regression(), 1, 16)
            make(tmp_path / "b").train(regression(), 1, 16)

    def test_what_train_epoch_reads_is_not_said(self, tmp_path):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            make(tmp_path, config(batch_size=8), train_data_loader=[regression(8)]).train(regression(), 1, 16)


class TestIntervals:
    def test_none_is_never(self, tmp_path):
        trainer = make(tmp_path, save_interval=None)
        trainer.train(regression(32), 2, 8, regression(8), val_interval=None)
        assert trainer.history.series("val_loss")[0] == [4, 8]  # the ends of epochs
        assert [path.name for path in tmp_path.glob("*.msgpack")] == ["checkpoint_8.msgpack"]
        assert trainer.save_interval is None

    @pytest.mark.parametrize("value", [0, -1, 1.5])
    def test_zero_is_refused_with_what_to_pass(self, value, tmp_path):
        with pytest.raises(ArgumentError, match=r"`val_interval` is .* a positive integer, or None for never\."):
            make(tmp_path).train(regression(32), 1, 8, regression(8), value)


class TestNoEpochs:
    """As `fit(epochs=0)` of Keras, or a schedule of fine-tuning that begins with none."""

    @pytest.mark.parametrize("as_data", [dict, lambda data: [data]], ids=["in memory", "loader"])
    def test_nothing_is_trained_and_the_state_is_validated(self, as_data, tmp_path):
        scheduler = SchedulerConfig(scheduler_type="cosine")
        trainer = make(tmp_path, config(scheduler=scheduler))
        before = jax.device_get(trainer.state.params)
        assert trainer.train(as_data(regression(32)), 0, 8) == {}
        found = trainer.train(as_data(regression(32)), 0, 8, regression(16, seed=1))
        assert found == pytest.approx(trainer.evaluate(regression(16, seed=1), 8), rel=1e-6)
        assert (trainer.step, trainer.epoch) == (0, 0)
        jax.tree.map(np.testing.assert_array_equal, trainer.state.params, before)

    def test_a_run_that_is_resumed_later_trains_all_its_epochs(self, tmp_path):
        make(tmp_path).train(regression(32), 0, 8, resume=True)
        resumed, whole = make(tmp_path), make(tmp_path / "whole")
        assert resumed.train(regression(32), 2, 8, resume=True) == whole.train(regression(32), 2, 8)
        assert resumed.step == 8

    def test_a_state_from_elsewhere_leaves_no_row(self, tmp_path):
        trainer, logged = make(tmp_path), []
        trainer.train(regression(32), 1, 8)
        again = make(tmp_path / "b", log_callback=lambda step, metrics, prefix: logged.append(step))
        again.state = trainer.state
        again.train(regression(32), 0, 8)
        assert (len(again.history), logged) == (0, [])

    def test_after_a_run_its_averages_are_returned_again(self, tmp_path):
        trainer = make(tmp_path)
        assert trainer.train(regression(32), 1, 8) == trainer.train(regression(32), 0, 8)


class TestMetrics:
    def test_none_is_no_metrics(self, tmp_path):
        trainer = make(tmp_path, loss_fn=lambda *given: (squared_error(*given)[0], None))
        assert trainer.train(regression(32), 1, 8, regression(8)).keys() == {"loss"}

    def test_nested_ones_are_named_by_their_paths(self, tmp_path):
        def loss_fn(model, batch, rng, step):
            loss, metrics = squared_error(model, batch, rng, step)
            return loss, {"error": {"mean": metrics["mean_error"], "by weight": {"pair": (loss, 2.0)}}, "plain": 1.0}

        found = make(tmp_path, loss_fn=loss_fn).train(regression(32), 1, 8, regression(8))
        assert found.keys() == {"loss", "error/mean", "error/by weight/pair", "plain"}
        assert found["error/by weight/pair"] == pytest.approx(found["loss"])

    def test_two_of_one_path_are_refused(self, tmp_path):
        def loss_fn(model, batch, rng, step):
            return squared_error(model, batch, rng, step)[0], {"a/b": 1.0, "a": {"b": 2.0}}

        with pytest.raises(ObjectiveError, match="`loss_fn` returned two metrics `a/b`; rename one of them"):
            make(tmp_path, loss_fn=loss_fn).train(regression(32), 1, 8)


class TestObjectivesOfOtherArguments:
    @pytest.mark.parametrize(
        ("loss_fn", "described"),
        [
            (lambda model, batch: (0.0, {}), r"\(model, batch\)"),
            (lambda model, batch, *, rng, step: (0.0, {}), r"\(model, batch, \*, rng, step\)"),
            (lambda model, x, y, rng, step: (0.0, {}), r"\(model, x, y, rng, step\)"),
        ],
    )
    def test_they_are_told_when_the_trainer_is_made(self, loss_fn, described, tmp_path):
        with pytest.raises(ArgumentTypeError, match=f"`loss_fn` takes {described}, and is called as loss_fn"):
            make(tmp_path, loss_fn=loss_fn)

    def test_whatever_takes_four_is_taken(self, tmp_path):
        class Called:
            def __call__(self, model, batch, rng, step):
                return squared_error(model, batch, rng, step)

            def method(self, model, batch, rng, step, scale=1.0):
                return squared_error(model, batch, rng, step)

        def of_two(model, batch):
            return squared_error(model, batch, None, None)

        @functools.wraps(of_two)
        def adapted(model, batch, rng, step):
            return of_two(model, batch)

        plain = lambda *given: squared_error(*given)  # noqa: E731
        for loss_fn in (Called(), Called().method, plain, nnx.jit(squared_error), adapted):
            make(tmp_path, loss_fn=loss_fn).train_step(regression(8))


class TestColumnsInAList:
    def test_they_are_no_loader(self, tmp_path):
        data, trainer = regression(32), make(tmp_path)
        columns = [data["input"], data["target"]]
        for call in (
            lambda: trainer.train(columns, 1, 8),
            lambda: trainer.train(data, 1, 8, columns),
            lambda: trainer.predict(columns, 8),
            lambda: make(tmp_path, train_data_loader=columns),
        ):
            with pytest.raises(ArgumentTypeError, match=r"is a list of arrays of shapes \(32, 4\), \(32,\), and"):
                call()

    def test_evaluate_asks_which_of_the_two_a_list_of_arrays_is(self, tmp_path):
        trainer, inputs = (
            make(tmp_path, loss_fn=lambda *given: (jnp.mean(given[0](given[1])), {})),
            regression(8)["input"],
        )
        with pytest.raises(ArgumentTypeError, match="`data` is a list of 2 arrays of one length; pass a tuple if they"):
            trainer.evaluate([inputs, inputs], 4)
        assert trainer.evaluate(iter([inputs, inputs]), 4) == pytest.approx(trainer.evaluate(inputs, 4))

    def test_a_list_of_pairs_is_a_loader(self, tmp_path):
        data = regression(32)

        def loss_fn(model, batch, rng, step):
            return squared_error(model, {"input": batch[0], "target": batch[1]}, rng, step)

        trainer = make(tmp_path, loss_fn=loss_fn)
        pairs = [(data["input"][i : i + 8], data["target"][i : i + 8]) for i in range(0, 32, 8)]
        found = trainer.evaluate(pairs, 8)
        assert found == trainer.evaluate((data["input"], data["target"]), 8)
        trainer.train(pairs, 2, 8, pairs)
        assert trainer.step == 8

    def test_batches_that_are_arrays_are_one(self, tmp_path):
        rows = regression(32)["input"]

        def loss_fn(model, batch, rng, step):
            return jnp.mean(model(batch) ** 2), {}

        trainer = make(tmp_path, loss_fn=loss_fn)
        trainer.train([rows[:8], rows[8:16], rows[16:20]], 1, 8)
        assert trainer.step == 3

        def of_any_width(model, batch, rng, step):
            return jnp.mean(model(batch[:, :4]) ** 2), {}

        trainer = make(tmp_path / "widths", loss_fn=of_any_width)
        trainer.train([rows[:8], np.tile(rows[:8], 2)], 1, 8)
        assert trainer.step == 2


class TestPaths:
    def test_the_home_directory(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        trainer = make("~/runs/a", checkpoint_dir="~/saved", save_interval=None)
        trainer.train(regression(8), 1, 8)
        assert [path.name for path in (tmp_path / "saved").iterdir()] == ["checkpoint_1.msgpack"]
        assert (tmp_path / "runs" / "a" / "run.json").exists()
        assert make(None, config(checkpoint_dir="~/c")).checkpoint_dir == tmp_path / "c"
        assert make("a/b").workdir == "a/b"

    def test_the_home_directory_wherever_a_path_is_taken(self, tmp_path, monkeypatch):
        (tmp_path / "home").mkdir()
        (tmp_path / "here").mkdir()
        monkeypatch.setenv("HOME", str(tmp_path / "home"))
        monkeypatch.chdir(tmp_path / "here")
        loggers = [FileLogger("~/log.jsonl"), CSVLogger("~/table")]
        trainer = make(
            None,
            train_data_loader=[regression(8)],
            logger=loggers,
            callbacks=[ModelCheckpoint("~/best", monitor="loss"), MemoryProfiler("~/memory")],
        )
        trainer.train_epoch()
        trainer.train_epoch()
        trainer.save_checkpoint("~/a.msgpack")
        trainer.load_checkpoint("~/a.msgpack")
        state = trainer.state
        save_state("~/b.orbax", state)
        assert_same_bits(load_state("~/b.orbax", state), state)
        save_run("~/c.msgpack", trainer.run)
        assert load_run("~/c.msgpack", trainer.run).step == 2
        with Checkpointer("~/runs") as checkpoints:
            checkpoints.save(trainer.run)
        assert latest_checkpoint("~/runs") == tmp_path / "home" / "runs" / "checkpoint_2.msgpack"
        convert("~/a.msgpack", "~/a.npz")
        trainer.history.plot("~/curves.png")
        trainer.setup.config.to_yaml("~/config.yaml")
        assert TrainingConfig.from_yaml("~/config.yaml") == trainer.setup.config
        make(None, train_data_loader=[regression(8)]).train_epoch(resume="~/best/1")
        names = "a.msgpack a.npz b.orbax best c.msgpack config.yaml curves.png log.jsonl memory runs table"
        for logger in loggers:
            logger.close()
        found = sorted(path.name for path in (tmp_path / "home").iterdir())
        assert [name for name in found if name[0] != "."] == names.split()  # matplotlib keeps a cache there
        assert list((tmp_path / "here").iterdir()) == []

    def test_a_tilde_that_is_no_home_stays(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        save_state("~nobody-has-this-name.msgpack", make(None).state)
        save_state("a~.msgpack", make(None).state)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a~.msgpack", "~nobody-has-this-name.msgpack"]

    def test_the_directory_of_a_run_is_its_newest_checkpoint(self, tmp_path):
        data, (one, two) = regression(32), (tmp_path / "one", tmp_path / "two")
        trainer = make(one, save_interval=3)
        trainer.train(data, 1, 8)
        loaded = make(two)
        loaded.load_checkpoint(one)
        assert loaded.step == 4
        assert load_state(one, make(two).state).step == 4
        resumed, whole = make(two), make(tmp_path / "whole")
        assert resumed.train(data, 2, 8, resume=one) == whole.train(data, 2, 8)
        (one / "checkpoint_4.msgpack").write_bytes(b"damaged")
        with pytest.warns(UserWarning, match="checkpoint_4.msgpack"):
            loaded.load_checkpoint(one)
        assert loaded.step == 3


class TestNumbersInAState:
    def test_a_step_that_is_set_to_a_number(self, tmp_path):
        trainer = make(tmp_path)
        trainer.train(regression(32), 1, 8)
        trainer.state = trainer.state.replace(step=0)
        assert (trainer.step, trainer.state.step.dtype) == (0, jnp.int32)
        trainer.train(regression(32), 1, 8)
        assert trainer.step == 4

    def test_a_number_is_no_array(self, tmp_path):
        trainer = make(tmp_path)
        bias = next(iter(trainer.state.params["layer"]))
        with pytest.raises(StateError, match=r"`params/layer/bias` of float32\(1,\) was given the number 0\."):
            trainer.state = trainer.state.replace(params={"layer": {**trainer.state.params["layer"], bias: 0}})
        trainer.train_step(regression(8))


class TestDestinations:
    def test_a_log_callback_of_other_arguments_is_told_at_once(self, tmp_path):
        with pytest.raises(ArgumentTypeError, match=r"`log_callback` takes \(step, metrics\), and is called as"):
            make(tmp_path, log_callback=lambda step, metrics: None)

    def test_a_metrics_logger_may_have_some_of_the_methods(self, tmp_path):
        class Training:
            def __init__(self):
                self.steps = []

            def log_training_metrics(self, metrics, *, step):
                self.steps.append(step)

        logger = Training()
        make(tmp_path, metrics_logger=logger).train(regression(32), 1, 8, regression(8))
        assert logger.steps == [1, 4]

    @pytest.mark.parametrize(("given", "what"), [({}, "of type dict"), (MetricsLogger, "the class MetricsLogger")])
    def test_what_is_none_is_refused(self, given, what, tmp_path):
        with pytest.raises(ArgumentTypeError, match=f"`metrics_logger` is {what}; it must have methods of trainer"):
            make(tmp_path, metrics_logger=given)


@pytest.mark.parametrize("name", ["workdir", "checkpoint_dir"])
@pytest.mark.parametrize("given", [True, 3, b"runs/a"], ids=str)
def test_a_directory_that_is_no_path(name, given):
    with pytest.raises(
        ArgumentTypeError, match=f"`{name}` is {given!r} of type {type(given).__name__}; it must be a path"
    ):
        make(None, **{name: given}) if name != "workdir" else make(given)


def test_import_of_everything_brings_no_modules():
    names = {}
    exec("from trainer import *", names)
    assert not [name for name, value in names.items() if inspect.ismodule(value)]
    assert {"Trainer", "TrainingConfig", "EarlyStopping"} <= set(names)
