"""Loaders as people write them: how they are opened, and one pass over them."""

import functools
import io
import itertools
import re

import jax
import numpy as np
import pytest

from tests.problems import Linear, config, regression, squared_error
from trainer import ArgumentError, ArgumentTypeError, BatchError, Trainer
from trainer.data import loaders
from trainer.data.loaders import check_loader, one_pass, open_loader, takes_batch_size
from trainer.data.resumable import LoaderPass

BATCHES = [{"x": np.full(2, i)} for i in range(3)]


class Loader:
    """Can be iterated over again and again, and would also be callable."""

    def __iter__(self):
        return iter(BATCHES)

    def __call__(self):
        raise AssertionError("an iterable is taken as it is")


class Factory:
    """A call with the batch size makes it a loader."""

    def __call__(self, batch_size):
        return BATCHES[:batch_size]


class Options:
    """Its class is the loader, and its options have defaults."""

    def __init__(self, limit=1, *, batch_size):
        self.batches = BATCHES[: limit * batch_size]

    def __iter__(self):
        return iter(self.batches)


class Indexed:
    """Gives its items by their index, as a `keras.utils.Sequence`, and tells of its ends."""

    def __init__(self, items):
        self.items, self.ends = items, 0

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[min(index, len(self.items) - 1)]  # it raises no IndexError

    def on_epoch_end(self):
        self.ends += 1


def passed(loader, limit=None, name="loader"):
    """Returns the batches of one pass."""
    return list(one_pass(loader, 2, name, limit, bound="TrainingConfig.validation_steps"))


@pytest.mark.parametrize(
    ("loader", "expected"),
    [
        (BATCHES, 3),
        (Loader(), 3),
        (lambda: BATCHES, 3),
        (lambda: iter(BATCHES), 3),
        (lambda batch_size: BATCHES[:batch_size], 2),
        (lambda batch_size=1: BATCHES[:batch_size], 2),
        (lambda *, batch_size: BATCHES[:batch_size], 2),
        (lambda seed=1, batch_size=1: BATCHES[: seed * batch_size], 2),
        (lambda n: BATCHES[:n], 2),
        (lambda n, seed=1: BATCHES[: n * seed], 2),
        (lambda size=1: BATCHES[:size], 1),
        (lambda batches=BATCHES: iter(batches), 3),
        (lambda *sizes: BATCHES[: len(sizes) or 1], 1),
        (lambda batch_size, /: BATCHES[:batch_size], 2),
        (lambda n, /, seed=1: BATCHES[: n * seed], 2),
        (lambda *, batch_size, **options: BATCHES[: len(options) or batch_size], 2),
        (Options, 2),
        (lambda *, limit=1: BATCHES[:limit], 1),
        (lambda **options: BATCHES[: len(options) or 1], 1),
        (Factory(), 2),
        (functools.partial(lambda epoch: BATCHES[epoch:], epoch=0), 3),
        (lambda epoch=0: BATCHES[epoch:], 3),
        (functools.partial(lambda n, batch_size: BATCHES[: n * batch_size], 1), 2),
        (functools.partial(lambda batch_size: BATCHES[:batch_size], batch_size=1), 1),
        (functools.partial(lambda batch_size, n: BATCHES[: n * batch_size], n=1), 2),
        (BATCHES.__iter__, 3),
        (Loader, 3),
    ],
)
def test_loaders_of_many_kinds(loader, expected):
    assert list(open_loader(loader, 2, "loader")) == BATCHES[:expected]
    assert passed(loader) == BATCHES[:expected]


@pytest.mark.parametrize(
    ("loader", "expected"),
    [
        (lambda epoch: (epoch,), (5,)),
        (lambda epoch=0: (epoch,), (5,)),
        (lambda batch_size, epoch: (batch_size, epoch), (2, 5)),
        (lambda epoch, batch_size: (batch_size, epoch), (2, 5)),
        (lambda n, epoch: (n, epoch), (2, 5)),
        (lambda n, *, epoch=0: (n, epoch), (2, 5)),
        (lambda batch_size, /, *, epoch: (batch_size, epoch), (2, 5)),
        (functools.partial(lambda epoch: (epoch,), epoch=3), (3,)),
        (lambda n, seed=1: (n, seed), (2, 1)),
        (lambda *, seed=1: (seed,), (1,)),
    ],
)
def test_a_callable_gets_the_epoch_by_its_name(loader, expected):
    check_loader(loader, "loader", has_epoch=True)
    assert open_loader(loader, 2, "loader", epoch=5) == expected


