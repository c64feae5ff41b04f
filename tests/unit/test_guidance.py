"""True CFG: the unconditional call left out, its output derived from the conditional one's."""

import json
import math

import pytest
import torch

import flashomni
from conftest import call
from flashomni.engine import Recipe
from flashomni.models import adapters

pytestmark = pytest.mark.usefixtures("no_grad")
STEPS = 12
DENSE = {"name": "interval", "interval": 1, "warmup": 0.0}


@pytest.fixture
def qwen():
    """Qwen-Image, which pipelines call twice a step, and the texts of the two branches."""
    torch.manual_seed(0)
    model, inputs = adapters()["QwenImageTransformer2DModel"].tiny()
    inputs = dict(inputs)
    texts = {"cond": inputs["encoder_hidden_states"]}
    texts["uncond"] = torch.randn_like(texts["cond"])
    return model.eval(), inputs, texts


def generate(engine, model, inputs, texts, steps=STEPS, scale=3.0):
    """``(outputs of each branch [steps, ...], the guided latents at the end)``."""
    latents, outputs = inputs["hidden_states"], {name: [] for name in texts}
    for step in range(steps):
        for branch, text in texts.items():
            engine.step(step, steps, branch)
            now = {**inputs, "hidden_states": latents, "encoder_hidden_states": text}
            outputs[branch].append(call(model, now))
        cond, others = outputs["cond"][-1], [outputs[n][-1] for n in texts if n != "cond"]
        guided = sum((scale * (cond - other) for other in others), cond)
        latents = latents - 0.02 * guided
    return {name: torch.stack(found) for name, found in outputs.items()}, latents


def recipe(**guidance):
    return Recipe.of("lossless", schedule=DENSE).replace(guidance=guidance)


def live(report, branch="uncond"):
    """Steps in which a branch ran."""
    own = [step for step in report.steps if step["branch"] == branch]
    return [step["step"] for step in own if set(step["layer_kinds"]) != {"bypass"}]


@pytest.mark.parametrize("every", [2, 3, 5])
@pytest.mark.parametrize("after", [0.0, 0.5])
def test_the_difference_stands_in_for_the_branch(qwen, every, after):
    """Run in every N-th step; in between the last difference, exactly."""
    model, inputs, texts = qwen
    made = recipe(delta_every=every, delta_after=after)
    with flashomni.accelerate(model, made) as engine:
        outputs, _ = generate(engine, model, inputs, texts)
        report = engine.report()
    first = math.ceil(after * STEPS)
    dense = list(range(max(first, 1)))
    expected = sorted({*dense, *range(dense[-1], STEPS, every)})
    assert live(report) == expected and live(report, "cond") == list(range(STEPS))
    delta = None
    for step in range(STEPS):
        cond, uncond = outputs["cond"][step], outputs["uncond"][step]
        if step in expected:
            delta = cond - uncond
        else:
            assert torch.equal(uncond, cond - delta)
    share = (STEPS - len(expected)) / (2 * STEPS)
    assert report.flops_skipped == pytest.approx(share, abs=1e-6)


@pytest.mark.parametrize("after", [0.5, 0.7])
def test_guidance_stops(qwen, after):
    """From then on both branches are one, and only the first runs."""
    model, inputs, texts = qwen
    with flashomni.accelerate(model, recipe(stop_after=after)) as engine:
        outputs, _ = generate(engine, model, inputs, texts)
        report = engine.report()
    stop = math.ceil(after * STEPS)
    assert live(report) == list(range(stop))
    for step in range(STEPS):
        same = torch.equal(outputs["cond"][step], outputs["uncond"][step])
        assert same == (step >= stop)


@pytest.mark.slow
def test_the_difference_is_better_than_none(qwen):
    """At equal cost it ends nearer to the stock run than without guidance."""
    model, inputs, texts = qwen

    def end(made):
        with flashomni.accelerate(model, made) as engine:
            return generate(engine, model, inputs, texts)[1]

    stock = end(Recipe.of("lossless", schedule=DENSE))
    assert torch.equal(end(recipe()), stock)
    held, stopped = end(recipe(delta_every=2)), end(recipe(stop_after=0.5))
    assert 0 < (held - stock).norm() < (stopped - stock).norm()


