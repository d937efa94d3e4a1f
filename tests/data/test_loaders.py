"""Loaders as people write them: how they are opened, and one pass over them."""

import functools
import itertools

import numpy as np
import pytest

from trainer import ArgumentError, ArgumentTypeError
from trainer.data.loaders import one_pass, open_loader

BATCHES = [{"x": np.full(2, i)} for i in range(3)]


class Loader:
    """Can be iterated over again and again, and would also be callable."""

    def __iter__(self):
        return iter(BATCHES)

    def __call__(self):
        raise AssertionError("an iterable is taken as it is")


class Factory:
    """Is made into a loader by a call, with the size of a batch."""

    def __call__(self, batch_size):
        return BATCHES[:batch_size]


@pytest.mark.parametrize(
    ("loader", "expected"),
    [
        (BATCHES, 3),
        (Loader(), 3),
        (lambda: BATCHES, 3),
        (lambda: iter(BATCHES), 3),
        (lambda batch_size: BATCHES[:batch_size], 2),
        (lambda size=1: BATCHES[:size], 2),
        (lambda *sizes: BATCHES[: sizes[0]], 2),
        (lambda batch_size, /: BATCHES[:batch_size], 2),
        (lambda *, limit=1: BATCHES[:limit], 1),
        (lambda **options: BATCHES[: len(options) or 1], 1),
        (Factory(), 2),
        (functools.partial(lambda n, batch_size: BATCHES[: n * batch_size], 1), 2),
        (BATCHES.__iter__, 3),
        (Loader, 3),
    ],
)
def test_loaders_of_many_kinds(loader, expected):
    assert list(open_loader(loader, 2, "loader")) == BATCHES[:expected]
    assert list(one_pass(loader, 2, "loader", None)) == BATCHES[:expected]


def test_a_callable_without_signature_is_called_with_the_batch_size():
    assert list(open_loader(range, 3, "loader")) == [0, 1, 2]


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
    ],
)
def test_what_is_no_loader_is_refused(loader, message):
    with pytest.raises(ArgumentTypeError) as caught:
        open_loader(loader, 2, "loader")
    assert str(caught.value) == message


@pytest.mark.parametrize(("limit", "expected"), [(None, 3), (2, 2), (3, 3), (9, 3)])
def test_a_pass_takes_at_most_the_limit(limit, expected):
    assert list(one_pass(BATCHES, 2, "loader", limit)) == BATCHES[:expected]


def test_a_limited_pass_over_an_endless_loader_leaves_the_rest_to_the_next():
    endless = itertools.count()
    assert list(one_pass(endless, 2, "loader", 3)) == [0, 1, 2]
    assert list(one_pass(endless, 2, "loader", 2)) == [3, 4]


def test_a_loader_can_be_passed_over_again():
    for loader in (Loader(), lambda: iter(BATCHES)):
        assert list(one_pass(loader, 2, "loader", None)) == list(one_pass(loader, 2, "loader", None)) == BATCHES


@pytest.mark.parametrize("loader", [[], iter([]), lambda: iter([])])
def test_a_pass_without_batches_is_refused(loader):
    with pytest.raises(ArgumentError) as caught:
        list(one_pass(loader, 2, "train_data_loader", None))
    assert str(caught.value) == (
        "`train_data_loader` yielded no batch. If it is an iterator it was used up by an earlier pass; pass a "
        "callable that makes a new one, or something that can be iterated over again."
    )


def test_an_iterator_can_be_used_once_only():
    loader = iter(BATCHES)
    assert list(one_pass(loader, 2, "loader", None)) == BATCHES
    with pytest.raises(ArgumentError, match="yielded no batch"):
        next(one_pass(loader, 2, "loader", None))
