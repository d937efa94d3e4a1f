"""What MkDocs calls when it builds the site (``hooks`` in mkdocs.yml), and what mkdocstrings does with a docstring."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import griffe
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

sys.path.insert(0, str(Path(__file__).parent))
from reference import HOMES, PAGES, as_markdown, linked, reference


class Docstrings(griffe.Extension):
    """Makes Markdown of every docstring."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Is called for every object that was loaded."""
        del kwargs
        about = re.fullmatch(r"property\(.*, doc='(.*)'\)", str(getattr(obj, "value", "")))
        if about:
            obj.docstring, obj.value = griffe.Docstring(about[1], parent=obj), None
            obj.labels = {"property"}
        if obj.docstring is not None:
            obj.docstring.value = as_markdown(obj.docstring.value)


def on_config(config: Any) -> Any:
    """Adds the reference to the navigation."""
    config.nav.append({"Reference": [*(f"reference/{package}.md" for package in PAGES), "reference/commands.md"]})
    return config


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages of the reference."""
    for path, text in reference().items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Links code on the other pages to the reference, and drops what the fence of a block says beside its language."""
    del kwargs
    markdown = re.sub(r"^(\s*```python) \w+$", r"\1", markdown, flags=re.MULTILINE)
    return markdown if page.file.src_uri.startswith("reference/") else linked(markdown, is_page=True)


def on_page_content(html: str, **kwargs: Any) -> str:
    """Lets code in tables break after its punctuation, so that tables fit on a phone."""
    del kwargs
    code = re.compile(r"(?<=<code>)[^<]+(?=</code>)")
    return re.sub(
        r"<t[dh].*?</t[dh]>",
        lambda cell: code.sub(lambda text: re.sub(r"([_/.:]+|=(?!\))|(?<=\w)\((?!\)))", r"\1<wbr>", text[0]), cell[0]),
        html,
        flags=re.DOTALL,
    )


class Links(HTMLParser):
    """What a built page is made of: ids, links, and what it loads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keeps what matters of a tag."""
        values = {name: value or "" for name, value in attrs}
        self.ids.update(values[name] for name in ("id", "name") if name in values)
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if "src" in values or (tag == "link" and values.get("rel") not in ("canonical", "next", "prev")):
            self.loads.append(values.get("src") or values.get("href", ""))


def on_post_build(config: Any) -> None:
    """Checks the built site: every link and anchor, that nothing is loaded from elsewhere, that every name is there."""
    site = Path(config.site_dir).resolve()
    pages = {path: Links(path.read_text(encoding="utf-8")) for path in site.rglob("*.html") if path.name != "404.html"}
    wrong = []
    for path, page in pages.items():
        if "```" in path.read_text(encoding="utf-8"):
            wrong.append(f"{path.relative_to(site)}: shows a fence of a block of code")
        for link in page.links:
            if re.match(r"https?:|mailto:", link):
                continue
            name, _, anchor = link.partition("#")
            target = (path.parent / unquote(name)).resolve() if name not in ("", ".") else path
            target = target / "index.html" if target.is_dir() else target
            if not target.exists() or (anchor and target in pages and unquote(anchor) not in pages[target].ids):
                wrong.append(f"{path.relative_to(site)}: {link} leads nowhere")
        wrong += [f"{path.relative_to(site)}: loads {load}" for load in page.loads if re.match(r"https?:|//", load)]
    ids = {found for path, page in pages.items() if path.parent.name == "reference" for found in page.ids}
    wrong += [f"{home} is on no page of the reference" for home in HOMES.values() if home not in ids]
    if wrong:
        raise PluginError("\n".join(wrong))
