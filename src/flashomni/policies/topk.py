"""A fixed share of tiles and of key blocks, the heaviest: a benchmark can ask for a density."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flashomni.policies import (
    AttentionSite,
    Policy,
    check_bool,
    check_range,
    check_resolution,
    policy,
)
from flashomni.symbols import Grid, Symbols
from flashomni.symbols.choice.op import Rule, choose


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
        resolution: make the pooled map of means of so few tokens: 8, 16 or 32; 0 is whole blocks.
        diagonal: every row visits the blocks of its own tokens, beside the heaviest ones.
        text_rows: text rows visit everything.
    """

    amount: ClassVar[str] = "kv_density"

    q_density: float = 0.5
    kv_density: float = 0.5
    share_heads: bool = False
    resolution: int = 0
    diagonal: bool = False
    text_rows: bool = False

    def __post_init__(self) -> None:
        check_range("q_density", self.q_density, 0.0, 1.0)
        check_range("kv_density", self.kv_density, 0.0, 1.0)
        check_bool("share_heads", self.share_heads)
        check_resolution(self.resolution)
        check_bool("diagonal", self.diagonal)
        check_bool("text_rows", self.text_rows)

    def __call__(self, site: AttentionSite) -> Symbols:
        grid = site.grid
        rule = Rule(
            visit="count",
            compute="count",
            count_q=_count(self.q_density, grid.num_q_blocks, least=0),
            count_kv=_count(self.kv_density, grid.num_kv_blocks, least=1),
            share_heads=self.share_heads,
            resolution=self.resolution,
            diagonal=self.diagonal,
            text_rows=self.text_rows,
        )
        scale = site.softmax_scale
        return choose(site.q, site.k, grid, rule, softmax_scale=scale, backend=site.backend)

    def known_fraction(self, grid: Grid) -> float:
        computed = _count(self.q_density, grid.num_q_blocks, least=0) / grid.num_q_blocks
        return max(computed, grid.text_q_share)


def _count(density: float, blocks: int, least: int) -> int:
    return max(round(density * blocks), least)
