"""What tests look for in a page: its elements by tag and class, and what it would load."""

import re
from collections import Counter, defaultdict
from html.parser import HTMLParser

EMPTY = {"img", "input", "meta", "path", "rect", "br"}


class Page(HTMLParser):
    """Elements of a page; refuses tags that do not match.

    Attributes:
        tags: how many there are of each.
        classes: in the order of the page.
        elements: attributes, by tag.
    """

    def __init__(self):
        super().__init__()
        self.tags, self.classes, self.elements = Counter(), [], defaultdict(list)
        self._open, self._texts = [], []

    @classmethod
    def of(cls, text):
        page = cls()
        page.feed(text)
        page.close()
        assert page._open == [], "an element is not closed"
        page.source = text
        return page

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        names = (attributes.get("class") or "").split()
        self.tags[tag] += 1
        self.classes += names
        self.elements[tag].append(attributes)
        entry = [tag, names, ""]
        self._texts.append(entry)
        if tag not in EMPTY:
            self._open.append(entry)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in EMPTY:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self._open and self._open[-1][0] == tag, f"</{tag}> closes {self._open[-1:]}"
        self._open.pop()

    def handle_data(self, data):
        for entry in self._open:
            entry[2] += data

    def text(self, what):
        """Texts of ``tag``, ``.class`` or ``tag.class``."""
        tag, _, name = what.partition(".")
        return [
            text.strip()
            for found, names, text in self._texts
            if tag in ("", found) and (not name or name in names)
        ]

    def check_self_contained(self):
        """Only data in it is shown, one script runs, and the browser is told to load nothing."""
        loads = [
            value
            for elements in self.elements.values()
            for attributes in elements
            for name, value in attributes.items()
            if name in ("src", "href", "srcset", "data", "action", "poster")
        ]
        assert all(load.startswith("data:image/webp;base64,") for load in loads)
        assert not {"link", "iframe", "object", "embed", "base", "form"} & set(self.tags)
        running = [a for a in self.elements["script"] if a.get("type") != "application/json"]
        assert len(running) <= 1 and not any("src" in found for found in running)
        assert not any(
            name.startswith("on") for e in self.elements.values() for a in e for name in a
        )
        assert not re.search(r"https?://|@import|url\(", self.source)
        policies = [a["content"] for a in self.elements["meta"] if "http-equiv" in a]
        assert policies and policies[0].startswith("default-src 'none'; img-src data:;")