def test_an_epoch_that_nobody_can_pass_is_refused():
    for loader in (lambda epoch, n: n, lambda epoch, /: epoch):
        with pytest.raises(ArgumentError, match="nothing but `batch_size` and `epoch` are passed to it"):
            check_loader(loader, "loader", has_epoch=True)
    trainer = Trainer(Linear(), config(), loss_fn=squared_error)
    with pytest.raises(ArgumentError, match="`data` is a callable that requires `epoch`, and nothing but"):
        trainer.evaluate(lambda epoch: BATCHES[epoch:], 2)


def test_training_passes_the_number_of_finished_epochs():
    seen = []

    def batches(epoch, batch_size):
        seen.append((epoch, batch_size))
        return [regression(batch_size, 3)]

    trainer = Trainer(Linear(), config(), loss_fn=squared_error, train_data_loader=batches)
    trainer.train(batches, 2, 4)
    trainer.train_epoch()
    assert seen == [(0, 4), (1, 4), (2, 32)]


def test_validation_passes_it_too_and_so_does_the_search_for_a_learning_rate():
    seen = []

    def batches(epoch, batch_size):
        seen.append((epoch, batch_size))
        return [regression(batch_size, 3, seed) for seed in range(5)]

    loaders = {"train_data_loader": lambda batch_size: [regression(4, 3)] * 2, "val_data_loader": batches}
    trainer = Trainer(Linear(), config(batch_size=4), loss_fn=squared_error, **loaders)
    trainer.train([regression(8, 3)] * 2, 2, 8, batches, val_interval=2)
    assert seen == [(0, 8), (1, 8)]
    trainer.train_epoch()
    assert seen[2:] == [(2, 4)]
    trainer = Trainer(Linear(), config(batch_size=4), loss_fn=squared_error, train_data_loader=batches)
    trainer.find_learning_rate(steps=10, high=10.0)
    assert seen[3:] == [(0, 4), (1, 4)]


def test_batches_by_their_index_are_a_loader():
    loader = Indexed(BATCHES)
    check_loader(loader, "loader")
    assert passed(loader) == passed(lambda: loader) == BATCHES
    assert loader.ends == 2
    assert passed(loader, 2) == BATCHES[:2]
    assert loader.ends == 2
    assert passed(loader, 3) == BATCHES
    assert loader.ends == 3
    with pytest.raises(ArgumentError, match="yielded no batch"):
        passed(Indexed([]))
    with pytest.warns(UserWarning, match="`train_data_loader` has 3 batches and starts over in every epoch"):
        opened(loader, 2)


def test_a_trainer_takes_batches_by_their_index_wherever_it_takes_a_loader():
    batches = [regression(8, 3, seed) for seed in range(4)]

    def build(loader):
        return Trainer(Linear(), config(), loss_fn=squared_error, train_data_loader=loader, val_data_loader=loader)

    indexed, listed = build(Indexed(batches)), build(batches)
    assert indexed.train(Indexed(batches), 2, 8, Indexed(batches)) == listed.train(batches, 2, 8, batches)
    assert indexed.train_epoch() == listed.train_epoch()
    assert indexed.evaluate(Indexed(batches), 8) == listed.evaluate(batches, 8)
    assert indexed.setup.live.planned.steps_per_epoch == 4


class Shuffling:
    """Shuffles in place, as some do, the array of which its batches are views."""

    def __init__(self):
        self.numbers = np.arange(8, dtype=np.float32)

    def __len__(self):
        return 4

    def __getitem__(self, index):
        numbers = self.numbers[2 * index : 2 * index + 2]
        return {"input": numbers[:, None] + np.zeros(4, np.float32), "target": numbers, "number": numbers}

    def on_epoch_end(self):
        self.numbers[:] = np.roll(self.numbers, 1)


