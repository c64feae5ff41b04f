"""Hooks of the documentation's site: what pages share with the repository, and tables of its code.

A page may hold, on lines of their own::

    <!-- include: README.md -->      a file of the repository; its links are followed
    <!-- settings: policies -->      what `table` makes of docstrings, so that it cannot go stale

Links to files outside of docs/ lead to the page that includes them; where none does, and for
folders without a page, they are shown as paths, and have to exist. A test renders pages with
:func:`render`; mkdocs calls those that begin with ``on_``.
"""

from __future__ import annotations

import dataclasses
import inspect
import logging
import os
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
INCLUDE = re.compile(r"^<!-- include: (\S+) -->$", re.MULTILINE)
TABLE = re.compile(r"^<!-- settings: (\w+) -->$", re.MULTILINE)
LINK = re.compile(r"(!?)\[((?:[^\]`]|`[^`]*`)*)\]\(([^)\s#]*)(#[^)\s]*)?\)")
FENCE = re.compile(
    r"^(```\w+) \S+=\S+$", re.MULTILINE
)  # marks of tests, which mkdocs does not know
CODE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):<code>~?([^<]*)</code>")
PAGES = {  # files of the repository, and the pages that include them
    "README.md": "index.md",
    "CONTRIBUTING.md": "extending.md",
    "CHANGELOG.md": "changelog.md",
}
WIDE = ("methods.md", "compatibility.md")  # whose tables need the room of the table of contents
log = logging.getLogger("mkdocs.hooks.docs_site")


def on_config(config: Any, **_: Any) -> Any:
    """Studies that the menu lacks go behind those that it has; other pages have to be in it."""
    for part in config["nav"]:
        known = part.get("Studies", ())
        if known:
            there = (path.relative_to(DOCS).as_posix() for path in DOCS.glob("studies/*.md"))
            known += sorted(set(there) - set(known))
    return config


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    if page.file.src_uri in WIDE:
        page.meta["hide"] = ["toc"]
    return render(markdown, page.file.src_uri)


def on_page_content(html: str, **_: Any) -> str:
    """Roles of docstrings, which Python's help shows too, as plain code."""
    return ROLE.sub(r"<code>\1</code>", html)


def render(markdown: str, page: str, warn: Callable[..., None] = log.warning) -> str:
    """The Markdown that mkdocs gets.

    Args:
        markdown: of the page.
        page: its path within docs/.
        warn: told of links that lead nowhere; a warning fails a strict build.
    """
    here = (DOCS / page).parent

    def include(found: re.Match[str]) -> str:
        path = ROOT / found[1]
        return _links(path.read_text(encoding="utf-8"), path.parent, here, page, warn)

    markdown = _links(markdown, here, here, page, warn)
    markdown = TABLE.sub(lambda found: table(found[1]), INCLUDE.sub(include, markdown))
    return FENCE.sub(r"\1", markdown)


def _links(text: str, base: Path, here: Path, page: str, warn: Callable[..., None]) -> str:
    """Links of a text that lies in ``base``, for a page in ``here``; code is left alone."""

    def link(found: re.Match[str]) -> str:
        picture, words, target, anchor = found[1], found[2], found[3], found[4] or ""
        if not target or "://" in target or target.startswith("mailto:"):
            return found[0]
        path = Path(os.path.normpath(base / target))
        if not path.exists():
            warn("%s: the link %r leads nowhere", page, target)
        inside = path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else ""
        path = DOCS / PAGES[inside] if inside in PAGES else path
        if path.is_dir() and (path / "README.md").exists():
            path /= "README.md"
        if not path.is_relative_to(DOCS) or path.is_dir():
            return words if words.startswith("`") else f"{words} (`{inside}`)"
        to = Path(os.path.relpath(path, here)).as_posix()
        return f"{picture}[{words}]({to}{anchor})"

    parts = CODE.split(text)
    return "".join(part if at % 2 else LINK.sub(link, part) for at, part in enumerate(parts))


# Tables of settings.


