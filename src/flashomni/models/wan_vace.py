"""WanVACETransformer3DModel: Wan VACE, videos made and edited under control.

The control tokens run through blocks of their own first. Behind each of them a projection of its
tokens is a hint, which the model adds behind one of Wan's blocks. A control block that is cached
whole makes its hint of the tokens that the forecast gives.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flashomni.engine import LayerRun
from flashomni.models import Site, adapter
from flashomni.models.blocks.wan import modulated, run_block
from flashomni.models.wan import Wan

TINY, PUBLISHED = Wan.sizes["tiny"], Wan.sizes["published"]
CONTROL = "control_hidden_states"


@adapter("WanVACETransformer3DModel")
class WanVACE(Wan):
    reorders: ClassVar = False
    sizes: ClassVar = {
        "tiny": {**TINY, "num_layers": 2, "vace_layers": [0, 1], "vace_in_channels": 6},
        "published": PUBLISHED,
    }

    def sites(self, model: Any) -> list[Site]:
        control = [
            Site(
                f"vace_blocks.{i}",
                block,
                run_control,
                (CONTROL,),
                returns=("hint", CONTROL),
                derived={"hint": _hint},
                chain=False,  # each of them gives a hint
                modulated=modulated_control,
            )
            for i, block in enumerate(model.vace_blocks)
        ]
        return control + super().sites(model)

    def parts(self, model: Any) -> list[tuple[str, Any, str]]:
        control = enumerate(model.vace_blocks)
        named = [(f"vace_blocks.{i}", block, "WanVACETransformerBlock") for i, block in control]
        return named + super().parts(model)

    def tiny(self) -> tuple[nn.Module, Mapping[str, Any]]:
        model, inputs = super().tiny()
        return model, {**inputs, CONTROL: torch.randn(2, 6, 5, 18, 14)}


def run_control(
    run: LayerRun,
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    control_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: tuple[Tensor, Tensor],
) -> tuple[None, Tensor]:
    """A block of the control tokens; its hint is derived."""
    if block.proj_in is not None:
        run.count("mlp", (block.proj_in,), hidden_states.shape[0] * hidden_states.shape[1])
    x = _entered(block, hidden_states, control_hidden_states)
    return None, run_block(run, block, x, encoder_hidden_states, temb, rotary_emb)


def modulated_control(
    block: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor,
    control_hidden_states: Tensor,
    temb: Tensor,
    rotary_emb: Any,
    *,
    backend: str | None = None,
) -> Tensor:
    """Control tokens after the first norm and modulation of a block."""
    x = _entered(block, hidden_states, control_hidden_states)
    return modulated(block, x, encoder_hidden_states, temb, rotary_emb, backend=backend)


def _entered(block: Any, x: Tensor, control: Tensor) -> Tensor:
    """What the block starts from: the first of them adds the tokens of the video."""
    return control if block.proj_in is None else block.proj_in(control) + x


def _hint(block: Any, control: Tensor) -> Tensor | None:
    return None if block.proj_out is None else block.proj_out(control)
