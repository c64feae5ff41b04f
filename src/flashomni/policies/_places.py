"""What policies share that look at where the generated tokens lie in a picture or a video."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flashomni.symbols import Grid

Shape = tuple[int, int, int]
PART = 32  # tokens of a band that are near or far together


@dataclass(frozen=True, eq=False)
class Places:
    """Of each of the S tokens of a sequence; those that are given (text, reference) have no place.

    Args:
        generated: bool ``[S]``, false where a token is given: the rest says nothing of it.
        along: int64 ``[S]``, of a token among the generated ones as they run.
        index: int64 ``[S]``, of a token among them in raster order.
        shape: ``(T, H, W)`` of these.
    """

    generated: Tensor
    along: Tensor
    index: Tensor
    shape: Shape

    @property
    def count(self) -> int:
        """Generated tokens."""
        return math.prod(self.shape)

    def coordinates(self) -> tuple[Tensor, Tensor, Tensor]:
        """Frame, row and column of each token: int64 ``[S]`` each."""
        _, height, width = self.shape
        row = self.index // width
        return row // height, row % height, self.index % width

    def positions(self) -> Tensor:
        """Where in the sequence the generated token of each index lies: int64 ``[count]``."""
        slot = torch.where(self.generated, self.index, self.count)  # given tokens: a place unread
        position = torch.arange(slot.shape[0], device=slot.device)
        return position.new_zeros(self.count + 1).scatter_(0, slot, position)[: self.count]

    def held(self, part: Tensor, parts: int, block: int) -> Tensor:
        """How many generated tokens of each part each block holds: fp32 ``[blocks, parts]``.

        Args:
            part: int64 ``[S]``, from 0 to ``parts`` - 1.
            parts: how many there are.
            block: tokens a block.
        """
        seqlen = part.shape[0]
        blocks = -(-seqlen // block)
        slot = torch.arange(seqlen, device=part.device) // block * parts + part
        counts = torch.zeros(blocks * parts, device=part.device)
        return counts.scatter_add_(0, slot, self.generated.float()).view(blocks, parts)


def shape_of(grid: Grid, policy: str, frames: int | None = None) -> Shape:
    """``(T, H, W)`` of the generated tokens: the grid's, or so many frames of one row each.

    Raises:
        ValueError: frames are given, but tokens are not in raster order.
    """
    if frames is None and grid.shape is not None:
        return grid.shape
    if grid.order != "raster":
        raise ValueError(
            f"frames of policy {policy} must be null where tokens are in order {grid.order}, and "
            f"the grid must have a shape, got {frames} and a {grid}"
        )
    count = max(grid.num_generated, grid.seqlen_kv - grid.seqlen_q + grid.num_generated)
    frames = 1 if frames is None else frames
    return frames, 1, max(-(-count // frames), 1)


def places(grid: Grid, shape: Shape, device: torch.device) -> tuple[Places, Places]:
    """Where the query and the key tokens lie, in a grid of this shape."""
    both, count = [], math.prod(shape)
    for seqlen in (grid.seqlen_q, grid.seqlen_kv):
        position = torch.arange(seqlen, device=device)
        along = grid.generated_index(position)
        generated = grid.generated_index(position + 1) > along
        along = index = along.clamp(max=count - 1)
        if grid.order != "raster":
            frame, row, column = grid.coordinates(device)[:, along]
            index = (frame * shape[1] + row) * shape[2] + column
        both.append(Places(generated, along, index, shape))
    return both[0], both[1]


def blocks_near(rows: Tensor, near: Tensor, columns: Tensor) -> Tensor:
    """Block pairs that hold tokens of parts that are near: bool ``[Mb, Nb]``.

    Args:
        rows: ``[Mb, parts]``, tokens of each part in each query block.
        near: bool ``[parts, parts]``.
        columns: ``[Nb, parts]``, the same of the key blocks.
    """
    return rows @ near.float() @ columns.mT > 0


def band(
    grid: Grid, both: tuple[Places, Places], orders: tuple[Tensor, Tensor], reach: float
) -> Tensor:
    """Block pairs that hold tokens not farther apart than ``reach``: bool ``[Mb, Nb]``.

    Up to 31 tokens more, on either side, for the sake of its size.

    Args:
        grid: the blocks.
        both: where the query and the key tokens lie.
        orders: int64 ``[S]`` each, the place of each token along the band.
        reach: in tokens.
    """
    (queries, keys), (ours, theirs) = both, orders
    count = -(-queries.count // PART)
    part = torch.arange(count, device=ours.device)
    gap = (part[:, None] - part).abs() * PART - (PART - 1)
    rows = queries.held(ours // PART, count, grid.block_m)
    columns = keys.held(theirs // PART, count, grid.block_n)
    return blocks_near(rows, gap.clamp(min=0) <= reach, columns)
