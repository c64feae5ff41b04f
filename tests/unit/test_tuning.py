"""Tuning: costs and fits against their definitions, exact plans, and each part by itself."""

import dataclasses
import itertools
from typing import ClassVar

import numpy as np
import pytest
import torch

from flashomni.engine.tuned_on import TunedOn, fingerprint, prompts_hash
from flashomni.tuning.cost import Costs, anchors_of, as_fitted, choose_fit, decibels
from flashomni.tuning.gains import Gain, gain_curve, probe_steps
from flashomni.tuning.plan import best_schedules, descend, neighbours, segment_costs
from flashomni.tuning.polish import Candidate, behind, search, signal_to_noise
from flashomni.tuning.validate import Held, Verdict

STEPS = 9


def walks(prompts=3, steps=STEPS, width=40, seed=0):
    """Outputs that change slowly: [prompts, steps, width]."""
    noise = np.random.default_rng(seed).standard_normal((prompts, steps, width))
    return np.cumsum(np.cumsum(noise, 1), 1) / 3


def costs(values, gains=None):
    steps = values.shape[1]
    grams = np.einsum("pti,psi->pts", values, values)
    if gains is None:
        gains = np.stack([np.linspace(1.5, 1.0, steps), np.linspace(3.0, 0.0, steps)])
    return Costs(grams, np.linspace(0.5, 1.5, steps), np.asarray(gains))


def quiet(steps=STEPS):
    """Gains of a network that neither makes good nor adds anything."""
    return np.stack([np.ones(steps), np.zeros(steps)])


def directly(values, found, computed, weights):
    """The cost by its definition: what is left at the end, and what each look at an error adds."""
    total = np.zeros(len(values))
    along, across = found.gains[0], found.gains[1] ** 2
    looks = sorted(set(computed) - {0})

    def error(value, end):
        return sum(
            along[t] * np.linspace(0.5, 1.5, STEPS)[t] * (weights[t] @ value - value[t])
            for t in range(end)
        )

    for prompt, value in enumerate(values):
        total[prompt] = np.sum(error(value, STEPS) ** 2)
        for look, following in zip(looks, [*looks, STEPS][1:], strict=True):
            added = across[look - 1] - across[following - 1]
            total[prompt] += added * np.sum(error(value, look) ** 2) / along[look - 1] ** 2
    return total


@pytest.mark.parametrize("computed", [(0,), (0, 3), (0, 1, 4, 8), (0, 2, 3, 5, 7)])
def test_cost_is_its_definition(computed):
    """From Gram matrices alone, what summing up the errors themselves gives."""
    values = walks()
    found = costs(values)
    weights = found.forecasts(computed, 2, "hermite")
    torch.testing.assert_close(
        torch.tensor(found.of(computed, weights)),
        torch.tensor(directly(values, found, computed, weights)),
    )


def test_nothing_left_out_costs_nothing():
    """All steps computed."""
    found = costs(walks())
    everything = tuple(range(STEPS))
    assert (found.of(everything, found.forecasts(everything, 2, "taylor")) < 1e-20).all()


def test_a_later_forecast_makes_good_an_earlier_error():
    """Fitted weights leave less at the end than the best forecast of every step does."""
    times = np.linspace(0.0, 2.0, STEPS)
    curves = np.stack([np.ones(STEPS), np.sin(times), np.cos(2 * times), times**3])
    found = costs(curves.T[None], gains=quiet())
    computed = (0, 1, 3, 5, 7)
    best = found.of(computed, found.fit(computed, 2, 1e-9))[0]
    looks = np.stack([np.ones(STEPS), np.logspace(9, 0, STEPS)])  # each step counts by itself
    local = Costs(found.grams, found.effects, looks)
    assert best < 0.1 * found.of(computed, local.fit(computed, 2, 1e-9))[0]


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_fit_is_the_minimum(order):
    """Weights of a step sum to 1, and no other ones are better."""
    found = costs(walks(prompts=1))
    computed = (0, 1, 4, 6)
    weights = found.fit(computed, order, 0.0)
    assert np.allclose(weights.sum(1), 1.0)
    least = found.of(computed, weights)[0]
    generator = np.random.default_rng(1)
    for step, anchors in anchors_of(computed, order, STEPS).items():
        if len(anchors) == 1:
            continue
        moved = weights.copy()
        change = generator.standard_normal(len(anchors)) * 0.01
        moved[step, list(anchors)] += change - change.mean()
        assert found.of(computed, moved)[0] > least


def test_gains_say_what_early_errors_count():
    """What the network adds to an error counts by the square, and what it makes good does not."""
    values = walks(prompts=1)
    computed = (0, *range(2, STEPS))  # only step 1 is left out
    weights = costs(values).forecasts(computed, 0, "reuse")
    one = costs(values, quiet()).of(computed, weights)
    gains = quiet()
    gains[1, :2] = 5.0
    assert np.allclose(costs(values, gains).of(computed, weights), (1 + 25) * one)
    gains = quiet()
    gains[0, :2] = 0.5
    assert np.allclose(costs(values, gains).of(computed, weights), 0.25 * one)


