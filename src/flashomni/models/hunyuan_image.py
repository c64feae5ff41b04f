"""HunyuanImageTransformer2DModel: HunyuanImage 2.1 and its refiner. Blocks as HunyuanVideo's.

The padding of the text is wherever its tokenizer puts it, unless a second encoder is in use.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import nn

from flashomni.models import Geometry, adapter
from flashomni.models.hunyuan_video import TINY, HunyuanVideo


@adapter("HunyuanImageTransformer2DModel")
class HunyuanImage(HunyuanVideo):
    blocks: ClassVar = replace(
        HunyuanVideo.blocks,
        dual_class="HunyuanImageTransformerBlock",
        single_class="HunyuanImageSingleTransformerBlock",
        attention=("Attention", "HunyuanImageAttnProcessor"),
        unsorted=True,
    )
    sizes: ClassVar = {
        "tiny": {
            **TINY,
            "num_layers": 2,
            "num_single_layers": 2,
            "rope_axes_dim": (8, 8),
        },
        "published": {"text_embed_2_dim": 1472},
    }

    def geometry(self, model: Any, arguments: Mapping[str, Any]) -> Geometry:
        sizes = arguments["hidden_states"].shape[2:]
        shape = tuple(size // p for size, p in zip(sizes, model.config.patch_size, strict=True))
        return Geometry((1, *shape)[-3:])

    def tiny(self) -> tuple[nn.Module, Mapping[str, Any]]:
        text = torch.arange(75) >= torch.tensor([[0], [45]])
        return self.build("tiny"), {
            "hidden_states": torch.randn(2, 4, 18, 19),
            "timestep": torch.full((2,), 500.0),
            "encoder_hidden_states": torch.randn(2, 75, 24),
            "encoder_attention_mask": text.long(),
        }
