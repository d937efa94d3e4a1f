"""The Trainer: the same as the functional code it stands for, with everything around it in order."""

import inspect
from types import MappingProxyType

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from tests.problems import Busy, Counting, Linear, config, regression, squared_error
from trainer import (
    ArgumentError,
    ArgumentTypeError,
    BatchError,
    Callback,
    CallbackList,
    ConfigError,
    ExtensionConfig,
    InMemoryData,
    LambdaCallback,
    MetricsLogger,
    ObjectiveError,
    OptimizerConfig,
    SchedulerConfig,
    StateError,
    Trainer,
    TrainingConfig,
    TrainState,
    WeightedAverage,
    make_eval_step,
    make_train_step,
)
from trainer.loggers.base import Logger
from trainer.metrics.average import read


def build(tmp_path=None, *, model=None, optimizer=None, settings=None, **options):
    options.setdefault("loss_fn", squared_error)
    if tmp_path is not None:
        options.setdefault("workdir", tmp_path)
    return Trainer(Busy() if model is None else model, settings or config(), optimizer, **options)


def on_host(state):
    """The bits of a state, keys included."""
    to_words = lambda leaf: (  # noqa: E731
        np.asarray(jax.random.key_data(leaf)) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else np.asarray(leaf)
    )
    return jax.tree.map(to_words, state)


def assert_same_bits(one, other):
    chex.assert_trees_all_equal(jax.tree.leaves(on_host(one)), jax.tree.leaves(on_host(other)))


class Recorder(Callback):
    """Writes down every event but those of calls and compilations, with what came along."""

    def __init__(self, name="", events=None):
        self.name = name
        self.events = [] if events is None else events

    def __getattribute__(self, attribute):
        if not attribute.startswith("on_") or attribute in ("on_call_end", "on_compile_begin", "on_compile_end"):
            return super().__getattribute__(attribute)
        return lambda trainer, *about: self.events.append((self.name + attribute, *about))

    @property
    def names(self):
        return [event for event, *_ in self.events]


class TestReference:
    """A call that was written from the reference runs as it stands."""

    positional = ("model", "training_config", "optimizer", "train_data_loader", "val_data_loader", "workdir", "rng")
    by_keyword = ("loss_fn", "metrics_logger", "logger", "checkpoint_dir", "save_interval", "log_callback")
    reference = (*positional, *by_keyword, "callbacks", "extensions")

    def test_the_constructor(self):
        parameters = list(inspect.signature(Trainer).parameters.values())
        assert tuple(p.name for p in parameters[:15]) == self.reference
        kinds = [p.kind for p in parameters]
        assert kinds[:7] == [inspect.Parameter.POSITIONAL_OR_KEYWORD] * 7
        assert set(kinds[7:]) == {inspect.Parameter.KEYWORD_ONLY}
        defaults = {p.name: p.default for p in parameters[:15] if p.default is not inspect.Parameter.empty}
        assert defaults.pop("save_interval") == 1000
        assert set(defaults.values()) == {None}
        assert set(self.reference) - set(defaults) == {"model", "training_config", "loss_fn", "save_interval"}

    @pytest.mark.parametrize(
        ("method", "parameters"),
        [
            ("train_step", "(batch)"),
            ("validate_step", "(batch)"),
            ("train_epoch", "()"),
            ("train", "(train_data, num_epochs, batch_size, val_data=None, val_interval=100)"),
            ("evaluate", "(data, batch_size)"),
            ("save_checkpoint", "(path=None)"),
            ("load_checkpoint", "(path)"),
        ],
    )
    def test_the_methods(self, method, parameters):
        signature = inspect.signature(getattr(Trainer, method))
        parameters_of = list(signature.parameters.values())[1:]
        bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters_of if p.kind is not p.KEYWORD_ONLY]
        assert str(inspect.Signature(bare)) == parameters

    def test_the_default_key(self):
        np.testing.assert_array_equal(build().rng, jax.random.PRNGKey(0))