def test_it_goes_with_caching(qwen):
    """In steps that are forecast a branch that kept up has a forecast; one behind is derived."""
    model, inputs, texts = qwen
    made = Recipe.of("fora", schedule={"name": "steps", "steps": [0, 1, 4, 7, 10, 11], "of": 12})
    with flashomni.accelerate(model, made, delta_every=2) as engine:
        outputs, latents = generate(engine, model, inputs, texts)
        report = engine.report()
        again, same = generate(engine, model, inputs, texts)
    assert live(report, "cond") == [0, 1, 4, 7, 10, 11]
    assert live(report) == [0, 4, 10]
    assert torch.equal(latents, same) and torch.equal(outputs["uncond"], again["uncond"])
    assert outputs["uncond"].isfinite().all()


@pytest.mark.parametrize("level", ["layers", "output"])
def test_it_goes_with_both_levels(qwen, level):
    model, inputs, texts = qwen
    made = Recipe.of("taylorseer:interval=3", level=level, delta_every=2, stop_after=0.8)
    with flashomni.accelerate(model, made) as engine:
        first, _ = generate(engine, model, inputs, texts)
        second, _ = generate(engine, model, inputs, texts)
    for name in texts:
        assert torch.equal(first[name], second[name]) and first[name].isfinite().all()
    assert len(live(engine.report())) < len(live(engine.report(), "cond"))


def test_further_branches_have_differences_of_their_own(qwen):
    """Perturbed guidance: three calls a step."""
    model, inputs, texts = qwen
    texts = {**texts, "perturbed": torch.randn_like(texts["cond"])}
    with flashomni.accelerate(model, recipe(delta_every=3)) as engine:
        outputs, _ = generate(engine, model, inputs, texts)
        report = engine.report()
    for name in ("uncond", "perturbed"):
        assert live(report, name) == [0, 3, 6, 9]
        delta = outputs["cond"][3] - outputs[name][3]
        assert torch.equal(outputs[name][4], outputs["cond"][4] - delta)
    assert not torch.equal(outputs["uncond"], outputs["perturbed"])


def test_one_call_a_step_is_said_in_the_report(qwen):
    """Distilled guidance: there is nothing to leave out."""
    model, inputs, texts = qwen
    with flashomni.accelerate(model, recipe(delta_every=2)) as engine:
        generate(engine, model, inputs, {"cond": texts["cond"]})
        notes = engine.report().notes
    assert any("guidance: the model was called once a step" in note for note in notes)


def test_the_other_order_is_refused(qwen):
    """The condition is not what may be left out."""
    model, inputs, texts = qwen
    turned = dict(reversed(texts.items()))
    refused = pytest.raises(NotImplementedError, match="calls branch 'uncond' before 'cond'")
    with flashomni.accelerate(model, recipe(delta_every=2)) as engine, refused:
        generate(engine, model, inputs, turned)


def test_settings(tmp_path):
    """In a section of their own; by their names too; JSON and back."""
    made = Recipe.of("fora:delta_every=2,stop_after=.75")
    assert made.guidance.delta_every == 2 and made.guidance.acts
    assert Recipe.from_dict(json.loads(json.dumps(made.to_dict()))) == made
    assert not Recipe.of("fora").guidance.acts and recipe(delta_every=2).skips


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"delta_every": 0}, "delta_every must be an integer from 1"),
        ({"delta_after": 1.5}, "delta_after must be a number from 0.0 to 1.0"),
        ({"stop_after": "late"}, "stop_after must be a number"),
        ({"guidance": {"scale": 3}}, "guidance has delta_every, delta_after, stop_after; got"),
    ],
)
def test_bad_settings_are_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Recipe.of("fora", **settings)
