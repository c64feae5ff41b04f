"""Cache every layer whole between Updates and reuse it as it is (FORA, arXiv 2407.01425)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from flashomni.policies import AttentionSite, Policy, policy
from flashomni.symbols import Grid, Symbols


@policy("fora")
@dataclass(frozen=True)
class Fora(Policy):
    """All vision tiles cached, so every layer falls to whole-layer caching; no forecast."""

    recipe: ClassVar[Mapping[str, Any]] = {"order": 0, "layer_order": 0, "degrade_below": 1.0}

    def __call__(self, site: AttentionSite) -> Symbols:
        return Symbols.cached(site.grid, site.q.shape[0], site.q.shape[2], site.q.device)

    def known_fraction(self, grid: Grid) -> float:
        return grid.text_q_share
