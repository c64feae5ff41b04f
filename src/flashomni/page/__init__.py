"""Pages about what was measured: HTML of JSON values, with its own drawings and nothing fetched.

A page is one file: style, script and pictures are inside, and its policy forbids the browser to
load anything. It follows the reader's choice of light or dark, and what cannot run scripts shows
all of it at once. Nothing here knows tensors, matplotlib or the engine.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'"


def escaped(value: Any) -> str:
    """Text as it may stand in HTML, between tags or in a quoted attribute."""
    return html.escape(str(value))


def style() -> str:
    """All of the style, for elements under ``.fo``."""
    return f"<style>{(HERE / 'style.css').read_text(encoding='utf-8')}</style>"


def document(title: str, body: str, moves: bool = True) -> str:
    """A whole page.

    Args:
        title: text, not escaped.
        body: HTML.
        moves: whether there is something in it for the script.
    """
    script = (HERE / "script.js").read_text(encoding="utf-8")
    script = f"<script>\n{script}</script>\n" if moves else ""
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{escaped(title)} · FlashOmni</title>\n{style()}\n</head>\n"
        f'<body>\n<div class="fo fo-page">\n{body}\n</div>\n{script}'
        "</body>\n</html>\n"
    )


def section(heading: str, body: str, intro: str = "", name: str = "") -> str:
    """A part of a page under a heading; nothing if it has no body.

    Args:
        heading: text.
        body: HTML.
        intro: text of a paragraph before it.
        name: class of the section.
    """
    if not body:
        return ""
    before = f'<p class="fo-intro">{escaped(intro)}</p>' if intro else ""
    kind = f' class="{name}"' if name else ""
    return f"<section{kind}><h2>{escaped(heading)}</h2>{before}{body}</section>"


def warnings(notes: Iterable[str], shown: int = 4) -> str:
    """What deserves attention, before anything else; the rest of many behind a fold."""
    items = [f"<li>{escaped(note)}</li>" for note in notes]
    if not items:
        return ""
    rest = f"<details><summary>{len(items) - shown} more</summary><ul>{''.join(items[shown:])}</ul>"
    rest = rest + "</details>" if len(items) > shown else ""
    return (
        '<aside class="fo-notes" aria-label="Notes"><h2>Notes</h2>'
        f"<ul>{''.join(items[:shown])}</ul>{rest}</aside>"
    )


def table(head: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table that scrolls by itself where it is too wide; the first column has the names."""
    top = "".join(f"<th scope=col>{escaped(cell)}</th>" for cell in head)
    lines = []
    for first, *others in rows:
        cells = "".join(f"<td>{escaped(cell)}</td>" for cell in others)
        lines.append(f"<tr><th scope=row>{escaped(first)}</th>{cells}</tr>")
    top = f"<thead><tr>{top}</tr></thead>" if top else ""
    return (
        f'<div class="fo-scroll" tabindex=0><table>{top}<tbody>{"".join(lines)}</tbody></table>'
        "</div>"
    )


def fold(summary: str, body: str) -> str:
    """Something that few readers want."""
    return f"<details><summary>{escaped(summary)}</summary>{body}</details>"


def data_block(values: Mapping[str, Any], name: str) -> str:
    """JSON for the script, of class ``name``; no text in it can end it."""
    text = json.dumps(values, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    return f'<script type="application/json" class="{name}">{text}</script>'


def in_seconds(seconds: float) -> str:
    """Seconds as people read them; milliseconds of what is short."""
    if seconds < 1:
        return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.1f} ms"
    return f"{seconds:.2f} s" if seconds < 100 else f"{seconds:.0f} s"
