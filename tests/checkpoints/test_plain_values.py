"""Plain values beside a state: they come back equal, or the save refuses them and says which one it is."""

import datetime
import enum
import json
import os
import tracemalloc
import types
from collections import OrderedDict, defaultdict, namedtuple
from pathlib import Path

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import optax
import pytest

from tests.problems import Busy, Linear, config, regression, squared_error
from trainer import Callback, CheckpointError, Trainer, TrainState, save_state
from trainer.checkpoints.export import convert
from trainer.checkpoints.file_format import Bundle, write_bundle
from trainer.checkpoints.open import open_source
from trainer.checkpoints.plain_values import bytes_to_json, from_plain, to_plain, unpack
from trainer.checkpoints.run_record import load_run, save_run, snapshot_run
from trainer.checkpoints.saving import write_snapshot
from trainer.checkpoints.state_io import load_with_progress
from trainer.metrics.history import History
from trainer.run import Run

Point = namedtuple("Point", "x y")


class Mode(enum.IntEnum):
    MAX = 3


class Kind(enum.StrEnum):
    MAX = "max"


EQUAL = {
    "scalars": [None, True, False, 0, -1, 2**64 - 1, -(2**63), 0.1, float("inf"), "", "ü\n", "$tuple"],
    "integer keys": {0: "cat", 1: "dog", -5: {}},
    "keys of every kind": {None: 1, 2: 2, "2": 3, 0.5: 4, (1, (2, None)): 5, b"b": 6, datetime.date(2026, 1, 2): 7},
    "tuples": [(), (1,), ([(2, 3)], {"a": (4,)})],
    "bytes": [b"", b"\x00\xff"],
    "dates": [datetime.date(2026, 11, 2), datetime.datetime(2026, 11, 2, 3, 4, tzinfo=datetime.UTC), Path("a/b")],
    "what looks like ours": [{"$tuple": [1]}, {"$pairs": [[1, 2]]}, {"$pairs": {"$tuple": 3}}, {"$": 1}, {"$new": []}],
    "subclasses": [Mode.MAX, Kind.MAX, Point(1, 2), OrderedDict(a=1), defaultdict(int, {1: 2}), np.float64(0.1)],
    "mappings": types.MappingProxyType({"a": 1}),
}


def through_msgpack(value):
    return msgpack.unpackb(msgpack.packb(to_plain(value, "value")), object_hook=from_plain)


def through_json(value):
    return json.loads(json.dumps(to_plain(value, "value"), default=bytes_to_json), object_hook=from_plain)


@pytest.mark.parametrize("through", [through_msgpack, through_json])
@pytest.mark.parametrize("value", EQUAL.values(), ids=EQUAL)
def test_they_come_back_equal(value, through):
    found = through(value)
    assert found == value
    if isinstance(value, dict):
        assert list(map(type, found)) == list(map(type, value))


@pytest.mark.parametrize("through", [through_msgpack, through_json])
def test_numbers_of_numpy_come_back_equal(through):
    numbers = [np.float32(0.1), np.int8(-3), jnp.ones(()), np.bool_(True), jnp.bfloat16(2), np.array("a"), np.array(3)]
    assert through(numbers) == numbers
    assert list(map(type, through(numbers))) == [float, int, float, bool, float, str, int]


ARRAYS = {
    **{dtype: np.arange(6).reshape(2, 3).astype(dtype) for dtype in ("?", "i1", "<i8", ">i2", "<u4", "f2", "<f8")},
    "complex": np.array([1j, complex(np.nan, -0.0)]),
    "texts": np.array([["a", "\u00fc\n"], ["", "long"]]),
    "bytes": np.array([b"\x00", b"ab"]),
    "dates": np.array(["2026-11-02", "NaT"], "datetime64[s]"),
    "bfloat16": np.arange(4).astype(jnp.bfloat16),
    "float8": np.arange(4).astype(jnp.float8_e5m2),
    "int4": np.arange(4).astype(jnp.int4),
    "empty": np.zeros((0, 3), np.float32),
    "in columns": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "of one": np.array([2.5]),
}


@pytest.mark.parametrize("through", [through_msgpack, through_json])
@pytest.mark.parametrize("array", ARRAYS.values(), ids=ARRAYS)
def test_arrays_come_back_equal(array, through):
    found = through({"a": [array, (array[:1],)]})["a"]
    for now, was in zip((found[0], found[1][0]), (array, array[:1]), strict=True):
        assert type(now) is np.ndarray
        assert (now.dtype, now.shape, now.tobytes()) == (was.dtype, was.shape, was.tobytes())
    found[0][:] = found[0][::-1]  # it can be written to


def test_an_array_on_a_device_comes_back_as_one_of_numpy():
    found = through_msgpack(jnp.arange(3))
    assert type(found) is np.ndarray
    assert found.dtype == np.int32
    assert found.tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", ["O", "|O", "<f9", "|V4", "i4,i4", "float33_x", "<U0", 3, None, "f8"])
