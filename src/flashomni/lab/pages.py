"""HTML pages of templates: the body of each kind of page, in the style of all of them."""

from __future__ import annotations

from collections.abc import Mapping
from html import unescape
from pathlib import Path
from string import Template

from flashomni.page import document

TEMPLATES = Path(__file__).parent / "templates"


def page(name: str, pictures: Mapping[str, str], **parts: object) -> str:
    """The page ``templates/NAME.html``, filled in.

    Args:
        name: of the template of the body.
        pictures: data URIs by their names in the template.
        parts: everything else that the template names, ``title`` among them, escaped already.
    """
    template = Template((TEMPLATES / f"{name}.html").read_text(encoding="utf-8"))
    head = f'<header class="fo-brand"><b>FlashOmni</b></header><h1>{parts["title"]}</h1>'
    body = template.substitute(pictures, **parts)
    return document(unescape(str(parts["title"])), head + body, moves=False)
