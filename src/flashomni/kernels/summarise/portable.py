"""Summaries of key blocks in one Triton launch, bound by reading k and v once."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashomni.dispatch import not_on, register
from flashomni.kernels.common import portable
from flashomni.kernels.summarise.op import SummariseCall

ROWS = 8  # summaries of a program
STEP = 8  # tokens of each of them that it loads at once


@triton.jit(do_not_specialize=["seqlen", "count"])
def summarise_kernel(
    k, v, kv_len, k_out, v_out, log_n, k_stride_b, k_stride_n, k_stride_h, v_stride_b, v_stride_n,
    v_stride_h, seqlen, count, HEAD_DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
    WIDTH: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``ROWS`` summaries of one head; neighbours in time are its other heads, side by side.

    A thread adds up the tokens of a summary by itself, keys and values side by side: what it waits
    for is memory alone, and much of it is under way.
    """
    h, b = tl.program_id(0).to(tl.int64), tl.program_id(2).to(tl.int64)
    num_heads = tl.num_programs(0)
    valid = seqlen
    if kv_len is not None:
        valid = tl.minimum(tl.load(kv_len + b), seqlen)
    summary = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    n = tl.maximum(tl.minimum(valid - summary * WIDTH, WIDTH), 0)
    n = tl.where(summary < count, n, 0)
    dim = tl.arange(0, PADDED_DIM)[None, :]
    first = summary.to(tl.int64)[:, None] * WIDTH
    k += b * k_stride_b + h * k_stride_h + first * k_stride_n + dim
    v += b * v_stride_b + h * v_stride_h + first * v_stride_n + dim
    of_keys = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    of_values = tl.zeros([ROWS, PADDED_DIM], tl.float32)
    for start in range(0, WIDTH, STEP):
        for i in tl.static_range(STEP):
            inside = (start + i < n)[:, None] & (dim < HEAD_DIM)
            of_keys += tl.load(k + i * k_stride_n, inside, other=0.0).to(tl.float32)
            of_values += tl.load(v + i * v_stride_n, inside, other=0.0).to(tl.float32)
        k += STEP * k_stride_n
        v += STEP * v_stride_n
    held = tl.maximum(n, 1).to(tl.float32)[:, None]
    inside = (summary < count)[:, None] & (dim < HEAD_DIM)
    at = ((b * count + summary[:, None]) * num_heads + h) * HEAD_DIM + dim
    tl.store(k_out + at, (of_keys / held).to(k_out.dtype.element_ty), inside)
    tl.store(v_out + at, (of_values / held).to(v_out.dtype.element_ty), inside)
    if h == 0:
        weight = tl.log(tl.maximum(n, 1).to(tl.float32))
        weight = tl.where(n > 0, weight, -float("inf"))
        tl.store(log_n + b * count + summary, weight, summary < count)


def _refuses(call: SummariseCall) -> list[str]:
    return not_on(portable.DEVICE, call.k)


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
    step = min(triton.next_power_of_2(call.width), STEP)
    with torch.cuda.device_of(k):
        summarise_kernel[(num_heads, triton.cdiv(call.count, ROWS), batch)](
            k, v, call.kv_len, *means, log_n, *k.stride()[:3], *v.stride()[:3], seqlen,
            call.count, HEAD_DIM=head_dim, PADDED_DIM=triton.next_power_of_2(head_dim),
            WIDTH=call.width, STEP=step, ROWS=ROWS, num_warps=4,
        )  # fmt: skip
    return [*means, log_n]
