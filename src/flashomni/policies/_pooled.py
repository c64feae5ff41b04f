"""The pooled attention map and the choices made on it, shared by the dynamic policies."""

from __future__ import annotations

import torch
from torch import Tensor

from flashomni.symbols import Grid, pool


def pooled_map(q: Tensor, k: Tensor, grid: Grid, center_k: bool = False) -> Tensor:
    """Softmax of the scores of block means (SpargeAttn, arXiv 2502.18137; arXiv 2509.25401, 3.5).

    Args:
        q: ``[B, M, H, D]``.
        k: ``[B, N, Hkv, D]``; key heads are repeated for GQA.
        grid: padding behind ``kv_len`` takes part in no mean, blocks of padding alone get 0.
        center_k: subtract the mean key first (it does not change a softmax over single tokens).

    Returns:
        fp32 ``[B, H, Mb, Nb]``, rows sum to 1.
    """
    is_text_last = grid.text[0] > 0
    q_pool = pool(q, grid.block_m, grid.kv_len if is_text_last else None)
    k_pool = pool(k, grid.block_n, grid.kv_len)
    if center_k:
        k_pool = k_pool - k_pool.mean(2, keepdim=True)
    k_pool = k_pool.repeat_interleave(q.shape[2] // k.shape[2], dim=1)
    score = q_pool @ k_pool.mT * q.shape[-1] ** -0.5
    if grid.kv_len is not None:
        first = torch.arange(grid.num_kv_blocks, device=q.device) * grid.block_n
        padding = first >= grid.kv_len[:, None]  # [B, Nb]
        score = score.masked_fill(padding[:, None, None], -torch.inf)
    return score.softmax(-1)


def low_mass(mass: Tensor, tau: Tensor | float) -> Tensor:
    """The lightest entries of the last dim that together hold at most ``tau`` of its sum.

    An entry heavier than ``tau`` is never among them. bool, shape of ``mass``.
    """
    ordered, order = mass.sort(-1)
    prefix = ordered.cumsum(-1)
    low = prefix <= tau * prefix[..., -1:]
    return torch.zeros_like(low).scatter(-1, order, low)


def heaviest(mass: Tensor, count: int) -> Tensor:
    """The ``count`` heaviest entries of the last dim, as bool in the shape of ``mass``."""
    chosen = torch.zeros_like(mass, dtype=torch.bool)
    return chosen.scatter(-1, mass.topk(count, dim=-1).indices, True) if count else chosen


def self_similarity(x: Tensor, block: int, length: Tensor | None) -> Tensor:
    """Mean cosine over all pairs of tokens of a block: fp32 ``[B, H, blocks]``."""
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    return pool(unit, block, length).square().sum(-1)