@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("limit", [None, 4])
def test_a_sequence_shuffles_after_its_last_batch_at_a_limit_too(limit, ahead):
    def loss_fn(model, batch, rng, step):
        return squared_error(model, batch, rng, step)[0], {"last": batch["number"][-1]}

    settings = config(steps_per_epoch=limit, log_frequency=1)
    trainer = Trainer(Linear(4), settings, loss_fn=loss_fn, prefetch=ahead)
    trainer.train(Shuffling(), 3, 2, val_interval=None)
    seen = [row["last"] for row in trainer.history if "last" in row]
    assert seen == [1, 3, 5, 7, 0, 2, 4, 6, 7, 1, 3, 5]


def test_examples_by_their_index_are_refused():
    examples = Indexed([{"input": np.ones(3, np.float32), "target": np.float32(1)}] * 4)
    message = "is a Indexed, which gives examples by their index; pass a loader of batches, such as "
    for argument in ("train_data_loader", "val_data_loader"):
        with pytest.raises(ArgumentTypeError, match=f"`{argument}` {message}"):
            Trainer(Linear(), config(), loss_fn=squared_error, **{argument: examples})
    with pytest.raises(ArgumentTypeError, match=f"`loader` returned an object that {message}"):
        open_loader(lambda: examples, 2, "loader")
    with pytest.raises(BatchError, match=f"`train_data` {message}"):
        Trainer(Linear(), config(), loss_fn=squared_error).train(examples, 1, 4)


def first_entry(model, batch, rng, step):
    del rng, step
    return (model.layer(batch["input"]) ** 2).mean(), {}


def test_a_list_of_examples_is_said_once():
    rows = [{"input": np.ones(3, np.float32), "target": np.float32(1)}] * 8
    trainer = Trainer(Linear(), config(), loss_fn=first_entry)
    with pytest.warns(UserWarning, match="`train_data` is a list of 8 items that look like examples") as said:
        trainer.train(rows, 2, 4)
    assert (len(said), trainer.step) == (1, 16)
    trainer.train(jax.tree.map(lambda *leaves: np.stack(leaves), *rows), 1, 4)  # as the message says
    assert trainer.step == 18


@pytest.mark.parametrize(
    ("shapes", "batch_size"),
    [(((4, 3), (4,)), 2), (((4, 3), ()), 4), (((3,), ()), 9), (((3,), ()), 1)],
    ids=["batches", "batches with a scalar", "fewer than a batch", "one by one as asked"],
)
def test_of_other_lists_nothing_is_said(shapes, batch_size):
    batch = {name: np.ones(shape, np.float32) for name, shape in zip(("input", "target"), shapes, strict=True)}
    Trainer(Linear(), config(), loss_fn=first_entry).train([batch] * 8, 1, batch_size)


def test_a_callable_without_signature_is_called_with_nothing():
    assert list(open_loader(range(2).__iter__, 3, "loader")) == [0, 1]
    assert not list(open_loader(set, 3, "loader"))


@pytest.mark.parametrize(
    ("loader", "named"),
    [
        (lambda path, batch_size: path, "`path`"),
        (lambda path, shards: path, "`path`, `shards`"),
        (lambda *, shards: shards, "`shards`"),
        (lambda seed: seed, "`seed`"),
        (lambda split: split, "`split`"),
        (lambda path, /, batch_size: path, "`path`"),
        (lambda path="", batch_size=1, /: path, "`path`"),
        (lambda size, *, seed: size, "`size`, `seed`"),
        (Options.__init__, "`self`"),
    ],
)
def test_a_callable_that_requires_more_is_refused_by_the_names(loader, named):
    with pytest.raises(ArgumentError) as caught:
        check_loader(loader, "loader")
    assert str(caught.value) == (
        f"`loader` is a callable that requires {named}, and nothing but `batch_size` is passed to it. Bind the others: "
        "lambda batch_size: loader(..., batch_size=batch_size)."
    )
    with pytest.raises(ArgumentError, match="requires"):
        takes_batch_size(loader, "loader")


