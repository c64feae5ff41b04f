"""Parts of blocks, for adapters: import them from here."""

from flashomni.models._relies import rely_on_attention
from flashomni.models.blocks.fused import adaptive_norm, add_normed, mlp, modulate, residual_norm
from flashomni.models.blocks.joint import (
    Later,
    Stream,
    added_stream,
    dual_attention,
    feed_forward,
    gelu_up,
    joint_attention,
    own_stream,
    valid_first,
)
from flashomni.models.blocks.mmdit import TEXT, VISION, Inputs, MMDiT, MMDiTAdapter

__all__ = [
    "TEXT", "VISION", "Inputs", "Later", "MMDiT", "MMDiTAdapter", "Stream",
    "adaptive_norm", "add_normed", "added_stream", "dual_attention", "feed_forward", "gelu_up",
    "joint_attention", "mlp", "modulate", "own_stream", "rely_on_attention", "residual_norm",
    "valid_first",
]  # fmt: skip
