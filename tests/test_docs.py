"""The pages in `docs` are true: their code runs, their links lead somewhere, their tests and messages are there."""

import ast
import importlib.util
import re
import textwrap
from pathlib import Path

import pytest

import trainer

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(page.name for page in DOCS.glob("*.md"))
LINKING = [*(f"docs/{name}" for name in PAGES), "README.md"]
NAMED = re.compile(r"`((?:\w+/)*test_\w+\.py)::(test_\w+)`")
BLOCK = re.compile(r"^```python\n(.*?)^```", re.DOTALL | re.MULTILINE)

# Pages whose promises each name a test.
PROMISING = ["checkpoints.md", "loggers.md", "refused.md"]

# Pages whose code takes a second or two.
FAST = ["from-reference.md", "mental-model.md"]


def text_of(name):
    return (DOCS / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("name", PAGES)
def test_every_test_that_a_page_names_is_there(name):
    named = NAMED.findall(text_of(name))
    assert len(named) > 10 or name not in (*PROMISING, "recipes.md")
    missing = [
        f"{file}::{test}"
        for file, test in named
        if not (ROOT / "tests" / file).is_file()
        or not re.search(rf"def {test}\b", (ROOT / "tests" / file).read_text(encoding="utf-8"))
    ]
    assert missing == []


@pytest.mark.parametrize("name", PROMISING)
def test_every_row_names_a_test(name):
    rows = [
        line
        for line in text_of(name).splitlines()
        if line.startswith("| ") and not re.match(r"\| [\w ]+ \|( [\w ]+ \|)* test \|", line)
    ]
    assert [row for row in rows if not NAMED.search(row)] == []


def run(name, blocks=BLOCK):
    """Runs the blocks of a page in order and returns their names; what needs packages of others is marked otherwise."""
    names = {}
    for number, block in enumerate(re.findall(blocks, text_of(name))):
        exec(compile(block, f"{name}, block {number}", "exec"), names)
    return names


# All but those that have a test of their own below.
OWN = ["start.md", "recipes.md", "loggers.md", "data.md", "models.md"]
PLAIN = [name for name in PAGES if BLOCK.search(text_of(name)) and name not in OWN]


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in FAST else pytest.mark.slow) for name in PLAIN])
def test_the_blocks_of_a_page_run_in_order(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(name)


@pytest.mark.parametrize("name", PAGES)
def test_all_python_is_run(name):
    """A fence is of Python that is run here, or by the tests of packages of others, or of no Python."""
    fences = re.findall(r"^ *```(.*)$", text_of(name), re.MULTILINE)
    assert set(fences[::2]) <= {"python", "python third_party", "python heavy", "text", "yaml", ""}
    assert set(fences[1::2]) <= {""}
    assert fences.count("python") == len(BLOCK.findall(text_of(name)))


@pytest.mark.slow
def test_getting_started_reaches_its_accuracy(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("start.md")
    assert names["result"]["accuracy"] > 0.95
    assert names["logits"].shape == (360, 10)
    assert (tmp_path / "runs" / "digits" / "curves.png").read_bytes().startswith(b"\x89PNG")


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
    names = run("recipes.md")
    assert names["winner"].step == 56
    assert names["watched"].history[-1].keys() > {"learning_rate", "gradient_norm", "update_ratio"}


def test_the_page_of_loggers_runs(tmp_path, monkeypatch, capsys):
    """What needs packages of others is run by `third_party/test_loggers.py`."""
    monkeypatch.chdir(tmp_path)
    run("loggers.md")
    assert (
        len(re.findall(r"^```python", text_of("loggers.md"), re.MULTILINE))
        == len(BLOCK.findall(text_of("loggers.md"))) + 1
    )
    printed = capsys.readouterr()
    assert printed.out.startswith("[ 1.  5.  8. 10.")
    assert "here it would post 5 {'train/loss': " in printed.out
    assert "step 8 is in runs/copies/checkpoint_8.msgpack" in printed.out
    assert "epoch/loss" in printed.err
    assert sorted(path.name for path in (tmp_path / "runs" / "own").rglob("*.png")) == ["00000008.png", "00000016.png"]
    with (tmp_path / "runs" / "resumed" / "metrics.csv").open() as file:
        steps = [line.split(",")[0] for line in file]
    assert len(steps) == len(set(steps)) > 5


@pytest.fixture(scope="module")
def reference():
    """The module that makes the pages of the reference."""
    spec = importlib.util.spec_from_file_location("reference", DOCS / "reference.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def anchors(path):
    """The anchors of a page, as Python-Markdown and GitHub make them of headings."""
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) for heading in headings}


def links_of(name):
    text = re.sub(r"^```.*?^```", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return re.findall(r"\]\(([^)\s]+)\)", text)


@pytest.mark.parametrize("name", LINKING)
def test_links_within_the_project_lead_somewhere(name, reference):
    generated = {f"reference/{package}.md" for package in [*reference.PAGES, "commands"]}
    for link in links_of(name):
        if ":" in link:
            continue
        target, _, anchor = link.partition("#")
        path = (ROOT / name).parent / target if target else ROOT / name
        assert path.is_file() or target in generated, link
        if anchor and path.is_file():
            assert anchor in anchors(path), link


@pytest.mark.parametrize("name", LINKING)
def test_links_to_elsewhere_are_well_formed(name):
    for link in links_of(name):
        if ":" in link:
            assert re.fullmatch(r"https://[a-z0-9-]+(\.[a-z0-9-]+)+(/[\w./~#%-]*)?", link), link


def test_links_in_docstrings_are_well_formed():
    """None is fetched: the host is one that we know, and no end of a sentence is taken for a part of the path."""
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "trainer").rglob("*.py")]
    links = [link for text in texts for link in re.findall(r"\bhttps://[^\s`)\"']*[^\s`)\"'.,;:]", text)]
    assert len(links) >= 9
    assert [link for link in links if not re.fullmatch(r"https://[a-z0-9.-]+\.[a-z]+(/[\w./~#%-]*)?", link)] == []
    assert {link.split("/")[2] for link in links} <= {
        *("arxiv.org", "doi.org", "docs.jax.dev", "docs.wandb.ai", "github.com", "jsonlines.org", "mlflow.org"),
        *("ui.perfetto.dev", "www.rfc-editor.org"),
    }


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"- (?:\w+: )?([\w-]+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == PAGES


