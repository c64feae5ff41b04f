"""Skip key blocks only: the selection of SpargeAttn (arXiv 2502.18137), every tile computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flashomni.policies import Policy, check_bool, check_range, policy
from flashomni.policies._pooled import low_mass, pooled_map, self_similarity
from flashomni.symbols import Grid, Symbols


@policy
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

    def __call__(self, q: Tensor, k: Tensor, grid: Grid, progress: Tensor) -> Symbols:
        kv_mask = ~low_mass(pooled_map(q, k, grid), 1.0 - self.mass)
        coarse_q = self_similarity(q, grid.block_m, None) < self.similarity_gate
        coarse_k = self_similarity(k, grid.block_n, grid.kv_len) < self.similarity_gate
        coarse_k = coarse_k.repeat_interleave(q.shape[2] // k.shape[2], dim=1)
        kv_mask = kv_mask | coarse_q[..., None] | coarse_k[..., None, :]
        q_mask = torch.ones_like(coarse_q)
        return Symbols.pack(q_mask, kv_mask, grid, skip_text_columns=not self.protect_text)
