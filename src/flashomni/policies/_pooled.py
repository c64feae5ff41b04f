"""The pooled attention map and the choices made on it, shared by the dynamic policies.

Choices are packed bits (see :mod:`flashomni.symbols`). Each has one definition, in torch; on a GPU
with Triton the same choice is made by the kernels of ``_select_triton``.
"""

from __future__ import annotations

from types import ModuleType

import torch
from torch import Tensor

from flashomni.symbols import Grid, pack_bits, row_bytes


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
    q_pool = _means(q, grid.block_m, grid.kv_len if is_text_last else None)
    k_pool = _means(k, grid.block_n, grid.kv_len)
    if center_k:
        k_pool = k_pool - k_pool.mean(2, keepdim=True)
    k_pool = k_pool.repeat_interleave(q.shape[2] // k.shape[2], dim=1)
    score = (q_pool * q.shape[-1] ** -0.5) @ k_pool.mT
    if grid.kv_len is not None:
        first = torch.arange(grid.num_kv_blocks, device=q.device) * grid.block_n
        padding = first >= grid.kv_len[:, None]  # [B, Nb]
        score = score.masked_fill(padding[:, None, None], -torch.inf)
    return score.softmax(-1)


def low_mass(mass: Tensor, tau: Tensor | float) -> Tensor:
    """The lightest entries of the last dim that together hold at most ``tau`` of its sum.

    An entry heavier than ``tau`` is never among them; of equal entries the first are the lightest.
    bool, shape of ``mass``, which must not be negative.
    """
    ordered, order = mass.sort(dim=-1, stable=True)
    prefix = ordered.cumsum(-1, dtype=torch.float64)
    low = prefix <= _scalar(tau, mass) * prefix[..., -1:]
    return torch.zeros_like(low).scatter(-1, order, low)


def heaviest(mass: Tensor, count: int) -> Tensor:
    """The ``count`` heaviest entries of the last dim; of equal entries the first.

    bool, shape of ``mass``, which must not be negative.
    """
    order = mass.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(mass, dtype=torch.bool)
    return chosen.scatter(-1, order[..., :count], True)


def heavy_bits(mass: Tensor, tau: Tensor | float, num_bytes: int) -> Tensor:
    """All but :func:`low_mass`, packed: uint8 ``[..., num_bytes]``."""
    kernels = _kernels(mass)
    if kernels is not None and 8 * num_bytes <= kernels.MAX_COLUMNS:
        return kernels.heavy(mass, _scalar(tau, mass), num_bytes)
    return pack_bits(~low_mass(mass, tau), num_bytes)


def heaviest_bits(mass: Tensor, count: int, num_bytes: int) -> Tensor:
    """:func:`heaviest`, packed: uint8 ``[..., num_bytes]``."""
    kernels = _kernels(mass)
    if kernels is not None and 8 * num_bytes <= kernels.MAX_COLUMNS:
        return kernels.most(mass, count, num_bytes)
    return pack_bits(heaviest(mass, count), num_bytes)


def self_similarity(x: Tensor, block: int, length: Tensor | None) -> Tensor:
    """Mean cosine over all pairs of tokens of a block: fp32 ``[B, H, blocks]``."""
    kernels = _kernels(x)
    if kernels is not None:
        means = kernels.block_means(x, block, length, unit=True)
    else:
        means = pool(torch.nn.functional.normalize(x.float(), dim=-1), block, length)
    return means.square().sum(-1)


def coarse_blocks(q: Tensor, k: Tensor, grid: Grid, similarity: float) -> tuple[Tensor, Tensor]:
    """Blocks whose tokens have a mean cosine below ``similarity``, so that their mean misleads.

    Returns:
        bool ``[B, H, Mb]`` of q and bool ``[B, H, Nb]`` of k.
    """
    coarse_q = self_similarity(q, grid.block_m, None) < similarity
    coarse_k = self_similarity(k, grid.block_n, grid.kv_len) < similarity
    return coarse_q, coarse_k.repeat_interleave(q.shape[2] // k.shape[2], dim=1)


def visit_rows(kv_bits: Tensor, rows: Tensor, grid: Grid) -> Tensor:
    """S_s bits with every key block visited by the marked query blocks, bool ``[..., Mb]``."""
    return kv_bits | rows[..., None] * grid.all_kv_bits(rows.device)


def visit_columns(kv_bits: Tensor, columns: Tensor, grid: Grid) -> Tensor:
    """S_s bits with the marked key blocks, bool ``[..., Nb]``, visited by every query block."""
    return kv_bits | pack_bits(columns, row_bytes(grid.num_kv_blocks))[..., None, :]


def _means(x: Tensor, block: int, length: Tensor | None) -> Tensor:
    kernels = _kernels(x)
    if kernels is not None:
        return kernels.block_means(x, block, length, unit=False)
    return pool(x, block, length)


def _scalar(tau: Tensor | float, like: Tensor) -> Tensor:
    """``tau`` as an fp32 scalar on the device, so that no way of choosing rounds it otherwise."""
    if isinstance(tau, Tensor):
        return tau.float()
    return torch.full((), tau, dtype=torch.float32, device=like.device)


def _kernels(x: Tensor) -> ModuleType | None:
    """The Triton kernels, if ``x`` is on a GPU and Triton is there."""
    if not x.is_cuda:
        return None
    try:
        from flashomni.symbols.choice import portable
    except ImportError:
        return None
    return portable


def pool(x: Tensor, block: int, length: Tensor | None = None) -> Tensor:
    """Mean of the tokens of each block, over the tokens that exist.

    Args:
        x: ``[B, S, H, D]``.
        block: tokens per block.
        length: optional int32 ``[B]``: tokens from there on are padding and are left out.

    Returns:
        fp32 ``[B, H, ceil(S / block), D]``; a block of padding alone is zero.
    """
    seqlen = x.shape[1]
    num_blocks = -(-seqlen // block)
    position = torch.arange(num_blocks * block, device=x.device).view(1, num_blocks, block)
    limit = seqlen if length is None else length.view(-1, 1, 1)
    valid = position < limit  # [1 | B, blocks, block]
    count = valid.sum(-1).clamp(min=1)[..., None, None]  # [1 | B, blocks, 1, 1]
    if length is not None:
        x = x * valid.flatten(1)[:, :seqlen, None, None].to(x.dtype)
    tail = num_blocks * block - seqlen
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, tail)) if tail else x
    total = x.unflatten(1, (num_blocks, block)).sum(2, dtype=torch.float32)
    return (total / count).permute(0, 2, 1, 3)
