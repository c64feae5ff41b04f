"""GEMM-O in plain Triton: the K loop of an output tile runs over the computed heads of its rows.

The heads of a tile are a 64 bit word, made from S_c when the program starts and walked from its
lowest bit up: no list, no second launch. An Update pass walks the cached heads first; their sum is
the first bias term, and the other heads are added on top of it for the dense result.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashomni.dispatch import register
from flashomni.kernels.common import portable
from flashomni.kernels.common.configs import Config
from flashomni.kernels.common.portable import bounded
from flashomni.kernels.common.rectangles import stream_blocks
from flashomni.kernels.gemm_o.op import GemmOCall, GemmOUpdateCall
from flashomni.symbols import Symbols

MAX_HEADS = 64  # bits of a word


@triton.jit
def _heads(q_bits, block, stride_h, num_heads, HEADS: tl.constexpr, CACHED: tl.constexpr):
    """``(set, size)`` of the computed (or cached) heads of a query block; bit h is head h."""
    head = tl.arange(0, HEADS)
    byte = tl.load(q_bits + head.to(tl.int64) * stride_h, mask=head < num_heads, other=0)
    bit = (byte.to(tl.int64) >> (block % 8)) & 1
    if CACHED:
        bit = (head < num_heads).to(tl.int64) - bit
    return tl.sum(bit << head.to(tl.int64), 0), tl.sum(bit, 0).to(tl.int32)


@triton.jit
def _lowest(word):
    """Index of the lowest set bit: the exponent of the float that has this bit alone."""
    bits = (word & -word).to(tl.float32).to(tl.int32, bitcast=True)
    return ((bits >> 23) & 0xFF) - 127


@triton.jit
def _add_heads(
    acc, o, weight, word, count, stride_h, HEAD_DIM: tl.constexpr, TILE_K: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the products of ``count`` heads; ``o`` and ``weight`` point to the rows of a tile."""
    STEPS: tl.constexpr = (HEAD_DIM + TILE_K - 1) // TILE_K
    for step in range(count * STEPS):
        head = _lowest(word)
        dim = step % STEPS * TILE_K + tl.arange(0, TILE_K)
        o_pointers = o + head.to(tl.int64) * stride_h + dim[None, :]
        w_pointers = weight + head * HEAD_DIM + dim[None, :]
        if HEAD_DIM % TILE_K == 0:
            o_tile, w_tile = tl.load(o_pointers), tl.load(w_pointers)
        else:
            inside = (dim < HEAD_DIM)[None, :]
            o_tile = tl.load(o_pointers, mask=inside, other=0.0)
            w_tile = tl.load(w_pointers, mask=inside, other=0.0)
        acc = tl.dot(o_tile, tl.trans(w_tile), acc, input_precision=PRECISION)
        word = tl.where(step % STEPS == STEPS - 1, word & (word - 1), word)
    return acc


