"""Means of blocks of tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from flashomni.symbols.grid import Grid


def pool(x: Tensor, block: int, length: Tensor | None = None) -> Tensor:
    """Mean of the tokens of each block, over the tokens that exist.

    Args:
        x: ``[B, S, H, D]``.
        block: tokens per block.
        length: optional int32 ``[B]``: tokens from there on are padding, whatever they hold.

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
        x = x.masked_fill(~valid.flatten(1)[:, :seqlen, None, None], 0.0)
    tail = num_blocks * block - seqlen
    x = torch.nn.functional.pad(x, (0, 0, 0, 0, 0, tail)) if tail else x
    total = x.unflatten(1, (num_blocks, block)).sum(2, dtype=torch.float32)
    return (total / count).permute(0, 2, 1, 3)


def is_text_last(grid: Grid) -> bool:
    """Whether the sequence ends with text, so that padding is among the queries too."""
    return any(first > 0 and last == grid.seqlen_q for first, last in grid.text_spans)
