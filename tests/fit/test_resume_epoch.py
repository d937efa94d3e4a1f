"""`train_epoch` over a loader of the caller's, interrupted anywhere and resumed, is one that never was interrupted."""

import contextlib
import itertools
import random

import grain
import jax
import numpy as np
import pytest
from flax import nnx

from tests.fit.test_resume import StoppedError, Watching
from tests.marks import slow_unless
from tests.problems import Busy, Counting, config, regression, squared_error
from tests.test_api import assert_same_bits
from trainer import ArgumentError, Callback, CheckpointError, Trainer

EXAMPLES, BATCH, EPOCHS = 14, 4, 3  # 4 steps an epoch, the last on two examples
STEPS = 12
DATA = regression(EXAMPLES)


def batch_of(indices):
    return {name: column[indices] for name, column in DATA.items()}


class Positioned:
    """An iterator that knows where it is, in values of every kind that a checkpoint holds."""

    def __init__(self, limit=EXAMPLES, state=0):
        self.limit, self.state = limit, {"next": np.int64(state), "more": {"of": [(1, b"x", None)], 7: 2**100}}

    def __iter__(self):
        return self

    def __next__(self):
        start = int(self.state["next"])
        if self.limit is not None and start >= self.limit:
            raise StopIteration
        self.state["next"] += BATCH  # in place: whoever kept a reference sees it move
        indices = np.arange(start, start + BATCH)
        return batch_of(indices[indices < EXAMPLES] if self.limit == EXAMPLES else indices % EXAMPLES)

    def get_state(self):
        return self.state

    def set_state(self, state):
        assert type(state["next"]) is np.int64
        assert state["more"] == {"of": [(1, b"x", None)], 7: 2**100}
        self.state = state


class MakesPositioned:
    """Makes a new iterator for every pass; only that one knows where it is."""

    def __iter__(self):
        return Positioned()


class Shuffled:
    """Knows where it is by itself, as a loader of torchdata: what is loaded is for the next pass.

    Its generator goes on from pass to pass. Set to the end of a pass, it begins the next one.
    """

    def __init__(self):
        self.rng = np.random.default_rng(5)
        self.position = None

    def __iter__(self):
        if self.position is None or self.position["finished"]:
            self.position = {"rng": self.rng.bit_generator.state, "index": 0, "finished": False}
        position = self.position
        self.rng.bit_generator.state = position["rng"]
        order = self.rng.permutation(EXAMPLES)
        while position["index"] < EXAMPLES:
            start, position["index"] = position["index"], position["index"] + BATCH
            yield batch_of(order[start : start + BATCH])
        position["finished"] = True

    def state_dict(self):
        return {"position": self.position, "rng": self.rng.bit_generator.state}

    def load_state_dict(self, state):
        self.position, self.rng.bit_generator.state = state["position"], state["rng"]


class Plain:
    """Knows where it is by itself; set to the end of a pass it has nothing left, and then starts again."""

    def __init__(self):
        self.index = 0

    def __iter__(self):
        while self.index < EXAMPLES:
            self.index += BATCH
            yield batch_of(slice(self.index - BATCH, self.index))
        self.index = 0

    def get_state(self):
        return self.index

    def set_state(self, state):
        self.index = state


class Rows(grain.sources.RandomAccessDataSource):
    def __len__(self):
        return EXAMPLES

    def __getitem__(self, index):
        return batch_of(index)

    def __repr__(self):
        return "Rows()"


def grain_map():
    return grain.MapDataset.source(Rows()).shuffle(seed=3).batch(BATCH)


def grain_dataset():
    return grain_map().to_iter_dataset()


def grain_endless():
    endless = grain.MapDataset.source(Rows()).seed(3).shuffle().repeat().batch(BATCH)
    return iter(endless.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)))


