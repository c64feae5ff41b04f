"""LongCatImageTransformer2DModel: LongCat-Image and LongCat-Image-Edit. Blocks as FLUX's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from flashomni.models import Geometry, adapter
from flashomni.models.blocks import MMDiT, MMDiTAdapter
from flashomni.models.blocks.positions import of_position_ids


@adapter("LongCatImageTransformer2DModel")
class LongCatImage(MMDiTAdapter):
    blocks: ClassVar = MMDiT(
        dual_class="LongCatImageTransformerBlock",
        single_class="LongCatImageSingleTransformerBlock",
        attention=("LongCatImageAttention", "LongCatImageAttnProcessor"),
        clip=True,
    )
    reorders: ClassVar = True
    sizes: ClassVar = {
        "tiny": {
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 24,
            "axes_dims_rope": (4, 6, 6),
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
            "timestep": torch.full((2,), 0.5),
            "img_ids": img_ids.float(),
            "txt_ids": torch.zeros(text, 3),
        }
