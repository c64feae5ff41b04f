"""What plug-ins of servers share: who asks for a recipe, and errors that are read.

A server calls a plug-in without arguments, so it is the environment that names the recipe. SGLang
logs a plug-in that fails and goes on without it; so the recipe is read where a pipeline is loaded,
which nobody catches: a server that was asked to skip does so, or does not start.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from flashomni.engine import Engine
from flashomni.models import accelerate

log = logging.getLogger("flashomni")
VARIABLE = "FLASHOMNI_RECIPE"


def asked(package: str, tried: str) -> str | None:
    """The recipe that the environment asks for; ``None`` leaves the server as it is.

    Args:
        package: the server's distribution.
        tried: its version that the plug-in was run with; the log warns of others.
    """
    recipe = os.environ.get(VARIABLE, "").strip()
    if not recipe:
        return None
    try:
        found = version(package)
    except PackageNotFoundError:
        found = "of no known version"
    if found != tried:
        log.warning(
            "FlashOmni's plug-in was tried with %s %s, and this is %s: look for the line of the "
            "log that says which transformer is accelerated",
            package,
            tried,
            found,
        )
    return recipe


def put_on(pipe: Any, recipe: str) -> Engine:
    """Accelerate a pipeline that a server has loaded.

    Args:
        pipe: of diffusers.
        recipe: a name, with settings if need be, or a path to a file.

    Raises:
        ValueError: the recipe or the model is unknown.
        NotImplementedError: the model is in a state that cannot be accelerated.
    """
    with loudly(recipe):
        return accelerate(pipe, recipe)


@contextmanager
def loudly(recipe: str) -> Iterator[None]:
    """What fails is logged with what to do about it, and still fails."""
    try:
        yield
    except (ValueError, NotImplementedError) as error:
        log.error("%s=%s: %s. Unset it to serve without FlashOmni", VARIABLE, recipe, error)
        error.add_note(f"{VARIABLE}={recipe} asked for it; unset it to serve without FlashOmni")
        raise
