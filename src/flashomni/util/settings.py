"""``name:key=value,key=value``: how users and tables name something with settings, in one word."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

COMMA = re.compile(r",(?![^\[\]]*\])")  # not within a list


def parse_settings(text: str) -> tuple[str, dict[str, Any]]:
    """Split ``name:key=value,...`` into its name and settings.

    Args:
        text: values are numbers, ``true``, ``false``, ``null``, lists of these (``[0,1,4]``), or
            else strings.

    Raises:
        ValueError: a setting is not ``key=value``, or a key is given twice.
    """
    name, colon, rest = text.partition(":")
    settings: dict[str, Any] = {}
    for part in COMMA.split(rest) if colon else ():
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not key or not equals or not value:
            raise ValueError(f"settings must be key=value, separated by commas, got {part!r}")
        if key in settings:
            raise ValueError(f"{key} is given twice in {text!r}")
        settings[key] = _value(value)
    return name.strip(), settings


def write_settings(settings: Mapping[str, Any]) -> str:
    """``key=value,...``, which :func:`parse_settings` reads; empty if a value has no such form."""
    parts = []
    for key, value in settings.items():
        if isinstance(value, tuple):
            value = list(value)
        try:
            word = value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        except (TypeError, ValueError):
            return ""
        parts.append(f"{key}={word}")
    text = ",".join(parts)
    try:
        same = parse_settings(f":{text}")[1] == {k: _listed(v) for k, v in settings.items()}
    except ValueError:
        return ""
    return text if same else ""


def _listed(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _value(text: str) -> Any:
    """A JSON scalar or list of scalars, a number as Python writes it (``.5``), or the text."""
    for read in (json.loads, float):
        try:
            value = read(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, list):
            nested = any(isinstance(item, (list, dict)) for item in value)
            return text if nested else value
        return text if isinstance(value, dict) else value
    return text
