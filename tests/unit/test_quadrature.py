"""Forecast quadrature: weights against their definition, an integral, and where it stands back."""

from itertools import pairwise

import numpy as np
import pytest
import torch

import flashomni
from flashomni.engine import Recipe
from flashomni.engine.forecasts import Known, forecasts, looks_ahead
from flashomni.engine.forecasts import quadrature as module
from flashomni.engine.noise import Noise
from flashomni.engine.schedules.interval import Interval
from flashomni.engine.schedules.ramp import Ramp
from flashomni.lab import zoo

quadrature, hermite = forecasts()["quadrature"], forecasts()["hermite"]


def sigmas(num_steps=28, shift=3.0, end=0.0):
    """Of a flow's scheduler, rounded as its tensors are."""
    even = np.linspace(1.0, 1.0 / num_steps, num_steps)
    levels = np.append(shift * even / (1 + (shift - 1) * even), end)
    return tuple(levels.astype(np.float32).tolist())


def rows(known):
    """Every step's weights: ``[T, T]``."""
    found = np.eye(known.num_steps)
    for step in set(range(known.num_steps)) - set(known.computed):
        times = [at for at in known.computed if at < step][-(known.order + 1) :]
        found[step] = 0.0
        found[step, times] = quadrature(times, step, known)
    return found


def cost(known, weights, ridge=module.RIDGE):
    """By the definition: each computed step, and the end, sees the error before it."""
    levels, steps = np.array(known.sigmas), known.num_steps
    places = np.log((1 - levels[:-1] + module.END) / (levels[:-1] + module.END))
    far = np.sqrt(3.0) * np.abs(np.subtract.outer(places, places)) / module.LENGTH
    gram = (1 + far) * np.exp(-far) + module.NUGGET * np.eye(steps)
    mass = (module.GAIN * levels**2) ** 2
    total = 0.0
    looks = [step for step in known.computed if step > 0]
    for look, following in zip([*looks, steps], [*looks, steps, steps][1:], strict=True):
        counts = mass[look] - mass[following] if look < steps else 1.0 + mass[steps]
        moved = np.diff(levels)[:look]
        error = moved @ (weights - np.eye(steps))[:look]
        total += counts * error @ gram @ error
    # The ridge, of each weight but the last anchor's.
    for step in set(range(steps)) - set(known.computed):
        *older, last = [at for at in known.computed if at < step][-(known.order + 1) :]
        following = min((look for look in looks if look > step), default=steps)
        for at in older:
            away = gram[at, at] + gram[last, last] - 2 * gram[at, last]
            scale = (levels[step] - levels[step + 1]) ** 2 * (1 + mass[following])
            total += ridge * scale * away * weights[step, at] ** 2
    return total


@pytest.mark.parametrize(
    ("computed", "order", "end"),
    [(Ramp(10, 28).steps(), 2, 0.0), ((0, 3, 4, 11, 20), 1, 0.0), ((0, 1, 5, 14, 27), 3, 0.2)],
)
def test_no_other_weights_cost_less(computed, order, end):
    """Also where the last step is left out, and where the generation ends in noise."""
    known = Known(28, None, order, computed, sigmas(end=end) if end else sigmas())
    if end:
        levels = np.linspace(1.0, end, 29)
        known = Known(28, None, order, computed, tuple(levels.tolist()))
    found = rows(known)
    np.testing.assert_allclose(found.sum(1), 1.0, atol=1e-9)
    least, random = cost(known, found), np.random.default_rng(0)
    for size in (1e-1, 1e-3):
        for _ in range(20):
            other = found.copy()
            for step in set(range(28)) - set(computed):
                *older, last = [at for at in computed if at < step][-(order + 1) :]
                for at in older:
                    change = size * random.standard_normal()
                    other[step, at] += change
                    other[step, last] -= change
            if np.abs(other - found).max() > 0:
                assert cost(known, other) > least


KNOWN = Known(28, None, 2, Ramp(10, 28).steps(), sigmas())
OTHERS = {
    "nothing": None,
    "no noise": Known(28, None, 2, KNOWN.computed),
    "late decisions": Known(28, None, 2, (), KNOWN.sigmas),
    "noise of other steps": Known(28, None, 2, KNOWN.computed, sigmas(27)),
    "noise that rises": Known(28, None, 2, KNOWN.computed, KNOWN.sigmas[::-1]),
    "noise that stays": Known(28, None, 2, KNOWN.computed, (1.0, *KNOWN.sigmas[:-1])),
    "noise of no flow": Known(28, None, 2, KNOWN.computed, tuple(14 * s for s in KNOWN.sigmas)),
    "another order": Known(28, None, 1, KNOWN.computed, KNOWN.sigmas),
    "anchors that were left out": Known(28, None, 2, (0, 1, 2, 3, 27), KNOWN.sigmas),
}


@pytest.mark.parametrize("known", OTHERS.values(), ids=OTHERS)
def test_where_it_knows_too_little_it_is_hermite(known):
    assert quadrature((4, 6, 10), 13, KNOWN) != hermite((4, 6, 10), 13)
    assert quadrature((4, 6, 10), 13, known) == hermite((4, 6, 10), 13)


def test_too_many_steps_are_not_solved():
    for steps, same in [(module.MOST, False), (module.MOST + 1, True)]:
        known = Known(steps, None, 2, (0, 40, 80, 120, 200), sigmas(steps))
        got = quadrature((40, 80, 120), 130, known)
        assert (got == hermite((40, 80, 120), 130)) == same


