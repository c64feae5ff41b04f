"""QwenImageTransformer2DModel: Qwen-Image and Qwen-Image-Edit.

Dual-stream blocks only. Diffusers puts the text first, and its padding in the middle of the
sequence. Attention does not mind the order of its tokens, so here the text comes last: then the
padding is at the end, and ``kv_len`` says what the stock mask says. The valid text tokens must be a
prefix of the text, as the pipelines make them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flashomni.engine import LayerRun
from flashomni.kernels.common.rope import Rope
from flashomni.models import Adapter, Site, adapter
from flashomni.models.blocks.mmdit import (
    TEXT,
    VISION,
    added_stream,
    dual_attention,
    feed_forward,
    own_stream,
    require_processor,
)


@adapter("QwenImageTransformer2DModel")
class QwenImage(Adapter):
    def sites(self, model: Any) -> list[Site]:
        return [
            Site(f"transformer_blocks.{i}", block, run_block, (TEXT, VISION))
            for i, block in enumerate(model.transformer_blocks)
        ]

    def check(self, model: Any) -> None:
        blocks = {site.name: site.block for site in self.sites(model)}
        require_processor(blocks, "QwenDoubleStreamAttnProcessor2_0")

    def tiny(self) -> tuple[nn.Module, Mapping[str, Any]]:
        from diffusers import QwenImageTransformer2DModel

        model = QwenImageTransformer2DModel(
            in_channels=16,
            out_channels=4,
            num_layers=3,
            attention_head_dim=16,
            num_attention_heads=3,
            joint_attention_dim=24,
            axes_dims_rope=(4, 6, 6),
        )
        height, width = 18, 19
        text = torch.arange(77) < torch.tensor([[77], [30]])
        return model, {
            "hidden_states": torch.randn(2, height * width, 16),
            "encoder_hidden_states": torch.randn(2, 77, 24),
            "encoder_hidden_states_mask": text,
            "timestep": torch.full((2,), 0.5),
            "img_shapes": [[(1, height, width)]] * 2,
        }


def run_block(
    run: LayerRun,
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    encoder_hidden_states_mask: Tensor | None,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
    joint_attention_kwargs: dict[str, Any] | None = None,
    modulate_index: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """A ``QwenImageTransformerBlock``: ``(text, vision)`` streams."""
    if joint_attention_kwargs:
        raise NotImplementedError(
            f"attention_kwargs {sorted(joint_attention_kwargs)} are not supported by an "
            "accelerated Qwen-Image; leave them out, or call engine.remove()"
        )
    x, c, mask = hidden_states, encoder_hidden_states, encoder_hidden_states_mask
    num_vision, seqlen = x.shape[1], x.shape[1] + c.shape[1]
    kv_len = None if mask is None else run.shared(_count_valid, mask, num_vision)
    grid = run.begin(seqlen, text=(num_vision, seqlen), kv_len=kv_len)

    mod_x, mod_x2 = block.img_mod(temb).chunk(2, dim=-1)
    if block.zero_cond_t:
        temb = temb.chunk(2, dim=0)[0]
    mod_c, mod_c2 = block.txt_mod(temb).chunk(2, dim=-1)
    norm_x, gate = block._modulate(block.img_norm1(x), mod_x, modulate_index)
    norm_c, c_gate = block._modulate(block.txt_norm1(c), mod_c)

    ropes = tuple(run.shared(_real_tables, angles) for angles in image_rotary_emb)
    y, c_y = dual_attention(
        run,
        block.attn,
        own_stream(block.attn, norm_x, grid.vision, ropes[0]),
        added_stream(block.attn, norm_c, grid.text, ropes[1]),
    )
    x, c = x + gate * y, c + c_gate * c_y
    norm_x, gate = block._modulate(block.img_norm2(x), mod_x2, modulate_index)
    norm_c, c_gate = block._modulate(block.txt_norm2(c), mod_c2)
    x = x + gate * feed_forward(run, block.img_mlp, norm_x)
    c = c + c_gate * feed_forward(run, block.txt_mlp, norm_c)
    if x.dtype == torch.float16:  # the stock block clips as well
        x, c = x.clip(-65504, 65504), c.clip(-65504, 65504)
    return c, x


def _count_valid(mask: Tensor, num_vision: int) -> Tensor:
    """Valid keys of each batch item: int32 ``[B]``."""
    return num_vision + mask.sum(-1, dtype=torch.int32)


def _real_tables(angles: Tensor) -> Rope:
    """Complex ``[R, D / 2]`` -> ``(cos, sin)`` fp32 ``[R, D / 2]``, side by side as they are."""
    return angles.real, angles.imag