def test_every_public_name_is_on_one_page_of_the_reference(reference):
    lines = (ROOT / "trainer" / "__init__.py").read_text(encoding="utf-8")
    public = re.findall(r"^ *from trainer\.\S+ import (\w+) as \1$", lines, re.MULTILINE)
    assert len(public) > 80
    pages = [reference.page(package, names) for package, names in reference.PAGES.items()]
    for name in public:
        directive = f"::: {getattr(trainer, name).__module__}.{name}"
        assert sum(directive in page.splitlines() for page in pages) == 1, name


def test_the_commands_have_their_help_texts(reference):
    page = reference.commands()
    headings = re.findall(r"^## trainer (\w+)$", page, re.MULTILINE)
    assert {"demo", "train", "plan", "plot", "inspect", "convert"} <= set(headings)
    assert page.count("usage: trainer") == len(headings) + 1


def test_a_docstring_becomes_markdown(reference):
    text = """Makes it. It is::

        if x:
            y = "`Run`"

    See `trainer.Run` and ``Run``.

    Args:
        x: As in::

                x = 1, ...
                at last

    Returns:
        A ``{a: b}`` or two: this, or that: none.

    Example:
        >>> 1
        1

        End."""
    markdown = """Makes it. It is:

    ```python
    if x:
        y = "`Run`"
    ```

    See [`trainer.Run`][trainer.run.Run] and ``Run``.

    Args:
        x: As in:

        ```text
        x = 1, ...
        at last
        ```

    Returns:
        A ``{a: b}`` or two&#58; this, or that: none.

    Example:
        ```pycon
        >>> 1
        1
        ```

        End."""
    assert reference.as_markdown(textwrap.dedent("    " + text)) == textwrap.dedent("    " + markdown)


def test_names_on_pages_become_links(reference):
    def linked(text):
        return reference.linked(text, is_page=True)

    assert linked("`Trainer.train`") == "[`Trainer.train`][trainer.api.Trainer.train]"
    assert linked("| `Run` | `Meter` |") == "| `Run` | [`Meter`][trainer.metrics.throughput.Meter] |"
    for text in ("`trainer.evaluate`", "`predict`", "`Unknown`", "# `Run`", "[`Run`](x.md)", "```python\n`Run`\n```"):
        assert linked(text) == text


def messages():
    """The texts of all errors and warnings, "…" in place of what is filled in."""
    for path in (ROOT / "trainer").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_every_message_that_is_explained_is_in_the_sources():
    known = "\n".join(messages())
    rows = re.findall(r"^\| `` (.+?) `` \| (.+?) \| (.+?) \|$", text_of("troubleshooting.md"), re.MULTILINE)
    assert len(rows) > 60
    missing = [quoted for quoted, _, _ in rows if not re.search(pattern(quoted), known)]
    assert missing == []


def pattern(quoted):
    """A message as a pattern: "…" stands for something that is filled in, with some text around it."""
    return "[^\n]*?".join(re.escape(part) for part in quoted.split("…"))


def test_every_figure_is_one_of_the_results():
    results = (ROOT / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
    tables = [line for line in text_of("figures.md").splitlines() if line.startswith("| ")]
    figures = [cell for line in tables for cell in re.findall(r"(?<![\w.,-])\d(?:[\d,.]*\d)?", line)]
    assert len(figures) > 100
    assert [figure for figure in figures if not re.search(rf"(?<![\d.,]){re.escape(figure)}(?![\d])", results)] == []


def test_each_table_of_figures_names_its_command():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8").replace("\\\n", " ")
    (benchmarks,) = re.findall(r"^BENCHMARKS := (.+)$", makefile, re.MULTILINE)
    for section in text_of("figures.md").split("\n## ")[1:]:
        named = re.findall(r"make bench BENCHMARKS=(\w+)", section)
        assert named
        assert set(named) <= set(benchmarks.split())


def test_pins_of_the_site_are_names_and_versions_only():
    lines = (ROOT / "requirements-docs.txt").read_text(encoding="utf-8").splitlines()
    assert all(re.fullmatch(r"[a-z0-9-]+==[\w.]+", line) for line in lines)
    assert len(lines) == len({line.split("==")[0] for line in lines})


def test_the_page_of_callbacks_names_every_event():
    listed = re.findall(r"^ *(on_\w+)\(", text_of("callbacks.md"), re.MULTILINE)
    assert sorted(listed) == sorted(trainer.callbacks.EVENTS)


@pytest.mark.slow
def test_the_pages_of_data_and_models_do_what_they_say(tmp_path, monkeypatch, capsys):
    """What needs packages of others is run in `third_party`."""
    monkeypatch.chdir(tmp_path)
    assert run("data.md")["ahead"].step == 24
    capsys.readouterr()
    names = run("models.md")
    assert (names["model"].classifier.kernel == names["trainer"].model.classifier.kernel).all()
    assert capsys.readouterr().out == "(256, 1)\n"
