"""Schedules of papers: one contract for all of them."""

import json
import math

import pytest
import torch
from schedule_runs import SETTINGS, Run, made

import flashomni
from conftest import call, make_tiny, run, self_attention
from flashomni.engine import Recipe
from flashomni.engine.schedules import make_schedule, schedules
from flashomni.kernels.elementwise import op as elementwise
from flashomni.models import adapters
from flashomni.policies import make_policy

pytestmark = pytest.mark.usefixtures("no_grad")
NAMES = sorted(schedules())
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


@pytest.mark.parametrize("transformer", sorted(adapters()))
def test_the_modulated_input_is_made_on_the_backend_that_was_chosen(transformer, monkeypatch):
    """As all else is."""
    asked, execute = set(), elementwise.execute
    monkeypatch.setattr(
        elementwise, "execute", lambda op, call, on=None: asked.add(on) or execute(op, call, on)
    )
    run(*make_tiny(transformer), cached("teacache"), steps=2, backend="reference")
    assert asked == {"reference"}
