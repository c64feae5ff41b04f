"""DiTFastAttn (arXiv 2406.08552, v2 2503.22796): a window for each head, as narrow as it bears."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from flashomni.policies import AttentionSite, Policy, check_int, check_range, policy
from flashomni.policies._places import band, places, shape_of
from flashomni.policies._probe import errors, spread_rows
from flashomni.policies._static import visits_given
from flashomni.symbols import Symbols


@policy("dit_fast_attn")
@dataclass(frozen=True)
class DiTFastAttn(Policy):
    """Give each head the narrowest window that changes its output little, else all keys.

    The window is v2's arrow: a band along the sequence, with every text and reference token seen
    and seeing all. A head takes it where the relative squared error of its output is at most
    ``threshold``. The papers measure that once, on calibration prompts; here some rows of the step
    that chooses are measured. Heads reused from the step before (v2) and the residual of the window
    (v1) are not expressed: caches of tiles and layers are, by other policies.

    Args:
        window: width of the narrowest band, as a share of the generated tokens (1/8 in v1).
        wider: how many further bands are tried, each twice as wide.
        threshold: of the relative squared error (delta).
        rows: query rows of a head that are measured.

    Raises:
        ValueError: a setting is out of range.
    """

    caches: ClassVar[bool] = False
    amount: ClassVar[str] = "window"

    window: float = 0.125
    wider: int = 1
    threshold: float = 0.05
    rows: int = 32

    def __post_init__(self) -> None:
        check_range("window", self.window, 0.0, 1.0)
        check_int("wider", self.wider, 0, 8)
        check_range("threshold", self.threshold, 0.0, 1000.0)
        check_int("rows", self.rows, 1, 4096)

    def __call__(self, site: AttentionSite) -> Symbols:
        grid, device = site.grid, site.q.device
        queries, keys = both = places(grid, shape_of(grid, self.name), device)
        rows = spread_rows(queries, self.rows)
        orders = queries.along, keys.along
        apart = (queries.along[rows][:, None] - keys.along).abs()
        reaches = [self.window * 2**n * queries.count / 2 for n in range(self.wider + 1)]
        found = errors(site, rows, [(apart <= reach) | ~keys.generated for reach in reaches])
        kv_mask = torch.ones((), dtype=torch.bool, device=device)
        for reach, error in zip(reversed(reaches), reversed(found.unbind()), strict=True):
            takes = (error <= self.threshold)[..., None, None]  # [B, H, 1, 1]
            kv_mask = torch.where(takes, band(grid, both, orders, reach), kv_mask)
        kv_mask = visits_given(kv_mask, grid)
        return Symbols.pack(torch.ones_like(kv_mask[..., 0]), kv_mask, grid)