@pytest.mark.parametrize("shape", [[1], [2], [2**62, 2**62], [-1], [0, 2**70], ["a"], [], 1, [[1]]])
def test_a_forged_array_is_no_array(dtype, shape):
    forged = {"$array": [dtype, shape, b"12345678"]}
    found = from_plain(forged)
    assert found is forged or (type(found) is np.ndarray and found.nbytes == 8)


def test_a_person_can_read_them():
    assert to_plain({"a": (1, 2)}, "x") == {"a": {"$tuple": [1, 2]}}
    assert to_plain({0: "cat", None: "dog"}, "x") == {"$pairs": [[0, "cat"], [None, "dog"]]}


@pytest.mark.parametrize(
    "forged", [{"$tuple": 3}, {"$tuple": "ab"}, {"$pairs": [1]}, {"$pairs": [[[], 1]]}, {"$date": "x"}, {"$bytes": "?"}]
)
def test_what_nobody_wrote_stays_as_it_is(forged):
    assert msgpack.unpackb(msgpack.packb(forged), object_hook=from_plain) == forged


def cyclic():
    value = []
    value.append(value)
    return value


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (
            {"best": {(1, 2): object()}},
            r"`callbacks.best\[\(1, 2\)\]` is an object of type object, which no checkpoint",
        ),
        ([{"seen": {1, 2}}], r"`callbacks\[0\].seen` is an object of type set"),
        ({"a b": [0, 1j]}, r"`callbacks\['a b'\]\[1\]` is an object of type complex"),
        ({Mode: 1}, r"`callbacks, key .*Mode.*` is an object of type EnumType"),
        ({"n": 2**64}, r"`callbacks.n` is an integer of more than 64 bits"),
        ({"s": "\ud800"}, r"`callbacks.s` is a string that UTF-8 lacks"),
        ({"o": np.array([object()])}, r"`callbacks.o` is an array of dtype object"),
        ({"o": np.zeros(2, "i4,f4")}, r"`callbacks.o` is an array of dtype \[\('f0'"),
        ({"o": np.longdouble(1)}, r"`callbacks.o` is an array of dtype (longdouble|float)"),
        ({"m": np.ma.array([1, 2], mask=[0, 1])}, r"`callbacks.m` is an object of type MaskedArray"),
        ({"k": jax.random.key(0)}, r"`callbacks.k` is an object of type PRNGKeyArray"),
        (cyclic(), r"`callbacks\[0\]\[0\].*…` is nested more than 100 deep"),
    ],
)
def test_what_cannot_come_back_is_refused_by_its_path(value, message):
    with pytest.raises(CheckpointError, match=message) as refused:
        to_plain(value, "callbacks")
    assert len(str(refused.value)) < 500


def state():
    return TrainState.create(Linear(), optax.sgd(0.1), rng=jax.random.key(0))


INFO = {
    "classes": {0: "cat", 1: "dog"},
    "shape": (3, 4),
    "when": datetime.date(2026, 1, 2),
    "raw": b"\xff",
    "none": {None: 1},
}


@pytest.mark.parametrize("name", ["s.msgpack", "s.orbax"])
class TestSaves:
    def test_information_and_progress_come_back(self, name, tmp_path):
        path = save_state(tmp_path / name, state(), INFO, progress=INFO)
        with open_source(path) as source:
            assert {key: source.info[key] for key in INFO} == INFO
        assert load_with_progress(path, state()).progress == INFO

    def test_through_a_conversion(self, name, tmp_path):
        save_state(tmp_path / name, state(), INFO)
        other = tmp_path / ("c.orbax" if name == "s.msgpack" else "c.msgpack")
        convert(tmp_path / name, other)
        with open_source(other) as source:
            assert {key: source.info[key] for key in INFO} == INFO

    def test_a_refusal_leaves_nothing_behind(self, name, tmp_path):
        save_state(tmp_path / "first.orbax", state())  # what Orbax opens once
        before = len(os.listdir("/proc/self/fd"))
        for background in (False, True):
            trainer = Trainer(Linear(), config(metadata={"a": {(1, 2): {1}}}), loss_fn=squared_error, workdir=tmp_path)
            for _ in range(3):
                with pytest.raises(CheckpointError, match=r"`info.metadata.a\[\(1, 2\)\]` is an object of type set"):
                    trainer.save_checkpoint(tmp_path / name, background=background)
            trainer.close()
        assert [path.name for path in tmp_path.iterdir()] == ["first.orbax"]
        assert len(os.listdir("/proc/self/fd")) <= before

    def test_a_history_of_lists_comes_back_and_other_objects_are_refused(self, name, tmp_path):
        run = Run.start(state())
        run.history.record(1, {"loss": 0.5, "per_class": np.arange(3.0), "nested": [[1, None], "a"]})
        path = save_run(tmp_path / name, run)
        assert load_run(path, Run.start(state())).history[:] == run.history[:]
        for wrong in ({"a": 1}, b"raw", (1, 2)):
            other = run.replace(history=run.history.copy())
            other.history.record(2, {"odd": wrong})
            with pytest.raises(CheckpointError, match=r"`history\[1\]` cannot be saved: `odd` is of type"):
                save_run(path, other)
        assert load_run(path, Run.start(state())).history[:] == run.history[:]


