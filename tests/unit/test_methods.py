"""Schedules of papers: one contract for all of them, and each against its paper's rule."""

import json
import math

import pytest
import torch

import flashomni
from conftest import call, self_attention
from flashomni.engine import Recipe, StepKind
from flashomni.engine.schedules import Signals, make_schedule, schedules
from flashomni.models import adapters
from flashomni.policies import make_policy

pytestmark = pytest.mark.usefixtures("no_grad")
NAMES = sorted(schedules())
# Settings by which each leaves steps out of the random runs below, and computes some.
SETTINGS = {
    "adaptive": {"tolerance": 0.3},
    "easycache": {"threshold": 0.5, "first": 3},
    "first_block": {"threshold": 0.6, "first": 2},
    "interval": {"interval": 4, "growth": 0.5},
    "magcache": {"threshold": 0.1},
    "ramp": {},
    "steps": {},
    "teacache": {"threshold": 0.9, "coefficients": [0.5, 0.1]},
}
BAD = [
    ("adaptive", {"tolerance": -1}, "tolerance"),
    ("adaptive", {"max_gap": 1}, "max_gap"),
    ("adaptive", {"budget": 1.5}, "budget"),
    ("adaptive", {"order": 4}, "order"),
    ("easycache", {"threshold": "much"}, "threshold"),
    ("easycache", {"first": 0}, "first"),
    ("first_block", {"front": 0}, "front"),
    ("first_block", {"back": -1}, "back"),
    ("first_block", {"threshold": float("nan")}, "threshold"),
    ("first_block", {"max_gap": 2.5}, "max_gap"),
    ("interval", {"growth": -0.5}, "growth"),
    ("magcache", {"ratios": []}, "ratios"),
    ("magcache", {"ratios": [1.0, "x"]}, "ratios"),
    ("magcache", {"max_skip": -1}, "max_skip"),
    ("magcache", {"retention": 2}, "retention"),
    ("ramp", {"computed": 29}, "computed"),
    ("ramp", {"peak": 1.5}, "peak"),
    ("ramp", {"start": -0.1}, "start"),
    ("steps", {"of": 0}, "of"),
    ("teacache", {"coefficients": 3}, "coefficients"),
    ("teacache", {"coefficients": [None]}, "coefficients"),
    ("teacache", {"threshold": True}, "threshold"),
]


def made(name):
    return make_schedule(name, **SETTINGS[name])


class Run:
    """A generation without a model: random tensors that drift, and what a schedule makes of it."""

    def __init__(self, num_steps, seed=0, errors=None):
        generator = torch.Generator().manual_seed(seed)
        shape = (num_steps, 2, 6, 4)
        self.latents, self.outputs, self.modulated, self.added = (
            torch.randn(shape, generator=generator).cumsum(0) for _ in range(4)
        )
        self.entrance = torch.randn(shape, generator=generator)
        self.errors = errors
        self.num_steps, self.computed, self.reads = num_steps, [], []

    def signals(self, step, memory):
        text = torch.zeros(2, 3, 4)
        known = self.errors is not None and len(self.computed) > 1
        return Signals(
            step,
            self.num_steps,
            tuple(self.computed),
            streams=(text, self.entrance[step] + self.added[step]),
            memory=memory,
            latents=self.latents[step],
            main=1,
            entrance=(text, self.entrance[step]),
            modulated=lambda: self.modulated[step],
            error=(lambda: self.errors[self.computed[-1]]) if known else None,
        )

    def go(self, schedule):
        """The computed steps, as the engine would ask for them."""
        memory, plan = {}, schedule.plan(self.num_steps, 1)
        for step in range(self.num_steps):
            signals = self.signals(step, memory)
            kind = (
                schedule.kind(step, self.num_steps, signals) if plan is None else plan.kinds[step]
            )
            live = kind is not StepKind.DISPATCH
            if schedule.decides and live:
                schedule.watch(schedule.front, signals)
            elif schedule.decides:
                live = schedule.decide(schedule.front, signals)
            if live:
                self.computed.append(step)
                if schedule.learns:
                    schedule.learn(self.outputs[step], signals)
        return self.computed


