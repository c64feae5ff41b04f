"""Skip key blocks only: the selection of SpargeAttn (arXiv 2502.18137), every tile computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flashomni.policies import AttentionSite, Policy, check_bool, check_range, policy
from flashomni.symbols import Symbols
from flashomni.symbols.choice.op import Rule, choose


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
        rule = Rule(
            visit="mass",
            tau_kv=1.0 - self.mass,
            gate=self.similarity_gate,
            text_columns=self.protect_text,
        )
        return choose(site.q, site.k, site.grid, rule, backend=site.backend)
