"""WanTransformer3DModel: Wan 2.1 and 2.2, text, image and text with image to video.

Blocks have one stream: attention of the video to itself, then to the text (and, in Wan 2.1 I2V, to
an image), which is called as it is. The norms of q and k span all heads, so a head of q is not
known without the others: q is projected whole, and attention and output projection are sparse.
Modulation and residuals are fp32, as in diffusers; in TI2V each token has its own timestep.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flashomni.engine import LayerRun
from flashomni.engine.linear import is_hooked, is_stock
from flashomni.kernels.common.rope import Rope, pack_rope
from flashomni.kernels.elementwise.op import gated_residual, modulated_norm
from flashomni.models import Adapter, Geometry, Reliance, Site, adapter
from flashomni.models._relies import BLOCK, rely_on_attention
from flashomni.models.blocks import feed_forward, joint_attention, own_stream
from flashomni.models.blocks.positions import rope_in_order
from flashomni.models.generic.run import Guide, InBlock


@adapter("WanTransformer3DModel")
class Wan(Adapter):
    reorders: ClassVar = True
    sizes: ClassVar = {
        "tiny": {
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 24,
            "freq_dim": 32,
            "ffn_dim": 96,
            "num_layers": 3,
            "rope_max_seq_len": 32,
        },
        "published": {  # Wan 2.1 T2V 14B, and each of the two of Wan 2.2 T2V A14B
            "num_attention_heads": 40,
            "attention_head_dim": 128,
            "in_channels": 16,
            "out_channels": 16,
            "text_dim": 4096,
            "freq_dim": 256,
            "ffn_dim": 13824,
            "num_layers": 40,
            "rope_max_seq_len": 1024,
        },
        # Everything that they do not say is diffusers' default, that of T2V 14B.
        "i2v-14b": {"in_channels": 36, "image_dim": 1280, "added_kv_proj_dim": 5120},
        "i2v-a14b": {"in_channels": 36},
        "ti2v-5b": {
            "num_attention_heads": 24,
            "in_channels": 48,
            "out_channels": 48,
            "ffn_dim": 14336,
            "num_layers": 30,
        },
        "t2v-1.3b": {"num_attention_heads": 12, "ffn_dim": 8960, "num_layers": 30},
    }

    def sites(self, model: Any) -> list[Site]:
        return [
            Site(
                f"blocks.{i}",
                block,
                run_block,
                ("hidden_states",),
                returns="hidden_states",
                by_token={"temb": 4},
                modulated=modulated,
            )
            for i, block in enumerate(model.blocks)
        ]

    def relies_on(self, model: Any) -> list[Reliance]:
        found = []
        for i, block in enumerate(model.blocks):
            name = f"blocks.{i}"
            found += rely_on_attention(
                f"{name}.attn1", block.attn1, ("WanAttention",), "WanAttnProcessor"
            )
            found.append(Reliance(name, block, ("WanTransformerBlock",), BLOCK))
        return found

    def check(self, model: Any) -> None:
        super().check(model)
        for i, block in enumerate(model.blocks):
            if getattr(block.attn1, "fused_projections", False):
                raise NotImplementedError(
                    f"blocks.{i}.attn1 has fused projections, which an accelerated model does not "
                    "use; call transformer.unfuse_qkv_projections() first"
                )

    def geometry(self, model: Any, arguments: Mapping[str, Any]) -> Geometry:
        sizes = zip(arguments["hidden_states"].shape[2:], model.config.patch_size, strict=True)
        frames, height, width = (size // patch for size, patch in sizes)
        return Geometry((frames, height, width))

    def tiny(self) -> tuple[nn.Module, Mapping[str, Any]]:
        return self.build("tiny"), {
            "hidden_states": torch.randn(2, 4, 5, 18, 14),
            "timestep": torch.full((2,), 500.0),
            "encoder_hidden_states": torch.randn(2, 77, 24),
        }


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
    block: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor, rotary_emb: Any
) -> Tensor:
    """Tokens of the video after the first norm and modulation of a block."""
    shift, scale, *_ = _modulation(block, temb)
    return _modulate(block.norm1, hidden_states, scale, shift, None)


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
    """RoPE tables ``[1, S, 1, D]``, lowered with the model maybe, as the kernels take them."""
    return pack_rope(cos[0, :, 0].float(), sin[0, :, 0].float())