@pytest.mark.parametrize(
    ("name", "order"), [("hermite", 2), ("taylor", 1), ("reuse", 0), ("fitted", 2)]
)
def test_plans_are_exact(name, order):
    """The programme finds what trying every schedule finds, for every number of steps."""
    steps = 7
    segments = segment_costs(costs(walks(steps=steps)), name, order)

    def total(schedule):
        known = (steps, steps, *schedule)
        ends = (*schedule[1:], steps)
        return sum(segments[(*known[i : i + 3], end)] for i, end in enumerate(ends))

    plans = best_schedules(segments)
    assert set(plans) == set(range(1, steps + 1))
    for count, plan in plans.items():
        every = [(0, *rest) for rest in itertools.combinations(range(1, steps), count - 1)]
        assert len(plan) == count
        assert total(plan) == pytest.approx(min(map(total, every)), rel=1e-12)


def test_a_segment_costs_its_signed_errors():
    """Of one gap of reuse: the sum of the errors in it, each with its gain and effect."""
    values = walks(prompts=1)
    found = costs(values)
    segment = segment_costs(found, "reuse", 0)[STEPS, 0, 2, 5]
    effects = np.linspace(0.5, 1.5, STEPS)
    scale = np.sqrt(found.gains[0] ** 2 + found.across) * effects
    error = sum(scale[t] * (values[0, 2] - values[0, t]) for t in (3, 4))
    unit = np.sum((values[0, 1:] - values[0, :-1]) ** 2)  # prompts count alike
    assert segment == pytest.approx(error @ error / unit)


def test_descent_ends_where_no_move_helps():
    """It starts anywhere, and its end is no worse than its neighbours."""
    found = costs(walks())

    def cost(steps):
        return -decibels(found.of(steps, found.fit(steps, 2, 1e-3)))

    best, value = descend((0, 1, 2, 3), STEPS, cost)
    assert value <= min(map(cost, neighbours(best, STEPS))) and value < cost((0, 1, 2, 3))


def test_neighbours_keep_their_number():
    """One step moves, the first stays, none meets another."""
    found = neighbours((0, 1, 5), 7)
    assert (0, 1, 2) in found and (0, 4, 5) in found and (0, 1, 6) in found
    assert all(len(set(s)) == 3 and s[0] == 0 and max(s) < 7 and s[1] > 0 for s in found)


def test_ridge_and_order_are_chosen_on_prompts_left_out():
    """Where prompts have nothing in common, weights stay near reuse; with one prompt, no choice."""
    alike = walks(1).repeat(3, 0) + 1e-3 * walks(3, seed=5)
    assert choose_fit(costs(alike), (0, 1, 3, 6))[1] < 1e-1
    strangers = np.random.default_rng(3).standard_normal((3, STEPS, 40))
    assert choose_fit(costs(strangers), (0, 1, 3, 6))[1] == 1e-1
    assert choose_fit(costs(walks(1)), (0, 1, 3, 6)) == (2, 1e-2)


def test_weights_as_a_recipe_keeps_them():
    """One entry for every step that is left out, with its anchors, oldest first."""
    found = costs(walks())
    computed = (0, 2, 5)
    weights = found.fit(computed, 1, 1e-2)
    kept = as_fitted(weights, computed, 1)
    assert kept.num_steps == STEPS and kept.base == "hermite"
    assert [(anchors, step) for anchors, step, _ in kept.weights] == [
        ((0,), 1), ((0, 2), 3), ((0, 2), 4), ((2, 5), 6), ((2, 5), 7), ((2, 5), 8)
    ]  # fmt: skip
    for anchors, step, values in kept.weights:
        assert values == pytest.approx(weights[step, list(anchors)], rel=1e-6)


def test_gains_between_probes():
    """Mean logarithms of prompts, lines between steps; behind the last nothing computes."""
    measured = [{1: Gain(1.0, 8.0), 5: Gain(0.5, 2.0)}, {1: Gain(1.0, 2.0), 5: Gain(0.5, 2.0)}]
    along, across = gain_curve(measured, 8)
    assert across[0] == across[1] == pytest.approx(4.0)
    assert across[3] == pytest.approx(np.sqrt(8.0)) and across[6] == pytest.approx(2.0)
    assert along[1] == pytest.approx(1.0) and along[6] == pytest.approx(0.5)
    assert (along[7], across[7]) == (1.0, 0.0)
    assert gain_curve([{1: Gain(-9.0, 1.0)}], 3)[0, 1] == pytest.approx(1 / 3)
    assert probe_steps(28, 8)[0] == 1 and probe_steps(28, 8)[-1] == 26
    assert probe_steps(4, 8) == [1, 2]


