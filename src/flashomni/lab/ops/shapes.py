"""What is measured: sizes named after real models, and random symbols of a given density."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashomni.symbols import Grid, Symbols


@dataclass(frozen=True)
class Shape:
    """A real problem: tokens (text included), heads, head_dim, and the token range of the text."""

    seqlen: int
    num_heads: int
    head_dim: int
    text: tuple[int, int] = (0, 0)

    @property
    def width(self) -> int:
        """Features of a token."""
        return self.num_heads * self.head_dim


SHAPES = {
    "cpu-4096": Shape(4096, 4, 64),
    "tiny-image": Shape(4160, 4, 64, (0, 64)),
    "flux-1024": Shape(4608, 24, 128, (0, 512)),
    "flux-2048": Shape(16896, 24, 128, (0, 512)),
    "hunyuan-33k": Shape(33024, 24, 128, (32768, 33024)),
    "wan-720p": Shape(75600, 40, 128),
    "heads-64": Shape(16896, 48, 64),
    "heads-80": Shape(16896, 38, 80),
    "heads-96": Shape(16896, 32, 96),
    "video-131k": Shape(131072, 24, 128),
}


def exact_symbols(
    grid: Grid, num_heads: int, q_density: float, kv_density: float, seed: int = 0
) -> Symbols:
    """Independent random symbols of exactly these densities (to whole blocks) in every row.

    Args:
        grid: blocks; text rules are left out, so that the density is the one asked for.
        num_heads: heads.
        q_density: share of S_c that is 1, of each head.
        kv_density: share of S_s that is 1, of each row.
        seed: of the choice.
    """
    generator = torch.Generator().manual_seed(seed)
    rows, columns = grid.num_q_blocks, grid.num_kv_blocks

    def choose(density: float, *shape: int) -> Tensor:
        if density == 1.0:
            return torch.ones(shape, dtype=torch.bool)
        count = max(round(density * shape[-1]), 1)
        return torch.rand(shape, generator=generator).argsort(-1).argsort(-1) < count

    q_mask = choose(q_density, 1, num_heads, rows)
    kv_mask = choose(kv_density, 1, num_heads, rows, columns)
    return Symbols.pack(q_mask, kv_mask, grid)
