"""Choosing symbols in few Triton launches, and measuring them in one: the ops of ``op.py``.

Three of them: `pool`, `visit` and, where S_c is chosen, `cache`. With a resolution `visit` reads
the masses that `map_kernel` leaves, in chunks of rows where they are many.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from flashomni import triton_host
from flashomni.dispatch import not_on, register
from flashomni.symbols.bits import q_bytes, row_bytes
from flashomni.symbols.choice._counts import live_kernel, measure_kernel
from flashomni.symbols.choice._definition import computes_all, is_text_last
from flashomni.symbols.choice._fine_launch import FineMap
from flashomni.symbols.choice._kernels import cache_kernel, pool_kernel, visit_kernel
from flashomni.symbols.choice.op import ChooseCall, LiveCall, MeasureCall, first_tensor
from flashomni.symbols.grid import Grid

MAX_BLOCKS = 16384  # of a row that a program holds in registers: 2 million tokens
MAX_TILE = 128  # tokens that a program of `pool_kernel` loads at once
MASSES = 8192  # that a program of `visit_kernel` holds: 8 rows of 1,024 blocks
LONG = 1024  # a row from there on leaves no room in shared memory for a product
BINS = 8192  # words that the counting program looks at at a time


def choose(call: ChooseCall) -> list[Tensor]:
    """``[q_bits, kv_bits]``."""
    q, k, grid, rule = _rows_apart(call.q), _rows_apart(call.k), call.grid, call.rule
    device, (batch, _, num_heads, head_dim) = q.device, q.shape
    kv_heads, rows, columns = k.shape[2], grid.num_q_blocks, grid.num_kv_blocks
    all_q = computes_all(rule, grid)
    parts = _parts(grid, _givers(call), _row_tile(columns))
    texts = sum(stop - start for start, stop in grid.text_kv_ranges)
    fine = rule.resolution
    sizes = {
        "q_means": 0 if fine else batch * num_heads * rows * head_dim,
        "k_means": 0 if fine else batch * kv_heads * head_dim * columns,
        "given": 0 if all_q else batch * num_heads * (parts[1] - parts[0]) * columns,
        "guide": 0 if all_q or rule.compute == "count" else batch * num_heads * texts * rows,
        "q_similarity": 0 if rule.gate is None else batch * num_heads * rows,
        "k_similarity": 0 if rule.gate is None else batch * kv_heads * columns,
    }
    scratch = dict(zip(sizes, _split(sizes.values(), device), strict=True))
    with torch.cuda.device_of(q):
        if fine:
            masses = FineMap(q, k, grid, fine, call.scale, rule.gate is not None, scratch)
            kv_bits = _visit(call, kv_heads, scratch, parts, texts, masses)
        else:
            _pool(q, k, grid, rule.gate is not None, scratch)
            kv_bits = _visit(call, kv_heads, scratch, parts, texts)
        if all_q:
            q_bits = grid.all_q_bits(device).expand(batch, num_heads, -1)
        else:
            q_bits = _cache(call, scratch, parts, texts)
    return [q_bits, kv_bits]


def _givers(call: ChooseCall) -> str:
    """Whose rows C is a sum over."""
    return "all" if call.rule.compute == "count" or not call.grid.text_spans else "text"


def _rows_apart(x: Tensor) -> Tensor:
    return x if x.stride(3) == 1 else x.contiguous()


def _split(sizes: Any, device: torch.device) -> list[Tensor | None]:
    """One allocation for all scratch, each part at a multiple of 16 bytes; none for size 0."""
    whole = [-(-size // 4) * 4 for size in sizes]
    memory = torch.empty(sum(whole), dtype=torch.float32, device=device).split(whole)
    return [part if len(part) else None for part in memory]


def _row_tile(columns: int) -> int:
    """Query blocks of a program."""
    return max(1, min(8, MASSES // _width(columns)))


def _width(columns: int) -> int:
    return max(32, triton.next_power_of_2(columns))


def _warps(size: int) -> int:
    """For so many elements, each thread with 32 of them."""
    return max(4, min(16, size // 1024))


def _parts(grid: Grid, which: str, tile: int) -> tuple[int, int]:
    """Programs of a head whose rows C is a sum over: from, to."""
    ranges = grid.text_q_ranges if which == "text" else ((0, grid.num_q_blocks),)
    return (ranges[0][0] // tile, -(-ranges[-1][1] // tile)) if ranges else (0, 0)


def _pool(q: Tensor, k: Tensor, grid: Grid, gated: bool, scratch: dict) -> None:
    (batch, _, num_heads, head_dim), rows, columns = q.shape, grid.num_q_blocks, grid.num_kv_blocks
    pool_kernel[(rows + columns, num_heads, batch)](
        q, k, grid.kv_len, scratch["q_means"], scratch["k_means"], scratch["q_similarity"],
        scratch["k_similarity"], *q.stride()[:3], *k.stride()[:3], grid.seqlen_q, grid.seqlen_kv,
        rows, columns, k.shape[2], BLOCK_M=grid.block_m, BLOCK_N=grid.block_n,
        TILE_M=min(triton.next_power_of_2(grid.block_m), MAX_TILE),
        TILE_N=min(triton.next_power_of_2(grid.block_n), MAX_TILE), HEAD_DIM=head_dim,
        PADDED_DIM=triton.next_power_of_2(head_dim),
        PADDED_Q=grid.kv_len is not None and is_text_last(grid), GATED=gated, num_warps=4,
    )  # fmt: skip


def _visit(
    call: ChooseCall,
    kv_heads: int,
    scratch: dict,
    parts: tuple[int, int],
    texts: int,
    fine: FineMap | None = None,
) -> Tensor:
    grid, rule, device = call.grid, call.rule, call.q.device
    batch, _, num_heads, head_dim = call.q.shape
    rows, columns = grid.num_q_blocks, grid.num_kv_blocks
    width, tile, num_words = _width(columns), _row_tile(columns), row_bytes(columns) // 4
    words = torch.empty(batch, num_heads, rows, num_words, dtype=torch.int32, device=device)
    given = None
    if scratch["given"] is not None:
        given = _givers(call)
    has_text = bool(grid.text_spans)
    # Without a guide nothing is stored there; the pointer must be one all the same.
    guide = scratch["given"] if scratch["guide"] is None else scratch["guide"]
    for start, count, masses in [(0, rows, None)] if fine is None else fine.chunks(tile):
        visit_kernel[(triton.cdiv(count, tile), num_heads, batch)](
            scratch["q_means"], scratch["k_means"], scratch["q_similarity"],
            scratch["k_similarity"], grid.kv_len, grid.text_q_bits(device) if has_text else None,
            grid.text_kv_bits(device) if has_text else None, call.progress, words,
            scratch["given"], guide, masses, call.scale, rule.tau_kv, rule.power,
            rule.gate or 0.0, rule.count_kv, rows, columns, num_words, num_heads // kv_heads,
            texts, parts[0], parts[1] - parts[0], start // tile, count, BLOCK_M=grid.block_m,
            BLOCK_N=grid.block_n, HEAD_DIM=head_dim, DIMS=16 if width <= LONG else 1, ROWS=tile,
            COLUMNS=width, VISIT=rule.visit, GIVEN=given, GROWS=rule.power != 0,
            TEXT_ROWS=rule.text_rows, TEXT_COLUMNS=rule.text_columns, CENTER=rule.center_k,
            DIAGONAL=rule.diagonal, num_warps=_warps(tile * width),
            num_stages=2 if width < 256 else 1,
        )  # fmt: skip
    return words.view(torch.uint8)


def _cache(call: ChooseCall, scratch: dict, parts: tuple[int, int], texts: int) -> Tensor:
    grid, rule, device = call.grid, call.rule, call.q.device
    batch, _, num_heads, _ = call.q.shape
    rows, columns, num_bytes = grid.num_q_blocks, grid.num_kv_blocks, q_bytes(grid.num_q_blocks)
    width = _width(8 * num_bytes)
    counts = [
        sum(stop - start for start, stop in ranges)
        for ranges in (grid.vision_q_ranges, grid.vision_kv_ranges)
    ]
    how, index, window = "same", None, 1
    if rule.compute == "count":
        how = "same" if rows == columns else "nearest"
    elif grid.block_m != grid.block_n or counts[0] != counts[1]:
        how, index = "area", grid.vision_kv_index(device)
        window = -(-counts[1] // counts[0]) + 1
    guide = scratch["guide"]
    if call.guide is not None:
        guide, texts = call.guide.mT.contiguous(), call.guide.shape[3]
    bits = torch.empty(batch, num_heads, num_bytes, dtype=torch.uint8, device=device)
    cache_kernel[(num_heads, batch)](
        scratch["given"], guide, scratch["q_similarity"],
        grid.text_q_bits(device) if grid.text_spans else None, index, call.progress, bits,
        rule.tau_q, rule.power, rule.gate or 0.0, rule.count_q, columns / rows, rows, columns,
        num_bytes, texts, parts[1] - parts[0], *counts, ROWS=width,
        PARTS=max(1, min(8, MASSES // width)), COMPUTE=rule.compute, MAP=how, WINDOW=window,
        GROWS=rule.power != 0, SHARED=rule.share_heads, num_warps=_warps(8 * width),
    )  # fmt: skip
    return bits


def measure(call: MeasureCall) -> list[Tensor]:
    """Densities, and the bits with filled rows: one launch of one program."""
    q_bits, words = call.q_bits, call.kv_bits
    if any(step % 4 for step in (*words.stride()[:3], words.storage_offset())):
        words = words.contiguous()  # a kernel reads whole words
    words = words.view(torch.int32)
    batch, num_heads, rows, num_words = words.shape
    densities = torch.empty(2, dtype=torch.float32, device=words.device)
    fills = call.min_skip > 0
    filled = torch.empty(words.shape, dtype=torch.int32, device=words.device) if fills else None
    width = triton.next_power_of_2(num_words)
    row_tile = min(triton.next_power_of_2(rows), BINS // width)
    count = batch * num_heads
    with torch.cuda.device_of(words):
        measure_kernel[(1,)](
            q_bits, words, filled, densities, *q_bits.stride(), *words.stride()[:3], num_heads,
            count, rows, call.num_kv_blocks, num_words, call.min_skip,
            HEADS=min(triton.next_power_of_2(count), BINS // width // row_tile), ROWS=row_tile,
            WORDS=width, num_warps=32,
        )  # fmt: skip
    if filled is None:
        return [densities]
    return [densities, filled.view(torch.uint8)]


def live_share(call: LiveCall) -> Tensor:
    bits = call.q_bits
    share = torch.empty((), dtype=torch.float32, device=bits.device)
    with torch.cuda.device_of(bits):
        live_kernel[(1,)](
            bits, share, *bits.stride(), bits.shape[1], bits.shape[0], call.num_q_blocks,
            call.row_offset, call.row_offset + call.rows, BLOCK_M=call.block_m, SIZE=4096,
            num_warps=16,
        )  # fmt: skip
    return share


def _refuses(call: Any) -> list[str]:
    reasons = not_on(triton_host.DEVICE, first_tensor(call))
    if isinstance(call, ChooseCall):
        blocks = max(call.grid.num_q_blocks, call.grid.num_kv_blocks)
        if blocks > MAX_BLOCKS:
            reasons.append(f"a sequence must have at most {MAX_BLOCKS} blocks, got {blocks}")
    return reasons


for _op, _run in (("choose", choose), ("measure", measure), ("live_share", live_share)):
    register(
        _op, "portable", rank=triton_host.RANK, refuses=_refuses, available=triton_host.available,
        serves=("sm90",), device=triton_host.DEVICE,
    )(_run)  # fmt: skip
