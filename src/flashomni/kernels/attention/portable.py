"""Block-sparse attention in plain Triton: a loop over the visited key blocks of each query tile.

A short launch turns each row of S_s into a list of block numbers, cut off at ``kv_len``, and folds
S_c into the length of the list. Then one program runs for each query tile and head. The number of
the next block is read one step ahead, so that its latency hides behind a tile. Only the last tile
can be ragged: all others are computed without a mask.

The softmax is online or *anchored*: the row maximum of the first visit is what all weights are
relative to, so that nothing is rescaled and no visit waits for a maximum. bf16 and fp32 have the
exponents for it. A tile for which they do not suffice is done again online, by the same
program: what its keys are decides, and no step waits for the host. (FlashDecoding++, arXiv
2311.01282, section 3, has a reference fixed before the run, and computes again where it fails.)

Summaries of skipped blocks are visited after the blocks: the bits that were left out say which.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from flashomni.dispatch import register
from flashomni.kernels.attention._forecast_tiles import write_forecast_tiles
from flashomni.kernels.attention._key_blocks import CACHED, key_block_lists, num_keys
from flashomni.kernels.attention.op import AttentionCall
from flashomni.kernels.common import portable
from flashomni.kernels.common.configs import Config

# A tile of the anchored softmax is done again unless the weights of each row sum up to less than
# this. Where values are large, their products overflow before; that shows in the output.
MAX_SUM = tl.constexpr(2.0**96)
LOWEST = tl.constexpr(-1e30)  # a reference below all scores, for rows that have none yet
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _load_keys(x, start, stride_n, keys, TILE_N: tl.constexpr, HEAD_DIM: tl.constexpr,
               PADDED_DIM: tl.constexpr, IS_LAST: tl.constexpr):  # fmt: skip
    """Rows ``[start, start + TILE_N)`` of k or v; zero where there is no key or no dim."""
    row = tl.arange(0, TILE_N)
    dim = tl.arange(0, PADDED_DIM)
    pointers = x + tl.cast(start, tl.int64) * stride_n + row[:, None] * stride_n + dim[None, :]
    if IS_LAST:
        return tl.load(pointers, (start + row < keys)[:, None] & (dim < HEAD_DIM)[None, :], 0.0)
    if HEAD_DIM == PADDED_DIM:
        return tl.load(pointers)
    return tl.load(pointers, mask=(dim < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _weigh(
    acc, row_sum, exact_sum, row_max, is_first, score, scale, IS_CUT: tl.constexpr,
    ANCHORED: tl.constexpr, HAS_LSE: tl.constexpr, MAY_BE_EMPTY: tl.constexpr,
):  # fmt: skip
    """Weights of the scores of one visit; ``scale`` and ``row_max`` are in powers of two.

    Online, or anchored: the maximum of the first visit serves for all.
    """
    if ANCHORED:
        if is_first:
            row_max = tl.max(score, 1) * scale
            if MAY_BE_EMPTY:
                row_max = tl.maximum(row_max, LOWEST)
        prob = tl.exp2(score * scale - row_max[:, None])
        if IS_CUT:
            # Cut down to bf16, so that they are summed as they are used: what is cut off cancels in
            # the division, as a whole where one key has nearly all the weight. Cutting is one
            # instruction, and NaN stays NaN; ptxas rounds one by one, as slowly as it takes powers.
            if HAS_LSE:
                exact_sum += tl.sum(prob, 1)
            prob = (prob.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)
        row_sum += tl.sum(prob, 1)
    else:
        new_max = tl.maximum(row_max, tl.max(score, 1) * scale)
        if MAY_BE_EMPTY:
            new_max = tl.maximum(new_max, LOWEST)
        prob = tl.exp2(score * scale - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(prob, 1)
        acc = acc * shrink[:, None]
        row_max = new_max
    return prob, acc, row_sum, exact_sum, row_max


@triton.jit
def _visit(
    acc, row_sum, exact_sum, row_max, is_first, q, k, v, start, k_stride_n, v_stride_n, keys, scale,
    TILE_N: tl.constexpr, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    PRECISION: tl.constexpr, ANCHORED: tl.constexpr, HAS_LSE: tl.constexpr, IS_LAST: tl.constexpr,
):  # fmt: skip
    """Softmax over one tile of keys."""
    key = _load_keys(k, start, k_stride_n, keys, TILE_N, HEAD_DIM, PADDED_DIM, IS_LAST)
    score = tl.dot(q, tl.trans(key), input_precision=PRECISION)
    if IS_LAST:
        score = tl.where((start + tl.arange(0, TILE_N) < keys)[None, :], score, -float("inf"))
    prob, acc, row_sum, exact_sum, row_max = _weigh(
        acc, row_sum, exact_sum, row_max, is_first, score, scale,
        v.dtype.element_ty == tl.bfloat16, ANCHORED, HAS_LSE, False,
    )  # fmt: skip
    value = _load_keys(v, start, v_stride_n, keys, TILE_N, HEAD_DIM, PADDED_DIM, IS_LAST)
    acc = tl.dot(prob.to(value.dtype), value, acc, input_precision=PRECISION)
    return acc, row_sum, exact_sum, row_max


@triton.jit
def _visit_summaries(
    acc, row_sum, exact_sum, row_max, is_first, q, summary, start, count, scale,
    SUMMARIES: tl.constexpr, TILE_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, PRECISION: tl.constexpr, ANCHORED: tl.constexpr,
    HAS_LSE: tl.constexpr,
):  # fmt: skip
    """The same over one tile of the first ``count`` summaries: of skipped blocks, and weighted."""
    k, v, log_n, bits, k_stride_n, v_stride_n, bit_stride = summary
    column = start + tl.arange(0, TILE_N)
    block = column // SUMMARIES
    byte = tl.load(bits + block // 8 * bit_stride, mask=column < count, other=255)
    takes_part = (byte.to(tl.int32) >> (block % 8)) & 1 == 0
    weight = tl.load(log_n + column, mask=takes_part, other=-float("inf")) * LOG2_E
    key = _load_keys(k, start, k_stride_n, count, TILE_N, HEAD_DIM, PADDED_DIM, True)
    score = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale + weight[None, :]
    score = tl.where((weight > -float("inf"))[None, :], score, -float("inf"))
    prob, acc, row_sum, exact_sum, row_max = _weigh(
        acc, row_sum, exact_sum, row_max, is_first, score, 1.0,
        v.dtype.element_ty == tl.bfloat16, ANCHORED, HAS_LSE, True,
    )  # fmt: skip
    value = _load_keys(v, start, v_stride_n, count, TILE_N, HEAD_DIM, PADDED_DIM, True)
    acc = tl.dot(prob.to(value.dtype), value, acc, input_precision=PRECISION)
    return acc, row_sum, exact_sum, row_max


@triton.jit
def _walk(
    query, k, v, blocks, count, last, in_last, k_stride_n, v_stride_n, keys, scale, summary,
    BLOCK_N: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, PRECISION: tl.constexpr, ANCHORED: tl.constexpr,
    HAS_LSE: tl.constexpr, SUMMARIES: tl.constexpr,
):  # fmt: skip
    """All visits of a query tile: ``(sum of weights times v, sums of weights, reference)``.

    The second sum, for the LSE, is of weights that were not cut down to bf16.
    """
    SPLIT: tl.constexpr = BLOCK_N // TILE_N
    full_tiles = tl.where(count > 0, (count - 1) * SPLIT + in_last // TILE_N, 0)
    acc = tl.zeros([TILE_M, PADDED_DIM], tl.float32)
    row_sum = tl.zeros([TILE_M], tl.float32)
    exact_sum = tl.zeros([TILE_M], tl.float32)
    row_max = tl.full([TILE_M], -float("inf"), tl.float32)
    block = 0
    if blocks is not None:
        block = tl.load(blocks, mask=count > 0, other=0).to(tl.int32)
    for t in range(full_tiles):
        start = t * TILE_N
        if blocks is not None:
            start = block * BLOCK_N + t % SPLIT * TILE_N
            block = tl.load(blocks + tl.minimum((t + 1) // SPLIT, count - 1)).to(tl.int32)
        acc, row_sum, exact_sum, row_max = _visit(
            acc, row_sum, exact_sum, row_max, t == 0, query, k, v, start, k_stride_n, v_stride_n,
            keys, scale, TILE_N, HEAD_DIM, PADDED_DIM, PRECISION, ANCHORED, HAS_LSE, False,
        )  # fmt: skip
    if (count > 0) & (in_last % TILE_N > 0):
        start = last * BLOCK_N + in_last // TILE_N * TILE_N
        acc, row_sum, exact_sum, row_max = _visit(
            acc, row_sum, exact_sum, row_max, full_tiles == 0, query, k, v, start, k_stride_n,
            v_stride_n, keys, scale, TILE_N, HEAD_DIM, PADDED_DIM, PRECISION, ANCHORED, HAS_LSE,
            True,
        )  # fmt: skip
    if SUMMARIES:
        blocks_there = tl.cdiv(keys, BLOCK_N)
        columns = tl.where(count < blocks_there, blocks_there * SUMMARIES, 0)
        for start in range(0, columns, TILE_N):
            acc, row_sum, exact_sum, row_max = _visit_summaries(
                acc, row_sum, exact_sum, row_max, (start == 0) & (count == 0), query, summary,
                start, columns, scale, SUMMARIES, TILE_N, HEAD_DIM, PADDED_DIM, PRECISION,
                ANCHORED, HAS_LSE,
            )  # fmt: skip
    if not (ANCHORED and HAS_LSE and v.dtype.element_ty == tl.bfloat16):
        exact_sum = row_sum
    return acc, row_sum, exact_sum, row_max


@triton.jit
def _of_row(summary, b, h, row, total, GROUPS: tl.constexpr):
    """What ``_visit_summaries`` gets, of one query block of one head; there are ``total``."""
    k, v, log_n, bits, k_strides, v_strides, bit_strides = summary
    k += b * k_strides[0] + (h // GROUPS).to(tl.int64) * k_strides[2]
    v += b * v_strides[0] + (h // GROUPS).to(tl.int64) * v_strides[2]
    bits += b * bit_strides[0] + h.to(tl.int64) * bit_strides[1] + row.to(tl.int64) * bit_strides[2]
    return k, v, log_n + b * total, bits, k_strides[1], v_strides[1], bit_strides[3]


@triton.jit
def _is_sound(acc, row_sum):
    """Whether no row of an anchored tile overflowed; NaN counts as well."""
    good = (row_sum < MAX_SUM) & (tl.sum(tl.abs(acc), 1) < float("inf"))
    return tl.min(good.to(tl.int32), 0) != 0


@triton.jit(do_not_specialize=["seqlen_q", "seqlen_kv", "num_q_blocks", "num_kv_blocks"])
def attention_kernel(
    q, k, v, out, lse, blocks, counts, kv_len, redone, q_stride_b, q_stride_m, q_stride_h,
    k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n, v_stride_h, out_stride_b,
    out_stride_m, out_stride_h, lse_stride_b, lse_stride_h, lse_stride_m, seqlen_q, seqlen_kv,
    num_q_blocks, num_kv_blocks, scale, summary, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILE_M: tl.constexpr,
    TILE_N: tl.constexpr, PRECISION: tl.constexpr, ANCHORED: tl.constexpr, SUMMARIES: tl.constexpr,
):  # fmt: skip
    """One query tile of one head: TILE_M tokens, which lie in one query block."""
    place, h, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    # From both ends inwards: text sits at one of them, and its rows visit most and start early.
    tile = tl.where(place % 2 == 0, place // 2, tl.num_programs(0) - 1 - place // 2)
    keys = num_keys(kv_len, b, seqlen_kv)
    count = tl.cdiv(keys, BLOCK_N)
    if counts is not None:
        row = (b * tl.num_programs(1) + h) * num_q_blocks + tile * TILE_M // BLOCK_M
        count = tl.load(counts + row)
        blocks += row * num_kv_blocks
        if count == CACHED:
            return

    token = tile * TILE_M + tl.arange(0, TILE_M)
    dim = tl.arange(0, PADDED_DIM)
    inside = (token < seqlen_q)[:, None] & (dim < HEAD_DIM)[None, :]
    q += b * q_stride_b + h.to(tl.int64) * q_stride_h
    k += b * k_stride_b + (h // GROUPS).to(tl.int64) * k_stride_h
    v += b * v_stride_b + (h // GROUPS).to(tl.int64) * v_stride_h
    query = tl.load(q + token.to(tl.int64)[:, None] * q_stride_m + dim[None, :], inside, 0.0)
    # A row's maximum is that of its scaled scores only if the scale is not negative.
    query = (query.to(tl.float32) * tl.where(scale < 0, -1.0, 1.0)).to(query.dtype)
    scale = tl.maximum(tl.abs(scale), 1e-30)  # times -inf, zero would be NaN

    last = count - 1
    if counts is not None:
        last = tl.load(blocks + last, mask=count > 0, other=0).to(tl.int32)
    in_last = tl.minimum(keys - last * BLOCK_N, BLOCK_N)
    if SUMMARIES:
        total = num_kv_blocks * SUMMARIES
        summary = _of_row(summary, b, h, tile * TILE_M // BLOCK_M, total, GROUPS)
    acc, row_sum, exact_sum, row_max = _walk(
        query, k, v, blocks, count, last, in_last, k_stride_n, v_stride_n, keys, scale, summary,
        BLOCK_N, TILE_M, TILE_N, HEAD_DIM, PADDED_DIM, PRECISION, ANCHORED, lse is not None,
        SUMMARIES,
    )  # fmt: skip
    is_lost = False
    if ANCHORED:
        is_lost = ((count > 0) | (SUMMARIES > 0)) & (_is_sound(acc, row_sum) == 0)
    if is_lost:
        if redone is not None:
            tl.atomic_add(redone, 1)
        acc, row_sum, exact_sum, row_max = _walk(
            query, k, v, blocks, count, last, in_last, k_stride_n, v_stride_n, keys, scale,
            summary, BLOCK_N, TILE_M, TILE_N, HEAD_DIM, PADDED_DIM, PRECISION, False,
            lse is not None, SUMMARIES,
        )  # fmt: skip

    is_empty = row_sum == 0
    result = acc / tl.where(is_empty, 1.0, row_sum)[:, None]
    out += b * out_stride_b + h.to(tl.int64) * out_stride_h
    at = token.to(tl.int64)[:, None] * out_stride_m + dim[None, :]
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)
    if lse is not None:
        ln_2: tl.constexpr = 0.6931471805599453
        value = (row_max + tl.log2(tl.where(is_empty, 1.0, exact_sum))) * ln_2
        if SUMMARIES:
            value = tl.where(is_empty, -float("inf"), value)
        at = b * lse_stride_b + h.to(tl.int64) * lse_stride_h + token.to(tl.int64) * lse_stride_m
        tl.store(lse + at, value, mask=token < seqlen_q)


def launch(call: AttentionCall, config: Config) -> None:
    """Run with this configuration; tiles are cut down to divide the blocks.

    Args:
        call: what to compute.
        config: how to tile.
    """
    write_forecast_tiles(call)
    q, k, v, out, lse, symbols = call.q, call.k, call.v, call.out, call.lse, call.symbols
    batch, seqlen_q, num_heads, head_dim = q.shape
    block_m, block_n = config.tile_m, config.tile_n
    blocks = counts = None
    if symbols is not None:
        block_m, block_n = symbols.grid.block_m, symbols.grid.block_n
        blocks, counts = key_block_lists(symbols, call.kv_len)
    tile_m = portable.dividing(config.tile_m, block_m)
    attention_kernel[(triton.cdiv(seqlen_q, tile_m), num_heads, batch)](
        q, k, v, out, lse, blocks, counts, call.kv_len, call.redone, *q.stride()[:3],
        *k.stride()[:3], *v.stride()[:3], *out.stride()[:3],
        *((0, 0, 0) if lse is None else lse.stride()),
        seqlen_q, k.shape[1], triton.cdiv(seqlen_q, block_m), triton.cdiv(k.shape[1], block_n),
        call.softmax_scale * math.log2(math.e), _summary(call), GROUPS=num_heads // k.shape[2],
        HEAD_DIM=head_dim, PADDED_DIM=portable.padded(head_dim), BLOCK_M=block_m, BLOCK_N=block_n,
        TILE_M=tile_m, TILE_N=portable.dividing(config.tile_n, block_n),
        PRECISION=portable.precision(q.dtype),
        ANCHORED=is_anchored(call, config),
        SUMMARIES=call.summaries_per_block, num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip


def is_anchored(call: AttentionCall, config: Config) -> bool:
    """Whether the softmax is anchored: fp16 has not the exponents, summaries not the registers."""
    wanted = config.anchored and not call.online
    return wanted and call.q.dtype != torch.float16 and call.summaries_per_block == 0


def _summary(call: AttentionCall) -> tuple | None:
    """The summary as the kernel takes it; a stride of 1 alone in this tuple does not compile."""
    if call.summary is None or call.symbols is None:
        return None
    k, v, log_n = call.summary.k, call.summary.v, call.summary.log_n.contiguous()
    bits = call.symbols.kv_bits
    strides = tuple(k.stride()[:3]), tuple(v.stride()[:3]), tuple(bits.stride())
    return k, v, log_n, bits, *strides


def _refuses(call: AttentionCall) -> list[str]:
    return (
        portable.refuse_device(call.q)
        + portable.refuse_head_dim(call.q.shape[3])
        + portable.refuse_strides(q=call.q, k=call.k, v=call.v, out=call.out)
        + _summary_refusals(call)
    )


def _summary_refusals(call: AttentionCall) -> list[str]:
    summary = call.summary
    if summary is None:
        return []
    return portable.refuse_strides(**{"summary.k": summary.k, "summary.v": summary.v})


@register(
    "attention", "portable", rank=portable.RANK, refuses=_refuses,
    available=portable.available, device=portable.DEVICE,
)  # fmt: skip
def run(call: AttentionCall) -> None:
    if not call.q.numel():
        return
    with torch.cuda.device_of(call.q):
        launch(call, portable.config("attention", call.q, call.q.shape[3]))
