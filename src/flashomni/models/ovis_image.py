"""OvisImageTransformer2DModel: Ovis-Image. Blocks as FLUX's, with gated MLPs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from flashomni.engine import LayerRun
from flashomni.models import adapter
from flashomni.models.blocks import MMDiT
from flashomni.models.flux import Flux

TINY = {k: v for k, v in Flux.sizes["tiny"].items() if not k.startswith(("pooled", "guidance"))}


class OvisBlocks(MMDiT):
    """The MLP of a single block is gated, by the second half of what ``proj_mlp`` gives."""

    def up(self, run: LayerRun, block: Any, x: Tensor) -> Tensor:
        run.count("mlp", (block.proj_mlp,), x.shape[0] * x.shape[1])
        hidden, gate = block.proj_mlp(x).chunk(2, dim=-1)
        return block.act_mlp(gate) * hidden


@adapter("OvisImageTransformer2DModel")
class OvisImage(Flux):
    blocks: ClassVar = OvisBlocks(
        dual_class="OvisImageTransformerBlock",
        single_class="OvisImageSingleTransformerBlock",
        attention=("OvisImageAttention", "OvisImageAttnProcessor"),
        clip=True,
    )
    residuals: ClassVar = ()
    exit: ClassVar = ""
    sizes: ClassVar = {
        "tiny": {**TINY, "out_channels": 16},
        "published": {},  # diffusers' defaults
    }

    def tiny(self) -> tuple[nn.Module, Mapping[str, Any]]:
        model, inputs = super().tiny()
        left_out = ("pooled_projections", "guidance")
        return model, {name: each for name, each in inputs.items() if name not in left_out}
