"""Tier A and B: transformer classes without an adapter, each on a small random instance.

Constant inputs make every cached quantity exact, so whatever is cached, each step must equal the
stock model (see test_constant). With drifting inputs whole-layer caching must equal a definition
that is written out here, block by block, without the engine.
"""

import itertools
import random

import pytest
import torch
from tiny_models import TINY, build, fill_gates, output

import flashomni
from conftest import ADAPTERS, residue
from flashomni.engine import Recipe
from flashomni.models import Blocks, adapters
from flashomni.policies import make_policy
from flashomni.policies.flashomni import FlashOmni

pytestmark = pytest.mark.usefixtures("no_grad")

STEPS = 8
CLOSE = {"atol": 2e-5, "rtol": 1e-4}
TILES = make_policy("topk", q_density=0.5, kv_density=1.0)  # rows left are exact
FORA = Recipe.of(
    "fora", interval=3, warmup=0.3, level="layers"
)  # learns at step 0, Updates at 2 and 5
CLASSES = sorted(set(TINY) - set(ADAPTERS))
# Lists that are refused, and a word of the reason. (What VACE's side blocks return is no stream.)
REFUSED = {"WanVACETransformer3DModel": {"vace_blocks": "could carry on"}}


def kinds_of(engine):
    return set(itertools.chain(*(step["layer_kinds"] for step in engine.report().steps)))


def check_constant(engine, model, inputs, stock, steps=STEPS):
    """Every step equals the stock model."""
    for step in range(steps):
        engine.step(step, steps + 1)  # none of them is the last, which is computed
        torch.testing.assert_close(output(model, inputs), stock, **CLOSE)


@pytest.mark.parametrize("name", CLASSES)
def test_every_class_is_exact_and_removed_without_a_trace(name):
    """lossless, whole layers, and the preset without further words; then the stock model again."""
    model, inputs = build(name)
    stock, clean = output(model, inputs), residue(model)
    for recipe in ("lossless", FORA, "balanced:min_steps=0"):
        with flashomni.accelerate(model, recipe) as engine:
            check_constant(engine, model, inputs, stock)
            kinds, report = kinds_of(engine), engine.report()
        assert "dispatch" in kinds or "bypass" in kinds, recipe
        assert ("bypass" in kinds) >= (recipe is FORA)
    assert report.tier in ("generic", "declared")
    assert torch.equal(output(model, inputs), stock)
    assert residue(model) == clean


@pytest.mark.parametrize("name", CLASSES)
def test_any_set_of_cached_layers_is_exact(name, cache_whole):
    """Whole layers and tiles mixed, in sets that no recipe would choose: skip connections show."""
    model, inputs = build(name)
    stock = output(model, inputs)
    settings = {"interval": 3, "warmup": 0.0, "block_m": 16, "block_n": 16, "degrade_below": 0.5}
    recipe = Recipe.of(TILES, **settings)
    drawn = random.Random(name)
    for layers in (set(), {0, 1}, set(drawn.sample(range(6), 3))):
        cache_whole(layers)
        with flashomni.accelerate(model, recipe) as engine:
            check_constant(engine, model, inputs, stock, steps=5)


@pytest.mark.parametrize("name", ["SkyReelsV2Transformer3DModel", "SD3Transformer2DModel"])
def test_the_contract_sees_one_wrong_value(name):
    """The guard of the tests above: a cached value off by 1e-3, and they fail."""
    model, inputs = build(name)
    stock = output(model, inputs)
    with flashomni.accelerate(model, FORA) as engine:
        for step in range(3):
            engine.step(step, STEPS)
            output(model, inputs)
        (branch,) = engine._runtime.last.branches.values()
        for history in branch.groups[0].spans._current[0].histories:
            history.terms()[0][..., 0].add_(1e-3)
        engine.step(3, STEPS)
        assert not torch.allclose(output(model, inputs), stock, **CLOSE)


# A definition of whole-layer caching, by hand: the names of the arguments that each list's blocks
# carry on, in the order in which they return them.

X, C = "hidden_states", "encoder_hidden_states"
BY_HAND = {
    "AuraFlowTransformer2DModel": {
        "joint_transformer_blocks": (C, X), "single_transformer_blocks": X,
    },
    "ChromaTransformer2DModel": {"transformer_blocks": (C, X), "single_transformer_blocks": X},
    "CogVideoXTransformer3DModel": {"transformer_blocks": (X, C)},
    "CosmosTransformer3DModel": {"transformer_blocks": X},
    "DiTTransformer2DModel": {"transformer_blocks": X},
    "Flux2Transformer2DModel": {"transformer_blocks": (C, X), "single_transformer_blocks": X},
    "HunyuanDiT2DModel": {"blocks": X},
    "Kandinsky5Transformer3DModel": {
        "text_transformer_blocks": "x", "visual_transformer_blocks": "visual_embed",
    },
    "LTX2VideoTransformer3DModel": {"transformer_blocks": (X, "audio_hidden_states")},
    "LTXVideoTransformer3DModel": {"transformer_blocks": X},
    "LatteTransformer3DModel": {"transformer_blocks": X, "temporal_transformer_blocks": X},
    "PixArtTransformer2DModel": {"transformer_blocks": X},
    "SD3Transformer2DModel": {"transformer_blocks": (C, X)},
    "SanaTransformer2DModel": {"transformer_blocks": X},
    "SkyReelsV2Transformer3DModel": {"blocks": X},
    "ZImageTransformer2DModel": {"noise_refiner": "x", "context_refiner": "x", "layers": "x"},
}  # fmt: skip