def test_search_measures_what_looks_best_first():
    """All starts, then neighbours of the best by their prediction, within the tries."""

    def make(steps):
        return Candidate(steps, np.eye(6), 1, "fitted", "polish", float(sum(steps)))

    asked = []

    def measure(candidate, best):
        asked.append(candidate.steps)
        return [{(0, 1, 2): 1.0, (0, 1, 5): 3.0}.get(candidate.steps, 0.0)]

    best, value = search([make((0, 1, 2)), make((0, 2, 4))], make, measure, tries=2)
    assert asked == [(0, 2, 4), (0, 1, 2), (0, 1, 5), (0, 4, 5)]
    assert value == 3.0 and best.steps == (0, 1, 5)


def test_search_gives_up_what_the_first_prompts_show_to_be_behind():
    """Such a candidate has fewer values, and never wins however good these are."""
    values = {(0, 1, 2): [4.4, 4.4], (0, 2, 4): [4.0, 8.0], (0, 1, 5): [3.6, 7.0]}

    def measure(candidate, best):
        found = []
        for value in values[candidate.steps]:
            found.append(value)
            if behind(found, best):
                break
        counts.append(len(found))
        return found

    counts = []
    starts = [Candidate(steps, np.eye(6), 1, "fitted", "", 0.0) for steps in values]
    best, value = search(starts, None, measure, tries=0)
    assert best.steps == (0, 2, 4) and value == 6.0 and counts == [2, 2, 2]
    best, value = search([starts[1], starts[0], starts[2]], None, measure, tries=0)
    assert best.steps == (0, 2, 4) and counts[3:] == [2, 2, 2]
    values[0, 1, 5] = [3.4, 99.0]
    best, value = search(starts, None, measure, tries=0)
    assert best.steps == (0, 2, 4) and value == 6.0 and counts[6:] == [2, 2, 1]
    assert not behind([0.0], []) and not behind([1.6, 1.6], [2.0, 2.0, 9.0])


def test_the_error_of_a_gain_is_not_known_of_one_prompt():
    """It is not zero."""
    held = [Held(40.0, 1.0, 2.0), Held(44.0, 1.0, 2.0)]
    ramp = [Held(39.0, 1.0, 2.0), Held(41.0, 1.0, 2.0)]
    one, two = (Verdict.of(held[:n], ramp[:n], ramp[:n]) for n in (1, 2))
    assert (one.gain_db, one.error_db, one.schedule_error_db) == (1.0, None, None)
    assert (two.gain_db, two.error_db, two.schedule_error_db) == (2.0, 1.0, 1.0)
    assert (one.gain, two.gain) == ("+1.00", "+2.00 ± 1.00")


def test_signal_to_noise():
    """In dB; equal latents have a large number, not infinity."""
    reference = torch.ones(100)
    assert signal_to_noise(reference * 1.1, reference) == pytest.approx(20.0, abs=1e-4)
    assert signal_to_noise(reference, reference) == 300.0


class Model(torch.nn.Linear):
    config: ClassVar = {"width": 3, "_name_or_path": "somewhere"}


def tuned(**changes):
    values = {
        "model": "Model", "fingerprint": fingerprint(Model(3, 3)), "num_steps": 10,
        "latents": (1, 16, 4), "prompts": prompts_hash(["a"]), "count": 1,
    }  # fmt: skip
    return TunedOn(**{**values, **changes})


def test_a_recipe_knows_where_it_is():
    """Nothing to say where it was tuned; each difference is a clause."""
    model = Model(3, 3)
    assert tuned().elsewhere(model, 10, (1, 16, 4)) == []
    assert tuned().elsewhere(model, 10, None) == []
    assert "10 steps, these are 12" in tuned().elsewhere(model, 12, (1, 16, 4))[0]
    assert "[1, 16, 4], these are [1, 64, 4]" in tuned().elsewhere(model, 10, (1, 64, 4))[0]
    assert "other weights" in tuned().elsewhere(Model(3, 4), 10, (1, 16, 4))[0]
    assert "tuned on Flux" in tuned(model="Flux").elsewhere(model, 10, (1, 16, 4))[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_steps": 0}, "tuned.num_steps"), ({"latents": ["a"]}, "tuned.latents"),
        ({"prompts": 3}, "tuned.prompts"), ({"gain_db": "much"}, "tuned.gain_db"),
    ],
)  # fmt: skip
def test_a_note_that_is_wrong_is_refused(changes, message):
    """By the name of what is wrong."""
    values = {**dataclasses.asdict(tuned()), **changes}
    with pytest.raises(ValueError, match=message):
        TunedOn.load(values)
    with pytest.raises(ValueError, match="unexpected"):
        TunedOn.load({**dataclasses.asdict(tuned()), "moon": 1})
