"""HunyuanVideoTransformer3DModel: HunyuanVideo text to video.

Text comes last and is padded. Diffusers hands a ``[B, 1, 1, N]`` mask to every block; as the valid
tokens are a prefix, ``kv_len`` says the same, and attention needs no mask. RoPE is for vision only.
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
)


@adapter("HunyuanVideoTransformer3DModel")
class HunyuanVideo(Adapter):
    def sites(self, model: Any) -> list[Site]:
        return dual_and_single(model, run_dual, run_single, (VISION, TEXT))

    def check(self, model: Any) -> None:
        if getattr(model.config, "image_condition_type", None) == "token_replace":
            raise NotImplementedError(
                "HunyuanVideo with image_condition_type='token_replace' is not supported: its "
                "blocks modulate the first frame apart; text-to-video and 'latent_concat' are"
            )
        blocks = {site.name: site.block for site in self.sites(model)}
        require_processor(blocks, "HunyuanVideoAttnProcessor2_0")

    def tiny(self) -> tuple[nn.Module, Mapping[str, Any]]:
        from diffusers import HunyuanVideoTransformer3DModel

        model = HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            num_attention_heads=3,
            attention_head_dim=16,
            num_layers=2,
            num_single_layers=2,
            num_refiner_layers=1,
            patch_size=2,
            patch_size_t=1,
            guidance_embeds=True,
            text_embed_dim=24,
            pooled_projection_dim=20,
            rope_axes_dim=(4, 6, 6),
        )
        text = torch.arange(75) < torch.tensor([[75], [30]])
        return model, {
            "hidden_states": torch.randn(2, 4, 5, 18, 14),
            "timestep": torch.full((2,), 500.0),
            "encoder_hidden_states": torch.randn(2, 75, 24),
            "encoder_attention_mask": text.long(),
            "pooled_projections": torch.randn(2, 20),
            "guidance": torch.full((2,), 6000.0),
        }


def _begin(run: LayerRun, vision: Tensor, text: Tensor, mask: Tensor | None) -> None:
    num_vision = vision.shape[1]
    seqlen = num_vision + text.shape[1]
    kv_len = None if mask is None else run.shared(_count_valid, mask)
    run.begin(seqlen, text=(num_vision, seqlen), kv_len=kv_len)


def _count_valid(mask: Tensor) -> Tensor:
    """Valid keys of each batch item: int32 ``[B]``."""
    return mask.flatten(1).sum(-1, dtype=torch.int32)


def run_dual(
    run: LayerRun,
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    freqs_cis: Rope | None = None,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    """A ``HunyuanVideoTransformerBlock``: ``(vision, text)`` streams."""
    x, c = hidden_states, encoder_hidden_states
    _begin(run, x, c, attention_mask)
    norm_x, gate, shift_mlp, scale_mlp, gate_mlp = adaptive_norm(block.norm1, x, temb)
    norm_c, c_gate, c_shift, c_scale, c_gate_mlp = adaptive_norm(block.norm1_context, c, temb)
    rope = None if freqs_cis is None else run.shared(pack_rope, *freqs_cis)
    y, c_y = dual_attention(
        run,
        block.attn,
        own_stream(block.attn, norm_x, run.grid.vision, rope),
        added_stream(block.attn, norm_c, run.grid.text, None),
    )
    x, norm_x = residual_norm(x, y, gate, block.norm2, scale_mlp, shift_mlp)
    x = gated_residual(x, feed_forward(run, block.ff, norm_x), gate_mlp)
    c, norm_c = residual_norm(c, c_y, c_gate, block.norm2_context, c_scale, c_shift)
    c = gated_residual(c, feed_forward(run, block.ff_context, norm_c), c_gate_mlp)
    return x, c


def run_single(
    run: LayerRun,
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    attention_mask: Tensor | None = None,
    image_rotary_emb: Rope | None = None,
    *_: Any,
) -> tuple[Tensor, Tensor]:
    """A ``HunyuanVideoSingleTransformerBlock``: one sequence, split again at the end."""
    num_vision = hidden_states.shape[1]
    _begin(run, hidden_states, encoder_hidden_states, attention_mask)
    x = join_tokens(hidden_states, encoder_hidden_states)
    norm_x, gate = adaptive_norm(block.norm, x, temb)
    mlp = gelu_up(run, block, norm_x)
    vision, text = run.grid.vision, run.grid.text
    rope = None if image_rotary_emb is None else run.shared(pack_rope, *image_rotary_emb)
    streams = [
        own_stream(block.attn, norm_x[:, slice(*vision)], vision, rope),
        own_stream(block.attn, norm_x[:, slice(*text)], text, None),
    ]
    o = joint_attention(run, block.attn, streams, block.proj_out)
    y = run.project_o(o, block.proj_out, row_offset=0, always=mlp)
    x = gated_residual(x, y, gate)
    return x[:, :num_vision], x[:, num_vision:]
