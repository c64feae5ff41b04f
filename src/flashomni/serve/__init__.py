"""A server for many requests: ``serve run flashomni.serve:app model=... recipe=... replicas=N``.

Each replica has one pipeline and generates one batch at a time, off its event loop; a front reads
requests in OpenAI's form, answers overload with 503, and asks another replica where one died. Only
:mod:`flashomni.serve.deploy` and what it loads know Ray (extra ``serve``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flashomni.serve.settings import Settings

__all__ = ["Settings", "app"]


def app(args: Mapping[str, Any]) -> Any:
    """The application that ``serve run flashomni.serve:app key=value ...`` builds.

    Args:
        args: see :class:`Settings`; values as text, or as what they are.

    Returns:
        A ``ray.serve.Application``.

    Raises:
        ValueError: a setting is unknown, or its value is not allowed.
    """
    from flashomni.serve.deploy import build

    return build(Settings.of(args))