def grain_loader():
    sampler = grain.samplers.IndexSampler(EXAMPLES, shuffle=True, seed=3, num_epochs=1)
    return grain.DataLoader(
        data_source=Rows(), sampler=sampler, operations=[grain.transforms.Batch(BATCH)], worker_count=0
    )


def datarax_pipelines():
    from datarax.pipeline.pipeline import Pipeline
    from datarax.sources import MemorySource, MemorySourceConfig

    def make():
        source = MemorySource(MemorySourceConfig(shuffle=True), dict(DATA), rngs=nnx.Rngs(1))
        return Pipeline(source=source, stages=[], batch_size=BATCH, rngs=nnx.Rngs(2))

    return make  # a pipeline of datarax 0.1 yields one pass in its life


def generator_function():
    for start in range(0, EXAMPLES, BATCH):
        yield batch_of(slice(start, start + BATCH))


def shuffled_by_epoch(epoch):
    order = np.random.default_rng(epoch).permutation(EXAMPLES)
    return [batch_of(order[start : start + BATCH]) for start in range(0, EXAMPLES, BATCH)]


KNOWING = {
    "makes an iterator": MakesPositioned,
    "is an endless iterator": lambda: Positioned(limit=None),
    "is an iterator over all": lambda: Positioned(limit=STEPS * BATCH),
    "goes on from pass to pass": Shuffled,
    "starts again": Plain,
    "a callable that makes one": lambda: Shuffled,
    "grain map": grain_map,
    "grain dataset": grain_dataset,
    "grain endless": grain_endless,
    "grain loader": grain_loader,
    "datarax": datarax_pipelines,
}
OTHERS = {
    "list": lambda: list(generator_function()),
    "generator function": lambda: generator_function,
    "function of the epoch": lambda: shuffled_by_epoch,
    "callable with size": lambda: (
        lambda batch_size: [batch_of(slice(i, i + batch_size)) for i in range(0, EXAMPLES, batch_size)]
    ),
}
LOADERS = KNOWING | OTHERS
LIMITED = {"is an endless iterator", "is an iterator over all", "grain endless"}


class Saver(Callback):
    """Saves at one event, under a name that tells when."""

    def __init__(self, event, directory):
        self.saved = []

        def save(trainer, *about):
            del about
            self.saved.append((trainer.step, trainer.save_checkpoint(directory / f"{len(self.saved)}.msgpack")))

        setattr(self, event, save)


def build(directory, loader, *, kind="", save_frequency=1, callbacks=(), batch_size=BATCH, **changes):
    settings = config(
        batch_size=batch_size,
        log_frequency=3,
        save_frequency=save_frequency,
        max_checkpoints=100,
        steps_per_epoch=4 if kind in LIMITED else None,
        **changes,
    )
    watching = Watching()
    trainer = Trainer(
        Busy(),
        settings,
        loss_fn=squared_error,
        train_data_loader=loader,
        val_data_loader=[regression(6, seed=1)],
        workdir=directory,
        rng=jax.random.key(3),
        callbacks=[watching, *callbacks],
        extensions={"size": Counting()},
    )
    return trainer, watching


def run(trainer, epochs=EPOCHS, **options):
    returned = []
    while trainer.epoch < epochs:
        returned.append(trainer.train_epoch(**options))
    return returned


def assert_same_end(trainer, watching, expected, expected_watching):
    assert_same_bits(trainer.state, expected.state)
    assert trainer.history.to_dict() == expected.history.to_dict()
    assert (trainer.epoch, trainer.step) == (EPOCHS, STEPS)
    assert (watching.batches, watching.epochs) == (expected_watching.batches, expected_watching.epochs)


@contextlib.contextmanager
def warned_of_drawing_again(expected, loader="`train_data_loader`"):
    if not expected:
        yield
        return
    with pytest.warns(UserWarning, match=rf"{loader} cannot be set to a position .* so the {expected} batches") as all_:
        yield
    assert len(all_) == 1