def test_a_trainer_refuses_such_a_loader_when_it_is_made():
    for argument in ("train_data_loader", "val_data_loader"):
        with pytest.raises(ArgumentError, match=f"^`{argument}` is a callable that requires `path`"):
            Trainer(Linear(), config(), loss_fn=squared_error, **{argument: lambda path, batch_size: path})
        with pytest.raises(ArgumentTypeError, match=f"^`{argument}` is a dict: a loop over it gives its keys"):
            Trainer(Linear(), config(), loss_fn=squared_error, **{argument: regression(8, 3)})


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        (3, "`loader` is of type int; it must be an iterable of batches, or a callable that returns one."),
        (None, "`loader` is of type NoneType; it must be an iterable of batches, or a callable that returns one."),
        (
            lambda: 3,
            "`loader` returned an object that is of type int; it must be an iterable of batches, or a callable that "
            "returns one.",
        ),
        (
            BATCHES[0],
            "`loader` is a dict: a loop over it gives its keys, not batches. Pass [batch] if it is one batch; for "
            "arrays of a whole data set call train(data, num_epochs, batch_size).",
        ),
        (
            lambda: BATCHES[0],
            "`loader` returned an object that is a dict: a loop over it gives its keys, not batches. Pass [batch] if "
            "it is one batch; for arrays of a whole data set call train(data, num_epochs, batch_size).",
        ),
        (
            (np.zeros((3, 2)), np.zeros(3)),
            "`loader` is a tuple of arrays of shapes (3, 2), (3,), and a loader is expected: each item would be a "
            "batch. Pass [(x, y)] if it is one batch; for a whole data set call train(data, num_epochs, batch_size).",
        ),
        (
            lambda: (np.zeros((3, 2)), np.zeros(3)),
            "`loader` returned an object that is a tuple of arrays of shapes (3, 2), (3,), and a loader is expected: "
            "each item would be a batch. Pass [(x, y)] if it is one batch; for a whole data set call train(data, "
            "num_epochs, batch_size).",
        ),
        (
            "abc",
            "`loader` is a str, which holds no batches in an order; it must be an iterable of batches, or a callable "
            "that returns one.",
        ),
        (
            {1},
            "`loader` is a set, which holds no batches in an order; it must be an iterable of batches, or a callable "
            "that returns one.",
        ),
        (
            np.zeros((3, 2)),
            "`loader` is an array of type ndarray: a loop over it gives its rows, not batches. Pass [batch] if it is "
            "one batch; for a whole data set call train(data, num_epochs, batch_size).",
        ),
    ],
)
def test_what_is_no_loader_is_refused(loader, message):
    with pytest.raises(ArgumentTypeError) as caught:
        open_loader(loader, 2, "loader")
    assert str(caught.value) == message


@pytest.mark.parametrize(("limit", "expected"), [(None, 3), (2, 2), (3, 3), (9, 3)])
def test_a_pass_takes_at_most_the_limit(limit, expected):
    assert passed(BATCHES, limit) == BATCHES[:expected]


def test_a_limited_pass_over_an_endless_loader_leaves_the_rest_to_the_next():
    endless = itertools.count()
    assert passed(endless, 3) == [0, 1, 2]
    assert passed(endless, 2) == [3, 4]


def test_a_loader_can_be_passed_over_again():
    for loader in (Loader(), lambda: iter(BATCHES)):
        assert passed(loader) == passed(loader) == BATCHES


@pytest.mark.parametrize("loader", [[], iter([]), lambda: iter([])])
def test_a_pass_without_batches_is_refused(loader):
    with pytest.raises(ArgumentError) as caught:
        passed(loader, name="train_data_loader")
    assert str(caught.value) == (
        "`train_data_loader` yielded no batch. If it is an iterator it was used up by an earlier pass; pass a "
        "callable that makes a new one, or something that can be iterated over again."
    )


