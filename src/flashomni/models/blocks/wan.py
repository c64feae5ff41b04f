"""A block of Wan and its relatives: self-attention of the video, cross-attention, MLP.

The norms of q and k span all heads, so a head of q is not known without the others: q is projected
whole, and attention and output projection are sparse. Cross-attention is called as it is.
Modulation and residuals are fp32, as in diffusers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flashomni.engine import LayerRun
from flashomni.engine.linear import is_hooked, is_stock
from flashomni.kernels.common.rope import Rope
from flashomni.kernels.elementwise.op import gated_residual, modulated_norm
from flashomni.models.blocks.joint import feed_forward, joint_attention, own_stream
from flashomni.models.blocks.positions import rope_in_order
from flashomni.models.generic.run import Guide, InBlock


def run_block(
    run: LayerRun,
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: tuple[Tensor, Tensor],
) -> Tensor:
    """A block of Wan.

    Args:
        hidden_states: ``[B, S, K]``, S tokens of the video.
        encoder_hidden_states: ``[B, T, K]``, of the text; those of an image in front of it.
        temb: ``[B, 6, K]``, or ``[B, S, 6, K]`` where each token has its own timestep.
        rotary_emb: ``(cos, sin)``, each ``[1, S, 1, D]``.
    """
    x, seqlen = hidden_states, hidden_states.shape[1]
    run.begin(seqlen, **({} if run.geometry is None else run.geometry.place(0, seqlen)))
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = _modulation(block, temb)

    attn, rope = block.attn1, rope_in_order(run, run.shared(_tables, *rotary_emb))
    guide = run.shared(Guide, run.recipe)
    norm_x = _modulate(block.norm1, x, scale, shift, run.backend)
    stream = own_stream(attn, norm_x, (0, seqlen), rope)
    o = joint_attention(run, attn, [stream], attn.to_out[0], guide=guide.map)
    y = attn.to_out[1](run.project_o(o, attn.to_out[0], row_offset=0))
    x = _add(x, y, gate, run.backend)

    with InBlock(run, guide=guide) as watch:  # counts FLOPs, and keeps the map for what follows
        watch.has_begun = True
        y = block.attn2(block.norm2(x.float()).type_as(x), encoder_hidden_states, None, None)
    x = x + y

    y = feed_forward(run, block.ffn, _modulate(block.norm3, x, mlp_scale, mlp_shift, run.backend))
    return _add(x, y, mlp_gate, run.backend)


def modulated(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Any,
    *,
    backend: str | None = None,
) -> Tensor:
    """Tokens of the video after the first norm and modulation of a block."""
    shift, scale, *_ = _modulation(block, temb)
    return _modulate(block.norm1, hidden_states, scale, shift, backend)


def _modulation(block: Any, temb: Tensor) -> tuple[Tensor, ...]:
    """Shift, scale and gate of the attention, then of the MLP: fp32 ``[B, K]`` or ``[B, S, K]``."""
    return (block.scale_shift_table + temb.float()).unbind(-2)


def _modulate(norm: Any, x: Tensor, scale: Tensor, shift: Tensor, backend: str | None) -> Tensor:
    """``norm(x) * (1 + scale) + shift`` in fp32, in the dtype of ``x``."""
    bare = is_stock(norm, "FP32LayerNorm") and norm.weight is None and norm.bias is None
    if scale.ndim == 2 and bare and not is_hooked(norm):
        return modulated_norm(x, scale, shift, norm.eps, backend=backend)
    scale, shift = (t[:, None] if t.ndim == 2 else t for t in (scale, shift))
    return (norm(x.float()) * (1 + scale) + shift).type_as(x)


def _add(x: Tensor, y: Tensor, gate: Tensor, backend: str | None) -> Tensor:
    """``x + gate * y`` in fp32, in the dtype of ``x``."""
    if gate.ndim == 2:
        return gated_residual(x, y, gate, backend=backend)
    return (x.float() + y.float() * gate).type_as(x)


def _tables(cos: Tensor, sin: Tensor) -> Rope:
    """RoPE tables ``[1, S, 1, D]``, lowered with the model maybe, as the kernels take them.

    Of a pair, its first entry of the cosines counts and its second one of the sines, as in stock.
    """
    pairs = torch.stack((cos[0, :, 0, 0::2], sin[0, :, 0, 1::2]), dim=-1).float()
    return pairs[..., 0], pairs[..., 1]
