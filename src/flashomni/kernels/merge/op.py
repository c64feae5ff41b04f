"""The difference between dense and sparse attention, of parts that together are both.

A row's keys are live, or at rest (skipped), and some keys may stand for those at rest. Attention
over each part, with its lse, gives attention over any union of them, exactly: dense is live and
rest, sparse is live and summaries. So what sparse attention misses costs no second pass over live
blocks.

Letters in shapes: B batch, S tokens, H num_heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from flashomni.dispatch import declare, execute, not_on, register
from flashomni.kernels.attention.op import summary_bias
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
from flashomni.kernels.summarise.op import Summary, check_summary
from flashomni.symbols import Symbols


@dataclass(frozen=True)
class Part:
    """Attention over some of the keys.

    Args:
        o: ``[B, S, H, D]``, last dim contiguous.
        lse: fp32 ``[B, H, S]``, natural log of each row's softmax sum; -inf for a row without keys.
    """

    o: Tensor
    lse: Tensor


@dataclass(frozen=True)
class DifferenceCall:
    """What a backend of ``difference`` gets. It writes ``live`` and ``rest`` in place.

    The last five are there where skipped blocks are summarised, ``kv_len`` maybe.
    """

    live: Tensor
    live_lse: Tensor
    rest: Tensor
    rest_lse: Tensor
    q: Tensor | None = None
    symbols: Symbols | None = None
    summary: Summary | None = None
    kv_len: Tensor | None = None
    softmax_scale: float = 1.0


def difference_(
    live: Part,
    rest: Part,
    *,
    q: Tensor | None = None,
    symbols: Symbols | None = None,
    summary: Summary | None = None,
    kv_len: Tensor | None = None,
    softmax_scale: float | None = None,
    backend: str | None = None,
) -> None:
    """Sparse attention into ``live.o``, and what dense attention has more into ``rest.o``.

    In fp32 inside, each rounded once, and the difference is to what was rounded, so that both
    together are dense but for one rounding::

        dense  = softmax-weighted mean of live.o and rest.o, by their lse
        sparse = likewise of live.o and attention over summaries; live.o where there are none
        live.o, rest.o = sparse, dense - sparse

    A part of lse -inf has no weight, whatever is in its ``o``; a row without any key is 0.

    Args:
        live: over the blocks with S_s = 1.
        rest: over the blocks with S_s = 0.
        q: ``[B, S, H, D]``, like ``live.o``; needed with a summary, as ``symbols`` are. Without a
            summary none of these may be given.
        symbols: of ``live``; every tile is computed whatever their S_c says.
        summary: what stands for skipped blocks (:func:`flashomni.sparse_attention`).
        kv_len: int32 ``[B]``, valid keys of each batch item; defaults to that of the grid.
        softmax_scale: of the scores of summaries, defaults to ``D ** -0.5``.
        backend: take exactly this one; by default the best that accepts the call.

    Raises:
        ValueError: a tensor has a wrong type, shape, dtype or device, requires grad, or what is
            written overlaps something else.
        NotImplementedError: no backend accepts; the message gives the reasons of each.
    """
    first = live.o
    check_dtype("live.o", first, float_dtypes)
    if first.ndim != 4:
        raise ValueError(f"live.o must be [B, S, H, D], got {tuple(first.shape)}")
    batch, seqlen, num_heads, head_dim = first.shape
    for name, part in (("live", live), ("rest", rest)):
        check_shape(f"{name}.o", part.o, first.shape)
        check_dtype(f"{name}.o", part.o, (first.dtype,))
        check_device(f"{name}.o", part.o, first.device)
        check_shape(f"{name}.lse", part.lse, (batch, num_heads, seqlen))
        check_dtype(f"{name}.lse", part.lse, (torch.float32,))
        check_device(f"{name}.lse", part.lse, first.device)
        check_no_grad(**{f"{name}.o": part.o, f"{name}.lse": part.lse})
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    check_number("softmax_scale", scale)
    call = DifferenceCall(live.o, live.lse, rest.o, rest.lse)
    read: dict[str, Tensor | None] = {"live.lse": live.lse, "rest.lse": rest.lse}
    if summary is not None:
        if q is None or symbols is None:
            raise ValueError("a summary needs q and symbols, got None")
        _check_summarised(first, q, symbols, summary)
        kv_len = symbols.grid.kv_len if kv_len is None else kv_len
        if kv_len is not None:
            check_shape("kv_len", kv_len, (batch,))
            check_dtype("kv_len", kv_len, (torch.int32,))
            check_device("kv_len", kv_len, first.device)
        call = replace(
            call, q=q, symbols=symbols, summary=summary, kv_len=kv_len, softmax_scale=float(scale)
        )
        read |= {"q": q, "summary.k": summary.k, "summary.v": summary.v}
    else:
        beside = {"q": q, "symbols": symbols, "kv_len": kv_len, "softmax_scale": softmax_scale}
        for name, value in beside.items():
            if value is not None:
                raise ValueError(f"{name} is of summaries, and there is none: leave it out")
    check_written({"live.o": live.o, "rest.o": rest.o}, read)
    if first.numel():
        execute("difference", call, backend)


def _check_summarised(o: Tensor, q: Tensor, symbols: Symbols, summary: Summary) -> None:
    check_shape("q", q, o.shape)
    check_dtype("q", q, (o.dtype,))
    check_device("q", q, o.device)
    check_no_grad(q=q)
    check_symbols(symbols)
    check_device("symbols", symbols.kv_bits, o.device)
    grid = symbols.grid
    if (symbols.batch, symbols.num_heads, grid.seqlen_q) != (o.shape[0], o.shape[2], o.shape[1]):
        raise ValueError(f"symbols must be for live.o {list(o.shape)}, got those of a {grid}")
    k = summary.k  # stands for the keys: heads and head_dim are theirs
    if k.ndim != 4 or k.shape[2] == 0 or o.shape[2] % k.shape[2]:
        raise ValueError(f"summary.k must be [B, S, Hkv, D], got {list(k.shape)}")
    check_summary(summary, k, grid.num_kv_blocks, grid.block_n)


declare("difference", DifferenceCall, public="difference_", writes=("live", "rest"))


def _merged(o: list[Tensor], lse: list[Tensor]) -> Tensor:
    """Attention over several parts, in fp32."""
    weight = torch.stack(lse).softmax(0).nan_to_num(0.0).transpose(-1, -2)[..., None]
    total = torch.zeros((), device=o[0].device)
    for w, x in zip(weight, o, strict=True):
        total = total + torch.where(w > 0, w * x.float(), 0.0)  # what has no weight may be anything
    return total


def _summarised(call: DifferenceCall) -> tuple[Tensor, Tensor]:
    """Attention over the summaries alone, and its lse."""
    q, symbols, summary = call.q, call.symbols, call.summary
    assert q is not None and symbols is not None and summary is not None
    groups = q.shape[2] // summary.k.shape[2]
    k, v = (x.float().repeat_interleave(groups, dim=2) for x in (summary.k, summary.v))
    bias = summary_bias(summary, symbols, call.kv_len)
    bias = bias.repeat_interleave(symbols.grid.block_m, -2)[..., : q.shape[1], :]
    score = torch.einsum("bmhd,bnhd->bhmn", q.float(), k) * call.softmax_scale + bias
    prob = score.softmax(-1).nan_to_num(0.0)
    return torch.einsum("bhmn,bnhd->bmhd", prob, v), score.logsumexp(-1)


def _cpu_refuses(call: DifferenceCall) -> list[str]:
    return not_on("cpu", call.live)


@register("difference", "cpu", rank=10, refuses=_cpu_refuses, device="cpu")
@register("difference", "reference", rank=0)
def _reference(call: DifferenceCall) -> None:
    """The definition."""
    dense = _merged([call.live, call.rest], [call.live_lse, call.rest_lse])
    o, lse = [call.live], [call.live_lse]
    if call.summary is not None:
        more, more_lse = _summarised(call)
        o, lse = [*o, more], [*lse, more_lse]
    sparse = _merged(o, lse)
    call.live.copy_(sparse)
    call.rest.copy_(dense - call.live.float())
