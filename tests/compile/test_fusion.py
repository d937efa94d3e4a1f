"""How many steps go into one call: judged from what they compute, and never seen in what is learned."""

import contextlib
import gc
import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.experimental import pallas
from jax.sharding import PartitionSpec

from tests.problems import Busy, Counting, config, regression, squared_error
from tests.test_api import Spy, assert_same_bits
from trainer import ArgumentError, ArgumentTypeError, Callback, Trainer, TrainState, make_train_step
from trainer.compile.dispatch import Program
from trainer.compile.fusion import FusionPolicy, as_function
from trainer.core.flops import flops, known_flops, product_dtype
from trainer.loop import rare_collections


@contextlib.contextmanager
def no_array_is_read():
    """Lets every read of an array by this thread raise; the guard of JAX sees none on a CPU."""
    thread, kind = threading.current_thread(), type(jnp.zeros(()))

    def refusing(read, is_meant=lambda *args: True):
        def refuse(*args, **options):
            if threading.current_thread() is thread and is_meant(*args):
                raise AssertionError("an array is read")
            return read(*args, **options)

        return refuse

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "_value", property(refusing(kind._value.fget)))
        for name in ("__array__", "item"):
            patch.setattr(kind, name, refusing(getattr(kind, name)))
        for name in ("array", "asarray"):
            patch.setattr(np, name, refusing(getattr(np, name), lambda value, *_: isinstance(value, jax.Array)))
        yield


def traced(function, *shapes):
    return jax.jit(function).trace(*(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)).jaxpr


