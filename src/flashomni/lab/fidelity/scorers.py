"""Scorers judge whether a picture shows what its prompt says: any function, found by its name.

``score(pixels, prompt) -> (right, all)``: how many statements of the prompt the picture bears out,
of how many. ``pixels`` is fp32 ``[F, 3, H, W]`` in [0, 1].
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable
from typing import Any

from torch import Tensor

# A picture's (right, all) statements about its prompt.
Scorer = Callable[[Tensor, str], tuple[int, int]]


def load_scorer(name: str) -> Scorer:
    """Import ``MODULE:FUNCTION``; the module may lie in the current folder.

    Raises:
        ValueError: the name has another form, or there is no such module or function.
    """
    return load_function(name)


def load_function(name: str, what: str = "scorer") -> Any:
    """Any function by ``MODULE:FUNCTION``.

    Raises:
        ValueError: as :func:`load_scorer`; the message calls it ``what``.
    """
    module, colon, function = name.partition(":")
    if not module or not colon or not function.isidentifier():
        raise ValueError(f"{what} must be MODULE:FUNCTION, got {name!r}")
    here = os.getcwd()
    added = here not in sys.path
    if added:
        sys.path.insert(0, here)
    try:
        found = getattr(importlib.import_module(module), function, None)
    except ImportError as error:
        raise ValueError(f"{what} {name!r} cannot be imported: {error}") from error
    finally:
        if added:
            sys.path.remove(here)
    if not callable(found):
        raise ValueError(f"{what} {name!r} is not a function of {module}")
    return found
