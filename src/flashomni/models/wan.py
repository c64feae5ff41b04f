"""WanTransformer3DModel: Wan 2.1 and 2.2, text, image and text with image to video.

Blocks have one stream: attention of the video to itself, then to the text (and, in Wan 2.1 I2V, to
an image). In TI2V each token has its own timestep.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import nn

from flashomni.models import Adapter, Geometry, Reliance, Site, adapter
from flashomni.models._relies import BLOCK, rely_on_attention
from flashomni.models.blocks.wan import modulated, run_block


@adapter("WanTransformer3DModel")
class Wan(Adapter):
    """Wan, and what its relatives change.

    Attributes:
        block: class of their blocks.
        attention: class of the attention, and of its processor.
        run: runs a block.
        modulated: gives what schedules look at.
    """

    block: ClassVar = "WanTransformerBlock"
    attention: ClassVar = ("WanAttention", "WanAttnProcessor")
    run: ClassVar = staticmethod(run_block)
    modulated: ClassVar = staticmethod(modulated)
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
                self.run,
                ("hidden_states",),
                returns="hidden_states",
                by_token={"temb": 4} if self.reorders else {},
                modulated=self.modulated,
                sequence=("hidden_states",) if self.reorders else (),
            )
            for i, block in enumerate(model.blocks)
        ]

    def relies_on(self, model: Any) -> list[Reliance]:
        found = []
        attention, processor = self.attention
        for name, block, block_class in self.parts(model):
            found += rely_on_attention(f"{name}.attn1", block.attn1, (attention,), processor)
            found.append(Reliance(name, block, (block_class,), BLOCK))
        return found

    def parts(self, model: Any) -> list[tuple[str, Any, str]]:
        """All blocks that are taken apart: path, module, name of its class."""
        return [(f"blocks.{i}", block, self.block) for i, block in enumerate(model.blocks)]

    def check(self, model: Any) -> None:
        super().check(model)
        for name, block, _ in self.parts(model):
            if getattr(block.attn1, "fused_projections", False):
                raise NotImplementedError(
                    f"{name}.attn1 has fused projections, which an accelerated model does not "
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
