"""What a persistent attention kernel needs to know of its tiles, made on the device in one launch.

Tiles cost as much as the key blocks they visit, and that is known only on the device. A grid that
takes tiles from a counter keeps every multiprocessor busy until the list runs out; what is left is
the end, where a long tile that starts last makes all others wait. So the last tiles start in the
order of falling cost, and cached tiles, which cost nothing, come after all others. Everything
before keeps its natural order, head by head: neighbours in time then share keys and values in L2.

The same launch writes the tiles that visit nothing (see ``_empty_tiles``).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from flashomni.kernels.attention._empty_tiles import output_strides, write_empty_tiles
from flashomni.kernels.attention.op import AttentionCall
from flashomni.symbols import Symbols

LISTED = 1024  # tiles at the end whose order is written down
_RANKED = 64  # tiles that one program ranks among the listed ones


@triton.jit
def _popcount(x):
    """Set bits of each unsigned 32-bit word."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0F0F0F0F
    return (x * 0x01010101) >> 24


@triton.jit
def _sort_key(
    position, first_listed, first_sorted, geometry, symbols,
    DEAD: tl.constexpr, LISTED: tl.constexpr,
):  # fmt: skip
    """Distinct keys: natural order, then falling cost, then the cached tiles from ``DEAD`` on."""
    num_tiles, num_heads, tiles_m, tiles_per_block = geometry
    q_bits, kv_words, row_words, q_stride_b, q_stride_h, kv_stride_b, kv_stride_h, kv_stride_m = (
        symbols
    )
    tile = first_listed + position
    inside = tile < num_tiles
    head, row = tile // tiles_m, tile % tiles_m // tiles_per_block
    batch, head = (head // num_heads).to(tl.int64), (head % num_heads).to(tl.int64)
    q_byte = tl.load(q_bits + batch * q_stride_b + head * q_stride_h + row // 8, inside, other=0)
    is_live = (q_byte.to(tl.int32) >> (row % 8)) & 1
    is_sorted = inside & (tile >= first_sorted)
    words = kv_words + batch * kv_stride_b + head * kv_stride_h + row.to(tl.int64) * kv_stride_m
    count = tl.zeros_like(position)
    for i in range(row_words):
        word = tl.load(words + i, is_sorted, other=0).to(tl.uint32, bitcast=True)
        count += _popcount(word).to(tl.int32)
    falling = LISTED * (1 + row_words * 32 - count) + position
    key = tl.where(is_sorted, falling, position)
    return tl.where(is_live != 0, key, DEAD + position)


@triton.jit(
    do_not_specialize=[
        "num_tiles", "first_sorted", "num_programs", "num_heads", "tiles_m", "tiles_per_block",
        "row_words", "q_stride_b", "q_stride_h", "kv_stride_b", "kv_stride_h", "kv_stride_m",
        "seqlen_q", "seqlen_kv", "out_stride_b", "out_stride_m", "out_stride_h", "lse_stride_b",
        "lse_stride_h", "lse_stride_m", "head_dim",
    ]
)  # fmt: skip
def _order_kernel(
    order, q_bits, kv_words, kv_len, out, lse, num_tiles, first_sorted, num_programs, num_heads,
    tiles_m, tiles_per_block, row_words, q_stride_b, q_stride_h, kv_stride_b, kv_stride_h,
    kv_stride_m, seqlen_q, seqlen_kv, out_stride_b, out_stride_m, out_stride_h, lse_stride_b,
    lse_stride_h, lse_stride_m, head_dim, LISTED: tl.constexpr, RANKED: tl.constexpr,
    OVERLAPPED: tl.constexpr, BLOCK_N: tl.constexpr, TILE_M: tl.constexpr,
    PADDED_DIM: tl.constexpr, HAS_SUMMARY: tl.constexpr,
):  # fmt: skip
    """Program p writes where the tiles at list positions p * RANKED ... go to.

    And the empty ones of the tiles of these numbers.
    """
    if OVERLAPPED:
        gdc_launch_dependents()
    geometry = (num_tiles, num_heads, tiles_m, tiles_per_block)
    symbols = (
        q_bits, kv_words, row_words, q_stride_b, q_stride_h, kv_stride_b, kv_stride_h, kv_stride_m,
    )  # fmt: skip
    outputs = (
        out, lse, seqlen_q, out_stride_b, out_stride_m, out_stride_h, lse_stride_b, lse_stride_h,
        lse_stride_m, head_dim,
    )  # fmt: skip
    write_empty_tiles(
        tl.program_id(0) * RANKED, geometry, symbols, kv_len, seqlen_kv, outputs, BLOCK_N, TILE_M,
        RANKED, PADDED_DIM, HAS_SUMMARY,
    )  # fmt: skip
    DEAD: tl.constexpr = 1 << 30
    first_listed = tl.maximum(num_tiles - LISTED, 0)
    mine = tl.program_id(0) * RANKED + tl.arange(0, RANKED)
    every = tl.arange(0, LISTED)
    if tl.program_id(0) == 0:
        tl.store(order, num_programs)  # the first tile that is not handed out yet
    is_mine = (tl.program_id(0) * RANKED < LISTED) & (
        first_listed + tl.program_id(0) * RANKED < num_tiles
    )
    if is_mine:
        my_key = _sort_key(mine, first_listed, first_sorted, geometry, symbols, DEAD, LISTED)
        key = _sort_key(every, first_listed, first_sorted, geometry, symbols, DEAD, LISTED)
        rank = tl.sum((key[None, :] < my_key[:, None]).to(tl.int32), axis=1)
        tile = tl.where(my_key < DEAD, first_listed + mine, -1)
        tl.store(order + 1 + rank, tile, first_listed + mine < num_tiles)


def tile_order(
    call: AttentionCall,
    symbols: Symbols,
    tile_m: int,
    num_programs: int,
    *,
    overlapped: bool = False,
) -> Tensor:
    """Order of the tiles for a grid that takes them from a counter; writes those that are empty.

    A tile is ``tile_m`` query tokens of one head, numbered ``(b * H + h) * tiles_m + m`` with
    ``tiles_m = ceil(M / tile_m)``. The i-th tile to start is tile i, except for the last
    ``LISTED``, which are looked up.

    Args:
        call: whose ``out`` and ``lse`` get the empty tiles.
        symbols: of the call, the rows of S_s aligned to 4 bytes.
        tile_m: divides ``block_m``.
        num_programs: programs of the grid; program p starts with the p-th tile.
        overlapped: lets the next kernel of the stream start early, if it was launched to.

    Returns:
        int32 ``[1 + LISTED]``: the counter, set to ``num_programs``; then the tiles that start at
        ``max(num_tiles - LISTED, 0)`` and after, -1 for cached ones, which all come last.
    """
    grid = symbols.grid
    tiles_m = -(-grid.seqlen_q // tile_m)
    num_tiles = symbols.batch * symbols.num_heads * tiles_m
    order = torch.empty(1 + LISTED, dtype=torch.int32, device=symbols.q_bits.device)
    kv_words = symbols.kv_bits.view(torch.int32)
    _order_kernel[(max(LISTED, num_tiles + _RANKED - 1) // _RANKED,)](
        order,
        symbols.q_bits,
        kv_words,
        call.kv_len,
        call.out,
        call.lse,
        num_tiles,
        num_tiles - 2 * num_programs,  # two rounds are enough to fill the gaps at the end
        num_programs,
        symbols.num_heads,
        tiles_m,
        grid.block_m // tile_m,
        kv_words.shape[-1],
        *symbols.q_bits.stride()[:2],
        *kv_words.stride()[:3],
        grid.seqlen_q,
        grid.seqlen_kv,
        *output_strides(call),
        call.out.shape[3],
        LISTED=LISTED,
        RANKED=_RANKED,
        OVERLAPPED=overlapped,
        BLOCK_N=grid.block_n,
        TILE_M=tile_m,
        PADDED_DIM=triton.next_power_of_2(call.out.shape[3]),
        HAS_SUMMARY=call.summary is not None,
        num_warps=8,
    )
    return order
