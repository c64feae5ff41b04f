"""A static sliding tile: each query block visits its neighbours, and the text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flashomni.policies import AttentionSite, Policy, check_range, policy
from flashomni.policies._static import shared_symbols
from flashomni.symbols import Grid, Symbols


@policy("window")
@dataclass(frozen=True)
class Window(Policy):
    """Visit the key blocks within ``reach`` of the query block (Sliding Tile, arXiv 2502.04507).

    Where the grid has a shape, near means near in time, height and width at once, whatever the
    order of the tokens; otherwise near along the sequence. Text and reference rows visit
    everything, their columns are visited by every row.

    Args:
        reach: share of each axis (of the sequence) to see on either side, 0 to 1.
    """

    caches: ClassVar[bool] = False
    amount: ClassVar[str] = "reach"

    reach: float = 0.25

    def __post_init__(self) -> None:
        check_range("reach", self.reach, 0.0, 1.0)

    def __call__(self, site: AttentionSite) -> Symbols:
        grid, device = site.grid, site.q.device
        if grid.shape is not None:
            kv_mask = _near_in_space(grid, grid.shape, self.reach, device)
        else:
            rows = torch.arange(grid.num_q_blocks, device=device) * grid.block_m
            columns = torch.arange(grid.num_kv_blocks, device=device) * grid.block_n
            kv_mask = (rows[:, None] - columns).abs() <= self.reach * grid.seqlen_kv
        return shared_symbols(kv_mask, site)

    def wants_shape(self) -> bool:
        return True


def _near_in_space(
    grid: Grid, shape: tuple[int, int, int], reach: float, device: torch.device
) -> Tensor:
    rows, columns = grid.extents(grid.block_m, device), grid.extents(grid.block_n, device)
    near = torch.ones(grid.num_q_blocks, grid.num_kv_blocks, dtype=torch.bool, device=device)
    for axis, size in enumerate(shape):
        (first, last), (start, stop) = rows[:, axis], columns[:, axis]
        apart = torch.maximum(start - last[:, None], first[:, None] - stop)  # < 0: they overlap
        near &= apart <= reach * size
    return near
