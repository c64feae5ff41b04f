"""Branches of true CFG that two ranks run at once; see `two_ranks.py`."""

import torch
import two_ranks as other

import flashomni
from flashomni.engine import Recipe
from flashomni.models import adapters

STEPS = 6
BRANCHES = ("cond", "uncond")
RECIPES = {name: other.RECIPES[name] for name in ("lossless", "topk", "fora")}
RECIPES["output"] = other.RECIPES["fora"].replace(forecast={"level": "output"})


def make():
    """Qwen-Image, which pipelines call twice a step, and the texts of the two branches."""
    torch.manual_seed(0)
    model, inputs = adapters()["QwenImageTransformer2DModel"].tiny()
    text = inputs["encoder_hidden_states"]
    return model.eval(), inputs, dict(zip(BRANCHES, (text, torch.randn_like(text)), strict=True))


def generate(engine, model, inputs, texts, branches_of=lambda step: BRANCHES):
    """Guided latents of all steps."""
    latents, found = inputs["hidden_states"], []
    for step in range(STEPS):
        outputs = {}
        for branch in branches_of(step):
            engine.step(step, STEPS, branch)
            now = {**inputs, "hidden_states": latents, "encoder_hidden_states": texts[branch]}
            outputs[branch] = model(**now, return_dict=False)[0]
        guided = outputs["cond"]
        if "uncond" in outputs:
            guided = outputs["uncond"] + 3.0 * (guided - outputs["uncond"])
        latents = latents - 0.02 * guided
        found.append(latents)
    return torch.stack(found)


def equality(name):
    model, inputs, texts = make()
    with flashomni.accelerate(model, RECIPES[name]) as engine:
        one = generate(engine, model, inputs, texts)
        kinds = {(row["step"], row["branch"]): row["kind"] for row in engine.report().steps}
    with flashomni.accelerate(model, RECIPES[name], cfg=2) as engine:
        two = generate(engine, model, inputs, texts)
        report, ranks = engine.report(), engine._runtime.cfg
    here = [row for row in report.steps if row["kind"] != "elsewhere"]
    return {
        "equal": torch.equal(one, two),
        "here": [[row["step"], row["branch"]] for row in here],
        "kinds": all(kinds[row["step"], row["branch"]] == row["kind"] for row in here),
        "broadcasts": ranks.broadcasts,
        "exchanges": ranks.exchanges,
        "bytes": ranks.nbytes,
        "output": 4 * one[0].numel(),
    }


def refusals(rank):
    model, inputs, texts = make()

    def guided(branches_of, add=0):
        given = {**inputs, "hidden_states": inputs["hidden_states"] + add}
        with flashomni.accelerate(model, "lossless", cfg=2) as engine:
            generate(engine, model, given, texts, branches_of)

    def once():
        with flashomni.accelerate(model, "lossless", cfg=2) as engine:
            generate(engine, model, inputs, texts, lambda step: BRANCHES[:1])
            return engine.report().notes

    def on(recipe, **given):
        flashomni.accelerate(model, recipe, cfg=2, **given).remove()

    return {
        "ends": other.refused(lambda: guided(lambda step: BRANCHES[: 1 + (step < 3)])),
        "begins": other.refused(lambda: guided(lambda step: BRANCHES[: 1 + (step > 2)])),
        "turns": other.refused(lambda: guided(lambda step: BRANCHES[:: 1 - 2 * (step == 3)])),
        "noise": other.refused(lambda: guided(lambda step: BRANCHES, add=rank)),
        "schedule": other.refused(lambda: on("easycache")),
        "guidance": other.refused(
            lambda: on(Recipe.of("lossless").replace(guidance={"delta_every": 2}))
        ),
        "memory": other.refused(lambda: on("lossless", memory="auto")),
        "notes": once(),
    }


def found(rank):
    return {**{name: equality(name) for name in RECIPES}, "refusals": refusals(rank)}