class TestFacade:
    def test_fifty_steps_equal_the_functional_loop_to_the_bit(self):
        extension = Counting(ExtensionConfig(weight=0.1))
        schedule = SchedulerConfig(scheduler_type="cosine", total_steps=50, warmup_steps=5)
        settings = config(scheduler=schedule, gradient_clip_norm=1.0, log_frequency=7)
        trainer = build(
            settings=settings, extensions={"size": extension}, callbacks=[Recorder()], rng=jax.random.key(3)
        )

        optimizer = trainer.optimizer
        state = TrainState.create(Busy(), optimizer, rng=jax.random.key(3), extensions={"size": extension})
        step = make_train_step(squared_error, optimizer, extensions={"size": extension})
        step = jax.jit(step, donate_argnums=0)

        for seed in range(50):
            batch = regression(16, seed=seed)
            facade = trainer.train_step(batch)
            state, metrics = step(state, batch)
            chex.assert_trees_all_equal(facade, metrics)
        assert_same_bits(trainer.state, state)

    def test_train_equals_the_loop_in_its_docstring(self):
        trainer = build(rng=jax.random.key(1))
        returned = trainer.train(regression(20), 3, 8)

        state = TrainState.create(Busy(), trainer.optimizer, rng=jax.random.key(1))
        step = jax.jit(make_train_step(squared_error, trainer.optimizer), donate_argnums=0)
        data, seed = InMemoryData(regression(20), 8), (0, 1)
        for epoch in range(3):
            average = WeightedAverage()
            for batch in data.shuffled(seed, epoch):
                state, metrics = step(state, batch)
                average.add(metrics, len(batch["target"]))
        assert_same_bits(trainer.state, state)
        assert returned == average.compute()

    def test_evaluate_and_validate_step_equal_the_functional_code(self):
        trainer, data = build(), regression(20)
        step = jax.jit(make_eval_step(squared_error))
        average = WeightedAverage()
        for index, batch in enumerate(InMemoryData(data, 8).in_order()):
            average.add(step(trainer.state, batch, index), len(batch["target"]))
        assert trainer.evaluate(data, 8) == average.compute()
        chex.assert_trees_all_equal(trainer.validate_step(data), step(trainer.state, data))

    def test_train_epoch_is_the_loop_over_its_loader(self):
        loader = [regression(8, seed=seed) for seed in range(4)]
        trainer, other = build(train_data_loader=loader), build()
        averages = trainer.train_epoch()
        metrics = [other.train_step(batch) for batch in loader]
        assert_same_bits(trainer.state, other.state)
        np.testing.assert_allclose(averages["loss"], np.mean([m["loss"] for m in metrics]), rtol=1e-6)

    def test_an_explicit_optimizer_is_used_and_clipped(self):
        trainer = build(model=Linear(features=4), optimizer=optax.sgd(1.0), settings=config(gradient_clip_norm=1e-3))
        before = trainer.state.copy().params
        trainer.train_step(regression())
        change = optax.tree.norm(jax.tree.map(jnp.subtract, trainer.state.params, before))
        np.testing.assert_allclose(change, 1e-3, rtol=1e-3)

    def test_wrt_selects_what_is_trained(self):
        trainer = build(wrt=nnx.All(nnx.Param, nnx.PathContains("outer")))
        inner = np.asarray(trainer.model.inner.kernel[...])
        trainer.train_step(regression())
        np.testing.assert_array_equal(trainer.model.inner.kernel[...], inner)

    def test_the_properties_are_those_of_the_state(self):
        trainer = build()
        trainer.train_step(regression())
        assert trainer.step == int(trainer.state.step) == 1
        assert trainer.opt_state is trainer.state.opt_state
        assert trainer.rng is trainer.state.rng

    def test_a_model_that_was_asked_for_outlives_further_steps(self):
        trainer = build()
        model = trainer.model
        trainer.train_step(regression())
        assert np.isfinite(model(regression()["input"])).all()

    def test_the_callers_model_data_and_key_stay_as_they_were(self):
        model, data, key = Busy(), regression(20), jax.random.key(0)
        kernel, copies = np.asarray(model.inner.kernel[...]), jax.tree.map(np.copy, data)
        on_device = jax.tree.map(jnp.asarray, data)
        build(model=model, rng=key).train(data, 2, 8)
        build(model=model, rng=key).train(on_device, 2, 8)
        np.testing.assert_array_equal(model.inner.kernel[...], kernel)
        assert int(model.calls[...]) == 0
        chex.assert_trees_all_equal(data, copies)
        chex.assert_trees_all_equal(jax.tree.map(np.asarray, on_device), copies)
        assert not key.is_deleted()

    def test_assigning_a_state_continues_from_it(self):
        trainer = build()
        kept = trainer.state.copy()
        trainer.train_step(regression())
        trainer.state = kept
        assert trainer.step == 0
        with pytest.raises(ArgumentTypeError, match=r"`state` is of type dict; it must be a trainer.TrainState"):
            trainer.state = {}


class TestDeterminism:
    def test_one_seed_one_result(self):
        runs = [build(rng=jax.random.PRNGKey(7)) for _ in range(2)]
        for trainer in runs:
            trainer.train(regression(20), 3, 8)
        assert_same_bits(runs[0].state, runs[1].state)
        other = build(rng=jax.random.PRNGKey(8))
        other.train(regression(20), 3, 8)
        assert not np.array_equal(other.state.params["outer"]["kernel"], runs[0].state.params["outer"]["kernel"])

    def test_watching_changes_nothing(self, tmp_path):
        alone, watched = (
            build(),
            build(
                tmp_path,
                settings=config(log_frequency=1),
                callbacks=[Recorder()],
                log_callback=lambda *_, **__: None,
                save_interval=2,
            ),
        )
        alone.train(regression(20), 3, 8)
        watched.train(regression(20), 3, 8, regression(10, seed=1), val_interval=1)
        assert_same_bits(alone.state, watched.state)

    def test_a_second_run_goes_on_where_the_first_ended(self):
        once, twice = build(), build()
        once.train(regression(20), 4, 8)
        twice.train(regression(20), 3, 8)
        twice.train(regression(20), 1, 8)
        assert_same_bits(once.state, twice.state)


