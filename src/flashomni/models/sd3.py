"""SD3Transformer2DModel: Stable Diffusion 3 and 3.5.

Dual-stream blocks without RoPE, text last. The first blocks of 3.5 medium attend twice: to text and
picture, and of the picture to itself alone; each attention has tiles of its own. The last block
reads the text and returns none.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from flashomni.engine import LayerRun
from flashomni.engine.linear import is_hooked, is_stock
from flashomni.kernels.elementwise.op import gated_residual
from flashomni.models import Geometry, Reliance, Site, adapter
from flashomni.models.blocks import (
    VISION,
    Inputs,
    MMDiT,
    MMDiTAdapter,
    Stream,
    adaptive_norm,
    added_stream,
    dual_attention,
    feed_forward,
    joint_attention,
    modulate,
    own_stream,
    rely_on_attention,
    residual_norm,
)


class Modulated(NamedTuple):
    """The picture's tokens in front of the attentions, and the rest of their modulation."""

    x: Tensor
    gate: Tensor
    mlp_shift: Tensor
    mlp_scale: Tensor
    mlp_gate: Tensor
    second: Tensor | None = None
    second_gate: Tensor | None = None


class SD3Blocks(MMDiT):
    """A block may have a second attention, and the last one gives no text."""

    def sites(self, model: Any) -> list[Site]:
        found = super().sites(model)
        return [
            replace(site, streams=(VISION,), returns=(None, VISION))
            if site.block.context_pre_only
            else site
            for site in found
        ]

    def relies_on(self, model: Any) -> list[Reliance]:
        found = super().relies_on(model)
        attention, processor = self.attention
        for i, block in enumerate(model.transformer_blocks):
            if block.attn2 is not None:
                name = f"transformer_blocks.{i}.attn2"
                found += rely_on_attention(name, block.attn2, (attention,), processor)
        return found

    def dual(self, run: LayerRun, block: Any, inputs: Inputs) -> tuple[Any, ...]:
        x, c, temb, backend = inputs.x, inputs.c, inputs.rest["temb"], run.backend
        vision, text = self.begin(run, inputs)
        mod = _modulated(block.norm1, x, temb, backend)
        stream = own_stream(block.attn, mod.x, vision, None)
        if block.context_pre_only:
            norm_c = block.norm1_context(c, temb)
            y = self._picture_alone(
                run, block.attn, stream, added_stream(block.attn, norm_c, text, None)
            )
        else:
            norm_c, c_gate, c_shift, c_scale, c_gate_mlp = adaptive_norm(
                block.norm1_context, c, temb, backend=backend
            )
            y, c_y = dual_attention(
                run, block.attn, stream, added_stream(block.attn, norm_c, text, None)
            )

        if mod.second is None or mod.second_gate is None:
            x, norm_x = residual_norm(
                x, y, mod.gate, block.norm2, mod.mlp_scale, mod.mlp_shift, backend=backend
            )
        else:
            x = gated_residual(x, y, mod.gate, backend=backend)
            y = self._second(run, block.attn2, mod.second)
            x, norm_x = residual_norm(
                x, y, mod.second_gate, block.norm2, mod.mlp_scale, mod.mlp_shift, backend=backend
            )
        x = gated_residual(x, feed_forward(run, block.ff, norm_x), mod.mlp_gate, backend=backend)
        if block.context_pre_only:
            return None, x
        c, norm_c = residual_norm(
            c, c_y, c_gate, block.norm2_context, c_scale, c_shift, backend=backend
        )
        y = feed_forward(run, block.ff_context, norm_c)
        return gated_residual(c, y, c_gate_mlp, backend=backend), x

    def modulated(self, block: Any, inputs: Inputs, backend: str | None) -> Tensor:
        return _modulated(block.norm1, inputs.x, inputs.rest["temb"], backend).x

    def _picture_alone(self, run: LayerRun, attn: Any, vision: Stream, text: Stream) -> Tensor:
        """The picture's part of the joint attention, where nobody reads the text's."""
        to_out, dropout = attn.to_out
        o = joint_attention(run, attn, [vision, text], to_out)
        return dropout(run.project_o(o[:, slice(*vision.span)], to_out, row_offset=0))

    def _second(self, run: LayerRun, attn: Any, x: Tensor) -> Tensor:
        """The picture's attention to itself."""
        other, (to_out, dropout) = run.second(VISION), attn.to_out
        place = {} if run.geometry is None else run.geometry.place(0, x.shape[1])
        other.begin(x.shape[1], **place)
        stream = own_stream(attn, x, (0, x.shape[1]), None)
        o = joint_attention(other, attn, [stream], to_out)
        return dropout(other.project_o(o, to_out, row_offset=0))


