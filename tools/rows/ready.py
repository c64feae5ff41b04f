"""A model, the prompts that its rows are of, and the methods that can run on it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import torch

from flashomni.engine import Recipe
from flashomni.lab import split, zoo
from flashomni.lab.fidelity.calibrate import calibrate
from flashomni.lab.fidelity.methods import Method, of_recipe, parse_method
from flashomni.lab.generation import Generation

from .page import CALIBRATED, GUIDED

TWO_CALLS = {"true_cfg_scale": 3.0, "negative_prompt": "blurred"}


class Listed(NamedTuple):
    """A method that is asked for; ``recipe`` where a calibration has changed it."""

    kind: str  # "recipe" or "peer"
    name: str
    recipe: Recipe | None = None

    @property
    def called(self) -> str:
        """Its name in tables: of a file its stem."""
        return Path(self.name).stem if self.name.endswith(".json") else self.name


class Ready(NamedTuple):
    """A model and what is asked of it."""

    model: str
    loaded: zoo.Loaded
    prompts: list[str]
    call: dict[str, Any]
    steps: int | None

    @classmethod
    def of(cls, model: str, options: argparse.Namespace, count: int) -> Ready:
        """Load it."""
        loaded = zoo.load(model, options.device, getattr(torch, options.dtype))
        change = {} if options.size is None else dict.fromkeys(("height", "width"), options.size)
        change |= TWO_CALLS if options.guided else {}
        prompts = split.pick(model, loaded.prompts, "report", count)
        return cls(model, loaded, prompts, {**loaded.call, **change}, options.steps)

    def method(self, listed: Listed) -> Method | None:
        """A method; one that cannot run here says why."""
        try:
            if listed.kind == "peer":
                return parse_method(listed.name)
            return of_recipe(
                listed.called, listed.recipe or Recipe.of(listed.name.removesuffix(GUIDED))
            )
        except NotImplementedError as error:
            print(f"{listed.name}: {error}", flush=True)
            return None

    def calibrated(self, listed: list[Listed]) -> list[Listed]:
        """The same, with the settings of one dense run where they ask for these; printed."""
        if not any(each.name.endswith(CALIBRATED) for each in listed):
            return listed
        prompt = split.pick(self.model, self.loaded.prompts, "tune", 1)[0]
        job = Generation(self.loaded, prompt, 0, self.steps)
        job.call = {**job.call, **self.call, "num_inference_steps": job.num_steps}
        found = calibrate(job)
        made = []
        for each in listed:
            if each.name.endswith(CALIBRATED):
                recipe = Recipe.of(each.name.removesuffix(CALIBRATED))
                settings = found[recipe.schedule.name]
                print(f"{self.model}, {recipe.schedule.name}: {settings}", flush=True)
                each = each._replace(recipe=recipe.replace(**settings))
            made.append(each)
        return made
