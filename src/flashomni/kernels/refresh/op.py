"""A refresh of what is carried: sparse attention, and the difference that it leaves.

Letters in shapes: B batch, S tokens, H num_heads, Hkv key heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flashomni.dispatch import declare, execute, register, registered
from flashomni.kernels.attention.op import sparse_attention
from flashomni.kernels.common.checks import (
    check_device,
    check_dtype,
    check_no_grad,
    check_number,
    check_shape,
    check_written,
    float_dtypes,
)
from flashomni.kernels.common.rows import check_symbols
from flashomni.kernels.merge.op import Part, difference_
from flashomni.kernels.summarise.op import Summary, check_summary
from flashomni.symbols import Symbols


@dataclass(frozen=True)
class RefreshCall:
    """What a backend of ``refresh`` gets; it writes ``out``, ``difference``, ``mass`` in place."""

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    difference: Tensor
    symbols: Symbols
    kv_len: Tensor | None
    softmax_scale: float
    summary: Summary | None = None
    mass: Tensor | None = None

    @property
    def summaries_per_block(self) -> int:
        """r; 0 without a summary."""
        if self.summary is None:
            return 0
        return self.summary.k.shape[1] // self.symbols.grid.num_kv_blocks


def refresh(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    symbols: Symbols,
    *,
    softmax_scale: float | None = None,
    kv_len: Tensor | None = None,
    summary: Summary | None = None,
    mass: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Sparse attention of every tile, and what dense attention has more.

    In fp32 inside, each rounded once::

        out = sparse_attention(q, k, v, symbols, summary=summary)
        difference = sparse_attention(q, k, v) - out

    of ``out`` as it was rounded, so that both together are dense attention but for one rounding: of
    ``difference``, which is as large as what is skipped, and may be larger than dense attention.
    It is 0 in rows that skip nothing.

    Args:
        q: ``[B, S, H, D]``, last dim contiguous.
        k: ``[B, S, Hkv, D]``, dtype and device of ``q``; H must be a multiple of Hkv.
        v: ``[B, S, Hkv, D]``, like ``k``.
        symbols: which blocks are visited; every tile is computed whatever their S_c says.
        softmax_scale: defaults to ``D ** -0.5``.
        kv_len: int32 ``[B]``, valid keys of each batch item; defaults to that of the grid.
        summary: what stands for skipped blocks (:func:`flashomni.sparse_attention`).
        mass: optional fp32 ``[B, H, S]``, gets the share of each row's weights in dense attention
            that visited blocks have; it costs a second pass.
        backend: take exactly this one. One of attention that has none here computes the blocks
            that are visited and the others, and the two are merged.

    Returns:
        ``out`` and ``difference``, ``[B, S, H, D]``, contiguous.

    Raises:
        ValueError: an argument has a wrong type, shape, dtype or device, or requires grad.
        NotImplementedError: no backend accepts; the message gives the reasons of each.
    """
    check_dtype("q", q, float_dtypes)
    if q.ndim != 4 or 0 in q.shape[1:]:
        raise ValueError(f"q must be [B, S, H, D], got {list(q.shape)}")
    check_symbols(symbols)
    batch, seqlen, num_heads, head_dim = q.shape
    grid = symbols.grid
    if (symbols.batch, symbols.num_heads, grid.seqlen_q) != (batch, num_heads, seqlen):
        raise ValueError(f"symbols must be for q {list(q.shape)}, got those of a {grid}")
    check_device("symbols", symbols.q_bits, q.device)
    heads = k.shape[2] if isinstance(k, Tensor) and k.ndim == 4 else 0
    if heads == 0 or num_heads % heads:
        raise ValueError(f"k must have a number of heads that divides {num_heads}, got {heads}")
    for name, x in (("k", k), ("v", v)):
        check_shape(name, x, (batch, grid.seqlen_kv, heads, head_dim))
        check_dtype(name, x, (q.dtype,))
        check_device(name, x, q.device)
    kv_len = grid.kv_len if kv_len is None else kv_len
    if kv_len is not None:
        check_shape("kv_len", kv_len, (batch,))
        check_dtype("kv_len", kv_len, (torch.int32,))
        check_device("kv_len", kv_len, q.device)
    if summary is not None:
        check_summary(summary, k, grid.num_kv_blocks, grid.block_n)
    if mass is not None:
        check_shape("mass", mass, (batch, num_heads, seqlen))
        check_dtype("mass", mass, (torch.float32,))
        check_device("mass", mass, q.device)
        check_written({"mass": mass}, {"q": q, "k": k, "v": v})
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    check_number("softmax_scale", scale)
    check_no_grad(q=q, k=k, v=v)
    out, difference = q.new_empty(q.shape), q.new_empty(q.shape)
    call = RefreshCall(q, k, v, out, difference, symbols, kv_len, float(scale), summary, mass)
    if batch and backend is not None and backend not in {b.name for b in registered("refresh")}:
        by_parts(call, backend)
    elif batch:
        execute("refresh", call, backend)
    return out, difference


