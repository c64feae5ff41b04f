"""GEMM-Q in plain Triton: one program for each tile of tokens and head, cached ones leave at once.

A tile is one head wide, so RMSNorm and RoPE happen on the fp32 sums in registers.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from flashomni.dispatch import register
from flashomni.kernels.common import portable
from flashomni.kernels.common.configs import Config
from flashomni.kernels.common.portable import bounded
from flashomni.kernels.common.rectangles import stream_blocks
from flashomni.kernels.gemm_q.op import GemmQCall


@triton.jit
def _load_columns(pointers, k, in_features, TILE_K: tl.constexpr, IS_RAGGED: tl.constexpr):
    if IS_RAGGED:
        inside = k + tl.arange(0, TILE_K) < in_features
        return tl.load(pointers, mask=inside[None, :], other=0.0)
    return tl.load(pointers)


@triton.jit
def _normalise(y, dim, exists, norm_weight, norm_eps, HEAD_DIM: tl.constexpr):
    """RMSNorm over head_dim; ``dim`` are the dims of the columns."""
    square = tl.where(exists[None, :], y * y, 0.0)
    y = y * tl.rsqrt(tl.sum(square, 1) / HEAD_DIM + norm_eps)[:, None]
    if norm_weight is not None:
        y = y * tl.load(norm_weight + dim).to(tl.float32)[None, :]
    return y


@triton.jit
def _rotate(
    y, cos, sin, token, cos_stride_m, cos_stride_d, sin_stride_m, sin_stride_d,
    HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
):  # fmt: skip
    """RoPE on neighbouring columns: (y0, y1) -> (y0 cos - y1 sin, y1 cos + y0 sin)."""
    even, odd = tl.split(tl.reshape(y, [y.shape[0], PADDED_DIM // 2, 2]))
    pair = bounded(tl.arange(0, PADDED_DIM // 2), HEAD_DIM // 2)[None, :]
    c = tl.load(cos + token[:, None] * cos_stride_m + pair * cos_stride_d)
    s = tl.load(sin + token[:, None] * sin_stride_m + pair * sin_stride_d)
    return tl.reshape(tl.join(even * c - odd * s, odd * c + even * s), [y.shape[0], PADDED_DIM])


@triton.jit(do_not_specialize=["rows", "row_offset", "first_block"])
def gemm_q_kernel(
    x, weight, bias, norm_weight, cos, sin, out, q_bits, x_stride_b, x_stride_m, weight_stride_n,
    cos_stride_m, cos_stride_d, sin_stride_m, sin_stride_d, out_stride_b, out_stride_m,
    out_stride_h, q_stride_b, q_stride_h, q_stride_w, rows, in_features, row_offset, first_block,
    norm_eps, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    TILE_M: tl.constexpr, TILE_K: tl.constexpr, IS_RAGGED: tl.constexpr, IS_NORMED: tl.constexpr,
    PAIRS_APART: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    h, tile, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    block = first_block + tile * TILE_M // BLOCK_M
    byte = tl.load(q_bits + b * q_stride_b + h.to(tl.int64) * q_stride_h + block // 8 * q_stride_w)
    # Tiles are laid out from the start of a block: the first may begin before the stream.
    start = first_block * BLOCK_M + tile * TILE_M - row_offset
    is_live = ((byte.to(tl.int32) >> (block % 8)) & 1) != 0
    if (start >= rows) | (start + TILE_M <= 0) | (is_live == 0):
        return

    row = start + tl.arange(0, TILE_M)
    token = bounded(row, rows).to(tl.int64)
    place = tl.arange(0, PADDED_DIM)
    exists = place < HEAD_DIM
    dim = bounded(place, HEAD_DIM)
    if PAIRS_APART:  # columns are projected in the order in which pairs are neighbours
        dim = dim // 2 + dim % 2 * (HEAD_DIM // 2)
    feature = h * HEAD_DIM + dim
    column = tl.arange(0, TILE_K)
    x_pointers = x + b * x_stride_b + token[:, None] * x_stride_m + column[None, :]
    w_pointers = weight + feature.to(tl.int64)[:, None] * weight_stride_n + column[None, :]
    y = tl.zeros([TILE_M, PADDED_DIM], tl.float32)
    for k in range(0, in_features, TILE_K):
        x_tile = _load_columns(x_pointers + k, k, in_features, TILE_K, IS_RAGGED)
        w_tile = _load_columns(w_pointers + k, k, in_features, TILE_K, IS_RAGGED)
        y = tl.dot(x_tile, tl.trans(w_tile), y, input_precision=PRECISION)

    if bias is not None:
        y = y + tl.load(bias + feature).to(tl.float32)[None, :]
    if IS_NORMED:
        y = _normalise(y, dim, exists, norm_weight, norm_eps, HEAD_DIM)
    if cos is not None:
        y = _rotate(
            y, cos, sin, token, cos_stride_m, cos_stride_d, sin_stride_m, sin_stride_d, HEAD_DIM,
            PADDED_DIM,
        )  # fmt: skip
    out += b * out_stride_b + h.to(tl.int64) * out_stride_h
    inside = ((row >= 0) & (row < rows))[:, None] & exists[None, :]
    at = token[:, None] * out_stride_m + dim[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


def launch(call: GemmQCall, config: Config) -> None:
    """Run with this configuration; tiles are cut down to divide the blocks."""
    x, weight, out, bits = call.x, call.weight, call.out, call.symbols.q_bits
    batch, rows, num_heads, head_dim = out.shape
    block_m = call.symbols.grid.block_m
    first, blocks = stream_blocks(call.row_offset, rows, block_m)
    tile_m = portable.dividing(config.tile_m, block_m)
    cos, sin = (None, None) if call.rope is None else call.rope
    gemm_q_kernel[(num_heads, blocks * (block_m // tile_m), batch)](
        x, weight, call.bias, call.norm_weight, cos, sin, out, bits, *x.stride()[:2],
        weight.stride(0), *((0, 0) if cos is None else cos.stride()),
        *((0, 0) if sin is None else sin.stride()), *out.stride()[:3], *bits.stride(), rows,
        x.shape[2], call.row_offset, first,
        call.norm_eps or 0.0, HEAD_DIM=head_dim, PADDED_DIM=portable.padded(head_dim),
        BLOCK_M=block_m, TILE_M=tile_m, TILE_K=config.tile_k,
        IS_RAGGED=x.shape[2] % config.tile_k > 0, IS_NORMED=call.norm_eps is not None,
        PAIRS_APART=call.rope is not None and call.rope_layout == "half",
        PRECISION=portable.precision(x.dtype), num_warps=config.num_warps,
        num_stages=config.num_stages,
    )  # fmt: skip


def _refuses(call: GemmQCall) -> list[str]:
    return (
        portable.refuse_device(call.x)
        + portable.refuse_head_dim(call.out.shape[3])
        + portable.refuse_strides(x=call.x, weight=call.weight, out=call.out)
        + portable.refuse_strides(bias=call.bias, norm_weight=call.norm_weight)
    )


@register(
    "gemm_q", "portable", rank=portable.RANK, refuses=_refuses,
    available=portable.available, device=portable.DEVICE,
)  # fmt: skip
def run(call: GemmQCall) -> None:
    if not call.out.numel():
        return
    with torch.cuda.device_of(call.x):
        launch(call, portable.config("gemm_q", call.x, call.out.shape[3]))