def convolve(image, kernel):
    return jax.lax.conv_general_dilated(image, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


class TestFlops:
    @pytest.mark.parametrize(
        ("function", "shapes", "expected"),
        [
            (lambda a, b: a @ b, [(3, 5), (5, 7)], 2 * 3 * 5 * 7),
            (lambda a, b: jnp.einsum("bij,bjk->bik", a, b), [(2, 3, 5), (2, 5, 7)], 2 * 2 * 3 * 5 * 7),
            (lambda a, b: a * b + a, [(4,), (4,)], 8),
            (lambda a: jax.lax.scan(lambda c, _: (c @ a, None), a, length=10)[0], [(3, 3)], 10 * 2 * 27),
            (lambda a: jax.jit(lambda x: x @ x)(a), [(3, 3)], 2 * 27),
            (lambda a: jax.lax.cond(a[0, 0] > 0, lambda: a @ a, lambda: a), [(64, 64)], 2 * 64**3),
            (lambda a: jax.checkpoint(lambda x: x @ x)(a), [(3, 3)], 2 * 27),
            (
                lambda x, k: jax.lax.conv_general_dilated(
                    x, k, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
                ),
                [(2, 8, 8, 3), (3, 3, 3, 16)],
                2 * 2 * 8 * 8 * 16 * 3 * 3 * 3,
            ),
        ],
    )
    def test_products_are_counted(self, function, shapes, expected):
        assert flops(traced(function, *shapes).jaxpr) == pytest.approx(expected, abs=5)

    def test_a_step_is_about_three_forward_passes(self):
        def objective(model, batch, rng, step):
            return jnp.mean((model(batch["x"])) ** 2), {}

        optimizer = optax.sgd(0.1)
        state = TrainState.create(nnx.Linear(128, 128, rngs=nnx.Rngs(0)), optimizer, rng=jax.random.key(0))
        step = jax.jit(make_train_step(objective, optimizer)).trace(state, {"x": jnp.ones((64, 128))})
        # Of the first layer no gradient towards the input is needed: two products instead of three.
        assert flops(step.jaxpr.jaxpr) == pytest.approx(2 * 2 * 64 * 128 * 128, rel=0.05)

    @pytest.mark.parametrize("manual", [{"data", "model"}, {"data"}, {"model"}])
    def test_the_body_of_a_shard_map_is_counted_for_all_devices(self, manual):
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        split = PartitionSpec(tuple(sorted(manual)))
        product = jax.shard_map(
            lambda x, w: x @ w,
            mesh=mesh,
            in_specs=(split, PartitionSpec()),
            out_specs=split,
            axis_names=manual,
            check_vma=False,  # with it, there are casts too
        )
        assert flops(traced(product, (16, 8), (8, 3)).jaxpr) == 2 * 16 * 8 * 3

    def test_what_every_device_repeats_in_a_shard_map_counts_for_each(self):
        mesh, whole = jax.make_mesh((4,), ("data",)), PartitionSpec()
        product = jax.shard_map(lambda x, w: x @ w, mesh=mesh, in_specs=(whole, whole), out_specs=whole)
        assert flops(traced(product, (16, 8), (8, 3)).jaxpr) == 4 * 2 * 16 * 8 * 3

    def test_a_kernel_hides_what_it_computes(self):
        def double(source, result):
            result[...] = 2 * source[...]

        def kernel(x):
            return pallas.pallas_call(double, out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype), interpret=True)(x)

        foreign = jax.ffi.ffi_call("foreign", jax.ShapeDtypeStruct((8,), jnp.float32))
        for hidden in (kernel, foreign, lambda x: jax.lax.cond(x[0] > 0, kernel, lambda x: x, x)):
            assert known_flops(traced(hidden, (8,)).jaxpr) is None
        assert known_flops(traced(lambda x: 2 * x, (8,)).jaxpr) == 8

    @pytest.mark.parametrize(
        ("left", "right", "expected"),
        [
            ("bfloat16", "bfloat16", "bfloat16"),
            ("float32", "float32", "float32"),
            ("bfloat16", "float32", "float32"),
            ("int8", "int8", "int8"),
        ],
    )
    def test_the_dtype_of_products(self, left, right, expected):
        shapes = jax.ShapeDtypeStruct((16, 16), left), jax.ShapeDtypeStruct((16, 16), right)

        def inside(a, b):
            product = jax.jit(lambda a, b: jax.lax.dot_general(a, b, (((1,), (0,)), ((), ()))))
            return jax.lax.scan(lambda total, _: (total + jnp.sum(product(a, b)), None), 0.0, length=3)[0]

        assert product_dtype(jax.make_jaxpr(inside)(*shapes).jaxpr) == expected

    def test_a_product_too_small_to_matter_does_not_mix_the_dtype_and_a_large_one_does(self):
        def step(x, y):
            return x.astype(jnp.bfloat16) @ x.astype(jnp.bfloat16), y @ y, y + 1

        assert product_dtype(traced(step, (64, 64), (4, 4)).jaxpr) == jnp.bfloat16
        assert product_dtype(traced(step, (64, 64), (32, 32)).jaxpr) is None
        assert product_dtype(traced(lambda x: x + 1, (4,)).jaxpr) is None
        images = traced(lambda x, k: convolve(x.astype("bfloat16"), k.astype("bfloat16")), (1, 8, 8, 3), (3, 3, 3, 4))
        assert product_dtype(images.jaxpr) == jnp.bfloat16


class TestHowMany:
    def test_less_work_means_more_steps(self):
        small, large = (traced(lambda a: a @ a, (size, size)) for size in (16, 2048))
        assert FusionPolicy().fusable_steps(small, 100, "cpu") == 128
        assert FusionPolicy().fusable_steps(large, 100, "cpu") == 1
        assert FusionPolicy().fusable_steps(large, 100, "gpu") == 58

    def test_batches_of_one_call_fit_into_memory(self):
        small = traced(lambda a: a @ a, (16, 16))
        assert FusionPolicy().fusable_steps(small, 2**20, "cpu") == 8
        assert FusionPolicy().fusable_steps(small, 2**30, "cpu") == 1

    def test_convolutions_are_slow_in_loops_on_the_cpu_only(self):
        inner = jax.jit(lambda x: jax.lax.conv_general_dilated(x, x, (1,), "SAME"))
        convolution = traced(lambda x: inner(x), (1, 1, 8))
        assert FusionPolicy().fusable_steps(convolution, 100, "cpu") == 1
        assert FusionPolicy().fusable_steps(convolution, 100, "gpu") == 128

    def test_a_traced_function_is_a_function_again(self):
        function = jax.jit(lambda tree, key: {"sum": tree["a"] + tree["b"][0], "key": jax.random.split(key)[1]})
        arguments = {"a": jnp.ones(2), "b": [jnp.arange(2.0)]}, jax.random.key(0)
        found = as_function(function.trace(*arguments))(*arguments)
        assert_same_bits(found, function(*arguments))


