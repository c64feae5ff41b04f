"""RMSNorm and RoPE of queries and keys: definitions in torch, and the layouts of RoPE tables."""

from __future__ import annotations

import torch
from torch import Tensor

Rope = tuple[Tensor, Tensor]
ROPE_LAYOUTS = ("interleaved", "half")


def rms_norm(q: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """RMSNorm over the last dim in fp32, result in the dtype of ``q`` (as torch's does)."""
    return torch.nn.functional.rms_norm(q, q.shape[-1:], weight, eps)


def apply_rope(q: Tensor, cos: Tensor, sin: Tensor, layout: str = "interleaved") -> Tensor:
    """Rotate the pairs of the last dim in fp32, result in the dtype of ``q``.

    Args:
        q: ``[..., R, h, D]``.
        cos: fp32 ``[R, D / 2]`` or ``[R, D]``, as in :func:`sparse_gemm_q`; or ``[B, R, h, D / 2]``
            where items or heads have tables of their own, with a size of 1 where they do not.
        sin: like ``cos``.
        layout: ``"interleaved"`` or ``"half"``.
    """
    cos, sin = pair_tables((cos, sin), layout, q.shape[-1])
    cos, sin = (t[:, None] if t.ndim == 2 else t for t in (cos, sin))
    dim = -1 if layout == "interleaved" else -2
    a, b = q.float().unflatten(-1, (-1, 2) if dim == -1 else (2, -1)).unbind(dim)
    return torch.stack((a * cos - b * sin, b * cos + a * sin), dim).flatten(-2).to(q.dtype)


def pair_tables(rope: Rope, layout: str, head_dim: int) -> Rope:
    """The entries of the pairs, ``[..., D / 2]``; views.

    Raises:
        ValueError: ``layout`` is unknown.
    """
    if layout not in ROPE_LAYOUTS:
        raise ValueError(f"rope_layout must be one of {', '.join(ROPE_LAYOUTS)}, got {layout!r}")
    cos, sin = rope
    if cos.shape[-1] == head_dim // 2:
        return cos, sin
    if layout == "interleaved":
        return cos[..., ::2], sin[..., ::2]
    return cos[..., : head_dim // 2], sin[..., : head_dim // 2]


def pack_rope(cos: Tensor, sin: Tensor, layout: str = "interleaved") -> Rope:
    """Tables ``[..., D]`` as views ``[..., D / 2]`` of one ``[..., D]``: half of the memory.

    cos and sin of a pair lie where the two members of the pair do in a row of queries. Worth it
    where more than one projection uses the same tables.
    """
    cos, sin = pair_tables((cos, sin), layout, cos.shape[-1])
    if layout == "interleaved":
        both = torch.stack((cos, sin), dim=-1)
        return both[..., 0], both[..., 1]
    both = torch.cat((cos, sin), dim=-1)
    return both[..., : cos.shape[-1]], both[..., cos.shape[-1] :]
