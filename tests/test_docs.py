"""The pages in `docs` name the tests that keep what they say."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMED = re.compile(r"`((?:\w+/)*test_\w+\.py)::(test_\w+)`")


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_every_test_that_a_page_names_is_there(page):
    named = NAMED.findall(page.read_text(encoding="utf-8"))
    assert len(named) > 10
    missing = [
        f"{file}::{test}"
        for file, test in named
        if not (ROOT / "tests" / file).is_file()
        or not re.search(rf"def {test}\b", (ROOT / "tests" / file).read_text(encoding="utf-8"))
    ]
    assert missing == []


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_every_row_names_a_test(page):
    text = page.read_text(encoding="utf-8")
    rows = [
        line
        for line in text.splitlines()
        if line.startswith("| ") and not re.match(r"\| [\w ]+ \|( [\w ]+ \|)* test \|", line)
    ]
    assert [row for row in rows if not NAMED.search(row)] == []


@pytest.mark.slow
def test_the_recipes_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for number, recipe in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL)):
        exec(compile(recipe, f"recipe {number}", "exec"), names)
    assert names["winner"].step == 24
    assert names["watched"].history[-1].keys() > {"learning_rate", "gradient_norm", "update_ratio"}
