"""A static sliding tile: each query block visits its neighbours in token order, and the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flashomni.policies import Policy, check_range, policy
from flashomni.symbols import Grid, Symbols


@policy
@dataclass(frozen=True)
class Window(Policy):
    """Visit the key blocks within ``reach`` of the query block (Sliding Tile, arXiv 2502.04507).

    The distance runs along the token order. Text rows visit everything, text columns are visited
    by every row.

    Args:
        reach: share of the sequence to see on either side, 0 to 1.
    """

    caches: ClassVar[bool] = False

    reach: float = 0.25

    def __post_init__(self) -> None:
        check_range("reach", self.reach, 0.0, 1.0)

    def __call__(self, q: Tensor, k: Tensor, grid: Grid, progress: Tensor) -> Symbols:
        rows = torch.arange(grid.num_q_blocks, device=q.device)
        columns = torch.arange(grid.num_kv_blocks, device=q.device)
        near = (rows[:, None] * grid.block_m - columns * grid.block_n).abs()
        kv_mask = near <= self.reach * grid.seqlen_kv
        kv_mask[slice(*grid.text_q_blocks)] = True
        q_mask = torch.ones_like(rows, dtype=torch.bool)
        # One row of bits is stored for the whole batch and all heads.
        shared = Symbols.pack(q_mask[None, None], kv_mask[None, None], grid)
        return shared.expand(q.shape[0], q.shape[2])
