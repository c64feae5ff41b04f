"""Summaries of key blocks: what stands for the keys that sparse attention skips.

Keys and values of neighbouring tokens are replaced by their means, which weigh as many as they
stand for: exp(q . k) summed over n keys is about n exp(q . mean(k)), so log(n) is added to the
score. (Pooled keys stand for what is routed away in PSA and Sol-Attn as well.)

Letters in shapes: B batch, N seqlen_kv, Hkv key heads, D head_dim, Nb = ceil(N / block_n), r
summaries a block, S = Nb * r.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashomni.dispatch import declare, execute, not_on, register
from flashomni.kernels.common.checks import (
    check_device,
    check_dtype,
    check_int,
    check_no_grad,
    check_shape,
    check_tensor,
    float_dtypes,
)
from flashomni.symbols import Grid


@dataclass(frozen=True)
class Summary:
    """r summaries of each key block, which take part where the block is skipped.

    Made by :func:`summarise`. Summary ``j * r + i`` is of the i-th part of block j.

    Args:
        k: ``[B, S, Hkv, D]``, mean keys, finite, in the dtype of q.
        v: ``[B, S, Hkv, D]``, mean values, like ``k``.
        log_n: fp32 ``[B, S]``, natural log of the number of keys that each stands for; ``-inf``
            where there is none: such a summary never takes part.
    """

    k: Tensor
    v: Tensor
    log_n: Tensor


@dataclass(frozen=True)
class SummariseCall:
    """What a backend of ``summarise`` gets; it returns new ``[k, v, log_n]`` of a summary.

    ``width`` tokens have one of ``count`` summaries; they may reach behind the last token.
    """

    k: Tensor
    v: Tensor
    kv_len: Tensor | None
    width: int
    count: int


def summarise(
    k: Tensor,
    v: Tensor,
    grid: Grid,
    per_block: int = 4,
    *,
    kv_len: Tensor | None = None,
    backend: str | None = None,
) -> Summary:
    """Means of keys and values over parts of ``block_n / per_block`` tokens, valid keys alone.

    Sums are in fp32, rounded once to the dtype of ``k``. Parts without a valid key are 0.

    Args:
        k: ``[B, N, Hkv, D]``, as attention gets it (after RoPE).
        v: ``[B, N, Hkv, D]``, like ``k``.
        grid: the blocks.
        per_block: r, a divisor of ``block_n``.
        kv_len: int32 ``[B]``, valid keys of each batch item; defaults to that of the grid. A value
            outside ``[0, N]`` means the nearest end.
        backend: take exactly this one; by default the best that accepts the call.

    Raises:
        ValueError: an argument has a wrong type, shape, dtype or device, or requires grad.
        NotImplementedError: no backend accepts; the message gives the reasons of each.
    """
    if not isinstance(grid, Grid):
        raise ValueError(f"grid must be a Grid, got {type(grid).__name__}")
    check_dtype("k", k, float_dtypes)
    if k.ndim != 4 or k.shape[1] != grid.seqlen_kv or 0 in k.shape[2:]:
        raise ValueError(f"k must be [B, {grid.seqlen_kv}, Hkv, D], got {list(k.shape)}")
    check_shape("v", v, k.shape)
    check_dtype("v", v, (k.dtype,))
    check_device("v", v, k.device)
    check_int("per_block", per_block)
    if per_block < 1 or grid.block_n % per_block:
        raise ValueError(f"per_block must divide block_n, {grid.block_n}, got {per_block}")
    kv_len = grid.kv_len if kv_len is None else kv_len
    if kv_len is not None:
        check_shape("kv_len", kv_len, k.shape[:1])
        check_dtype("kv_len", kv_len, (torch.int32,))
        check_device("kv_len", kv_len, k.device)
    check_no_grad(k=k, v=v)
    width, count = grid.block_n // per_block, grid.num_kv_blocks * per_block
    return Summary(*execute("summarise", SummariseCall(k, v, kv_len, width, count), backend))


def check_summary(summary: object, k: Tensor, num_blocks: int, block_n: int) -> None:
    """Refuse what does not summarise the ``num_blocks`` blocks of the keys ``k``."""
    if not isinstance(summary, Summary):
        raise ValueError(f"summary must be a Summary, got {type(summary).__name__}")
    batch, _, kv_heads, head_dim = k.shape
    check_tensor("summary.k", summary.k)
    count = summary.k.shape[1] if summary.k.ndim == 4 else 0
    per_block = count // num_blocks
    if per_block == 0 or count % num_blocks or block_n % per_block:
        raise ValueError(
            f"summary.k must be [{batch}, r * {num_blocks}, {kv_heads}, {head_dim}] with r "
            f"dividing block_n, {block_n}, got {list(summary.k.shape)}"
        )
    for name, tensor in (("summary.k", summary.k), ("summary.v", summary.v)):
        check_shape(name, tensor, (batch, count, kv_heads, head_dim))
        check_dtype(name, tensor, (k.dtype,))
        check_device(name, tensor, k.device)
    check_shape("summary.log_n", summary.log_n, (batch, count))
    check_dtype("summary.log_n", summary.log_n, (torch.float32,))
    check_device("summary.log_n", summary.log_n, k.device)
    check_no_grad(
        **{"summary.k": summary.k, "summary.v": summary.v, "summary.log_n": summary.log_n}
    )


declare("summarise", SummariseCall, public="summarise", many=True)


def _refuses(call: SummariseCall) -> list[str]:
    return not_on("cpu", call.k)


@register("summarise", "cpu", rank=10, refuses=_refuses, device="cpu")
@register("summarise", "reference", rank=0)
def _reference(call: SummariseCall) -> list[Tensor]:
    batch, seqlen, _, _ = call.k.shape
    tokens = call.count * call.width
    valid = torch.arange(tokens, device=call.k.device).expand(batch, -1) < seqlen
    if call.kv_len is not None:
        valid = valid & (torch.arange(tokens, device=call.k.device) < call.kv_len[:, None])
    n = valid.unflatten(1, (call.count, call.width)).sum(-1)  # [B, S]
    per = n.clamp(min=1)[..., None, None]
    means = []
    for x in (call.k, call.v):
        padded = torch.nn.functional.pad(x.float(), (0, 0, 0, 0, 0, tokens - seqlen))
        padded = padded.masked_fill(~valid[..., None, None], 0.0)
        total = padded.unflatten(1, (call.count, call.width)).sum(2)
        means.append((total / per).to(x.dtype))
    return [*means, n.float().log()]