class TestCompilation:
    def test_a_run_compiles_each_step_once_for_each_shape(self, compilations, tmp_path):
        trainer = build(tmp_path)
        trainer.train(regression(16), 3, 8, regression(8), val_interval=2)
        assert compilations["jit(train_steps)"] == compilations["jit(eval_step)"] == 1
        trainer.load_checkpoint(trainer.save_checkpoint())
        trainer.train(regression(16), 1, 8, regression(8))
        trainer.evaluate(regression(16), 8)
        assert compilations["jit(train_steps)"] == compilations["jit(eval_step)"] == 1
        assert "jit(train_step)" not in compilations
        trainer.train(regression(19), 3, 8, regression(11), val_interval=2)
        assert compilations["jit(train_steps)"] == compilations["jit(train_step)"] == 1
        assert compilations["jit(eval_step)"] == 2

    def test_it_is_traced_once_for_both(self):
        traces = []

        def objective(model, batch, rng, step):
            traces.append(batch["input"].shape)
            return squared_error(model, batch, rng, step)

        trainer = build(loss_fn=objective)
        trainer.train(regression(24), 2, 8)
        trainer.train_step(regression(8))
        assert traces == [(8, 4)]

    def test_weights_and_python_attributes_of_an_extension_compile_nothing(self, compilations):
        extension = Counting()
        trainer = build(extensions={"size": extension})
        losses = []
        for weight in (1.0, 0.5, 0.25, 0.25):
            extension.weight = weight
            losses.append(float(trainer.train_step(regression())["size_loss"]))
        assert compilations["jit(train_step)"] == 1
        assert extension.batches == 4
        assert extension.seen == [1, 2, 3, 4]
        assert losses[1] < 0.75 * losses[0]

    def test_switching_an_extension_compiles_once_for_each_setting(self, compilations):
        extension = Counting()
        trainer = build(extensions={"size": extension})
        for enabled in (True, False, True, False):
            extension.enabled = enabled
            assert ("size_loss" in trainer.train_step(regression())) is enabled
        assert compilations["jit(train_step)"] == 2


class TestData:
    @pytest.mark.parametrize(("examples", "batch_size"), [(24, 8), (20, 8), (5, 8), (8, 8), (7, 1)])
    @pytest.mark.filterwarnings("ignore:`batch_size` is 8")
    @pytest.mark.few(2)
    def test_an_epoch_is_a_permutation(self, examples, batch_size):
        seen = []

        class Watching(Trainer):
            def train_step(self, batch):
                seen.append(batch["id"])
                return super().train_step(batch)

        trainer = Watching(Busy(), config(), loss_fn=squared_error)
        trainer.train({**regression(examples), "id": np.arange(examples)}, 3, batch_size)
        orders = np.concatenate(seen).reshape(3, examples)
        for order in orders:
            assert sorted(order) == list(range(examples))
        assert examples < 6 or not (orders[0] == orders[1]).all()

    def test_evaluation_weighs_by_example(self):
        trainer, data = build(model=Linear(features=4)), regression(10)
        whole, _ = squared_error(trainer.model, data, None, None)
        np.testing.assert_allclose(trainer.evaluate(data, 4)["loss"], whole, rtol=1e-6)

    def test_evaluation_weighs_by_what_the_objective_reports(self):
        def masked(model, batch, rng, step):
            weight = batch["mask"].sum()
            return ((model(batch["input"]) - batch["target"]) ** 2 * batch["mask"]).sum() / weight, {
                "batch_weight": weight
            }

        data = {**regression(10), "mask": np.linspace(0.1, 2, 10, dtype=np.float32)}
        trainer = build(model=Linear(features=4), loss_fn=masked)
        averages = trainer.evaluate(data, 4)
        np.testing.assert_allclose(averages["loss"], masked(trainer.model, data, None, None)[0], rtol=1e-5)
        np.testing.assert_allclose(averages["batch_weight"], data["mask"].sum(), rtol=1e-6)

    def test_a_batch_larger_than_the_data_is_said_once_and_works(self):
        with pytest.warns(
            UserWarning, match="`batch_size` is 32 but `train_data` has 5 examples; every epoch is"
        ) as said:
            build().train(regression(5), 3, 32)
        assert len(said) == 1

    @pytest.mark.parametrize("arguments", [0, 1])
    def test_a_loader_may_be_a_callable(self, arguments):
        asked = []

        def make(*about):
            asked.append(about)
            return iter([regression(8)])

        loader = (lambda batch_size: make(batch_size)) if arguments else (lambda: make())
        trainer = build(settings=config(batch_size=8), train_data_loader=loader)
        trainer.train_epoch()
        trainer.train_epoch()
        assert asked == [(8,) if arguments else ()] * 2
        assert (trainer.step, trainer.epoch) == (2, 2)

    def test_tensors_of_another_framework_and_other_mappings_are_taken(self):
        class Tensor:
            """As much of a torch tensor as NumPy asks for."""

            def __init__(self, values):
                self.values, self.shape, self.dtype = values, values.shape, "torch.float32"

            def __array__(self, dtype=None, copy=None):
                return self.values

        batch = {name: Tensor(values) for name, values in regression(8).items()}
        expected, foreign = build(), build(train_data_loader=[MappingProxyType(batch)])
        foreign.train_epoch()
        expected.train_step(regression(8))
        assert_same_bits(foreign.state, expected.state)
        assert foreign.evaluate(batch, 8) == expected.evaluate(regression(8), 8)
        assert foreign.validate_step(batch)["loss"] == expected.validate_step(regression(8))["loss"]

    def test_an_endless_loader_is_bounded_by_steps_per_epoch(self):
        def endless():
            while True:
                yield regression(8)

        trainer = build(settings=config(steps_per_epoch=3), train_data_loader=endless)
        trainer.train_epoch()
        assert trainer.step == 3

    def test_validation_of_an_epoch_comes_under_prefixed_names(self):
        recorder = Recorder()
        trainer = build(
            train_data_loader=[regression(8)],
            val_data_loader=lambda: [regression(8), regression(4)],
            callbacks=[recorder],
        )
        averages = trainer.train_epoch()
        assert set(averages) == {"loss", "mean_error", "val_loss", "val_mean_error"}
        assert recorder.events[-2] == ("on_epoch_end", 0, averages)
        assert recorder.names == [
            "on_train_begin",
            "on_epoch_begin",
            "on_batch_begin",
            "on_batch_end",
            "on_validation_begin",
            "on_validation_end",
            "on_epoch_end",
            "on_train_end",
        ]