def table(name: str) -> str:
    """A part of a page, in Markdown.

    Args:
        name: ``policies``, ``schedules``, ``forecasts``, ``recipes``, ``models``, or a section of a
            recipe (``forecast``, ``storage``, ``sparse``, ``guidance``, ``group``, ``recipe``).
    """
    from flashomni.engine.forecasts import forecasts
    from flashomni.engine.schedules import schedules
    from flashomni.policies import policies

    if name == "policies":
        return "\n".join(_named(each, cls) for each, cls in policies().items())
    if name == "schedules":
        return "\n".join(_named(each, cls) for each, cls in schedules().items())
    if name == "forecasts":
        rows = (
            f"| `{each}` | {_first(inspect.getdoc(inspect.getmodule(weights)))} |"
            for each, weights in forecasts().items()
        )
        return "\n".join(["| forecast | what it does |", "|---|---|", *rows])
    makers = {"recipes": _recipes, "models": _models}
    return makers[name]() if name in makers else _settings(sections()[name])


def sections() -> dict[str, type]:
    """The parts of a recipe that have settings of their own, by name."""
    from flashomni.engine import Recipe
    from flashomni.engine.groups import Group
    from flashomni.engine.recipe_parts import SECTIONS

    return {**SECTIONS, "group": Group, "recipe": Recipe}


def _named(name: str, cls: type) -> str:
    """A policy or a schedule: its heading, what it does, where it comes from, its settings."""
    doc = inspect.getdoc(cls) or ""
    does = _plain(doc.partition("\nArgs:")[0].partition("\nRaises:")[0].strip())
    source = _first(import_module(cls.__module__).__doc__)
    same = _first(doc) == source
    head = f"### `{name}`\n\n{does}\n" + ("" if same else f"\n*{source}*\n")
    return f"{head}\n{_settings(cls)}\n" if dataclasses.fields(cls) else head


def _settings(cls: Any) -> str:
    """A row a setting: its default, and what its docstring says."""
    said = described(cls)
    rows = [
        f"| `{field.name}` | {_default(field)} | {said.get(field.name, '')} |"
        for field in dataclasses.fields(cls)
    ]
    return "\n".join(["| setting | default | what it does |", "|---|---|---|", *rows])


def described(cls: Any) -> dict[str, str]:
    """The lines of ``Args:`` in the docstring of a class, by name, each in one line."""
    body = (inspect.getdoc(cls) or "").partition("Args:\n")[2]
    found: dict[str, str] = {}
    name = ""
    for line in body.splitlines():
        if not line.strip() or not line.startswith("    "):
            break
        start = re.match(r"    (\w+): (.*)", line)
        if start:
            name, found[start[1]] = start[1], start[2]
        else:
            found[name] += " " + line.strip()
    return {key: _plain(text).replace("|", "\\|") for key, text in found.items()}


def _default(field: Any) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return ""
    if dataclasses.is_dataclass(value):
        return "see below"
    text = "none" if value in (None, (), "") else str(value)
    return f"`{text}`" if len(text) < 40 else f"`{text[:32]} ...`"


def _recipes() -> str:
    from flashomni.engine.recipe import Recipe, methods, presets

    rows = []
    for name in (*presets(), *methods()):
        recipe = Recipe.of(name)
        schedule = recipe.schedule.to_dict()["name"]
        rows.append(
            f"| `{name}` | {recipe.source or 'preset'} | `{recipe.policy.name}` | `{schedule}` | "
            f"`{recipe.forecast.name}` |"
        )
    head = ["| recipe | source | policy | schedule | forecast |", "|---|---|---|---|---|"]
    return "\n".join([*head, *rows])


def _models() -> str:
    from flashomni.models import adapters
    from flashomni.models.generic.blocks import declared

    rows = []
    for name, each in sorted(adapters().items()):
        said = _first(inspect.getdoc(import_module(type(each).__module__)))
        rows.append(f"| `{name}` | adapter | {said.removeprefix(name + ': ')} |")
    for name, blocks in sorted(declared().items()):
        if name not in adapters():
            rows.append(f"| `{name}` | declared | {_declared(blocks)} |")
    rows.append("| any other | generic | blocks found, streams seen in the first call |")
    return "\n".join(["| transformer class | tier | what is known |", "|---|---|---|", *rows])


def _declared(blocks: Any) -> str:
    where = {"first": "text first in the sequence", "last": "text last in the sequence"}
    words = where.get(blocks.text, "no text in the sequence")
    return words if blocks.chain else f"{words}; blocks are cached one by one"


def _first(doc: str | None) -> str:
    """The first paragraph of a docstring."""
    return _plain((doc or "").strip().partition("\n\n")[0].replace("\n", " "))


def _plain(text: str) -> str:
    """Markdown of what docstrings write for Sphinx."""
    text = re.sub(r":(?:class|func|meth|mod|attr|data):`~?([^`]*)`", r"`\1`", text)
    return text.replace("``", "`")
