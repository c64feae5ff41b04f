"""GEMM-Q on the CPU: one matrix product for each rectangle of computed tiles, straight into out."""

from __future__ import annotations

import torch
from torch import Tensor

from flashomni.dispatch import not_on, register
from flashomni.kernels.common.rectangles import rectangles
from flashomni.kernels.common.rope import apply_rope, rms_norm
from flashomni.kernels.gemm_q.op import GemmQCall


def _refuses(call: GemmQCall) -> list[str]:
    return not_on("cpu", call.x)


@register("gemm_q", "cpu", rank=10, refuses=_refuses, device="cpu")
def run(call: GemmQCall) -> None:
    q_mask, block_m = call.symbols.q_mask(), call.symbols.grid.block_m
    rows, head_dim = call.x.shape[1], call.out.shape[-1]
    for b, x in enumerate(call.x):
        for row, row_stop, head, head_stop in rectangles(q_mask[b], rows, call.row_offset, block_m):
            features = slice(head * head_dim, head_stop * head_dim)
            bias = None if call.bias is None else call.bias[features]
            q = torch.nn.functional.linear(x[row:row_stop], call.weight[features], bias)
            q = q.unflatten(-1, (-1, head_dim))
            call.out[b, row:row_stop, head:head_stop] = _epilogue(call, q, row, row_stop)


def _epilogue(call: GemmQCall, q: Tensor, row: int, row_stop: int) -> Tensor:
    if call.norm_eps is not None:
        q = rms_norm(q, call.norm_weight, call.norm_eps)
    if call.rope is not None:
        cos, sin = call.rope
        q = apply_rope(q, cos[row:row_stop], sin[row:row_stop], call.rope_layout)
    return q