class TestHooks:
    def test_events_come_in_the_documented_order(self, tmp_path):
        recorder = Recorder()
        trainer = build(tmp_path, callbacks=CallbackList([recorder]), save_interval=2)
        trainer.train(regression(16), 2, 8, regression(8), val_interval=2)
        epoch = ["on_batch_begin", "on_batch_end"] * 2 + ["on_validation_begin", "on_validation_end", "on_epoch_end"]
        assert recorder.names == ["on_train_begin", *(["on_epoch_begin", *epoch] * 2), "on_train_end"]
        steps = [event[1] for event in recorder.events if event[0].startswith("on_batch")]
        assert steps == [0, 1, 1, 2, 2, 3, 3, 4]
        assert [event[1] for event in recorder.events if event[0] == "on_epoch_end"] == [0, 1]

    def test_a_checkpoint_comes_after_the_validation_of_its_step(self, tmp_path):
        existed = []

        class Looking(Callback):
            def on_validation_end(self, trainer, logs):
                existed.append((tmp_path / f"checkpoint_{trainer.step}.msgpack").exists())

        trainer = build(tmp_path, callbacks=[Looking()], save_interval=1)
        trainer.train(regression(16), 1, 8, regression(8), val_interval=1)
        assert existed == [False, False]
        assert (tmp_path / "checkpoint_2.msgpack").exists()

    def test_callbacks_come_before_extensions(self):
        events = []

        class Watching(Counting):
            def on_batch_end(self, trainer, step, logs):
                events.append(("extension on_batch_end",))

        build(callbacks=[Recorder(events=events)], extensions={"w": Watching()}).train_step(regression())
        assert [event[0] for event in events] == ["on_batch_begin", "on_batch_end", "extension on_batch_end"]

    def test_calls_and_compilations_are_events_of_their_own(self):
        events = []

        class Watching(Callback):
            def on_call_end(self, trainer, step, logs):
                events.append((step, float(logs["loss"])))

            def on_compile_begin(self, trainer, what):
                events.append(("begin", what))

            def on_compile_end(self, trainer, what, seconds):
                events.append(("end", what))
                assert seconds > 0

        trainer = build(callbacks=[Watching()], settings=config(log_frequency=1))
        trainer.train(regression(20), 2, 8)
        losses = trainer.history.series("loss")[1]
        assert events == [
            *[("begin", "train_steps"), ("end", "train_steps"), (2, losses[1])],
            *[("begin", "train_step"), ("end", "train_step"), (3, losses[2])],
            *[(5, losses[4]), (6, losses[5])],
        ]

    def test_a_validation_that_compiles_says_so_and_an_evaluation_does_not(self):
        events, texts = [], []

        class Watching(Callback):
            def on_validation_begin(self, trainer):
                events.append("validation")

            def on_validation_end(self, trainer, logs):
                events.append("validated")

            def on_compile_begin(self, trainer, what):
                events.append(f"begin {what}")

            def on_compile_end(self, trainer, what, seconds):
                events.append(f"end {what}")
                assert 0 < seconds < 600

        class Texts(Logger):
            def log_scalars(self, scalars, step=None):
                pass

            def log_text(self, name, text, step=None):
                if name == "compilation":
                    texts.append((text.split()[0], step))

        trainer = build(callbacks=[Watching()], logger=Texts())
        training = ["begin train_steps", "end train_steps"]
        validation = ["validation", "begin eval_step", "end eval_step", "validated"]
        trainer.train(regression(16), 2, 8, regression(8))
        assert events == [*training, *validation, "validation", "validated"]
        assert texts == [("train_steps", 0), ("eval_step", 2)]
        # A short batch is another program, and what an evaluation compiled is there for a validation.
        events.clear()
        trainer.train(regression(16), 1, 8, regression(11))
        assert events == ["validation", "end eval_step", "validated"]
        events.clear()
        for size in (5, 6, 7):  # nor does it warn of its three shapes
            trainer.evaluate(regression(8), size)
        trainer.train(regression(16), 1, 8, regression(5))
        assert events == ["validation", "validated"]

    def test_a_validation_after_an_evaluation_compiles_nothing(self):
        compiled = []
        watching = LambdaCallback(on_compile_begin=lambda trainer, what: compiled.append(what))
        trainer = build(callbacks=[watching])
        trainer.evaluate(regression(8), 8)
        trainer.train(regression(16), 1, 8, regression(8))
        assert compiled == ["train_steps"]

    def test_batch_logs_are_what_train_step_returns(self):
        recorder = Recorder()
        metrics = build(callbacks=[recorder]).train_step(regression())
        assert recorder.events[-1] == ("on_batch_end", 1, metrics)

    def test_epoch_logs_hold_averages_and_the_latest_validation(self):
        recorder = Recorder()
        trainer = build(callbacks=[recorder])
        returned = trainer.train(regression(16), 1, 8, regression(8), val_interval=2)
        logs = next(event[2] for event in recorder.events if event[0] == "on_epoch_end")
        assert logs["val_loss"] == returned["loss"]
        assert all(type(value) is float for value in logs.values())

    @pytest.mark.parametrize("where", ["callback", "extension"])
    def test_should_stop_ends_the_run_after_the_epoch(self, where):
        class Stopping(Callback):
            def on_batch_end(self, trainer, step, logs):
                self.should_stop = step >= 3

        class StoppingExtension(Stopping, Counting):
            pass

        options = {"callbacks": [Stopping()]} if where == "callback" else {"extensions": {"s": StoppingExtension()}}
        trainer = build(**options)
        averages = trainer.train(regression(16), 10, 8)
        assert (trainer.step, trainer.epoch) == (4, 2)
        assert averages["loss"] > 0

    def test_an_error_in_on_train_end_does_not_hide_the_first_nor_the_other_listeners(self):
        class Failing(Callback):
            def on_train_end(self, trainer):
                raise OSError("late")

            def on_batch_end(self, trainer, step, logs):
                raise ZeroDivisionError("first")

        recorder = Recorder()
        with pytest.raises(ZeroDivisionError, match="first") as caught:
            build(callbacks=[Failing(), recorder]).train(regression(16), 1, 8)
        assert caught.value.__notes__[-1] == "and on_train_end raised OSError('late')"
        assert recorder.names[-1] == "on_train_end"

    def test_an_error_in_on_train_end_alone_is_raised(self):
        class Failing(Callback):
            def on_train_end(self, trainer):
                raise OSError("late")

        recorder = Recorder()
        with pytest.raises(OSError, match="late"):
            build(callbacks=[Failing(), recorder]).train(regression(16), 1, 8)
        assert recorder.names[-1] == "on_train_end"

    def test_ctrl_c_in_on_train_end_does_not_keep_it_from_the_others(self):
        class Interrupted(Callback):
            def on_train_end(self, trainer):
                raise KeyboardInterrupt

        class Failing(Callback):
            def on_train_end(self, trainer):
                raise OSError("late")

        recorder = Recorder()
        with pytest.raises(KeyboardInterrupt) as caught:
            build(callbacks=[Failing(), Interrupted(), recorder]).train(regression(16), 1, 8)
        assert caught.value.__notes__ == ["and on_train_end raised OSError('late')"]
        assert recorder.names[-1] == "on_train_end"

    def test_ctrl_c_in_on_train_end_is_more_than_a_note_of_an_error(self):
        class Failing(Callback):
            def on_batch_end(self, trainer, step, logs):
                raise ZeroDivisionError("first")

            def on_train_end(self, trainer):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt) as caught:
            build(callbacks=[Failing()]).train(regression(16), 1, 8)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)

    def test_a_callback_list_of_the_users_own_works(self):
        class Own:
            def __init__(self):
                self.seen = []

            def on_batch_end(self, trainer, step, logs):
                self.seen.append(step)

            def on_train_end(self, trainer):
                self.seen.append("end")

        own = Own()
        build(callbacks=own).train(regression(16), 1, 8)
        assert own.seen == [1, 2, "end"]


