"""What a run on mixed sizes trains on and when: rungs (a size and a length), phases, their cost.

``python training/ladder.py --seconds 430`` prints the plan: FLOPs of a step, its estimated time and
how many optimiser steps of each rung fit.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

LAYERS, WIDTH, PIXELS_PER_TOKEN, TEXT = 7, 256, 8, 20
BUDGET = 70_000  # tokens of a step
FLOPS = 350e12  # attention forward and backward in bf16 on an H200, by torch's kernels
PER_TOKEN = 0.6e-6  # seconds a token and step for everything that only moves memory
NATIVE = 65  # frames of a whole clip


@dataclass(frozen=True)
class Rung:
    """Clips of one size and length, as they are drawn, batched and noised."""

    size: int  # pixels
    frames: int
    shift: float  # of the noise levels
    reuse: int  # how often a rendered and encoded clip is used, on average
    first: int  # clips to render before the first step
    every: int = 1  # text lengths to keep: fixed shapes where a kernel is built for each

    @property
    def name(self) -> str:
        return f"{self.size}x{self.frames}"

    @property
    def tokens(self) -> int:
        """Video tokens of a clip."""
        return (self.frames + 3) // 4 * (self.size // PIXELS_PER_TOKEN) ** 2

    @property
    def stride(self) -> int:
        """Every how many-th frame of the whole clip is shown."""
        return (NATIVE - 1) // (self.frames - 1) if self.frames > 1 else 2

    @property
    def detail(self) -> float:
        """How much finer patterns and textures are than 128 pixels can show."""
        return max(1.0, self.size / 128)

    def batch(self, budget: int = BUDGET) -> int:
        return max(1, budget // self.tokens)

    def flops(self) -> float:
        """Forward and backward, one clip: attention 3.5 times its forward, linear maps 3 times."""
        rows = self.tokens + TEXT
        attention = 4 * rows * rows * WIDTH * LAYERS
        linear = 2 * 12 * rows * WIDTH * WIDTH * LAYERS
        return 3.5 * attention + 3 * linear

    def seconds(self) -> float:
        """Estimated time of one clip."""
        return self.flops() / FLOPS + self.tokens * PER_TOKEN


SMALL = Rung(128, 65, 5.0, 6, 256)
MIDDLE = Rung(256, 65, 6.0, 5, 64, every=5)
LARGE = Rung(352, 65, 7.0, 5, 32, every=5)
PICTURES = (Rung(256, 1, 3.0, 2, 512), Rung(352, 1, 3.5, 2, 256))
SHORT = (Rung(256, 17, 4.5, 4, 96), Rung(352, 17, 5.5, 4, 64))

# (progress at which the phase ends, share of the time for each rung): new positions are learned
# from still pictures first, then from short clips, which cost a fraction of a whole one.
PHASES: tuple[tuple[float, dict[Rung, float]], ...] = (
    (0.05, {SMALL: 0.20, PICTURES[0]: 0.40, PICTURES[1]: 0.40}),
    (0.17, {SMALL: 0.15, PICTURES[1]: 0.10, SHORT[0]: 0.35, SHORT[1]: 0.40}),
    (0.55, {SMALL: 0.15, SHORT[1]: 0.10, MIDDLE: 0.30, LARGE: 0.45}),
    (1.00, {SMALL: 0.15, MIDDLE: 0.28, LARGE: 0.57}),
)
# From nothing: what things are called and look like is learned from pictures of 256 tokens, motion
# from short clips. A large clip shows its layout through more noise than a small one, hence shifts.
# Drawing and encoding is dearer than a step of so small a model: a clip is used often.
_PICTURE, _SHORT = Rung(128, 1, 2.5, 10, 1000), Rung(128, 17, 4.5, 10, 400)
_CLIPS = (Rung(128, 65, 7.0, 12, 128), Rung(256, 65, 9.0, 12, 48), Rung(352, 65, 11.0, 12, 24))
_PICTURES = (Rung(256, 1, 4.0, 10, 500), Rung(352, 1, 5.0, 10, 264))
_SHORTS = (Rung(256, 17, 6.0, 10, 98), Rung(352, 17, 7.5, 10, 51))
WAN_PHASES: tuple[tuple[float, dict[Rung, float]], ...] = (
    (0.14, {_PICTURE: 0.65, _PICTURES[0]: 0.20, _PICTURES[1]: 0.15}),
    (0.30, {_SHORT: 0.55, _PICTURE: 0.10, _PICTURES[1]: 0.10, _SHORTS[0]: 0.25}),
    (0.46, {_SHORT: 0.10, _CLIPS[0]: 0.30, _SHORTS[0]: 0.25, _SHORTS[1]: 0.35}),
    (0.68, {_CLIPS[0]: 0.22, _SHORTS[1]: 0.13, _CLIPS[1]: 0.35, _CLIPS[2]: 0.30}),
    (1.00, {_CLIPS[0]: 0.14, _CLIPS[1]: 0.31, _CLIPS[2]: 0.55}),
)


def toy(phases: tuple[tuple[float, dict[Rung, float]], ...]):
    """The same phases with clips of 32 and 64 pixels and at most 9 frames."""
    return tuple(
        (
            end,
            {
                Rung(
                    32 + 32 * (r.size > 128), min(r.frames, 9), r.shift, r.reuse, 4, r.every
                ): share
                for r, share in shares.items()
            },
        )
        for end, shares in phases
    )


TOY = toy(PHASES)


def phase(progress: float, phases=PHASES) -> tuple[int, dict[Rung, float]]:
    """Number and shares of the phase at ``progress`` in [0, 1]."""
    for number, (end, shares) in enumerate(phases):
        if progress < end:
            return number, shares
    return len(phases) - 1, phases[-1][1]


def choose(shares: dict[Rung, float], spent: dict[str, float]) -> Rung:
    """The rung that is furthest behind its share; ``spent`` holds estimated seconds by name."""
    return min(shares, key=lambda rung: spent.get(rung.name, 0.0) / shares[rung])


def plan(seconds: float, budget: int = BUDGET) -> str:
    """A table of what fits into ``seconds`` of training."""
    time: dict[Rung, float] = {}
    begin = 0.0
    for end, shares in PHASES:
        for rung, share in shares.items():
            time[rung] = time.get(rung, 0.0) + (end - begin) * seconds * share
        begin = end
    lines = [f"{'rung':>8}{'tokens':>9}{'batch':>7}{'TFLOP/step':>12}{'ms/step':>9}{'steps':>8}"]
    for rung, spent in time.items():
        batch = rung.batch(budget)
        flops, cost = batch * rung.flops() / 1e12, batch * rung.seconds()
        lines.append(
            f"{rung.name:>8}{rung.tokens:9}{batch:7}{flops:12.1f}{1e3 * cost:9.0f}"
            f"{spent / cost:8.0f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=860.0, help="of training in all")
    parser.add_argument("--budget", type=int, default=BUDGET, help="tokens of a step")
    args = parser.parse_args()
    print(plan(args.seconds, args.budget))
