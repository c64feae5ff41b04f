"""BriaTransformer2DModel: Bria's text to image. Blocks as FLUX's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import nn

from flashomni.models import adapter
from flashomni.models.blocks import MMDiT
from flashomni.models.flux import Flux

TINY = {k: v for k, v in Flux.sizes["tiny"].items() if not k.startswith(("pooled", "guidance"))}


@adapter("BriaTransformer2DModel")
class Bria(Flux):
    blocks: ClassVar = MMDiT(
        dual_class="BriaTransformerBlock",
        single_class="BriaSingleTransformerBlock",
        attention=("BriaAttention", "BriaAttnProcessor"),
        refused="attention_kwargs",
        clip=True,
    )
    # What is added to its single blocks begins past the length of the text.
    reorders: ClassVar = False
    sizes: ClassVar = {"tiny": TINY}

    def tiny(self) -> tuple[nn.Module, Mapping[str, Any]]:
        model, inputs = super().tiny()
        left_out = ("pooled_projections", "guidance")
        return model, {name: each for name, each in inputs.items() if name not in left_out}