class Spy(Logger):
    def __init__(self):
        self.rows = []

    def log_scalars(self, scalars, step=None):
        self.rows.append((step, dict(scalars)))

    def log_text(self, name, text, step=None):
        self.rows.append((step, name, text))

    def log_hyperparams(self, params):
        self.rows.append(("hyperparameters", params))


class TestLogging:
    def test_training_is_logged_at_the_first_step_the_cadence_and_the_last(self):
        calls = []
        trainer = build(
            settings=config(log_frequency=3), log_callback=lambda s, m, prefix: calls.append((s, m, prefix))
        )
        trainer.train(regression(16), 4, 8)
        assert [(step, prefix) for step, _, prefix in calls] == [(s, "train") for s in (1, 3, 6, 8)]
        assert all(type(m["loss"]) is float and m["step"] == s for s, m, _ in calls)
        # The history of so short a run has every step, and the rows of the loggers are among them.
        assert trainer.history.to_dict()["step"] == list(range(1, 9))
        assert [trainer.history[s - 1]["loss"] for s, _, _ in calls] == [m["loss"] for _, m, _ in calls]

    def test_validation_is_logged_as_it_is_returned(self):
        calls, spy = [], Spy()
        trainer = build(
            logger=spy,
            metrics_logger=MetricsLogger(spy),
            log_callback=lambda s, m, prefix: calls.append((s, m, prefix)),
        )
        returned = trainer.train(regression(16), 2, 8, regression(8), val_interval=3)
        validations = [(step, m) for step, m, prefix in calls if prefix == "val"]
        assert [step for step, _ in validations] == [2, 3, 4]
        assert validations[-1][1] == {**returned, "step": 4}
        assert trainer.history[-1]["val_loss"] == returned["loss"]
        assert trainer.history.series("val_loss")[0] == [2, 3, 4]
        rows = [row for row in spy.rows if not any(name.startswith("epoch/") for name in row[1])]
        assert rows[-2:] == [
            (4, {f"val/{name}": value for name, value in returned.items()}),
            (None, {f"test/{name}": value for name, value in returned.items()}),
        ]

    def test_a_final_validation_that_is_due_anyway_runs_once(self):
        recorder = Recorder()
        build(callbacks=[recorder]).train(regression(16), 2, 8, regression(8), val_interval=4)
        assert recorder.names.count("on_validation_end") == 2  # one at the end of each epoch

    def test_a_logger_gets_scalars_hyperparameters_and_remarks(self, tmp_path):
        spy = Spy()
        trainer = build(tmp_path, logger=spy, settings=config(name="run"))
        trainer.train(regression(16), 1, 8)
        trainer.save_checkpoint()
        assert spy.rows[0][1]["name"] == "run"
        assert spy.rows[1] == (0, "training", "1 epochs of 2 steps, batch size 8")
        assert spy.rows[2][:2] == (0, "compilation")
        assert spy.rows[3][0] == 1
        assert set(spy.rows[3][1]) == {"train/loss", "train/mean_error"}
        assert {"speed/steps_per_second", "speed/waiting_for_data"} < set(spy.rows[4][1])
        assert spy.rows[-1] == (2, "checkpoint", f"saved {tmp_path / 'checkpoint_2.msgpack'}")

    def test_a_logger_that_the_metrics_logger_wraps_is_not_told_twice(self):
        spy = Spy()
        build(logger=spy, metrics_logger=MetricsLogger(spy)).train_step(regression())
        assert [row[0] for row in spy.rows if "compilation" not in row] == [1]

    def test_validate_step_logs_as_validation(self):
        calls = []
        trainer = build(log_callback=lambda step, metrics, prefix: calls.append((step, prefix)))
        trainer.validate_step(regression())
        assert calls == [(0, "val")]
        assert trainer.history[-1]["val_loss"] > 0

    def test_a_loss_that_is_not_a_number_is_visible(self):
        def nan(model, batch, rng, step):
            return jnp.mean(model(batch["input"])) * jnp.nan, {}

        trainer = build(loss_fn=nan)
        with pytest.warns(UserWarning, match="the loss is nan at step 1, and training continues"):
            assert np.isnan(trainer.train(regression(16), 1, 8)["loss"])
        assert np.isnan(trainer.history.series("loss")[1]).all()

    def test_nothing_is_read_from_the_device_while_nobody_asks(self, monkeypatch):
        reads = []
        for name in ("average", "history"):
            where = f"trainer.metrics.{name}.read"
            monkeypatch.setattr(where, lambda rows: reads.append(trainer.step) or read(rows))
        trainer = build(settings=config(log_frequency=2), progress=False)
        trainer.train(regression(64), 2, 8)
        assert reads == [16, 16]  # at the end: of the epoch before, which has finished, and of the last

    def test_use_wandb_logs_there_too(self, monkeypatch):
        spy = Spy()
        monkeypatch.setattr("trainer.fit.assemble.WandbLogger", lambda project, name: spy if project == "p" else None)
        build(settings=config(use_wandb=True, wandb_project="p")).train_step(regression())
        assert spy.rows[-1][0] == 1


