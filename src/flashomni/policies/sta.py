"""Sliding Tile Attention (arXiv 2502.04507): a tile of a video sees the tiles around it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flashomni.policies import AttentionSite, Policy, parse_extent, policy
from flashomni.policies._places import blocks_near, places, shape_of
from flashomni.policies._static import shared_symbols
from flashomni.symbols import Symbols


@policy("sta")
@dataclass(frozen=True)
class SlidingTile(Policy):
    """Visit the window of tiles around the query's tile, over frames, rows and columns.

    At the borders the window is moved inwards, so that every tile sees as many. A block visits
    every block that holds a token of a tile in the window of one of its own tiles: exactly the
    paper's pairs where a block is a tile, more of them elsewhere, most in raster order. Without a
    shape tiles lie along the sequence. Text and reference rows visit everything, and everybody
    visits theirs.

    Args:
        tile: frames, rows and columns of a tile, ``"6x8x8"`` as in the paper's kernel.
        window: tiles along each axis that a tile sees, itself in the middle; the paper's search
            gives each head a window of its own, which is not expressed.

    Raises:
        ValueError: a setting is out of range; or, when called, tokens are not in raster order and
            nobody says their shape.
    """

    caches: ClassVar[bool] = False

    tile: str = "6x8x8"
    window: str = "3x3x3"

    def __post_init__(self) -> None:
        parse_extent("tile", self.tile, 3)
        parse_extent("window", self.window, 3)

    def __call__(self, site: AttentionSite) -> Symbols:
        grid, device = site.grid, site.q.device
        shape = shape_of(grid, self.name)
        tile, window = parse_extent("tile", self.tile, 3), parse_extent("window", self.window, 3)
        if grid.shape is None:
            tile, window = (1, 1, math.prod(tile)), (1, 1, math.prod(window))
        tiles = [-(-size // step) for size, step in zip(shape, tile, strict=True)]
        queries, keys = places(grid, shape, device)
        held = []
        for each, block in ((queries, grid.block_m), (keys, grid.block_n)):
            t, h, w = (x // step for x, step in zip(each.coordinates(), tile, strict=True))
            part = (t * tiles[1] + h) * tiles[2] + w
            held.append(each.held(part, math.prod(tiles), block))
        return shared_symbols(blocks_near(held[0], _window(tiles, window, device), held[1]), site)

    def wants_shape(self) -> bool:
        return True


def _window(tiles: list[int], window: tuple[int, ...], device: torch.device) -> Tensor:
    """Which tiles each tile sees: bool ``[tiles, tiles]``, the last axis running fastest."""
    near = torch.ones(1, 1, dtype=torch.bool, device=device)
    for count, reach in zip(tiles, window, strict=True):
        place = torch.arange(count, device=device)
        first = (place - reach // 2).clamp(0, max(count - reach, 0))[:, None]
        axis = (place >= first) & (place < first + reach)
        near = (near[:, None, :, None] & axis[None, :, None, :]).flatten(2).flatten(0, 1)
    return near
