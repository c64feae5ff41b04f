"""Groups of layers with schedules of their own, and tiles in between, where they beat the output.

A forecast of the model's output leaves a step out whole. There are two finer ways: groups of layers
that are computed in different steps, each forecast by itself; and Dispatch steps that compute the
tiles of attention that matter most (tau_q), of layers that are not cached whole (S_q). Both cost
seconds and win fidelity, or the other way round. What is tried runs on the real output and the
clock, and is taken where it gives more dB than plans of the output do that take as long.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from flashomni.engine import Recipe
from flashomni.tuning.cost import Costs, as_fitted
from flashomni.tuning.layer_plan import UNITS, Allocation, Part, allocations, curve, make_part
from flashomni.tuning.layer_watch import Range
from flashomni.tuning.plan import Steps
from flashomni.tuning.sparse import NOISE, Measure

TRIES = 2  # divisions of the steps that are run
LONGER, SHORTER = 0.25, 1.0  # computed steps that they may take more or less than the plan
EXACT = 120.0  # dB of a plan that leaves nothing out
WORTHLESS = 1000.0  # dB of what takes about as long as to compute everything
HOPELESS = 3.0  # dB that a prompt is behind plans of the output
UNLIKELY = 6.0  # dB that something is behind by prediction: it is not run
# Policies and sparse settings of layers in Dispatch steps: nearly all of the coupling to the text
# is cached, in all layers; or half of it, and layers with at most half of their tiles left whole.
TILES: tuple[dict[str, Any], ...] = (
    {"policy": {"name": "flashomni", "tau_q": 0.9, "tau_kv": 0.0, "power": 0.0},
     "sparse": {"degrade_below": 0.0}},
    {"policy": {"name": "flashomni", "tau_q": 0.5, "tau_kv": 0.0, "power": 0.0},
     "sparse": {"degrade_below": 0.5}},
)  # fmt: skip


@dataclass(frozen=True)
class LayerOption:
    """Something to try.

    Attributes:
        words: what it is.
        groups: of the recipe, JSON values.
        predicted_db: surplus that is expected; ``None`` where nothing tells.
        joint: the groups with weights that also make good earlier errors, if there are such.
        fewer: computed steps that it takes less than the plan: no clock makes it more.
    """

    words: str
    groups: tuple[Mapping[str, Any], ...]
    predicted_db: float | None = None
    joint: tuple[Mapping[str, Any], ...] = ()
    fewer: float = 0.0

    @property
    def tiles(self) -> bool:
        """Whether Dispatch steps compute a part of the layers."""
        return any("policy" in group for group in self.groups)


@dataclass(frozen=True)
class LayerTried(LayerOption):
    """What became of it.

    Attributes:
        saved: seconds of a generation; below 0 where it takes longer than the plan of the output.
        loss_db: of the final latents; below 0 where it wins.
        worth_db: what plans of the output lose that save as many seconds.
    """

    saved: float = 0.0
    loss_db: float = 0.0
    worth_db: float = 0.0

    @property
    def surplus(self) -> float:
        """dB that are won over plans of the output that take as long."""
        return self.worth_db - self.loss_db

    @property
    def in_short(self) -> str:
        """For tables."""
        over = f"{self.surplus:+.2f}"
        if self.worth_db <= -WORTHLESS:
            over = "as long as all steps"
        return f"{self.words}: {-self.saved:+.3f} s, {-self.loss_db:+.2f} dB, {over}"


@dataclass(frozen=True)
class Divided:
    """What groups of layers are worth at one number of computed steps.

    Attributes:
        parts: the groups, as ranges of layers.
        shares: of each, of the seconds of a computed step.
        tried: all that was measured.
        chosen: what pays, if anything does; not yet validated.
        step_seconds: of a computed step of plans of the output; 0 where nothing was run.
        predicted_db: surplus that was expected of the best division; ``None`` where there is none.
        alone: what each group alone that is a step old does to the output, over what all layers do.
    """

    parts: tuple[str, ...]
    shares: tuple[float, ...]
    tried: tuple[LayerTried, ...]
    chosen: LayerTried | None
    step_seconds: float
    predicted_db: float | None = None
    alone: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """JSON values; :meth:`load` gives it back."""
        return asdict(self)

    @classmethod
    def load(cls, value: Mapping[str, Any]) -> Divided:
        def tried(each: Mapping[str, Any]) -> LayerTried:
            return LayerTried(**{**each, "groups": tuple(each["groups"])})

        chosen = value["chosen"]
        return cls(
            tuple(value["parts"]), tuple(value["shares"]), tuple(map(tried, value["tried"])),
            None if chosen is None else tried(chosen), value["step_seconds"],
            value["predicted_db"], tuple(value["alone"]),
        )  # fmt: skip


def in_layers(recipe: Recipe, groups: Sequence[Mapping[str, Any]]) -> Recipe:
    """A recipe of the output, at the level of layers with these groups."""
    order = recipe.forecast.layer_order
    return recipe.replace(
        forecast={"level": "layers", "layer_order": order, "order": order}, groups=list(groups)
    )


def groups_of(parts: Sequence[Range], plans: Sequence[Part], num_steps: int) -> tuple[Any, ...]:
    """Groups of a recipe: the schedule and the forecast of each part."""
    found = []
    for (start, stop), plan in zip(parts, plans, strict=True):
        forecast: dict[str, Any] = {"name": plan.forecast, "layer_order": plan.order}
        if plan.forecast == "fitted":
            forecast["fitted"] = asdict(as_fitted(plan.weights, plan.steps, plan.order))
        steps = {"name": "steps", "steps": list(plan.steps), "of": num_steps, "min_steps": 0}
        found.append({"layers": f"{start}:{stop}", "schedule": steps, "forecast": forecast})
    return tuple(found)


def divisions(
    costs: Sequence[Costs],
    parts: Sequence[Range],
    shares: Sequence[float],
    steps: Steps,
    base: np.ndarray,
    order: int,
    ridge: float,
    worth: Callable[[float], float],
) -> list[LayerOption]:
    """The likeliest ways to divide the steps of a plan among groups of layers.

    Args:
        costs: of each group.
        parts: the groups.
        shares: of each, of the seconds of a computed step; what they lack of 1 every step takes.
        steps: of the plan of the output.
        base: ``[prompts]``, what that plan costs. It is what all groups in the same steps cost:
            they then are off together, by less or more than the sum of what each alone would be.
        order: of fitted weights.
        ridge: likewise.
        worth: dB that plans of the output lose that save so many computed steps.
    """
    num_steps = costs[0].num_steps
    curves = [curve(each, order, ridge, base, steps) for each in costs]
    always = num_steps * max(1.0 - sum(shares), 0.0)

    def saved(each: Allocation) -> float:
        return len(steps) - always - each.units / UNITS

    def surplus(each: Allocation) -> float:
        return worth(saved(each)) - 10 * float(np.log10(each.cost))

    every = allocations([[part.cost for part in mine] for mine in curves], shares)
    near = [each for each in every if -LONGER <= saved(each) <= SHORTER and each.cost > 0]
    found = list[LayerOption]()
    for each in sorted(near, key=surplus, reverse=True):
        plans = [mine[count - 1] for mine, count in zip(curves, each.counts, strict=True)]
        if all(plan.steps == steps for plan in plans):
            continue  # the plan itself
        words = ", ".join(
            f"layers {start}:{stop} in {len(plan.steps)} of {num_steps}"
            for (start, stop), plan in zip(parts, plans, strict=True)
        )
        joint = [
            make_part(cost, plan.steps, order, ridge, base, "joint")
            for cost, plan in zip(costs, plans, strict=True)
        ]
        groups, others = (groups_of(parts, which, num_steps) for which in (plans, joint))
        fewer = len(steps) - each.units / UNITS
        found.append(LayerOption(words, groups, surplus(each), others, fewer))
        if len(found) == TRIES:
            break
    return found


def worth(levels: Sequence[float], count: int) -> Callable[[float], float]:
    """What plans of the output lose that compute fewer steps: a function of how many fewer, in dB.

    Args:
        levels: dB of the plans that compute 1, 2, ... all steps.
        count: of the plan that they are compared with.
    """
    rising = np.maximum.accumulate(np.minimum(levels, EXACT))
    counts = np.arange(1, len(rising) + 1)

    def lost(saved: float) -> float:
        if count - saved > max(len(rising) - 1, count):
            return -WORTHLESS
        return float(rising[count - 1] - np.interp(count - saved, counts, rising))

    return lost


def tiles() -> list[LayerOption]:
    """Dispatch steps that compute some tiles of the layers, in the steps of the plan."""
    return [
        LayerOption(
            f"tau_q {kind['policy']['tau_q']:g}, S_q {kind['sparse']['degrade_below']:g}",
            ({"layers": ":", **kind},),
        )
        for kind in TILES
    ]


def try_layers(
    measure: Measure,
    recipe: Recipe,
    options: Sequence[LayerOption],
    worth: Callable[[float], float],
    rival: Callable[[float], Recipe | None],
    each: Callable[[], float],
    parts: Sequence[Range] = (),
    shares: Sequence[float] = (),
) -> Divided:
    """Run what might pay, and what pays beside a plan of the output that takes about as long.

    Args:
        measure: runs recipes.
        recipe: the plan of the output.
        options: to try.
        worth: dB that plans of the output lose that save so many computed steps, as planning
            predicts them.
        rival: gives the plan of the output that saves about so many steps, and at least one;
            ``None`` where there is none.
        each: measures the seconds of a computed step of plans of the output.
        parts: the groups of layers, for the record.
        shares: likewise.
    """
    ranges = tuple(f"{start}:{stop}" for start, stop in parts)
    predicted = max((x.predicted_db for x in options if x.predicted_db is not None), default=None)
    likely = [x for x in options if x.predicted_db is None or x.predicted_db > -UNLIKELY]
    if not likely:
        return Divided(ranges, tuple(shares), (), None, 0.0, predicted)
    step_seconds, tried = each(), list[LayerTried]()
    plain = measure.run(recipe, lambda levels, seconds: False)

    def loss(found: Sequence[float]) -> float:
        return statistics.fmean(a - b for a, b in zip(plain.levels, found, strict=False))

    def useless(found: list[float], taken: float) -> bool:
        return worth((plain.seconds - taken) / step_seconds) - loss(found) < -HOPELESS

    def attempt(option: LayerOption) -> None:
        found = measure.run(in_layers(recipe, option.groups), useless)
        saved = min(plain.seconds - found.seconds, option.fewer * step_seconds)
        lost, wins = loss(found.levels), worth(saved / step_seconds)
        tried.append(
            LayerTried(
                option.words, option.groups, option.predicted_db, saved=saved, loss_db=lost,
                worth_db=wins, fewer=option.fewer,
            )
        )  # fmt: skip

    for option in likely:
        # Where few tiles take as long as all steps, other kinds are not tried.
        if not (option.tiles and any(x.tiles and x.worth_db <= -WORTHLESS for x in tried)):
            attempt(option)
    joint = {option.words: option.joint for option in options if option.joint}
    best = max((x for x in tried if x.words in joint), key=lambda x: x.surplus, default=None)
    if best is not None and best.surplus > -HOPELESS:
        words = f"{best.words}, joint weights"
        attempt(LayerOption(words, joint[best.words], fewer=best.fewer))
    margin = NOISE * plain.seconds  # what seconds may be off by
    best = _best(tried, worth(margin / step_seconds))
    other = None if best is None else rival(best.saved / step_seconds)
    if best is not None and other is not None:
        found = measure.run(other, lambda levels, seconds: False)
        its_saved, its_loss = plain.seconds - found.seconds, loss(found.levels)
        # What planning predicts of them may be too much or too little: this was measured.
        slope = its_loss / its_saved if its_saved * its_loss > 0 else 0.0
        tried = [replace(each, worth_db=_dearer(slope, each)) for each in tried]
        best = _best(tried, max(slope, 0.0) * margin)
    return Divided(ranges, tuple(shares), tuple(tried), best, step_seconds, predicted)


def _dearer(slope: float, tried: LayerTried) -> float:
    """What seconds are worth by prediction or as measured, whichever is less for what was tried."""
    return min(slope * tried.saved, tried.worth_db)


def _best(tried: Sequence[LayerTried], margin: float) -> LayerTried | None:
    paying = [each for each in tried if each.surplus > margin]
    return max(paying, key=lambda each: each.surplus, default=None)