def test_an_iterator_can_be_used_once_only():
    loader = iter(BATCHES)
    assert passed(loader) == BATCHES
    with pytest.raises(ArgumentError, match="yielded no batch"):
        passed(loader)


def opened(loader, limit=None, previous=None):
    """Returns an open pass, as `Trainer.train_epoch` makes it."""
    made = LoaderPass(loader, 2, "train_data_loader", limit, previous)
    made.open()
    return made


@pytest.mark.parametrize("how", [passed, lambda loader: list(opened(loader))])
def test_none_is_neither_a_batch_nor_the_end(how):
    seen = []

    def failing():
        for batch in (BATCHES[0], BATCHES[1], None, BATCHES[2]):
            seen.append(batch)
            yield batch

    with pytest.raises(BatchError, match=r"yielded None in place of batch 2 of its pass \(the first is batch 0\)"):
        how(failing)
    assert len(seen) == 3


def endless():
    while True:
        yield BATCHES[0]


class Sized:
    """Has a length, which it does not keep."""

    def __len__(self):
        return 3

    def __iter__(self):
        return endless()


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda loader, limit: one_pass(loader, 2, "val_data", limit, bound="set `VALIDATION`"), "VALIDATION"),
        (opened, "TrainingConfig.steps_per_epoch"),
    ],
)
def test_a_pass_that_does_not_end_is_said_once(monkeypatch, make, setting):
    monkeypatch.setattr(loaders, "WARN_AFTER", 5)
    batches = make(endless, None)
    for _ in range(5):
        next(batches)
    said = f"has yielded 5 batches .* If the loader is endless, set `{setting}`"
    with pytest.warns(UserWarning, match=said) as caught:
        list(itertools.islice(batches, 20))
    assert len(caught) == 1
    for loader, limit in ((endless, 7), (Sized(), None)):  # warnings are errors
        for _ in itertools.islice(make(loader, limit), 10):
            pass


def test_what_is_never_seen_is_said_once():
    message = (
        "`train_data_loader` has 3 batches and starts over in every epoch, and `TrainingConfig.steps_per_epoch` ends "
        "the epoch after 2: unless it shuffles, the rest (1 of 3) is never seen."
    )
    with pytest.warns(UserWarning, match=re.escape(message)):
        first = opened(BATCHES, 2)
    assert list(first) == BATCHES[:2]
    assert list(opened(BATCHES, 2, first)) == BATCHES[:2]  # warnings are errors
    with pytest.warns(UserWarning, match="has 3 batches and is called again in every epoch"):
        opened(lambda: BATCHES, 2)
    for loader, limit in ((BATCHES, 3), (BATCHES, None), (iter(BATCHES), 2), (lambda: iter(BATCHES), 2)):
        opened(loader, limit)  # warnings are errors


