"""The `Trainer` over a mesh learns what it learns on one device, and holds what the rules say."""

import io

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from tests.marks import slow_unless
from tests.problems import config
from tests.test_api import assert_same_bits
from trainer import (
    ArgumentError,
    ArgumentTypeError,
    BatchError,
    Callback,
    Extension,
    ExtensionConfig,
    MetricsLogger,
    Trainer,
    TrainState,
    batch_sharding,
    create_sharded,
    jit_step,
    latest_checkpoint,
    make_mesh,
    make_train_step,
    partition,
)
from trainer.sharding import bytes_per_device, shardings_of

EXAMPLES, BATCH = 90, 16  # five full batches, and one of ten examples, which eight devices cannot share


class Perceptron(nnx.Module):
    def __init__(self, rngs):
        self.inner = nnx.Linear(16, 256, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.outer = nnx.Linear(256, 256, rngs=rngs)
        self.calls = nnx.Variable(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.calls[...] += 1
        return self.outer(self.dropout(nnx.relu(self.inner(x))))


class Penalty(Extension):
    def __init__(self):
        super().__init__(ExtensionConfig(weight=1e-3))
        self.evaluations = nnx.Variable(jnp.zeros((), jnp.int32))

    def loss_fn(self, batch, model_outputs, **kwargs):
        self.evaluations[...] += 1
        return jnp.mean(model_outputs**2)


def objective(model, batch, rng, step):
    del step
    error = model(batch["input"]) - batch["target"]
    return jnp.mean(error**2), {"error": jnp.mean(error), "drawn": jax.random.uniform(rng), "model_outputs": error}


def data(examples=EXAMPLES, seed=0):
    draws = np.random.default_rng(seed)
    x = draws.normal(size=(examples, 16)).astype(np.float32)
    return {"input": x, "target": np.tanh(x @ draws.normal(size=(16, 256))).astype(np.float32)}


def batch(examples=BATCH):
    return {name: column[:examples] for name, column in data().items()}


RULES = {"params/inner/kernel": P(None, "tensor"), "params/outer/kernel": P("tensor", None)}

LAYOUTS = {
    "data": ({"data": 8}, None),
    "fsdp": ({"fsdp": 8}, None),
    "data, fsdp": ({"data": 2, "fsdp": 4}, None),
    "data, tensor": ({"data": 4, "tensor": 2}, RULES),
    "data, fsdp, tensor": ({"data": 2, "fsdp": 2, "tensor": 2}, RULES),
    "one device": ({"data": 1, "fsdp": 1}, None),
}


def build(directory, layout=None, model=None, **options):
    axes, rules = LAYOUTS[layout] if layout is not None else (None, None)
    mesh = None if axes is None else make_mesh(axes, jax.devices()[: int(np.prod(list(axes.values())))])
    settings = config(log_frequency=1, gradient_clip_norm=1.0)
    extensions = {"penalty": Penalty()}
    return Trainer(
        Perceptron(nnx.Rngs(0)) if model is None else model,
        settings,
        loss_fn=objective,
        workdir=directory,
        rng=jax.random.key(3),
        mesh=mesh,
        partition_rules=rules,
        extensions=extensions,
        save_interval=options.pop("save_interval", 10**9),
        **options,
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    trainer = build(tmp_path_factory.mktemp("alone"))
    result = trainer.train(data(), 4, BATCH, data(13, seed=1), val_interval=7)
    return trainer, result


def assert_same_course(trainer, alone):
    """Devices add in another order than one does, in float32; everything else is the same."""
    ours, theirs = trainer.history.to_dict(), alone.history.to_dict()
    assert ours.keys() == theirs.keys()
    assert ours["step"] == theirs["step"]
    assert ours["drawn"] == theirs["drawn"]
    for name in ours:
        np.testing.assert_allclose(
            np.array(ours[name], float), np.array(theirs[name], float), rtol=2e-5, atol=2e-6, err_msg=name
        )


class TestTraining:
    @pytest.mark.parametrize("layout", slow_unless({"data, fsdp, tensor", "one device"}.__contains__, LAYOUTS))
    @pytest.mark.few(1)
    def test_the_numbers_are_those_of_one_device(self, layout, alone, tmp_path, compilations):
        trainer = build(tmp_path, layout)
        result = trainer.train(data(), 4, BATCH, data(13, seed=1), val_interval=7)
        assert_same_course(trainer, alone[0])
        assert result == pytest.approx(alone[1], rel=1e-5, abs=2e-6)
        # One program for full batches (fused, so called train_steps) and one for the short one.
        steps = {name: count for name, count in compilations.items() if "train_step" in name}
        assert steps == {"jit(train_steps)": 1, "jit(train_step)": 1}

    @pytest.mark.parametrize("options", [{"steps_per_call": 1}, {"callbacks": [Callback()]}])
    @pytest.mark.few(1)
    def test_however_steps_are_called(self, options, alone, tmp_path):
        trainer = build(tmp_path, "data, fsdp", **options)
        trainer.train(data(), 4, BATCH, data(13, seed=1), val_interval=7)
        assert_same_course(trainer, alone[0])

    def test_steps_of_the_callers_own_loop(self, tmp_path):
        ours, theirs = build(tmp_path, "data, fsdp, tensor"), build(tmp_path)
        batch = {name: column[:BATCH] for name, column in data().items()}
        for _ in range(3):
            assert float(ours.train_step(batch)["loss"]) == pytest.approx(
                float(theirs.train_step(batch)["loss"]), rel=2e-5
            )
        assert float(ours.validate_step(batch)["loss"]) == pytest.approx(
            float(theirs.validate_step(batch)["loss"]), rel=2e-5
        )

    def test_a_loader_with_a_short_last_batch(self, tmp_path):
        batches = [{name: column[i : i + BATCH] for name, column in data(42).items()} for i in range(0, 42, BATCH)]
        ours, theirs = (
            build(tmp_path / str(layout), layout, train_data_loader=batches, val_data_loader=batches)
            for layout in ("data, fsdp", None)
        )
        assert ours.train_epoch() == pytest.approx(theirs.train_epoch(), rel=2e-5, abs=2e-6)

    def test_an_evaluation_is_exact_with_an_uneven_tail(self, tmp_path):
        ours, theirs = build(tmp_path, "data"), build(tmp_path)
        assert ours.evaluate(data(83), 40) == pytest.approx(theirs.evaluate(data(83), 40), rel=1e-5, abs=2e-6)

    def test_a_weight_that_changes_compiles_nothing(self, tmp_path, compilations):
        trainer = build(tmp_path, "data, fsdp")
        before = float(trainer.train_step(batch())["penalty_loss"])
        trainer.extensions["penalty"].weight = 1.0
        after = float(trainer.train_step(batch())["penalty_loss"])
        assert after > 100 * before
        assert compilations["jit(train_step)"] == 1

    def test_every_array_is_donated(self, tmp_path):
        trainer = build(tmp_path, "data, fsdp")
        trainer.train_step(batch())
        before = jax.tree.leaves(trainer.state)
        trainer.train_step(batch())
        assert [leaf.shape for leaf in before if not leaf.is_deleted()] == []

    def test_it_compiles_ahead_of_time(self, tmp_path, compilations):
        trainer = build(tmp_path, "fsdp")
        compiled = trainer.compile(jax.eval_shape(batch))
        assert compiled.aliased >= bytes_per_device(trainer.state.params)
        trainer.train_step(batch())
        assert compilations["jit(train_step)"] == 1


class TestState:
    def test_it_lies_as_the_rules_say_and_stays_there(self, tmp_path):
        trainer = build(tmp_path, "data, tensor")
        trainer.train(data(), 1, BATCH)
        for tree in (trainer.state.params, trainer.state.opt_state[1][0].mu):
            assert tree["inner"]["kernel"].sharding.spec == P(None, "tensor")
            assert tree["outer"]["kernel"].sharding.spec == P("tensor", None)
            assert tree["outer"]["bias"].sharding.spec == P()

    def test_fsdp_holds_an_eighth_but_for_small_arrays(self, tmp_path):
        trainer = build(tmp_path, "fsdp")
        trainer.train(data(), 1, BATCH)
        kernel = trainer.state.params["outer"]["kernel"]
        assert kernel.addressable_shards[3].data.nbytes == kernel.nbytes // 8

    def test_a_function_in_place_of_the_model_is_born_sharded(self, tmp_path):
        trainer = build(tmp_path, "fsdp", model=Perceptron)
        mesh = trainer.state.step.sharding.mesh
        same = create_sharded(
            Perceptron, trainer.optimizer, rng=jax.random.key(3), mesh=mesh, extensions=trainer.extensions
        )
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), trainer.state, same))
        trainer.train(data(), 1, BATCH)

    def test_a_state_from_elsewhere_is_placed(self, tmp_path):
        trainer, other = build(tmp_path, "data, fsdp"), build(tmp_path)
        other.train(data(), 1, BATCH)
        trainer.state = other.state.copy()
        assert trainer.step == 6
        kernel = trainer.state.params["outer"]["kernel"].sharding
        assert kernel.spec in (P(None, "fsdp"), P("fsdp", None))
        losses = [float(one.train_step(batch())["loss"]) for one in (trainer, other)]
        assert losses[0] == pytest.approx(losses[1], rel=2e-5)

    def test_the_model_that_was_passed_in_stays_alive(self, tmp_path):
        model = Perceptron(nnx.Rngs(0))
        build(tmp_path, "data", model=model).train(data(), 1, BATCH)
        assert np.isfinite(model.inner.kernel[...]).all()

    def test_the_trained_model_can_be_called(self, tmp_path):
        trainer = build(tmp_path, "data, fsdp")
        trainer.train(data(), 1, BATCH)
        assert trainer.model(data()["input"]).shape == (EXAMPLES, 256)


