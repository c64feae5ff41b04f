"""Flux2Transformer2DModel: FLUX.2 dev and klein.

Blocks as FLUX's, with three differences. All blocks share their modulation, which the model makes
once a call. MLPs are gated. A single block gets text and vision as one sequence, text first, and
has one Linear for queries, keys, values and the MLP, and one for both outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flashomni.engine import LayerRun
from flashomni.engine.linear import Projection, split_linear
from flashomni.kernels.elementwise.op import gated_residual
from flashomni.models import Geometry, adapter
from flashomni.models.blocks import (
    TEXT,
    VISION,
    Inputs,
    Later,
    MMDiT,
    MMDiTAdapter,
    Stream,
    added_stream,
    dual_attention,
    feed_forward,
    joint_attention,
    modulate,
    own_stream,
    residual_norm,
)
from flashomni.models.blocks.positions import of_position_ids


class Flux2Blocks(MMDiT):
    """Modulation comes ready-made; a single block has one projection in and one out."""

    def dual(self, run: LayerRun, block: Any, inputs: Inputs) -> tuple[Tensor, ...]:
        x, c, backend = inputs.x, inputs.c, run.backend
        vision, text = self.begin(run, inputs)
        shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = run.shared(
            _modulation, inputs.rest["temb_mod_img"], 6, x.shape[0]
        )
        c_shift, c_scale, c_gate, c_mlp_shift, c_mlp_scale, c_mlp_gate = run.shared(
            _modulation, inputs.rest["temb_mod_txt"], 6, x.shape[0]
        )
        rope, c_rope = self.ropes(run, inputs, vision, text)
        norm_x = modulate(block.norm1, x, scale, shift, backend=backend)
        norm_c = modulate(block.norm1_context, c, c_scale, c_shift, backend=backend)
        y, c_y = dual_attention(
            run,
            block.attn,
            own_stream(block.attn, norm_x, vision, rope),
            added_stream(block.attn, norm_c, text, c_rope),
        )
        x, norm_x = residual_norm(x, y, gate, block.norm2, mlp_scale, mlp_shift, backend=backend)
        x = gated_residual(x, feed_forward(run, block.ff, norm_x), mlp_gate, backend=backend)
        c, norm_c = residual_norm(
            c, c_y, c_gate, block.norm2_context, c_mlp_scale, c_mlp_shift, backend=backend
        )
        y = feed_forward(run, block.ff_context, norm_c)
        c = gated_residual(c, y, c_mlp_gate, backend=backend)
        return self._clipped(c), x

    def modulated(self, block: Any, inputs: Inputs, backend: str | None) -> Tensor:
        mod = inputs.rest["temb_mod_img"]
        shift, scale, *_ = _modulation(mod, 6, inputs.x.shape[0])
        return modulate(block.norm1, inputs.x, scale, shift, backend=backend)

    def single(self, run: LayerRun, block: Any, inputs: Inputs) -> Any:
        self.refuse_extra(inputs)
        if inputs.c is not None or inputs.rest.get("split_hidden_states"):
            raise NotImplementedError(
                "single blocks that get text and vision apart are not supported by an accelerated "
                "model; only diffusers' own forward of Flux2Transformer2DModel is"
            )
        x, attn = inputs.x, block.attn
        batch, seqlen, _ = x.shape
        num_text = run.tokens_of(TEXT)
        place = {} if run.geometry is None else run.geometry.place(num_text, seqlen - num_text)
        run.begin(seqlen, text=(0, num_text), **place)
        shift, scale, gate = run.shared(_modulation, inputs.rest["temb_mod"], 3, batch)
        norm_x = modulate(block.norm, x, scale, shift, backend=run.backend)

        sizes = [attn.inner_dim] * 3 + [attn.mlp_hidden_dim * attn.mlp_mult_factor]
        to_q, to_k, to_v, mlp_in = split_linear(attn.to_qkv_mlp_proj, norm_x, sizes)
        run.count("mlp", (mlp_in,), batch * seqlen)
        mlp = Later(partial(_up, attn, mlp_in, norm_x))
        tables = self._tables(run, inputs, (num_text, seqlen))
        stream = Stream(norm_x, (0, seqlen), to_q, to_k, to_v, attn.norm_q, attn.norm_k, tables)
        o = joint_attention(run, attn, [stream], attn.to_out, meanwhile=mlp)
        y = run.project_o(o, attn.to_out, row_offset=0, always=mlp.take())
        return self._clipped(gated_residual(x, y, gate, backend=run.backend))


@adapter("Flux2Transformer2DModel")
class Flux2(MMDiTAdapter):
    blocks: ClassVar = Flux2Blocks(
        dual_class="Flux2TransformerBlock",
        single_class="Flux2SingleTransformerBlock",
        attention=("Flux2Attention", "Flux2AttnProcessor"),
        single_attention=("Flux2ParallelSelfAttention", "Flux2ParallelSelfAttnProcessor"),
        joined=True,
        clip=True,
    )
    reorders: ClassVar = True
    parallel: ClassVar[tuple[str, ...]] = (TEXT, VISION)
    sizes: ClassVar = {
        "tiny": {
            "in_channels": 16,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 3,
            "joint_attention_dim": 24,
            "timestep_guidance_channels": 32,
            "axes_dims_rope": (4, 4, 4, 4),
        },
        # Everything that they do not say is diffusers' default, that of FLUX.2 dev.
        "published": {},
        "klein-4b": {
            "num_layers": 5,
            "num_single_layers": 20,
            "num_attention_heads": 24,
            "joint_attention_dim": 7680,
            "guidance_embeds": False,
        },
        "klein-9b": {
            "num_layers": 8,
            "num_single_layers": 24,
            "num_attention_heads": 32,
            "joint_attention_dim": 12288,
            "guidance_embeds": False,
        },
    }

    def variant(self, model: Any) -> str:
        keeps = any("KV" in type(b.attn.processor).__name__ for b in model.transformer_blocks)
        return "attention that keeps keys of reference images (FLUX.2 klein KV)" if keeps else ""

    def geometry(self, model: nn.Module, arguments: Mapping[str, Any]) -> Geometry:
        return of_position_ids(arguments.get("img_ids"))

    def tiny(self) -> tuple[nn.Module, Mapping[str, Any]]:
        height, width, text = 18, 19, 77
        rows, columns, one = torch.arange(height), torch.arange(width), torch.arange(1)
        return self.build("tiny"), {
            "hidden_states": torch.randn(2, height * width, 16),
            "encoder_hidden_states": torch.randn(2, text, 24),
            "timestep": torch.full((2,), 0.5),
            "img_ids": torch.cartesian_prod(one, rows, columns, one).float(),
            "txt_ids": torch.cartesian_prod(one, one, one, torch.arange(text)).float(),
            "guidance": torch.full((2,), 3.5),
        }


def _up(attn: Any, mlp_in: Projection, x: Tensor) -> Tensor:
    return attn.mlp_act_fn(mlp_in(x))


def _modulation(mod: Tensor, count: int, batch: int) -> tuple[Tensor, ...]:
    """Shift, scale and gate, ``count`` in all: ``[B, K]`` each of ``[B or 1, count * K]``.

    Raises:
        NotImplementedError: each token has its own (a reference image whose keys are kept).
    """
    if mod.ndim == 3 and mod.shape[1] == 1:
        mod = mod[:, 0]
    if mod.ndim != 2:
        raise NotImplementedError(
            "FLUX.2 with modulation for each token (kv_cache_mode='extract') is not supported by "
            "an accelerated model; leave the KV cache out, or call engine.remove()"
        )
    return mod.expand(batch, -1).chunk(count, dim=-1)
