"""Wan: timesteps of single tokens, images beside the text, and two transformers in one pipeline."""

from types import SimpleNamespace

import pytest
import torch
from tiny_models import fill_gates
from torch import nn

import flashomni
from conftest import ONES, SPARSE, call, generation, residue
from flashomni.engine import Engine, Experts, Recipe
from flashomni.models import Blocks, adapters, engine_of
from flashomni.policies.flashomni import FlashOmni

pytestmark = pytest.mark.usefixtures("no_grad")

CLOSE = {"atol": 2e-5, "rtol": 1e-4}
TILES = Recipe.of("topk:q_density=.5,kv_density=1,interval=3,warmup=0,block_m=32,block_n=32")
WAN = "WanTransformer3DModel"


def token_timesteps():
    """Wan 2.2 TI2V: the first frame is given, so its tokens have timestep 0."""
    model, inputs = adapters()[WAN].tiny()
    timestep = torch.full((2, 5, 63), 500.0)
    timestep[:, 0] = 0.0
    return model, {**inputs, "timestep": timestep.flatten(1)}


def image_tokens():
    """Wan 2.1 I2V: tokens of an image in front of 512 of the text, with keys of their own."""
    from diffusers import WanTransformer3DModel

    config = {**adapters()[WAN].sizes["tiny"], "image_dim": 20, "added_kv_proj_dim": 48}
    _, inputs = adapters()[WAN].tiny()
    return WanTransformer3DModel(**config), {
        **inputs,
        "encoder_hidden_states": torch.randn(2, 512, 24),
        "encoder_hidden_states_image": torch.randn(2, 11, 20),
    }


def plain_cross_attention():
    """Without the norm in front of the cross-attention."""
    from diffusers import WanTransformer3DModel

    config = {**adapters()[WAN].sizes["tiny"], "cross_attn_norm": False}
    return WanTransformer3DModel(**config), adapters()[WAN].tiny()[1]


@pytest.fixture(params=[token_timesteps, image_tokens, plain_cross_attention])
def variant(request):
    torch.manual_seed(0)
    model, inputs = request.param()
    fill_gates(model)
    return model.eval(), dict(inputs)


@pytest.mark.parametrize(
    "recipe", [ONES, TILES, "fora:warmup=0,level=layers"], ids=["ones", "tiles", "fora"]
)
def test_every_variant_is_exact(variant, recipe):
    """Constant inputs: each step equals stock, whatever is cached; so does the model afterwards."""
    model, inputs = variant
    stock = call(model, inputs)
    with flashomni.accelerate(model, recipe) as engine:
        for step in range(7):
            engine.step(step, 9)
            torch.testing.assert_close(call(model, inputs), stock, **CLOSE)
        report = engine.report()
    assert report.tier == "adapter" and "dispatch" in {step["kind"] for step in report.steps}
    assert torch.equal(call(model, inputs), stock)


def test_every_variant_in_bfloat16(variant):
    """Error against fp32 at most twice that of the stock model in bf16."""
    model, inputs = variant
    exact = call(model, inputs)
    low = {key: value.bfloat16() for key, value in inputs.items()}
    model = model.bfloat16()
    limit = 2 * (call(model, low).float() - exact).abs().max()
    with flashomni.accelerate(model, ONES) as engine:
        for step in range(4):
            engine.step(step, 6)
            assert (call(model, low).float() - exact).abs().max() <= limit


def test_the_policy_sees_what_the_generic_tier_shows(variant, monkeypatch):
    """The same queries, keys and maps of cross-attention, in each block."""
    model, inputs = variant
    sites, choose = [], FlashOmni.__call__
    monkeypatch.setattr(
        FlashOmni, "__call__", lambda self, site: sites.append(site) or choose(self, site)
    )
    recipe = Recipe.of("flashomni", interval=3, warmup=0.0, block_m=32, block_n=32)
    for blocks in (None, Blocks()):
        with flashomni.accelerate(model, recipe, blocks=blocks) as engine:
            engine.step(0, 5)
            call(model, inputs)
            if blocks is not None:  # the first call is watched only
                engine.step(1, 5)
                call(model, inputs)
    own, learned = sites[:3], sites[-3:]
    assert own[0].guide is None and all(site.guide is not None for site in own[1:])
    for one, other in zip(own, learned, strict=True):
        torch.testing.assert_close(one.q, other.q, **CLOSE)
        torch.testing.assert_close(one.k, other.k, **CLOSE)
        if one.guide is not None:
            torch.testing.assert_close(one.guide, other.guide, **CLOSE)


