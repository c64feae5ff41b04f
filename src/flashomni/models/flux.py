"""FluxTransformer2DModel: FLUX.1 dev, schnell, Kontext, Fill and what else shares the class.

Text comes first; RoPE covers both streams.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from flashomni.models import Geometry, adapter
from flashomni.models.blocks import TEXT, VISION, MMDiT, MMDiTAdapter
from flashomni.models.blocks.positions import of_position_ids


@adapter("FluxTransformer2DModel")
class Flux(MMDiTAdapter):
    blocks: ClassVar = MMDiT(
        dual_class="FluxTransformerBlock",
        single_class="FluxSingleTransformerBlock",
        attention=("FluxAttention", "FluxAttnProcessor"),
        clip=True,
    )
    reorders: ClassVar = True
    parallel: ClassVar[tuple[str, ...]] = (TEXT, VISION)
    residuals: ClassVar[tuple[str, ...]] = (
        "controlnet_block_samples",
        "controlnet_single_block_samples",
    )
    exit: ClassVar = "norm_out"
    sizes: ClassVar = {
        "tiny": {
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 20,
            "guidance_embeds": True,
            "axes_dims_rope": (4, 6, 6),
        },
        "published": {
            "patch_size": 1,
            "in_channels": 64,
            "num_layers": 19,
            "num_single_layers": 38,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 4096,
            "pooled_projection_dim": 768,
            "guidance_embeds": True,
            "axes_dims_rope": (16, 56, 56),
        },
    }

    def geometry(self, model: nn.Module, arguments: Mapping[str, Any]) -> Geometry:
        return of_position_ids(arguments.get("img_ids"))

    def tiny(self) -> tuple[nn.Module, Mapping[str, Any]]:
        height, width, text = 18, 19, 77
        img_ids = torch.cartesian_prod(torch.arange(1), torch.arange(height), torch.arange(width))
        return self.build("tiny"), {
            "hidden_states": torch.randn(2, height * width, 16),
            "encoder_hidden_states": torch.randn(2, text, 24),
            "pooled_projections": torch.randn(2, 20),
            "timestep": torch.full((2,), 0.5),
            "img_ids": img_ids.float(),
            "txt_ids": torch.zeros(text, 3),
            "guidance": torch.full((2,), 3.5),
        }
