"""Cache every layer whole between Updates: FORA (2407.01425) and TaylorSeer (2503.06923) do so.

How a layer is carried forward is the recipe's forecast: reused as it is, or extrapolated.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashomni.policies import AttentionSite, Policy, policy
from flashomni.symbols import Grid, Symbols


@policy("cached")
@dataclass(frozen=True)
class Cached(Policy):
    """All vision tiles cached; a recipe with ``degrade_below`` 1 then caches whole layers."""

    def __call__(self, site: AttentionSite) -> Symbols:
        return Symbols.cached(site.grid, site.q.shape[0], site.q.shape[2], site.q.device)

    def known_fraction(self, grid: Grid) -> float:
        return grid.text_q_share
