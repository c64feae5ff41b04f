"""Wan: timesteps of single tokens, images beside the text, and two transformers in one pipeline."""

import logging

import pytest
import torch
from tiny_models import fill_gates

import flashomni
from conftest import ONES, SPARSE, call, generation
from flashomni.engine import Recipe
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


@pytest.mark.parametrize("recipe", [ONES, TILES, "fora:warmup=0"], ids=["ones", "tiles", "fora"])
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

    def generate():
        call = {"height": 64, "width": 48, "num_frames": 9, "num_inference_steps": 12}
        generator = torch.Generator().manual_seed(0)
        return pipe(
            prompt_embeds=prompt, negative_prompt_embeds=negative, guidance_scale=4.0,
            output_type="latent", generator=generator, **call,
        ).frames  # fmt: skip

    return pipe, generate


def test_each_of_two_transformers_is_accelerated_by_itself(two_experts, caplog):
    """Steps are those of the pipeline, branches those of guidance; together they are all steps."""
    pipe, generate = two_experts
    stock = generate()
    with caplog.at_level(logging.WARNING, "flashomni"):
        first = flashomni.accelerate(pipe, "lossless")
        assert "call accelerate(pipe.transformer_2, ...) too" in caplog.text
    second = flashomni.accelerate(pipe.transformer_2, "lossless")
    torch.testing.assert_close(generate(), stock, **CLOSE)
    taken = [[(s["step"], s["branch"]) for s in e.report().steps] for e in (first, second)]
    assert all(taken) and max(taken[0])[0] < min(taken[1])[0]
    whole = [(step, name) for step in range(12) for name in ("cond", "uncond")]
    assert [*taken[0], *taken[1]] == whole
    for engine in (first, second):
        engine.remove()
    assert torch.equal(generate(), stock)


def test_both_transformers_cache(two_experts):
    """Each starts with an Update of its own; the picture changes, and is finite."""
    pipe, generate = two_experts
    stock = generate()
    recipe = Recipe.of("fora", interval=2, warmup=0.0)
    engines = [flashomni.accelerate(each, recipe) for each in (pipe, pipe.transformer_2)]
    assert engine_of(pipe.transformer_2) is engines[1]
    cached = generate()
    for engine in engines:
        kinds = [step["kind"] for step in engine.report().steps]
        assert kinds[:2] == ["update", "update"] and "dispatch" in kinds
        engine.remove()
    assert cached.isfinite().all() and not torch.allclose(cached, stock, atol=1e-4)


def test_tiles_are_kept_apart_from_one_generation_to_the_next(variant):
    """Twice the same generation with sparse steps: the same bits."""
    model, inputs = variant
    with flashomni.accelerate(model, SPARSE) as engine:
        assert torch.equal(*(generation(engine, model, inputs) for _ in range(2)))
