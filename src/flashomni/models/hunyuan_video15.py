"""HunyuanVideo15Transformer3DModel: HunyuanVideo-1.5, text and image to video.

Dual-stream blocks only. The text is what two encoders and an image gave, and comes last; the model
puts its valid tokens first, and hands its blocks a mask of the text alone. Without an image its
tokens are there all the same, as padding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from flashomni.models import adapter
from flashomni.models.hunyuan_video import TINY, HunyuanVideo


@adapter("HunyuanVideo15Transformer3DModel")
class HunyuanVideo15(HunyuanVideo):
    blocks: ClassVar = replace(
        HunyuanVideo.blocks,
        dual_class="HunyuanVideo15TransformerBlock",
        single_class=None,
        attention=("Attention", "HunyuanVideo15AttnProcessor2_0"),
    )
    sizes: ClassVar = {
        "tiny": {
            **TINY,
            "num_layers": 3,
            "text_embed_2_dim": 20,
            "image_embed_dim": 12,
            "rope_axes_dim": (4, 6, 6),
        },
        "published": {},  # diffusers' defaults
    }

    def tiny(self) -> tuple[nn.Module, Mapping[str, Any]]:
        text = torch.arange(75) < torch.tensor([[75], [30]])
        glyphs = torch.arange(20) < torch.tensor([[7], [20]])
        return self.build("tiny"), {
            "hidden_states": torch.randn(2, 4, 5, 9, 7),
            "timestep": torch.full((2,), 500.0),
            "encoder_hidden_states": torch.randn(2, 75, 24),
            "encoder_attention_mask": text.long(),
            "encoder_hidden_states_2": torch.randn(2, 20, 20),
            "encoder_attention_mask_2": glyphs.long(),
            "image_embeds": torch.randn(2, 11, 12),
        }