def test_fused_projections_are_refused():
    """Their weights are copies, which nothing would read; undone, the model is accelerated."""
    model, inputs = adapters()[WAN].tiny()
    model.eval()
    model.fuse_qkv_projections()
    with pytest.raises(NotImplementedError, match=r"blocks\.0\.attn1 has fused projections"):
        flashomni.accelerate(model)
    model.unfuse_qkv_projections()
    stock = call(model, inputs)
    with flashomni.accelerate(model, "lossless") as engine:
        engine.step(0, 2)
        torch.testing.assert_close(call(model, inputs), stock, **CLOSE)


@pytest.fixture
def two_experts():
    """A14B in small: the second transformer takes over at the boundary; and a generation of it."""
    from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline

    torch.manual_seed(0)
    config = {**adapters()[WAN].sizes["tiny"], "in_channels": 16, "out_channels": 16}
    experts = [adapters()[WAN].build("tiny").from_config(config).eval() for _ in range(2)]
    pipe = WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=AutoencoderKLWan(base_dim=3, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=experts[0],
        transformer_2=experts[1],
        boundary_ratio=0.8,
    )
    pipe.set_progress_bar_config(disable=True)
    prompt, negative = torch.randn(2, 1, 9, 24)

    def generate(steps=12, seed=0):
        call = {"height": 64, "width": 48, "num_frames": 9, "num_inference_steps": steps}
        generator = torch.Generator().manual_seed(seed)
        return pipe(
            prompt_embeds=prompt, negative_prompt_embeds=negative, guidance_scale=4.0,
            output_type="latent", generator=generator, **call,
        ).frames  # fmt: skip

    return pipe, generate


def kinds_of(report, name):
    return "".join(s["kind"][0] for s in report.steps if s["transformer"] == name)


def test_two_transformers_are_one_engine(two_experts):
    """Lossless is stock; the report has all steps of the pipeline once; remove() is for both."""
    pipe, generate = two_experts
    clean, stock = [residue(part) for part in (pipe.transformer, pipe.transformer_2)], generate()
    engine = flashomni.accelerate(pipe, "lossless")
    assert all(engine_of(each) is engine for each in (pipe, pipe.transformer, pipe.transformer_2))
    with pytest.raises(ValueError, match="accelerated already"):
        flashomni.accelerate(pipe.transformer_2)
    for _ in range(2):
        torch.testing.assert_close(generate(), stock, **CLOSE)
        report = engine.report()
        taken = [(step["step"], step["branch"]) for step in report.steps]
        assert taken == [(step, name) for step in range(12) for name in ("cond", "uncond")]
        names = [step["transformer"] for step in report.steps]
        assert names == sorted(names) and len(set(names)) == 2
    assert sum(kind["count"] for kind in report.seconds_by_kind.values()) == 24
    assert report.generation == 2 and not any("took part" in note for note in report.notes)
    pipe.register_to_config(boundary_ratio=0.0)  # no step is the second one's
    generate()
    report = engine.report()
    assert report.generation == 3
    assert any(note.endswith("each: transformer 3, transformer_2 2") for note in report.notes)
    pipe.register_to_config(boundary_ratio=0.8)
    engine.remove()
    assert not engine.attached and engine_of(pipe) is None
    assert clean == [residue(part) for part in (pipe.transformer, pipe.transformer_2)]
    assert torch.equal(generate(), stock)


def test_whatever_an_engine_is_asked_both_answer():
    """Nothing is left to the base class, which has one runtime."""
    asked = {name for name in vars(Engine) if not name.startswith("_")}
    assert asked <= set(vars(Experts))
    engines = {name: SimpleNamespace(finished=name == "a") for name in "ab"}
    assert not Experts(engines).finished and Experts({"a": engines["a"]}).finished
    with pytest.raises(NotImplementedError, match=r"engines\['a'\]\.save_symbols"):
        Experts(engines).save_symbols("both.safetensors")


def parts_of(pipe):
    """The transformers, and how many of the pipeline's steps each of them runs."""
    above = int((pipe.scheduler.timesteps >= 800).sum())
    return {"transformer": above, "transformer_2": len(pipe.scheduler.timesteps) - above}


