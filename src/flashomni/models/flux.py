"""FluxTransformer2DModel: FLUX.1 dev, schnell, Kontext, Fill and what else shares the class.

Text comes first. Dual blocks project text and vision apart; single blocks run one sequence, and
fuse the output projections of attention and MLP into one ``proj_out`` over both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flashomni.engine import Engine, LayerRun
from flashomni.kernels.gemm_q import Rope
from flashomni.models import Adapter, Site, adapter
from flashomni.models._mmdit import (
    added_stream,
    dual_and_single,
    dual_attention,
    feed_forward,
    joint_attention,
    own_stream,
    require_processor,
    split_rope,
    step_rope,
)
from flashomni.symbols import Grid


@adapter("FluxTransformer2DModel")
class Flux(Adapter):
    def sites(self, model: Any) -> list[Site]:
        return dual_and_single(model, run_dual, run_single)

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


def _begin(
    engine: Engine, index: int, vision: Tensor, text: Tensor, attention_kwargs: Any
) -> LayerRun:
    if attention_kwargs:
        raise NotImplementedError(
            f"joint_attention_kwargs {sorted(attention_kwargs)} are not supported by an "
            "accelerated FLUX; leave them out, or call engine.remove()"
        )
    num_text = text.shape[1]
    seqlen = num_text + vision.shape[1]
    recipe = engine.recipe
    grid = Grid(seqlen, seqlen, (0, num_text), recipe.block_m, recipe.block_n)
    return engine.layer(index, grid, vision)


def run_dual(
    engine: Engine,
    index: int,
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Rope,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """A ``FluxTransformerBlock``: ``(text, vision)`` streams."""
    x, c = hidden_states, encoder_hidden_states
    run = _begin(engine, index, x, c, joint_attention_kwargs)
    norm_x, gate, shift_mlp, scale_mlp, gate_mlp = block.norm1(x, emb=temb)
    norm_c, c_gate, c_shift, c_scale, c_gate_mlp = block.norm1_context(c, emb=temb)

    def attention() -> tuple[Tensor, Tensor]:
        text, vision = run.grid.text, run.grid.vision
        rope = step_rope(engine, image_rotary_emb)
        return dual_attention(
            run,
            block.attn,
            own_stream(block.attn, norm_x, vision, split_rope(rope, *vision)),
            added_stream(block.attn, norm_c, text, split_rope(rope, *text)),
        )

    y, c_y = run.reuse("attention", attention)
    x = x + gate.unsqueeze(1) * y
    norm_x = block.norm2(x) * (1 + scale_mlp[:, None]) + shift_mlp[:, None]
    x = x + gate_mlp.unsqueeze(1) * feed_forward(run, "mlp", block.ff, norm_x)

    c = c + c_gate.unsqueeze(1) * c_y
    norm_c = block.norm2_context(c) * (1 + c_scale[:, None]) + c_shift[:, None]
    c = c + c_gate_mlp.unsqueeze(1) * feed_forward(run, "mlp_text", block.ff_context, norm_c)
    return _clip(c), x


def run_single(
    engine: Engine,
    index: int,
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    temb: Tensor,
    image_rotary_emb: Rope,
    joint_attention_kwargs: dict[str, Any] | None = None,
) -> tuple[Tensor, Tensor]:
    """A ``FluxSingleTransformerBlock``: one sequence, split again at the end."""
    num_text = encoder_hidden_states.shape[1]
    run = _begin(engine, index, hidden_states, encoder_hidden_states, joint_attention_kwargs)
    x = torch.cat([encoder_hidden_states, hidden_states], dim=1)
    norm_x, gate = block.norm(x, emb=temb)

    def body() -> tuple[Tensor]:
        mlp = block.act_mlp(block.proj_mlp(norm_x))
        run.count("mlp", (block.proj_mlp,), x.shape[0] * x.shape[1])
        rope = step_rope(engine, image_rotary_emb)
        whole = own_stream(block.attn, norm_x, (0, x.shape[1]), rope)
        o = joint_attention(run, block.attn, [whole], block.proj_out)
        return (run.project_o(o, block.proj_out, row_offset=0, always=mlp),)

    (y,) = run.reuse("block", body)
    x = _clip(x + gate.unsqueeze(1) * y)
    return x[:, :num_text], x[:, num_text:]


def _clip(x: Tensor) -> Tensor:
    """FLUX overflows fp16 otherwise; the stock blocks clip as well."""
    return x.clip(-65504, 65504) if x.dtype == torch.float16 else x
