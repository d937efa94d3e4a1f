"""Recipes are shorter than the same by hand, and learn the same; tables of README and `docs/recipes.md` count them."""

import inspect
import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from tests.recipes import RECIPES, Net

ROOT = Path(__file__).parent.parent


def data(steps=6, rows=64):
    x = np.random.default_rng(0).normal(size=(steps, rows, 8)).astype(np.float32)
    label = (x[..., 0] * x[..., 1] > 0).astype(np.int32)
    return [{"input": x[step], "label": label[step]} for step in range(steps)]


def lines_of(function):
    """The lines of the body, without those that are blank. No comment is in them."""
    body = inspect.getsource(function).splitlines()[1:]
    return len([line for line in body if line.strip()])


@pytest.mark.parametrize("name", RECIPES)
def test_both_learn_the_same(name):
    recipe, results = RECIPES[name](), []
    for train in (recipe.ours, recipe.by_hand):
        model = train(Net(nnx.Rngs(0)), data())
        results.append(jax.device_get(nnx.to_pure_dict(nnx.state(model, nnx.Param))))
    start = jax.device_get(nnx.to_pure_dict(nnx.state(Net(nnx.Rngs(0)), nnx.Param)))
    jax.tree.map(lambda one, other: np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5), *results)
    moved = jax.tree.map(lambda one, other: np.abs(one - other).max(), results[0], start)
    assert max(jax.tree.leaves(moved)) > 1e-3


@pytest.mark.parametrize("page", ["docs/recipes.md", "README.md"])
def test_the_table_counts_their_lines(page):
    rows = re.findall(r"^\| (.+) \| (\d+) \| (\d+) \|$", (ROOT / page).read_text(encoding="utf-8"), re.MULTILINE)
    counted = {name: (lines_of(recipe.ours), lines_of(recipe.by_hand)) for name, recipe in RECIPES.items()}
    assert {name: (int(ours), int(by_hand)) for name, ours, by_hand in rows} == counted
    assert all(ours < by_hand for ours, by_hand in counted.values())
