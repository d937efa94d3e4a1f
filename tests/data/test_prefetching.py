"""Batches drawn ahead in a thread: the same numbers, positions of what was trained, and no thread left behind."""

import gc
import itertools
import json
import os
import signal
import threading

import chex
import jax
import numpy as np
import optax
import pytest
from flax import nnx

from tests.distributed.test_start import run
from tests.fit.test_resume import StoppedError
from tests.fit.test_resume_epoch import Positioned, Shuffled, grain_dataset
from tests.marks import slow_unless
from tests.problems import Linear, config, regression, squared_error
from tests.test_batches_of_all_kinds import Reusing, batches_of
from trainer import (
    ArgumentError,
    BatchError,
    Callback,
    CompiledStep,
    Run,
    Trainer,
    TrainingInterrupted,
    TrainState,
    evaluate,
    load_run,
    make_eval_step,
    make_mesh,
    make_train_step,
    open_pass,
    prefetched,
    run_epoch,
    save_run,
)


def threads():
    return [thread for thread in threading.enumerate() if thread.name == "prefetch"]


@pytest.fixture(autouse=True)
def no_thread_is_left():
    yield
    assert threads() == []


def build(loader=None, training_config=None, **arguments):
    settings = training_config or config()
    return Trainer(Linear(), settings, loss_fn=squared_error, train_data_loader=loader, **arguments)


class Counter:
    """Knows how many batches it has drawn; waits for nobody."""

    def __init__(self, length=8):
        self.count, self.length, self.drawn = 0, length, threading.Event()

    def __iter__(self):
        return self

    def __next__(self):
        if self.count == self.length:
            raise StopIteration
        self.count += 1
        if self.count == 3:
            self.drawn.set()
        return {"x": np.full((2, 1), self.count, np.float32)}

    def get_state(self):
        return self.count

    def set_state(self, state):
        self.count = state


def test_the_batches_come_in_order_on_the_device_and_no_more_than_so_many_ahead():
    counter = Counter()
    with prefetched(counter, 2) as ahead:
        first = next(ahead)
        assert counter.drawn.wait(10)
        assert counter.count == 3
        assert isinstance(first["x"], jax.Array)
        assert [float(batch["x"][0, 0]) for batch in (first, *ahead)] == [1, 2, 3, 4, 5, 6, 7, 8]
        with pytest.raises(StopIteration):
            next(ahead)


@pytest.mark.parametrize(
    ("features", "mesh"), slow_unless(lambda *case: case == (5000, None), [(3, None), (5000, None), (3, 4), (5000, 4)])
)
def test_a_reused_buffer_gives_the_numbers_of_fresh_batches(features, mesh):
    def loss_fn(model, batch, rng, step):
        return squared_error(model, {**batch, "input": batch["input"][:, :3]}, rng, step)

    batches = batches_of(regression(16 * 20 + 8, features), 16)
    mesh = mesh and make_mesh({"data": mesh}, devices=jax.devices()[:mesh])
    full = batches[:-1]  # the buffers have one size
    for plain, ahead in ((batches, batches), (full, Reusing(full))):
        trainers = [
            Trainer(Linear(), config(), loss_fn=loss_fn, train_data_loader=loader, mesh=mesh, prefetch=count)
            for loader, count in ((plain, 0), (ahead, 3))
        ]
        assert trainers[0].train_epoch() == trainers[1].train_epoch()
        chex.assert_trees_all_equal(*[trainer.state.params for trainer in trainers])


class Stopping(Callback):
    def __init__(self, at):
        self.at = at

    def on_call_end(self, trainer, step, metrics):
        if step == self.at:
            trainer.save_checkpoint("at.msgpack")
            raise StoppedError


KINDS = {"iterator": Positioned, "torchdata": Shuffled, "Grain": grain_dataset}
FAST = [("iterator", None, 3), ("torchdata", "batch", 4), ("Grain", None, 6)]