CALLS = {
    "train": lambda trainer: trainer.train(data(), 1, BATCH),
    "train on a loader": lambda trainer: trainer.train([batch()], 1, BATCH),
    "train_step": lambda trainer: trainer.train_step(batch()),
    "validate_step": lambda trainer: trainer.validate_step(batch()),
    "evaluate": lambda trainer: trainer.evaluate(data(), BATCH),
    "predict": lambda trainer: trainer.predict(data(), BATCH),
    "compile": lambda trainer: trainer.compile(batch()),
    "summary": lambda trainer: trainer.summary(batch=batch()),
    "find_learning_rate": lambda trainer: trainer.find_learning_rate(data(), BATCH, steps=10),
}


class TestAMeshOfOneDevice:
    """Batches that are elsewhere already are placed on it, as over several devices."""

    @pytest.mark.parametrize("explicit", [True, False], ids=["explicit axes", "another device"])
    def test_batches_from_elsewhere_are_placed(self, explicit, tmp_path):
        first, last = jax.devices()[0], jax.devices()[-1]
        mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Explicit,), devices=[last])
        place = NamedSharding(mesh, P("data")) if explicit else first
        trainers = [
            Trainer(Perceptron(nnx.Rngs(0)), config(), loss_fn=objective, workdir=tmp_path / str(index), mesh=one)
            for index, one in enumerate((mesh if explicit else make_mesh({"data": 1}, [last]), None))
        ]
        parts = [batch(), batch(8)]
        for trainer, batches in zip(trainers, (jax.device_put(parts, place), parts), strict=True):
            trainer.train(batches, 1, BATCH, batches)
            trainer.train_step(batches[0])
            trainer.validate_step(batches[0])
            trainer.evaluate(batches, BATCH)
            trainer.compile(batches[0])
        assert_same_bits(*(jax.device_put(jax.device_get(trainer.state.params)) for trainer in trainers))
        assert all(leaf.devices() == {last} for leaf in jax.tree.leaves(trainers[0].state.params))


