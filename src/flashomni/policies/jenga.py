"""Jenga's attention carving (arXiv 2505.16864): a share of the mass, a least count, neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flashomni.policies import AttentionSite, Policy, check_bool, check_range, policy
from flashomni.policies._places import places, shape_of
from flashomni.policies._static import visits_given
from flashomni.symbols import Grid, Symbols
from flashomni.symbols.choice.op import pooled_map
from flashomni.symbols.wide import wide


@policy("jenga")
@dataclass(frozen=True)
class Jenga(Policy):
    """Visit blocks until they hold ``mass`` of a row, at least ``density`` of all, and neighbours.

    The mass is that of the pooled attention among the blocks of generated tokens. Neighbours are
    the blocks that hold a token next to one of the query block's, diagonals included, in time,
    height and width. Text and reference rows visit everything, and everybody visits theirs. The
    paper orders tokens along a space-filling curve first: that is an order of the grid, which this
    policy does not need; its growing resolution is not expressed.

    Args:
        density: least share of the blocks of generated tokens (1 less the authors' drop rate).
        mass: share of the pooled attention (the authors' ``p_remain_rates``).
        neighbours: visit the blocks of adjacent tokens.

    Raises:
        ValueError: a setting is out of range; or, when called, tokens are not in raster order and
            nobody says their shape.
    """

    caches: ClassVar[bool] = False
    amount: ClassVar[str] = "density"

    density: float = 0.3
    mass: float = 0.3
    neighbours: bool = True

    def __post_init__(self) -> None:
        check_range("density", self.density, 0.0, 1.0)
        check_range("mass", self.mass, 0.0, 1.0)
        check_bool("neighbours", self.neighbours)

    def __call__(self, site: AttentionSite) -> Symbols:
        grid, device = site.grid, site.q.device
        masses = pooled_map(site.q, site.k, grid, softmax_scale=site.softmax_scale)
        among = masses.masked_fill(grid.given_kv_mask(device), 0.0)
        ordered, order = among.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(-1, dtype=wide(device)) - ordered
        rank = torch.arange(grid.num_kv_blocks, device=device)
        blocks = (~grid.given_kv_mask(device)).sum()
        kept = (before <= self.mass * ordered.sum(-1, keepdim=True, dtype=wide(device))) | (
            rank < (self.density * blocks).ceil()
        )
        kv_mask = torch.zeros_like(kept).scatter(-1, order, kept)
        if self.neighbours:
            kv_mask = kv_mask | _neighbours(grid, self.name, device)
        kv_mask = visits_given(kv_mask, grid)
        return Symbols.pack(torch.ones_like(kv_mask[..., 0]), kv_mask, grid)

    def wants_shape(self) -> bool:
        return self.neighbours


def _neighbours(grid: Grid, name: str, device: torch.device) -> Tensor:
    """Block pairs of which two tokens are next to each other or the same: bool ``[Mb, Nb]``."""
    shape = shape_of(grid, name)
    queries, keys = places(grid, shape, device)
    way = torch.arange(27, device=device)  # -1, 0 and 1 along each axis
    moved = [
        at[:, None] + way // 3 ** (2 - axis) % 3 - 1
        for axis, at in enumerate(queries.coordinates())
    ]  # [M, 27] each
    inside = queries.generated[:, None].expand_as(moved[0])
    for at, size in zip(moved, shape, strict=True):
        inside = inside & (at >= 0) & (at < size)
    index = (moved[0] * shape[1] + moved[1]) * shape[2] + moved[2]
    column = keys.positions()[index.clamp(0, keys.count - 1)] // grid.block_n
    row = torch.arange(grid.seqlen_q, device=device)[:, None] // grid.block_m
    pairs = grid.num_q_blocks * grid.num_kv_blocks
    slot = torch.where(inside, row * grid.num_kv_blocks + column, pairs)
    near = torch.zeros(pairs + 1, device=device).scatter_(0, slot.flatten(), 1.0)
    return near[:pairs].view(grid.num_q_blocks, grid.num_kv_blocks) > 0
