"""Multi-granularity symbols of FlashOmni (arXiv 2509.25401, section 3.5).

Which query blocks to cache is read off the pooled attention map P between text and vision: C, what
a vision block gives to the text (v -> t), and G, how much the text steers it (t -> v). The blocks
that hold the least of both are cached. Which key blocks to skip follows SpargeAttn: the lightest
entries of each row of P. Both thresholds grow with the steps, so early steps stay nearly dense.

Where the text is not in the sequence (Wan, LTX, PixArt ...) C is what a block gives to all rows,
and G comes from the map of the model's cross-attention, where the site has one; without, C decides.

The public sources disagree on details; each variant is an option here.
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
        center_k: subtract the mean key before the scores: the same map but for rounding.
        protect_text: text rows visit every key, and every row visits the text keys. Without it
            skipping treats text like the rest; caching leaves text alone either way.
        resolution: make the pooled map of means of so few tokens: 8, 16 or 32; 0 is whole blocks.

    Raises:
        ValueError: a setting is out of range; or, when called, ``combine`` is ``g`` and there is
            neither text in the sequence nor a map of cross-attention.
    """

    prefers_text: ClassVar[bool] = True
    amount: ClassVar[str] = "tau_kv"

    tau_q: float = 0.5
    tau_kv: float = 0.15
    power: float = 2.0
    combine: str = "and"
    share_heads: bool = False
    similarity_gate: float | None = None
    center_k: bool = False
    protect_text: bool = True
    resolution: int = 0

    def __post_init__(self) -> None:
        check_range("tau_q", self.tau_q, 0.0, 1.0)
        check_range("tau_kv", self.tau_kv, 0.0, 1.0)
        check_range("power", self.power, 0.0, 10.0)
        if self.combine not in COMBINE:
            raise ValueError(f"combine must be one of {', '.join(COMBINE)}, got {self.combine!r}")
        check_bool("share_heads", self.share_heads)
        check_bool("center_k", self.center_k)
        check_bool("protect_text", self.protect_text)
        check_resolution(self.resolution)
        if self.similarity_gate is not None:
            check_range("similarity_gate", self.similarity_gate, -1.0, 1.0)

    def __call__(self, site: AttentionSite) -> Symbols:
        grid, guide = site.grid, None if site.grid.text_spans else site.guide
        knows_g = guide is not None or bool(grid.text_spans)
        if self.combine == "g" and not knows_g:
            raise ValueError(
                "policy flashomni with combine='g' needs text tokens in the attention, or a map of "
                f"cross-attention, got a {grid}; combine='c' does not"
            )
        rule = Rule(
            visit="mass" if self.tau_kv else "all",
            compute=self.combine if knows_g else "c",
            tau_q=self.tau_q,
            tau_kv=self.tau_kv,
            power=self.power,
            share_heads=self.share_heads,
            gate=self.similarity_gate,
            center_k=self.center_k,
            text_rows=self.protect_text,  # they carry the prompt
            text_columns=self.protect_text,
            resolution=self.resolution,
        )
        return choose(
            site.q, site.k, grid, rule, site.progress, guide=guide,
            softmax_scale=site.softmax_scale, backend=site.backend,
        )  # fmt: skip
