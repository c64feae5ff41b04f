"""Cache every layer whole between Updates and forecast it (TaylorSeer, arXiv 2503.06923)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flashomni.policies import AttentionSite, Policy, policy
from flashomni.symbols import Grid, Symbols


@policy("taylorseer")
@dataclass(frozen=True)
class TaylorSeer(Policy):
    """All vision tiles cached, so every layer falls to whole-layer caching; order 1 forecast."""

    recipe: ClassVar[Mapping[str, Any]] = {"layer_order": 1, "degrade_below": 1.0}

    def __call__(self, site: AttentionSite) -> Symbols:
        return Symbols.cached(site.grid, site.q.shape[0], site.q.shape[2], site.q.device)

    def known_fraction(self, grid: Grid) -> float:
        return grid.text_q_share