@triton.jit
def _add_columns(
    acc, always, weight, extra, TILE_K: tl.constexpr, IS_RAGGED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the product of the columns that belong to no head."""
    column = tl.arange(0, TILE_K)[None, :]
    for k in range(0, extra, TILE_K):
        if IS_RAGGED:
            a_tile = tl.load(always + k + column, mask=k + column < extra, other=0.0)
            w_tile = tl.load(weight + k + column, mask=k + column < extra, other=0.0)
        else:
            a_tile, w_tile = tl.load(always + k + column), tl.load(weight + k + column)
        acc = tl.dot(a_tile, tl.trans(w_tile), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["rows", "row_offset", "first_block", "num_heads", "num_terms"])
def gemm_o_kernel(
    o, weight, bias, always, terms, coefficients, partial, out, q_bits, o_stride_b, o_stride_m,
    o_stride_h, weight_stride_n, always_stride_b, always_stride_m, terms_stride_t, terms_stride_b,
    terms_stride_m, partial_stride_b, partial_stride_m, out_stride_b, out_stride_m, q_stride_b,
    q_stride_h, q_stride_w, rows, out_features, extra, row_offset, first_block, num_heads,
    num_terms, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    TILE_M: tl.constexpr, TILE_N: tl.constexpr, TILE_K: tl.constexpr, CACHED: tl.constexpr,
    IS_RAGGED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One output tile; with ``partial``, the sum over the cached heads and the dense result."""
    n_tile, tile, b = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    # Tiles are laid out from the start of a block: the first may begin before the stream.
    start = first_block * BLOCK_M + tile * TILE_M - row_offset
    if (start >= rows) | (start + TILE_M <= 0):
        return
    block = first_block + tile * TILE_M // BLOCK_M
    q_bits += b * q_stride_b + block // 8 * q_stride_w
    word, count = _heads(q_bits, block, q_stride_h, num_heads, HEADS, CACHED)

    row = start + tl.arange(0, TILE_M)
    token = bounded(row, rows).to(tl.int64)[:, None]
    column = n_tile * TILE_N + tl.arange(0, TILE_N)
    feature = bounded(column, out_features).to(tl.int64)
    inside = ((row >= 0) & (row < rows))[:, None] & (column < out_features)[None, :]
    o += b * o_stride_b + token * o_stride_m
    weight += feature[:, None] * weight_stride_n
    y = tl.zeros([TILE_M, TILE_N], tl.float32)
    y = _add_heads(y, o, weight, word, count, o_stride_h, HEAD_DIM, TILE_K, PRECISION)
    if partial is not None:
        at = b * partial_stride_b + token * partial_stride_m + column[None, :]
        tl.store(partial + at, y.to(partial.dtype.element_ty), mask=inside)
        word, count = _heads(q_bits, block, q_stride_h, num_heads, HEADS, not CACHED)
        y = _add_heads(y, o, weight, word, count, o_stride_h, HEAD_DIM, TILE_K, PRECISION)
    if always is not None:
        always += b * always_stride_b + token * always_stride_m
        weight += num_heads * HEAD_DIM
        y = _add_columns(y, always, weight, extra, TILE_K, IS_RAGGED, PRECISION)

    if bias is not None:
        y = y + tl.load(bias + feature).to(tl.float32)[None, :]
    if terms is not None:
        terms += b * terms_stride_b + token * terms_stride_m + feature[None, :]
        for t in range(num_terms):
            term = tl.load(terms + tl.cast(t, tl.int64) * terms_stride_t)
            y = y + tl.load(coefficients + t) * term.to(tl.float32)
    at = b * out_stride_b + token * out_stride_m + column[None, :]
    tl.store(out + at, y.to(out.dtype.element_ty), mask=inside)


def launch(
    o: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    always: Tensor | None,
    terms: Tensor | None,
    coefficients: Tensor | None,
    partial: Tensor | None,
    out: Tensor,
    symbols: Symbols,
    row_offset: int,
    config: Config,
    *,
    cached: bool,
) -> None:
    """Sum over the computed heads, or over the cached ones; tiles are cut to divide the blocks."""
    batch, rows, num_heads, head_dim = o.shape
    bits, block_m, out_features = symbols.q_bits, symbols.grid.block_m, out.shape[2]
    first, blocks = stream_blocks(row_offset, rows, block_m)
    tile_m = portable.dividing(config.tile_m, block_m)
    extra = 0 if always is None else always.shape[2]
    grid = (triton.cdiv(out_features, config.tile_n), blocks * (block_m // tile_m), batch)
    gemm_o_kernel[grid](
        o, weight, bias, always if extra else None, terms, coefficients, partial, out, bits,
        *o.stride()[:3], weight.stride(0), *_strides(always, 2), *_strides(terms, 3),
        *_strides(partial, 2), *out.stride()[:2], *bits.stride(), rows, out_features, extra,
        row_offset, first, num_heads, 0 if coefficients is None else coefficients.shape[0],
        HEADS=triton.next_power_of_2(num_heads), HEAD_DIM=head_dim, BLOCK_M=block_m, TILE_M=tile_m,
        TILE_N=config.tile_n, TILE_K=config.tile_k, CACHED=cached,
        IS_RAGGED=extra % config.tile_k > 0, PRECISION=portable.precision(o.dtype),
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip


def _strides(tensor: Tensor | None, count: int) -> tuple[int, ...]:
    return (0,) * count if tensor is None else tensor.stride()[:count]


def _refuses_shared(call: GemmOCall | GemmOUpdateCall, o: Tensor) -> list[str]:
    reasons = portable.refuse_device(call.out) + portable.refuse_head_dim(o.shape[3])
    if o.shape[2] > MAX_HEADS:
        reasons.append(f"num_heads must be at most {MAX_HEADS}, got {o.shape[2]}")
    return reasons + portable.refuse_strides(
        weight=call.weight,
        bias=call.bias,
        always=call.always,
        out=call.out,
        bias_terms=call.bias_terms,
    )


def _refuses(call: GemmOCall) -> list[str]:
    mixed = portable.refuse_strides(o=call.o, coefficients=call.coefficients)
    return _refuses_shared(call, call.o) + mixed


def _refuses_update(call: GemmOUpdateCall) -> list[str]:
    reasons = _refuses_shared(call, call.terms[0])
    for index, term in enumerate(call.terms):
        name = f"terms[{index}]"
        if term.dtype != call.weight.dtype:
            reasons.append(f"{name} must have the dtype of weight, got {term.dtype}")
        reasons += portable.refuse_strides(**{name: term})
    return reasons


@register(
    "gemm_o", "portable", rank=portable.RANK, refuses=_refuses,
    available=portable.available, device=portable.DEVICE,
)  # fmt: skip
def run(call: GemmOCall) -> None:
    if not call.out.numel():
        return
    with torch.cuda.device_of(call.out):
        launch(
            call.o, call.weight, call.bias, call.always, call.bias_terms, call.coefficients, None,
            call.out, call.symbols, call.row_offset,
            portable.config("gemm_o", call.o, call.o.shape[3]), cached=False,
        )  # fmt: skip


@register(
    "gemm_o_update", "portable", rank=portable.RANK, refuses=_refuses_update,
    available=portable.available, device=portable.DEVICE,
)  # fmt: skip
def update(call: GemmOUpdateCall) -> None:
    if not call.out.numel():
        return
    o, bias_terms = call.terms[0], call.bias_terms
    config = portable.config("gemm_o", o, o.shape[3])
    where = (call.symbols, call.row_offset, config)
    with torch.cuda.device_of(call.out):
        dense = (call.bias, call.always, None, None, bias_terms[0], call.out)
        launch(o, call.weight, *dense, *where, cached=True)
        for difference, term in zip(call.terms[1:], bias_terms[1:], strict=True):
            alone = (None, None, None, None, None, term)
            launch(difference, call.weight, *alone, *where, cached=True)
