"""The pages of the reference, made of the ledgers of `trainer`, and links to them. It needs no other package."""

import ast
import contextlib
import io
import os
import re
import textwrap
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "trainer"

TITLES = {
    "state": "The state",
    "steps": "Steps",
    "run": "The run",
    "loop": "The loop",
    "api": "Trainer",
    "types": "Signatures",
    "core": "Parts of a step",
    "config": "Configuration",
    "compile": "Compilation",
    "distributed": "Many processes",
}


def source(module: str) -> Path:
    """Returns the file of a module, ``trainer.state``."""
    path = ROOT.joinpath(*module.split("."))
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def tree(module: str) -> ast.Module:
    """Returns the syntax tree of a module."""
    return ast.parse(source(module).read_text(encoding="utf-8"))


def ledger(module: str) -> dict[str, str]:
    """Returns the names that a package exports, in reading order, each with the module that defines it."""
    return {
        alias.name: node.module
        for node in ast.walk(tree(module))
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("trainer.")
        for alias in node.names
        if alias.name == alias.asname
    }


def contents() -> dict[str, dict[str, str]]:
    """Returns the names on each page: those of `trainer`, then what the package exports beyond them."""
    pages: dict[str, dict[str, str]] = {}
    for name, module in ledger("trainer").items():
        pages.setdefault(module.split(".")[1], {})[name] = module
    for package, names in pages.items():
        names.update({name: module for name, module in ledger(f"trainer.{package}").items() if name not in names})
    return pages


def methods(module: str, name: str) -> set[str]:
    """Returns the public methods and properties that a class defines itself; none of a function."""
    found = [node for node in tree(module).body if isinstance(node, ast.ClassDef) and node.name == name]
    return {
        node.name
        for node in (found[0].body if found else [])
        if isinstance(node, ast.FunctionDef) and not node.name.startswith("_") and ast.get_docstring(node)
    }


PAGES = contents()
HOMES = {name: f"{module}.{name}" for names in PAGES.values() for name, module in names.items()}
for _name, _home in list(HOMES.items()):
    _module = _home.rpartition(".")[0]
    HOMES.update({f"{_name}.{method}": f"{_home}.{method}" for method in methods(_module, _name)})
HOMES |= {f"Trainer.{name}": f"trainer.api.Trainer.{name}" for name in methods("trainer.fit.inspection", "Inspection")}

# What stands before a colon in a section "Returns" would be taken for a type.
RETURNS = re.compile(r"(^ *(?:Returns|Yields):\n(?:[^`:\n]|``[^`\n]*``|`[^`\n]*`)*): ", re.MULTILINE)

CODE = re.compile(r"(?<![`\[\w])`(trainer\.)?((?:\w+\.)*\w+)(\(\))?`(?![`\w])")


def linked(text: str, *, is_page: bool) -> str:
    """Returns a text in which public names in backticks are links to the reference, outside of code and headings.

    Left as they are: on a page ``trainer.step``, an attribute of an instance; common words such as ``predict``; and
    the first column of a table, which may name things of another library.
    """

    def link(found: re.Match[str]) -> str:
        package, dotted, _ = found.groups()
        name = dotted if dotted in HOMES else dotted.rpartition(".")[2]
        is_meant = name in HOMES and (name == dotted or HOMES[name] == f"trainer.{dotted}")
        if is_page and (package or re.fullmatch("[a-z]+", name)):
            is_meant = False
        return f"[{found[0]}][{HOMES[name]}]" if is_meant else found[0]

    lines, fence = [], ""
    for line in text.split("\n"):
        mark = re.match(r"\s*(```+)", line)
        if mark and not fence:
            fence = mark[1]
        elif mark and mark[1] == fence:
            fence = ""
        elif not fence and not line.startswith("#"):
            first = re.match(r"\| .*? \|" if is_page else "", line)
            start = first.end() if first else 0
            line = line[:start] + CODE.sub(link, line[start:])
        lines.append(line)
    return "\n".join(lines)


def as_markdown(text: str) -> str:
    """Returns a docstring with its literal blocks (``::``) and doctests as fenced code, and its names as links."""
    lines: list[str] = []
    fence = None  # the indent of the code in it, and that of the fence
    margin = 0  # the indent of the latest line of text
    for line in [*text.split("\n"), ""]:
        indent = len(line) - len(line.lstrip())
        awaits = bool(lines) and fence is None and next((old for old in reversed(lines) if old), "").endswith("::")
        if fence is not None and line.strip() and indent < fence[0]:
            lines = [*closed(lines, fence[1]), ""]
            fence = None
        if fence is None and awaits and line.strip():
            lines = [line[:-1] if line.endswith("::") else line for line in lines]
            fence = indent, margin
            lines.append(" " * margin + "```")
        elif fence is None and line.lstrip().startswith(">>>"):
            fence = indent, indent
            # Below a heading such as "Example:" an empty line would end the section.
            is_below_heading = bool(lines) and lines[-1].endswith(":")
            lines += [*([] if is_below_heading else [""]), " " * indent + "```pycon"]
        elif fence is not None and fence[0] == fence[1] and not line.strip():  # the end of a doctest
            lines = closed(lines, fence[1])
            fence = None
        if fence is None and line.strip():
            margin = indent
        lines.append(line if fence is None else line[fence[0] - fence[1] :])
    if fence is not None:
        lines = closed(lines, fence[1])
    text = RETURNS.sub(r"\1&#58; ", "\n".join(lines).rstrip())
    return linked(text, is_page=False)


def closed(lines: list[str], indent: int) -> list[str]:
    """Returns lines whose open fence is closed, without blank lines at its end; it says if it holds Python."""
    while not lines[-1].strip():
        lines = lines[:-1]
    start = max(number for number, line in enumerate(lines) if line.lstrip().startswith("```"))
    if lines[start].endswith("```"):
        language = "python"
        try:
            ast.parse(textwrap.dedent("\n".join(lines[start + 1 :])))
        except SyntaxError:
            language = "text"
        lines[start] += language
    return [*lines, " " * indent + "```"]


def page(package: str, names: dict[str, str]) -> str:
    """Returns the page of a package: what it says of itself, then each of its names."""
    module = "trainer.callbacks.base" if package == "callbacks" else f"trainer.{package}"  # where the events are
    about = as_markdown(ast.get_docstring(tree(module)) or "")
    directives = [
        f"::: {module}.{name}" + ("\n    options: {inherited_members: true}" if name == "Trainer" else "")
        for name, module in names.items()
    ]
    return "\n\n".join([f"# {TITLES.get(package, package.capitalize())}", about, *directives]) + "\n"


def commands() -> str:
    """Returns the page of the command: its help texts."""
    os.environ["COLUMNS"] = "90"
    from trainer.commands.main import main

    def told(*words: str) -> str:
        out = io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
            main(words)
        return f"```text\n{out.getvalue().rstrip()}\n```"

    names = re.findall(r"^    (\w+)  ", told("--help"), re.MULTILINE)
    parts = [f"## trainer {name}\n\n{told(name, '--help')}" for name in names]
    return "\n\n".join(["# Commands", told("--help"), *parts]) + "\n"


def reference() -> dict[str, str]:
    """Returns the generated pages: paths below `docs` and their texts."""
    pages = {f"reference/{package}.md": page(package, names) for package, names in PAGES.items()}
    return {**pages, "reference/commands.md": commands()}