@pytest.mark.parametrize(
    ("kind", "pad_to", "at"),
    slow_unless(lambda *case: case in FAST, list(itertools.product(KINDS, (None, "batch"), (1, 3, 4, 6)))),
)
def test_a_run_resumes_after_the_batch_that_was_trained(kind, pad_to, at, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def loss_fn(model, batch, rng, step):
        losses = optax.squared_error(model(batch["input"]), batch["target"])
        mask = batch.get("mask", np.ones(len(losses)))
        return (losses * mask).sum() / mask.sum(), {"batch_weight": mask.sum()}

    def run(prefetch, callbacks=(), **arguments):
        bound = {"steps_per_epoch": 4} if kind == "iterator" else {}
        loader = Positioned(None) if kind == "iterator" else KINDS[kind]()
        trainer = Trainer(
            Linear(4), config(**bound), loss_fn=loss_fn, prefetch=prefetch, callbacks=callbacks, pad_to=pad_to
        )
        trainer.train(loader, num_epochs=2, batch_size=4, **arguments)
        return trainer

    expected = run(0)
    with pytest.raises(StoppedError):
        run(3, [Stopping(at)])
    assert threads() == []
    for prefetch in (0, 2):
        resumed = run(prefetch, resume="at.msgpack")
        assert resumed.step == expected.step == 8
        chex.assert_trees_all_equal(resumed.state.params, expected.state.params)


def test_positions_of_a_loop_of_ones_own(tmp_path):
    optimizer = optax.sgd(0.1)
    step = CompiledStep(make_train_step(lambda model, batch, rng, step: (model(batch["x"]).mean(), {}), optimizer))

    def start():
        model = nnx.Linear(1, 1, rngs=nnx.Rngs(0))
        return Run.start(TrainState.create(model, optimizer, rng=jax.random.key(0)))

    run, batches = open_pass(start(), Counter())
    with prefetched(batches, 3) as ahead:
        for tick in run_epoch(step, run, ahead):
            run = tick.run
            if run.step == 2:
                break
    save_run(tmp_path / "run.msgpack", run)
    restored, batches = open_pass(load_run(tmp_path / "run.msgpack", start()), Counter())
    assert float(next(batches)["x"][0, 0]) == 3
    assert restored.step == 2


@pytest.mark.parametrize("prefetch", [0, 2])
def test_what_a_loader_raises_is_raised_at_its_batch(prefetch):
    batch = regression(8, 3)

    def loader():
        yield batch
        yield batch
        raise OSError("record 17 of shard-3 is truncated")

    trainer = build(loader, prefetch=prefetch)
    with pytest.raises(OSError, match="record 17") as caught:
        trainer.train_epoch()
    assert trainer.step == 2
    note = "raised by `train_data_loader` in place of batch 2 of its pass (the first is batch 0)"
    assert note in caught.value.__notes__


def test_a_batch_that_cannot_be_used_is_located():
    batch = regression(8, 3)
    trainer = build([batch, {**batch, "target": np.array(["a"] * 8)}, batch], prefetch=2)
    with pytest.raises(BatchError, match="`batch/target` has dtype <U1") as caught:
        trainer.train_epoch()
    assert trainer.step == 1
    assert caught.value.__notes__ == ["raised for batch 1, the first being batch 0"]


def test_an_error_stays_the_error_and_a_closed_iterator_is_over():
    def failing():
        yield np.ones((2, 1))
        raise RuntimeError("no more")

    ahead = prefetched(failing())
    next(ahead)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="no more"):
            next(ahead)
    ahead = prefetched(Counter(10**9))
    next(ahead)
    ahead.close()
    assert list(ahead) == []


def test_an_iterator_that_is_dropped_ends_its_thread():
    next(prefetched(Counter(10**9)))
    gc.collect()
    for thread in threads():
        thread.join(10)
    assert threads() == []


def test_the_threads_settings_are_those_of_the_caller():
    with jax.enable_x64(True), jax.default_device(jax.devices()[1]), prefetched([np.ones((2, 1))], 1) as ahead:
        (batch,) = ahead
    assert batch.dtype == np.float64
    assert batch.devices() == {jax.devices()[1]}


def test_evaluations_draw_ahead_too():
    batches = batches_of(regression(40, 3), 16)
    state = TrainState.create(Linear(), optax.sgd(0.1), rng=jax.random.key(0))
    step = jax.jit(make_eval_step(squared_error))
    with prefetched(batches) as ahead:
        assert evaluate(step, state, ahead) == evaluate(step, state, batches)


def test_a_bounded_pass_draws_no_batch_of_the_next():
    counter = Counter(100)
    example = regression(8, 3)
    batches = (example for _ in counter)
    trainer = Trainer(Linear(), config(steps_per_epoch=3), loss_fn=squared_error, train_data_loader=batches, prefetch=5)
    trainer.train_epoch()
    assert counter.count == 3
    trainer.train_epoch()
    assert counter.count == 6


class Validations(Callback):
    """Keeps the averages of each validation, and the threads that it left."""

    def __init__(self):
        self.averages, self.left = [], []

    def on_validation_end(self, trainer, logs):
        self.averages.append(logs)
        self.left.extend(threads())


def masked_error(model, batch, rng, step):
    losses, weight = optax.squared_error(model(batch["input"]), batch["target"]), batch["mask"].sum()
    return (losses * batch["mask"]).sum() / weight, {"batch_weight": weight}


