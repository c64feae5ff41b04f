"""SkyReelsV2Transformer3DModel: SkyReels V2, with diffusion forcing too. Blocks as Wan's.

Frames may have timesteps of their own; blocks that see only what came before are refused.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from flashomni.engine import LayerRun
from flashomni.models import adapter
from flashomni.models.blocks.wan import modulated, run_block
from flashomni.models.wan import Wan

TINY, PUBLISHED = Wan.sizes["tiny"], Wan.sizes["published"]


@adapter("SkyReelsV2Transformer3DModel")
class SkyReelsV2(Wan):
    block: ClassVar = "SkyReelsV2TransformerBlock"
    attention: ClassVar = ("SkyReelsV2Attention", "SkyReelsV2AttnProcessor")
    reorders: ClassVar = False
    sizes: ClassVar = {"tiny": TINY, "published": PUBLISHED}

    def check(self, model: Any) -> None:
        super().check(model)
        if model.config.num_frame_per_block > 1:
            raise NotImplementedError(
                f"SkyReels V2 with num_frame_per_block={model.config.num_frame_per_block} is not "
                "supported: its blocks of frames see only earlier ones, by a mask; 1 is"
            )

    @staticmethod
    def run(
        run: LayerRun,
        block: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """A block: as Wan's, with tokens behind the six parts of ``temb [B, 6, S, K]``."""
        if attention_mask is not None:
            raise NotImplementedError("a mask of the video's own tokens is not supported")
        temb = temb.transpose(1, 2) if temb.ndim == 4 else temb
        return run_block(run, block, hidden_states, encoder_hidden_states, temb, rotary_emb)

    @staticmethod
    def modulated(
        block: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        temb: Tensor,
        rotary_emb: Any,
        attention_mask: Tensor | None = None,
        *,
        backend: str | None = None,
    ) -> Tensor:
        """Tokens of the video after the first norm and modulation of a block."""
        temb = temb.transpose(1, 2) if temb.ndim == 4 else temb
        return modulated(
            block, hidden_states, encoder_hidden_states, temb, rotary_emb, backend=backend
        )
