"""Multi-granularity symbols of FlashOmni (arXiv 2509.25401, section 3.5).

Which query blocks to cache is read off the pooled attention map P between text and vision: C, what
a vision block gives to the text (v -> t), and G, how much the text steers it (t -> v). The blocks
that hold the least of both are cached. Which key blocks to skip follows SpargeAttn: the lightest
entries of each row of P. Both thresholds grow with the steps, so early steps stay nearly dense.

The public sources disagree on details; each variant is an option here.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from flashomni.policies import (
    AttentionSite,
    Policy,
    check_bool,
    check_range,
    policy,
    require_text,
)
from flashomni.policies._pooled import (
    coarse_blocks,
    heavy_bits,
    pooled_map,
    visit_columns,
    visit_rows,
)
from flashomni.symbols import Grid, Symbols, pack_bits, q_bytes, row_bytes

COMBINE = ("and", "mean", "c", "g")


@policy("flashomni")
@dataclass(frozen=True)
class FlashOmni(Policy):
    """Cache what matters little to the text, skip what holds little attention.

    Args:
        tau_q: share of the text-coupling mass that may be cached, at the last step.
        tau_kv: share of each row's attention mass that may be skipped, at the last step.
        power: p of the schedule ``tau(t) = tau * progress ** p``; 0 is constant.
        combine: ``and``: light in C and light in G (paper); ``mean``: one test on their mean;
            ``c`` or ``g``: only one of them.
        share_heads: one S_c for all heads, from the sum over heads.
        similarity_gate: blocks whose tokens have a mean cosine below this are pooled badly, so
            they are always computed and visited; ``None`` gates nothing.
        center_k: subtract the mean key before pooling.
        protect_text: text rows visit every key, and every row visits the text keys. Without it
            skipping treats text like the rest; caching leaves text alone either way.

    Raises:
        ValueError: a setting is out of range; or, when called, the grid has no text.
    """

    needs_text: ClassVar[bool] = True

    tau_q: float = 0.5
    tau_kv: float = 0.15
    power: float = 2.0
    combine: str = "and"
    share_heads: bool = False
    similarity_gate: float | None = None
    center_k: bool = False
    protect_text: bool = True

    def __post_init__(self) -> None:
        check_range("tau_q", self.tau_q, 0.0, 1.0)
        check_range("tau_kv", self.tau_kv, 0.0, 1.0)
        check_range("power", self.power, 0.0, 10.0)
        if self.combine not in COMBINE:
            raise ValueError(f"combine must be one of {', '.join(COMBINE)}, got {self.combine!r}")
        check_bool("share_heads", self.share_heads)
        check_bool("center_k", self.center_k)
        check_bool("protect_text", self.protect_text)
        if self.similarity_gate is not None:
            check_range("similarity_gate", self.similarity_gate, -1.0, 1.0)

    def __call__(self, site: AttentionSite) -> Symbols:
        q, k, grid, backend = site.q, site.k, site.grid, site.backend
        require_text(self, grid)
        growth = site.progress**self.power if self.power else 1.0
        attention = pooled_map(q, k, grid, self.center_k, backend=backend)  # [B, H, Mb, Nb]
        q_bits = self._computed(attention, grid, self.tau_q * growth, backend)
        kv_bits = self._visited(attention, grid, self.tau_kv * growth, backend)
        if self.similarity_gate is not None:
            coarse_q, coarse_k = coarse_blocks(q, k, grid, self.similarity_gate, backend=backend)
            q_bits = q_bits | pack_bits(coarse_q, q_bits.shape[-1])
            kv_bits = visit_columns(visit_rows(kv_bits, coarse_q, grid), coarse_k, grid)
        return Symbols.of_bits(q_bits, kv_bits, grid, skip_text_columns=not self.protect_text)

    def _visited(
        self, attention: Tensor, grid: Grid, tau: Tensor | float, backend: str | None
    ) -> Tensor:
        """S_s bits of all but the lightest key blocks of each row."""
        device = attention.device
        if self.tau_kv == 0:
            return grid.all_kv_bits(device).expand(*attention.shape[:3], -1)
        kv_bits = heavy_bits(attention, tau, row_bytes(grid.num_kv_blocks), backend=backend)
        if self.protect_text:  # text rows visit everything: they carry the prompt
            kv_bits = visit_rows(kv_bits, grid.text_q_mask(device), grid)
        return kv_bits

    def _computed(
        self, attention: Tensor, grid: Grid, tau: Tensor | float, backend: str | None
    ) -> Tensor:
        """S_c bits of the vision query blocks that may not be cached; text is left to Symbols."""
        batch, num_heads, rows, _ = attention.shape
        text_q, text_kv = grid.text_q_ranges, grid.text_kv_ranges
        vision_q, vision_kv = grid.vision_q_ranges, grid.vision_kv_ranges
        if not vision_q or not vision_kv:  # nothing to tell apart: all is computed
            every = torch.ones(rows, dtype=torch.bool, device=attention.device)
            return pack_bits(every, q_bytes(rows)).expand(batch, num_heads, -1)
        given = _take(_take(attention, text_q, -2), vision_kv, -1).sum(-2)
        if grid.block_m != grid.block_n:
            given = _regrid(given, sum(stop - start for start, stop in vision_q))
        # C is in given, [B, H, vision kv blocks], G in guided, [B, H, vision q blocks].
        guided = _take(_take(attention, vision_q, -2), text_kv, -1).softmax(-2).sum(-1)
        if self.share_heads:
            given, guided = given.sum(1, keepdim=True), guided.sum(1, keepdim=True)

        def heavy(mass: Tensor) -> Tensor:
            # Text blocks without mass change neither a sum nor a choice among the others.
            return heavy_bits(_spread(mass, vision_q, rows), tau, q_bytes(rows), backend=backend)

        tests = {
            "and": lambda: heavy(given) | heavy(guided),
            "mean": lambda: heavy(_share(given) + _share(guided)),
            "c": lambda: heavy(given),
            "g": lambda: heavy(guided),
        }
        return tests[self.combine]().expand(-1, num_heads, -1)


def _take(x: Tensor, ranges: tuple[tuple[int, int], ...], dim: int) -> Tensor:
    """The entries of ``dim`` in the ranges, one range after the other."""
    parts = [x.narrow(dim, start, stop - start) for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _spread(mass: Tensor, ranges: tuple[tuple[int, int], ...], count: int) -> Tensor:
    """The inverse of :func:`_take` on the last dim of ``count`` entries: 0 between the ranges."""
    parts = mass.split([stop - start for start, stop in ranges], -1)
    ends = [*(start for start, _ in ranges[1:]), count]
    padded = []
    for i, (part, (start, stop), end) in enumerate(zip(parts, ranges, ends, strict=True)):
        padded.append(torch.nn.functional.pad(part, (0 if i else start, end - stop)))
    return padded[0] if len(padded) == 1 else torch.cat(padded, -1)


def _share(mass: Tensor) -> Tensor:
    return mass / mass.sum(-1, keepdim=True)


def _regrid(mass: Tensor, count: int) -> Tensor:
    """Mass per key block -> per query block, when the two block sizes differ."""
    return torch.nn.functional.interpolate(mass, size=count, mode="area")
