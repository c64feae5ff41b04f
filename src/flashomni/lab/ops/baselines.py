"""What the ops are measured against, where it is installed.

A maker returns ``None`` where its library is missing or refuses; that is said in the table.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from flashomni.symbols import Symbols

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def torch_sdpa() -> Attention:
    """torch's own choice."""
    return _sdpa


def cudnn_sdpa() -> Attention | None:
    """cuDNN's fused attention through torch."""
    if not torch.backends.cudnn.is_available():
        return None

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        kinds = torch.nn.attention.SDPBackend.CUDNN_ATTENTION
        with torch.nn.attention.sdpa_kernel(kinds):
            return _sdpa(q, k, v)

    return run


def flash_attention_4() -> Attention | None:
    """FlashAttention 4 (CuTe DSL)."""
    try:
        flash_attn_func = import_module("flash_attn.cute").flash_attn_func
    except ImportError:
        return None

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = flash_attn_func(q, k, v)
        return out[0] if isinstance(out, tuple) else out

    return run


def flex_attention(symbols: Symbols) -> Attention:
    """FlexAttention, compiled, with a mask of the same blocks; all of them full."""
    from torch.nn.attention.flex_attention import BlockMask
    from torch.nn.attention.flex_attention import flex_attention as flex

    grid = symbols.grid
    visits = symbols.kv_mask() & symbols.q_mask()[..., None]
    counts = visits.sum(-1, dtype=torch.int32)
    order = visits.int().argsort(dim=-1, descending=True, stable=True).int()
    mask = BlockMask.from_kv_blocks(
        torch.zeros_like(counts),
        torch.zeros_like(order),
        counts,
        order,
        BLOCK_SIZE=(grid.block_m, grid.block_n),
        seq_lengths=(grid.seqlen_q, grid.seqlen_kv),
    )
    compiled = torch.compile(flex, dynamic=False)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return compiled(q, k, v, block_mask=mask)

    return run


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return torch.nn.functional.scaled_dot_product_attention(q, k, v)
