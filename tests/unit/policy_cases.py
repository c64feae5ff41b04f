"""Grids, q and k that the tests of policies share."""

import torch

from flashomni.policies import policies
from flashomni.symbols import Grid

NAMES = sorted(policies())
GRIDS = {
    "text first": Grid(500, 500, (0, 77)),
    "text last": Grid(500, 500, (400, 500), kv_len=torch.tensor([500, 430], dtype=torch.int32)),
    "blocks differ": Grid(700, 700, (0, 130), block_m=64, block_n=128),
}
NO_TEXT = Grid(300, 520)
SET = {
    "radial": {"frames": 4},
    "svg": {"frames": 4},
}  # what a policy needs to be told on a grid without geometry


def inputs(grid, heads=4, kv_heads=2, head_dim=16):
    """q and k with block structure, so that choices are not ties."""
    q = torch.randn(2, grid.seqlen_q, heads, head_dim)
    k = torch.randn(2, grid.seqlen_kv, kv_heads, head_dim)
    for x in (q, k):
        blocks = -(-x.shape[1] // 50)
        drift = torch.randn(2, blocks, x.shape[2], head_dim).repeat_interleave(50, 1)
        x += 1.5 * drift[:, : x.shape[1]]
    return q, k


def progress(value=0.9):
    return torch.tensor(value)


def low_mass_loop(mass, tau):
    """CumSum over ascending values, one entry after the other (algorithm, A.4)."""
    chosen, total = set(), 0.0
    for index in sorted(range(len(mass)), key=lambda i: mass[i]):
        total += mass[index]
        if total <= tau * sum(mass) + 1e-9:
            chosen.add(index)
    return chosen