declare("refresh", RefreshCall, public="refresh", writes=("out", "difference", "mass"))


def by_parts(call: RefreshCall, backend: str | None) -> None:
    """Two calls of attention, over the blocks that are visited and over the others, merged."""
    q, k, v, shape = call.q, call.k, call.v, call.q.shape
    parts = []
    for symbols, o in zip(live_and_rest(call.symbols), (call.out, call.difference), strict=True):
        lse = q.new_empty(shape[0], shape[2], shape[1], dtype=torch.float32)
        options: dict[str, Any] = {"kv_len": call.kv_len, "softmax_scale": call.softmax_scale}
        sparse_attention(q, k, v, symbols, out=o, lse=lse, backend=backend, **options)
        parts.append(Part(o, lse))
    if call.mass is not None:
        call.mass.copy_(_share(*(part.lse for part in parts)))
    if call.summary is None:
        difference_(*parts, backend=backend)
        return
    difference_(*parts, q=q, symbols=call.symbols, summary=call.summary, backend=backend, **options)


def _share(live: Tensor, rest: Tensor) -> Tensor:
    """What visited blocks have of all weights, by the LSE of both parts; 0 without any key."""
    return (live - torch.logaddexp(live, rest)).exp().nan_to_num(0.0)


def live_and_rest(symbols: Symbols) -> tuple[Symbols, Symbols]:
    """Symbols that compute every tile: over the blocks that are visited, over all others."""
    grid, device = symbols.grid, symbols.kv_bits.device
    tiles = grid.all_q_bits(device).expand(symbols.batch, symbols.num_heads, -1)
    live = replace(symbols, q_bits=tiles)
    return live, replace(live, kv_bits=~symbols.kv_bits & grid.all_kv_bits(device))


@register("refresh", "parts", rank=5)
def _parts(call: RefreshCall) -> None:
    by_parts(call, None)


@register("refresh", "reference", rank=0)
def _reference(call: RefreshCall) -> None:
    """The definition."""
    if call.mass is not None:
        by_parts(call, "reference")
    q, k, v = (x.float() for x in (call.q, call.k, call.v))
    summary = call.summary
    options: dict[str, Any] = {"softmax_scale": call.softmax_scale, "kv_len": call.kv_len}
    if summary is not None:
        summary = Summary(summary.k.float(), summary.v.float(), summary.log_n)
    live, _ = live_and_rest(call.symbols)
    sparse = sparse_attention(q, k, v, live, summary=summary, backend="reference", **options)
    dense = sparse_attention(q, k, v, backend="reference", **options)
    call.out.copy_(sparse)
    grid = call.symbols.grid
    skipped = ~call.symbols.kv_mask()
    if call.kv_len is not None:
        start = torch.arange(grid.num_kv_blocks, device=skipped.device) * grid.block_n
        skipped = skipped & (start < call.kv_len[:, None, None, None])
    skips = skipped.any(-1).repeat_interleave(grid.block_m, -1)[..., : grid.seqlen_q]
    missed = dense - call.out.float()
    call.difference.copy_(torch.where(skips.mT[..., None], missed, 0.0))