@adapter("SD3Transformer2DModel")
class SD3(MMDiTAdapter):
    blocks: ClassVar = SD3Blocks(
        dual_class="JointTransformerBlock",
        attention=("Attention", "JointAttnProcessor2_0"),
        text="last",
    )
    reorders: ClassVar = True
    residuals: ClassVar[tuple[str, ...]] = ("block_controlnet_hidden_states",)
    exit: ClassVar = "norm_out"
    sizes: ClassVar = {
        "tiny": {
            "sample_size": 48,
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 24,
            "caption_projection_dim": 48,
            "pooled_projection_dim": 20,
            "pos_embed_max_size": 24,
            "dual_attention_layers": (0, 1),
            "qk_norm": "rms_norm",
        },
        "published": {  # 3.5 large
            "num_layers": 38,
            "num_attention_heads": 38,
            "caption_projection_dim": 2432,
            "pos_embed_max_size": 192,
            "qk_norm": "rms_norm",
        },
        "medium": {  # 3.5
            "num_layers": 24,
            "num_attention_heads": 24,
            "caption_projection_dim": 1536,
            "pos_embed_max_size": 384,
            "dual_attention_layers": tuple(range(13)),
            "qk_norm": "rms_norm",
        },
    }

    def check(self, model: Any) -> None:
        super().check(model)
        for i, block in enumerate(model.transformer_blocks):
            if block._chunk_size is not None:
                raise NotImplementedError(
                    f"transformer_blocks.{i} runs its MLP in chunks, which an accelerated model "
                    "does not; call transformer.disable_forward_chunking() first"
                )

    def geometry(self, model: Any, arguments: Mapping[str, Any]) -> Geometry:
        height, width = arguments["hidden_states"].shape[2:]
        patch = model.config.patch_size
        return Geometry((1, height // patch, width // patch))

    def tiny(self) -> tuple[nn.Module, Mapping[str, Any]]:
        return self.build("tiny"), {
            "hidden_states": torch.randn(2, 4, 36, 38),
            "encoder_hidden_states": torch.randn(2, 77, 24),
            "pooled_projections": torch.randn(2, 20),
            "timestep": torch.full((2,), 500.0),
        }


def _modulated(norm: Any, x: Tensor, temb: Tensor, backend: str | None) -> Modulated:
    """``norm(x, emb=temb)``, with a second result or without."""
    if not is_stock(norm, "SD35AdaLayerNormZeroX"):
        x, gate, mlp_shift, mlp_scale, mlp_gate = adaptive_norm(norm, x, temb, backend=backend)
        return Modulated(x, gate, mlp_shift, mlp_scale, mlp_gate)
    if is_hooked(norm):
        return Modulated(*norm(x, emb=temb))
    parts = norm.linear(norm.silu(temb)).chunk(9, dim=1)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate, shift_2, scale_2, gate_2 = parts
    first = modulate(norm.norm, x, scale, shift, backend=backend)
    second = modulate(norm.norm, x, scale_2, shift_2, backend=backend)
    return Modulated(first, gate, mlp_shift, mlp_scale, mlp_gate, second, gate_2)