def test_every_schedule_is_under_contract():
    assert sorted(SETTINGS) == NAMES


@pytest.mark.parametrize("num_steps", [*range(1, 12), 28, 37, 60])
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_steps(name, num_steps):
    """The first step is computed, the same is done again, and long runs are left in part."""
    errors = [0.2 + 0.3 * math.sin(i) ** 2 for i in range(num_steps)]
    computed = Run(num_steps, errors=errors).go(made(name))
    assert computed[0] == 0 and computed == sorted(set(computed)) and computed[-1] < num_steps
    assert Run(num_steps, errors=errors).go(made(name)) == computed
    if num_steps >= 12:
        assert 2 <= len(computed) < num_steps


@pytest.mark.parametrize("name", NAMES)
def test_settings_go_to_json_and_back(name):
    schedule = made(name)
    data = json.loads(json.dumps(schedule.to_dict()))
    again = make_schedule(**data)
    assert again == schedule and again.to_dict() == data
    recipe = Recipe.of("fora", schedule=schedule)
    assert Recipe.from_dict(json.loads(json.dumps(recipe.to_dict()))) == recipe


@pytest.mark.parametrize("name", NAMES)
def test_defaults_are_settings_too(name):
    default = schedules()[name]()
    assert make_schedule(**default.to_dict()) == default


@pytest.mark.parametrize(("name", "settings", "setting"), BAD)
def test_bad_settings_are_named(name, settings, setting):
    with pytest.raises(ValueError, match=setting):
        make_schedule(name, **settings)
    with pytest.raises(ValueError, match=rf"schedule {name} takes .*{setting}.*, got 'speed'"):
        make_schedule(name, speed=3)


@pytest.fixture
def flux():
    torch.manual_seed(0)
    model, inputs = adapters()["FluxTransformer2DModel"].tiny()
    return model.eval(), dict(inputs)


# As above, for the small movements of the model below.
GENTLE = {
    "adaptive": {"tolerance": 0.02, "first": 2},
    "easycache": {"threshold": 0.2, "first": 2},
    "first_block": {"threshold": 0.12, "back": 1},
    "teacache": {"threshold": 0.12, "coefficients": [1.0, 0.0]},
    "magcache": {"threshold": 0.4},
}


def generate(engine, model, inputs, steps, branches=("call",)):
    outputs, latents = [], inputs["hidden_states"]
    for step in range(steps):
        for branch in branches:
            engine.step(step, steps, branch)
            outputs.append(call(model, {**inputs, "hidden_states": latents}))
        latents = latents - 0.1 * outputs[-1]
    return torch.stack(outputs)


def cached(name, **more):
    schedule = make_schedule(name, **GENTLE.get(name, SETTINGS[name]))
    recipe = Recipe.of(make_policy("cached"), degrade_below=1.0, layer_order=1)
    return recipe.replace(schedule=schedule, **more)


@pytest.mark.parametrize("steps", [1, 2, 5, 13])
@pytest.mark.parametrize("name", NAMES)
def test_a_generation_can_be_repeated(flux, name, steps):
    """Bit for bit, and finite; of thirteen steps some are left out and some are not."""
    model, inputs = flux
    with flashomni.accelerate(model, cached(name)) as engine:
        first = generate(engine, model, inputs, steps)
        kinds = [step["kind"] for step in engine.report().steps]
        assert torch.equal(generate(engine, model, inputs, steps), first)
        assert [step["kind"] for step in engine.report().steps] == kinds
    assert first.isfinite().all() and kinds[0] != "dispatch"
    if steps == 13:
        assert "dispatch" in kinds and set(kinds[1:-1]) != {"dispatch"}


