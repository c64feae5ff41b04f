"""The models that ``tiers.py`` compares: each function gives what tables call it, its class, its
configuration where that is not the class's own, and what makes the arguments of a first call.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from flashomni.models import adapters

Inputs = dict[str, Any]


def flux() -> tuple[str, str, Inputs, Callable[[], Inputs]]:
    def inputs() -> Inputs:
        ids = torch.cartesian_prod(torch.arange(1), torch.arange(64), torch.arange(64)).float()
        return {
            "hidden_states": torch.randn(1, 4096, 64),
            "encoder_hidden_states": torch.randn(1, 512, 4096),
            "pooled_projections": torch.randn(1, 768),
            "timestep": torch.full((1,), 1.0),
            "img_ids": ids,
            "txt_ids": torch.zeros(512, 3),
            "guidance": torch.full((1,), 3.5),
        }

    size = adapters()["FluxTransformer2DModel"].sizes["published"]
    return "FLUX.1-dev 1024²", "FluxTransformer2DModel", dict(size), inputs


def wan() -> tuple[str, str, Inputs, Callable[[], Inputs]]:
    def inputs() -> Inputs:
        return {
            "hidden_states": torch.randn(1, 16, 21, 60, 104),
            "timestep": torch.full((1,), 1000.0),
            "encoder_hidden_states": torch.randn(1, 512, 4096),
        }

    size = adapters()["WanTransformer3DModel"].sizes["t2v-1.3b"]
    return (
        "Wan 2.1 1.3B 480p, 81 frames",
        "WanTransformer3DModel",
        {**size, "num_layers": 8},
        inputs,
    )


def qwen() -> tuple[str, str, Inputs, Callable[[], Inputs]]:
    def inputs() -> Inputs:
        return {
            "hidden_states": torch.randn(1, 83 * 83, 64),
            "encoder_hidden_states": torch.randn(1, 256, 3584),
            "encoder_hidden_states_mask": torch.ones(1, 256, dtype=torch.bool),
            "timestep": torch.full((1,), 1.0),
            "img_shapes": [[(1, 83, 83)]],
        }

    size = adapters()["QwenImageTransformer2DModel"].sizes["published"]
    return "Qwen-Image 1328²", "QwenImageTransformer2DModel", {**size, "num_layers": 12}, inputs


def hunyuan15() -> tuple[str, str, Inputs, Callable[[], Inputs]]:
    def inputs() -> Inputs:
        return {
            "hidden_states": torch.randn(1, 65, 16, 30, 52),
            "timestep": torch.full((1,), 1000.0),
            "encoder_hidden_states": torch.randn(1, 256, 3584),
            "encoder_attention_mask": torch.ones(1, 256, dtype=torch.long),
            "encoder_hidden_states_2": torch.randn(1, 64, 1472),
            "encoder_attention_mask_2": torch.ones(1, 64, dtype=torch.long),
            "image_embeds": torch.zeros(1, 729, 1152),
        }

    name = "HunyuanVideo-1.5 480p, 61 frames"
    return name, "HunyuanVideo15Transformer3DModel", {"num_layers": 8}, inputs


def ltx() -> tuple[str, str, Inputs, Callable[[], Inputs]]:
    def inputs() -> Inputs:
        return {
            "hidden_states": torch.randn(1, 21 * 16 * 22, 128),
            "encoder_hidden_states": torch.randn(1, 128, 4096),
            "timestep": torch.full((1,), 1000.0),
            "encoder_attention_mask": torch.ones(1, 128, dtype=torch.long),
            "num_frames": 21,
            "height": 16,
            "width": 22,
        }

    name = "LTX-Video 2B 512 by 704, 161 frames"
    return name, "LTXVideoTransformer3DModel", {}, inputs


def z_image() -> tuple[str, str, Inputs, Callable[[], Inputs]]:
    def inputs() -> Inputs:
        return {
            "x": torch.randn(1, 16, 1, 128, 128),
            "t": torch.full((1,), 1.0),
            "cap_feats": torch.randn(1, 128, 2560),
        }

    return "Z-Image 1024²", "ZImageTransformer2DModel", {"n_layers": 12}, inputs


def flux2() -> tuple[str, str, Inputs, Callable[[], Inputs]]:
    def inputs() -> Inputs:
        one, side = torch.arange(1), torch.arange(64)
        return {
            "hidden_states": torch.randn(1, 4096, 128),
            "encoder_hidden_states": torch.randn(1, 512, 15360),
            "timestep": torch.full((1,), 1.0),
            "img_ids": torch.cartesian_prod(one, side, side, one).float(),
            "txt_ids": torch.cartesian_prod(one, one, one, torch.arange(512)).float(),
            "guidance": torch.full((1,), 4.0),
        }

    size = {"num_layers": 2, "num_single_layers": 10}
    return "FLUX.2-dev 1024²", "Flux2Transformer2DModel", size, inputs


def sd3() -> tuple[str, str, Inputs, Callable[[], Inputs]]:
    def inputs() -> Inputs:
        return {
            "hidden_states": torch.randn(1, 16, 128, 128),
            "encoder_hidden_states": torch.randn(1, 333, 4096),
            "pooled_projections": torch.randn(1, 2048),
            "timestep": torch.full((1,), 1000.0),
        }

    size = adapters()["SD3Transformer2DModel"].sizes["medium"]
    return "SD3.5 medium 1024²", "SD3Transformer2DModel", dict(size), inputs


def cogvideox() -> tuple[str, str, Inputs, Callable[[], Inputs]]:
    def inputs() -> Inputs:
        angles = torch.rand(13 * 30 * 45, 32, dtype=torch.float32).repeat_interleave(2, dim=1)
        return {
            "hidden_states": torch.randn(1, 13, 16, 60, 90),
            "encoder_hidden_states": torch.randn(1, 226, 4096),
            "timestep": torch.full((1,), 1000.0),
            "image_rotary_emb": (angles.cos(), angles.sin()),
        }

    size = adapters()["CogVideoXTransformer3DModel"].sizes["published"]
    return (
        "CogVideoX 5B 480p, 49 frames",
        "CogVideoXTransformer3DModel",
        {**size, "num_layers": 8},
        inputs,
    )


CASES = {
    "hunyuan15": hunyuan15,
    "qwen": qwen,
    "ltx": ltx,
    "z-image": z_image,
    "flux2": flux2,
    "sd3": sd3,
    "cogvideox": cogvideox,
    "wan": wan,
    "flux": flux,
}
