"""A static band, halved as the distance in time doubles (Radial Attention, 2506.19852)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flashomni.policies import AttentionSite, Policy, check_int, check_range, policy
from flashomni.policies._static import shared_symbols
from flashomni.symbols import Grid, Symbols


@policy("radial")
@dataclass(frozen=True)
class Radial(Policy):
    """Near frames are seen whole, far ones in a narrow band around the same position.

    Generated tokens are frames of equal length, one after the other. A query sees frame t away
    within ``width / 2 ** floor(log2(t))`` of a frame around its own position, and the first frame
    whole. Where tokens are in another order, blocks are as far apart as their nearest frames and
    rows. Text and reference rows visit everything, their columns are visited by every row.

    Args:
        frames: number of (latent) frames; by default that of the grid's shape. 1 visits everything.
        width: reach at a distance of one frame, as a share of a frame.

    Raises:
        ValueError: a setting is out of range; or, when called, neither ``frames`` nor the grid
            says how many frames there are.
    """

    caches: ClassVar[bool] = False
    amount: ClassVar[str] = "width"

    frames: int | None = None
    width: float = 0.5

    def __post_init__(self) -> None:
        if self.frames is not None:
            check_int("frames", self.frames, 1, 100_000)
        check_range("width", self.width, 0.0, 2.0)

    def __call__(self, site: AttentionSite) -> Symbols:
        grid, device = site.grid, site.q.device
        if grid.order != "raster":
            return shared_symbols(self._between_patches(grid, device), site)
        per_frame = self._tokens_per_frame(grid)
        rows, row_place = _place(grid, grid.num_q_blocks, grid.block_m, per_frame, device)
        columns, column_place = _place(grid, grid.num_kv_blocks, grid.block_n, per_frame, device)
        apart = (rows[:, None] - columns).abs()
        # Blocks are wide: compare the gap between their edges, not between their centres.
        gap = (row_place[:, None] - column_place).abs() - (grid.block_m + grid.block_n) / 2
        near = gap <= self._reach(apart, per_frame)
        return shared_symbols((apart == 0) | near | (columns <= 0), site)

    def _reach(self, apart: Tensor, per_frame: int) -> Tensor:
        """How far to see in a frame so far away, in tokens of it."""
        return self.width * per_frame / 2 ** apart.clamp(min=1).float().log2().floor()

    def _between_patches(self, grid: Grid, device: torch.device) -> Tensor:
        """The same for blocks that span several frames: as of the two tokens that are nearest."""
        if grid.shape is None:
            raise ValueError(f"policy radial needs the shape of tokens in order {grid.order}")
        _, height, width = grid.shape
        (first, last), (start, stop) = (
            grid.extents(block, device) for block in (grid.block_m, grid.block_n)
        )
        apart = torch.maximum(start[0] - last[0, :, None], first[0, :, None] - stop[0])
        row_gap = torch.maximum(start[1] - last[1, :, None], first[1, :, None] - stop[1])
        gap = row_gap.clamp(min=0) * width
        near = gap <= self._reach(apart, height * width)
        return (apart <= 0) | near | (start[0] <= 0)

    def wants_shape(self) -> bool:
        return self.frames is None

    def _tokens_per_frame(self, grid: Grid) -> int:
        if self.frames is not None:
            return max(-(-grid.num_generated // self.frames), 1)
        if grid.shape is None:
            raise ValueError(
                "frames of policy radial must be set (radial:frames=16) where the model does not "
                f"say how many frames there are, got None and a {grid} without shape"
            )
        return grid.shape[1] * grid.shape[2]


def _place(
    grid: Grid, count: int, block: int, per_frame: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Frame and place in it of each block's middle token."""
    middle = grid.generated_index(torch.arange(count, device=device) * block + block // 2)
    frame = middle.div(per_frame, rounding_mode="floor")
    return frame, middle - frame * per_frame
