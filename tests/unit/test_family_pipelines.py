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


def hunyuan_video15():
    import diffusers
    from diffusers.guiders import ClassifierFreeGuidance

    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8, 8), layers_per_block=1,
        spatial_compression_ratio=4, temporal_compression_ratio=2,
        downsample_match_channel=False, upsample_match_channel=False,
    )  # fmt: skip
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    model = transformer("HunyuanVideo15Transformer3DModel", in_channels=9, target_size=16)
    pipe = diffusers.HunyuanVideo15Pipeline(
        vae=vae.eval(), transformer=model, scheduler=scheduler(),
        guider=ClassifierFreeGuidance(guidance_scale=3.0), **parts,
    )  # fmt: skip
    pipe.vision_num_semantic_tokens = 40
    return pipe


def hunyuan_image():
    import diffusers
    from diffusers.guiders import ClassifierFreeGuidance

    vae = diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32, 32),
        layers_per_block=1, spatial_compression_ratio=2, sample_size=64,
    )  # fmt: skip
    parts = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    model = transformer("HunyuanImageTransformer2DModel", text_embed_2_dim=20)
    guider = ClassifierFreeGuidance(guidance_scale=3.0)
    return diffusers.HunyuanImagePipeline(
        vae=vae.eval(), transformer=model, scheduler=scheduler(), guider=guider,
        ocr_guider=guider, **parts,
    )  # fmt: skip


def ltx():
    import diffusers

    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=4, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5, decoder_layers_per_block=(1,) * 5, patch_size=1,
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
    )  # fmt: skip
    parts = {"text_encoder": None, "tokenizer": None, "scheduler": scheduler()}
    model = transformer("LTXVideoTransformer3DModel")
    return diffusers.LTXPipeline(vae=vae.eval(), transformer=model, **parts)


def ltx2():
    import diffusers
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder

    vae = diffusers.AutoencoderKLLTX2Video(
        latent_channels=4, block_out_channels=(8,), decoder_block_out_channels=(8,),
        layers_per_block=(1,), decoder_layers_per_block=(1, 1), spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,), decoder_inject_noise=(False, False),
        downsample_type=("spatial",), upsample_residual=(False,), upsample_factor=(1,),
        patch_size=1,
    )  # fmt: skip
    audio = diffusers.AutoencoderKLLTX2Audio(
        base_channels=4, output_channels=2, ch_mult=(1,), num_res_blocks=1, in_channels=2,
        resolution=32, latent_channels=2, norm_type="pixel", causality_axis="height", mel_bins=8,
    )  # fmt: skip
    sizes = {"num_attention_heads": 3, "attention_head_dim": 8, "num_layers": 1}
    both = {f"{of}_connector_{key}": n for of in ("video", "audio") for key, n in sizes.items()}
    connectors = LTX2TextConnectors(
        caption_channels=24, text_proj_in_factor=1, connector_rope_base_seq_len=32,
        **both,
        video_connector_num_learnable_registers=None, audio_connector_num_learnable_registers=None,
    )  # fmt: skip
    vocoder = LTX2Vocoder(
        in_channels=16, hidden_channels=32, upsample_kernel_sizes=[4, 4], upsample_factors=[2, 2],
        resnet_kernel_sizes=[3], resnet_dilations=[[1, 3, 5]],
    )  # fmt: skip
    parts = {"text_encoder": None, "tokenizer": None, "scheduler": scheduler()}
    model = transformer("LTX2VideoTransformer3DModel")
    return diffusers.LTX2Pipeline(
        vae=vae.eval(), audio_vae=audio.eval(), connectors=connectors.eval(),
        transformer=model, vocoder=vocoder.eval(), **parts,
    )  # fmt: skip


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
MASK, GLYPHS = torch.ones(1, 13).long(), torch.randn(1, 6, 20)
MASKED = {
    "prompt_embeds": TEXT, "prompt_embeds_mask": MASK,
    "negative_prompt_embeds": -TEXT[:, :7], "negative_prompt_embeds_mask": MASK[:, :7],
    "prompt_embeds_2": GLYPHS, "prompt_embeds_mask_2": MASK[:, :6],
    "negative_prompt_embeds_2": -GLYPHS, "negative_prompt_embeds_mask_2": 0 * MASK[:, :6],
}  # fmt: skip
FILM = {
    "height": 64, "width": 32, "num_frames": 9, "prompt_embeds": TEXT,
    "prompt_attention_mask": MASK, "negative_prompt_embeds": -TEXT,
    "negative_prompt_attention_mask": MASK.flip(1),
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
    "hunyuanvideo-1.5": (hunyuan_video15, {**MASKED, "height": 40, "width": 28, "num_frames": 9}),
    "hunyuanimage": (hunyuan_image, {**MASKED, "height": 32, "width": 28}),
    "ltx": (ltx, FILM),
    "ltx-2": (
        ltx2,
        {**FILM, "height": 32, "num_frames": 3, "spatio_temporal_guidance_blocks": [1]},
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


SLOW = {"flux2 with a reference", "ltx-2"}


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=pytest.mark.slow) if n in SLOW else n for n in PIPELINES],
)
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
