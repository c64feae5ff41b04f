"""Watching a generation: steps, previews, an end when somebody asks for it; and warming up."""

from __future__ import annotations

import json
import threading
from typing import Any

from torch import Tensor

from flashomni.engine import Recipe
from flashomni.lab.generation import Generation
from flashomni.studio.events import Emit, Progress
from flashomni.studio.preview import Preview
from flashomni.studio.shelf import Shelved
from flashomni.studio.turns import Cancelled


class Watch:
    """Tells of the steps of a generation, with previews now and then, and ends it when asked."""

    def __init__(
        self, generation: Generation, live: bool, emit: Emit, stop: threading.Event
    ) -> None:
        self._generation, self._live, self._emit, self._stop = generation, live, emit, stop
        self.why_not = ""

    def stage(self, name: str) -> Any:
        """The callback for the steps of one run."""
        generation = self._generation
        preview = Preview(generation.pipe, generation.call)
        done = (0, generation.num_steps)
        self._emit(Progress(name, *done))

        def on_step(step: int, total: int) -> None:
            nonlocal done
            self._check()
            done = (step, total)

        def look(step: int, latents: Tensor | None) -> None:
            self._check()
            picture = preview.now_and_then(step, latents, self._live)
            self.why_not = preview.why_not
            self._emit(Progress(name, *done, picture))

        generation.look = look
        return on_step

    def _check(self) -> None:
        if self._stop.is_set():
            raise Cancelled


def warm(shelved: Shelved, generation: Generation, recipe: Recipe, watch: Watch) -> None:
    """What a pipeline does once for a size, and for a policy's kernels where they are compiled."""
    size = {k: v for k, v in generation.call.items() if k != "num_inference_steps"}
    key = json.dumps([size, recipe.policy.name if generation.compiles else ""], default=str)
    if key not in shelved.warm:
        stage = watch.stage("warm-up")
        generation.warm_up()
        generation.compile_kernels(recipe, lambda: stage)
        shelved.warm[key] = generation.seconds / generation.num_steps
    generation.seconds = shelved.warm[key] * generation.num_steps
