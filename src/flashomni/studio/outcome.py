"""What a page asks for, and what comes of it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from flashomni.engine import Summary
from flashomni.lab import metrics

MOST_STEPS = 1000


@dataclass(frozen=True)
class Ask:
    """What to generate.

    Attributes:
        prompt: text.
        seed: of the initial noise.
        steps: of denoising.
        size: arguments of the call in place of the pipeline's own: ``height``, ``num_frames``, ...
        live: whether pictures are shown while they come.
        dense: whether the stock pipeline runs too; its last result is used where it is of the same.
    """

    prompt: str
    seed: int = 0
    steps: int = 28
    size: Mapping[str, int] = field(default_factory=dict)
    live: bool = True
    dense: bool = True

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or not 1 <= self.steps <= MOST_STEPS:
            raise ValueError(f"steps must be from 1 to {MOST_STEPS}, got {self.steps!r}")
        if not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be a whole number from 0, got {self.seed!r}")
        for name, value in self.size.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a whole number from 1, got {value!r}")


@dataclass(frozen=True)
class Dense:
    """What the stock pipeline made: frames ``[F, 3, H, W]`` in [0, 1], and its seconds."""

    pixels: Tensor
    seconds: float
    call_seconds: list[float]


@dataclass(frozen=True)
class Outcome:
    """What a run made.

    Attributes:
        model: name of the pipeline.
        ask: what was asked for.
        call: arguments of the pipeline's call.
        accelerated: frames ``[F, 3, H, W]`` in [0, 1].
        seconds: of the accelerated call; previews are not counted.
        summary: what was computed and skipped.
        dense: of the stock pipeline, if it was wanted.
        distance: of the two, if there are two.
        flip: mean FLIP of the two; ``None`` where it is not measured.
        reused: whether the dense result is of an earlier run.
        note: why there was no live preview.
    """

    model: str
    ask: Ask
    call: dict[str, Any]
    accelerated: Tensor
    seconds: float
    summary: Summary
    dense: Dense | None = None
    distance: metrics.Distance | None = None
    flip: float | None = None
    reused: bool = False
    note: str = ""

    @property
    def speedup(self) -> float | None:
        return None if self.dense is None else self.dense.seconds / self.seconds

    @property
    def notes(self) -> list[str]:
        distance = () if self.distance is None else self.distance.notes
        return [*distance, *self.summary.notes, *([self.note] if self.note else [])]


@dataclass(frozen=True)
class Row:
    """A result in a line, without its pictures.

    Attributes:
        recipe: its name.
        computed: steps that were computed in some layer.
        steps: of the generation.
        seconds: of the accelerated call.
        speedup: against the stock pipeline, if that ran.
        psnr_db: to its result; infinite where both are identical.
        flip: likewise, the mean.
        skipped: share of the blocks' FLOPs.
    """

    recipe: str
    computed: int
    steps: int
    seconds: float
    speedup: float | None
    psnr_db: float | None
    flip: float | None
    skipped: float

    @classmethod
    def of(cls, outcome: Outcome) -> Row:
        summary, distance = outcome.summary, outcome.distance
        live = {step["step"] for step in summary.steps if step["kind"] != "dispatch"}
        known = None if distance is None else distance.psnr_db
        return cls(
            summary.recipe.get("name", "several"),
            len(live),
            outcome.ask.steps,
            outcome.seconds,
            outcome.speedup,
            math.inf if distance is not None and distance.identical else known,
            outcome.flip,
            summary.flops_skipped,
        )
