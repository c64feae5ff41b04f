"""HTML pages: one head, and a body for each kind of page."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from string import Template

TEMPLATES = Path(__file__).parent / "templates"


def page(name: str, pictures: Mapping[str, str], **parts: object) -> str:
    """The page ``templates/NAME.html`` under the common head, filled in.

    Args:
        name: of the template of the body.
        pictures: data URIs by their names in the template.
        parts: everything else that the template names, ``title`` among them, escaped already.
    """
    text = "".join(
        (TEMPLATES / f"{part}.html").read_text(encoding="utf-8") for part in ("head", name)
    )
    return Template(text).substitute(pictures, **parts)