class ByHand:
    """Stands in for the forward of one block: ``x + (what it added when it last ran)``."""

    def __init__(self, block, streams):
        self.forward, self.streams, self.added = block.forward, streams, None
        names = list(type(block).forward.__code__.co_varnames)[1:]
        self.place = {name: i for i, name in enumerate(names)}
        self.computes = True

    def __call__(self, *args, **kwargs):
        names = (self.streams,) if isinstance(self.streams, str) else self.streams
        before = [kwargs[n] if n in kwargs else args[self.place[n]] for n in names]
        if self.computes:
            out = self.forward(*args, **kwargs)
            after = (out,) if isinstance(self.streams, str) else out
            self.added = [None if a is None else a - b for a, b in zip(after, before, strict=True)]
            return out
        after = tuple(None if d is None else b + d for b, d in zip(before, self.added, strict=True))
        return after[0] if isinstance(self.streams, str) else after


def drift(inputs, step):
    """Inputs of a step, deterministic and other than those of the step before."""
    moved = {}
    for key, value in inputs.items():
        is_latent = key in (X, "x", "audio_hidden_states")
        parts = value if isinstance(value, list) else [value]
        if is_latent:
            angle = torch.tensor(0.3 * step)
            parts = [part * angle.cos() + part.flip(-1) * angle.sin() for part in parts]
            moved[key] = parts if isinstance(value, list) else parts[0]
        else:
            moved[key] = value
    return moved


@pytest.mark.parametrize("name", sorted(BY_HAND))
def test_whole_layer_caching_equals_its_definition(name):
    """Drifting inputs: FORA's reuse of what each block added, as written out above."""
    model, inputs = build(name)
    hands = []
    for path, streams in BY_HAND[name].items():
        for block in model.get_submodule(path):
            block.forward = ByHand(block, streams)
            hands.append(block)
    expected = []
    for step in range(STEPS):
        for block in hands:
            block.forward.computes = step in (0, 1, 2, 5, STEPS - 1)
        expected.append(output(model, drift(inputs, step)))
    for block in hands:
        del block.forward
    with flashomni.accelerate(model, FORA) as engine:
        for step in range(STEPS):
            engine.step(step, STEPS)
            torch.testing.assert_close(output(model, drift(inputs, step)), expected[step], **CLOSE)
        assert [step["kind"] for step in engine.report().steps][3:5] == ["dispatch"] * 2
    assert not torch.allclose(expected[3], output(model, drift(inputs, 3)), atol=1e-3)


@pytest.mark.parametrize("name", CLASSES)
def test_what_is_not_cached_is_named(name):
    """A list is cached, or the report and the log say which block of it is in the way."""
    model, inputs = build(name)
    with flashomni.accelerate(model, "lossless") as engine:
        engine.step(0, 2)
        output(model, inputs)
        notes = engine.report().notes
    refused = {note.partition(":")[0]: note for note in notes if "in every step" in note}
    assert refused.keys() == REFUSED.get(name, {}).keys()
    for path, word in REFUSED.get(name, {}).items():
        assert word in refused[path]
    assert any("attention" in note for note in notes)  # whose it was


@pytest.mark.parametrize("name", [name for name in ADAPTERS if name not in REFUSED])
def test_the_tiers_agree(name):
    """A class that has an adapter, with it and without: the same pictures from cached layers.

    Where both cache the same layers, that is.
    """
    model, inputs = adapters()[name].tiny()
    model.eval()
    fill_gates(model)
    pictures = []
    for blocks in (None, Blocks()):
        with flashomni.accelerate(model, FORA, blocks=blocks) as engine:
            steps = []
            for step in range(STEPS):
                engine.step(step, STEPS)
                steps.append(output(model, drift(inputs, step)))
            assert engine.report().tier == ("adapter" if blocks is None else "declared")
            assert "bypass" in kinds_of(engine)
        pictures.append(torch.stack(steps))
    torch.testing.assert_close(*pictures, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "left_out"),
    [
        ("Kandinsky5Transformer3DModel", {"text_transformer_blocks"}),
        ("Lumina2Transformer2DModel", {"noise_refiner", "context_refiner"}),
        ("SD3Transformer2DModel", set()),
    ],
)
@pytest.mark.parametrize("schedule", ["first_block", "easycache"])
def test_schedules_that_look_at_the_model(name, left_out, schedule):
    """The first block is one that sees the picture, not a refiner of the text."""
    model, inputs = build(name)
    stock = output(model, inputs)
    with flashomni.accelerate(model, Recipe.of("fora", schedule=schedule)) as engine:
        check_constant(engine, model, inputs, stock, steps=12)
        report = engine.report()
    assert "bypass" in set(itertools.chain(*(step["layer_kinds"] for step in report.steps)))
    named = {note.partition(":")[0] for note in report.notes if "looks at the first block" in note}
    assert named == (left_out if schedule == "first_block" else set())