def build(**options):
    options = {"settings": config(), **options}
    return Trainer(Busy(), options.pop("settings"), loss_fn=squared_error, rng=jax.random.key(3), **options)


class TestInTrain:
    def run(self, tmp_path, **options):
        trainer = build(workdir=tmp_path, extensions={"size": Counting()}, **options)
        returned = trainer.train(regression(61), 3, 4, regression(9, seed=1), val_interval=7)
        return trainer, returned

    @pytest.mark.parametrize(
        "settings", [{}, pytest.param({"log_frequency": 1}, marks=pytest.mark.slow), {"log_frequency": 5}]
    )
    @pytest.mark.few(1)
    def test_nothing_of_a_run_depends_on_it(self, settings, tmp_path):
        one, returned = self.run(tmp_path / "one", steps_per_call=1, settings=config(**settings))
        for steps_per_call in (2, 5, 1000, "auto"):
            other, found = self.run(
                tmp_path / str(steps_per_call), steps_per_call=steps_per_call, settings=config(**settings)
            )
            assert_same_bits(other.state, one.state)
            assert found == returned
            assert other.history.to_dict() == one.history.to_dict()

    def test_it_is_told_the_same(self, tmp_path):
        def told(steps_per_call):
            spy, calls = Spy(), []
            self.run(
                tmp_path / str(steps_per_call),
                steps_per_call=steps_per_call,
                settings=config(log_frequency=4),
                logger=spy,
                log_callback=lambda step, metrics, prefix: calls.append((step, metrics, prefix)),
            )
            rows = [row for row in spy.rows if isinstance(row[1], dict) and "speed/steps_per_second" not in row[1]]
            return calls, rows

        assert told("auto") == told(1)

    def test_a_call_ends_where_the_host_looks(self, tmp_path):
        calls = []

        class Watching(Callback):
            def on_call_end(self, trainer, step, logs):
                calls.append(step)
                assert trainer.step == step == int(logs["step"].__array__())

        build(workdir=tmp_path, callbacks=[Watching()], save_interval=10).train(
            regression(61), 2, 4, regression(8), val_interval=7
        )
        assert calls == [7, 10, 14, 15, 16, 20, 21, 28, 30, 31, 32]

    def test_who_listens_to_batches_hears_of_every_one(self, tmp_path):
        steps = []

        class Watching(Callback):
            def on_batch_begin(self, trainer, step):
                steps.append(step)

        watched = build(callbacks=[Watching()])
        watched.train(regression(40), 1, 4)
        assert steps == list(range(10))
        fused = build()
        fused.train(regression(40), 1, 4)
        assert_same_bits(watched.state, fused.state)

    def test_advice_comes_once_where_listening_costs_much(self, tmp_path):
        def advice(*callbacks, **options):
            spy = Spy()
            trainer = build(callbacks=callbacks, logger=spy, **options)
            trainer.train(regression(40), 2, 4)
            return [row for row in spy.rows if row[1] == "advice"]

        class Watching(Callback):
            def on_batch_end(self, trainer, step, logs):
                pass

        (row,) = advice(Watching())
        assert row[2].startswith("a step computes so little that 128 could run in one call, many times faster, but")
        assert not advice()
        assert not advice(Watching(), steps_per_call=1)

    def test_weights_and_switches_between_calls_are_obeyed(self, tmp_path):
        def run(steps_per_call):
            extension = Counting()

            class Changing(Callback):
                def on_validation_end(self, trainer, logs):
                    extension.weight *= 0.5
                    extension.enabled = trainer.step % 2 == 0

            trainer = build(callbacks=[Changing()], extensions={"size": extension}, steps_per_call=steps_per_call)
            trainer.train(regression(60), 1, 4, regression(8), val_interval=3)
            return trainer.state

        assert_same_bits(run(1), run(3))

    @pytest.mark.parametrize(
        ("value", "error"),
        [
            (0, ArgumentError),
            (-1, ArgumentError),
            (1.5, ArgumentTypeError),
            ("all", ArgumentTypeError),
            (None, ArgumentTypeError),
            (FusionPolicy, ArgumentTypeError),
        ],
    )
    def test_refusals(self, value, error):
        wanted = r'it must be a positive integer, "auto", or a trainer\.compile\.FusionPolicy'
        with pytest.raises(error, match=rf"`steps_per_call` is .*; {wanted}"):
            build(steps_per_call=value)

    @pytest.mark.parametrize(
        ("limits", "calls"),
        [
            ({}, [10]),
            ({"max_steps": 4}, [4, 8, 10]),
            ({"max_bytes": 3 * 4 * 5 * 4}, [3, 6, 9, 10]),  # three batches of four rows of five float32
            ({"flops_per_call": {"cpu": 1.0}}, list(range(1, 11))),
            ({"slow_in_loops": {"cpu": frozenset({"dot_general"})}}, list(range(1, 11))),
            ({"slow_in_loops": {"gpu": frozenset({"dot_general"})}}, [10]),
        ],
    )
    def test_a_policy_limits_the_steps_of_a_call(self, limits, calls):
        seen = []

        class Watching(Callback):
            def on_call_end(self, trainer, step, logs):
                seen.append(step)

        trainer = build(callbacks=[Watching()], steps_per_call=FusionPolicy(**limits))
        trainer.train(regression(40), 1, 4)
        assert seen == calls

    def test_a_policy_changes_no_result_of_train_or_train_epoch(self):
        states = []
        for steps_per_call in (1, FusionPolicy(max_steps=3)):
            loader = [regression(4, seed=seed) for seed in range(5)]
            trainer = build(train_data_loader=loader, steps_per_call=steps_per_call)
            trainer.train_epoch()
            trainer.train(regression(40), 1, 4)
            states.append(trainer.state)
        assert_same_bits(*states)

    @pytest.mark.parametrize(
        ("limits", "error", "message"),
        [
            ({"max_steps": 0}, ArgumentError, "`max_steps` is 0; it must be a positive integer"),
            (
                {"max_bytes": "8 MB"},
                ArgumentTypeError,
                "`max_bytes` is '8 MB' of type str; it must be a positive integer",
            ),
            (
                {"flops_per_call": 1e9},
                ArgumentTypeError,
                "`flops_per_call` is 1000000000.0; it must be a mapping from pl",
            ),
        ],
    )
    def test_limits_that_cannot_be(self, limits, error, message):
        with pytest.raises(error, match=message):
            FusionPolicy(**limits)

    def test_the_platform_is_that_of_the_state_and_not_the_default(self, monkeypatch):
        class Convolutional(nnx.Module):
            def __init__(self, rngs):
                self.inner = nnx.Conv(1, 2, (3,), rngs=rngs)

            def __call__(self, x):
                return jnp.mean(self.inner(x[..., None]), axis=(1, 2))

        monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
        seen = []

        class Watching(Callback):
            def on_call_end(self, trainer, step, logs):
                seen.append(step)

        for model, calls in ((Convolutional(nnx.Rngs(0)), [1, 2, 3, 4, 5]), (Busy(), [5])):
            Trainer(model, config(), loss_fn=squared_error, callbacks=[Watching()]).train(regression(20), 1, 4)
            assert seen == calls
            seen.clear()

    @pytest.mark.parametrize("steps_per_call", [1, "auto"])
    @pytest.mark.parametrize("options", [{}, {"nonfinite": "skip"}, {"nonfinite": "raise"}, {"precision": "float16"}])
    @pytest.mark.few(5)
    def test_between_two_moments_nothing_is_transferred_but_batches(self, options, steps_per_call, tmp_path):
        """Within an epoch every transfer that is not asked for by name raises, and so does a read."""
        reads = contextlib.ExitStack()

        class Guarding(Callback):
            def on_epoch_begin(self, trainer, epoch):
                reads.enter_context(no_array_is_read())
                jax.config.update("jax_transfer_guard", "disallow")

            def on_call_end(self, trainer, step, logs):
                if step % 11 == 0:
                    reads.close()  # the end of an epoch, with its validation, reads

            def on_epoch_end(self, trainer, epoch, logs):
                jax.config.update("jax_transfer_guard", "allow")

        trainer = build(steps_per_call=steps_per_call, workdir=tmp_path, callbacks=[Guarding()], **options)
        try:
            trainer.train(regression(41), 3, 4, regression(8), val_interval=100)
            assert trainer.step == 33
            with pytest.raises(jax.errors.JaxRuntimeError, match="Disallowed"), jax.transfer_guard("disallow"):
                trainer.train_step(regression(4))  # that the guard would notice
            for read in (float, jax.device_get, lambda leaf: np.asarray(leaf)):
                with pytest.raises(AssertionError, match="an array is read"), no_array_is_read():
                    read(trainer.state.step)
        finally:
            reads.close()
            jax.config.update("jax_transfer_guard", "allow")


