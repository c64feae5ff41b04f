"""GEMM-O on the CPU: the heads of each rectangle of tiles are added onto the forecast in place."""

from __future__ import annotations

import torch
from torch import Tensor

from flashomni.dispatch import not_on, register
from flashomni.kernels.common.rectangles import rectangles
from flashomni.kernels.gemm_o.op import GemmOCall, GemmOUpdateCall


def _refuses(call: GemmOCall | GemmOUpdateCall) -> list[str]:
    return not_on("cpu", call.out)


@register("gemm_o", "cpu", rank=10, refuses=_refuses, device="cpu")
def run(call: GemmOCall) -> None:
    width = call.o.shape[2] * call.o.shape[3]
    # fp32 accumulation for every dtype: heads arrive one group after the other.
    y = _start(call.out, call.always, call.weight[:, width:], call.bias)
    if call.bias_terms is not None and call.coefficients is not None:
        for coefficient, term in zip(call.coefficients.tolist(), call.bias_terms, strict=True):
            y.add_(term, alpha=coefficient)
    q_mask = call.symbols.q_mask()
    _add_heads(y, call.o, call.weight[:, :width], q_mask, call.row_offset, call)
    _finish(call.out, y)


@register("gemm_o_update", "cpu", rank=10, refuses=_refuses, device="cpu")
def update(call: GemmOUpdateCall) -> None:
    o = call.terms[0]
    width = o.shape[2] * o.shape[3]
    heads = call.weight[:, :width]
    y = _start(call.out, call.always, call.weight[:, width:], call.bias)
    q_mask = call.symbols.q_mask()
    for index, term in enumerate(call.terms):
        partial = torch.zeros_like(call.out, dtype=torch.float32)
        _add_heads(partial, term, heads, ~q_mask, call.row_offset, call)
        if index == 0:  # the cached heads are projected once: the dense result reuses them
            y += partial
        call.bias_terms[index].copy_(partial)
    _add_heads(y, o, heads, q_mask, call.row_offset, call)
    _finish(call.out, y)


def _start(out: Tensor, always: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """An fp32 accumulator ``[B, R, N]`` with what belongs to no head; ``out`` itself if it fits."""
    y = (
        out
        if out.dtype == torch.float32 and out.is_contiguous()
        else torch.empty_like(out, dtype=torch.float32, memory_format=torch.contiguous_format)
    )
    if always is not None:
        y.copy_(torch.nn.functional.linear(always, weight, bias))
    elif bias is not None:
        y.copy_(bias.expand_as(y))
    else:
        y.zero_()
    return y


def _finish(out: Tensor, y: Tensor) -> None:
    if y is not out:
        out.copy_(y)


def _add_heads(
    y: Tensor,
    o: Tensor,
    weight: Tensor,
    mask: Tensor,
    row_offset: int,
    call: GemmOCall | GemmOUpdateCall,
) -> None:
    """Add the projection of the tiles of ``mask`` ``[B, H, Mb]`` onto y, in place."""
    head_dim, block_m = o.shape[-1], call.symbols.grid.block_m
    weight = weight.float()
    for b in range(len(o)):
        for row, row_stop, head, head_stop in rectangles(mask[b], o.shape[1], row_offset, block_m):
            tiles = o[b, row:row_stop, head:head_stop].flatten(1)
            columns = weight[:, head * head_dim : head_stop * head_dim]
            y[b, row:row_stop].addmm_(tiles.float(), columns.T)
