"""Skip key blocks only: the selection of SpargeAttn (arXiv 2502.18137), every tile computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from flashomni.policies import AttentionSite, Policy, check_bool, check_range, policy
from flashomni.policies._pooled import (
    coarse_blocks,
    heavy_bits,
    pooled_map,
    visit_columns,
    visit_rows,
)
from flashomni.symbols import Symbols, pack_bits, q_bytes, row_bytes


@policy("spargeattn")
@dataclass(frozen=True)
class SpargeAttn(Policy):
    """Visit the fewest key blocks that hold ``mass`` of each row's pooled attention.

    Args:
        mass: share of the pooled attention to keep (SpargeAttn's top-cdf threshold).
        similarity_gate: blocks whose tokens have a mean cosine below this are always visited.
        protect_text: every row visits the text keys; SpargeAttn itself makes no such exception.
    """

    caches: ClassVar[bool] = False

    mass: float = 0.95
    similarity_gate: float = 0.1
    protect_text: bool = True

    def __post_init__(self) -> None:
        check_range("mass", self.mass, 0.0, 1.0)
        check_range("similarity_gate", self.similarity_gate, -1.0, 1.0)
        check_bool("protect_text", self.protect_text)

    def __call__(self, site: AttentionSite) -> Symbols:
        q, k, grid = site.q, site.k, site.grid
        attention = pooled_map(q, k, grid, backend=site.backend)
        width = row_bytes(grid.num_kv_blocks)
        kv_bits = heavy_bits(attention, 1.0 - self.mass, width, backend=site.backend)
        coarse_q, coarse_k = coarse_blocks(q, k, grid, self.similarity_gate, backend=site.backend)
        kv_bits = visit_columns(visit_rows(kv_bits, coarse_q, grid), coarse_k, grid)
        every = torch.ones(grid.num_q_blocks, dtype=torch.bool, device=q.device)
        q_bits = pack_bits(every, q_bytes(grid.num_q_blocks)).expand(*coarse_q.shape[:2], -1)
        return Symbols.of_bits(q_bits, kv_bits, grid, skip_text_columns=not self.protect_text)
