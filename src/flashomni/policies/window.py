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

    Where the grid has a shape and raster order, near means near in time, height and width at once;
    otherwise near along the sequence. Text and reference rows visit everything, their columns are
    visited by every row.

    Args:
        reach: share of each axis (of the sequence) to see on either side, 0 to 1.
    """

    caches: ClassVar[bool] = False

    reach: float = 0.25

    def __post_init__(self) -> None:
        check_range("reach", self.reach, 0.0, 1.0)

    def __call__(self, site: AttentionSite) -> Symbols:
        grid, device = site.grid, site.q.device
        if grid.shape is not None and grid.order == "raster":
            kv_mask = self._near_in_space(grid, grid.shape, device)
        else:
            rows = torch.arange(grid.num_q_blocks, device=device) * grid.block_m
            columns = torch.arange(grid.num_kv_blocks, device=device) * grid.block_n
            kv_mask = (rows[:, None] - columns).abs() <= self.reach * grid.seqlen_kv
        return shared_symbols(kv_mask, site)

    def wants_shape(self) -> bool:
        return True

    def _near_in_space(
        self, grid: Grid, shape: tuple[int, int, int], device: torch.device
    ) -> Tensor:
        rows = _extents(grid, shape, grid.num_q_blocks, grid.block_m, device)
        columns = _extents(grid, shape, grid.num_kv_blocks, grid.block_n, device)
        near = torch.ones(grid.num_q_blocks, grid.num_kv_blocks, dtype=torch.bool, device=device)
        for size, (first, last), (start, stop) in zip(shape, rows, columns, strict=True):
            apart = torch.maximum(start - last[:, None], first[:, None] - stop)  # < 0: they overlap
            near &= apart <= self.reach * size
        return near


def _extents(
    grid: Grid, shape: tuple[int, int, int], count: int, block: int, device: torch.device
) -> list[tuple[Tensor, Tensor]]:
    """First and last frame, row and column that each block has tokens of."""
    _, height, width = shape
    position = torch.arange(count, device=device) * block
    first = grid.generated_index(position)
    end = grid.generated_index((position + block).clamp(max=grid.seqlen_q))
    last = torch.maximum(end - 1, first)
    frame = first // (height * width), last // (height * width)
    row = first // width, last // width  # of all frames
    one_frame, one_row = frame[0] == frame[1], row[0] == row[1]
    zero = torch.zeros_like(first)
    return [
        frame,
        (
            torch.where(one_frame, row[0] % height, zero),
            torch.where(one_frame, row[1] % height, zero + height - 1),
        ),
        (
            torch.where(one_row, first % width, zero),
            torch.where(one_row, last % width, zero + width - 1),
        ),
    ]
