"""How long symbols stay right: those of step 4 in later steps of the same dense generation."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from _paired import file_name
from torch import Tensor

from flashomni.engine import Recipe
from flashomni.lab.generation import Generation
from flashomni.models import accelerate
from flashomni.policies import POLICIES, AttentionSite, Policy, make_policy, policy
from flashomni.symbols import Symbols
from flashomni.symbols.choice.op import fine_map

FIRST, LATER = 4, (8, 16, 24)
SHARES = (0.25, 0.125)
NAME = "agreement_probe"


class Record:
    """What the probe has seen: sums over layers, by step and share."""

    def __init__(self) -> None:
        self.chosen: dict[tuple[int, float], Symbols] = {}
        self.sums: dict[tuple[int, float], list[Tensor]] = {}

    def see(self, site: AttentionSite, share: float, symbols: Symbols) -> None:
        """The choice of a layer in a step."""
        if site.step == FIRST:
            self.chosen[site.layer, share] = symbols
        mask = symbols.kv_mask()
        old = self.chosen[site.layer, share].kv_mask()
        mass = fine_map(site.q, site.k, site.grid, 8)
        total = mass.sum()
        both = (mask & old).sum() / mask.sum()
        now, kept = (mass * mask).sum() / total, (mass * old).sum() / total
        self.sums.setdefault((site.step, share), []).append(torch.stack([both.float(), now, kept]))


def agreement(
    model: str,
    loaded: Any,
    pair: tuple[tuple[int, str], int],
    folder: Path,
    steps: int | None,
    deadline: float,
) -> None:
    """Run one dense generation, watched, and keep what it shows in ``folder``."""
    path = folder / f"{file_name(model)}-agreement.json"
    if path.exists() or time.monotonic() > deadline:
        return
    record = Record()

    @policy(NAME)
    @dataclass(frozen=True)
    class Probe(Policy):
        """Chooses as `topk` does, and visits everything."""

        caches: ClassVar[bool] = False

        def __call__(self, site: AttentionSite) -> Symbols:
            if site.step in (FIRST, *LATER):
                for share in SHARES:
                    chooser = make_policy(
                        "topk", q_density=1.0, kv_density=share, resolution=8, diagonal=True
                    )
                    record.see(site, share, chooser(site))
            return Symbols.dense(site.grid, site.q.shape[0], site.q.shape[2], site.q.device)

    try:
        recipe = Recipe.of(f"{NAME}:interval=1,warmup=0,in_computed=true,choose_at=computed,"
                           "token_order=hilbert")  # fmt: skip
        (_, text), seed = pair
        generation = Generation(loaded, text, seed, steps)
        with accelerate(generation.pipe, recipe):
            generation.discard()
    finally:
        POLICIES.remove(NAME)
    rows = [
        {"step": step, "share": share, "both": both, "now": now, "kept": kept}
        for (step, share), seen in sorted(record.sums.items())
        for both, now, kept in [torch.stack(seen).mean(0).tolist()]
    ]
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def shown(model: str, folder: Path) -> list[str]:
    """Lines of a table in Markdown; none where nothing was measured."""
    path = folder / f"{file_name(model)}-agreement.json"
    if not path.exists():
        return []
    return [
        f"| {model} | {row['share']:g} | {row['step']} | {row['both']:.1%} | {row['now']:.1%} | "
        f"{row['kept']:.1%} |"
        for row in json.loads(path.read_text(encoding="utf-8"))
    ]
