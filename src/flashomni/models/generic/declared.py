"""Tier B: one line a transformer class of diffusers, for what watching a call cannot show.

``text``: where the text is in the sequence of the largest self-attention. ``text_from``: the
argument that has one entry for each text token. ``chain=False``: blocks whose outputs are read
later. Classes that are not here, and all others in the world, are tier A. One with an adapter
stands here for the variants that its adapter does not run.
"""

from __future__ import annotations

from typing import Any

DECLARED: dict[str, dict[str, Any]] = {
    "AuraFlowTransformer2DModel": {"text": "first"},
    "BriaFiboTransformer2DModel": {"text": "first"},
    "BriaTransformer2DModel": {"text": "first"},
    "ChromaTransformer2DModel": {"text": "first"},
    "CogVideoXTransformer3DModel": {"text": "first"},
    "CogView3PlusTransformer2DModel": {"text": "first"},
    "CogView4Transformer2DModel": {"text": "first"},
    "ConsisIDTransformer3DModel": {"text": "first"},
    "EasyAnimateTransformer3DModel": {"text": "first"},
    "Flux2Transformer2DModel": {"text": "first"},
    "GlmImageTransformer2DModel": {"text": "first"},
    "HunyuanDiT2DModel": {"chain": False},
    "HunyuanImageTransformer2DModel": {"text": "last"},
    "HunyuanVideo15Transformer3DModel": {"text": "last"},
    "HunyuanVideoFramepackTransformer3DModel": {"text": "last"},
    "HunyuanVideoTransformer3DModel": {"text": "last"},
    "JoyImageEditTransformer3DModel": {"text": "last"},
    "MochiTransformer3DModel": {"text": "last"},
    "OvisImageTransformer2DModel": {"text": "first"},
    "SD3Transformer2DModel": {"text": "last"},
}
