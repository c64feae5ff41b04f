"""Cached tiles that are to hold a forecast: the weighted sum of the terms of their history.

A launch of its own ahead of the attention kernel, which never looks at a cached tile. A program
reads the bit of its tile first and leaves if the tile is computed, so only cached tiles cost memory
traffic: T reads and one write.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashomni.kernels.attention.op import AttentionCall
from flashomni.kernels.common import portable

TILE_M = 32  # rows of one head that a program writes, cut down to divide block_m


@triton.jit(do_not_specialize=["first_tile", "start", "stop"])
def forecast_kernel(
    out, terms, strides, coefficients, q_bits, coefficient_stride, first_tile, start, stop,
    out_stride_b, out_stride_m, out_stride_h, q_stride_b, q_stride_h, q_stride_w,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr, TILE_M: tl.constexpr,
):  # fmt: skip
    """Rows of ``[start, stop)`` in one tile of one head; the tile lies in one query block."""
    tile = first_tile + tl.program_id(0)
    head, batch = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    block = tile * TILE_M // BLOCK_M
    byte = tl.load(q_bits + batch * q_stride_b + head * q_stride_h + block // 8 * q_stride_w)
    if (byte.to(tl.int32) >> (block % 8)) & 1 != 0:
        return
    row = tile * TILE_M + tl.arange(0, TILE_M)
    dim = tl.arange(0, PADDED_DIM).to(tl.int64)[None, :]
    inside = ((row >= start) & (row < stop))[:, None] & (dim < HEAD_DIM)
    term_row = (row - start).to(tl.int64)[:, None]
    total = tl.zeros([TILE_M, PADDED_DIM], tl.float32)
    for t in tl.static_range(len(terms)):
        stride_b, stride_m, stride_h, stride_d = strides[t]
        term = terms[t] + batch * stride_b + head * stride_h
        value = tl.load(term + term_row * stride_m + dim * stride_d, inside, 0.0)
        total += tl.load(coefficients + t * coefficient_stride) * value.to(tl.float32)
    out += batch * out_stride_b + head * out_stride_h
    at = row.to(tl.int64)[:, None] * out_stride_m + dim
    tl.store(out + at, total.to(out.dtype.element_ty), inside)


def write_forecast_tiles(call: AttentionCall) -> None:
    """Write the cached rows of ``call.out`` that the forecast covers; nothing without one."""
    forecast, symbols, out = call.forecast, call.symbols, call.out
    if forecast is None or symbols is None or not forecast.terms[0].numel():
        return
    batch, rows, num_heads, head_dim = forecast.terms[0].shape
    block_m, start = symbols.grid.block_m, forecast.row_offset
    tile_m = portable.dividing(TILE_M, block_m)
    first_tile, end_tile = start // tile_m, triton.cdiv(start + rows, tile_m)
    forecast_kernel[(end_tile - first_tile, num_heads, batch)](
        out, tuple(forecast.terms), tuple(tuple(term.stride()) for term in forecast.terms),
        forecast.coefficients, symbols.q_bits, forecast.coefficients.stride(0), first_tile, start,
        start + rows, *out.stride()[:3], *symbols.q_bits.stride(), HEAD_DIM=head_dim,
        PADDED_DIM=portable.padded(head_dim), BLOCK_M=block_m, TILE_M=tile_m,
    )  # fmt: skip
