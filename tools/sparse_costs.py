"""What the parts of a step with sparse attention cost, of a dense call of ours.

``python tools/sparse_costs.py`` on a card: sparse calls without and with summaries, a refresh of
what is carried as one kernel and by parts, the making of summaries, and the choice of key blocks by
resolution; interleaved in one process, medians. Maps are random near the diagonal and elsewhere, as
dense in every head. ``--seqlen 640 --heads 2 --device cpu`` is a try.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashomni.kernels import sparse_attention, summarise
from flashomni.kernels.refresh.op import RefreshCall, by_parts, live_and_rest, refresh
from flashomni.lab.ops.timing import interleaved
from flashomni.lab.versions import versions
from flashomni.symbols import Grid, Symbols
from flashomni.symbols.choice.op import Rule, choose

HEAD_DIM, TEXT = 128, 256


def drawn(seqlen: int, heads: int, device: str) -> tuple[Tensor, Tensor, Tensor, Grid]:
    """``q, k, v`` of noise and a grid whose last tokens are text."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, seqlen, heads, HEAD_DIM)
    q, k, v = (torch.randn(shape, generator=generator, device=device, dtype=dtype) for _ in "qkv")
    return q, k, v, Grid(seqlen, seqlen, text=(seqlen - min(TEXT, seqlen // 2), seqlen))


def mapped(grid: Grid, heads: int, density: float, device: str) -> Symbols:
    """Key blocks near the diagonal, as many at random again, and those of the text."""
    blocks = torch.arange(grid.num_kv_blocks, device=device)
    near = (blocks[:, None] - blocks).abs() < density * grid.num_kv_blocks / 4
    generator = torch.Generator(device).manual_seed(1)
    shape = (1, heads, grid.num_q_blocks, grid.num_kv_blocks)
    mask = (torch.rand(shape, generator=generator, device=device) < 0.6 * density) | near
    mask[:, :, -2:] = True
    return Symbols.pack(torch.ones_like(mask[..., 0]), mask, grid)


def of_attention(seqlen: int, heads: int, density: float, device: str, rounds: int) -> list[str]:
    """One line for each part."""
    q, k, v, grid = drawn(seqlen, heads, device)
    symbols = mapped(grid, heads, density, device)
    live, _ = live_and_rest(symbols)
    out = torch.empty_like(q)
    runs: dict[str, Callable[[int], Any]] = {"dense": lambda _: sparse_attention(q, k, v, out=out)}
    for r in (0, 4, 16):
        summary = summarise(k, v, grid, r) if r else None
        call = RefreshCall(
            q, k, v, torch.empty_like(q), torch.empty_like(q), symbols, None, HEAD_DIM**-0.5,
            summary,
        )  # fmt: skip
        if r:
            runs[f"make {r} summaries"] = lambda _, r=r: summarise(k, v, grid, r)
        runs[f"sparse, {r} summaries"] = lambda _, s=summary: sparse_attention(
            q, k, v, live, out=out, summary=s
        )
        runs[f"refresh, {r} summaries"] = lambda _, s=summary: refresh(q, k, v, symbols, summary=s)
        runs[f"refresh by parts, {r} summaries"] = lambda _, call=call: by_parts(call, None)
    mean = float(symbols.kv_mask().float().mean())
    return table(f"{seqlen} tokens, {heads} heads, density {mean:.3f}", runs, q.device, rounds)


def of_choice(seqlen: int, heads: int, device: str, rounds: int) -> list[str]:
    """The choice of a quarter of the key blocks by pooled maps."""
    q, k, v, grid = drawn(seqlen, heads, device)
    power = torch.full((), 0.9, device=device)
    runs: dict[str, Callable[[int], Any]] = {"dense": lambda _: sparse_attention(q, k, v)}
    for resolution in (0, 32, 16, 8):
        rule = Rule(visit="count", count_kv=grid.num_kv_blocks // 4, resolution=resolution)
        name = f"choice by {resolution or grid.block_n} tokens"
        runs[name] = lambda _, rule=rule: choose(q, k, grid, rule, power)
    return table(f"{seqlen} tokens, {heads} heads", runs, q.device, rounds)


def table(
    title: str, runs: dict[str, Callable[[int], Any]], device: torch.device, rounds: int
) -> list[str]:
    """Medians, of those of the dense call."""
    ms = interleaved(runs, device, rounds, 1)
    dense = ms.pop("dense")
    lines = [f"  {name}: {time / dense:.4f} of dense, {time:.3f} ms" for name, time in ms.items()]
    return [f"{title}: dense {dense:.3f} ms", *lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seqlen", type=int, default=33024)
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--densities", type=float, nargs="+", default=[0.25, 0.125])
    parser.add_argument("--choice", type=int, nargs="*", default=[33024, 24, 131072, 8],
                        help="tokens and heads, in turn")  # fmt: skip
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    print(
        " ".join(f"{key} {value}" for key, value in versions(torch.device(args.device)).items()),
        flush=True,
    )
    for density in args.densities:
        some = of_attention(args.seqlen, args.heads, density, args.device, args.rounds)
        print("\n".join(some), flush=True)
    for seqlen, heads in zip(args.choice[::2], args.choice[1::2], strict=True):
        print("\n".join(of_choice(seqlen, heads, args.device, args.rounds)), flush=True)


if __name__ == "__main__":
    main()
