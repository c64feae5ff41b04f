"""Recipes with sparse attention, measured on tuning prompts; what was found is kept."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict

from torch import Tensor

from flashomni.engine import Recipe
from flashomni.models import accelerate
from flashomni.tuning.drive import Driver
from flashomni.tuning.polish import signal_to_noise
from flashomni.tuning.sparse import Found, Useless
from flashomni.tuning.state import State, key
from flashomni.tuning.timed import timed
from flashomni.tuning.validate import ramp_steps, recipe_of


class Spending:
    """A :class:`flashomni.tuning.sparse.Measure` of one plan.

    Args:
        driver: of the pipeline.
        state: where findings are kept.
        plan: the recipe without sparse attention.
        prompts: texts and the seeds of their noise.
        reference: the latents of the dense run, by place in ``prompts``.
        on_run: told of each generation.

    Attributes:
        plan: as given.
    """

    def __init__(
        self,
        driver: Driver,
        state: State,
        plan: Recipe,
        prompts: Sequence[tuple[str, int]],
        reference: Callable[[int], Tensor],
        on_run: Callable[[], None],
    ) -> None:
        self._driver, self._state, self.plan = driver, state, plan
        self._prompts, self._reference, self._on_run = prompts, reference, on_run
        self._dense: dict[int, Tensor] = {}  # latents of the dense run, by prompt
        self._own: dict[int, Tensor] = {}  # of the plan

    def run(self, recipe: Recipe, useless: Useless) -> Found:
        name = f"sparse {key(recipe.to_dict(), self.plan.to_dict())}"
        kept = self._state.get(name)
        if kept is None:
            places = range(len(self._prompts))
            # Before anything is accelerated: what is not kept is recorded again.
            self._dense = self._dense or {place: self._reference(place) for place in places}
            if recipe != self.plan:
                self._make(places)

            def look(place: int, latents: Tensor) -> tuple[float, float]:
                own = self._own.setdefault(place, latents)
                against = signal_to_noise(latents, self._dense[place])
                return against, signal_to_noise(latents, own)

            found = timed(self._driver, recipe, self._prompts, look, useless, self._on_run)
            kept = self._state.put(name, asdict(found))
        return Found(**kept)

    def step_seconds(self, count: int, num_steps: int) -> float:
        """Of a computed step: between the plan, which computes ``count``, and another ramp."""
        other = count // 2 if count > 3 else min(2 * count, num_steps)
        ramp = recipe_of(ramp_steps(other, num_steps), num_steps)
        whole = self.run(self.plan, lambda levels, taken: False).seconds
        return (whole - self.run(ramp, lambda levels, taken: True).seconds) / (count - other)

    def apart(self, recipe: Recipe) -> float:
        name = f"apart {key(recipe.to_dict(), self.plan.to_dict())}"
        kept = self._state.get(name)
        if kept is None:
            self._make([0])
            with accelerate(self._driver.pipe, recipe, graphs=False):
                latents = self._driver.generate(*self._prompts[0])
            self._on_run()
            kept = self._state.put(name, signal_to_noise(latents, self._own[0]))
        return float(kept)

    def _make(self, places: Sequence[int]) -> None:
        """Latents of the plan, where a run before this one measured it."""
        missing = [place for place in places if place not in self._own]
        if missing:
            with accelerate(self._driver.pipe, self.plan, graphs=False):
                for place in missing:
                    self._own[place] = self._driver.generate(*self._prompts[place])
                    self._on_run()
