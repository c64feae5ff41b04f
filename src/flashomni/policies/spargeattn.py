"""SpargeAttn (arXiv 2502.18137): key blocks by the mass of the pooled map, where pooling is fair.

Published for blocks of 128 queries and 64 keys, as its recipe has them (``block_n``). Not
expressed: the second stage, which leaves products with V out inside a tile by its running maximum;
INT8 products; thresholds for each layer and head, which the authors tune for a model.
"""

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
from flashomni.symbols import Symbols
from flashomni.symbols.choice.op import Rule, choose


@policy("spargeattn")
@dataclass(frozen=True)
class SpargeAttn(Policy):
    """Visit the fewest key blocks that hold ``mass`` of each row's pooled attention.

    Args:
        mass: share of the pooled attention to keep (the authors' ``cdfthreshd``).
        similarity_gate: key blocks whose tokens have a mean cosine below this are always visited
            and take no part in the mass, query blocks visit everything (``simthreshd1``).
        protect_text: every row visits the text keys; SpargeAttn itself makes no such exception.
        resolution: make the pooled map of means of so few tokens: 8, 16 or 32; 0 is whole blocks,
            as published.
    """

    caches: ClassVar[bool] = False
    amount: ClassVar[str] = "mass"

    mass: float = 0.95
    similarity_gate: float = 0.1
    protect_text: bool = True
    resolution: int = 0

    def __post_init__(self) -> None:
        check_range("mass", self.mass, 0.0, 1.0)
        check_range("similarity_gate", self.similarity_gate, -1.0, 1.0)
        check_bool("protect_text", self.protect_text)
        check_resolution(self.resolution)

    def __call__(self, site: AttentionSite) -> Symbols:
        rule = Rule(
            visit="mass",
            tau_kv=1.0 - self.mass,
            gate=self.similarity_gate,
            text_columns=self.protect_text,
            resolution=self.resolution,
        )
        scale = site.softmax_scale
        return choose(site.q, site.k, site.grid, rule, softmax_scale=scale, backend=site.backend)
