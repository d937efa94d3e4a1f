"""Data in memory is held by a `datarax.MemorySource`, if there is datarax; it is imported beside the first steps."""

import subprocess
import sys

import jax
import numpy as np
import pytest

from tests.problems import Linear, config, regression, squared_error
from trainer import InMemoryData, Trainer

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


@pytest.fixture
def no_datarax(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "datarax"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "datarax", None)  # its import raises ModuleNotFoundError


def weights_after_three_epochs():
    trainer = Trainer(Linear(4), config(), loss_fn=squared_error, progress=False)
    trainer.train(regression(), 3, 8)
    return jax.tree.leaves(trainer.state.params)


def test_without_datarax_a_run_has_the_same_bits(request):
    expected = weights_after_three_epochs()
    request.getfixturevalue("no_datarax")
    for one, other in zip(weights_after_three_epochs(), expected, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.usefixtures("no_datarax")
def test_without_datarax_every_pass_has_the_examples_and_only_the_source_is_refused():
    columns = {"input": np.arange(12.0), "more": {"target": np.arange(12)}}
    data = InMemoryData(columns, 5)
    with pytest.raises(ImportError, match=r"datarax cannot be imported \(.*pip install 'nnx-trainer\[datarax\]'"):
        data.source  # noqa: B018
    for _ in range(2):
        batches = list(data.shuffled((1,), 0))
        assert sorted(np.concatenate([batch["more"]["target"] for batch in batches])) == list(range(12))
    assert data.columns()[0][0] is columns["input"]
    assert data.fingerprint() == InMemoryData(columns, 5).fingerprint()
