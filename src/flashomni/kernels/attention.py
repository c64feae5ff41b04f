"""Block-sparse attention: what it is, what it accepts, and its definition in torch.

Letters in shapes: B batch, M seqlen_q, N seqlen_kv, H num_heads, Hkv key heads (Hkv divides H),
D head_dim, Mb = ceil(M / block_m), Nb = ceil(N / block_n).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from flashomni.kernels.checks import check_device, check_dtype, check_shape, float_dtypes
from flashomni.kernels.dispatch import register, select
from flashomni.symbols import Grid, Symbols


@dataclass(frozen=True)
class AttentionCall:
    """What a backend gets. It writes ``out`` (and ``lse``) in place and returns nothing.

    ``symbols`` is ``None`` for dense attention; then block sizes are of no meaning.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor | None
    symbols: Symbols | None
    kv_len: Tensor | None
    softmax_scale: float


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    symbols: Symbols | None = None,
    *,
    out: Tensor | None = None,
    softmax_scale: float | None = None,
    kv_len: Tensor | None = None,
    lse: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention over the blocks that ``symbols`` marks as computed (arXiv 2509.25401, 3.3).

    For each query block i of head h whose S_c bit is 1, over J = {keys of block j: S_s[i, j] = 1}::

        out[b, i, h] = softmax(softmax_scale * q[b, i, h] @ k[b, J, h].T) @ v[b, J, h]

    Rows of cached query blocks are never written, in ``out`` nor in ``lse``: they keep their
    value. A computed row without any valid key is 0, its ``lse`` is -inf. Keys from ``kv_len[b]``
    on do not exist.

    Args:
        q: ``[B, M, H, D]``, last dim contiguous.
        k: ``[B, N, Hkv, D]``, dtype and device of ``q``; H must be a multiple of Hkv.
        v: ``[B, N, Hkv, D]``, like ``k``.
        symbols: which blocks to compute; ``None`` computes all of them.
        out: ``[B, M, H, D]``, written in place; a new tensor with undefined cached rows if omitted.
        softmax_scale: defaults to ``D ** -0.5``.
        kv_len: int32 ``[B]``, valid keys of each batch item; defaults to that of the grid.
        lse: optional fp32 ``[B, H, M]``, gets the natural log of each row's softmax sum.
        backend: take exactly this one; by default the best that accepts the call.

    Returns:
        ``out``.

    Raises:
        ValueError: an argument has a wrong shape, dtype or device.
        NotImplementedError: no backend accepts; the message gives the reasons of each.
    """
    check_dtype("q", q, float_dtypes)
    if q.ndim != 4:
        raise ValueError(f"q must be [B, M, H, D], got {tuple(q.shape)}")
    batch, seqlen_q, num_heads, head_dim = q.shape
    if k.ndim != 4 or k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(f"k must be [{batch}, N, Hkv, {head_dim}], got {tuple(k.shape)}")
    if k.shape[2] == 0 or num_heads % k.shape[2]:
        raise ValueError(
            f"k must have a number of heads that divides {num_heads}, got {k.shape[2]}"
        )
    check_shape("v", v, k.shape)
    for name, tensor in (("k", k), ("v", v)):
        check_dtype(name, tensor, (q.dtype,))
        check_device(name, tensor, q.device)
    if symbols is not None:
        grid = symbols.grid
        if (grid.seqlen_q, grid.seqlen_kv) != (seqlen_q, k.shape[1]):
            raise ValueError(
                f"symbols are for a {grid}, but q has {seqlen_q} and k has {k.shape[1]} tokens"
            )
        if (symbols.batch, symbols.num_heads) != (batch, num_heads):
            raise ValueError(
                f"symbols are for batch {symbols.batch} and {symbols.num_heads} heads, "
                f"but q has batch {batch} and {num_heads} heads"
            )
        check_device("symbols", symbols.q_bits, q.device)
        kv_len = grid.kv_len if kv_len is None else kv_len
    if kv_len is not None:
        check_shape("kv_len", kv_len, (batch,))
        check_dtype("kv_len", kv_len, (torch.int32,))
        check_device("kv_len", kv_len, q.device)
    if out is None:
        out = q.new_empty(q.shape)
    else:
        check_shape("out", out, q.shape)
        check_dtype("out", out, (q.dtype,))
        check_device("out", out, q.device)
    if lse is not None:
        check_shape("lse", lse, (batch, num_heads, seqlen_q))
        check_dtype("lse", lse, (torch.float32,))
        check_device("lse", lse, q.device)
    scale = head_dim**-0.5 if softmax_scale is None else float(softmax_scale)
    if not math.isfinite(scale):
        raise ValueError(f"softmax_scale must be finite, got {scale}")
    grid = Grid(seqlen_q, k.shape[1]) if symbols is None else symbols.grid
    q_bits = None if symbols is None else symbols.q_bits
    kv_bits = None if symbols is None else symbols.kv_bits
    # Eager calls skip the torch.library hop: tens of microseconds a call.
    call = _op if torch.compiler.is_compiling() else _run
    call(q, k, v, out, lse, q_bits, kv_bits, kv_len, grid.block_m, grid.block_n, scale, backend)
    return out


def _run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor | None,
    q_bits: Tensor | None,
    kv_bits: Tensor | None,
    kv_len: Tensor | None,
    block_m: int,
    block_n: int,
    softmax_scale: float,
    backend: str | None,
) -> None:
    symbols = None
    if q_bits is not None and kv_bits is not None:
        grid = Grid(q.shape[1], k.shape[1], block_m=block_m, block_n=block_n)
        symbols = Symbols(q_bits, kv_bits, grid)
    call = AttentionCall(q, k, v, out, lse, symbols, kv_len, softmax_scale)
    select("attention", call, backend).run(call)


_op = torch.library.custom_op("flashomni::attention", _run, mutates_args={"out", "lse"})
_op.register_fake(lambda *args: None)  # it only mutates `out` and `lse`: nothing to infer


@register("attention", "reference", rank=0)
def _reference(call: AttentionCall) -> None:
    """The definition: every score in fp32, masked."""
    batch, seqlen_q, num_heads, _ = call.q.shape
    seqlen_kv, groups = call.k.shape[1], num_heads // call.k.shape[2]
    k, v = (x.float().repeat_interleave(groups, dim=2) for x in (call.k, call.v))
    keep = torch.ones(batch, num_heads, seqlen_q, seqlen_kv, dtype=torch.bool, device=k.device)
    keep_row = keep[..., 0]  # [B, H, M]
    if call.symbols is not None:
        grid = call.symbols.grid
        keep_row = call.symbols.q_mask().repeat_interleave(grid.block_m, -1)[..., :seqlen_q]
        keep = call.symbols.kv_mask().repeat_interleave(grid.block_m, -2)
        keep = keep.repeat_interleave(grid.block_n, -1)[..., :seqlen_q, :seqlen_kv]
    if call.kv_len is not None:
        position = torch.arange(seqlen_kv, device=k.device)
        keep = keep & (position < call.kv_len[:, None, None, None])
    score = torch.einsum("bmhd,bnhd->bhmn", call.q.float(), k) * call.softmax_scale
    score = score.masked_fill(~keep, -torch.inf)
    lse = score.logsumexp(-1)  # [B, H, M], -inf for an empty row
    prob = (score - lse[..., None]).exp().masked_fill(~keep, 0.0)
    new = torch.einsum("bhmn,bnhd->bmhd", prob, v).to(call.out.dtype)
    call.out.copy_(torch.where(keep_row.mT[..., None], new, call.out))
    if call.lse is not None:
        call.lse.copy_(torch.where(keep_row, lse, call.lse))
