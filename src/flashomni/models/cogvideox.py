"""CogVideoXTransformer3DModel: CogVideoX 2B and 5B, 1.5, and their image to video. Text first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flashomni.engine import LayerRun
from flashomni.kernels.elementwise.op import gated_residual
from flashomni.models import Geometry, adapter
from flashomni.models.blocks import TEXT, VISION, Inputs, MMDiTAdapter, feed_forward
from flashomni.models.blocks.shared import SharedBlocks


class CogVideoXBlocks(SharedBlocks):
    """One norm and its Linear modulate both streams; one MLP runs over both."""

    def dual(self, run: LayerRun, block: Any, inputs: Inputs) -> tuple[Tensor, ...]:
        x, c, temb, backend = inputs.x, inputs.c, inputs.rest["temb"], run.backend
        norm_x, norm_c, gate, c_gate = block.norm1(x, c, temb)
        y, c_y = self.attention_of(run, block.attn1, norm_x, norm_c, inputs)
        x = gated_residual(x, y, gate[:, 0], backend=backend)
        c = gated_residual(c, c_y, c_gate[:, 0], backend=backend)
        norm_x, norm_c, gate, c_gate = block.norm2(x, c, temb)
        y, c_y = (feed_forward(run, block.ff, each) for each in (norm_x, norm_c))
        x = gated_residual(x, y, gate[:, 0], backend=backend)
        return x, gated_residual(c, c_y, c_gate[:, 0], backend=backend)


@adapter("CogVideoXTransformer3DModel")
class CogVideoX(MMDiTAdapter):
    blocks: ClassVar = CogVideoXBlocks(
        dual_class="CogVideoXBlock",
        attention=("Attention", "CogVideoXAttnProcessor2_0"),
        returns=(VISION, TEXT),
        rope_on_text=False,
        refused="attention_kwargs",
    )
    reorders: ClassVar = True
    sizes: ClassVar = {
        "tiny": {
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 24,
            "num_layers": 3,
            "sample_width": 14,
            "sample_height": 18,
            "sample_frames": 17,
            "max_text_seq_length": 77,
        },
        "published": {  # 5B
            "num_attention_heads": 48,
            "num_layers": 42,
            "use_rotary_positional_embeddings": True,
        },
    }

    def geometry(self, model: Any, arguments: Mapping[str, Any]) -> Geometry:
        frames, _, height, width = arguments["hidden_states"].shape[1:]
        patch, patch_t = model.config.patch_size, model.config.patch_size_t or 1
        return Geometry((frames // patch_t, height // patch, width // patch))

    def tiny(self) -> tuple[nn.Module, Mapping[str, Any]]:
        return self.build("tiny"), {
            "hidden_states": torch.randn(2, 5, 4, 18, 14),
            "encoder_hidden_states": torch.randn(2, 77, 24),
            "timestep": torch.full((2,), 500),
        }