class TestSchedules:
    def rate(self, trainer, step):
        """The size of the update that unit gradients get at a step, which sgd makes the learning rate."""
        optimizer, params = trainer.optimizer, jnp.zeros(())
        state = jax.tree.map(
            lambda leaf: jnp.full_like(leaf, step) if leaf.dtype == jnp.int32 else leaf, optimizer.init(params)
        )
        return -float(optimizer.update(jnp.ones(()), state, params)[0])

    def settings(self, **changes):
        return TrainingConfig(
            optimizer=OptimizerConfig(optimizer_type="sgd", learning_rate=1.0),
            scheduler=SchedulerConfig(scheduler_type="linear"),
            **changes,
        )

    def test_train_ends_the_schedule_at_its_last_step(self):
        trainer = build(settings=self.settings())
        with pytest.raises(ConfigError, match=r"`SchedulerConfig.total_steps` is left out and the length of the run"):
            trainer.train_step(regression())
        with pytest.warns(UserWarning, match="the loss is inf at step 7"):
            trainer.train(regression(20), 4, 8)
        assert [self.rate(trainer, step) for step in (0, 6, 12)] == [1.0, 0.5, 0.0]

    @pytest.mark.parametrize("known_by", ["steps_per_epoch", "len"])
    def test_train_epoch_knows_from_the_loader_or_the_configuration(self, known_by):
        if known_by == "len":
            trainer = build(settings=self.settings(num_epochs=2), train_data_loader=[regression(8)] * 5)
        else:
            settings = self.settings(num_epochs=2, steps_per_epoch=5)
            trainer = build(settings=settings, train_data_loader=lambda: iter([regression(8)] * 9))
        trainer.train_epoch()
        assert [self.rate(trainer, step) for step in (0, 5, 10)] == [1.0, 0.5, 0.0]

    def test_a_run_of_the_length_that_was_known_keeps_its_compiled_step(self, compilations):
        trainer = build(settings=self.settings(num_epochs=2), train_data_loader=[regression(8)] * 2)
        trainer.train_step(regression(8))
        trainer.state = trainer.state.replace(step=jnp.int32(0))
        trainer.train(regression(16), 2, 8)
        assert compilations["jit(train_step)"] == 1

    def test_a_loader_whose_length_is_unknown_is_no_error_until_a_schedule_asks(self):
        class Stream(list):
            def __len__(self):
                raise TypeError("no length")

        build(train_data_loader=Stream([regression(8)]))

    def test_a_schedule_beside_an_explicit_optimizer_is_warned_of(self):
        with pytest.warns(
            UserWarning, match="`training_config.scheduler` does nothing, because an `optimizer` was given"
        ):
            trainer = build(settings=self.settings(), optimizer=optax.sgd(0.5))
        trainer.train(regression(16), 1, 8)
        assert self.rate(trainer, 9) == 0.5

    def test_a_refused_plan_changes_nothing(self):
        settings = self.settings().replace(scheduler=SchedulerConfig(scheduler_type="linear", warmup_steps=50))
        trainer = build(settings=settings)
        with pytest.raises(ConfigError, match=r"`SchedulerConfig.warmup_steps` is 50, but the run ends after 4 steps"):
            trainer.train(regression(16), 2, 8)
        assert (trainer.step, len(trainer.history)) == (0, 0)


