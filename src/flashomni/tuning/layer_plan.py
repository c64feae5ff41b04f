"""Which steps compute which group of layers: a budget of seconds, divided exactly.

Errors of groups are taken to be independent, so their squares add; and so do their seconds. The
cheapest schedule of each group for every number of computed steps is the dynamic programme's of
:mod:`flashomni.tuning.plan`; how many steps each group gets is a second one, over groups and the
budget in hundredths of a computed step, exact there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from flashomni.engine.forecasts.fitted import fit
from flashomni.tuning.cost import Costs
from flashomni.tuning.plan import Steps, best_schedules, even_gram, segment_costs

UNITS = 100  # of a computed step
FORECASTS = (("fitted", 2), ("hermite", 2), ("reuse", 0))


@dataclass(frozen=True)
class Part:
    """A schedule of one group of layers and the weights of its forecasts.

    Attributes:
        steps: that are computed.
        weights: ``[T, T]``, see :class:`Costs`.
        order: of the forecast.
        forecast: its name.
        cost: of its errors, mean over prompts, each over that of the plan of the output.
    """

    steps: Steps
    weights: np.ndarray
    order: int
    forecast: str
    cost: float


def make_part(
    costs: Costs, steps: Steps, order: int, ridge: float, base: np.ndarray, name: str = "fitted"
) -> Part:
    """A group under a schedule, with weights of a forecast.

    ``fitted`` ones forecast each step best. Those that also make good earlier errors (``joint``)
    count on what the other groups do: they are the better ones only now and then.
    """
    if name == "joint":
        weights = costs.fit(steps, order, ridge)
    elif name == "fitted":
        found = fit(torch.from_numpy(even_gram(costs)), steps, order, ridge)
        weights = np.eye(costs.num_steps)
        for anchors, step, values in found.weights:
            weights[step] = 0.0
            weights[step, list(anchors)] = values
    else:
        weights = costs.forecasts(steps, order, name)
    forecast = "fitted" if name == "joint" else name
    return Part(steps, weights, order, forecast, float(np.mean(costs.of(steps, weights) / base)))


def curve(costs: Costs, order: int, ridge: float, base: np.ndarray, plan: Steps = ()) -> list[Part]:
    """The cheapest part for 1, 2, ... all steps computed.

    Args:
        costs: of the group.
        order: of fitted weights.
        ridge: likewise.
        base: ``[prompts]``, what the plan of the output costs.
        plan: a schedule that takes part, whatever the dynamic programme says.
    """
    found: dict[int, list[Part]] = {}
    if plan:
        found[len(plan)] = [make_part(costs, plan, order, ridge, base)]
    for name, size in FORECASTS:
        for count, steps in best_schedules(segment_costs(costs, name, size)).items():
            fitted = name == "fitted"
            part = make_part(costs, steps, order if fitted else size, ridge, base, name)
            found.setdefault(count, []).append(part)
    return [min(found[count], key=lambda part: part.cost) for count in sorted(found)]


@dataclass(frozen=True)
class Allocation:
    """How many steps compute each group.

    Attributes:
        counts: by group.
        units: what that takes, hundredths of a computed step.
        cost: the sum of what the groups' errors cost.
    """

    counts: tuple[int, ...]
    units: int
    cost: float


def allocations(costs: Sequence[Sequence[float]], shares: Sequence[float]) -> list[Allocation]:
    """The cheapest division of every budget, without those that a smaller budget is as good as.

    Args:
        costs: of each group, for 1, 2, ... computed steps.
        shares: of each group, of the seconds of a computed step.

    Returns:
        By their units, ascending; each costs less than the one before.
    """
    prices = [max(round(UNITS * share), 1) for share in shares]
    total = sum(price * len(each) for price, each in zip(prices, costs, strict=True))
    value = np.full(total + 1, np.inf)  # of exactly so many units
    value[0] = 0.0
    chosen = list[np.ndarray]()
    for price, mine in zip(prices, costs, strict=True):
        options = np.full((len(mine), total + 1), np.inf)
        for place, cost in enumerate(mine):
            units = price * (place + 1)
            options[place, units:] = value[: total + 1 - units] + cost
        chosen.append(options.argmin(0) + 1)
        value = options.min(0)
    found = list[Allocation]()
    for units in np.flatnonzero(np.isfinite(value)):
        if found and value[units] >= found[-1].cost:
            continue
        counts, left = list[int](), int(units)
        for price, at in zip(reversed(prices), reversed(chosen), strict=True):
            counts.append(int(at[left]))
            left -= price * counts[-1]
        found.append(Allocation(tuple(reversed(counts)), int(units), float(value[units])))
    return found