class TestAxesThatSplitNothing:
    @pytest.mark.parametrize("axis", ["batch", "dp"])
    def test_they_are_told_once(self, axis, tmp_path):
        trainer = Trainer(Perceptron, config(), loss_fn=objective, workdir=tmp_path, mesh=make_mesh({axis: 8}))
        with pytest.warns(UserWarning, match=f"`mesh` has the axes '{axis}', and nothing is split") as caught:
            trainer.train(data(), 2, BATCH)
        trainer.train_step(batch())  # a second warning would be an error
        assert len(caught) == 1

    @pytest.mark.parametrize(
        ("axes", "rules"),
        [({"data": 8}, None), ({"batch": 1}, None), ({"tensor": 8}, RULES)],
        ids=["of a batch", "of one device", "of a rule"],
    )
    def test_others_are_not(self, axes, rules, tmp_path):
        (size,) = axes.values()
        mesh = make_mesh(axes, jax.devices()[:size])
        options = {"loss_fn": objective, "workdir": tmp_path, "mesh": mesh, "partition_rules": rules}
        Trainer(Perceptron, config(), **options).train(data(), 1, BATCH)

    def test_nor_for_batches_that_the_caller_has_split(self, tmp_path):
        mesh = make_mesh({"batch": 8})
        split = jax.device_put(batch(), batch_sharding(mesh, "batch"))
        Trainer(Perceptron, config(), loss_fn=objective, workdir=tmp_path, mesh=mesh).train([split], 1, BATCH)


