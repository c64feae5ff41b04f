"""Warn where a tuned recipe is used on what it was not tuned on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from torch import Tensor

from flashomni.engine.arguments import by_name
from flashomni.engine.runtime import Runtime

log = logging.getLogger("flashomni")


class Elsewhere:
    """Told about each call of the model, it looks once a generation, and says each thing once.

    Args:
        runtime: whose recipe was tuned.
        latents: name of the argument that carries them.
    """

    def __init__(self, runtime: Runtime, latents: str) -> None:
        self._runtime, self._latents = runtime, latents
        self._seen: Any = None
        self._said: set[str] = set()

    def __call__(self, args: tuple, kwargs: dict) -> None:
        runtime, tuned = self._runtime, self._runtime.recipe.tuned
        generation = runtime.last
        if tuned is None or generation is None or generation is self._seen:
            return
        self._seen = generation
        latents = by_name(runtime.model, args, kwargs).get(self._latents)
        shape = tuple(latents.shape) if isinstance(latents, Tensor) else None
        for why in tuned.elsewhere(runtime.model, generation.num_steps, shape):
            if why not in self._said:
                self._said.add(why)
                log.warning("recipe %s: %s; tune it anew", runtime.recipe.name, why)


def look(runtime: Runtime, latents: str) -> Callable[[tuple, dict], None]:
    """What to tell about calls; nothing happens there where the recipe was not tuned."""
    return (lambda *_: None) if runtime.recipe.tuned is None else Elsewhere(runtime, latents)