class Counter(Callback):
    def __init__(self):
        self.seen = {}

    def on_epoch_end(self, trainer, epoch, logs):
        self.seen[epoch, None] = (epoch, {epoch: 1})

    def state_dict(self):
        return {"seen": self.seen}

    def load_state_dict(self, state):
        self.seen = state["seen"]


class Summing(Callback):
    total = np.zeros(2)

    def on_epoch_end(self, trainer, epoch, logs):
        self.total = self.total + np.array([1.0, 10.0])

    def state_dict(self):
        return {"total": self.total}

    def load_state_dict(self, state):
        self.total = state["total"]


@pytest.mark.parametrize("name", ["s.msgpack", "s.orbax"])
def test_a_sum_of_arrays_goes_on_after_a_resume(name, tmp_path):
    for epochs in (2, 3):
        summing = Summing()
        trainer = Trainer(Linear(4), config(), loss_fn=squared_error, callbacks=[summing])
        resume = tmp_path / name if epochs == 3 else False
        trainer.train(regression(8), epochs, 4, resume=resume)
        trainer.save_checkpoint(tmp_path / name)
    assert summing.total.tolist() == [3.0, 30.0]


def test_states_of_callbacks_come_back_with_their_keys(tmp_path):
    counter, again = Counter(), Counter()
    trainer = Trainer(Busy(), config(), loss_fn=squared_error, workdir=tmp_path, callbacks=[counter])
    trainer.train(regression(8), 2, 4)
    path = trainer.save_checkpoint()
    Trainer(Busy(), config(), loss_fn=squared_error, workdir=tmp_path, callbacks=[again]).load_checkpoint(path)
    assert counter.seen
    assert again.seen == counter.seen


def test_a_header_that_does_not_come_back_is_found_before_the_file_has_its_name(tmp_path, monkeypatch):
    path = tmp_path / "a"
    write_bundle(path, {"a": 1}, [])
    monkeypatch.setattr(Bundle, "_read_header", lambda *_: ({"a": 2}, ()))
    with pytest.raises(ValueError, match="its header does not come back equal"):
        write_bundle(path, {"a": 3}, [])
    monkeypatch.undo()
    assert list(tmp_path.iterdir()) == [path]
    with Bundle(path) as bundle:
        assert bundle.info == {"a": 1}


def growth(function):
    """Returns the peak of the memory that a call takes, and what it raised."""
    error = None
    tracemalloc.start()
    try:
        function()
    except Exception as raised:
        error = raised
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, error


BOMBS = {
    "empty lists": b"\x90" * 2**20,
    "empty mappings": b"\x80" * 2**20,
    "pairs": b"\x92\x01\x02" * 2**19,
    "mappings of one": b"\x81\xa1a\xc0" * 2**18,
    "None": b"\xc0" * 2**20,
    "short strings": b"\xa2ab" * 2**19,
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_memory_is_in_proportion_to_the_bytes(bomb):
    count = {b"\x92": 2**19, b"\x81": 2**18, b"\xa2": 2**19}.get(bomb[:1], 2**20)
    data = b"\xdd" + count.to_bytes(4, "big") + bomb
    peak, error = growth(lambda: unpack(data, free=0))
    assert peak < 30 * len(data)
    if bomb[:1] not in (b"\xc0", b"\xa2"):
        assert "too many lists and mappings" in str(error)


def test_what_no_reader_takes_is_refused_at_the_save(tmp_path):
    many = [[] for _ in range(2**18)]
    with pytest.raises(CheckpointError, match=r"`progress` cannot be saved: it holds too many lists and mappings"):
        save_state(tmp_path / "s.msgpack", state(), progress={"many": many})
    deep = jnp.ones(1)
    for _ in range(130):
        deep = {"a": deep}
    for name in ("s.msgpack", "s.orbax"):
        with pytest.raises(CheckpointError, match=r"could not be written.*has 131 parts, more than 128"):
            save_state(tmp_path / name, state().replace(model_state=deep))
    assert list(tmp_path.iterdir()) == []


def test_a_hundred_thousand_rows_and_many_pairs_are_no_bomb(tmp_path):
    run = Run.start(state())
    run = run.replace(history=History.from_rows([{"step": step} for step in range(100_000)]))
    pairs = [[index, (index, 1)] for index in range(30_000)]
    path = tmp_path / "s.msgpack"
    write_snapshot(path, snapshot_run(run, callback_states=lambda: [pairs]))
    assert load_with_progress(path, state()).progress["listeners"] == [pairs]
    assert len(load_run(path, Run.start(state())).history) == 100_000
