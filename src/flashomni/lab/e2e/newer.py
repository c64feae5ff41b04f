"""Real sizes of FLUX.2, Z-Image, Qwen-Image, HunyuanVideo-1.5 and LTX-2.

Configurations are those that their adapters have as published, schedulers and guidance those of
the published pipelines.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from flashomni.lab.e2e.size import Size
from flashomni.models import adapters

Config = Mapping[str, Any]
SEPARATE = ("qwen-image", "hunyuan15")  # guidance has a call of its own
MEL = 16  # latent bins of LTX-2's sound, times 8 channels


def _config(cls: str, name: str = "published", **more: Any) -> Config:
    return {**adapters()[cls].sizes[name], **more}


def _known() -> dict[str, Size]:
    flux2, z_image = "Flux2Transformer2DModel", "ZImageTransformer2DModel"
    qwen, hunyuan = "QwenImageTransformer2DModel", "HunyuanVideo15Transformer3DModel"
    ltx2, few = "LTX2VideoTransformer3DModel", {"num_layers": 2}
    sound = {"audio_in_channels": 8 * MEL, "audio_out_channels": 8 * MEL}
    return {
        "flux2-1024": Size("flux2", _config(flux2), 512, 512, 1024, 1024),
        "z-image-1024": Size("z-image", _config(z_image), 128, 128, 1024, 1024),
        "qwen-image-1328": Size("qwen-image", _config(qwen), 256, 256, 1328, 1328),
        "hunyuan15-720p": Size(
            "hunyuan15", _config(hunyuan, num_layers=6, task_type="t2v"), 256, 200, 720, 1280, 121,
            note="6 of the 54 blocks",
        ),
        "ltx2-768": Size(
            "ltx2", _config(ltx2), 256, 200, 512, 768, 121, patch=32, chunk=8, joint=False
        ),
        "tiny-flux2": Size("flux2", _config(flux2, "tiny"), 77, 77, 288, 304),
        "tiny-z-image": Size("z-image", _config(z_image, "tiny"), 64, 64, 288, 256),
        "tiny-qwen-image": Size("qwen-image", _config(qwen, "tiny"), 77, 77, 288, 304),
        "tiny-hunyuan15": Size(
            "hunyuan15", _config(hunyuan, "tiny", in_channels=65, out_channels=32, **few),
            75, 30, 144, 112, 17,
        ),
        "tiny-ltx2": Size(
            "ltx2", _config(ltx2, "tiny", use_prompt_embeddings=True, **sound), 75, 30, 288, 224,
            33, patch=32, chunk=8, joint=False,
        ),
    }  # fmt: skip


SIZES = _known()


def _parts(**more: Any) -> dict[str, Any]:
    return {"text_encoder": None, "tokenizer": None, "vae": None, **more}


def _place(size: Size) -> dict[str, Any]:
    place = {"height": size.height, "width": size.width, "output_type": "latent"}
    return {**place, "num_frames": size.frames} if size.frames > 1 else place


def _valid(size: Size) -> Tensor:
    """int64 ``[1, text]``."""
    return (torch.arange(size.text) < size.valid).long()[None]


def _flux2(size: Size) -> tuple[Any, dict[str, Any]]:
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2Pipeline, Flux2Transformer2DModel

    transformer = Flux2Transformer2DModel(**size.config)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    pipe = Flux2Pipeline(transformer=transformer, scheduler=scheduler, **_parts())
    text = torch.randn(1, size.text, transformer.config.joint_attention_dim)
    return pipe, {"prompt_embeds": text, "guidance_scale": 4.0, **_place(size)}


def _z_image(size: Size) -> tuple[Any, dict[str, Any]]:
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel

    transformer = ZImageTransformer2DModel(**size.config)
    pipe = ZImagePipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
        **_parts(),
    )
    text, negative = torch.randn(2, size.text, transformer.config.cap_feat_dim)
    return pipe, {
        "prompt_embeds": [text],
        "negative_prompt_embeds": [negative],  # both in one call
        "guidance_scale": 4.0,
        **_place(size),
    }


def _qwen_image(size: Size) -> tuple[Any, dict[str, Any]]:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02,
        use_dynamic_shifting=True,
    )  # fmt: skip
    transformer = QwenImageTransformer2DModel(**size.config)
    pipe = QwenImagePipeline(transformer=transformer, scheduler=scheduler, **_parts())
    text, negative = torch.randn(2, 1, size.text, transformer.config.joint_attention_dim)
    return pipe, {
        "prompt_embeds": text,
        "prompt_embeds_mask": _valid(size),
        "negative_prompt_embeds": negative,
        "negative_prompt_embeds_mask": _valid(size),
        "true_cfg_scale": 4.0,
        **_place(size),
    }


def _hunyuan15(size: Size) -> tuple[Any, dict[str, Any]]:
    from diffusers import (
        ClassifierFreeGuidance,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideo15Pipeline,
        HunyuanVideo15Transformer3DModel,
    )

    transformer = HunyuanVideo15Transformer3DModel(**size.config)
    vae = _Asked(
        temporal_compression_ratio=size.chunk,
        spatial_compression_ratio=size.patch,
        config=SimpleNamespace(latent_channels=transformer.config.out_channels),
    )
    pipe = HunyuanVideo15Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=9.0),
        guider=ClassifierFreeGuidance(guidance_scale=6.0),
        **_parts(vae=vae, text_encoder_2=None, tokenizer_2=None),
    )
    config, glyphs = transformer.config, (torch.arange(64) < 30).long()[None]
    call: dict[str, Any] = {}
    for sort in ("", "negative_"):
        call |= {
            f"{sort}prompt_embeds": torch.randn(1, size.text, config.text_embed_dim),
            f"{sort}prompt_embeds_mask": _valid(size),
            f"{sort}prompt_embeds_2": torch.randn(1, 64, config.text_embed_2_dim),
            f"{sort}prompt_embeds_mask_2": glyphs,
        }
    return pipe, {**call, **_place(size)}


def _ltx2(size: Size) -> tuple[Any, dict[str, Any]]:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        LTX2Pipeline,
        LTX2VideoTransformer3DModel,
    )

    transformer = LTX2VideoTransformer3DModel(**size.config)
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_shift=0.95, max_shift=2.05, base_image_seq_len=1024, max_image_seq_len=4096,
        shift_terminal=0.1, use_dynamic_shifting=True,
    )  # fmt: skip
    pipe = LTX2Pipeline(
        transformer=transformer,
        scheduler=scheduler,
        **_parts(audio_vae=None, connectors=None, vocoder=None),
    )
    # Its connectors make text of what a text encoder says: it is given as they would make it.
    channels = transformer.config.in_channels
    pipe.vae = _statistics(channels, scaling_factor=1.0)
    pipe.audio_vae = _statistics(8 * MEL, mel_bins=4 * MEL, latent_channels=8)
    pipe.connectors = lambda text, mask, padding_side: (text, text, mask)
    width = transformer.config.caption_channels
    call: dict[str, Any] = {}
    for sort in ("", "negative_"):
        call |= {
            f"{sort}prompt_embeds": torch.randn(1, size.text, width),
            f"{sort}prompt_attention_mask": _valid(size),
        }
    return pipe, {  # both in one call
        **call,
        "guidance_scale": 4.0,
        "stg_scale": 0.0,
        "modality_scale": 1.0,
        "audio_stg_scale": 0.0,
        "audio_modality_scale": 1.0,
        **_place(size),
    }


class _Asked(SimpleNamespace):
    """In the place of a VAE: what is asked of it where the result stays latent."""


def _statistics(channels: int, **config: Any) -> _Asked:
    return _Asked(
        latents_mean=torch.zeros(channels),
        latents_std=torch.ones(channels),
        config=SimpleNamespace(**config),
    )


FAMILIES: dict[str, Callable[[Size], tuple[Any, dict[str, Any]]]] = {
    "flux2": _flux2,
    "z-image": _z_image,
    "qwen-image": _qwen_image,
    "hunyuan15": _hunyuan15,
    "ltx2": _ltx2,
}
