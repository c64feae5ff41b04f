"""Whole pipelines of the newer models, as small as they get: guidance, reference images, steps.

Text encoders are left out: pipelines take embeddings. Latents are not decoded.
"""

import pytest
import torch

import flashomni
from flashomni.engine import Recipe
from flashomni.models import adapters

CLOSE = {"atol": 1e-4, "rtol": 1e-3}
SPARSE = Recipe.of("topk:q_density=.5,kv_density=.6,interval=3,warmup=.2,block_m=16,block_n=16")


def transformer(name, **changes):
    config = {**adapters()[name].sizes["tiny"], **changes}
    return adapters()[name].build("tiny").from_config(config).eval()


def scheduler():
    from diffusers import FlowMatchEulerDiscreteScheduler

    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def flux2(name, **changes):
    """FLUX.2 dev, klein, and klein that keeps the keys of reference images."""
    import diffusers

    vae = diffusers.AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",),
        block_out_channels=(4,), layers_per_block=1, latent_channels=4, norm_num_groups=1,
    )  # fmt: skip
    model = transformer("Flux2Transformer2DModel", **changes)
    parts = {"text_encoder": None, "tokenizer": None, "scheduler": scheduler()}
    return getattr(diffusers, name)(vae=vae.eval(), transformer=model, **parts)


def z_image():
    import diffusers

    vae = diffusers.AutoencoderKL(block_out_channels=(4,) * 2, norm_num_groups=1, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    )  # fmt: skip
    parts = {"text_encoder": None, "tokenizer": None, "scheduler": scheduler()}
    model = transformer("ZImageTransformer2DModel")
    return diffusers.ZImagePipeline(vae=vae.eval(), transformer=model, **parts)


def flux_like(name, model):
    """Relatives of FLUX.1: latents in patches of 2 by 2, four channels of the VAE."""
    import diffusers

    vae = diffusers.AutoencoderKL(block_out_channels=(4,), latent_channels=4, norm_num_groups=1)
    parts = {"text_encoder": None, "tokenizer": None, "scheduler": scheduler()}
    return getattr(diffusers, name)(vae=vae.eval(), transformer=transformer(model), **parts)


def image(width, height):
    from PIL import Image

    return Image.new("RGB", (width, height), (200, 90, 30))


TEXT = torch.randn(1, 13, 24, generator=torch.Generator().manual_seed(1))
PICTURE = {"height": 26, "width": 22, "prompt_embeds": TEXT}
GUIDED = {"negative_prompt_embeds": -TEXT, "guidance_scale": 4.0}
KLEIN = {"guidance_embeds": False}
# Prompts of two lengths; guidance doubles the batch.
LISTED = {
    "height": 68, "width": 52, "prompt_embeds": [TEXT[0], TEXT[0, :5]],
    "negative_prompt_embeds": [-TEXT[0, :2], TEXT[0].repeat(3, 1)],
}  # fmt: skip

PIPELINES = {
    "flux2": (lambda: flux2("Flux2Pipeline"), PICTURE),
    "flux2 with a reference": (lambda: flux2("Flux2Pipeline"), {**PICTURE, "image": image(64, 64)}),
    "flux2 klein": (lambda: flux2("Flux2KleinPipeline", **KLEIN), {**PICTURE, **GUIDED}),
    "ovis": (
        lambda: flux_like("OvisImagePipeline", "OvisImageTransformer2DModel"),
        {**PICTURE, **GUIDED, "negative_prompt": None},
    ),
    "bria": (
        lambda: flux_like("BriaPipeline", "BriaTransformer2DModel"),
        {**PICTURE, **GUIDED},
    ),
    "z-image": (z_image, {**LISTED, "guidance_scale": 5.0}),
    "z-image turbo": (z_image, {**LISTED, "guidance_scale": 0.0}),
}


def build(name):
    torch.manual_seed(0)
    make, call = PIPELINES[name]
    pipe = make()
    pipe.set_progress_bar_config(disable=True)

    def generate(seed=0):
        generator = torch.Generator().manual_seed(seed)
        options = {"num_inference_steps": 8, "output_type": "latent", "return_dict": False}
        return pipe(**call, **options, generator=generator)[0]

    return pipe, generate


@pytest.mark.parametrize("name", PIPELINES)
def test_a_whole_pipeline(name):
    """lossless is stock, a sparse recipe repeats its bits, and nothing is left behind."""
    pipe, generate = build(name)
    stock = generate()
    with flashomni.accelerate(pipe, "lossless") as engine:
        torch.testing.assert_close(generate(), stock, **CLOSE)
        report = engine.report()
    assert report.tier == "adapter" and [step["step"] for step in report.steps][-1] == 7
    with flashomni.accelerate(pipe, SPARSE) as engine:
        first = generate()
        generate(1)
        assert torch.equal(generate(), first)
        assert "dispatch" in {step["kind"] for step in engine.report().steps}
    assert first.isfinite().all() and not torch.allclose(first, stock, atol=1e-4)
    assert torch.equal(generate(), stock)


def test_guidance_in_calls_of_its_own():
    """Each of the two calls of a step is a branch."""
    pipe, generate = build("flux2 klein")
    with flashomni.accelerate(pipe, SPARSE) as engine:
        generate()
        taken = [(step["step"], step["branch"]) for step in engine.report().steps]
    assert taken == [(step, name) for step in range(8) for name in ("cond", "uncond")]


@pytest.mark.parametrize("given", [{}, {"image": image(64, 64)}], ids=["text", "reference"])
def test_keys_of_reference_images_are_kept_by_the_pipeline(given):
    """FLUX.2 klein KV has other attention: it goes without the adapter, and the report says so."""
    torch.manual_seed(0)
    pipe = flux2("Flux2KleinKVPipeline", **KLEIN)
    pipe.set_progress_bar_config(disable=True)

    def generate():
        generator = torch.Generator().manual_seed(0)
        options = {"num_inference_steps": 8, "output_type": "latent", "generator": generator}
        return pipe(**PICTURE, **given, **options).images

    stock = generate()
    with flashomni.accelerate(pipe, "lossless") as engine:
        torch.testing.assert_close(generate(), stock, **CLOSE)
        report = engine.report()
    assert report.tier == "declared"
    assert any("keeps keys of reference images" in note for note in report.notes)
    with flashomni.accelerate(pipe, "fora:interval=2,warmup=0"):
        assert generate().isfinite().all()
    assert torch.equal(generate(), stock)
