"""Weights that are elsewhere between forwards, or are another's: each claim of docs/memory.md."""

import copy
from pathlib import Path

import pytest
import torch
from tiny_models import build, output

import flashomni
from conftest import residue
from flashomni.engine import Recipe
from flashomni.models import adapters
from flashomni.policies import make_policy
from memory_features import CHANGED, MOVED, STREAMED, watch_moves

pytestmark = pytest.mark.usefixtures("no_grad")

CPU, STEPS = torch.device("cpu"), 5
PAGE = Path(__file__).resolve().parents[2] / "docs" / "memory.md"
MODELS = {
    "A": ["PixArtTransformer2DModel"],
    "B": ["AuraFlowTransformer2DModel"],
    "C": ["FluxTransformer2DModel", "WanTransformer3DModel"],
}
FORA = Recipe.of("fora", interval=2, warmup=0.0, level="layers")
TILES = Recipe.of(
    make_policy("topk", q_density=0.5, kv_density=0.6),
    interval=2, warmup=0.0, order=1, block_m=16, block_n=16,
)  # fmt: skip
BY_MODULE = ("group offloading, a leaf at a time", "sequential offloading")
MIXED = (0, 3)  # the first block of a group of two, and the second of another


def cases():
    """Each claim of the page: what is done, tier, and model."""
    rows = [line for line in PAGE.read_text("utf-8").splitlines() if line.startswith("| ")]
    start = next(i for i, line in enumerate(rows) if line.startswith("| what is done | A |"))
    found = {}
    for line in rows[start + 1 :]:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        if name not in {**MOVED, **STREAMED, **CHANGED}:
            break
        found[name] = cells
    return found


CLAIMS = cases()


def tiny(name):
    """A model, and a call of few tokens."""
    if name not in adapters():
        return build(name)
    torch.manual_seed(0)
    model, inputs = adapters()[name].tiny()
    if name.startswith("Flux"):
        vision, text = 35, 9
        inputs["hidden_states"] = inputs["hidden_states"][:, :vision]
        inputs["img_ids"] = inputs["img_ids"][:vision]
        inputs["encoder_hidden_states"] = inputs["encoder_hidden_states"][:, :text]
        inputs["txt_ids"] = inputs["txt_ids"][:text]
    else:
        inputs["hidden_states"] = inputs["hidden_states"][:, :, :2]
    return model.eval(), inputs


def generate(engine, model, inputs, latents):
    """Outputs of a run whose latents drift."""
    found, x = [], inputs[latents]
    for step in range(STEPS):
        engine.step(step, STEPS)
        found.append(output(model, {**inputs, latents: x}))
        x = 0.95 * x
    return torch.stack(found)


def runs(model, inputs, cache_whole, put=None):
    """What three recipes make of a model, on which ``put`` may put something in between."""
    latents, found = "hidden_states", []
    for recipe in ("lossless", FORA, TILES):
        cache_whole(MIXED if recipe is TILES else range(99))
        with flashomni.accelerate(model, recipe) as engine:
            if put is not None:
                put, _ = None, put(model, CPU)
            found.append(generate(engine, model, inputs, latents))
            report = engine.report()
            kinds = {kind for step in report.steps for kind in step["layer_kinds"]}
        assert recipe == "lossless" or "bypass" in kinds
    return found, projections(report)


def projections(report):
    """Whether projections are left out, in the word of the page: layers where not are named."""
    named = {note.partition(":")[0] for note in report.notes}
    return "whole" if named & set(report.layers) else "sparse"


def test_the_page_has_every_feature():
    """And no others."""
    assert set(CLAIMS) == {*MOVED, *STREAMED, *CHANGED}


@pytest.mark.parametrize("tier", MODELS)
@pytest.mark.parametrize("feature", MOVED)
def test_weights_that_are_elsewhere(feature, tier, cache_whole):
    """The same bits as without, in either order of the calls; tiles of leaves within rounding."""
    assert CLAIMS[feature]["ABC".index(tier)] == "either order"
    # Wan's blocks have weights of their own, beside those of their modules.
    models = MODELS[tier] if feature in BY_MODULE else MODELS[tier][:1]
    for name in models:
        model, inputs = tiny(name)
        (plain, _), stock = runs(model, inputs, cache_whole), output(model, inputs)
        before, after = copy.deepcopy(model), model
        MOVED[feature](before, CPU)
        assert torch.equal(output(before, inputs), stock)
        for made, word in (
            runs(before, inputs, cache_whole),
            runs(after, inputs, cache_whole, MOVED[feature]),
        ):
            if name.startswith("Flux"):
                assert word == CLAIMS[feature][3]
            assert torch.equal(made[0], plain[0]) and torch.equal(made[1], plain[1])
            torch.testing.assert_close(made[2], plain[2], atol=1e-5, rtol=1e-5)
        for each in (before, after):
            assert torch.equal(output(each, inputs), stock)


