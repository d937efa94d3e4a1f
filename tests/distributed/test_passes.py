"""Loaders of several processes that give different batches: an error in all, before a wrong number is used."""

import json

import pytest

from tests.distributed.test_start import JOIN, finish, run, start

HEAD = """
import tempfile
from tests.distributed.test_trainer_processes import trainer_on
from tests.sharding.test_trainer_mesh import data
from trainer import DistributedError, make_mesh

rows = data(95)
mine = {name: column[process::2] for name, column in rows.items()}
mesh = make_mesh({"data": 2})

def parts(*sizes):
    # As many batches of the process's own rows, of these sizes.
    starts = [sum(sizes[:number]) for number in range(len(sizes))]
    return [{name: column[start : start + size] for name, column in mine.items()}
            for start, size in zip(starts, sizes, strict=True)]

def made(**options):
    return trainer_on(mesh, tempfile.mkdtemp(), **options)

def epoch(batches, **options):
    return made(train_data_loader=lambda: iter(batches), **options).train_epoch()

def steps(batches):
    trainer = made()
    for batch in batches:
        trainer.train_step(batch)
    return float(trainer.train_step(batches[0])["loss"])
"""

UNEVEN = "parts(8, 8, 8, 8, 8, 8 - process)"
FEWER = "parts(*[8] * (5 - process))"
OTHER_ORDER = "parts(4, 8, *((4, 8) if process else (8, 4)), 4, 8)"
OTHER_DTYPE = "[{**one, 'target': one['target'].astype('float16' if process and i else 'float32')}" + (
    " for i, one in enumerate(parts(8, 8))]"
)

ROWS = "batch 5 of the {} (the first is batch 0) has 8 rows in process 0 and 7 rows in process 1"
ENDED = "batch 4 of the {} (the first is batch 0) has 8 rows in process 0 and no rows, since it has ended, in process 1"
COURSES = {
    "rows, trained": (f"epoch({UNEVEN})", ROWS.format("training")),
    "rows, trained with prefetching": (f"epoch({UNEVEN}, prefetch=2)", ROWS.format("training")),
    "rows, evaluated": (f"made().evaluate({UNEVEN}, 8)", ROWS.format("evaluation")),
    "rows, predicted": (
        f"made().predict({UNEVEN}, 8, lambda model, one: model(one['input']))",
        ROWS.format("prediction"),
    ),
    "rows, validated": (
        f"made().train(rows, 1, 16, {UNEVEN})",
        ROWS.format("validation"),
    ),
    "rows, in single steps": (f"steps({UNEVEN})", ROWS.format("calls of train_step")),
    "number, trained": (f"epoch({FEWER})", ENDED.format("training")),
    "number, evaluated": (f"made().evaluate(lambda: iter({FEWER}), 8)", ENDED.format("evaluation")),
    "number, by length": (
        f"made().train({FEWER}, 1, 8)",
        "The number of batches in `train_data` is 5 in process 0 and 4 in process 1",
    ),
    "order of known shapes": (f"epoch({OTHER_ORDER})", "batch 2 of the training (the first is batch 0) has 8 rows in"),
    "dtype": (
        f"epoch({OTHER_DTYPE})",
        "target: float32(16, 256) in process 0 and input: float32(16, 16), target: float16",
    ),
}
QUICK = "rows, trained", "number, trained"
CALLERS = "train_epoch", "train"


@pytest.mark.parametrize(
    "course", [pytest.param(one, marks=[] if one in QUICK else pytest.mark.slow) for one in COURSES]
)
def test_batches_that_differ_end_all_processes_with_an_error(course):
    """A process that is in a step meanwhile, which waits for the others, is ended by them."""
    call, expected = COURSES[course]
    results, _ = finish(start(JOIN + HEAD + f"{call}\nprint('went on')", 2), timeout=60)
    for status, out, errors in results:
        assert status == 1
        assert "went on" not in out
        assert expected in errors
        assert "DistributedError" in errors


