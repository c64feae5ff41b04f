"""WanAnimateTransformer3DModel: Wan 2.2 Animate. Blocks as Wan's; faces are added between them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from flashomni.models import adapter
from flashomni.models.wan import Wan

TINY, PUBLISHED = Wan.sizes["tiny"], Wan.sizes["published"]


@adapter("WanAnimateTransformer3DModel")
class WanAnimate(Wan):
    reorders: ClassVar = False  # what adds the faces looks for the tokens of each frame
    sizes: ClassVar = {
        "tiny": {
            **TINY,
            "in_channels": 12,
            "latent_channels": 4,
            "out_channels": 12,
            "image_dim": 16,
            "motion_encoder_size": 16,
            "motion_style_dim": 8,
            "motion_dim": 4,
            "motion_encoder_dim": 8,
            "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8},
            "face_encoder_hidden_dim": 8,
            "face_encoder_num_heads": 2,
            "inject_face_latents_blocks": 3,
        },
        "published": {**PUBLISHED, "in_channels": 36, "added_kv_proj_dim": 5120},
    }

    def tiny(self) -> tuple[nn.Module, Mapping[str, Any]]:
        frames, height, width = 5, 18, 14
        return self.build("tiny"), {
            "hidden_states": torch.randn(2, 12, frames, height, width),
            "timestep": torch.full((2,), 500.0),
            "encoder_hidden_states": torch.randn(2, 77, 24),
            "encoder_hidden_states_image": torch.randn(2, 5, 16),
            "pose_hidden_states": torch.randn(2, 4, frames - 1, height, width),
            "face_pixel_values": torch.randn(2, 3, 4 * frames - 7, 16, 16),
        }
