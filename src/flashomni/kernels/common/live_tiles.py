"""Work lists of the GEMM kernels, made on the device from S_c in one short launch.

A *tile row* is a run of 128 tokens inside one query block of one batch item. Tile rows are numbered
by batch item, then by position; tile row 0 may start before the stream and the last may end after
it, where ``row_offset`` or the length is not a multiple of the block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents

from flashomni.kernels.common.rectangles import stream_blocks
from flashomni.symbols import Symbols

TILE_M = 128
MAX_HEADS = 64  # heads in a word of `head_words`
HEAD_BITS = tl.constexpr(8)  # of an entry of `live_tiles`
OWN = tl.constexpr(32)  # query blocks a program lists
HALVED_PAIRS = 1584  # pairs, twelve rounds of 132 multiprocessors, from which on the list is halved
HALVED_HEADS = 16  # if there are as many heads
SEEN = tl.constexpr(256)  # query blocks it looks at at a time to learn where its own ones go


@dataclass(frozen=True)
class TileRows:
    """The tile rows of a stream.

    Args:
        batch: batch items.
        first_block: query block of the stream's first token.
        blocks: query blocks of the stream, of one batch item.
        split: tile rows of a query block.
        first_row: where tile row 0 starts in the stream; zero or negative.
    """

    batch: int
    first_block: int
    blocks: int
    split: int
    first_row: int

    @classmethod
    def of(cls, symbols: Symbols, rows: int, row_offset: int) -> TileRows:
        block_m = symbols.grid.block_m
        first, blocks = stream_blocks(row_offset, rows, block_m)
        split = block_m // TILE_M
        return cls(symbols.batch, first, blocks, split, first * block_m - row_offset)

    @property
    def per_item(self) -> int:
        """Tile rows of one batch item."""
        return self.blocks * self.split

    @property
    def count(self) -> int:
        return self.batch * self.per_item


def live_tiles(symbols: Symbols, tiles: TileRows) -> Tensor:
    """The computed (tile row, head) pairs, row by row and in the order of the heads.

    Of a long call in which at least three quarters are computed, the pairs of the first half of the
    heads come first: what a round of CTAs reads again of the weight then stays in L2. For fewer
    pairs, to read the rows twice would cost more.

    Returns:
        int32 ``[1 + n]``: how many pairs there are, and the pairs as
        ``tile_row << HEAD_BITS | head``. What follows the last pair is undefined.
    """
    bits = symbols.q_bits
    size = 1 + tiles.count * symbols.num_heads
    work = torch.empty(size, dtype=torch.int32, device=bits.device)
    heads = symbols.num_heads
    half = -(-heads // 2) if size > HALVED_PAIRS and heads >= HALVED_HEADS else heads
    _list_tiles[_grid(tiles)](bits, work, *_layout(symbols, tiles), half, **_meta(symbols, tiles))
    return work


def head_words(symbols: Symbols, tiles: TileRows, *, cached: bool) -> tuple[Tensor, Tensor]:
    """Which heads each tile row has, the rows with the most heads first.

    Args:
        symbols: S_c decides.
        tiles: the tile rows.
        cached: list the cached heads of a row instead of the computed ones.

    Returns:
        ``rows`` int32 ``[n]``, tile rows, and ``words`` int64 ``[2, n]``: the set of the listed
        heads of each (bit h is head h), and the set of the others.
    """
    bits = symbols.q_bits
    rows = torch.empty(tiles.count, dtype=torch.int32, device=bits.device)
    words = torch.empty(2, tiles.count, dtype=torch.int64, device=bits.device)
    _list_heads[_grid(tiles)](
        bits, rows, words, *_layout(symbols, tiles), CACHED=cached, **_meta(symbols, tiles)
    )
    return rows, words


def _grid(tiles: TileRows) -> tuple[int]:
    return (triton.cdiv(tiles.batch * tiles.blocks, OWN.value),)


def _layout(symbols: Symbols, tiles: TileRows) -> tuple[int, ...]:
    geometry = (tiles.first_block, tiles.blocks, tiles.batch * tiles.blocks, symbols.num_heads)
    return (*symbols.q_bits.stride(), *geometry)


def _meta(symbols: Symbols, tiles: TileRows) -> dict[str, int | bool]:
    return {
        "HEADS": _power(symbols.num_heads),
        "CHUNKS": triton.cdiv(tiles.batch * tiles.blocks, SEEN.value),
        "SPLIT": tiles.split,
        "ON_GPU": symbols.q_bits.is_cuda,  # the interpreter knows no dependent launch
        "num_warps": 8,
    }


def _power(count: int) -> int:
    return max(16, triton.next_power_of_2(count))


@triton.jit
def _bits(
    q_bits, block, stride_b, stride_h, stride_w, first, blocks, total, H, HEADS: tl.constexpr
):
    """S_c as int32 ``[blocks, HEADS]`` of query blocks numbered over the batch; 0 where none is."""
    head = tl.arange(0, HEADS)
    item, i = block // blocks, first + block % blocks
    at = (item.to(tl.int64) * stride_b + (i // 8).to(tl.int64) * stride_w)[:, None]
    mask = (block < total)[:, None] & (head < H)[None, :]
    byte = tl.load(q_bits + at + head[None, :] * stride_h, mask=mask, other=0)
    return (byte.to(tl.int32) >> (i % 8)[:, None]) & 1


@triton.jit(do_not_specialize=["first", "blocks", "total", "H", "HALF"])
def _list_tiles(
    q_bits, work, stride_b, stride_h, stride_w, first, blocks, total, H, HALF,
    HEADS: tl.constexpr, CHUNKS: tl.constexpr, SPLIT: tl.constexpr, ON_GPU: tl.constexpr,
):  # fmt: skip
    if ON_GPU:
        gdc_launch_dependents()
    own_start = tl.program_id(0) * OWN
    head = tl.arange(0, HEADS)
    # Left and right pairs are counted in one number: at most 128 heads of 256 blocks on each side.
    one = tl.where(head < HALF, 1 << 16, 1)[None, :].to(tl.uint32)
    before, count = 0, 0  # pairs of the blocks before our own ones, and of all
    left_before, left_count = 0, 0  # those of the left half of the heads
    for start in range(0, CHUNKS * SEEN, SEEN):
        block = start + tl.arange(0, SEEN)
        bits = _bits(q_bits, block, stride_b, stride_h, stride_w, first, blocks, total, H, HEADS)
        live = tl.sum(bits.to(tl.uint32) * one, 1)
        earlier = tl.sum(tl.where(block < own_start, live, 0), 0)
        every = tl.sum(live, 0)
        left_before += (earlier >> 16).to(tl.int32)
        before += ((earlier >> 16) + (earlier & 0xFFFF)).to(tl.int32)
        left_count += (every >> 16).to(tl.int32)
        count += ((every >> 16) + (every & 0xFFFF)).to(tl.int32)
    if tl.program_id(0) == 0:
        tl.store(work, count * SPLIT)

    # Where most pairs are computed, all of the left half come first.
    is_halved = 4 * count >= 3 * total * H
    is_left = (head < HALF) | (not is_halved)
    left_before = tl.where(is_halved, left_before, before)
    left_count = tl.where(is_halved, left_count, count)
    block = own_start + tl.arange(0, OWN)
    live = _bits(q_bits, block, stride_b, stride_h, stride_w, first, blocks, total, H, HEADS)
    left = tl.sum(tl.where(is_left[None, :], live, 0), 1)
    right = tl.sum(live, 1) - left
    left_place = (left_before + tl.cumsum(left, 0) - left) * SPLIT
    right_place = (left_count + before - left_before + tl.cumsum(right, 0) - right) * SPLIT
    rank = tl.cumsum(live, 1) - live
    for part in range(SPLIT):
        entry = ((block * SPLIT + part)[:, None] << HEAD_BITS) | head[None, :]
        left_at = (left_place + part * left)[:, None] + rank
        right_at = (right_place + part * right - left)[:, None] + rank
        at = tl.where(is_left[None, :], left_at, right_at)
        tl.store(work + 1 + at, entry, mask=live != 0)


@triton.jit(do_not_specialize=["first", "blocks", "total", "H"])
def _list_heads(
    q_bits, rows, words, stride_b, stride_h, stride_w, first, blocks, total, H,
    HEADS: tl.constexpr, CHUNKS: tl.constexpr, SPLIT: tl.constexpr, CACHED: tl.constexpr,
    ON_GPU: tl.constexpr,
):  # fmt: skip
    if ON_GPU:
        gdc_launch_dependents()
    own = tl.program_id(0) * OWN + tl.arange(0, OWN)
    head = tl.arange(0, HEADS)
    live = _bits(q_bits, own, stride_b, stride_h, stride_w, first, blocks, total, H, HEADS)
    exists = (head < H).to(tl.int32)[None, :]
    listed = (exists - live) if CACHED else live
    size = tl.sum(listed, 1)
    # The place of a block among all: how many have more heads, or as many and come earlier.
    place = tl.zeros([OWN], tl.int32)
    for start in range(0, CHUNKS * SEEN, SEEN):
        block = start + tl.arange(0, SEEN)
        live_there = tl.sum(
            _bits(q_bits, block, stride_b, stride_h, stride_w, first, blocks, total, H, HEADS), 1
        )
        there = (H - live_there) if CACHED else live_there
        earlier = (there[None, :] == size[:, None]) & (block[None, :] < own[:, None])
        ahead = (block < total)[None, :] & ((there[None, :] > size[:, None]) | earlier)
        place += tl.sum(ahead.to(tl.int32), 1)

    bit = head.to(tl.int64)[None, :]
    word = tl.sum(listed.to(tl.int64) << bit, 1)
    others = tl.sum((exists - listed).to(tl.int64) << bit, 1)
    exists_block = own < total
    for part in range(SPLIT):
        at = place * SPLIT + part
        tl.store(rows + at, own * SPLIT + part, mask=exists_block)
        tl.store(words + at, word, mask=exists_block)
        tl.store(words + total * SPLIT + at, others, mask=exists_block)