def mixture(sigma, latents, centres, width):
    """The exact velocity of a flow to Gaussians around some points."""
    spread = (1 - sigma) ** 2 * width**2 + sigma**2
    far = ((latents - (1 - sigma) * centres) ** 2).sum(-1)
    share = np.exp(-0.5 * (far - far.min()) / spread)
    share /= share.sum()
    centre = share @ centres
    inside = centre + (1 - sigma) * width**2 / spread * (latents - (1 - sigma) * centre)
    return (latents - inside) / max(sigma, 1e-9)


def integrated(levels, computed, forecast, seed):
    """Euler's method on such a flow, where forecasts stand in for what is not computed."""
    random = np.random.default_rng(seed)
    centres, latents = random.standard_normal((12, 24)), random.standard_normal(24)
    known = Known(len(levels) - 1, None, 2, tuple(computed), levels)
    kept = {}
    for step, (sigma, following) in enumerate(pairwise(levels)):
        if step in computed:
            kept[step] = velocity = mixture(sigma, latents, centres, 1.0)
        else:
            times = sorted(kept)[-3:]
            weights = forecast(times, step, known)
            velocity = sum(w * kept[at] for w, at in zip(weights, times, strict=True))
        latents = latents + (following - sigma) * velocity
    return latents


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("num_steps", [20, 50])
def test_flows_that_are_known_are_integrated_better(num_steps, shift):
    """Than by Hermite's forecast, in the mean of several exact flows, on two kinds of schedule."""
    levels = sigmas(num_steps, shift)
    for computed in (Ramp(10, num_steps).steps(), Interval(4).plan(num_steps, 2).computed):
        gains = []
        for seed in range(6):
            dense = integrated(levels, range(num_steps), hermite, seed)
            errors = [
                np.square(integrated(levels, computed, each, seed) - dense).sum()
                for each in (quadrature, hermite)
            ]
            gains.append(10 * np.log10(errors[1] / errors[0]))
        assert np.mean(gains) > 1.0, gains


def scheduler(name="FlowMatchEulerDiscreteScheduler", steps=8, **settings):
    import diffusers

    found = getattr(diffusers, name)(**settings)
    found.set_timesteps(steps)
    return found


@pytest.mark.slow
def test_noise_is_what_the_scheduler_will_do():
    found = scheduler(shift=3.0)
    assert Noise.of(found).levels() == tuple(found.sigmas.tolist())
    found.set_begin_index(3)
    assert Noise.of(found).levels() == tuple(found.sigmas[3:].tolist())
    found.step(torch.ones(2), found.timesteps[3], torch.zeros(2))
    assert Noise.of(found).levels() == tuple(found.sigmas[4:].tolist())


@pytest.mark.slow
def test_noise_of_other_schedulers_is_not_known():
    settings = {"stochastic_sampling": True}, {"invert_sigmas": True}
    others = [scheduler(**each) for each in settings]
    others += [scheduler(name) for name in ("DDIMScheduler", "EulerDiscreteScheduler")]
    others += [scheduler("UniPCMultistepScheduler", use_flow_sigmas=True), None, object()]
    assert [Noise.of(each) for each in others] == [None] * len(others)


def test_who_looks_ahead():
    assert looks_ahead("quadrature") and not looks_ahead("hermite")
    fitted = {"name": "fitted", "fitted": {"num_steps": 9, "base": "quadrature"}}
    for settings, asks in [("quadrature", True), ("taylor", False), (fitted, True)]:
        assert Recipe.of("fora", forecast=settings).forecast.looks_ahead == asks


@pytest.fixture(scope="module")
def small():
    pipe = zoo.random_pipeline("tiny-image", heads=2, head_dim=32, dual=1, single=1).pipe
    pipe.set_progress_bar_config(disable=True)
    return pipe


def latents(pipe, recipe, steps=12, **more):
    size = {"height": 88, "width": 72, "max_sequence_length": 64, "output_type": "latent"}
    noise = torch.Generator().manual_seed(0)
    with flashomni.accelerate(pipe, recipe), torch.no_grad():
        return pipe("a ring", num_inference_steps=steps, generator=noise, **size, **more)[0]


STEPS = {"name": "steps", "steps": [0, 1, 3, 6, 10], "of": 12}


@pytest.mark.slow
@pytest.mark.parametrize("level", ["output", "layers"])
def test_an_engine_forecasts_with_the_noise_of_its_pipeline(small, level):
    """The same as the same weights given in a recipe; not the same as Hermite's."""
    recipe = Recipe.of("hicache", schedule=STEPS, forecast="quadrature", level=level)
    got = latents(small, recipe)
    known = Known(12, None, 2, tuple(STEPS["steps"]), tuple(small.scheduler.sigmas.tolist()))
    found = rows(known)
    entries = [
        [list(times), step, found[step, list(times)].tolist()]
        for step, times in module.anchors_of(known.computed, 2, 12).items()
    ]
    fitted = {"name": "fitted", "fitted": {"num_steps": 12, "weights": entries}}
    expected = latents(small, Recipe.of(recipe, forecast=fitted))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(got, latents(small, Recipe.of(recipe, forecast="hermite")))


@pytest.mark.slow
def test_an_engine_without_known_noise_is_hermite(small):
    """With steps of another kind, which add noise."""
    recipe = Recipe.of("hicache", schedule=STEPS, level="output")
    own, found = small.scheduler, []
    try:
        small.scheduler = type(own).from_config(own.config, stochastic_sampling=True)
        for forecast in ("quadrature", "hermite"):
            torch.manual_seed(0)
            found.append(latents(small, Recipe.of(recipe, forecast=forecast)))
    finally:
        small.scheduler = own
    assert torch.equal(*found)
