"""The loop without a `Trainer`: exact resume after SIGKILL, signals, saves, averages; and a loader in `train`."""

import itertools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from tests.problems import Busy, config, regression, squared_error
from tests.test_api import Recorder, assert_same_bits, build
from trainer import (
    ArgumentTypeError,
    BatchError,
    Callback,
    Checkpointer,
    CompiledStep,
    EarlyStopping,
    InMemoryData,
    Meter,
    Run,
    SchedulerConfig,
    Signals,
    TrainingInterrupted,
    TrainState,
    WeightedAverage,
    evaluate,
    latest_checkpoint,
    load_run,
    make_eval_step,
    make_train_step,
    open_pass,
    run_epoch,
)

ROOT = Path(__file__).parents[1]
EPOCHS, EVERY = 4, 5


def own_loop(directory, loader=None, each=lambda run: None):
    """The loop of the README, over data in memory or over a loader."""
    optimizer = optax.adam(1e-2)
    state = TrainState.create(Busy(), optimizer, rng=jax.random.key(3))
    step, eval_step = CompiledStep(make_train_step(squared_error, optimizer)), jax.jit(make_eval_step(squared_error))
    examples, held_out = InMemoryData(regression(58), 4), InMemoryData(regression(10, seed=1), 4)
    with Checkpointer(directory) as checkpoints, Signals() as signals:
        run = checkpoints.resume(Run.start(state))
        for epoch in range(run.epoch, EPOCHS):
            run, meter = run.begin_epoch(), Meter(None)
            batches = examples.shuffled((0,), epoch, skip=run.batch)
            if loader is not None:
                run, batches = open_pass(run, loader)
            for tick in run_epoch(step, run, batches, sync_every=[EVERY], meter=meter):
                run = tick.run.recorded({"loss": tick.run.metrics["loss"]})
                tick.run = run
                if run.step % EVERY == 0 or signals.received:
                    checkpoints.save(run, background=True)
                each(run)
                signals.check()
            run = run.validated(evaluate(eval_step, run.state, held_out.in_order())).end_epoch()
        checkpoints.save(run)
    return run


def assert_same_run(run, expected):
    assert_same_bits(run.state, expected.state)
    assert run.history.to_dict() == expected.history.to_dict()
    assert run.average.compute() == expected.average.compute()
    assert (run.step, run.epoch, run.validation) == (expected.step, expected.epoch, expected.validation)


@pytest.fixture(scope="module")
def never_interrupted(tmp_path_factory):
    return own_loop(tmp_path_factory.mktemp("whole"))


CHILD = """
import sys, json
import jax
jax.config.update("jax_compilation_cache_dir", sys.argv[2])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
from tests.test_loop import own_loop
print("ready", flush=True)
sys.stdin.readline()
own_loop(sys.argv[1], each=lambda run: print(run.step, flush=True))
"""


