"""Blocks whose text and vision have streams of their own, but share projections and MLP.

Both streams go through the same Linears, each in a call of its own: nothing is joined. Norms of
queries and keys are LayerNorms, so queries are projected whole; RoPE is for vision only.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from flashomni.engine import LayerRun
from flashomni.kernels.common.rope import Rope, pack_rope
from flashomni.models import Reliance
from flashomni.models._relies import BLOCK, rely_on_attention
from flashomni.models.blocks.joint import joint_attention, own_stream
from flashomni.models.blocks.mmdit import VISION, Inputs, MMDiT, Span
from flashomni.models.blocks.positions import rope_in_order


class SharedBlocks(MMDiT):
    """Blocks with ``attn1`` over both streams.

    Attributes:
        rope_layout: of the model's tables.
    """

    rope_layout = "interleaved"

    def relies_on(self, model: Any) -> list[Reliance]:
        found, (attention, processor) = [], self.attention
        for i, block in enumerate(model.transformer_blocks):
            name = f"transformer_blocks.{i}"
            found += rely_on_attention(f"{name}.attn1", block.attn1, (attention,), processor)
            found.append(Reliance(name, block, (self.dual_class,), BLOCK))
        return found

    def modulated(self, block: Any, inputs: Inputs, backend: str | None) -> Tensor:
        return block.norm1(inputs.x, inputs.c, inputs.rest["temb"])[0]

    def attention_of(
        self, run: LayerRun, attn: Any, x: Tensor, c: Tensor, inputs: Inputs
    ) -> tuple[Tensor, Tensor]:
        """Attention of both streams together, ``(vision [B, R, N], text [B, R', N])``.

        Args:
            run: of the block.
            attn: whose projections both streams share.
            x: vision ``[B, R, K]``, after norm and modulation.
            c: text ``[B, R', K]``, likewise.
            inputs: of the block.
        """
        vision, text = self.begin(run, inputs)
        rope = self._vision_tables(run, inputs, vision)
        to_out, dropout = attn.to_out
        streams = [
            own_stream(attn, x, vision, rope, rope_layout=self.rope_layout),
            own_stream(attn, c, text, None),
        ]
        o = joint_attention(run, attn, streams, to_out)
        y = run.project_o(o[:, slice(*vision)], to_out, row_offset=vision[0])
        context = o[:, slice(*text)].flatten(2)
        run.count("qkv", (to_out,), context.shape[0] * context.shape[1])
        return dropout(y), dropout(to_out(context))

    def _vision_tables(self, run: LayerRun, inputs: Inputs, vision: Span) -> Rope | None:
        tables = inputs.rest.get(self.rope[0])
        if tables is None:
            return None
        if len(tables) != 2:
            raise NotImplementedError(
                f"{self.rope[0]} with tables for each item of the batch is not supported by an "
                "accelerated model; give one pair for all, or call engine.remove()"
            )
        where = str(inputs.x.device)  # a value: ``shared`` tells other objects apart by identity
        packed = run.shared(_packed, *tables, self.rope_layout, where)
        return rope_in_order(run, packed, stream=VISION)


def _packed(cos: Tensor, sin: Tensor, layout: str, device: str) -> Rope:
    """Tables where the blocks are: CogView4 makes them on the host, its processor moves them."""
    return pack_rope(cos.to(device), sin.to(device), layout)