class Unsized:
    """Starts over, as `lambda: iter(batches)` does, and has no length."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        return iter(self.batches)


def passes(loader, limit, count=3):
    """Returns the batches of several passes of one run."""
    drawn, previous = [], None
    for epoch in range(count):
        previous = LoaderPass(loader, 2, "train_data_loader", limit, previous, epoch)
        previous.open()
        drawn.append(list(previous))
    return drawn


@pytest.mark.parametrize(
    ("loader", "calls"), [(lambda: iter(BATCHES), "is called again"), (Unsized(BATCHES), "starts over")]
)
def test_what_is_never_seen_of_a_loader_without_a_length_is_said_once(loader, calls):
    message = (
        f"`train_data_loader` begins with the same batch and {calls} in every epoch, and "
        "`TrainingConfig.steps_per_epoch` ends the epoch after 2: what comes after is never seen. Pass an iterator, "
        "which continues where the epoch before ended"
    )
    with pytest.warns(UserWarning, match=re.escape(message)) as caught:
        drawn = passes(loader, 2)
    assert len(caught) == 1
    assert drawn == [BATCHES[:2]] * 3


@pytest.mark.parametrize(
    ("loader", "limit"),
    [
        (lambda: iter(BATCHES), 3),
        (lambda: iter(BATCHES), 4),
        (lambda: itertools.cycle(BATCHES), 3),
        (lambda: itertools.repeat(BATCHES[0]), 2),
        (itertools.repeat(BATCHES[0]), 2),
        (itertools.cycle(BATCHES), 2),
        (functools.partial(iter, itertools.cycle(BATCHES)), 2),
        (lambda epoch: iter(BATCHES[epoch % 2 :] * 2), 2),
    ],
    ids=["all", "one more", "endless", "one batch", "an iterator of one", "a cycle", "a shared cycle", "by the epoch"],
)
def test_of_a_loader_that_leaves_out_nothing_nothing_is_said(loader, limit):
    assert {len(drawn) for drawn in passes(loader, limit)} <= {2, 3}  # warnings are errors


def test_the_comparison_takes_nothing_from_an_iterator_that_continues():
    numbers = itertools.count()
    batches = ({"x": np.full(2, next(numbers) % 2)} for _ in itertools.repeat(None))  # every pass begins with 0
    passes(lambda: batches, 2)
    assert next(numbers) == 6


class Rewound:
    """Begins every pass by setting one position back, which all its iterators share, as a file does."""

    def __init__(self, batches):
        self.batches, self.position = batches, 0

    def __iter__(self):
        self.position = 0
        while self.position < len(self.batches):
            self.position += 1
            yield self.batches[self.position - 1]


class OneFile:
    """The same of a file that stays open."""

    def __init__(self, batches):
        self.batches, self.file = batches, io.BytesIO(bytes(range(len(batches))))

    def __iter__(self):
        self.file.seek(0)
        while index := self.file.read(1):
            yield self.batches[index[0]]


@pytest.mark.parametrize("kind", [Rewound, OneFile])
@pytest.mark.parametrize("ahead", [0, 2])
def test_the_comparison_takes_nothing_from_a_pass_of_one_position_for_all(kind, ahead):
    batches = [{"x": np.full((4, 4), number, np.float32), "y": np.zeros(4, np.float32)} for number in range(4)]

    def first(model, batch, rng, step):
        loss, _ = squared_error(model, {"input": batch["x"], "target": batch["y"]}, rng, step)
        return loss, {"first": batch["x"][0, 0]}

    def seen(limit):
        trainer = Trainer(Linear(4), config(steps_per_epoch=limit, log_frequency=1), loss_fn=first, prefetch=ahead)
        trainer.train(kind(batches), 4, 4, val_interval=None)
        return [row["first"] for row in trainer.history if "first" in row]

    with pytest.warns(UserWarning, match="begins with the same batch") as caught:
        assert seen(3) == [0, 1, 2] * 4
    assert len(caught) == 1
    assert seen(4) == [0, 1, 2, 3] * 4  # there is no further batch, and warnings are errors


def test_endless_loaders_are_bounded_in_training_and_validation():
    def batches():
        while True:
            yield regression(8, 3)

    for train in (
        lambda trainer: trainer.train_epoch(),
        lambda trainer: trainer.train(batches, 1, 8, batches(), val_interval=2),
    ):
        trainer = Trainer(
            Linear(),
            config(steps_per_epoch=3, validation_steps=2),
            loss_fn=squared_error,
            train_data_loader=batches,
            val_data_loader=batches,
        )
        train(trainer)
        assert trainer.step == 3
        assert trainer.run.validation.step == 3
        whole = trainer.evaluate(regression(8, 3), 8)
        assert trainer.run.validation.averages["loss"] == whole["loss"]


@pytest.mark.parametrize("error", [TypeError("none"), NotImplementedError("none")], ids=["type", "not implemented"])
@pytest.mark.parametrize("steps", [None, 2])
def test_a_loader_that_has_no_length_after_all(error, steps):
    class Loader:
        def __iter__(self):
            return iter([regression(8)] * 2)

        def __len__(self):
            raise error

    settings = config(steps_per_epoch=steps)
    trainer = Trainer(Linear(4), settings, loss_fn=squared_error, train_data_loader=Loader())
    trainer.train_epoch()
    trainer.train(Loader(), 1, 8, val_data=Loader())
    assert trainer.step == 4