def test_a_declaration_places_the_text():
    """Tier B: text blocks of a class that is in the table are never cached."""
    model, inputs = build("MochiTransformer3DModel")
    with flashomni.accelerate(model, Recipe.of(TILES, interval=3, warmup=0.0)) as engine:
        for step in range(2):
            engine.step(step, 4)
            output(model, inputs)
        (branch,) = engine._runtime.last.branches.values()
        grids = [layer.symbols.grid for layer in branch.layers if layer.symbols is not None]
        assert engine.report().tier == "declared"
    assert {grid.text_spans for grid in grids} == {((30, 39),)}


def test_skip_connections_are_seen_without_a_declaration(cache_whole):
    """Hunyuan-DiT hands outputs to blocks far behind: watching shows it, table or not."""
    model, inputs = build("HunyuanDiT2DModel")
    stock = output(model, inputs)
    for layers in ({0, 1, 2}, {1, 2}, {3, 4}, set(range(6))):
        cache_whole(layers)
        recipe = Recipe.of(TILES, interval=3, warmup=0.0, degrade_below=0.5)
        with flashomni.accelerate(model, recipe, blocks=Blocks(lists=["blocks"])) as engine:
            check_constant(engine, model, inputs, stock, steps=5)
            assert "bypass" in kinds_of(engine)


def test_the_policy_sees_cross_attention(monkeypatch):
    """Text that is not in the sequence: blocks behind a cross-attention are guided by its map."""
    model, inputs = build("SkyReelsV2Transformer3DModel")
    sites = []
    choose = FlashOmni.__call__
    monkeypatch.setattr(
        FlashOmni, "__call__", lambda self, site: sites.append(site) or choose(self, site)
    )
    recipe = Recipe.of("flashomni", interval=3, warmup=0.0, block_m=16, block_n=16)
    with flashomni.accelerate(model, recipe) as engine:
        for step in range(2):
            engine.step(step, 5)
            output(model, inputs)
    first, *others = (site.guide for site in sites)
    assert first is None and len(others) == 2
    block = model.blocks[0]
    for guide in others:
        assert guide.shape == (2, 2, 2, 7)
        torch.testing.assert_close(guide.sum(-1), torch.ones(2, 2, 2))
    seen = []
    handle = block.attn2.register_forward_pre_hook(lambda module, args: seen.extend(args))
    output(model, inputs)
    handle.remove()
    attn, heads = block.attn2, (2, -1)
    q = attn.norm_q(attn.to_q(seen[0])).unflatten(-1, heads).transpose(1, 2)
    k = attn.norm_k(attn.to_k(seen[1])).unflatten(-1, heads).transpose(1, 2)
    means = torch.stack([q[:, :, :16].mean(2), q[:, :, 16:].mean(2)], dim=2)
    torch.testing.assert_close(others[0], (means @ k.mT * 12**-0.5).softmax(-1))


def moved(value, device, dtype):
    """Inputs on a device, floats lowered except positions and times."""
    if isinstance(value, torch.Tensor):
        return value.to(device, dtype if value.dtype == torch.float32 and value.ndim > 2 else None)
    if isinstance(value, dict):
        return {key: moved(part, device, dtype) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(moved(part, device, dtype) for part in value)
    return value


@pytest.mark.gpu
@pytest.mark.parametrize("name", CLASSES)
def test_every_class_on_the_card_in_bfloat16(name):
    """lossless on our kernels is as near fp32 as stock is; FORA on constant inputs is lossless."""
    model, inputs = build(name)
    exact = output(model, inputs)
    low = model.to("cuda", torch.bfloat16)
    given = moved(inputs, "cuda", torch.bfloat16)
    try:
        stock = output(low, given)
    except RuntimeError as mixed:
        pytest.skip(f"stock does not run in bfloat16: {mixed}")
    limit = 2 * (stock.float().cpu() - exact).abs().max() + 1e-2
    for recipe in ("lossless", FORA):
        with flashomni.accelerate(low, recipe) as engine:
            for step in range(STEPS):
                engine.step(step, STEPS + 1)
                error = (output(low, given).float().cpu() - exact).abs().max()
                assert error <= limit, (recipe, step)
    assert torch.equal(output(low, given), stock)
