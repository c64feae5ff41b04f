"""The pooled attention map and the choices made on it, shared by the dynamic policies.

Choices are packed bits (see :mod:`flashomni.symbols`), made by the ops of ``symbols/choice``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashomni.symbols import Grid, pack_bits, row_bytes
from flashomni.symbols.choice.op import (
    block_means,
    heaviest,
    heaviest_bits,
    heavy_bits,
    low_mass,
    pool,
    self_similarity,
)

__all__ = [
    "coarse_blocks",
    "heaviest",
    "heaviest_bits",
    "heavy_bits",
    "low_mass",
    "pool",
    "pooled_map",
    "self_similarity",
    "visit_columns",
    "visit_rows",
]


def pooled_map(
    q: Tensor, k: Tensor, grid: Grid, center_k: bool = False, *, backend: str | None = None
) -> Tensor:
    """Softmax of the scores of block means (SpargeAttn, arXiv 2502.18137; arXiv 2509.25401, 3.5).

    Args:
        q: ``[B, M, H, D]``.
        k: ``[B, N, Hkv, D]``; key heads are repeated for GQA.
        grid: padding behind ``kv_len`` takes part in no mean, blocks of padding alone get 0.
        center_k: subtract the mean key first (it does not change a softmax over single tokens).
        backend: which one takes the means; by default the best that accepts.

    Returns:
        fp32 ``[B, H, Mb, Nb]``, rows sum to 1.
    """
    is_text_last = any(first > 0 and last == grid.seqlen_q for first, last in grid.text_spans)
    q_pool = block_means(q, grid.block_m, grid.kv_len if is_text_last else None, backend=backend)
    k_pool = block_means(k, grid.block_n, grid.kv_len, backend=backend)
    if center_k:
        k_pool = k_pool - k_pool.mean(2, keepdim=True)
    k_pool = k_pool.repeat_interleave(q.shape[2] // k.shape[2], dim=1)
    score = (q_pool * q.shape[-1] ** -0.5) @ k_pool.mT
    if grid.kv_len is not None:
        first = torch.arange(grid.num_kv_blocks, device=q.device) * grid.block_n
        padding = first >= grid.kv_len[:, None]  # [B, Nb]
        score = score.masked_fill(padding[:, None, None], -torch.inf)
    return score.softmax(-1)


def coarse_blocks(
    q: Tensor, k: Tensor, grid: Grid, similarity: float, *, backend: str | None = None
) -> tuple[Tensor, Tensor]:
    """Blocks whose tokens have a mean cosine below ``similarity``, so that their mean misleads.

    Returns:
        bool ``[B, H, Mb]`` of q and bool ``[B, H, Nb]`` of k.
    """
    coarse_q = self_similarity(q, grid.block_m, None, backend=backend) < similarity
    coarse_k = self_similarity(k, grid.block_n, grid.kv_len, backend=backend) < similarity
    return coarse_q, coarse_k.repeat_interleave(q.shape[2] // k.shape[2], dim=1)


def visit_rows(kv_bits: Tensor, rows: Tensor, grid: Grid) -> Tensor:
    """S_s bits with every key block visited by the marked query blocks, bool ``[..., Mb]``."""
    return kv_bits | rows[..., None] * grid.all_kv_bits(rows.device)


def visit_columns(kv_bits: Tensor, columns: Tensor, grid: Grid) -> Tensor:
    """S_s bits with the marked key blocks, bool ``[..., Nb]``, visited by every query block."""
    return kv_bits | pack_bits(columns, row_bytes(grid.num_kv_blocks))[..., None, :]
