"""HunyuanVideoFramepackTransformer3DModel: FramePack, videos section by section.

Blocks are HunyuanVideo's. Tokens of the frames before, the coarser the older, lie in front of those
that are generated. A single item has its padding cut off by the model, and no mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from flashomni.models import Geometry, adapter
from flashomni.models.hunyuan_video import HunyuanVideo


@adapter("HunyuanVideoFramepackTransformer3DModel")
class Framepack(HunyuanVideo):
    reorders: ClassVar = False
    sizes: ClassVar = {
        "tiny": {
            **HunyuanVideo.sizes["tiny"],
            "has_image_proj": True,
            "image_proj_dim": 12,
            "has_clean_x_embedder": True,
        },
        "published": {
            **HunyuanVideo.sizes["published"],
            "has_image_proj": True,
            "image_proj_dim": 1152,
            "has_clean_x_embedder": True,
        },
    }

    def geometry(self, model: Any, arguments: Mapping[str, Any]) -> Geometry:
        return Geometry(why="tokens of earlier frames lie in front of those that are generated")

    def tiny(self) -> tuple[nn.Module, Mapping[str, Any]]:
        model, inputs = super().tiny()
        history = {}
        for name, frames in (("clean", 1), ("history_2x", 2), ("history_4x", 4)):
            history[f"latents_{name}"] = torch.randn(2, 4, frames, 18, 14)
            history[f"indices_latents_{name}"] = torch.arange(frames)
        return model, {
            **inputs,
            "image_embeds": torch.randn(2, 11, 12),
            "indices_latents": torch.arange(7, 12),
            **history,
        }
