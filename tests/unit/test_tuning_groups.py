"""Groups of layers in tuning: how steps are divided among them, and what is taken."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from flashomni.engine import Recipe
from flashomni.tuning.cost import Costs
from flashomni.tuning.layer_plan import UNITS, allocations, curve
from flashomni.tuning.layer_tries import (
    Divided,
    LayerOption,
    divisions,
    groups_of,
    in_layers,
    tiles,
    try_layers,
    worth,
)
from flashomni.tuning.layer_watch import partition
from flashomni.tuning.sparse import Found
from flashomni.tuning.validate import recipe_of

STEPS = 7
DUAL = [f"transformer_blocks.{i}" for i in range(3)]
SINGLE = [f"single_transformer_blocks.{i}" for i in range(6)]


@pytest.mark.parametrize(
    ("names", "count", "parts"),
    [
        (DUAL + SINGLE, 2, ((0, 3), (3, 9))), (DUAL + SINGLE, 3, ((0, 3), (3, 6), (6, 9))),
        (SINGLE, 2, ((0, 3), (3, 6))), (DUAL[:1] + SINGLE[:1], 4, ((0, 1), (1, 2))),
        (["first.0", *DUAL, *SINGLE], 2, ((0, 4), (4, 10))), (["a.0"], 2, ((0, 1),)),
    ],
)  # fmt: skip
def test_layers_are_divided_by_kind_and_then_in_halves(names, count, parts):
    """Kinds are put together where there are too many of them."""
    assert partition(names, count) == parts


def costs_of(seed, effects=1.0, slow=1.0, prompts=2, steps=STEPS):
    """Values that change slowly, of a network that adds a little to errors."""
    noise = np.random.default_rng(seed).standard_normal((prompts, steps, 30))
    values = 1.0 + slow * np.cumsum(np.cumsum(noise, 1), 1) / 3
    gains = np.stack([np.ones(steps), np.linspace(1.0, 0.0, steps)])
    return Costs(np.einsum("pti,psi->pts", values, values), np.full(steps, effects), gains)


@pytest.mark.parametrize("shares", [(0.5, 0.5), (0.31, 0.17, 0.4), (1.0,), (0.004, 0.9)])
def test_budgets_are_divided_exactly(shares):
    """Of every budget nothing is cheaper than what trying all combinations finds."""
    random = np.random.default_rng(len(shares))
    costs = [random.random(5) for _ in shares]
    prices = [max(round(UNITS * share), 1) for share in shares]
    found = allocations(costs, shares)
    every = list(itertools.product(range(1, 6), repeat=len(shares)))
    units = np.array([sum(p * k for p, k in zip(prices, ks, strict=True)) for ks in every])
    value = np.array([sum(c[k - 1] for c, k in zip(costs, ks, strict=True)) for ks in every])
    for each in found:
        place = every.index(each.counts)
        assert (units[place], value[place]) == (each.units, pytest.approx(each.cost))
    assert found[0].units == units.min() and found[-1].cost == pytest.approx(value.min())
    for budget in range(units.min(), units.max() + 1, 7):
        best = [each for each in found if each.units <= budget][-1]
        assert best.cost == pytest.approx(value[units <= budget].min())


def test_a_curve_has_the_cheapest_part_for_each_number_of_steps():
    """Everything computed costs nothing; fitted weights are never worse than named forecasts."""
    costs = costs_of(0)
    found = curve(costs, 2, 1e-3, np.ones(2))
    assert [len(part.steps) for part in found] == list(range(1, STEPS + 1))
    assert found[-1].cost < 1e-12 and found[0].cost > found[3].cost
    for part in found:
        assert part.cost == pytest.approx(np.mean(costs.of(part.steps, part.weights)))
        named = costs.forecasts(part.steps, 2, "hermite")
        assert part.cost <= np.mean(costs.of(part.steps, named)) + 1e-12


def test_slow_layers_are_computed_in_fewer_steps():
    """What takes as long gives more dB then; layers alike stay with the plan."""
    steps, parts = (0, 1, 3, 5), ((0, 2), (2, 5))
    prices = worth([20, 28, 34, 40, 46, 52, 120], 4)
    uneven = [costs_of(1, slow=0.1), costs_of(2)]
    base = sum(each.of(steps, each.forecasts(steps, 2, "hermite")) for each in uneven)
    found = divisions(uneven, parts, (0.5, 0.5), steps, base, 2, 1e-3, prices)
    best = found[0].groups
    counts = [len(group["schedule"]["steps"]) for group in best]
    assert counts[0] < 4 <= counts[1] and sum(counts) <= 8
    assert [group["layers"] for group in best] == ["0:2", "2:5"]
    assert found[0].predicted_db > 3
    assert [group["schedule"] for group in found[0].joint] == [g["schedule"] for g in best]
    assert found[0].joint[1]["forecast"] != best[1]["forecast"]
    assert found[0].words.startswith("layers 0:2 in ") and " of 7, layers 2:5" in found[0].words
    assert len(found) == 2 and found[0].groups != found[1].groups
    recipe = in_layers(recipe_of(steps, STEPS), best)
    assert not recipe.at_output and Recipe.from_dict(recipe.to_dict()) == recipe
    again = divisions(uneven, parts, (0.5, 0.5), steps, base / 10, 2, 1e-3, prices)
    assert again[0].predicted_db == pytest.approx(found[0].predicted_db - 10)
    for option in divisions([costs_of(3)] * 2, parts, (0.5, 0.5), steps, base, 2, 1e-3, prices):
        assert any(tuple(group["schedule"]["steps"]) != steps for group in option.groups)
    # What every step takes is not there to be divided.
    less = divisions(uneven, parts, (0.3, 0.3), steps, base, 2, 1e-3, prices)
    computed = [sum(len(g["schedule"]["steps"]) for g in x[0].groups) for x in (found, less)]
    assert computed[1] < computed[0]


def test_seconds_are_worth_what_plans_of_the_output_give():
    """Between whole steps a line; what leaves nothing out has an end."""
    found = worth([10.0, 20.0, 18.0, 40.0, 3000.0], 4)
    assert (found(0.0), found(1.0), found(2.0), found(3.0)) == (0.0, 20.0, 20.0, 30.0)
    assert found(0.25) == 5.0 and found(9.0) == 30.0
    assert found(-0.1) < -300  # nobody needs that: to compute everything takes as long
    assert worth([10.0, 20.0, 18.0, 40.0, 3000.0], 1)(-2.5) == -20.0


class Fake:
    """Measures what a list says, the plan first: dB of two prompts, and seconds."""

    def __init__(self, *values):
        self.values, self.asked, self.prompts = list(values), [], []

    def run(self, recipe, useless):
        self.asked.append(recipe)
        first, second, seconds = self.values.pop(0)
        levels = [first]
        if not useless(levels, seconds):
            levels.append(second)
        self.prompts.append(len(levels))
        return Found(levels, levels, seconds, [])


PLAN = recipe_of((0, 1, 3, 5), STEPS)
ONCE = {"name": "steps", "steps": [0], "of": STEPS, "min_steps": 0}
OPTION = LayerOption("this", ({"layers": "0:1", "schedule": ONCE},), 1.0, fewer=1.0)


@pytest.mark.parametrize(
    ("mine", "rival", "surplus", "pays"),
    [
        ((50, 54, 1.1), (41, 43, 1.1), 8.0, True),  # predicted: a second is worth 20 dB
        ((50, 54, 1.1), (55, 57, 1.2), 3.0, True),  # measured: 70
        ((50, 54, 1.1), (60, 64, 1.1), -10.0, False),
        ((50, 54, 1.1), None, 8.0, True),
        ((41, 43, 1.0), None, 0.0, False),
        ((39, 42, 0.9), (40, 41, 0.9), 0.0, False),  # faster; rivals lose less than predicted
        ((41, 44, 0.9), (36, 38, 0.9), 2.5, True),
    ],
)
def test_what_pays_beats_plans_of_the_output_that_take_as_long(mine, rival, surplus, pays):
    """By their measured dB where there is one; else, or where that is more, by the prediction."""
    fake = Fake((42, 42, 1.0), mine, *([rival] if rival else []))
    other = recipe_of((0, 1, 2, 3, 5), STEPS)
    seconds = []

    def give(saved):
        seconds.append(saved)
        return other if rival else None

    found = try_layers(
        fake, PLAN, [OPTION], lambda saved: 10 * saved, give, lambda: 0.5, ((0, 1),), (0.7,)
    )
    (tried,) = found.tried
    assert fake.asked[:2] == [PLAN, in_layers(PLAN, OPTION.groups)]
    assert (found.chosen is not None) == pays
    if seconds:
        assert seconds == [pytest.approx(2 * tried.saved)] and tried.saved == pytest.approx(
            1 - mine[2]
        )
    if rival and pays:
        assert fake.asked[2] == other
    expected = surplus if seconds else 20 * tried.saved - tried.loss_db
    assert tried.surplus == pytest.approx(expected, abs=1e-9)
    assert Divided.load(found.to_dict()) == found
    assert found.parts == ("0:1",) and tried.in_short.startswith("this: ")


def test_what_is_far_behind_is_not_run_on_more_prompts():
    """Nor is a rival, where nothing pays."""
    fake = Fake((42, 42, 1.0), (38, 99, 1.0))
    found = try_layers(
        fake, PLAN, [OPTION], lambda saved: 20 * saved, lambda saved: 1 / 0, lambda: 1.0
    )
    assert fake.prompts == [2, 1] and found.chosen is None and found.tried[0].loss_db == 4.0


def test_what_is_unlikely_is_not_run():
    """Nor are weights that make good earlier errors, where the others are far behind."""
    unlikely = replace(OPTION, predicted_db=-6.1, joint=OPTION.groups)
    never = lambda *_: 1 / 0  # noqa: E731
    found = try_layers(Fake(), PLAN, [unlikely], lambda saved: saved, never, never)
    assert (
        found.tried == ()
        and found.step_seconds == 0.0
        and found.chosen is None
        and found.predicted_db == -6.1
    )
    fake = Fake((42, 42, 1.0), (38, 38, 1.0), (40, 40, 1.0), (41, 41, 1.0))
    two = [replace(unlikely, words=word, predicted_db=0.0) for word in ("far", "near")]
    found = try_layers(fake, PLAN, two, lambda saved: saved, lambda saved: 1 / 0, lambda: 1.0)
    assert [each.words for each in found.tried] == ["far", "near", "near, joint weights"]


def test_what_computes_more_is_not_faster():
    """Whatever a clock says."""
    fake = Fake((42, 42, 1.0), (41, 41, 0.5))
    found = try_layers(
        fake, PLAN, tiles()[:1], lambda saved: 20 * saved, lambda saved: None, lambda: 1.0
    )
    assert found.tried[0].saved == 0.0 and found.chosen is None


def test_tiles_of_dispatch_steps():
    """Recipes of all layers that are not cached whole, by the plan's forecast."""
    for option in tiles():
        recipe = in_layers(PLAN, option.groups)
        (group,) = recipe.groups
        assert group.policy.tau_q > 0 and group.sparse.degrade_below < 1 and not recipe.at_output
        assert recipe.forecast.name == PLAN.forecast.name and recipe.forecast.order == 2


def test_groups_as_a_recipe_keeps_them():
    """Fitted weights of its own for each group; a named forecast has none."""
    costs = costs_of(0)
    parts = curve(costs, 1, 1e-2, np.ones(2))
    named = [part for part in parts if part.forecast != "fitted"]
    found = groups_of(((0, 1), (1, 4)), (parts[3], (named or parts)[0]), STEPS)
    assert found[0]["layers"] == "0:1" and found[0]["schedule"]["of"] == STEPS
    for group, part in zip(found, (parts[3], (named or parts)[0]), strict=True):
        assert ("fitted" in group["forecast"]) == (part.forecast == "fitted")
        assert group["forecast"]["layer_order"] == part.order