def validated(batches, prefetch, **arguments):
    """Returns the averages of validations over a loader that fills one buffer again and again."""
    seen, drawn_by = Validations(), set()

    def held_out():
        buffer = {name: column.copy() for name, column in batches[0].items()}
        for batch in batches[:-1]:
            drawn_by.add(threading.current_thread().name)
            for name, column in buffer.items():
                column[:] = batch[name]
            yield buffer
        yield batches[-1]

    trainer = Trainer(
        Linear(),
        config(batch_size=16),
        loss_fn=masked_error if arguments.get("pad_to") else squared_error,
        train_data_loader=batches,
        val_data_loader=held_out,
        prefetch=prefetch,
        callbacks=[seen],
        **arguments,
    )
    trainer.train(regression(32, 3), 2, 16, held_out, val_interval=1)
    trainer.train_epoch()
    assert seen.left == []
    assert drawn_by == {"prefetch" if prefetch else threading.main_thread().name}
    return seen.averages


@pytest.mark.parametrize(
    ("mesh", "pad_to"),
    slow_unless(
        lambda *case: case in [(None, None), (8, "batch")], list(itertools.product((None, 8), (None, "batch")))
    ),
)
def test_validations_draw_ahead_and_give_the_same_numbers(mesh, pad_to):
    batches, mesh = batches_of(regression(16 * 5 + 6, 3), 16), mesh and make_mesh({"data": mesh})
    plain, ahead = (validated(batches, prefetch, mesh=mesh, pad_to=pad_to) for prefetch in (0, 2))
    assert len(plain) == 5
    assert plain == ahead


PROCESSES = """
from tests.data.test_prefetching import batches_of, regression, validated
from trainer import make_mesh

parts = batches_of(regression(16 * 5 + 6, 3, seed=process), 16)
print(json.dumps([validated(parts, prefetch, mesh=make_mesh({"data": 4}), pad_to="batch") for prefetch in (0, 2)]))
"""


@pytest.mark.slow
def test_processes_that_draw_ahead_validate_on_the_same():
    results = run(PROCESSES, 2, devices=2)
    assert [status for status, _, _ in results] == [0, 0], results
    (plain, ahead), other = (json.loads(out.splitlines()[-1]) for _, out, _ in results)
    assert plain == ahead
    assert other == [plain, ahead]
    assert plain[-1]["batch_weight"] == 2 * 86


def test_a_validation_draws_no_batch_after_its_bound():
    counter, example = Counter(10**9), regression(8, 3)
    batches = (example for _ in counter)
    trainer = build([example], training_config=config(validation_steps=3), val_data_loader=batches, prefetch=5)
    for total in (3, 6):
        trainer.train_epoch()
        assert counter.count == total


@pytest.mark.parametrize("way", ["signal", "objective"])
def test_a_validation_that_is_ended_draws_no_further(way, tmp_path):
    counter, example = Counter(10**9), regression(8, 3)

    def endless():
        for _ in counter:
            if counter.count == 3 and way == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            yield example if counter.count < 3 or way == "signal" else {"other": example["input"]}

    trainer = build([example], val_data_loader=endless, prefetch=2, workdir=tmp_path)
    with pytest.raises(TrainingInterrupted if way == "signal" else KeyError):
        trainer.train_epoch()
    assert threads() == []
    assert trainer.step == 1
    assert counter.count <= 3 + 2  # the batch that ended it was taken, and two may have been drawn ahead


@pytest.mark.parametrize("prefetch", [0, 2])
def test_what_a_validation_loader_raises_names_its_batch(prefetch):
    batch = regression(8, 3)

    def failing():
        yield batch
        raise OSError("record 17 of shard-3 is truncated")

    trainer = build([batch], val_data_loader=failing, prefetch=prefetch)
    with pytest.raises(OSError, match="record 17") as caught:
        trainer.train_epoch()
    note = "raised by `val_data_loader` in place of batch 1 of its pass (the first is batch 0)"
    assert note in caught.value.__notes__
    wrong = {**batch, "target": np.array(["a"] * 8)}
    trainer = build([batch], val_data_loader=[batch, batch, wrong], prefetch=prefetch)
    with pytest.raises(BatchError, match="`batch/target` has dtype <U1") as caught:
        trainer.train_epoch()
    assert "raised for batch 2, the first being batch 0" in caught.value.__notes__


@pytest.mark.parametrize("prefetch", [-1, 1.5, True, "2"])
def test_what_is_no_count_is_refused(prefetch):
    with pytest.raises(ArgumentError, match=r"^`prefetch` is .*; it must be an integer of at least 0"):
        build(prefetch=prefetch)
    with pytest.raises(ArgumentError, match=r"^`count` is "):
        prefetched([], prefetch)
