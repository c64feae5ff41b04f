"""FluxTransformer2DModel: FLUX.1 dev, schnell, Kontext, Fill and what else shares the class.

Text comes first. Dual blocks project text and vision apart; single blocks run one sequence, and
fuse the output projections of attention and MLP into one ``proj_out`` over both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flashomni.engine import LayerRun
from flashomni.engine.linear import join_tokens
from flashomni.kernels.common.rope import Rope, pack_rope
from flashomni.kernels.elementwise.op import gated_residual
from flashomni.models import Adapter, Site, adapter
from flashomni.models.blocks.fused import adaptive_norm, residual_norm
from flashomni.models.blocks.mmdit import (
    TEXT,
    VISION,
    added_stream,
    dual_and_single,
    dual_attention,
    feed_forward,
    gelu_up,
    joint_attention,
    own_stream,
    require_processor,
    split_rope,
)


@adapter("FluxTransformer2DModel")
class Flux(Adapter):
    def sites(self, model: Any) -> list[Site]:
        return dual_and_single(model, run_dual, run_single, (TEXT, VISION))

    def check(self, model: Any) -> None:
        blocks = {site.name: site.block for site in self.sites(model)}
        require_processor(blocks, "FluxAttnProcessor")

    def tiny(self) -> tuple[nn.Module, Mapping[str, Any]]:
        from diffusers import FluxTransformer2DModel

        model = FluxTransformer2DModel(
            in_channels=16,
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=16,
            num_attention_heads=3,
            joint_attention_dim=24,
            pooled_projection_dim=20,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        )
        height, width, text = 18, 19, 77
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        img_ids = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).flatten(0, 1)
        return model, {
            "hidden_states": torch.randn(2, height * width, 16),
            "encoder_hidden_states": torch.randn(2, text, 24),
            "pooled_projections": torch.randn(2, 20),
            "timestep": torch.full((2,), 0.5),
            "img_ids": img_ids.float(),
            "txt_ids": torch.zeros(text, 3),
            "guidance": torch.full((2,), 3.5),
        }


def _begin(run: LayerRun, vision: Tensor, text: Tensor, attention_kwargs: Any) -> None:
    if attention_kwargs:
        raise NotImplementedError(
            f"joint_attention_kwargs {sorted(attention_kwargs)} are not supported by an "
            "accelerated FLUX; leave them out, or call engine.remove()"
        )
    num_text = text.shape[1]
    run.begin(num_text + vision.shape[1], text=(0, num_text))


def run_dual(
    run: LayerRun,
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Rope,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """A ``FluxTransformerBlock``: ``(text, vision)`` streams."""
    x, c = hidden_states, encoder_hidden_states
    _begin(run, x, c, joint_attention_kwargs)
    norm_x, gate, shift_mlp, scale_mlp, gate_mlp = adaptive_norm(block.norm1, x, temb)
    norm_c, c_gate, c_shift, c_scale, c_gate_mlp = adaptive_norm(block.norm1_context, c, temb)
    text, vision = run.grid.text, run.grid.vision
    rope = run.shared(pack_rope, *image_rotary_emb)
    y, c_y = dual_attention(
        run,
        block.attn,
        own_stream(block.attn, norm_x, vision, split_rope(rope, *vision)),
        added_stream(block.attn, norm_c, text, split_rope(rope, *text)),
    )
    x, norm_x = residual_norm(x, y, gate, block.norm2, scale_mlp, shift_mlp)
    x = gated_residual(x, feed_forward(run, block.ff, norm_x), gate_mlp)
    c, norm_c = residual_norm(c, c_y, c_gate, block.norm2_context, c_scale, c_shift)
    c = gated_residual(c, feed_forward(run, block.ff_context, norm_c), c_gate_mlp)
    return _clip(c), x


def run_single(
    run: LayerRun,
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Rope,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """A ``FluxSingleTransformerBlock``: one sequence, split again at the end."""
    num_text = encoder_hidden_states.shape[1]
    _begin(run, hidden_states, encoder_hidden_states, joint_attention_kwargs)
    x = join_tokens(encoder_hidden_states, hidden_states)
    norm_x, gate = adaptive_norm(block.norm, x, temb)
    mlp = gelu_up(run, block, norm_x)
    rope = run.shared(pack_rope, *image_rotary_emb)
    whole = own_stream(block.attn, norm_x, (0, x.shape[1]), rope)
    o = joint_attention(run, block.attn, [whole], block.proj_out)
    y = run.project_o(o, block.proj_out, row_offset=0, always=mlp)
    x = _clip(gated_residual(x, y, gate))
    return x[:, :num_text], x[:, num_text:]


def _clip(x: Tensor) -> Tensor:
    """FLUX overflows fp16 otherwise; the stock blocks clip as well."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