class TestCheckpoints:
    def test_a_fresh_trainer_continues_to_the_bit(self, tmp_path):
        extension = {"size": Counting()}
        trainer = build(tmp_path, extensions=extension, rng=jax.random.key(5))
        for seed in range(3):
            trainer.train_step(regression(seed=seed))
        path = trainer.save_checkpoint(tmp_path / "here.msgpack")

        other = build(tmp_path, extensions=extension, rng=jax.random.key(6))
        other.load_checkpoint(path)
        assert other.step == 3
        assert_same_bits(trainer.state, other.state)
        trainer.train_step(regression(seed=9))
        other.train_step(regression(seed=9))
        assert_same_bits(trainer.state, other.state)

    def test_the_weight_of_an_extension_stays_as_it_is_set(self, tmp_path):
        extension = Counting()
        trainer = build(tmp_path, extensions={"size": extension})
        trainer.train_step(regression())
        path = trainer.save_checkpoint()
        extension.weight = 0.0
        trainer.load_checkpoint(path)
        assert trainer.train_step(regression())["size_loss"] == 0

    def test_train_saves_at_its_interval_and_keeps_the_latest(self, tmp_path):
        trainer = build(tmp_path, settings=config(max_checkpoints=2), save_interval=3)
        (tmp_path / "checkpoint_notes.txt").write_text("mine")
        trainer.train(regression(64), 2, 8)
        assert sorted(p.name for p in tmp_path.iterdir()) == [
            "checkpoint_15.msgpack",
            "checkpoint_16.msgpack",  # the end
            "checkpoint_notes.txt",
            "run.json",
        ]

    def test_train_epoch_saves_at_save_frequency(self, tmp_path):
        trainer = build(tmp_path, settings=config(save_frequency=2), train_data_loader=[regression(8)] * 5)
        trainer.train_epoch()
        assert sorted(p.name for p in tmp_path.glob("check*")) == ["checkpoint_2.msgpack", "checkpoint_4.msgpack"]

    def test_the_directory_is_the_most_specific_one_and_made_at_the_first_save(self, tmp_path):
        settings = config(checkpoint_dir=tmp_path / "c")
        directories = [
            build(settings=settings).checkpoint_dir,
            build(settings=settings, workdir=tmp_path / "b").checkpoint_dir,
            build(settings=settings, workdir=tmp_path / "b", checkpoint_dir=tmp_path / "a").checkpoint_dir,
        ]
        assert [directory.name for directory in directories] == ["c", "b", "a"]
        assert list(tmp_path.iterdir()) == []


class TestBadInput:
    """One clear error each, and nothing is half-done."""

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"model": nnx.Linear}, "`model` is the class Linear; it must be a flax.nnx.Module instance"),
            ({"training_config": None}, "`training_config` is of type NoneType; it must be a trainer.TrainingConfig."),
            ({"training_config": {}}, "is of type dict; it must be .* TrainingConfig.from_dict makes one"),
            ({"optimizer": "adam"}, "`optimizer` is of type str; it must be an optax.GradientTransformation"),
            ({"loss_fn": 3}, "`loss_fn` is of type int; it must be a callable"),
            ({"rng": 0.5}, "`rng` is 0.5 of type float; it must be one key"),
            ({"train_data_loader": 5}, "`train_data_loader` is of type int; it must be an iterable of batches"),
            ({"val_data_loader": 5}, "`val_data_loader` is of type int; it must be an iterable of batches"),
            ({"log_callback": 5}, "`log_callback` is of type int; it must be callable"),
            ({"callbacks": 5}, "`callbacks` is of type int; it must be a trainer.CallbackList"),
            ({"extensions": {"a": Counting}}, r"`extensions\['a'\]` is the class Counting; it must be an object of it"),
            ({"extensions": {"a": 5}}, r"`extensions\['a'\]` is of type int and has no is_enabled\(\)"),
            ({"save_interval": 1.5}, "`save_interval` is 1.5 of type float; it must be a positive integer"),
            ({"save_interval": True}, "`save_interval` is True of type bool; it must be a positive integer"),
        ],
    )
    def test_of_the_wrong_type(self, options, message):
        arguments = {"model": Busy(), "training_config": config(), "loss_fn": squared_error, **options}
        with pytest.raises(ArgumentTypeError, match=message):
            Trainer(**arguments)

    def test_a_save_interval_that_is_not_positive(self):
        with pytest.raises(ArgumentError, match=r"`save_interval` is 0; it must be a positive integer, or None"):
            build(save_interval=0)

    def test_a_model_without_parameters(self):
        class Empty(nnx.Module):
            pass

        with pytest.raises(ArgumentError, match=r"`model` has no parameters: `wrt` = .*Param.* selects none"):
            build(model=Empty())

    @pytest.mark.parametrize(
        ("name", "wanted", "refused"),
        [
            ("num_epochs", "an integer of at least 0", [-1, 2.0, "3", None]),
            ("batch_size", "a positive integer", [0, -1, 2.0, "3", None]),
            ("val_interval", "a positive integer, or None for never", [0, -1, 2.0, "3"]),
        ],
    )
    def test_counts_of_train(self, name, wanted, refused):
        trainer = build()
        for value in refused:
            arguments = {"num_epochs": 1, "batch_size": 8, "val_interval": 1, name: value}
            with pytest.raises(ArgumentError, match=rf"`{name}` is {value!r}.*; it must be {wanted}\."):
                trainer.train(regression(), **arguments)
            assert trainer.step == 0

    @pytest.mark.parametrize(
        ("data", "message"),
        [
            ({}, "`train_data` is empty; it must hold at least one array"),
            ({"input": np.ones((0, 4))}, r"`train_data` holds no examples: input: float64\(0, 4\)"),
            ({"input": np.array(["a", "b"])}, "`train_data/input` has dtype <U1, which no model can take"),
            ({"input": [1.0, 2.0]}, "`train_data/input` is a list of Python values, not an array"),
        ],
    )
    def test_data_of_train(self, data, message):
        recorder = Recorder()
        trainer = build(callbacks=[recorder])
        with pytest.raises(BatchError, match=message):
            trainer.train(data, 1, 8)
        with pytest.raises(BatchError, match=message.replace("train_data", "batch")):
            trainer.train_step(data)
        with pytest.raises(BatchError, match=message.replace("train_data", "val_data")):
            trainer.train(regression(), 1, 8, data)
        assert recorder.events == []
        assert trainer.step == 0

    def test_data_in_memory_have_one_length(self):
        data = {"input": np.ones((4, 4)), "target": np.ones(3)}
        message = r"`train_data` has leading dimensions that differ: input: float64\(4, 4\), target: float64\(3,\)"
        with pytest.raises(BatchError, match=message):
            build().train(data, 1, 8)

    @pytest.mark.parametrize("method", ["train_step", "validate_step"])
    def test_an_objective_that_raises(self, method):
        def failing(model, batch, rng, step):
            raise KeyError("label")

        trainer = build(loss_fn=failing)
        with pytest.raises(KeyError, match="label"):
            getattr(trainer, method)(regression())
        assert trainer.step == 0
        assert np.isfinite(trainer.model(regression()["input"])).all()

    def test_train_epoch_without_a_loader(self):
        with pytest.raises(ArgumentError, match="`train_data_loader` was not given to the Trainer"):
            build().train_epoch()

    @pytest.mark.parametrize("name", ["train_data_loader", "val_data_loader"])
    def test_a_loader_that_yields_nothing(self, name):
        options = {"train_data_loader": [regression(8)], name: []}
        with pytest.raises(ArgumentError, match=f"`{name}` yielded no batch. If it is an iterator it was used up"):
            build(**options).train_epoch()

    @pytest.mark.parametrize("method", ["train_step", "validate_step"])
    def test_a_state_that_was_given_away_elsewhere(self, method):
        trainer = build()
        jax.jit(lambda state: jax.tree.map(lambda leaf: leaf, state), donate_argnums=0)(trainer.state)
        for leaf in jax.tree.leaves(trainer.state):
            leaf.delete()
        with pytest.raises(StateError, match="`state` was donated: the buffer of `params/inner/bias` is gone"):
            getattr(trainer, method)(regression())

    def test_a_step_that_fails_and_takes_the_state_with_it_says_so(self):
        trainer = build()

        def out_of_memory(leaves, batch):
            for leaf in leaves:
                leaf.delete()
            raise RuntimeError("RESOURCE_EXHAUSTED")

        trainer.train_step(regression())
        trainer.setup.step._program(trainer.run)._jitted = out_of_memory
        with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED") as caught:
            trainer.train_step(regression())
        assert caught.value.__notes__ == [
            "the state was donated to the step that failed and is gone; load a checkpoint to continue"
        ]