class TestPrograms:
    def test_a_changing_shape_is_warned_of_once(self):
        trainer = build()
        for size in (8, 3, 8):
            trainer.train_step(regression(size))
        with pytest.warns(UserWarning, match=r"`train_step` was compiled 3 times: the batch is input: float32\(5"):
            trainer.train_step(regression(5))
        trainer.train_step(regression(6))

    def test_it_names_a_dtype_that_changed(self):
        trainer = build()
        trainer.train_step(regression(8))
        trainer.train_step(regression(4))
        half = {name: column.astype(np.float16) for name, column in regression(8).items()}
        with pytest.warns(UserWarning, match=r"the batch is input: float16\(8, 4\).* and was input: float32\(4, 4\)"):
            trainer.train_step(half)

    def test_compilations_are_told_once(self):
        program = Program(lambda state, batch: (state + batch["x"].sum(), {}), "sum")
        assert program.is_new
        program(jnp.zeros(()), {"x": jnp.ones(2)})
        report = program.report()
        assert report.seconds > 0
        assert report.warning is None
        assert not program.is_new
        program(jnp.zeros(()), {"x": jnp.ones(2)})
        assert program.report() is None


class TestCollections:
    def test_inside_they_are_rare_and_cheap_and_afterwards_as_before(self):
        before, frozen = gc.get_threshold(), gc.get_freeze_count()  # by Python 3.12 itself, hundreds
        with rare_collections():
            assert gc.get_freeze_count() > frozen + 10_000
            assert gc.get_threshold()[0] > before[0]
            cycle = []
            cycle.append(cycle)
        assert gc.isenabled()
        assert gc.get_threshold() == before
        assert gc.get_freeze_count() <= frozen

    def test_what_the_caller_froze_stays_frozen(self):
        gc.freeze()
        try:
            before = gc.get_freeze_count(), gc.get_threshold()
            with rare_collections():
                assert (gc.get_freeze_count(), gc.get_threshold()) == before
            assert (gc.get_freeze_count(), gc.get_threshold()) == before
        finally:
            gc.unfreeze()

    def test_garbage_of_a_long_epoch_is_collected_within_it(self):
        class Cycle:
            alive = 0

            def __init__(self):
                self.me, Cycle.alive = self, Cycle.alive + 1

            def __del__(self):
                Cycle.alive -= 1

        with rare_collections():
            for _ in range(200_000):
                Cycle()
            assert Cycle.alive < 100_000

    def test_a_collector_that_is_off_stays_off(self):
        gc.disable()
        try:
            frozen = gc.get_freeze_count()
            with rare_collections():
                assert gc.get_freeze_count() == frozen
            assert not gc.isenabled()
        finally:
            gc.enable()

    def test_an_exception_restores_it(self):
        before, frozen = gc.get_threshold(), gc.get_freeze_count()
        with pytest.raises(ZeroDivisionError), rare_collections():
            raise ZeroDivisionError
        assert gc.get_threshold() == before
        assert gc.get_freeze_count() <= frozen
