"""Summaries of key blocks in one Triton launch, bound by reading k and v once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashomni.dispatch import register
from flashomni.kernels.common import portable
from flashomni.kernels.summarise.op import SummariseCall

ELEMENTS = 8192  # that a program loads at once


@triton.jit
def _mean(
    x, stride_n, summary, n, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Means of the first ``n`` of the ``WIDTH`` rows of each summary: fp32, 0 where n is."""
    dim = tl.arange(0, PADDED_DIM)[None, None, :]
    total = tl.zeros([summary.shape[0], PADDED_DIM], tl.float32)
    for start in range(0, WIDTH, TOKENS):
        index = start + tl.arange(0, TOKENS)[None, :]
        token = summary[:, None] * WIDTH + index
        inside = (index < n[:, None])[:, :, None] & (dim < HEAD_DIM)
        at = token.to(tl.int64)[:, :, None] * stride_n + dim
        total += tl.sum(tl.load(x + at, inside, other=0.0).to(tl.float32), 1)
    return total / tl.maximum(n, 1).to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["seqlen", "count"])
def summarise_kernel(
    k, v, kv_len, k_out, v_out, log_n, k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n,
    v_stride_h, seqlen, count, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``ROWS`` summaries of one head; neighbours in time are its other heads, side by side."""
    h, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    num_heads = tl.num_programs(0)
    keys = seqlen
    if kv_len is not None:
        keys = tl.minimum(tl.load(kv_len + b), seqlen)
    summary = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.maximum(tl.minimum(keys - summary * WIDTH, WIDTH), 0)
    n = tl.where(summary < count, n, 0)
    dim = tl.arange(0, PADDED_DIM)[None, :]
    inside = (summary < count)[:, None] & (dim < HEAD_DIM)
    at = ((b * count + summary[:, None]) * num_heads + h) * HEAD_DIM + dim
    k += b * k_stride_b + h * k_stride_h
    mean = _mean(k, k_stride_n, summary, n, HEAD_DIM, PADDED_DIM, WIDTH, TOKENS)
    tl.store(k_out + at, mean.to(k_out.dtype.element_ty), inside)
    v += b * v_stride_b + h * v_stride_h
    mean = _mean(v, v_stride_n, summary, n, HEAD_DIM, PADDED_DIM, WIDTH, TOKENS)
    tl.store(v_out + at, mean.to(v_out.dtype.element_ty), inside)
    if h == 0:
        weight = tl.log(tl.maximum(n, 1).to(tl.float32))
        weight = tl.where(n > 0, weight, -float("inf"))
        tl.store(log_n + b * count + summary, weight, summary < count)


def _refuses(call: SummariseCall) -> list[str]:
    got = call.k.device.type
    if got != portable.DEVICE:
        return [f"tensors are on {got}, this backend is for {portable.DEVICE}"]
    return []


@register(
    "summarise", "portable", rank=portable.RANK, refuses=_refuses, available=portable.available,
    serves=("sm90",), device=portable.DEVICE,
)  # fmt: skip
def run(call: SummariseCall) -> list[Tensor]:
    k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (call.k, call.v))
    batch, seqlen, num_heads, head_dim = k.shape
    shape = (batch, call.count, num_heads, head_dim)
    means = [torch.empty(shape, dtype=k.dtype, device=k.device) for _ in range(2)]
    log_n = torch.empty(shape[:2], dtype=torch.float32, device=k.device)
    if not batch:
        return [*means, log_n]
    padded = triton.next_power_of_2(head_dim)
    tokens = min(triton.next_power_of_2(call.width), max(1, ELEMENTS // padded))
    rows = max(1, ELEMENTS // padded // tokens)
    with torch.cuda.device_of(k):
        summarise_kernel[(num_heads, triton.cdiv(call.count, rows), batch)](
            k, v, call.kv_len, *means, log_n, *k.stride()[:3], *v.stride()[:3], seqlen,
            call.count, HEAD_DIM=head_dim, PADDED_DIM=padded, WIDTH=call.width, TOKENS=tokens,
            ROWS=rows, num_warps=4,
        )  # fmt: skip
    return [*means, log_n]
