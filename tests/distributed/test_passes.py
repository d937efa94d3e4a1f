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
