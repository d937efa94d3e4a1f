"""The examples reach their figures."""

import importlib
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES))

    def load(name):
        monkeypatch.delitem(sys.modules, name, raising=False)
        return importlib.import_module(name)

    return load


@pytest.mark.slow
def test_a_student_learns_from_its_teacher(example, tmp_path):
    result = example("distillation").main(tmp_path)
    assert result["teacher"] > 0.97
    assert result["student"] > 0.85
    assert result["student, pure core"] > 0.85


@pytest.mark.slow
def test_generated_digits_are_taken_for_digits(example, tmp_path):
    result = example("gan").main(tmp_path)
    for loop in ("", ", pure core"):
        assert result[f"sure{loop}"] > 0.7 > result["sure before"]
        assert result[f"entropy{loop}"] > 2.1 > result["entropy before"]


@pytest.mark.slow
def test_halves_find_each_other_by_either_way(example, tmp_path):
    result = example("contrastive").main(tmp_path)
    assert result["found"] > 0.25 > 0.01 > result["found before"]
    assert result["found, pure core"] > 0.25
    assert result["loss by shard_map"] == pytest.approx(result["loss by jit"], rel=1e-5)


@pytest.mark.slow
def test_an_agent_learns_from_its_buffer(example, tmp_path):
    result = example("bandit").main(tmp_path)
    assert result["accuracy"] > 0.95
    assert result["accuracy, pure core"] > 0.95
