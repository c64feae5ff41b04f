"""Triton kernels that count bits: densities, rows worth filling, shares of a stream.

One program each: integer counts are exact whatever the order, no memory has to be cleared before,
and there is no second launch.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _count_bits(word):
    """Ones in each 32-bit word."""
    word = word.to(tl.uint32, bitcast=True)
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    return ((word * 0x01010101) >> 24).to(tl.int32)


@triton.jit(do_not_specialize=["heads", "count", "rows", "columns", "num_words", "min_skip"])
def measure_kernel(
    q_bits, words, filled, densities, q_stride_b, q_stride_h, q_stride_w, stride_b, stride_h,
    stride_r, heads, count, rows, columns, num_words, min_skip, HEADS: tl.constexpr,
    ROWS: tl.constexpr, WORDS: tl.constexpr,
):  # fmt: skip
    """Densities, and bits with filled rows; ``count``: heads of all batch items."""
    word = tl.arange(0, WORDS)[None, None, :]
    left = columns - word * 32  # blocks from this word on
    every = tl.where(left >= 32, -1, (1 << (tl.maximum(left, 0) & 31)) - 1)
    live = tl.zeros([HEADS, ROWS], tl.int64)
    visited = tl.zeros([HEADS, ROWS], tl.int64)
    for first in range(0, count, HEADS):
        index = first + tl.arange(0, HEADS)
        b, h = (index // heads).to(tl.int64), index % heads
        q_at, at_head = b * q_stride_b + h * q_stride_h, b * stride_b + h * stride_h
        for start in range(0, rows, ROWS):
            row = start + tl.arange(0, ROWS)
            real = (index < count)[:, None] & (row < rows)[None, :]
            at = q_at[:, None] + ((row // 8) * q_stride_w)[None, :]
            byte = tl.load(q_bits + at, mask=real, other=0).to(tl.int32)
            is_live = (byte >> (row % 8)[None, :]) & 1
            inside = real[:, :, None] & (word < num_words)
            at = at_head[:, None, None] + (row * stride_r)[None, :, None] + word
            value = tl.load(words + at, mask=inside, other=0)
            ones = tl.sum(_count_bits(value), 2)
            if filled is not None:
                skipped = tl.div_rn((columns - ones).to(tl.float32), columns.to(tl.float32))
                fills = skipped < min_skip
                value = tl.where(fills[:, :, None], every, value)
                ones = tl.where(fills, columns, ones)
                to = (index.to(tl.int64) * rows)[:, None, None] + row[None, :, None]
                tl.store(filled + to * num_words + word, value, mask=inside)
            live += is_live
            visited += tl.where(is_live != 0, ones, 0)
    computed = tl.sum(tl.sum(live, 1), 0)
    pairs = tl.maximum(computed, 1).to(tl.float64) * columns
    q_density = computed.to(tl.float64) / (count.to(tl.float64) * rows)
    tl.store(densities, q_density.to(tl.float32))
    kv_density = tl.sum(tl.sum(visited, 1), 0).to(tl.float64) / pairs
    tl.store(densities + 1, kv_density.to(tl.float32))


@triton.jit(do_not_specialize=["heads", "items", "blocks", "start", "stop"])
def live_kernel(
    q_bits, share, stride_b, stride_h, stride_w, heads, items, blocks, start, stop,
    BLOCK_M: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """Share of the (token, head) pairs of tokens ``start`` to ``stop`` that are computed."""
    first = start // BLOCK_M
    count = (stop + BLOCK_M - 1) // BLOCK_M - first  # blocks that the stream touches
    live = tl.zeros([SIZE], tl.int64)
    for at in range(0, items * heads * count, SIZE):
        index = at + tl.arange(0, SIZE)
        block, h = first + index % count, (index // count) % heads
        b = (index // count // heads).to(tl.int64)
        place = q_bits + b * stride_b + h * stride_h + (block // 8) * stride_w
        byte = tl.load(place, mask=index < items * heads * count, other=0).to(tl.int32)
        end = tl.minimum((block + 1) * BLOCK_M, stop)
        live += ((byte >> (block % 8)) & 1) * (end - tl.maximum(block * BLOCK_M, start))
    total = items.to(tl.float64) * heads * (stop - start)
    tl.store(share, (tl.sum(live, 0).to(tl.float64) / total).to(tl.float32))
