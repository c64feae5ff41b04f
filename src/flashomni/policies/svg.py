"""Sparse VideoGen (arXiv 2502.01776): a spatial or a temporal template for each head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flashomni.policies import AttentionSite, Policy, check_bool, check_int, check_range, policy
from flashomni.policies._places import Places, band, places, shape_of
from flashomni.policies._probe import errors, spread_rows
from flashomni.policies._static import visits_given
from flashomni.symbols import Grid, Symbols


@policy("svg")
@dataclass(frozen=True)
class SparseVideoGen(Policy):
    """Give each head the template that changes some sampled rows less: near frames, or all times.

    A band of one width in two orders of the tokens: frame by frame it is *spatial*, position by
    position *temporal* (the same place at all times). The paper moves the tokens of temporal heads
    together; here a block visits every block that holds a token of its band, which is more of them.
    Sampled rows are spread evenly, so that a run chooses the same again; the paper draws them.

    Args:
        frames: number of (latent) frames; by default that of the grid's shape.
        density: share of the attention that the band and the text together take; gives its width.
        rows: sampled query rows of a head.
        first_frame: every row visits the first frame too (in the authors' code, for Wan).

    Raises:
        ValueError: a setting is out of range; or, when called, nobody says how many frames, or
            ``frames`` does where tokens are not in raster order.
    """

    caches: ClassVar[bool] = False
    amount: ClassVar[str] = "density"

    frames: int | None = None
    density: float = 0.25
    rows: int = 32
    first_frame: bool = True

    def __post_init__(self) -> None:
        if self.frames is not None:
            check_int("frames", self.frames, 1, 100_000)
        check_range("density", self.density, 0.0, 1.0)
        check_int("rows", self.rows, 1, 4096)
        check_bool("first_frame", self.first_frame)

    def wants_shape(self) -> bool:
        return self.frames is None

    def __call__(self, site: AttentionSite) -> Symbols:
        grid, device = site.grid, site.q.device
        if self.frames is None and grid.shape is None:
            raise ValueError(
                "frames of policy svg must be set (svg:frames=16) where the model does not say "
                f"how many frames there are, got None and a {grid} without shape"
            )
        queries, keys = both = places(grid, shape_of(grid, self.name, self.frames), device)
        width, rows = self.width(grid), spread_rows(queries, self.rows)
        bands, pairs = [], []
        for order in (_by_frame, _by_position):
            orders = order(queries), order(keys)
            near = (orders[0][rows][:, None] - orders[1]).abs() <= width
            bands.append(near | ~keys.generated | self._sink(keys))
            pairs.append(band(grid, both, orders, width))
        spatial_error, temporal_error = errors(site, rows, bands)
        is_spatial = (spatial_error <= temporal_error)[..., None, None]  # [B, H, 1, 1]
        kv_mask = torch.where(is_spatial, pairs[0], pairs[1])
        if self.first_frame:
            sink = (keys.generated & self._sink(keys)).long()
            kv_mask = kv_mask | (keys.held(sink, 2, grid.block_n)[:, 1] > 0)
        kv_mask = visits_given(kv_mask, grid)
        return Symbols.pack(torch.ones_like(kv_mask[..., 0]), kv_mask, grid)

    def width(self, grid: Grid) -> float:
        """Half of the band: tokens on either side that a token sees."""
        given = grid.seqlen_q - grid.num_generated
        share = self.density - 2 * given / grid.seqlen_q
        return grid.seqlen_q * (1 - math.sqrt(1 - min(max(share, 0.0), 1.0)))

    def _sink(self, keys: Places) -> Tensor:
        """True at the tokens of the first frame, where all visit it."""
        _, height, width = keys.shape
        return keys.index < height * width * self.first_frame


def _by_frame(tokens: Places) -> Tensor:
    return tokens.index


def _by_position(tokens: Places) -> Tensor:
    frames, height, width = tokens.shape
    per_frame = height * width
    return tokens.index % per_frame * frames + tokens.index // per_frame
