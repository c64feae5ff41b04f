"""torch's own attention, for dense calls of shapes at which it was measured to be faster.

Nothing is measured on the way: ``flashomni tune-kernels`` does, once for a card. Asked for by name
it takes every dense call; otherwise only those of which the table says so (:mod:`._measured`), and
on a device that no kernel is for all of them.
"""

from __future__ import annotations

import torch

from flashomni.dispatch import has_kernel, register
from flashomni.kernels.attention._measured import sdpa_is_faster
from flashomni.kernels.attention.op import AttentionCall


def refuse_features(call: AttentionCall) -> list[str]:
    """What torch's attention has not."""
    lacks = {
        "symbols": call.symbols,
        "kv_len": call.kv_len,
        "lse": call.lse,
        "forecast": call.forecast,
        "summary": call.summary,
    }
    return [
        f"{name} must be None: it is dense" for name, given in lacks.items() if given is not None
    ]


def _refuses(call: AttentionCall) -> list[str]:
    device = call.q.device.type
    here = [f"tensors are on {device}, this backend is for GPUs"] if device == "cpu" else []
    return here + refuse_features(call)


def _prefers(call: AttentionCall) -> bool:
    q, k = call.q, call.k
    if q.device.type != "cpu" and not has_kernel("attention", q.device.type):
        return True  # only the definition is left: Apple's and Intel's GPUs, or without Triton
    return sdpa_is_faster(q.device, q.dtype, q.shape[3], q.shape[1], k.shape[1])


def _available() -> list[str]:
    return [] if torch.accelerator.is_available() else ["needs a GPU"]


@register(
    "attention", "sdpa", rank=50, refuses=_refuses, available=_available, device="cuda",
    prefers=_prefers,
)  # fmt: skip
def run(call: AttentionCall) -> None:
    q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    o = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, scale=call.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    call.out.copy_(o.transpose(1, 2))
