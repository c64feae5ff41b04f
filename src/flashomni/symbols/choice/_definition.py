"""The pooled attention map and the choices made on it, in torch: what the ops of ``op.py`` mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flashomni.symbols.bits import pack_bits, q_bytes, row_bytes, unpack_bits
from flashomni.symbols.choice._fine import fine_map
from flashomni.symbols.choice._pool import is_text_last, pool
from flashomni.symbols.grid import Grid
from flashomni.symbols.symbols import Symbols
from flashomni.symbols.wide import wide

if TYPE_CHECKING:
    from flashomni.symbols.choice.op import ChooseCall, LiveCall, MeasureCall, Rule

Ranges = tuple[tuple[int, int], ...]


def self_similarity(x: Tensor, block: int, length: Tensor | None) -> Tensor:
    """Mean cosine over all pairs of tokens of a block: fp32 ``[B, H, blocks]``."""
    unit = torch.nn.functional.normalize(x.float(), dim=-1)
    return pool(unit, block, length).square().sum(-1)


def pooled_map(
    q: Tensor, k: Tensor, grid: Grid, center_k: bool = False, softmax_scale: float | None = None
) -> Tensor:
    """Softmax of the scores of block means (SpargeAttn, arXiv 2502.18137; arXiv 2509.25401, 3.5).

    Args:
        q: ``[B, M, H, D]``.
        k: ``[B, N, Hkv, D]``; key heads are repeated for GQA.
        grid: padding behind ``kv_len`` takes part in no mean, blocks of padding alone get 0.
        center_k: subtract the mean key first: the same map, with more of its digits where all keys
            share a large part.
        softmax_scale: of the scores; ``D ** -0.5`` by default.

    Returns:
        fp32 ``[B, H, Mb, Nb]``, rows sum to 1.
    """
    q_pool = pool(q, grid.block_m, grid.kv_len if is_text_last(grid) else None)
    k_pool = pool(k, grid.block_n, grid.kv_len)
    if center_k:
        k_pool = k_pool - k_pool.mean(2, keepdim=True)
    k_pool = k_pool.repeat_interleave(q.shape[2] // k.shape[2], dim=1)
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else softmax_scale
    score = (q_pool * scale) @ k_pool.mT
    if grid.kv_len is not None:
        first = torch.arange(grid.num_kv_blocks, device=q.device) * grid.block_n
        padding = first >= grid.kv_len[:, None]  # [B, Nb]
        score = score.masked_fill(padding[:, None, None], -torch.inf)
    return score.softmax(-1)


def low_mass(mass: Tensor, tau: Tensor | float) -> Tensor:
    """The lightest entries of the last dim that together hold at most ``tau`` of its sum.

    An entry heavier than ``tau`` is never among them; of equal entries the first are the lightest.
    bool, shape of ``mass``, which must not be negative.
    """
    ordered, order = mass.sort(dim=-1, stable=True)
    prefix = ordered.cumsum(-1, dtype=wide(mass.device))
    low = prefix <= _scalar(tau, mass) * prefix[..., -1:]
    return torch.zeros_like(low).scatter(-1, order, low)


def heaviest(mass: Tensor, count: int) -> Tensor:
    """The ``count`` heaviest entries of the last dim; of equal entries the first.

    bool, shape of ``mass``, which must not be negative.
    """
    order = mass.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(mass, dtype=torch.bool)
    return chosen.scatter(-1, order[..., :count], True)


def _scalar(tau: Tensor | float, like: Tensor) -> Tensor:
    """``tau`` as an fp32 scalar on the device, so that no way of choosing rounds it otherwise."""
    if isinstance(tau, Tensor):
        return tau.float()
    return torch.full((), tau, dtype=torch.float32, device=like.device)


def choose(call: ChooseCall) -> list[Tensor]:
    q, k, grid, rule = call.q, call.k, call.grid, call.rule
    growth: Tensor | float = 1.0
    if rule.power:
        assert call.progress is not None, "power needs progress"
        growth = call.progress**rule.power
    if rule.resolution:
        attention = fine_map(q, k, grid, rule.resolution, call.scale)  # [B, H, Mb, Nb]
    else:
        attention = pooled_map(q, k, grid, rule.center_k, call.scale)
    if rule.visit == "count":  # text counts towards the density, above every vision block
        for start, stop in grid.text_kv_ranges:
            attention[..., start:stop] = 2.0
    q_bits = _computed(attention, call.guide, grid, rule, rule.tau_q * growth)
    if rule.gate is None:
        kv_bits = _visited(attention, grid, rule, rule.tau_kv * growth)
    else:
        coarse_q = self_similarity(q, grid.block_m, None) < rule.gate  # [B, H, Mb]
        coarse_k = self_similarity(k, grid.block_n, grid.kv_len) < rule.gate
        coarse_k = coarse_k.repeat_interleave(q.shape[2] // k.shape[2], dim=1)
        if rule.visit == "mass":  # what is visited anyway takes no part in the test
            attention = attention.masked_fill(coarse_k[..., None, :], 0.0)
        kv_bits = _visited(attention, grid, rule, rule.tau_kv * growth)
        q_bits = q_bits | pack_bits(coarse_q, q_bits.shape[-1])
        kv_bits = kv_bits | coarse_q[..., None] * grid.all_kv_bits(q.device)
        kv_bits = kv_bits | pack_bits(coarse_k, kv_bits.shape[-1])[..., None, :]
    symbols = Symbols.of_bits(q_bits, kv_bits, grid, skip_text_columns=not rule.text_columns)
    return [symbols.q_bits, symbols.kv_bits]


def _visited(attention: Tensor, grid: Grid, rule: Rule, tau: Tensor | float) -> Tensor:
    """S_s bits, before the gate and the rules that every policy keeps."""
    device, width = attention.device, row_bytes(grid.num_kv_blocks)
    if rule.visit == "all":
        return grid.all_kv_bits(device).expand(*attention.shape[:3], -1)
    if rule.visit == "count":
        visited = heaviest(attention, rule.count_kv)
    else:
        visited = ~low_mass(attention, tau)
    if rule.diagonal:
        visited = visited | _diagonal(grid, device)
    kv_bits = pack_bits(visited, width)
    if rule.text_rows:
        kv_bits = kv_bits | grid.text_q_mask(device)[..., None] * grid.all_kv_bits(device)
    return kv_bits


def _diagonal(grid: Grid, device: torch.device) -> Tensor:
    """True where a query and a key block share tokens: bool ``[Mb, Nb]``."""
    row = torch.arange(grid.num_q_blocks, device=device)[:, None] * grid.block_m
    column = torch.arange(grid.num_kv_blocks, device=device) * grid.block_n
    return (row < column + grid.block_n) & (column < row + grid.block_m)


def _computed(
    attention: Tensor, guide: Tensor | None, grid: Grid, rule: Rule, tau: Tensor | float
) -> Tensor:
    """S_c bits; those of text are left to Symbols."""
    batch, num_heads, rows, _ = attention.shape
    width, vision_q = q_bytes(rows), grid.vision_q_ranges
    if computes_all(rule, grid):
        every = torch.ones(rows, dtype=torch.bool, device=attention.device)
        return pack_bits(every, width).expand(batch, num_heads, -1)
    if rule.compute == "count":
        received = attention.sum(-2)  # [B, H, Nb]
        if grid.num_q_blocks != grid.num_kv_blocks:
            received = torch.nn.functional.interpolate(received, size=rows)
        for start, stop in grid.text_q_ranges:
            received[..., start:stop] = torch.inf
        if rule.share_heads:
            received = received.sum(1, keepdim=True).expand_as(received)
        return pack_bits(heaviest(received, rule.count_q), width)
    givers = grid.text_q_ranges or vision_q
    given = _take(_take(attention, givers, -2), grid.vision_kv_ranges, -1).sum(-2)
    size = sum(stop - start for start, stop in vision_q)
    if given.shape[-1] != size:  # mass per key block -> per query block
        given = torch.nn.functional.interpolate(given, size=size, mode="area")
    if grid.text_spans:
        guide = _take(_take(attention, vision_q, -2), grid.text_kv_ranges, -1)
    # C is in given, [B, H, vision kv blocks], G in guided, [B, H, vision q blocks].
    guided = given if guide is None else guide.softmax(-2).sum(-1)
    if rule.share_heads:
        given, guided = given.sum(1, keepdim=True), guided.sum(1, keepdim=True)

    def heavy(mass: Tensor) -> Tensor:
        # Text blocks without mass change neither a sum nor a choice among the others.
        return pack_bits(~low_mass(_spread(mass, vision_q, rows), tau), width)

    tests = {
        "and": lambda: heavy(given) | heavy(guided),
        "mean": lambda: heavy(_share(given) + _share(guided)),
        "c": lambda: heavy(given),
        "g": lambda: heavy(guided),
    }
    return tests[rule.compute]().expand(-1, num_heads, -1)


def computes_all(rule: Rule, grid: Grid) -> bool:
    """Whether S_c is 1 everywhere: by the rule, or because there is nothing to tell apart."""
    if rule.compute in ("all", "count"):
        return rule.compute == "all"
    return not grid.vision_q_ranges or not grid.vision_kv_ranges


def _take(x: Tensor, ranges: Ranges, dim: int) -> Tensor:
    """The entries of ``dim`` in the ranges, one range after the other."""
    parts = [x.narrow(dim, start, stop - start) for start, stop in ranges]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


def _spread(mass: Tensor, ranges: Ranges, count: int) -> Tensor:
    """The inverse of :func:`_take` on the last dim of ``count`` entries: 0 between the ranges."""
    parts = mass.split([stop - start for start, stop in ranges], -1)
    ends = [*(start for start, _ in ranges[1:]), count]
    padded = []
    for i, (part, (start, stop), end) in enumerate(zip(parts, ranges, ends, strict=True)):
        padded.append(torch.nn.functional.pad(part, (0 if i else start, end - stop)))
    return padded[0] if len(padded) == 1 else torch.cat(padded, -1)


def _share(mass: Tensor) -> Tensor:
    return mass / mass.sum(-1, keepdim=True)


def measure(call: MeasureCall) -> list[Tensor]:
    grid = Grid(call.num_q_blocks * 16, call.num_kv_blocks * 16, block_m=16, block_n=16)
    symbols = Symbols(call.q_bits, call.kv_bits, grid)
    if call.min_skip > 0:
        symbols = symbols.fill_rows(call.min_skip)
    densities = torch.stack([symbols.q_density(), symbols.kv_density()])
    return [densities, symbols.kv_bits] if call.min_skip > 0 else [densities]


def live_share(call: LiveCall) -> Tensor:
    mask = unpack_bits(call.q_bits, call.num_q_blocks).repeat_interleave(call.block_m, -1)
    return mask[..., call.row_offset : call.row_offset + call.rows].mT.float().mean()