@pytest.mark.parametrize("tier", MODELS)
@pytest.mark.parametrize("feature", CHANGED)
def test_weights_that_are_others(feature, tier, cache_whole):
    """Constant inputs, so that what is cached is exact: each step is the changed model's own."""
    assert CLAIMS[feature]["ABC".index(tier)] == "either order"
    model, inputs = tiny(MODELS[tier][0])
    # What rounds its inputs to int8 rounds some of them the other way.
    rounds = "inputs" in feature
    tolerance = {"atol": 0.02, "rtol": 0.02} if rounds else {"atol": 2e-5, "rtol": 1e-4}
    recipes = {"lossless": 99, FORA: 99, TILES.replace(kv_density=1.0): MIXED}
    for before in (True, False):
        changed = copy.deepcopy(model)
        if before:
            CHANGED[feature](changed, CPU)
        for recipe, whole in recipes.items():
            cache_whole(MIXED if whole == MIXED else range(99))
            with flashomni.accelerate(changed, recipe) as engine:
                if not before and recipe == "lossless":
                    CHANGED[feature](changed, CPU)
                found = []
                for step in range(STEPS):
                    engine.step(step, STEPS + 1)
                    found.append(output(changed, inputs))
                report = engine.report()
            stock = output(changed, inputs)
            for each in found:
                torch.testing.assert_close(each, stock, **tolerance)
        assert not torch.equal(stock, output(model, inputs))
        assert tier != "C" or projections(report) == CLAIMS[feature][3]


@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("tier", MODELS)
def test_blocks_that_are_not_computed_bring_no_weights(tier, first, monkeypatch):
    """What takes the time on a small card is not done: only what is around the blocks comes."""
    model, inputs = tiny(MODELS[tier][0])
    put = MOVED["group offloading, a block at a time"]
    if first:
        put(model, CPU)
    with flashomni.accelerate(model, FORA.replace(interval=4)) as engine:
        if not first:
            put(model, CPU)
        found, counts = watch_moves(monkeypatch), []
        for step in range(4):
            engine.step(step, 9)
            output(model, inputs)
            counts.append(found.count("onload_"))
            found.clear()
    assert counts[0] > 3 and counts[2:] == [1, 1], counts


def test_nothing_stays_where_it_was_brought(cache_whole):
    """Groups of two whose last block is cached whole are taken away too."""
    model, inputs = tiny("FluxTransformer2DModel")
    MOVED["group offloading, several blocks"](model, CPU)
    cache_whole({1, 2, 3})
    with flashomni.accelerate(model, TILES) as engine:
        generate(engine, model, inputs, "hidden_states")
    lists = [m for m in model.children() if isinstance(m, torch.nn.ModuleList)]
    weights = [p for blocks in lists for p in blocks.parameters()]
    assert all(p.isnan().all() for p in weights if p.numel())


@pytest.mark.parametrize("name", ["FluxTransformer2DModel", "WanTransformer3DModel"])
def test_the_modulated_input_has_its_weights(name):
    """TeaCache looks at a block's first norm in front of the hooks of the block."""
    model, inputs = tiny(name)
    recipe = Recipe.of("teacache", threshold=0.5)

    def made(model):
        with flashomni.accelerate(model, recipe) as engine:
            return generate(engine, model, inputs, "hidden_states")

    expected = made(model)
    for feature in ("group offloading, a block at a time", "sequential offloading"):
        other = copy.deepcopy(model)
        MOVED[feature](other, CPU)
        assert torch.equal(made(other), expected), feature


def test_what_blocks_return_besides_has_its_weights():
    """VACE's hints are made in every step, also of blocks that are cached whole."""
    model, inputs = adapters()["WanVACETransformer3DModel"].tiny()
    model = model.eval()
    with flashomni.accelerate(model, FORA) as engine:
        expected = generate(engine, model, inputs, "hidden_states")
    MOVED["group offloading, a block at a time"](model, CPU)
    with flashomni.accelerate(model, FORA) as engine:
        assert torch.equal(generate(engine, model, inputs, "hidden_states"), expected)


