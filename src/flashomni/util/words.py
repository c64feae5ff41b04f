"""Text fit to be shown: nothing that a user, a model or an error says commands a terminal."""

from __future__ import annotations

import difflib
import unicodedata
from collections.abc import Iterable

# Marks that turn the text around them, up to its end: what stands there is not what is read.
TURNS = frozenset("\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029")
KEPT = frozenset("\n\t")


def clean(text: object) -> str:
    """The text with control characters, turns and half surrogates written as escapes.

    Lines and tabs stay, and so do letters of every script and the joiners inside emoji.
    """
    return "".join(_escape(mark) if _commands(mark) else mark for mark in str(text))


def one_line(text: object, length: int | None = None) -> str:
    """:func:`clean` on one line, cut to ``length`` characters."""
    line = " ".join(clean(text).split())
    return line if length is None or len(line) <= length else line[: length - 1] + "\u2026"


def meant(name: object, known: Iterable[str]) -> str:
    """The end of an error about a name that is none: the one that it is nearly, if there is one."""
    found = difflib.get_close_matches(str(name), list(known), 1, 0.75)
    return f"; did you mean {found[0]!r}?" if found else ""


def in_bytes(count: float) -> str:
    """Bytes as people read them."""
    for unit in ("B", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:,.2f} GiB"


def _commands(mark: str) -> bool:
    if mark in TURNS:
        return True
    return mark not in KEPT and unicodedata.category(mark) in ("Cc", "Cs")


def _escape(mark: str) -> str:
    return mark.encode("unicode_escape").decode()