class TestAxesOfTypeExplicit:
    """Those of `jax.make_mesh`, unless it is told otherwise."""

    def test_a_trainer_gives_the_bits_of_a_mesh_of_ours(self, tmp_path):
        mesh = jax.make_mesh((2, 2, 2), ("data", "fsdp", "tensor"), axis_types=(AxisType.Explicit,) * 3)
        ours = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
        trainers = [
            Trainer(
                Perceptron(nnx.Rngs(0)), config(), loss_fn=objective, workdir=tmp_path / str(index), mesh=one,
                partition_rules=RULES,
            )
            for index, one in enumerate((mesh, ours))
        ]  # fmt: skip
        for trainer in trainers:
            trainer.train(data(), 2, BATCH)
        assert_same_bits(*(trainer.state for trainer in trainers))
        assert trainers[0].predict(data(), BATCH).shape == (EXAMPLES, 256)

    def test_one_that_is_set_for_all_of_jax_is_refused(self):
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Explicit,))
        with (
            jax.set_mesh(mesh),
            pytest.raises(ArgumentError, match="set_mesh has set a mesh with axes of type Exp"),
        ):
            Trainer(Perceptron(nnx.Rngs(0)), config(), loss_fn=objective, mesh=mesh)
        ours = make_mesh({"data": 8})
        with jax.set_mesh(ours):
            Trainer(Perceptron(nnx.Rngs(0)), config(), loss_fn=objective, mesh=ours).train_step(data(16))

    @pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
    @pytest.mark.parametrize("devices", [1, 8])
    def test_one_that_is_set_later_is_refused_by_each_call(self, call, devices, tmp_path):
        trainer = build(tmp_path, "data" if devices == 8 else "one device")
        with (
            jax.set_mesh(jax.make_mesh((devices,), ("data",), axis_types=(AxisType.Explicit,))),
            pytest.raises(ArgumentError, match="set_mesh has set a mesh with axes of type Exp"),
        ):
            call(trainer)
        assert trainer.step == 0
        trainer.train_step(batch())

    def test_a_state_is_created_partitioned_and_trained(self):
        mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Explicit,))
        optimizer = optax.adam(1e-3)
        state = create_sharded(Perceptron, optimizer, rng=0, mesh=mesh)
        step = jit_step(make_train_step(objective, optimizer), state, batch_sharding(mesh))
        state, metrics = step(state, data(16))
        assert np.isfinite(float(metrics["loss"]))
        assert shardings_of(state) == partition(state, make_mesh({"fsdp": 8}))


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "kind", "message"),
        [
            (lambda: {"mesh": 8}, ArgumentTypeError, "`mesh` is of type int; it must be a jax.sharding.Mesh"),
            (lambda: {"partition_rules": RULES}, ArgumentError, "`partition_rules` were given without a `mesh`"),
            (
                lambda: {"mesh": make_mesh({"data": 8}), "partition_rules": RULES},
                ArgumentError,
                "has no axis 'tensor'",
            ),
            (
                lambda: {"mesh": make_mesh({"data": 8}), "partition_rules": {"nothing": P()}},
                ArgumentError,
                "the rule 'nothing' matches no whole path",
            ),
        ],
    )
    def test_meshes_and_rules(self, arguments, kind, message):
        with pytest.raises(kind, match=message):
            Trainer(Perceptron(nnx.Rngs(0)), config(), loss_fn=objective, **arguments())

    def test_a_function_needs_a_mesh(self):
        with pytest.raises(ArgumentTypeError, match="`model` is the class Perceptron"):
            Trainer(Perceptron, config(), loss_fn=objective)

    @pytest.mark.parametrize("call", ["train", "evaluate"])
    def test_a_batch_size_that_devices_cannot_share(self, call, tmp_path):
        trainer = build(tmp_path, "data, fsdp")
        message = "`batch_size` is 30, which cannot be shared by the 8 devices of `data` and `fsdp`; .* 24 or 32"
        with pytest.raises(ArgumentError, match=message):
            trainer.train(data(), 1, 30) if call == "train" else trainer.evaluate(data(), 30)

    def test_a_batch_that_devices_cannot_share(self, tmp_path):
        trainer = build(tmp_path, "data")
        with pytest.raises(BatchError, match=r"`batch` has 10 examples .* cannot be shared by the 8 devices of `data`"):
            trainer.train_step(batch(10))
        assert trainer.step == 0


