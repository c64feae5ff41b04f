"""Compute everything: the lossless recipe, and the reference point of every other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from flashomni.policies import AttentionSite, Policy, policy
from flashomni.symbols import Symbols


@policy("dense")
@dataclass(frozen=True)
class Dense(Policy):
    """All bits 1."""

    caches: ClassVar[bool] = False

    def __call__(self, site: AttentionSite) -> Symbols:
        return Symbols.dense(site.grid, site.q.shape[0], site.q.shape[2], site.q.device)
