"""The attention map of means of few tokens, summed over block pairs: the definition, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from flashomni.symbols.choice._pool import is_text_last, pool
from flashomni.symbols.grid import Grid

LARGEST = 65504.0  # of fp16
ENTRIES = 2**26  # of the map of means that are made at a time


def fine_map(
    q: Tensor, k: Tensor, grid: Grid, resolution: int, softmax_scale: float | None = None
) -> Tensor:
    """What each query block gives to each key block, of the means of ``resolution`` tokens.

    Softmax of the scores of means; the mean over the query parts of a block that hold a token that
    exists, the sum over the parts of a key block. Means, and those of q times the scale, are
    rounded to fp16: it is a choice that follows, and tensor cores take them.

    Args:
        q: ``[B, M, H, D]``.
        k: ``[B, N, Hkv, D]``; key heads are repeated for GQA.
        grid: padding behind ``kv_len`` takes part in no mean, parts of padding alone get 0.
        resolution: tokens of a mean; divides the blocks.
        softmax_scale: of the scores; ``D ** -0.5`` by default.

    Returns:
        fp32 ``[B, H, Mb, Nb]``; rows sum to 1, those of padding alone to 0.
    """
    (batch, seqlen_q, num_heads, head_dim), kv_len, device = q.shape, grid.kv_len, q.device
    length = kv_len if is_text_last(grid) else None
    rows, columns = grid.num_q_blocks, grid.num_kv_blocks
    q_parts, k_parts = grid.block_m // resolution, grid.block_n // resolution
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    q_mean = _half(pool(q, resolution, length) * scale)
    k_mean = _half(pool(k, resolution, kv_len)).repeat_interleave(num_heads // k.shape[2], dim=1)
    end_q = torch.full((1,), seqlen_q, device=device) if length is None else length
    end_k = torch.full((1,), grid.seqlen_kv, device=device) if kv_len is None else kv_len
    live_q = torch.arange(rows * q_parts, device=device) * resolution < end_q[:, None]
    live_k = torch.arange(k_mean.shape[2], device=device) * resolution < end_k[:, None]
    live_k = live_k[:, None, None]  # [1 | B, 1, 1, parts]
    pad_q = rows * q_parts - q_mean.shape[2]
    q_mean = torch.nn.functional.pad(q_mean, (0, 0, 0, pad_q)).unflatten(2, (rows, q_parts))
    live_q = live_q.unflatten(1, (rows, q_parts))[:, None]  # [1 | B, 1, Mb, parts]
    pad_k = columns * k_parts - k_mean.shape[2]
    found = []
    step = max(1, ENTRIES // (batch * num_heads * q_parts * columns * k_parts))
    for start in range(0, rows, step):
        some, live = q_mean[:, :, start : start + step], live_q[:, :, start : start + step]
        score = (some.flatten(2, 3) @ k_mean.mT).masked_fill(~live_k, -torch.inf)
        mass = score.softmax(-1).masked_fill(~live_k, 0.0)
        mass = torch.nn.functional.pad(mass, (0, pad_k)).unflatten(-1, (columns, k_parts)).sum(-1)
        mass = mass.unflatten(2, some.shape[2:4]) * live[..., None]
        found.append(mass.sum(3) / live.sum(-1).clamp(min=1)[..., None])
    return torch.cat(found, 2)


def _half(x: Tensor) -> Tensor:
    return x.clamp(-LARGEST, LARGEST).half().float()
