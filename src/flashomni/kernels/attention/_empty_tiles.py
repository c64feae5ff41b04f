"""Tiles that are computed but see no key: zeros and -inf, written ahead of the attention kernel.

They are rare, and the attention kernel is faster without the code for them.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashomni.kernels.attention.op import AttentionCall

TILES = 64  # that one program looks at


@triton.jit
def _write_tile(
    tile, num_heads, tiles_m, outputs, TILE_M: tl.constexpr, PADDED_DIM: tl.constexpr
):  # fmt: skip
    (
        out, lse, seqlen_q, out_stride_b, out_stride_m, out_stride_h, lse_stride_b, lse_stride_h,
        lse_stride_m, head_dim,
    ) = outputs  # fmt: skip
    head, m = tile // tiles_m, tile % tiles_m
    batch, head = (head // num_heads).to(tl.int64), (head % num_heads).to(tl.int64)
    dim = tl.arange(0, PADDED_DIM)[None, :]
    out += batch * out_stride_b + head * out_stride_h
    for start in range(0, TILE_M, 16):
        row = m * TILE_M + start + tl.arange(0, 16)
        at = row.to(tl.int64)[:, None] * out_stride_m + dim
        zero = tl.zeros([16, PADDED_DIM], out.dtype.element_ty)
        tl.store(out + at, zero, (row < seqlen_q)[:, None] & (dim < head_dim))
    if lse is not None:
        row = m * TILE_M + tl.arange(0, TILE_M)
        at = batch * lse_stride_b + head * lse_stride_h + row.to(tl.int64) * lse_stride_m
        tl.store(lse + at, tl.full([TILE_M], -float("inf"), tl.float32), row < seqlen_q)


@triton.jit
def write_empty_tiles(
    first, geometry, symbols, kv_len, seqlen_kv, outputs,
    BLOCK_N: tl.constexpr, TILE_M: tl.constexpr, TILES: tl.constexpr, PADDED_DIM: tl.constexpr,
    HAS_SUMMARY: tl.constexpr,
):  # fmt: skip
    """Write what is empty of the tiles ``[first, first + TILES)``; ``symbols`` may be ``None``.

    With a summary, where blocks are skipped there are their summaries.
    """
    num_tiles, num_heads, tiles_m, tiles_per_block = geometry
    index = tl.arange(0, TILES)
    tile = first + index
    inside = tile < num_tiles
    block = tile % tiles_m // tiles_per_block
    batch = (tile // tiles_m // num_heads).to(tl.int64)
    head = (tile // tiles_m % num_heads).to(tl.int64)
    keys = tl.full([TILES], seqlen_kv, tl.int32)
    if kv_len is not None:
        keys = tl.minimum(tl.load(kv_len + batch, inside, other=0), seqlen_kv)
    visits = keys
    if symbols is not None:
        (
            q_bits, kv_words, row_words, q_stride_b, q_stride_h, kv_stride_b, kv_stride_h,
            kv_stride_m,
        ) = symbols  # fmt: skip
        byte = tl.load(
            q_bits + batch * q_stride_b + head * q_stride_h + block // 8, inside, other=0
        )
        inside = inside & (((byte.to(tl.int32) >> (block % 8)) & 1) != 0)
        if not HAS_SUMMARY:
            words = kv_words + batch * kv_stride_b + head * kv_stride_h
            words += block.to(tl.int64) * kv_stride_m
            valid = tl.maximum(tl.cdiv(keys, BLOCK_N), 0)
            visits = tl.zeros([TILES], tl.int32)
            for i in range(row_words):
                word = tl.load(words + i, inside, other=0)
                left = valid - i * 32
                some = word & ((1 << tl.minimum(tl.maximum(left, 0), 31)) - 1)
                visits = visits | tl.where(left >= 32, word, some)
            visits = (visits != 0).to(tl.int32)
    is_empty = (inside & (visits <= 0)).to(tl.int32)
    if tl.sum(is_empty, 0) > 0:
        for i in range(TILES):
            if tl.sum(tl.where(index == i, is_empty, 0), 0) > 0:
                _write_tile(first + i, num_heads, tiles_m, outputs, TILE_M, PADDED_DIM)


@triton.jit(
    do_not_specialize=[
        "num_tiles", "num_heads", "tiles_m", "seqlen_q", "seqlen_kv", "out_stride_b",
        "out_stride_m", "out_stride_h", "lse_stride_b", "lse_stride_h", "lse_stride_m", "head_dim",
    ]
)  # fmt: skip
def _empty_kernel(
    num_tiles, kv_len, out, lse, num_heads, tiles_m, seqlen_q, seqlen_kv, out_stride_b,
    out_stride_m, out_stride_h, lse_stride_b, lse_stride_h, lse_stride_m, head_dim,
    TILE_M: tl.constexpr, TILES: tl.constexpr, PADDED_DIM: tl.constexpr,
):  # fmt: skip
    outputs = (
        out, lse, seqlen_q, out_stride_b, out_stride_m, out_stride_h, lse_stride_b, lse_stride_h,
        lse_stride_m, head_dim,
    )  # fmt: skip
    write_empty_tiles(
        tl.program_id(0) * TILES, (num_tiles, num_heads, tiles_m, 1), None, kv_len, seqlen_kv,
        outputs, 128, TILE_M, TILES, PADDED_DIM, False,
    )  # fmt: skip


def empty_batch_items(call: AttentionCall, tile_m: int) -> None:
    """Write the rows of batch items whose ``kv_len`` is 0; for calls without symbols."""
    batch, seqlen_q, num_heads, _ = call.q.shape
    tiles_m = triton.cdiv(seqlen_q, tile_m)
    num_tiles = batch * num_heads * tiles_m
    _empty_kernel[(triton.cdiv(num_tiles, TILES),)](
        num_tiles, call.kv_len, call.out, call.lse, num_heads, tiles_m, seqlen_q, call.k.shape[1],
        *output_strides(call), call.out.shape[3], TILE_M=tile_m, TILES=TILES,
        PADDED_DIM=triton.next_power_of_2(call.out.shape[3]),
    )  # fmt: skip


def output_strides(call: AttentionCall) -> tuple[int, ...]:
    return *call.out.stride()[:3], *((0, 0, 0) if call.lse is None else call.lse.stride())