def child(directory, cache):
    command = [sys.executable, "-W", "ignore", "-c", CHILD, str(directory), str(cache)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.slow
def test_killed_at_random_instants_it_ends_with_the_same_bits(seed, tmp_path, never_interrupted):
    draw, directory = random.Random(seed), tmp_path / "run"
    kills = 0
    while True:
        process = child(directory, tmp_path / "cache")
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("\n")
        process.stdin.flush()
        if kills < 3:
            # Some steps, and then any instant: in a step, in a save, between two.
            for _ in itertools.islice(process.stdout, draw.randint(1, 4)):
                pass
            time.sleep(draw.random() * 0.05)
            process.send_signal(signal.SIGKILL)
        process.communicate(timeout=300)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL
        kills += 1
    assert kills >= 1
    path = latest_checkpoint(directory)
    optimizer = optax.adam(1e-2)
    like = Run.start(TrainState.create(Busy(), optimizer, rng=jax.random.key(0)))
    assert_same_run(load_run(path, like), never_interrupted)


class Shuffled:
    """A loader of which every pass has another order; its iterators know where they are."""

    def __init__(self):
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return Pass(self)


class Pass:
    def __init__(self, loader):
        self.loader, self.next = loader, 0

    def __iter__(self):
        return self

    def __next__(self):
        if self.next == 14:
            raise StopIteration
        index = np.random.default_rng(self.loader.passes).permutation(14)[self.next]
        self.next += 1
        return {name: column[4 * index : 4 * index + 4] for name, column in regression(56).items()}

    def get_state(self):
        return {"passes": self.loader.passes, "next": self.next}

    def set_state(self, state):
        self.loader.passes, self.next = state["passes"], state["next"]


class FailedError(Exception):
    pass


@pytest.mark.parametrize("kind", ["memory", "loader"])
@pytest.mark.few(1)
def test_after_a_failure_it_resumes_to_the_same_bits(kind, tmp_path):
    make = Shuffled if kind == "loader" else lambda: None
    expected = own_loop(tmp_path / "whole", make())

    def failing_at(step):
        def each(run):
            if run.step >= step:
                raise FailedError

        return each

    for step in (6, 16, 33):
        with pytest.raises(FailedError):
            own_loop(tmp_path / "part", make(), failing_at(step))
    assert_same_run(own_loop(tmp_path / "part", make()), expected)


def test_a_signal_is_obeyed_when_the_run_is_whole_and_saved(tmp_path, never_interrupted):
    def each(run):
        if run.step == 15:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(TrainingInterrupted):
        own_loop(tmp_path, each=each)
    assert_same_run(own_loop(tmp_path), never_interrupted)


def test_the_loop_equals_steps_by_hand():
    optimizer = optax.adam(1e-2)
    state = TrainState.create(Busy(), optimizer, rng=jax.random.key(3))
    step = jax.jit(make_train_step(squared_error, optimizer))
    average, by_hand = WeightedAverage(), state
    data = InMemoryData(regression(58), 4)
    for batch in data.shuffled((0,), 0):
        by_hand, metrics = step(by_hand, batch)
        average.add(metrics, len(batch["input"]))
    run = Run.start(state.copy())
    counts = []
    for tick in run_epoch(CompiledStep(make_train_step(squared_error, optimizer)), run, data.shuffled((0,), 0)):
        run = tick.run
        counts.append(tick.steps)
    assert_same_bits(run.state, by_hand)
    assert run.average.compute() == average.compute()
    assert counts == [14, 1]  # the full batches in one call, and the short last one


def test_calls_end_where_the_host_needs_the_state():
    optimizer = optax.sgd(0.1)
    run = Run.start(TrainState.create(Busy(), optimizer, rng=jax.random.key(0)))
    step = CompiledStep(make_train_step(squared_error, optimizer))
    steps = []
    for tick in run_epoch(step, run, InMemoryData(regression(64), 4).shuffled((0,), 0), sync_every=[6, 4]):
        run = tick.run
        steps.append(run.step)
    assert steps == [4, 6, 8, 12, 16]


def test_another_run_can_be_put_in_place_of_a_tick():
    optimizer = optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    run = Run.start(TrainState.create(Busy(), optimizer, rng=jax.random.key(0)))
    step = CompiledStep(make_train_step(squared_error, optimizer))
    kernels = []
    for tick in run_epoch(step, run, [regression(8, seed=seed) for seed in range(4)]):
        run = tick.run
        kernels.append(np.asarray(run.peek().params["inner"]["kernel"]))
        if run.step == 2:
            run.state.opt_state.hyperparams["learning_rate"] = 0.0
    assert (kernels[0] != kernels[1]).any()
    np.testing.assert_array_equal(kernels[1], kernels[3])


def test_a_batch_that_cannot_be_used_leaves_the_run_of_the_latest_tick():
    optimizer = optax.sgd(0.1)
    run = Run.start(TrainState.create(Busy(), optimizer, rng=jax.random.key(0)))
    step = CompiledStep(make_train_step(squared_error, optimizer))
    ticks = run_epoch(step, run, [regression(8), {"input": "nothing"}])
    run = next(ticks).run
    with pytest.raises(BatchError):
        next(ticks)
    assert run.step == 1
    run.state.check_alive()


class TestTrainOverALoader:
    batches = tuple(regression(8, seed=seed) for seed in range(5))

    def test_it_equals_epochs_of_train_epoch(self):
        one, other = build(), build(train_data_loader=list(self.batches), val_data_loader=[regression(8, seed=9)])
        returned = one.train(list(self.batches), 3, 8, [regression(8, seed=9)])
        averages = [other.train_epoch() for _ in range(3)]
        assert_same_bits(one.state, other.state)
        assert returned == {name.removeprefix("val_"): v for name, v in averages[-1].items() if name.startswith("val_")}
        assert one.history.series("val_loss") == other.history.series("val_loss")

    def test_the_events_are_those_of_data_in_memory(self):
        memory, loader = Recorder(), Recorder()
        data = regression(24)
        build(callbacks=[memory]).train(data, 2, 8, regression(8), val_interval=2)
        batches = [{name: column[i : i + 8] for name, column in data.items()} for i in (0, 8, 16)]
        build(callbacks=[loader]).train(batches, 2, 8, regression(8), val_interval=2)
        assert memory.names == loader.names

    def test_a_callable_is_called_with_the_batch_size(self):
        sizes = []

        def make(batch_size):
            sizes.append(batch_size)
            return iter(self.batches)

        trainer = build()
        trainer.train(make, 2, 8)
        assert (sizes, trainer.step, trainer.epoch) == ([8, 8], 10, 2)

    def test_it_resumes_to_the_same_bits(self, tmp_path):
        class Fails(Callback):
            def on_batch_begin(self, trainer, step):
                if step == 8:
                    raise FailedError

        whole = build(tmp_path / "whole")
        returned = whole.train(Shuffled(), 2, 4, regression(8), 5)
        with pytest.raises(FailedError):
            build(tmp_path / "part", callbacks=[Fails()], save_interval=3).train(Shuffled(), 2, 4, regression(8), 5)
        resumed = build(tmp_path / "part")
        assert resumed.train(Shuffled(), 2, 4, regression(8), 5, resume=True) == returned
        assert_same_bits(resumed.state, whole.state)
        assert resumed.history.to_dict() == whole.history.to_dict()


class TestTrainEpochIsARun:
    def test_early_stopping_counts_over_epochs(self):
        stopping = EarlyStopping(monitor="val_loss", patience=2, min_delta=1e9)
        trainer = build(train_data_loader=[regression(8)], val_data_loader=[regression(8)], callbacks=[stopping])
        while trainer.epoch < 9 and not trainer.should_stop:
            trainer.train_epoch()
        assert trainer.epoch == 3  # the first is the best, two do not improve

    def test_a_signal_ends_it_in_order(self, tmp_path):
        class Sends(Callback):
            def on_batch_end(self, trainer, step, logs):
                if step == 3:
                    os.kill(os.getpid(), signal.SIGTERM)

        recorder, loader = Recorder(), [regression(8, seed=seed) for seed in range(5)]
        trainer = build(tmp_path, train_data_loader=loader, callbacks=[Sends(), recorder])
        with pytest.raises(TrainingInterrupted) as caught:
            trainer.train_epoch()
        assert caught.value.path == tmp_path / "checkpoint_3.msgpack"
        assert recorder.names[-1] == "on_train_end"
        whole = build(train_data_loader=loader)
        whole.train_epoch()
        resumed = build(tmp_path, train_data_loader=loader)
        with pytest.warns(UserWarning, match="cannot be set to a position"):
            resumed.train_epoch(resume=True)
        assert_same_bits(resumed.state, whole.state)

    def test_several_failures_at_the_end_are_all_raised(self):
        class Fails(Callback):
            def __init__(self, error):
                self.error = error

            def on_train_end(self, trainer):
                raise self.error

        trainer = build(train_data_loader=[regression(8)], callbacks=[Fails(OSError("a")), Fails(KeyError("b"))])
        with pytest.raises(ExceptionGroup) as caught:
            trainer.train_epoch()
        assert [type(error) for error in caught.value.exceptions] == [OSError, KeyError]


class TestHorizon:
    def test_a_longer_run_compiles_nothing_and_says_that_the_rate_jumps(self, compilations):
        settings = config(scheduler=SchedulerConfig(scheduler_type="cosine"))
        trainer = build(settings=settings)
        trainer.train(regression(16), 1, 8)
        for end in (4, 6):
            with pytest.warns(
                UserWarning, match=rf"learning-rate schedule 'cosine' moves from step {end - 2} to step {end}"
            ):
                trainer.train(regression(16), 1, 8)
        assert sum(compilations.get(f"jit({name})", 0) for name in ("train_step", "train_steps")) == 1

    def test_the_state_is_that_of_a_fixed_horizon(self):
        moving = build(settings=config(scheduler=SchedulerConfig(scheduler_type="cosine", warmup_steps=2)))
        fixed = build(
            settings=config(scheduler=SchedulerConfig(scheduler_type="cosine", warmup_steps=2, total_steps=6))
        )
        moving.train(regression(24), 2, 8)
        fixed.train(regression(24), 2, 8)
        for one, other in zip(jax.tree.leaves(moving.state), jax.tree.leaves(fixed.state), strict=True):
            if jnp.issubdtype(one.dtype, jnp.floating):
                np.testing.assert_allclose(one, other, rtol=2e-6, atol=1e-7)


def test_a_step_that_is_not_compiled_by_us_is_refused_with_what_to_pass():
    state = TrainState.create(Busy(), optax.sgd(0.1), rng=jax.random.key(0))
    step = jax.jit(make_train_step(squared_error, optax.sgd(0.1)))
    with pytest.raises(ArgumentTypeError, match=r"of type PjitFunction; it must be a trainer\.CompiledStep"):
        next(iter(run_epoch(step, Run.start(state), [regression(8)])))
