"""``name:key=value,key=value``: how users and tables name something with settings, in one word."""

from __future__ import annotations

import json
from typing import Any


def parse_settings(text: str) -> tuple[str, dict[str, Any]]:
    """Split ``name:key=value,...`` into its name and settings.

    Args:
        text: values are numbers, ``true``, ``false``, ``null``, or else strings.

    Raises:
        ValueError: a setting is not ``key=value``, or a key is given twice.
    """
    name, colon, rest = text.partition(":")
    settings: dict[str, Any] = {}
    for part in rest.split(",") if colon else ():
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not key or not equals or not value:
            raise ValueError(f"settings must be key=value, separated by commas, got {part!r}")
        if key in settings:
            raise ValueError(f"{key} is given twice in {text!r}")
        settings[key] = _value(value)
    return name.strip(), settings


def _value(text: str) -> Any:
    """A JSON scalar, a number as Python writes it (``.5``), or the text itself."""
    for read in (json.loads, float):
        try:
            value = read(text)
        except ValueError:
            continue
        return text if isinstance(value, (list, dict)) else value
    return text