# In the midst of an epoch and at its end; the others are like these.
TELLING = (2, 4)


@pytest.mark.parametrize(
    "steps", [TELLING, pytest.param(sorted(set(range(1, STEPS + 1)) - set(TELLING)), marks=pytest.mark.slow)], ids=str
)
@pytest.mark.parametrize("kind", LOADERS)
@pytest.mark.few(1)
def test_resuming_from_every_step(kind, steps, tmp_path):
    expected, expected_watching = build(tmp_path, LOADERS[kind](), kind=kind)
    expected_returned = run(expected)
    for k in steps:
        trainer, watching = build(tmp_path / "unused", LOADERS[kind](), kind=kind, save_frequency=1000)
        finished = (k - 1) % 4 + 1
        with warned_of_drawing_again(finished if kind in OTHERS else 0):
            returned = [trainer.train_epoch(resume=tmp_path / f"checkpoint_{k}.msgpack")]
        returned += run(trainer)
        assert returned == expected_returned[-len(returned) :]
        assert_same_end(trainer, watching, expected, expected_watching)


EVENTS = [
    "on_epoch_begin",
    "on_batch_begin",
    "on_batch_end",
    "on_validation_begin",
    "on_validation_end",
    "on_epoch_end",
]


@pytest.mark.parametrize(
    ("event", "kind"),
    slow_unless(
        lambda event, kind: (
            kind == "makes an iterator" or (event == "on_epoch_end" and kind in ("starts again", "list"))
        ),
        itertools.product(
            EVENTS,
            [
                "makes an iterator",
                "is an endless iterator",
                "goes on from pass to pass",
                "starts again",
                "grain dataset",
                "list",
            ],
        ),
    ),
)
@pytest.mark.filterwarnings("ignore:`train_data_loader` cannot be set to a position")
@pytest.mark.few(1)
def test_resuming_from_what_a_callback_saved(event, kind, tmp_path):
    saver = Saver(event, tmp_path)
    expected, expected_watching = build(tmp_path, LOADERS[kind](), kind=kind, save_frequency=1000, callbacks=[saver])
    expected_returned = run(expected)
    assert len(saver.saved) == (STEPS if "batch" in event else EPOCHS)
    for _, path in saver.saved:
        trainer, watching = build(tmp_path, LOADERS[kind](), kind=kind, save_frequency=1000)
        returned = [trainer.train_epoch(resume=path), *run(trainer)]
        assert returned == expected_returned[-len(returned) :]
        assert_same_end(trainer, watching, expected, expected_watching)


@pytest.mark.parametrize(
    "kind",
    slow_unless(
        {"goes on from pass to pass", "grain dataset", "list"}.__contains__,
        sorted(set(LOADERS) - {"datarax"}),
    ),
)
@pytest.mark.filterwarnings("ignore:`train_data_loader` cannot be set to a position")
@pytest.mark.few(1)
def test_interrupted_again_and_again_in_the_loop_of_the_docstring(kind, tmp_path):
    expected, expected_watching = build(tmp_path / "whole", LOADERS[kind](), kind=kind)
    run(expected)
    for stop_at in (1, 1, 6, 8, 11, None):
        trainer, watching = build(tmp_path, LOADERS[kind](), kind=kind, save_frequency=2)
        watching.stop_at = stop_at
        with contextlib.nullcontext() if stop_at is None else pytest.raises(StoppedError):
            run(trainer, resume=True)
    assert_same_end(trainer, watching, expected, expected_watching)


