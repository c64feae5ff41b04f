"""A static band, halved as the distance in time doubles (Radial Attention, 2506.19852)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from flashomni.policies import Policy, check_int, check_range, policy
from flashomni.symbols import Grid, Symbols


@policy
@dataclass(frozen=True)
class Radial(Policy):
    """Near frames are seen whole, far ones in a narrow band around the same position.

    Vision tokens are taken to be ``frames`` frames of equal length, one after the other. A query
    sees frame t away within ``width / 2 ** floor(log2(t))`` of a frame around its own position, and
    the first frame whole. Text rows visit everything, text columns are visited by every row.

    Args:
        frames: number of (latent) frames; 1 visits everything.
        width: reach at a distance of one frame, as a share of a frame.
    """

    caches: ClassVar[bool] = False

    frames: int = 16
    width: float = 0.5

    def __post_init__(self) -> None:
        check_int("frames", self.frames, 1, 100_000)
        check_range("width", self.width, 0.0, 2.0)

    def __call__(self, q: Tensor, k: Tensor, grid: Grid, progress: Tensor) -> Symbols:
        start, stop = grid.vision
        per_frame = max(-(-(stop - start) // self.frames), 1)
        rows = self._place(grid.num_q_blocks, grid.block_m, start, per_frame, q.device)
        columns = self._place(grid.num_kv_blocks, grid.block_n, start, per_frame, q.device)
        apart = (rows["frame"][:, None] - columns["frame"]).abs()
        halvings = apart.clamp(min=1).float().log2().floor()
        reach = self.width * per_frame / 2**halvings
        # Blocks are wide: compare the gap between their edges, not between their centres.
        gap = (rows["offset"][:, None] - columns["offset"]).abs() - (
            grid.block_m + grid.block_n
        ) / 2
        kv_mask = (apart == 0) | (gap <= reach) | (columns["frame"] <= 0)
        kv_mask[slice(*grid.text_q_blocks)] = True
        q_mask = torch.ones_like(kv_mask[:, 0])
        shared = Symbols.pack(q_mask[None, None], kv_mask[None, None], grid)
        return shared.expand(q.shape[0], q.shape[2])

    @staticmethod
    def _place(
        count: int, block: int, start: int, per_frame: int, device: Any
    ) -> dict[str, Tensor]:
        """Frame and place in it of each block's middle token."""
        middle = torch.arange(count, device=device) * block + block // 2 - start
        frame = middle.div(per_frame, rounding_mode="floor")
        return {"frame": frame, "offset": middle - frame * per_frame}
