"""LTXVideoTransformer3DModel: LTX-Video, text and image to video.

Blocks have one stream: attention of the video to itself, then to the text, which is called as it
is. The norms of q and k span all heads, and so do the angles of RoPE: each head has its own, and
each item of the batch. q is projected whole; attention and output projection are sparse.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flashomni.engine import LayerRun
from flashomni.kernels.common.rope import Rope
from flashomni.kernels.elementwise.op import gated_residual
from flashomni.models import Adapter, Geometry, Reliance, Site, adapter
from flashomni.models._relies import BLOCK, rely_on_attention
from flashomni.models.blocks import feed_forward, joint_attention, modulate, own_stream
from flashomni.models.blocks.positions import rope_in_order
from flashomni.models.generic.run import Guide, InBlock


@adapter("LTXVideoTransformer3DModel")
class LTXVideo(Adapter):
    reorders: ClassVar = True
    sizes: ClassVar = {
        "tiny": {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "cross_attention_dim": 48,
            "num_layers": 3,
            "caption_channels": 24,
        },
        "published": {"num_layers": 48, "attention_head_dim": 128, "cross_attention_dim": 4096},
        "2b": {},  # diffusers' defaults
    }

    def sites(self, model: Any) -> list[Site]:
        return [
            Site(
                f"transformer_blocks.{i}",
                block,
                run_block,
                ("hidden_states",),
                returns="hidden_states",
                by_token={"temb": 3},
                modulated=modulated,
                sequence=("hidden_states",),
            )
            for i, block in enumerate(model.transformer_blocks)
        ]

    def relies_on(self, model: Any) -> list[Reliance]:
        found = []
        for i, block in enumerate(model.transformer_blocks):
            name = f"transformer_blocks.{i}"
            found += rely_on_attention(
                f"{name}.attn1", block.attn1, ("LTXAttention",), "LTXVideoAttnProcessor"
            )
            found.append(Reliance(name, block, ("LTXVideoTransformerBlock",), BLOCK))
        return found

    def geometry(self, model: Any, arguments: Mapping[str, Any]) -> Geometry:
        frames, height, width = (arguments.get(name) for name in ("num_frames", "height", "width"))
        shape = frames or 0, height or 0, width or 0
        if math.prod(shape) != arguments["hidden_states"].shape[1]:
            return Geometry(why="num_frames, height and width do not number its tokens")
        return Geometry(shape)

    def tiny(self) -> tuple[nn.Module, Mapping[str, Any]]:
        text = torch.arange(77) < torch.tensor([[77], [30]])
        return self.build("tiny"), {
            "hidden_states": torch.randn(2, 5 * 9 * 7, 4),
            "encoder_hidden_states": torch.randn(2, 77, 24),
            "timestep": torch.full((2,), 500.0),
            "encoder_attention_mask": text.long(),
            "num_frames": 5,
            "height": 9,
            "width": 7,
        }


def run_block(
    run: LayerRun,
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: tuple[Tensor, Tensor],
    encoder_attention_mask: Tensor | None = None,
) -> Tensor:
    """A block of LTX-Video.

    Args:
        hidden_states: ``[B, S, K]``, S tokens of the video.
        encoder_hidden_states: ``[B, T, K]``, of the text.
        temb: ``[B, 1, 6 K]``, or ``[B, S, 6 K]`` where each token has its own timestep.
        image_rotary_emb: ``(cos, sin)``, each ``[B, S, H * D]``.
        encoder_attention_mask: what is added to the scores of the text, ``[B, 1, T]``.
    """
    x = hidden_states
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = modulation(block.scale_shift_table, temb)
    norm_x = scaled(block.norm1, x, scale, shift, run.backend)
    x = add(x, self_attention(run, block.attn1, norm_x, image_rotary_emb), gate, run.backend)
    with InBlock(run, guide=run.shared(Guide, run.recipe)) as watch:  # and counts FLOPs
        watch.has_begun = True
        y = block.attn2(x, encoder_hidden_states, encoder_attention_mask, None)
    x = x + y
    y = feed_forward(run, block.ff, scaled(block.norm2, x, mlp_scale, mlp_shift, run.backend))
    return add(x, y, mlp_gate, run.backend)


def modulated(
    block: Any, hidden_states: Tensor, *args: Any, backend: str | None = None, **kwargs: Any
) -> Tensor:
    """Tokens of the video after the first norm and modulation of a block."""
    temb = kwargs["temb"] if "temb" in kwargs else args[1]
    shift, scale, *_ = modulation(block.scale_shift_table, temb)
    return scaled(block.norm1, hidden_states, scale, shift, backend)


def self_attention(
    run: LayerRun,
    attn: Any,
    x: Tensor,
    tables: tuple[Tensor, Tensor],
    rope_layout: str = "interleaved",
    gate: Tensor | None = None,
) -> Tensor:
    """Attention of the video to itself, guided by the last map of its attention to the text.

    Args:
        run: of the block.
        attn: the attention.
        x: ``[B, S, K]``, after norm and modulation.
        tables: RoPE's, ``[B, S, H * D]`` each, or ``[B, H, S, D / 2]`` with layout ``half``.
        rope_layout: ``interleaved`` or ``half``.
        gate: see :meth:`LayerRun.attend`.
    """
    seqlen = x.shape[1]
    run.begin(seqlen, **({} if run.geometry is None else run.geometry.place(0, seqlen)))
    rope = rope_in_order(run, run.shared(_by_head, attn.heads, *tables))
    stream = own_stream(attn, x, (0, seqlen), rope, rope_layout=rope_layout)
    guide = run.shared(Guide, run.recipe)
    o = joint_attention(run, attn, [stream], attn.to_out[0], guide=guide.map, gate=gate)
    return attn.to_out[1](run.project_o(o, attn.to_out[0], row_offset=0))


def modulation(table: Tensor, temb: Tensor) -> tuple[Tensor, ...]:
    """Shifts, scales and gates: ``[B, 1 or S, K]`` each.

    Args:
        table: ``[N, K]``.
        temb: ``[B, 1 or S, N * K]``.
    """
    return (table.to(temb.device) + temb.unflatten(2, (table.shape[0], -1))).unbind(2)


def scaled(norm: Any, x: Tensor, scale: Tensor, shift: Tensor, backend: str | None) -> Tensor:
    """``norm(x) * (1 + scale) + shift`` with both ``[B, 1 or S, K]``."""
    if scale.shape[1] == 1:
        return modulate(norm, x, scale[:, 0], shift[:, 0], backend=backend)
    return norm(x) * (1 + scale) + shift


def add(x: Tensor, y: Tensor, gate: Tensor, backend: str | None) -> Tensor:
    """``x + gate * y`` with the gate ``[B, 1 or S, K]``."""
    if gate.shape[1] == 1:
        return gated_residual(x, y, gate[:, 0], backend=backend)
    return x + y * gate


def _by_head(num_heads: int, cos: Tensor, sin: Tensor) -> Rope:
    """``(cos, sin)``, fp32 ``[B, S, H, D / 2]`` each."""
    if cos.ndim == 4:
        return cos.transpose(1, 2).float(), sin.transpose(1, 2).float()
    cos, sin = (t.unflatten(2, (num_heads, -1))[..., ::2].float() for t in (cos, sin))
    return cos, sin
