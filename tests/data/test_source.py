"""Data in memory is held by a `datarax.MemorySource`, which is imported beside the first steps."""

import subprocess
import sys

import numpy as np

from trainer import InMemoryData

IMPORTS_LATE = """
import sys
import numpy as np
from trainer import InMemoryData

data = InMemoryData({"input": np.arange(12.0)}, 4)
batches = data.in_order()
assert next(batches)["input"].tolist() == [0, 1, 2, 3]
assert "datarax" not in sys.modules
assert [batch["input"].tolist() for batch in batches] == [[4, 5, 6, 7], [8, 9, 10, 11]]
from datarax.sources import MemorySource
assert isinstance(data.source, MemorySource)
"""


def test_the_first_batch_does_not_wait_for_the_import():
    subprocess.run([sys.executable, "-c", IMPORTS_LATE], check=True, timeout=300)


def test_later_passes_take_the_arrays_of_the_source():
    columns = {"input": np.arange(12.0), "more": {"target": np.arange(12)}}
    data = InMemoryData(columns, 5)
    first = list(data.in_order())
    assert data.source.data["0"] is columns["input"]
    assert data.source.data["1"] is columns["more"]["target"]
    data.source.data["0"] = columns["input"] + 100
    second = list(data.in_order())
    assert [len(batch["input"]) for batch in second] == [5, 5, 2]
    for one, other in zip(first, second, strict=True):
        np.testing.assert_array_equal(one["input"] + 100, other["input"])
        np.testing.assert_array_equal(one["more"]["target"], other["more"]["target"])
