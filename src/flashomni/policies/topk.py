"""A fixed share of tiles and of key blocks, the heaviest: a benchmark can ask for a density."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from flashomni.policies import AttentionSite, Policy, check_bool, check_range, policy
from flashomni.policies._pooled import heaviest_bits, pooled_map
from flashomni.symbols import Grid, Symbols, q_bytes, row_bytes


@policy("topk")
@dataclass(frozen=True)
class TopK(Policy):
    """Compute the query blocks that receive, and visit the key blocks that hold, most attention.

    Densities count text blocks, which are always kept: a density below their share gives that
    share. Rounded to whole blocks.

    Args:
        q_density: fraction of query blocks to compute in each head.
        kv_density: fraction of key blocks to visit in each row.
        share_heads: one S_c for all heads.
    """

    q_density: float = 0.5
    kv_density: float = 0.5
    share_heads: bool = False

    def __post_init__(self) -> None:
        check_range("q_density", self.q_density, 0.0, 1.0)
        check_range("kv_density", self.kv_density, 0.0, 1.0)
        check_bool("share_heads", self.share_heads)

    def __call__(self, site: AttentionSite) -> Symbols:
        grid = site.grid
        attention = pooled_map(site.q, site.k, grid, backend=site.backend)  # [B, H, Mb, Nb]
        # Text counts towards the density, so it is put above every vision block.
        for start, stop in grid.text_kv_ranges:
            attention[..., start:stop] = 2.0
        visited = _count(self.kv_density, grid.num_kv_blocks, least=1)
        kv_bits = heaviest_bits(
            attention, visited, row_bytes(grid.num_kv_blocks), backend=site.backend
        )
        received = attention.sum(-2)  # [B, H, Nb]
        if grid.num_q_blocks != grid.num_kv_blocks:
            received = torch.nn.functional.interpolate(received, size=grid.num_q_blocks)
        for start, stop in grid.text_q_ranges:
            received[..., start:stop] = torch.inf
        if self.share_heads:
            received = received.sum(1, keepdim=True).expand_as(received)
        computed = _count(self.q_density, grid.num_q_blocks, least=0)
        q_bits = heaviest_bits(received, computed, q_bytes(grid.num_q_blocks), backend=site.backend)
        return Symbols.of_bits(q_bits, kv_bits, grid)

    def known_fraction(self, grid: Grid) -> float:
        computed = _count(self.q_density, grid.num_q_blocks, least=0) / grid.num_q_blocks
        return max(computed, grid.text_q_share)


def _count(density: float, blocks: int, least: int) -> int:
    return max(round(density * blocks), least)