class TestNamesOfMetrics:
    """Names that begin with ``val_`` belong to validations, so no call takes such a metric from an objective."""

    REFUSED = "the objective or an extension reports a metric `val_error`, but names that begin with `val_` belong to"

    @staticmethod
    def in_evaluation_only(model, batch, rng, step):
        del rng, step
        loss = jnp.mean((model(batch["input"]) - batch["target"]) ** 2)
        return loss, {"val_error": loss} if model.dropout.deterministic else {"error": loss}

    @staticmethod
    def always(model, batch, rng, step):
        loss, _ = squared_error(model, batch, rng, step)
        return loss, {"val_error": loss}

    @pytest.mark.parametrize(
        "call",
        [
            lambda trainer: trainer.train_step(regression(8)),
            lambda trainer: trainer.compile(regression(8)),
            lambda trainer: trainer.train(regression(16), 1, 8),
            lambda trainer: trainer.train_epoch(),
        ],
        ids=["train_step", "compile", "train", "train_epoch"],
    )
    def test_a_step_that_reports_one_is_refused_before_it_runs(self, tmp_path, call):
        trainer = build(tmp_path, loss_fn=self.always, train_data_loader=[regression(8)])
        before = on_host(trainer.state)
        with pytest.raises(ObjectiveError, match=self.REFUSED):
            call(trainer)
        assert_same_bits(trainer.state, before)

    @pytest.mark.parametrize(
        "call",
        [
            lambda trainer: trainer.validate_step(regression(8)),
            lambda trainer: trainer.evaluate(regression(16), 8),
            lambda trainer: trainer.train(regression(16), 1, 8, regression(8)),
            lambda trainer: trainer.train_epoch(),
        ],
        ids=["validate_step", "evaluate", "train", "train_epoch"],
    )
    def test_an_evaluation_that_reports_one_is_refused(self, tmp_path, call):
        loaders = {"train_data_loader": [regression(8)], "val_data_loader": [regression(8)]}
        trainer = build(tmp_path, loss_fn=self.in_evaluation_only, **loaders)
        with pytest.raises(ObjectiveError, match=self.REFUSED):
            call(trainer)
        assert not any("val_error" in row for row in trainer.history)

    def test_names_are_checked_when_a_step_is_traced_and_not_again(self, monkeypatch):
        checked = []
        monkeypatch.setattr("trainer.loggers.base.check_metric_names", checked.append)
        trainer = build()
        for _ in range(3):
            trainer.train_step(regression(8))
            trainer.validate_step(regression(8))
        assert len(checked) == 2
