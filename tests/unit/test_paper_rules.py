"""Each schedule of a paper against the paper's rule, written out once more."""

import math

import pytest
import torch
from schedule_runs import Run

from flashomni.engine import Recipe, StepKind
from flashomni.engine.schedules import make_schedule


def test_interval_grows_as_in_spectrum():
    """A window counter as in the paper's appendix: N = 2, alpha = 0.75, five dense steps."""
    num_steps, window, cached_steps, expected = 50, 2.0, 0, []
    for step in range(num_steps):
        live = step < 5 or (cached_steps + 1) % math.floor(window) == 0
        if live and step >= 5:
            window = round(window + 0.75, 3)
        cached_steps = 0 if live else cached_steps + 1
        expected += [step] if live else []
    plan = make_schedule("interval", interval=2, warmup=0.1, growth=0.75).plan(num_steps, 1)
    computed = [step for step in range(num_steps) if plan.kinds[step] is not StepKind.DISPATCH]
    assert computed == sorted({*expected, num_steps - 1}) and len(expected) == 14


@pytest.mark.parametrize(
    ("preset", "settings"),
    [
        ("balanced", {"computed": 10, "start": 0.1, "end": 0.6}),
        ("fast", {"computed": 8, "start": 0.1, "end": 0.6}),
        ("quality", {"computed": 17, "start": 0.2, "end": 0.5}),
    ],
)
def test_the_presets_are_ramps(preset, settings):
    """Step for step, at every length."""
    ramp = make_schedule("ramp", min_steps=10, **settings)
    for num_steps in range(1, 81):
        assert ramp.plan(num_steps, 2) == Recipe.of(preset).plan(num_steps)


@pytest.mark.parametrize("computed", range(2, 29))
def test_a_ramp_computes_as_many_as_it_says(computed):
    for shape in [(0.1, 0.6, 0.65), (1.0, 1.0, 0.5), (0.0, 0.0, 0.0), (0.0, 0.0, 1.0)]:
        start, end, peak = shape
        steps = make_schedule("ramp", computed=computed, start=start, end=end, peak=peak).steps()
        assert len(steps) == computed and steps[0] == 0 and steps[-1] == 27
        assert list(steps) == sorted(set(steps))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("num_steps", [5, 28, 50])
def test_magcache_is_the_papers_rule(seed, num_steps):
    """Accumulated |1 - product of ratios|, threshold and K, as a loop over steps."""
    ratios = (1 + 0.2 * torch.randn(28, generator=torch.Generator().manual_seed(seed))).tolist()
    source = torch.tensor(ratios, dtype=torch.float64)
    index = (torch.arange(num_steps) * (27 / (num_steps - 1))).round().long()
    gamma, expected, ratio, error, skipped = source[index], [], 1.0, 0.0, 0
    for step in range(num_steps):
        skip = False
        if step >= max(int(0.2 * num_steps + 0.5), 1):
            ratio, skipped = ratio * gamma[step], skipped + 1
            error += abs(1 - ratio)
            skip = bool(error <= 0.3) and skipped <= 3
            if not skip:
                ratio, error, skipped = 1.0, 0.0, 0
        expected += [] if skip else [step]
    schedule = make_schedule("magcache", ratios=ratios, threshold=0.3, max_skip=3, retention=0.2)
    assert Run(num_steps).go(schedule) == expected


@pytest.mark.parametrize("seed", range(4))
def test_easycache_is_the_papers_rule(seed):
    """The transformation rate of the last two computed steps, held until the next."""
    run, num_steps = Run(40, seed), 40
    x, v, expected, total, rate = run.latents, run.outputs, [], 0.0, None
    for step in range(num_steps):
        if step >= 4 and step < num_steps - 1:
            size = v[expected[-1]].abs().mean()
            total += float(rate * (x[step] - x[step - 1]).abs().mean() / size)
            if total < 0.7:
                continue
        total = 0.0
        if expected:
            last = expected[-1]
            rate = (v[step] - v[last]).abs().mean() / (x[step] - x[last]).abs().mean()
        expected.append(step)
    got = run.go(make_schedule("easycache", threshold=0.7, first=4))
    assert got == expected and 8 < len(got) < 32


@pytest.mark.parametrize("seed", range(4))
def test_teacache_is_the_papers_rule(seed):
    """The accumulated relative L1 distance of modulated inputs, rescaled by a polynomial."""
    run, num_steps = Run(40, seed), 40
    coefficients, m, expected, total = [2.0, -1.0, 0.7, 0.05], run.modulated, [], 0.0
    for step in range(num_steps):
        live = step in (0, num_steps - 1)
        if not live:
            distance = float((m[step] - m[step - 1]).abs().mean() / m[step - 1].abs().mean())
            powers = reversed(range(len(coefficients)))
            total += sum(c * distance**p for c, p in zip(coefficients, powers, strict=True))
            live = total >= 0.5
        if live:
            total = 0.0
            expected.append(step)
    got = run.go(make_schedule("teacache", threshold=0.5, coefficients=coefficients))
    assert got == expected and 8 < len(got) < 32


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("max_gap", [0, 2])
def test_first_block_is_the_rule_of_fbcache(seed, max_gap):
    """The relative change of what the first block adds, since the last computed step."""
    run, num_steps, expected = Run(40, seed), 40, []
    for step in range(num_steps):
        if step >= 3 and step < num_steps - 1 and not (max_gap and step - expected[-1] > max_gap):
            old = run.entrance[expected[-1]] + run.added[expected[-1]] - run.entrance[expected[-1]]
            new = run.entrance[step] + run.added[step] - run.entrance[step]
            if float((new - old).abs().mean() / old.abs().mean()) < 0.5:
                continue
        expected.append(step)
    got = run.go(make_schedule("first_block", threshold=0.5, first=3, max_gap=max_gap))
    assert got == expected and 8 < len(got) < 32


def test_adaptive_is_the_step_size_law():
    """Gaps shrink and grow with the square root of tolerance over error, within their bounds."""
    errors = [0.04 * (1 + (i % 7)) for i in range(60)]
    computed, gap = [0, 1, 2], 1
    while computed[-1] < 59:
        wanted = gap * math.sqrt(0.1 / errors[computed[-1]])
        gap = max(min(int(wanted), 2 * gap + 1, 7), 2)
        computed.append(min(computed[-1] + gap, 59))
    assert Run(60, errors=errors).go(make_schedule("adaptive", tolerance=0.1)) == computed


@pytest.mark.parametrize("budget", [0.3, 0.45])
@pytest.mark.parametrize("tolerance", [0.01, 0.5])
def test_the_budget_is_met_whatever_the_tolerance(budget, tolerance):
    """Of an error that grows with the gap; without one the tolerances miss it on both sides."""

    def count(**settings):
        run = Run(60)
        run.errors = _Growing(run)
        return len(run.go(make_schedule("adaptive", tolerance=tolerance, **settings)))

    assert abs(count(budget=budget) - budget * 60) <= 2
    assert abs(count() - budget * 60) > 2


class _Growing:
    """0.02 times the square of the gap."""

    def __init__(self, run):
        self.run = run

    def __getitem__(self, step):
        gap = self.run.computed[-1] - self.run.computed[-2]
        return 0.02 * gap**2