@pytest.mark.parametrize("name", NAMES)
def test_both_branches_do_the_same(flux, name):
    """The step's first call decides, inside a step too; alone a branch gets the same."""
    model, inputs = flux
    with flashomni.accelerate(model, cached(name)) as engine:
        alone = generate(engine, model, inputs, 13)
        both = generate(engine, model, inputs, 13, ("cond", "uncond"))
        steps = engine.report().steps
    assert torch.equal(both[::2], alone) and torch.equal(both[1::2], alone)
    layers = [step["layer_kinds"] for step in steps]
    assert layers[::2] == layers[1::2]


@pytest.mark.parametrize("name", NAMES)
def test_what_a_schedule_remembers_is_counted_and_dropped(flux, name):
    """Tensors of its own are part of the cache's bytes; behind the last step nothing is left."""
    model, inputs = flux
    with flashomni.accelerate(model, cached(name)) as engine:
        generate(engine, model, inputs, 12)
        branch = engine._runtime.last.branches["call"]
        assert branch.nbytes() == (0, 0) and not branch.memory
        assert engine.report().cache_bytes > 0


@pytest.mark.parametrize("name", sorted({*NAMES} - {"first_block", "teacache"}))
def test_the_output_level_goes_with_all_that_look_from_outside(flux, name):
    model, inputs = flux
    with flashomni.accelerate(model, cached(name, level="output")) as engine:
        first = generate(engine, model, inputs, 13)
        kinds = [step["kind"] for step in engine.report().steps]
        assert torch.equal(generate(engine, model, inputs, 13), first)
    assert "dispatch" in kinds and first.isfinite().all()


# Each paper's rule, written out once more.


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
        ("fast", {"computed": 8, "start": 0.0, "end": 1.0}),
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


class Unread(torch.Tensor):
    """A tensor whose values must not reach the host."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert function not in (torch.Tensor.item, torch.Tensor.__float__, torch.Tensor.__bool__)
        return super().__torch_function__(function, types, args, kwargs or {})


@pytest.mark.parametrize("name", NAMES)
def test_steps_that_compute_anyway_read_nothing(name):
    """Neither the first steps nor the last make the host wait for the device."""
    schedule = made(name)
    first = getattr(schedule, "first", 1)
    run = Run(first + 1, errors=[0.1] * (first + 1))
    for part in ("latents", "outputs", "modulated", "added", "entrance"):
        setattr(run, part, getattr(run, part).as_subclass(Unread))
    with pytest.raises(AssertionError):
        float(run.latents.sum())
    assert run.go(schedule) == list(range(first + 1))


def test_a_front_that_leaves_nothing_is_refused(flux):
    model, _ = flux
    with pytest.raises(ValueError, match=r"front \+ back of schedule first_block must leave some"):
        flashomni.accelerate(model, cached("first_block").replace(front=3, back=1))


def test_teacache_asks_for_an_adapter_that_shows_the_modulated_input(flux, monkeypatch):
    import dataclasses

    from flashomni.models import find_adapter

    model, _ = flux
    adapter = find_adapter(model)
    sites = [dataclasses.replace(site, modulated=None) for site in adapter.sites(model)]
    monkeypatch.setattr(type(adapter), "sites", lambda self, model: sites)
    with pytest.raises(NotImplementedError, match="schedule teacache looks at the modulated input"):
        flashomni.accelerate(model, cached("teacache"))


@pytest.mark.parametrize("transformer", sorted(adapters()))
def test_the_modulated_input_is_what_the_first_block_works_on(transformer):
    """Found among the inputs of the attention's projections in the stock model."""
    torch.manual_seed(0)
    adapter = adapters()[transformer]
    model, inputs = adapter.tiny()
    site, seen = adapter.sites(model)[0], []
    block = site.block
    own = [
        self_attention(block).to_q.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    ]
    own.append(
        block.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(site.modulated(block, *args, **kwargs)),
            with_kwargs=True,
        )
    )
    call(model.eval(), inputs)
    probed, attended = seen[0], seen[1]
    torch.testing.assert_close(probed, attended[:, -probed.shape[1] :])  # text may be in front
    for hook in own:
        hook.remove()
