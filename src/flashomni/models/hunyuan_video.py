"""HunyuanVideoTransformer3DModel: HunyuanVideo text to video.

Text comes last and is padded. Whatever mask the model gets, it hands its blocks one of the same
number of tokens at the front, ``[B, 1, 1, N]``: ``kv_len`` says the same, and attention needs no
mask. RoPE is for vision only.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from flashomni.models import Geometry, adapter
from flashomni.models.blocks import TEXT, VISION, MMDiT, MMDiTAdapter

TINY = {
    "in_channels": 4,
    "out_channels": 4,
    "num_attention_heads": 3,
    "attention_head_dim": 16,
    "num_refiner_layers": 1,
    "text_embed_dim": 24,
}  # what the small instances of the family have in common


@adapter("HunyuanVideoTransformer3DModel")
class HunyuanVideo(MMDiTAdapter):
    blocks: ClassVar = MMDiT(
        dual_class="HunyuanVideoTransformerBlock",
        single_class="HunyuanVideoSingleTransformerBlock",
        attention=("Attention", "HunyuanVideoAttnProcessor2_0"),
        text="last",
        returns=(VISION, TEXT),
        rope=("freqs_cis", "image_rotary_emb"),
        rope_on_text=False,
        mask="attention_mask",
    )
    reorders: ClassVar = True
    sizes: ClassVar = {
        "tiny": {
            **TINY,
            "num_layers": 2,
            "num_single_layers": 2,
            "patch_size": 2,
            "patch_size_t": 1,
            "guidance_embeds": True,
            "pooled_projection_dim": 20,
            "rope_axes_dim": (4, 6, 6),
        },
        "published": {
            "in_channels": 16,
            "out_channels": 16,
            "num_attention_heads": 24,
            "attention_head_dim": 128,
            "num_layers": 20,
            "num_single_layers": 40,
            "num_refiner_layers": 2,
            "patch_size": 2,
            "patch_size_t": 1,
            "qk_norm": "rms_norm",
            "guidance_embeds": True,
            "text_embed_dim": 4096,
            "pooled_projection_dim": 768,
            "rope_theta": 256.0,
            "rope_axes_dim": (16, 56, 56),
        },
    }

    def variant(self, model: Any) -> str:
        if getattr(model.config, "image_condition_type", None) != "token_replace":
            return ""
        return "blocks that modulate the first frame apart (image_condition_type='token_replace')"

    def geometry(self, model: Any, arguments: Mapping[str, Any]) -> Geometry:
        frames, height, width = arguments["hidden_states"].shape[2:]
        patch, patch_t = model.config.patch_size, model.config.patch_size_t
        return Geometry((frames // patch_t, height // patch, width // patch))

    def tiny(self) -> tuple[nn.Module, Mapping[str, Any]]:
        text = torch.arange(75) < torch.tensor([[75], [30]])
        return self.build("tiny"), {
            "hidden_states": torch.randn(2, 4, 5, 18, 14),
            "timestep": torch.full((2,), 500.0),
            "encoder_hidden_states": torch.randn(2, 75, 24),
            "encoder_attention_mask": text.long(),
            "pooled_projections": torch.randn(2, 20),
            "guidance": torch.full((2,), 6000.0),
        }