@pytest.mark.parametrize("feature", MOVED)
def test_removal_leaves_the_offloading(feature):
    """The hooks stay, ours go: also the forward behind them."""
    model, inputs = tiny("FluxTransformer2DModel")
    MOVED[feature](model, CPU)
    clean, stock = residue(model), output(model, inputs)
    engine = flashomni.accelerate(model, FORA)
    generate(engine, model, inputs, "hidden_states")
    engine.remove()
    assert residue(model) == clean
    assert torch.equal(output(model, inputs), stock)
    assert "flashomni" not in repr([module.__dict__ for module in model.modules()])


@pytest.mark.parametrize("when", ["before", "after", "between"])
@pytest.mark.parametrize("feature", ["sequential offloading", "group offloading, a leaf at a time"])
def test_a_pipeline_whose_transformer_is_offloaded(feature, when):
    """Two generations: put on before ``accelerate``, after it, or between them."""
    from flashomni.lab import zoo

    def picture(loaded):
        seed = torch.Generator().manual_seed(0)
        size = {"height": 64, "width": 64, "num_inference_steps": 6}
        call = {**loaded.call, **size, "output_type": "latent"}
        return loaded.pipe("a red circle", generator=seed, **call)[0]

    def make():
        torch.manual_seed(0)
        loaded = zoo.random_pipeline("tiny-image", heads=2, head_dim=16, dual=1, single=2)
        loaded.pipe.set_progress_bar_config(disable=True)
        return loaded

    with flashomni.accelerate((plain := make()).pipe, FORA):
        expected = picture(plain)
    loaded = make()
    places = {"before": 0, "after": 1, "between": 2}

    def put(place):
        if places[when] == place:
            MOVED[feature](loaded.pipe.transformer, CPU)

    put(0)
    with flashomni.accelerate(loaded.pipe, FORA) as engine:
        put(1)
        made = [picture(loaded)]
        put(2)
        made.append(picture(loaded))
        assert any("bypass" in step["layer_kinds"] for step in engine.report().steps)
    for each in made:
        torch.testing.assert_close(each, expected, atol=1e-5, rtol=1e-5)


def leaves_in_its_first_call(model):
    """As the hook of a stream that fetches ahead does, in front of the one that brings weights."""
    from diffusers.hooks import HookRegistry, ModelHook

    class Leaves(ModelHook):
        def post_forward(self, module, output):
            module._diffusers_hook.remove_hook("leaves", recurse=False)
            return output

    HookRegistry.check_if_exists_or_initialize(model).register_hook(Leaves(), "leaves")


@pytest.mark.parametrize("warmup", [0.0, 0.4])  # the step behind the hook's: a Dispatch, an Update
@pytest.mark.parametrize("when", ["before", "after", "between"])
def test_the_output_is_kept_whatever_hooks_come_and_go(when, warmup):
    """No step is missed that stores it: what is forecast is never older than the plan has it."""
    model, inputs = tiny("FluxTransformer2DModel")
    recipe = Recipe.of("fora", interval=2, warmup=warmup, level="output")

    def made(put):
        def offload(place):
            if put == place:
                MOVED["group offloading, a block at a time"](each, CPU)
                leaves_in_its_first_call(each)

        each = copy.deepcopy(model)
        offload("before")
        with flashomni.accelerate(each, recipe) as engine:
            offload("after")
            found = [generate(engine, each, inputs, "hidden_states")]
            offload("between")
            found.append(generate(engine, each, inputs, "hidden_states"))
            kinds = [step["kind"] for step in engine.report().steps]
        return torch.stack(found), kinds

    (found, kinds), (expected, planned) = made(when), made(None)
    assert torch.equal(found, expected)
    assert kinds == planned and "dispatch" in kinds


def test_what_ran_without_the_engine_has_stored_nothing():
    """A forward of others in its place for one call: the next step computes, and stores."""
    model, inputs = tiny("FluxTransformer2DModel")
    with flashomni.accelerate(model, Recipe.of("fora", interval=2, level="output")) as engine:
        ours = model.__dict__["forward"]
        for step in range(5):
            model.forward = type(model).forward.__get__(model) if step == 2 else ours
            engine.step(step, 6)
            output(model, inputs)
        kinds = [step["kind"] for step in engine.report().steps]
    assert kinds == ["update", "dispatch", "update", "update", "full"]  # a dispatch was planned