COUNTED = """
from trainer.distributed import passes, rounds

asked = []
exchange = passes.exchange
passes.exchange = lambda *args, **options: asked.append(args[0]) or exchange(*args, **options)
found = {}
for name, batches in {
    "one shape": parts(*[4] * 11), "short last": parts(8, 8, 8, 8, 7), "two shapes": parts(4, 8, 4, 8, 4, 8)
}.items():
    del asked[:]
    epoch(batches)
    found[name] = len(asked)
barrier("done")
keys = [key for key in rounds.rounds_in_store() if not key.startswith("barrier")] if process == 0 else []
print(json.dumps([found, keys]))
"""


@pytest.mark.slow
def test_a_pass_exchanges_a_message_for_each_shape_and_at_its_end():
    results = run(HEAD + COUNTED, 2)
    assert [status for status, _, _ in results] == [0, 0], results
    for _, out, _ in results:
        found, keys = json.loads(out.splitlines()[-1])
        assert found == {"one shape": 2, "short last": 3, "two shapes": 3}
        assert keys == []


LEFT = """
import threading
from trainer.distributed import coordination, rounds

def threads():
    return sum(thread.name == "trainer-pass" for thread in threading.enumerate())

def keys(name):
    barrier(name)
    kept = [key for key in rounds.rounds_in_store() if not key.startswith("barrier")]
    kept += coordination.read_directory("trainer/passes")
    barrier(f"{name} seen")
    return kept

def only_full(model, batch):
    if len(batch["input"]) < 16:
        raise ValueError("a short batch")
    return model(batch["input"])

found, trainer = {}, made()
for _ in range(2):
    trainer.find_learning_rate(lambda: iter(parts(8, 8, 8, 8)), 8, steps=10)
found["range test"] = [threads(), keys("range test")]
try:
    trainer.predict(lambda: iter(parts(8, 4, 8)), 8, only_full)
except ValueError as error:
    # The traceback holds the frames, and with them the batches.
    found["prediction"] = [str(error).splitlines()[0], threads(), keys("prediction")]
single = made()
for size in 8, 4, 8:
    single.train_step(parts(size)[0])
    single.validate_step(parts(size)[0])
found["open"] = threads()
single.close()
found["single steps"] = [threads(), keys("single steps")]
single.train_step(parts(8)[0])
single.close()
print(json.dumps(found))
barrier("done")
"""


@pytest.mark.slow
def test_a_pass_that_is_left_before_its_end_leaves_no_thread_and_no_key():
    results = run(HEAD + LEFT, 2)
    assert [status for status, _, _ in results] == [0, 0], results
    for _, out, _ in results:
        found = json.loads(out.splitlines()[-1])
        assert found == {
            "range test": [0, []],
            "prediction": ["a short batch", 0, []],
            "open": 2,
            "single steps": [0, []],
        }


LIMITED = """
FEWER, MORE = parts(*[8] * (5 - process)), parts(*[8] * (3 + process))
both = {"train_data_loader": FEWER, "val_data_loader": MORE}
found = {}
for name, limit in {"fast_dev_run": 2, "overfit_batches": 2}.items():
    for caller in "train_epoch", "train":
        trainer = made(**{name: limit}, **(both if caller == "train_epoch" else {}))
        trainer.train_epoch() if caller == "train_epoch" else trainer.train(FEWER, 1, 8, MORE)
        found[f"{caller}, {name}"] = trainer.step

class Unknown(list):
    def __len__(self):
        if process == 1:
            raise RuntimeError("not yet")
        return super().__len__()

found["unknown"] = made().evaluate(Unknown(parts(8, 8)), 8)["loss"] > 0
print(json.dumps(found))
barrier("done")
"""


@pytest.mark.slow
def test_only_the_lengths_of_what_is_drawn_are_compared():
    """The loaders are longer than the run is, and of other lengths in each process; with overfitting, one is unused."""
    results = run(HEAD + LIMITED, 2)
    assert [status for status, _, _ in results] == [0, 0], results
    for _, out, _ in results:
        found = json.loads(out.splitlines()[-1])
        limited = {f"{caller}, {name}": 2 for name in ("fast_dev_run", "overfit_batches") for caller in CALLERS}
        assert found == {**limited, "unknown": True}
