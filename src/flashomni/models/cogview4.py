"""CogView4Transformer2DModel: CogView4 and its Control. Text first; RoPE of half-split pairs.

A mask of the text adds to the scores in diffusers, instead of leaving tokens out: it is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flashomni.engine import LayerRun
from flashomni.kernels.elementwise.op import gated_residual
from flashomni.models import Geometry, adapter
from flashomni.models.blocks import (
    TEXT,
    VISION,
    Inputs,
    MMDiTAdapter,
    feed_forward,
    residual_norm,
)
from flashomni.models.blocks.shared import SharedBlocks


class CogView4Blocks(SharedBlocks):
    """One Linear modulates both streams; one MLP runs over each."""

    rope_layout = "half"

    def dual(self, run: LayerRun, block: Any, inputs: Inputs) -> tuple[Tensor, ...]:
        if inputs.rest.get("attention_mask") is not None:
            raise NotImplementedError(
                "attention_mask is not supported by an accelerated CogView4 (diffusers adds it to "
                "the scores); leave it out, or call engine.remove()"
            )
        x, c, backend = inputs.x, inputs.c, run.backend
        norm_x, gate, shift, scale, gate_mlp, *context = block.norm1(x, c, inputs.rest["temb"])
        norm_c, c_gate, c_shift, c_scale, c_gate_mlp = context
        y, c_y = self.attention_of(run, block.attn1, norm_x, norm_c, inputs)
        x, norm_x = residual_norm(x, y, gate, block.norm2, scale, shift, backend=backend)
        c, norm_c = residual_norm(
            c, c_y, c_gate, block.norm2_context, c_scale, c_shift, backend=backend
        )
        y, c_y = (feed_forward(run, block.ff, each) for each in (norm_x, norm_c))
        x = gated_residual(x, y, gate_mlp, backend=backend)
        return x, gated_residual(c, c_y, c_gate_mlp, backend=backend)


@adapter("CogView4Transformer2DModel")
class CogView4(MMDiTAdapter):
    blocks: ClassVar = CogView4Blocks(
        dual_class="CogView4TransformerBlock",
        attention=("Attention", "CogView4AttnProcessor"),
        returns=(VISION, TEXT),
        rope_on_text=False,
        refused="attention_kwargs",
    )
    reorders: ClassVar = True
    sizes: ClassVar = {
        "tiny": {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "text_embed_dim": 24,
            "time_embed_dim": 8,
            "condition_dim": 4,
            "rope_axes_dim": (32, 32),
            "sample_size": 40,
        },
        "published": {  # 6B
            "num_layers": 28,
            "num_attention_heads": 32,
            "attention_head_dim": 128,
        },
    }

    def geometry(self, model: Any, arguments: Mapping[str, Any]) -> Geometry:
        height, width = arguments["hidden_states"].shape[2:]
        patch = model.config.patch_size
        return Geometry((1, height // patch, width // patch))

    def tiny(self) -> tuple[nn.Module, Mapping[str, Any]]:
        return self.build("tiny"), {
            "hidden_states": torch.randn(2, 4, 36, 38),
            "encoder_hidden_states": torch.randn(2, 77, 24),
            "timestep": torch.full((2,), 500.0),
            "original_size": torch.tensor([[36.0, 38.0]] * 2),
            "target_size": torch.tensor([[36.0, 38.0]] * 2),
            "crop_coords": torch.zeros(2, 2),
        }
