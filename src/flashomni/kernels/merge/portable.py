"""The difference that sparse attention leaves, as one Triton kernel.

One pass over both parts. Where skipped blocks are summarised, attention over the summaries runs in
the same program: they are few, so that it costs what it reads. So a refresh is attention over all
blocks once, and this.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from flashomni.dispatch import register
from flashomni.kernels.common import portable
from flashomni.kernels.merge.op import DifferenceCall

TILE_M, TILE_N = 64, 64
PLAIN_ROWS = 16  # of a program without summaries, which is bound by memory alone
LOWEST = tl.constexpr(-1e30)  # a reference below all scores, for rows that have none
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _attend(
    q, k, v, log_n, bits, k_stride_n, v_stride_n, bit_stride, columns, scale,
    SUMMARIES: tl.constexpr, TILE_M: tl.constexpr, TILE_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention over the summaries: ``(sum of weights times v, sum of weights, reference)``."""
    acc = tl.zeros([TILE_M, PADDED_DIM], tl.float32)
    row_sum = tl.zeros([TILE_M], tl.float32)
    row_max = tl.full([TILE_M], LOWEST, tl.float32)
    dim = tl.arange(0, PADDED_DIM)
    for start in range(0, columns, TILE_N):
        column = start + tl.arange(0, TILE_N)
        block = column // SUMMARIES
        byte = tl.load(bits + block // 8 * bit_stride, mask=column < columns, other=255)
        takes_part = (byte.to(tl.int32) >> (block % 8)) & 1 == 0
        weight = tl.load(log_n + column, mask=takes_part, other=-float("inf")) * LOG2_E
        inside = (column < columns)[:, None] & (dim < HEAD_DIM)[None, :]
        at = column.to(tl.int64)[:, None]
        key = tl.load(k + at * k_stride_n + dim[None, :], inside, 0.0)
        score = tl.dot(q, tl.trans(key), input_precision=PRECISION) * scale + weight[None, :]
        score = tl.where((weight > -float("inf"))[None, :], score, -float("inf"))
        new_max = tl.maximum(row_max, tl.max(score, 1))
        prob = tl.exp2(score - new_max[:, None])
        shrink = tl.exp2(row_max - new_max)
        row_sum = row_sum * shrink + tl.sum(prob, 1)
        value = tl.load(v + at * v_stride_n + dim[None, :], inside, 0.0)
        acc = tl.dot(prob.to(value.dtype), value, acc * shrink[:, None], input_precision=PRECISION)
        row_max = new_max
    return acc, row_sum, row_max


@triton.jit
def _weight(lse, reference):
    """1 to the bit where both are the same.

    Of scaled ones, a multiply-add would leave what the scaling rounds; and a part that has all
    weight would come back with another last bit.
    """
    return tl.exp2((lse - reference) * LOG2_E)


@triton.jit
def _mean(total, weight):
    """``total / weight``, 0 where nothing has weight."""
    return tl.where(weight > 0, total / tl.where(weight > 0, weight, 1.0), 0.0)


@triton.jit(do_not_specialize=["seqlen", "seqlen_kv", "count"])
def difference_kernel(
    live, live_lse, rest, rest_lse, q, k, v, log_n, bits, kv_len, live_strides, rest_strides,
    live_lse_strides, rest_lse_strides, q_strides, k_strides, v_strides, bit_strides,
    log_n_stride_b, seqlen, seqlen_kv, count, scale, GROUPS: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, SUMMARIES: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """TILE_M tokens of one head, which lie in one query block."""
    tile, h, b = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    token = tile * TILE_M + tl.arange(0, TILE_M)
    dim = tl.arange(0, PADDED_DIM)
    row, exists = token.to(tl.int64), token < seqlen
    inside = exists[:, None] & (dim < HEAD_DIM)[None, :]

    # The loop over summaries first: later it would hold the other parts in registers.
    if SUMMARIES:
        keys = seqlen_kv
        if kv_len is not None:
            keys = tl.maximum(tl.minimum(tl.load(kv_len + b), seqlen_kv), 0)
        columns = tl.minimum(tl.cdiv(keys, BLOCK_N) * SUMMARIES, count)
        q += b * q_strides[0] + h * q_strides[2]
        query = tl.load(q + row[:, None] * q_strides[1] + dim[None, :], inside, 0.0)
        k += b * k_strides[0] + h // GROUPS * k_strides[2]
        v += b * v_strides[0] + h // GROUPS * v_strides[2]
        bits += b * bit_strides[0] + h * bit_strides[1]
        bits += (tile * TILE_M // BLOCK_M).to(tl.int64) * bit_strides[2]
        acc, row_sum, row_max = _attend(
            query, k, v, log_n + b * log_n_stride_b, bits, k_strides[1], v_strides[1],
            bit_strides[3], columns, scale, SUMMARIES, TILE_M, TILE_N, HEAD_DIM, PADDED_DIM,
            PRECISION,
        )  # fmt: skip

    live_lse += b * live_lse_strides[0] + h * live_lse_strides[1]
    rest_lse += b * rest_lse_strides[0] + h * rest_lse_strides[1]
    lse = tl.load(live_lse + row * live_lse_strides[2], exists, -float("inf"))
    more = tl.load(rest_lse + row * rest_lse_strides[2], exists, -float("inf"))
    live += b * live_strides[0] + h * live_strides[2] + row[:, None] * live_strides[1] + dim
    rest += b * rest_strides[0] + h * rest_strides[2] + row[:, None] * rest_strides[1] + dim
    # A part without keys may be anything.
    first = tl.load(live, inside & (lse > -float("inf"))[:, None], 0.0).to(tl.float32)
    sparse = first
    if SUMMARIES:
        row_max *= LN_2
        reference = tl.maximum(lse, row_max)
        own, other = _weight(lse, reference), _weight(row_max, reference)
        weight = own + other * row_sum
        sparse = _mean(own[:, None] * first + other[:, None] * acc, weight[:, None])
    second = tl.load(rest, inside & (more > -float("inf"))[:, None], 0.0).to(tl.float32)
    reference = tl.maximum(tl.maximum(lse, more), LOWEST)
    own, other = _weight(lse, reference), _weight(more, reference)
    dense = _mean(own[:, None] * first + other[:, None] * second, (own + other)[:, None])
    rounded = sparse.to(live.dtype.element_ty)
    tl.store(live, rounded, inside)
    tl.store(rest, (dense - rounded.to(tl.float32)).to(rest.dtype.element_ty), inside)


def _refuses(call: DifferenceCall) -> list[str]:
    summary = call.summary
    k, v = (None, None) if summary is None else (summary.k, summary.v)
    return [
        *portable.refuse_device(call.live),
        *portable.refuse_head_dim(call.live.shape[-1]),
        *portable.refuse_strides(live=call.live, rest=call.rest, q=call.q, k=k, v=v),
        *([] if summary is None else portable.refuse_strides(log_n=summary.log_n)),
    ]


@register(
    "difference", "portable", rank=portable.RANK, refuses=_refuses, available=portable.available,
    serves=("sm90",), device=portable.DEVICE,
)  # fmt: skip
def run(call: DifferenceCall) -> None:
    batch, seqlen, num_heads, head_dim = call.live.shape
    symbols, summary, q = call.symbols, call.summary, call.q
    none: tuple[int, ...] = (0, 0, 0)
    block_m = block_n = 128
    k = v = log_n = bits = None
    strides, count, tile_m = [none, none, none, (*none, 0)], 0, PLAIN_ROWS
    groups, per_block = 1, 0
    if summary is not None and symbols is not None and q is not None:
        k, v, log_n, bits = summary.k, summary.v, summary.log_n, symbols.kv_bits
        block_m, block_n = symbols.grid.block_m, symbols.grid.block_n
        count, groups = k.shape[1], num_heads // k.shape[2]
        per_block = count // symbols.grid.num_kv_blocks
        tile_m = portable.dividing(TILE_M, block_m)
        strides = [*(x.stride()[:3] for x in (q, k, v)), bits.stride()]
    seqlen_kv = 0 if symbols is None else symbols.grid.seqlen_kv
    difference_kernel[triton.cdiv(seqlen, tile_m), num_heads, batch](
        call.live, call.live_lse, call.rest, call.rest_lse, q, k, v, log_n, bits, call.kv_len,
        call.live.stride()[:3], call.rest.stride()[:3], call.live_lse.stride(),
        call.rest_lse.stride(), *strides, 0 if log_n is None else log_n.stride(0), seqlen,
        seqlen_kv, count, call.softmax_scale * math.log2(math.e), GROUPS=groups, HEAD_DIM=head_dim,
        PADDED_DIM=portable.padded(head_dim), BLOCK_M=block_m, BLOCK_N=block_n,
        SUMMARIES=per_block, TILE_M=tile_m, TILE_N=TILE_N,
        PRECISION=portable.precision(call.live.dtype), num_warps=4, num_stages=2,
    )  # fmt: skip
