"""The pages in `docs` name the tests that keep what they say."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NAMED = re.compile(r"`((?:\w+/)*test_\w+\.py)::(test_\w+)`")


@pytest.mark.parametrize("page", sorted((ROOT / "docs").glob("*.md")), ids=lambda page: page.name)
def test_every_test_that_a_page_names_is_there(page):
    named = NAMED.findall(page.read_text(encoding="utf-8"))
    assert len(named) > (5 if page.name == "gallery.md" else 10)
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


def test_the_gallery_shows_every_example_in_a_small_picture():
    text = (ROOT / "docs" / "gallery.md").read_text(encoding="utf-8")
    examples = {path.stem for path in (ROOT / "examples").glob("*.py")} - {"gallery"}
    assert set(re.findall(r"`python examples/(\w+)\.py`", text)) == examples
    assert set(re.findall(r"!\[.{10,}\]\(images/(\w+)\.png\)", text)) == examples
    for name in examples:
        picture = (ROOT / "docs" / "images" / f"{name}.png").read_bytes()
        assert picture.startswith(b"\x89PNG")
        assert len(picture) < 60_000


@pytest.mark.slow
def test_the_recipes_run_in_order(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {}
    text = (ROOT / "docs" / "recipes.md").read_text(encoding="utf-8")
    for number, recipe in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL)):
        exec(compile(recipe, f"recipe {number}", "exec"), names)
    assert names["winner"].step == 24
    assert names["watched"].history[-1].keys() > {"learning_rate", "gradient_norm", "update_ratio"}


def test_the_page_of_loggers_runs(tmp_path, monkeypatch, capsys):
    """What needs packages of others is run by `third_party/test_loggers.py`."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / "loggers.md").read_text(encoding="utf-8")
    names = {}
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", text, re.DOTALL)):
        exec(compile(block, f"block {number}", "exec"), names)
    assert len(re.findall(r"^```python", text, re.MULTILINE)) == number + 2
    printed = capsys.readouterr()
    assert printed.out.startswith("[ 1.  5.  8. 10.")
    assert "here it would post 5 {'train/loss': " in printed.out
    assert "step 8 is in runs/copies/checkpoint_8.msgpack" in printed.out
    assert "epoch/loss" in printed.err
    assert sorted(path.name for path in (tmp_path / "runs" / "own").rglob("*.png")) == ["00000008.png", "00000016.png"]
    with (tmp_path / "runs" / "resumed" / "metrics.csv").open() as file:
        steps = [line.split(",")[0] for line in file]
    assert len(steps) == len(set(steps)) > 5
