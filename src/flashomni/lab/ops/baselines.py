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


def flash_attention_4_lists(symbols: Symbols) -> Attention | None:
    """FlashAttention 4 on the same blocks, by its lists; every visited block is a full one.

    The lists are made beforehand, as where one choice of symbols serves many steps. Rows of cached
    query blocks, whose lists are empty, get zeros.
    """
    try:
        sparsity = import_module("flash_attn.cute.block_sparsity")
        forward = import_module("flash_attn.cute.interface")._flash_attn_fwd
    except (ImportError, AttributeError):
        return None
    counts, blocks = _block_lists(symbols)
    none = torch.zeros_like(counts)
    lists = sparsity.BlockSparseTensorsTorch(
        mask_block_cnt=none,
        mask_block_idx=none[..., None],
        full_block_cnt=counts,
        full_block_idx=blocks,
        block_size=(symbols.grid.block_m, symbols.grid.block_n),
    )

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return forward(q, k, v, block_sparse_tensors=lists)[0]

    return run


def _block_lists(symbols: Symbols) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block visits, and which: int32, the visited ones first."""
    visits = symbols.kv_mask() & symbols.q_mask()[..., None]
    order = visits.int().argsort(dim=-1, descending=True, stable=True).int()
    return visits.sum(-1, dtype=torch.int32), order


def flex_attention(symbols: Symbols) -> Attention:
    """FlexAttention, compiled, with a mask of the same blocks; all of them full."""
    from torch.nn.attention.flex_attention import BlockMask
    from torch.nn.attention.flex_attention import flex_attention as flex

    grid = symbols.grid
    counts, order = _block_lists(symbols)
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
