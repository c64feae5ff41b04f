"""Lists of the key blocks that the portable kernel visits, made of the bits by a short launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashomni.symbols import Symbols

CACHED = tl.constexpr(-1)  # length of the list of a query block that is not computed


@triton.jit(do_not_specialize=["seqlen_kv", "num_kv_blocks"])
def list_kernel(
    q_bits, kv_bits, kv_len, blocks, counts, q_stride_b, q_stride_h, q_stride_w, kv_stride_b,
    kv_stride_h, kv_stride_m, kv_stride_w, seqlen_kv, num_kv_blocks, BLOCK_N: tl.constexpr,
    COLUMNS: tl.constexpr,
):  # fmt: skip
    """The visited key blocks of one (batch item, head, query block), ascending, and how many."""
    i, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    num_q_blocks, num_heads = tl.num_programs(0), tl.num_programs(1)
    row = ((b * num_heads + h) * num_q_blocks + i).to(tl.int64)
    q_byte = tl.load(q_bits + b.to(tl.int64) * q_stride_b + h * q_stride_h + i // 8 * q_stride_w)
    if (q_byte.to(tl.int32) >> (i % 8)) & 1 == 0:
        tl.store(counts + row, CACHED)
        return
    column = tl.arange(0, COLUMNS)
    exists = column * BLOCK_N < num_keys(kv_len, b, seqlen_kv)  # the block holds a valid key
    at = b.to(tl.int64) * kv_stride_b + h.to(tl.int64) * kv_stride_h + i.to(tl.int64) * kv_stride_m
    byte = tl.load(kv_bits + at + column // 8 * kv_stride_w, mask=exists, other=0)
    bit = (byte.to(tl.int32) >> (column % 8)) & 1
    place = tl.cumsum(bit, 0) - bit
    tl.store(blocks + row * num_kv_blocks + place, column, mask=bit != 0)
    tl.store(counts + row, tl.sum(bit, 0))


@triton.jit
def num_keys(kv_len, b, seqlen_kv):
    keys = seqlen_kv
    if kv_len is not None:
        keys = tl.maximum(tl.minimum(tl.load(kv_len + b), seqlen_kv), 0)
    return keys


def key_block_lists(symbols: Symbols, kv_len: Tensor | None) -> tuple[Tensor, Tensor]:
    """What the kernel walks over.

    Returns:
        ``blocks`` int16 or int32 ``[B, H, Mb, Nb]``: the visited key blocks of each query block
        that hold a valid key, ascending; undefined behind them. ``counts`` int32 ``[B, H,
        Mb]``: their number, -1 for a cached query block.
    """
    grid, bits = symbols.grid, symbols.kv_bits
    rows, columns = grid.num_q_blocks, grid.num_kv_blocks
    dtype = torch.int16 if columns < 2**15 else torch.int32
    shape = (symbols.batch, symbols.num_heads, rows)
    blocks = torch.empty(*shape, columns, dtype=dtype, device=bits.device)
    counts = torch.empty(shape, dtype=torch.int32, device=bits.device)
    width = max(16, triton.next_power_of_2(columns))
    list_kernel[(rows, symbols.num_heads, symbols.batch)](
        symbols.q_bits, bits, kv_len, blocks, counts, *symbols.q_bits.stride(), *bits.stride(),
        grid.seqlen_kv, columns, BLOCK_N=grid.block_n, COLUMNS=width,
        num_warps=min(max(width // 512, 1), 16),
    )  # fmt: skip
    return blocks, counts
