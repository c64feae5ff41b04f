"""The stages of tuning: record, measure gains, plan, polish, validate. Each can be resumed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from flashomni.engine import Recipe
from flashomni.engine.tuned_on import fingerprint
from flashomni.models import find_adapter
from flashomni.tuning.cost import Costs, choose_fit, decibels
from flashomni.tuning.drive import Driver, OnLatents
from flashomni.tuning.expected import expected_steps
from flashomni.tuning.gains import Gain, direct_effects, gain, gain_curve, probe_steps
from flashomni.tuning.judge import judge
from flashomni.tuning.layer_groups import LayerGroups
from flashomni.tuning.layer_tries import Divided, divisions, in_layers, tiles, try_layers, worth
from flashomni.tuning.plan import Steps, best_schedules, descend, segment_costs
from flashomni.tuning.polish import Candidate, measured, search
from flashomni.tuning.record import Recording, gram, needed_bytes
from flashomni.tuning.recordings import Recordings
from flashomni.tuning.settings import Point, Settings
from flashomni.tuning.sparse import OPTIONS, Spent, sparsely, spend
from flashomni.tuning.spending import Spending
from flashomni.tuning.state import State
from flashomni.tuning.validate import (
    BASE,
    BASE_ORDER,
    HeldBack,
    Verdict,
    ramp_steps,
    recipe_of,
    tuned_on,
)
from flashomni.util.words import in_bytes

# Schedules are planned for these. Not for foca and chebyshev: their weights take 13 of the 15
# seconds of planning on one core, and fitted weights forecast better on any schedule.
NAMED = (("hermite", 2), ("hermite", 1), ("taylor", 1), ("reuse", 0))
FASTER = 0.05  # of a stock step's seconds, those of an accelerated one at least
FORMAT = 4  # of the findings on disk
OnProgress = Callable[[str, int, int], None]


class Tuner:
    """Tunes one pipeline at one number of steps.

    Args:
        pipe: a diffusers pipeline.
        call: arguments of its call.
        prompts: to tune on.
        held_back: to validate on.
        seed: of the first prompt; each further one has the next.
        name: of the recipes.
        folder: of the state.
        settings: how much work to do.
        on_progress: told the stage, calls of the model so far, and how many there will be.
        on_latents: given the latents behind each step of the recordings.

    Raises:
        ValueError: there are no prompts, or recording needs more memory than allowed.
    """

    def __init__(
        self,
        pipe: Any,
        call: dict[str, Any],
        prompts: Sequence[str],
        held_back: Sequence[str],
        seed: int,
        name: str,
        folder: Path,
        settings: Settings,
        on_progress: OnProgress,
        on_latents: OnLatents | None = None,
    ) -> None:
        self.prompts, self.held_back, self.seed = list(prompts), list(held_back), seed
        self.name, self.settings = name, settings
        self._on_progress, self._stage, self._total, self._done = on_progress, "", 0, 0
        start = time.perf_counter()
        self._on_latents = on_latents
        self.outline = Driver(pipe, call).outline(self.prompts[0])
        self.driver = Driver(pipe, call, lambda: self._advance(1))
        self.num_steps = self.outline.num_steps
        self.bytes_each = needed_bytes(self.outline)
        if self.bytes_each > settings.memory:
            raise ValueError(
                f"memory must be at least {in_bytes(self.bytes_each)}, what one recording of "
                f"{self.num_steps} outputs takes; got {in_bytes(settings.memory)}"
            )
        self.about = {
            "format": FORMAT,
            "model": fingerprint(self.driver.model),
            "call": call,
            "steps": self.num_steps,
            "latents": self.outline.latents,
            "prompts": self.prompts,
            "held_back": self.held_back,
            "seed": seed,
            "probes": [settings.probes, settings.probed],
        }
        self.state = State(folder, self.about, start)
        room = settings.memory - self.bytes_each
        self.groups = LayerGroups(
            self.driver, self.state, settings.groups, self.num_steps, self.outline.calls, room
        )
        room = settings.memory - self.groups.nbytes
        self.recording = Recordings(self._record, self.state, self.bytes_each, room)
        self._held = HeldBack(
            pipe,
            self.driver.call,
            self.held_back,
            [seed + len(self.prompts) + i for i in range(len(self.held_back))],
            self._passed,
        )
        self._costs: Costs | None = None
        self._plans: dict[int, list[Candidate]] = {}
        self._pays: dict[int, bool] = {}  # sparse attention, by number of computed steps
        self._tiles_pay: dict[int, bool] = {}  # likewise, tiles of Dispatch steps
        self._spending: Spending | None = None
        self._compiles = torch.device(pipe._execution_device).type == "cuda"

    @property
    def seconds(self) -> float:
        """That tuning took so far, earlier runs that it goes on with included."""
        return self.state.seconds

    def expect(self, counts: Sequence[int]) -> None:
        """Say how many calls of the model there will be, for points of these numbers of steps."""
        everyone = range(len(self.prompts))
        found = expected_steps(
            self.state, self.settings, self.groups, counts, self.num_steps, self._probe_steps(),
            [self._lacks(number) for number in everyone], len(self.held_back), self._compiles,
        )  # fmt: skip
        self._total = self._done + found * self.outline.calls

    def _passed(self, steps: int) -> None:
        self._advance(steps * self.outline.calls)

    def _advance(self, count: int) -> None:
        self._done += count
        self._on_progress(self._stage, self._done, max(self._total, self._done))

    def _record(self, number: int) -> tuple[Recording, float]:
        stage, self._stage = self._stage, "recording"
        what = self.prompts[number], self.seed + number, self._on_latents
        found = self.groups.record(number, *what)
        self._stage = stage
        return found

    def _lacks(self, number: int) -> bool:
        """Whether planning needs a recording: what is known of it is all that it needs else."""
        return self.state.get("effects") is None or self.state.get(f"gram {number}") is None

    def costs(self) -> Costs:
        """Recordings, effects and gains: what plans are made of."""
        if self._costs is not None:
            return self._costs
        for number in range(len(self.prompts)):
            if self._lacks(number):
                self.recording(number)
        self._stage = "effects"
        effects = self.state.get("effects")
        if effects is None:
            start = time.perf_counter()
            direct = direct_effects(self.driver, self.recording(0))
            self.state.put("sigmas", list(self.driver.sigmas))
            runs = direct.size + 1
            self.state.put("replay seconds", (time.perf_counter() - start) / runs)
            effects = self.state.put("effects", direct.tolist())
        effects = np.array(effects)
        self._stage = "gains"
        found = [
            {step: self._gain(number, step) for step in steps}
            for number, steps in enumerate(self._probe_steps())
        ]
        curve = gain_curve(found, self.num_steps)
        device = torch.device(self.driver.pipe._execution_device)
        grams = []
        for number in range(len(self.prompts)):
            kept = self.state.get(f"gram {number}")
            if kept is None:
                values = gram(self.recording(number), effects, device)
                kept = self.state.put(f"gram {number}", values.tolist())
            grams.append(kept)
        sigmas = self.state.get("sigmas")
        self._costs = Costs(np.array(grams), effects.sum(1), curve, sigmas)
        return self._costs

    def _probe_steps(self) -> list[list[int]]:
        """Of each probed prompt: they take turns, so that each step is probed once."""
        at = probe_steps(self.num_steps, self.settings.probes)
        prompts = min(self.settings.probed, len(self.prompts))
        return [at[number::prompts] for number in range(prompts)]

    def _gain(self, number: int, step: int) -> Gain:
        name = f"gain {number} {step}"
        kept = self.state.get(name)
        if kept is None:
            found = gain(self.driver, self.recording(number), step)
            kept = self.state.put(name, asdict(found))
        return Gain(**kept)

    def step_seconds(self) -> tuple[float, float]:
        """Seconds of a computed step, and of everything else in a generation."""
        dense = [self.state.get(f"recorded {n}") for n in range(len(self.prompts))]
        rest = float(self.state.get("replay seconds") or 0.0)
        each = max((float(np.median(dense)) - rest) / self.num_steps, 1e-9)
        return each, rest

    def count_for(self, speedup: float) -> int:
        """How many steps may be computed, so that a generation is that much faster.

        Raises:
            ValueError: no number of steps gives that.
        """
        self.costs()
        each, rest = self.step_seconds()
        count = int((rest + self.num_steps * each) / speedup / each - rest / each + 1e-6)
        if count < 2:
            most = (rest + self.num_steps * each) / (rest + 2 * each)
            raise ValueError(
                f"target_speedup must be at most {most:.2f} here, where two steps are computed and "
                f"{rest:.2f} s of a generation are no steps; got {speedup:g}"
            )
        return min(count, self.num_steps - 1)

    def candidate(
        self, steps: Steps, order: int, ridge: float, label: str, forecast: str = "fitted"
    ) -> Candidate:
        """A schedule with its best weights, or with a named forecast."""
        costs = self.costs()
        if forecast == "fitted":
            weights = costs.fit(steps, order, ridge, BASE)
        else:
            weights = costs.forecasts(steps, order, forecast)
        predicted = decibels(costs.of(steps, weights))
        return Candidate(steps, weights, order, forecast, label, predicted)

    def proposals(self, count: int) -> tuple[list[Candidate], int, float]:
        """What planning proposes for a number of computed steps, and the fit's order and ridge."""
        costs = self.costs()
        self._stage = "planning"
        ramp = ramp_steps(count, self.num_steps)
        order, ridge = choose_fit(costs, ramp)
        if not self._plans:
            named = {
                (name, size): best_schedules(segment_costs(costs, name, size))
                for name, size in (*NAMED, ("fitted", 2))
            }
            for number in range(1, self.num_steps + 1):
                self._plans[number] = [
                    self.candidate(found[number], size, 1e-2, f"plan for {name}", name)
                    for (name, size), found in named.items()
                ]
        *named_plans, fitted = self._plans[count]
        planned = named_plans[0]
        descended, _ = descend(
            fitted.steps,
            self.num_steps,
            lambda steps: -decibels(costs.of(steps, costs.fit(steps, order, ridge, BASE))),
        )
        schedules = {
            "ramp": ramp,
            "plan": fitted.steps,
            planned.label: planned.steps,
            "descent from plan": descended,
        }
        found = [
            *(
                self.candidate(s, order, ridge, f"{k}, fitted weights")
                for k, s in schedules.items()
            ),
            max(named_plans, key=lambda each: each.predicted),
        ]
        found.insert(1, self.candidate(ramp, BASE_ORDER, 0.0, "ramp", BASE))
        unique: dict[tuple[Steps, str], Candidate] = {}
        for each in found:
            unique.setdefault((each.steps, each.forecast), each)
        return list(unique.values())[: max(self.settings.starts, 1)], order, ridge

    def measure(self, candidate: Candidate, best: Sequence[float] = ()) -> list[float]:
        """dB of the final latents on the real output; see :func:`measured`."""
        prompts = len(self.prompts)
        return measured(self.driver, self.state, self.recording, prompts, candidate, best)

    def point(self, count: int) -> Point:
        """The best recipe that computes so many steps, validated on held-back prompts."""
        proposals, order, ridge = self.proposals(count)
        steps = self.num_steps
        self._stage = f"{count} of {steps}"
        best, value = search(
            proposals,
            lambda moved: self.candidate(moved, order, ridge, "polish, fitted weights"),
            self.measure,
            self.settings.tries,
        )
        kept = self.state.get(f"point {count}")
        if kept is None or kept["steps"] != list(best.steps):
            self._stage = "held back"
            kept = judge(
                self._held, self.state.folder, self.name, count, steps, best, proposals[0],
                lambda recipe: self._spend(recipe, count),
                lambda recipe: self._divide(recipe, count, order, ridge), self._worth(count),
            )  # fmt: skip
            self.state.put(f"point {count}", {"steps": list(best.steps), **kept})
        if kept["ramp"]:
            best, value = proposals[0], float(np.mean(self.measure(proposals[0])))
        verdict = Verdict.load(kept["verdict"])
        about = tuned_on(self.driver.model, self.outline, self.prompts, count, verdict)
        recipe = recipe_of(best.steps, steps, best, self.name)
        recipe = sparsely(recipe, kept["groups"])
        recipe = in_layers(recipe, kept["layers"]) if kept["layers"] else recipe
        recipe = recipe.replace(tuned=about)
        spent = None if kept["spent"] is None else Spent.load(kept["spent"])
        if spent is not None:
            self._pays[count] = bool(kept["groups"])
        divided = None if kept["divided"] is None else Divided.load(kept["divided"])
        return Point(count, recipe, best.label, best.predicted, value, verdict, spent, divided)

    def _price(self, count: int, each: float) -> float:
        """dB that a second costs where steps are left out: between plans of about as many."""
        low, high = max(count - 2, 1), min(count + 2, self.num_steps - 1)
        slope = self._plans[high][-1].predicted - self._plans[low][-1].predicted
        return max(slope, 0.0) / (high - low) / each

    def _each(self, measure: Spending, count: int) -> float:
        """Seconds of a computed step of the accelerated pipeline."""
        dense, found = self.step_seconds()[0], measure.step_seconds(count, self.num_steps)
        return found if found > FASTER * dense else dense  # else the clock is too coarse for them

    def _worth(self, count: int) -> Callable[[float], float]:
        """dB that plans of the output lose which save so many computed steps."""
        return worth([self._plans[each][-1].predicted for each in sorted(self._plans)], count)

    def _spend(self, recipe: Recipe, count: int) -> Spent | None:
        """What sparse attention in computed steps is worth; ``None`` where nobody asks."""
        options = OPTIONS[: self.settings.sparse]
        if any(fewer < count and not pays for fewer, pays in self._pays.items()):
            return None  # a smaller error of forecasts hides less of what it loses
        try:
            adapter = find_adapter(self.driver.model)
            layers = len(adapter.sites(self.driver.model))
        except (ValueError, NotImplementedError):
            return None  # whose layers nobody knows
        if not options:
            return None
        self._stage = "sparse attention"
        order = "hilbert" if adapter.reorders else "raster"
        measure = self._measure(recipe, count)
        price = self._price(count, self._each(measure, count))
        return spend(measure, recipe, layers, price, options, self.settings.layer_runs, order)

    def _measure(self, recipe: Recipe, count: int) -> Spending:
        """Measures what a recipe becomes."""
        if self._spending is None or self._spending.plan != recipe:
            numbers = range(min(self.settings.probed, len(self.prompts)))
            prompts = [(self.prompts[number], self.seed + number) for number in numbers]
            self._spending = Spending(
                self.driver, self.state, recipe, prompts, lambda n: self.recording(n).latents,
                lambda: self._passed(count),
            )  # fmt: skip
        return self._spending

    def _rival(self, count: int, saved: float, order: int, ridge: float) -> Recipe | None:
        """The plan of the output that saves about so many computed steps, and at least one."""
        other = count - (max(round(saved), 1) if saved > 0 else min(round(saved), -1))
        if not 1 <= other < self.num_steps:
            return None
        plan = self.candidate(self._plans[other][-1].steps, order, ridge, "plan")
        return recipe_of(plan.steps, self.num_steps, plan, f"plan-{other}")

    def _divide(self, recipe: Recipe, count: int, order: int, ridge: float) -> Divided | None:
        """What groups of layers with steps of their own are worth; ``None`` where nobody asks."""
        groups, measure = self.groups, self._measure(recipe, count)
        if not groups.parts:
            return None
        self._stage = "groups of layers"
        effects = np.array(self.state.get("effects"))
        at = probe_steps(self.num_steps, self.settings.probes)
        costs = groups.costs(self.costs(), self.recording, len(self.prompts), effects, at)
        steps, forecast = tuple(recipe.schedule.to_dict()["steps"]), recipe.forecast
        plan = self.candidate(steps, forecast.layer_order, ridge, "plan", forecast.name)
        base, lost = self.costs().of(steps, plan.weights), self._worth(count)
        options = divisions(costs, groups.parts, groups.shares, steps, base, order, ridge, lost)
        hopeful = [pays for fewer, pays in self._tiles_pay.items() if fewer < count]
        options += tiles() if all(hopeful) else []
        found = try_layers(
            measure, recipe, options, lost,
            lambda saved: self._rival(count, saved, order, ridge),
            lambda: self._each(measure, count), groups.parts, groups.shares,
        )  # fmt: skip
        self._tiles_pay[count] = any(x.tiles and x.surplus > 0 for x in found.tried)
        return replace(found, alone=groups.alone(self.costs()))
