"""QwenImageTransformer2DModel: Qwen-Image, its Edit and Edit-Plus, and Layered.

Pictures that are given are vision tokens behind those that are generated (in Layered, behind those
of all layers); since Edit-Plus 2511 they may be modulated for timestep 0, token by token.

Dual-stream blocks only. Diffusers puts the text first, and its padding in the middle of the
sequence. Attention does not mind the order of its tokens, so here the text comes last, and its
keys and values are sorted, valid ones first: whatever the mask, padding is then at the end of the
keys, and ``kv_len`` says what the stock mask says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flashomni.engine import LayerRun
from flashomni.kernels.common.rope import Rope
from flashomni.models import Geometry, adapter
from flashomni.models.blocks import (
    TEXT,
    VISION,
    Inputs,
    MMDiT,
    MMDiTAdapter,
    added_stream,
    dual_attention,
    feed_forward,
    own_stream,
)
from flashomni.models.blocks.positions import of_image_shapes, rope_in_order

MASK = "encoder_hidden_states_mask"
GIVEN, EXTRA = "attention_kwargs", "joint_attention_kwargs"  # of the model, and of its blocks


class QwenBlocks(MMDiT):
    """Modulation by Linears of the block itself; RoPE tables are complex, one for each stream."""

    def dual(self, run: LayerRun, block: Any, inputs: Inputs) -> tuple[Tensor, ...]:
        inputs = _with_text_mask(run, inputs)
        x, c, temb = inputs.x, inputs.c, inputs.rest["temb"]
        modulate_index = inputs.rest.get("modulate_index")
        vision, text = self.begin(run, inputs)
        mod_x, mod_x2 = block.img_mod(temb).chunk(2, dim=-1)
        if block.zero_cond_t:
            temb = temb.chunk(2, dim=0)[0]
        mod_c, mod_c2 = block.txt_mod(temb).chunk(2, dim=-1)
        norm_x, gate = block._modulate(block.img_norm1(x), mod_x, modulate_index)
        norm_c, c_gate = block._modulate(block.txt_norm1(c), mod_c)

        angles = inputs.rest["image_rotary_emb"]
        rope, c_rope = (run.shared(_real_tables, table) for table in angles)
        rope, c_rope = rope_in_order(run, rope, stream=VISION), _of_text(run, c_rope)
        y, c_y = dual_attention(
            run,
            block.attn,
            own_stream(block.attn, norm_x, vision, rope),
            added_stream(block.attn, norm_c, text, c_rope, self.order(run, inputs)),
        )
        x, c = x + gate * y, c + c_gate * c_y
        norm_x, gate = block._modulate(block.img_norm2(x), mod_x2, modulate_index)
        norm_c, c_gate = block._modulate(block.txt_norm2(c), mod_c2)
        x = x + gate * feed_forward(run, block.img_mlp, norm_x)
        c = c + c_gate * feed_forward(run, block.txt_mlp, norm_c)
        return self._clipped(c), self._clipped(x)

    def modulated(self, block: Any, inputs: Inputs, backend: str | None) -> Tensor:
        mod, _ = block.img_mod(inputs.rest["temb"]).chunk(2, dim=-1)
        index = inputs.rest.get("modulate_index")
        return block._modulate(block.img_norm1(inputs.x), mod, index)[0]


@adapter("QwenImageTransformer2DModel")
class QwenImage(MMDiTAdapter):
    blocks: ClassVar = QwenBlocks(
        dual_class="QwenImageTransformerBlock",
        attention=("Attention", "QwenDoubleStreamAttnProcessor2_0"),
        text="last",
        mask=MASK,
        unsorted=True,
        by_token={"modulate_index": 2},
        clip=True,
    )
    reorders: ClassVar = True
    residuals: ClassVar = ("controlnet_block_samples",)
    exit: ClassVar = "norm_out"
    sizes: ClassVar = {
        "tiny": {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 3,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 24,
            "axes_dims_rope": (4, 6, 6),
        },
        "published": {
            "in_channels": 64,
            "out_channels": 16,
            "num_layers": 60,
            "attention_head_dim": 128,
            "num_attention_heads": 24,
            "joint_attention_dim": 3584,
            "axes_dims_rope": (16, 56, 56),
        },
    }

    def geometry(self, model: nn.Module, arguments: Mapping[str, Any]) -> Geometry:
        layered = getattr(model.config, "use_layer3d_rope", False)
        return of_image_shapes(arguments.get("img_shapes"), layered=layered)

    def tiny(self) -> tuple[nn.Module, Mapping[str, Any]]:
        height, width = 18, 19
        text = torch.arange(77) < torch.tensor([[77], [30]])
        return self.build("tiny"), {
            "hidden_states": torch.randn(2, height * width, 16),
            "encoder_hidden_states": torch.randn(2, 77, 24),
            "encoder_hidden_states_mask": text,
            "timestep": torch.full((2,), 0.5),
            "img_shapes": [[(1, height, width)]] * 2,
        }


def _with_text_mask(run: LayerRun, inputs: Inputs) -> Inputs:
    """The text's mask as diffusers gives it since 0.39.

    Before, the model joined it to one of all keys, which its blocks got as an ``attention_mask``.
    One that the user gives is left where it is, and refused.
    """
    extra = inputs.rest.get(EXTRA) or {}
    if "attention_mask" not in extra or "attention_mask" in (run.inputs.get(GIVEN) or {}):
        return inputs
    others = {name: value for name, value in extra.items() if name != "attention_mask"}
    mask = run.shared(_as_bool, run.inputs[MASK])
    return replace(inputs, rest={**inputs.rest, EXTRA: others, MASK: mask})


def _as_bool(mask: Tensor) -> Tensor:
    return mask.bool()


def _of_text(run: LayerRun, rope: Rope) -> Rope:
    """Rows of the text that the block has."""
    cos, sin = run.own(TEXT, *rope)
    return cos, sin


def _real_tables(angles: Tensor) -> Rope:
    """Complex ``[R, D / 2]`` -> ``(cos, sin)`` fp32 ``[R, D / 2]``, side by side as they are."""
    return angles.real, angles.imag