@pytest.mark.parametrize(
    "kind",
    slow_unless(
        {"starts again", "is an endless iterator"}.__contains__,
        ["makes an iterator", "goes on from pass to pass", "starts again", "is an endless iterator", "list"],
    ),
)
def test_a_run_that_was_saved_between_two_epochs_returns_the_one_and_goes_on_with_the_other(kind, tmp_path):
    expected, expected_watching = build(tmp_path, LOADERS[kind](), kind=kind, save_frequency=1000)
    first = expected.train_epoch()
    path = expected.save_checkpoint()
    run(expected)
    # Also when it is saved again before it went on.
    for again in (False, True):
        trainer, watching = build(tmp_path, LOADERS[kind](), kind=kind, save_frequency=1000)
        assert trainer.train_epoch(resume=path) == first
        assert (trainer.epoch, trainer.step) == (1, 4)
        if again:
            path = trainer.save_checkpoint(tmp_path / "again.msgpack")
            trainer, watching = build(tmp_path, LOADERS[kind](), kind=kind, save_frequency=1000)
            assert trainer.train_epoch(resume=path) == first
        run(trainer)
        assert_same_end(trainer, watching, expected, expected_watching)


def test_a_position_is_asked_for_where_it_is_saved_and_at_the_start_only(tmp_path):
    class Slow(Positioned):
        asked = 0

        def get_state(self):
            Slow.asked += 1
            return super().get_state()

    class MakesSlow:
        def __iter__(self):
            return Slow()

    trainer, _ = build(tmp_path, MakesSlow(), save_frequency=3)
    trainer.train_epoch()
    assert Slow.asked == 3  # at the start, after three batches, and at the end


def test_an_epoch_whose_validation_failed_is_not_finished(tmp_path):
    class Fails(Callback):
        fails = True

        def on_validation_begin(self, trainer):
            if self.fails:
                raise StoppedError

    expected, expected_watching = build(tmp_path / "whole", MakesPositioned(), callbacks=[Callback()])
    run(expected)
    fails = Fails()
    trainer, watching = build(tmp_path, MakesPositioned(), callbacks=[fails])
    with pytest.raises(StoppedError):
        run(trainer, resume=True)
    fails.fails = False
    run(trainer, resume=True)
    assert_same_end(trainer, watching, expected, expected_watching)


def test_where_the_start_of_a_pass_is_unknown_nothing_is_saved_that_needs_it(tmp_path):
    class Late(Positioned):
        def get_state(self):
            if self.state["next"] == 0:
                raise RuntimeError("not started")
            return super().get_state()

    saver = Saver("on_batch_begin", tmp_path)
    trainer, _ = build(tmp_path, Late(), callbacks=[saver])
    with pytest.raises(CheckpointError, match=r"`train_data_loader` cannot be saved: Late.get_state raised Runtime"):
        trainer.train_epoch()
    assert (trainer.step, saver.saved) == (0, [])


def test_loading_alone_starts_an_epoch(tmp_path):
    first, _ = build(tmp_path, Plain())
    first.train_epoch()
    trainer, _ = build(tmp_path, Plain())
    trainer.load_checkpoint(tmp_path / "checkpoint_2.msgpack")
    assert (trainer.epoch, trainer.step) == (0, 2)
    with pytest.warns(UserWarning, match="holds checkpoints up to step 4, later than this run's step 2"):
        trainer.train_epoch()
    assert (trainer.epoch, trainer.step) == (1, 6)


def test_a_callable_that_shuffles_by_the_epoch_finds_the_right_one(tmp_path):
    def make(directory):
        def loader():
            order = np.random.default_rng(trainer.epoch).permutation(EXAMPLES)
            return [batch_of(order[start : start + BATCH]) for start in range(0, EXAMPLES, BATCH)]

        trainer, watching = build(directory, loader)
        return trainer, watching

    expected, expected_watching = make(tmp_path)
    run(expected)
    trainer, watching = make(tmp_path / "unused")
    with warned_of_drawing_again(2):
        trainer.train_epoch(resume=tmp_path / "checkpoint_6.msgpack")
    run(trainer)
    assert_same_end(trainer, watching, expected, expected_watching)


class SetsEpoch(Callback):
    """What users of samplers do: the order is that of the epoch which begins."""

    def __init__(self, loader):
        self.loader = loader

    def on_epoch_begin(self, trainer, epoch):
        self.loader.epoch = epoch


