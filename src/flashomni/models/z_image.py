"""ZImageTransformer2DModel: Z-Image and Z-Image-Turbo.

One sequence of tokens, the picture first, then the caption, each padded to a multiple of 32 with
tokens that count. Padding to the longest item of a batch is at the end: ``kv_len``. In front of the
layers the picture has blocks of the same class for itself; those of the caption, which are the same
in every step, stay as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flashomni.engine import LayerRun
from flashomni.kernels.common.rope import Rope
from flashomni.models import Adapter, Geometry, Reliance, Site, adapter
from flashomni.models._relies import BLOCK, rely_on_attention
from flashomni.models.blocks import (
    add_normed,
    feed_forward,
    joint_attention,
    modulate,
    own_stream,
)
from flashomni.models.blocks.positions import rope_in_order


@adapter("ZImageTransformer2DModel")
class ZImage(Adapter):
    latents: ClassVar = "x"
    reorders: ClassVar = True
    sizes: ClassVar = {
        "tiny": {
            "in_channels": 4,
            "dim": 48,
            "n_layers": 3,
            "n_refiner_layers": 1,
            "n_heads": 3,
            "n_kv_heads": 3,
            "cap_feat_dim": 24,
            "axes_dims": (4, 6, 6),
            "axes_lens": (512, 64, 64),
        },
        "published": {},  # diffusers' defaults
    }

    def sites(self, model: Any) -> list[Site]:
        return [
            Site(
                f"{group}.{i}",
                block,
                run_block,
                ("x",),
                "x",
                vision="first",
                modulated=modulated,
                sequence=("x",),
                stage=stage,
            )
            for stage, group in enumerate(("noise_refiner", "layers"))
            for i, block in enumerate(getattr(model, group))
        ]

    def relies_on(self, model: Any) -> list[Reliance]:
        found = []
        for site in self.sites(model):
            found += rely_on_attention(
                f"{site.name}.attention",
                site.block.attention,
                ("Attention",),
                "ZSingleStreamAttnProcessor",
            )
            found.append(Reliance(site.name, site.block, ("ZImageTransformerBlock",), BLOCK))
        return found

    def variant(self, model: Any) -> str:
        if getattr(model, "siglip_embedder", None) is None:
            return ""
        return "tokens of given images, whose modulation is another (Z-Image-Omni)"

    def geometry(self, model: Any, arguments: Mapping[str, Any]) -> Geometry:
        shapes = {tuple(image.shape) for image in arguments["x"]}
        if len(shapes) > 1:
            return Geometry(why="x holds pictures of several sizes")
        ((_, frames, height, width),) = shapes
        patch, patch_t = _patches(arguments)
        return Geometry((frames // patch_t, height // patch, width // patch))

    def tiny(self) -> tuple[nn.Module, Mapping[str, Any]]:
        model: Any = self.build("tiny")
        for name in ("x_pad_token", "cap_pad_token"):
            nn.init.zeros_(getattr(model, name))  # what memory held, in diffusers before 0.39
        return model, {
            "x": torch.randn(2, 4, 1, 36, 32),
            "t": torch.full((2,), 0.5),
            "cap_feats": torch.randn(2, 40, 24),
        }


def run_block(
    run: LayerRun,
    block: Any,
    x: Tensor,
    attn_mask: Tensor | None,
    freqs_cis: Tensor,
    adaln_input: Tensor | None = None,
    noise_mask: Tensor | None = None,
    adaln_noisy: Tensor | None = None,
    adaln_clean: Tensor | None = None,
) -> Tensor:
    """A block of Z-Image, over the picture alone or with the caption behind it.

    Args:
        x: ``[B, S, K]``.
        attn_mask: bool ``[B, S]``, the first tokens of each item; ``None`` where all are.
        freqs_cis: complex64 ``[B, S, D / 2]``.
        adaln_input: ``[B, E]``.
        noise_mask: must be ``None``, like ``adaln_noisy`` and ``adaln_clean``.
    """
    if noise_mask is not None:
        raise NotImplementedError(
            "noise_mask of ZImageTransformer2DModel (given images, Z-Image-Omni) is not supported "
            "by its adapter; leave them out, or accelerate with blocks=Blocks()"
        )
    attn, seqlen = block.attention, x.shape[1]
    rope = _begin(run, run.total(seqlen), attn_mask, freqs_cis)
    scale, gate, mlp_scale, mlp_gate = _modulation(block, adaln_input)
    norm_x = modulate(block.attention_norm1, x, scale, None, backend=run.backend)
    stream = own_stream(attn, norm_x, (0, seqlen), rope)
    o = joint_attention(run, attn, [stream], attn.to_out[0])
    y = attn.to_out[1](run.project_o(o, attn.to_out[0], row_offset=0))
    x = add_normed(x, y, gate, block.attention_norm2, backend=run.backend)
    norm_x = modulate(block.ffn_norm1, x, mlp_scale, None, backend=run.backend)
    y = feed_forward(run, block.feed_forward, norm_x)
    return add_normed(x, y, mlp_gate, block.ffn_norm2, backend=run.backend)


def _begin(run: LayerRun, seqlen: int, mask: Tensor | None, freqs: Tensor) -> Rope:
    """Tell the run its sequence, and make its RoPE tables.

    Raises:
        NotImplementedError: tokens are in another order, and a ControlNet adds to them.
    """
    tokens = None if run.geometry is None else run.geometry.tokens
    if tokens is not None and run.inputs.get("controlnet_block_samples"):
        raise NotImplementedError(
            f"token_order {tokens.order!r} with controlnet_block_samples is not supported for "
            "Z-Image; take token_order 'raster'"
        )
    pictures, captions = _lengths(run.inputs)
    start, longest = min(pictures), _padded(max(pictures))
    text = (start, seqlen) if seqlen > longest else (0, 0)
    place: dict[str, Any] = {} if run.geometry is None else run.geometry.place(0, start)
    if place and not text[1] and start < seqlen:
        place["spans"] = (("reference", start, seqlen),)  # padding of the picture alone
    kv_len = None if mask is None else run.shared(_count_valid, mask)
    run.begin(seqlen, text=text, kv_len=kv_len, **place)
    # Positions of a picture begin where those of its caption end.
    alike = len(set(pictures)) == 1 and len(set(map(_padded, captions))) == 1
    return rope_in_order(run, run.shared(_tables, freqs, alike))


def modulated(
    block: Any,
    x: Tensor,
    attn_mask: Any,
    freqs_cis: Any,
    adaln_input: Any = None,
    *_: Any,
    backend: str | None = None,
) -> Tensor:
    """Tokens after the first norm and modulation of a block."""
    scale = _modulation(block, adaln_input)[0]
    return modulate(block.attention_norm1, x, scale, None, backend=backend)


def _modulation(block: Any, adaln_input: Tensor | None) -> tuple[Tensor, ...]:
    """Scale and gate of the attention, then of the MLP: ``[B, K]`` each."""
    scale, gate, mlp_scale, mlp_gate = block.adaLN_modulation(adaln_input).chunk(4, dim=1)
    return scale, gate.tanh(), mlp_scale, mlp_gate.tanh()


def _padded(count: int) -> int:
    """Tokens with those that fill up to a multiple of 32."""
    return -(-count // 32) * 32


def _patches(arguments: Mapping[str, Any]) -> tuple[int, int]:
    """Size of a patch in rows and columns, and in frames."""
    return arguments.get("patch_size", 2), arguments.get("f_patch_size", 1)


def _lengths(arguments: Mapping[str, Any]) -> tuple[list[int], list[int]]:
    """Tokens of each item's picture and caption, without padding."""
    patch, patch_t = _patches(arguments)
    pictures = []
    for image in arguments["x"]:
        frames, height, width = image.shape[1:]
        pictures.append((frames // patch_t) * (height // patch) * (width // patch))
    return pictures, [len(caption) for caption in arguments["cap_feats"]]


def _count_valid(mask: Tensor) -> Tensor:
    """Valid keys of each batch item: int32 ``[B]``."""
    return mask.sum(-1, dtype=torch.int32)


def _tables(freqs: Tensor, alike: bool) -> Rope:
    """``(cos, sin)`` fp32: ``[S, D / 2]`` where all items are alike, else ``[B, S, 1, D / 2]``."""
    freqs = freqs[0] if alike else freqs[:, :, None]
    return freqs.real, freqs.imag