@pytest.mark.parametrize("steps", [12, 9])
def test_each_transformer_follows_its_own_steps(two_experts, steps):
    """The plan of each is that of a generation as long as its own part, both branches alike."""
    pipe, generate = two_experts
    recipe = Recipe.of("fora", interval=2, warmup=0.0, level="layers")
    with flashomni.accelerate(pipe, recipe) as engine:
        cached = generate(steps)
        report = engine.report()
        held = [e._runtime.last.nbytes() for e in engine.engines.values()]
        assert torch.equal(generate(steps), cached)
    for name, count in parts_of(pipe).items():
        planned = "".join(2 * kind.value[0] for kind in recipe.plan(count).kinds)
        assert kinds_of(report, name) == planned and "d" in planned
    assert held == [(0, 0), (0, 0)] and report.cache_bytes > 0
    assert "never at the same time: transformer " in report.notes[0]


class Whole(nn.Module):
    """All blocks as one; where nothing is computed, it adds what it added last in that branch."""

    def __init__(self, blocks, computes):
        super().__init__()
        self.blocks, self.computes = blocks, [each for each in computes for _ in range(2)]
        self.kept = [None, None]

    def forward(self, x, *rest):
        branch = len(self.computes) % 2
        if not self.computes.pop(0):
            return x + self.kept[branch]
        out = x
        for block in self.blocks:
            out = block(out, *rest)
        self.kept[branch] = out - x
        return out


def test_whole_layer_caching_of_both_is_the_hand_written_one(two_experts):
    """Order 0, end to end, cond and uncond apart."""
    pipe, generate = two_experts
    recipe = Recipe.of("fora", interval=2, warmup=0.0, level="layers")
    with flashomni.accelerate(pipe, recipe):
        cached = generate()
    for name, count in parts_of(pipe).items():
        part = getattr(pipe, name)
        computes = [kind.value != "dispatch" for kind in recipe.plan(count).kinds]
        part.blocks = nn.ModuleList([Whole(part.blocks, computes)])
    torch.testing.assert_close(cached, generate(), **CLOSE)


def test_recipes_for_each_transformer(two_experts):
    """By the names of the components; one that is not named stays stock, another is refused."""
    pipe, generate = two_experts
    stock = generate()
    recipes = {"transformer": "lossless", "transformer_2": "fora:interval=2,warmup=0"}
    with flashomni.accelerate(pipe, recipes) as engine:
        assert not torch.allclose(generate(), stock, atol=1e-4)
        report = engine.report()
    assert report.recipe["name"] == "lossless and fora:interval=2,warmup=0"
    assert report.recipe["transformer_2"]["name"].startswith("fora")
    assert "fora" in str(report)
    bypassed = [s["transformer"] for s in report.steps if "bypass" in s["layer_kinds"]]
    assert set(bypassed) == {"transformer_2"}
    with flashomni.accelerate(pipe, {"transformer_2": "lossless"}):
        assert engine_of(pipe.transformer) is None and engine_of(pipe) is not None
        torch.testing.assert_close(generate(), stock, **CLOSE)
    with pytest.raises(ValueError, match="by the names transformer, transformer_2, got 'vae'"):
        flashomni.accelerate(pipe, {"vae": "fora"})


def test_what_cannot_be_accelerated_leaves_nothing_on_the_other(two_experts):
    """The second transformer is refused: the first one is stock again."""
    pipe, _ = two_experts
    pipe.transformer_2.fuse_qkv_projections()
    clean = residue(pipe.transformer)
    with pytest.raises(NotImplementedError, match="fused projections"):
        flashomni.accelerate(pipe)
    assert residue(pipe.transformer) == clean and engine_of(pipe) is None


def test_announced_steps_are_for_whichever_is_called(two_experts):
    """A loop of one's own says the steps of each transformer, through the one engine."""
    pipe, _ = two_experts
    inputs = adapters()[WAN].tiny()[1]
    inputs["hidden_states"] = torch.randn(2, 16, 2, 10, 6)
    with flashomni.accelerate(pipe, "fora:interval=2,warmup=0") as engine:
        for part, steps in ((pipe.transformer, 6), (pipe.transformer_2, 4)):
            for step in range(steps):
                engine.step(step, steps)
                call(part, inputs)
        report = engine.report()
    assert len(kinds_of(report, "transformer")) == 6 and len(report.steps) == 10


def test_tiles_are_kept_apart_from_one_generation_to_the_next(variant):
    """Twice the same generation with sparse steps: the same bits."""
    model, inputs = variant
    with flashomni.accelerate(model, SPARSE) as engine:
        assert torch.equal(*(generation(engine, model, inputs) for _ in range(2)))