def test_a_batch_that_lies_on_the_mesh_is_taken_as_it_is(tmp_path):
    trainer = build(tmp_path, "data")
    sharding = NamedSharding(trainer.state.step.sharding.mesh, P())
    placed = jax.device_put(batch(10), sharding)
    assert np.isfinite(float(trainer.train_step(placed)["loss"]))


def test_one_process_is_the_one_that_logs(tmp_path):
    stream = io.StringIO()

    class Telling(MetricsLogger):
        def __init__(self):
            pass

        def log_training_metrics(self, metrics, step):
            stream.write(f"{step} {metrics['loss']:.3f}\n")

        def log_validation_metrics(self, metrics, step):
            pass

        def log_test_metrics(self, metrics):
            pass

    trainer = build(tmp_path, "data", metrics_logger=Telling())
    assert trainer.is_primary_process
    trainer.train(data(), 1, BATCH)
    assert len(stream.getvalue().splitlines()) == 6
    assert isinstance(trainer.state, TrainState)
    assert isinstance(trainer.optimizer, optax.GradientTransformation)


class Stopping(Callback):
    """Raises before a step."""

    def __init__(self, step):
        self.step = step

    def on_batch_begin(self, trainer, step):
        if step == self.step:
            raise InterruptedError


@pytest.mark.parametrize("layout", ["fsdp", "data, tensor"])
@pytest.mark.few(1)
def test_a_run_that_was_interrupted_goes_on_to_the_same_bits(layout, tmp_path):
    never = build(tmp_path / "never", layout)
    never.train(data(), 3, BATCH, data(13, seed=1), val_interval=7)

    broken = build(tmp_path / "broken", layout, callbacks=[Stopping(11)], save_interval=3)
    with pytest.raises(InterruptedError):
        broken.train(data(), 3, BATCH, data(13, seed=1), val_interval=7)
    broken.close()
    assert latest_checkpoint(tmp_path / "broken").name == "checkpoint_9.orbax"

    again = build(tmp_path / "broken", layout)
    again.train(data(), 3, BATCH, data(13, seed=1), val_interval=7, resume=True)
    assert again.history.to_dict() == never.history.to_dict()
    for ours, theirs in zip(jax.tree.leaves(again.state), jax.tree.leaves(never.state), strict=True):
        assert ours.sharding == theirs.sharding
        assert bool((ours == theirs).all())