class ByEpoch:
    epoch = None

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(EXAMPLES)
        return iter([batch_of(order[start : start + BATCH]) for start in range(0, EXAMPLES, BATCH)])


def test_a_callback_may_tell_the_loader_which_epoch_begins(tmp_path):
    loaders = ByEpoch(), ByEpoch()
    expected, expected_watching = build(tmp_path, loaders[0], callbacks=[SetsEpoch(loaders[0])])
    run(expected)
    trainer, watching = build(tmp_path / "unused", loaders[1], callbacks=[SetsEpoch(loaders[1])])
    with warned_of_drawing_again(2):
        trainer.train_epoch(resume=tmp_path / "checkpoint_6.msgpack")
    run(trainer)
    assert_same_end(trainer, watching, expected, expected_watching)


class TestRefusals:
    """One error each, and the trainer is as it was."""

    @pytest.fixture
    def path(self, tmp_path):
        trainer, _ = build(tmp_path, MakesPositioned())
        run(trainer, 2)
        return tmp_path / "checkpoint_6.msgpack"

    def refuse(self, error, message, loader, path, **changes):
        trainer, watching = build(path.parent / "unused", loader, **changes)
        trainer.train_step(batch_of(slice(4)))
        before, rows, run_before = trainer.state, trainer.history.to_dict(), trainer.run
        bits = before.copy()
        with pytest.raises(error, match=message) as caught:
            trainer.train_epoch(resume=path)
        assert trainer.state is before
        assert_same_bits(before, bits)
        assert (trainer.epoch, trainer.step, trainer.history.to_dict()) == (0, 1, rows)
        assert (watching.batches, watching.epochs) == (1, [])
        assert trainer.run is run_before
        return caught.value

    def test_a_loader_that_refuses_the_position(self, path):
        class Refusing(Positioned):
            def set_state(self, state):
                raise RuntimeError("another data set")

        class MakesRefusing:
            def __iter__(self):
                return Refusing()

        error = self.refuse(
            CheckpointError,
            r"`train_data_loader` refuses the position of a Positioned in the checkpoint: Refusing.set_state raised "
            r"RuntimeError\('another data set'\). Pass the loader of the interrupted run.",
            MakesRefusing(),
            path,
        )
        assert isinstance(error.__cause__, RuntimeError)

    def test_a_loader_without_positions(self, path):
        message = (
            r"holds the position of a Positioned, which `train_data_loader` of type list cannot take: it has neither"
        )
        self.refuse(CheckpointError, message, list(generator_function()), path)

    def test_an_iterator_that_cannot_go_back(self, tmp_path):
        trainer, _ = build(tmp_path, generator_function())
        trainer.train_epoch()
        message = "`train_data_loader` is an iterator of type generator, which cannot be taken back to where"
        self.refuse(ArgumentError, message, generator_function(), tmp_path / "checkpoint_2.msgpack")

    def test_an_endless_iterator_that_cannot_go_on_after_an_epoch(self, tmp_path):
        def endless():
            while True:
                yield from generator_function()

        trainer, _ = build(tmp_path, endless(), kind="grain endless")
        trainer.train_epoch()
        path = trainer.save_checkpoint()
        trainer, _ = build(tmp_path, endless(), kind="grain endless")
        trainer.train_epoch(resume=path)
        for _ in range(2):  # trying again does not make it start from the start
            with pytest.raises(ArgumentError, match="`train_data_loader` is an iterator of type generator, which"):
                trainer.train_epoch()
        assert (trainer.epoch, trainer.step) == (1, 4)

    @pytest.mark.filterwarnings("ignore:`train_data_loader` cannot be set to a position")
    @pytest.mark.filterwarnings("ignore:.*`train_data_loader.batches` was 4 and is 1")
    def test_a_loader_that_is_too_short(self, tmp_path):
        trainer, _ = build(tmp_path, list(generator_function()))
        trainer.train_epoch()
        self.refuse(
            CheckpointError,
            "`train_data_loader` yielded 1 batches where 3 were finished in the interrupted epoch",
            list(generator_function())[:1],
            tmp_path / "checkpoint_3.msgpack",
        )

    def test_a_callable_that_is_told_another_batch_size(self, tmp_path):
        trainer, _ = build(tmp_path, lambda batch_size: Positioned())
        trainer.train_epoch()
        trainer, _ = build(tmp_path, lambda batch_size: Positioned(), batch_size=5)
        with pytest.raises(ArgumentError, match=r"`resume` cannot .*: `batch_size` \(batch size\) was 4 and is 5"):
            trainer.train_epoch(resume=tmp_path / "checkpoint_2.msgpack")

    def test_checkpoints_of_other_runs(self, path, tmp_path):
        trainer, _ = build(tmp_path, MakesPositioned())
        with pytest.raises(
            CheckpointError, match=r"over a loader, and train\(\) is called with data in memory, so there "
        ):
            trainer.train(DATA, 1, BATCH, resume=path)
        trainer.save_checkpoint(tmp_path / "none.msgpack")
        self.refuse(
            CheckpointError, r"was not saved during train_epoch\(\)", MakesPositioned(), tmp_path / "none.msgpack"
        )
        trainer, _ = build(tmp_path / "other", MakesPositioned())
        trainer.train(DATA, 1, BATCH)
        trainer.save_checkpoint(tmp_path / "train.msgpack")
        self.refuse(
            CheckpointError,
            r"saved in a run over data in memory, and train_epoch\(\) is called with a loader, so there is no epoch",
            MakesPositioned(),
            tmp_path / "train.msgpack",
        )

    @pytest.mark.parametrize(
        ("state", "message"),
        [
            (object(), "Unsaveable.get_state returned an object of type object, which no checkpoint holds; a position"),
            ({"a": [{1, 2}]}, "returned an object of type set, which"),
            (np.array([None]), "returned an array of dtype object, which"),
            (
                RuntimeError("worker died"),
                r"`train_data_loader` cannot be saved: .*get_state raised RuntimeError\('worker",
            ),
        ],
    )
    @pytest.mark.few(1)
    def test_a_position_that_cannot_be_saved_stops_the_save_only(self, state, message, tmp_path):
        class Unsaveable(Positioned):
            def get_state(self):
                if isinstance(state, Exception):
                    raise state
                return state

        trainer, _ = build(tmp_path / "1", Unsaveable(), save_frequency=1000)
        trainer.train_epoch()  # saved at its end, where no position is needed, so nothing is said
        with pytest.raises(CheckpointError, match=message):
            trainer.save_checkpoint()
        trainer, _ = build(tmp_path / "2", Unsaveable())
        with pytest.raises(CheckpointError, match=message):
            trainer.train_epoch()
        assert trainer.step == 1


@pytest.mark.slow
def test_a_random_interruption_of_a_random_loader(tmp_path):
    """Chains of interruptions, each resumed from whatever was saved last."""
    draw = random.Random(0)
    for case in range(6):
        kind = draw.choice(sorted(KNOWING.keys() - {"datarax"}))
        expected, expected_watching = build(tmp_path / f"whole {case}", LOADERS[kind](), kind=kind, save_frequency=1000)
        run(expected)
        directory, stop_at = tmp_path / str(case), 0
        while stop_at is not None:
            trainer, watching = build(directory, LOADERS[kind](), kind=kind, save_frequency=draw.randint(1, 5))
            stop_at = draw.choice([*range(STEPS), None])
            watching.stop_at = stop_at
            with contextlib.suppress(StoppedError):
                run(trainer, resume=True)
        run(trainer, resume=True)
        assert_same_end(trainer, watching, expected, expected_watching)
