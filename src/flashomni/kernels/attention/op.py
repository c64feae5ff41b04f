"""Block-sparse attention: what it is, what it accepts, and its definition in torch.

Letters in shapes: B batch, M seqlen_q, N seqlen_kv, H num_heads, Hkv key heads (Hkv divides H),
D head_dim, Mb = ceil(M / block_m), Nb = ceil(N / block_n).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flashomni.dispatch import declare, execute, register
from flashomni.kernels.common.checks import (
    check_device,
    check_dtype,
    check_int,
    check_no_grad,
    check_number,
    check_positive,
    check_shape,
    check_tensor,
    check_written,
    float_dtypes,
)
from flashomni.kernels.common.rows import check_rows, check_symbols, tile_mask
from flashomni.kernels.elementwise.op import sum_of_terms
from flashomni.kernels.summarise.op import Summary, check_summary
from flashomni.symbols import Symbols
from flashomni.symbols.wide import wide

REDONE = 4  # words of the memory of what was done again


@dataclass(frozen=True)
class ForecastTerms:
    """What cached rows get instead of keeping their value: ``sum_t coefficients[t] * terms[t]``.

    Args:
        terms: T >= 1 tensors ``[B, R, H, D]`` of float32, float16 or bfloat16, any strides: O at
            the last Update and its scaled differences (arXiv 2503.06923).
        coefficients: fp32 ``[T]`` or longer, on the device: the weights at this step.
        row_offset: position of the terms' first row in the sequence.
    """

    terms: Sequence[Tensor]
    coefficients: Tensor
    row_offset: int = 0


@dataclass(frozen=True)
class AttentionCall:
    """What a backend gets. It writes ``out`` (and ``lse``) in place and returns nothing.

    ``symbols`` is ``None`` for dense attention; then block sizes are of no meaning. With a
    ``forecast`` there are symbols, and the cached rows that it covers are written as well; with a
    ``summary`` there are symbols, too. A backend that has an online softmax only may ignore
    ``online`` and ``redone``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    lse: Tensor | None
    symbols: Symbols | None
    kv_len: Tensor | None
    softmax_scale: float
    forecast: ForecastTerms | None = None
    online: bool = False
    redone: Tensor | None = None
    summary: Summary | None = None

    @property
    def summaries_per_block(self) -> int:
        """r; 0 without a summary."""
        if self.summary is None or self.symbols is None:
            return 0
        return self.summary.k.shape[1] // self.symbols.grid.num_kv_blocks


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
    forecast: ForecastTerms | None = None,
    online: bool = False,
    redone: Tensor | None = None,
    summary: Summary | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention over the blocks that ``symbols`` marks as computed (arXiv 2509.25401, 3.3).

    For each query block i of head h whose S_c bit is 1, over J = {keys of block j: S_s[i, j] = 1}::

        out[b, i, h] = softmax(softmax_scale * q[b, i, h] @ k[b, J, h].T) @ v[b, J, h]

    Rows of cached query blocks keep their value, in ``out`` and in ``lse``. With a ``forecast``
    those of ``out`` that its terms cover get it, summed in fp32 and rounded once::

        out[b, m, h] = sum_t coefficients[t] * terms[t][b, m - row_offset, h]

    With a ``summary`` skipped blocks are summarised instead of dropped: each of the r summaries of
    a block j with S_s[i, j] = 0 is one more key, with ``log_n`` added to its scaled score, in
    ``out`` and in ``lse``.

    A computed row without any valid key is 0, its ``lse`` is -inf. Keys from ``kv_len[b]``
    on do not exist, nor do summaries of blocks that have no others; a value outside ``[0, N]``
    means the nearest end.

    Args:
        q: ``[B, M, H, D]``, last dim contiguous.
        k: ``[B, N, Hkv, D]``, dtype and device of ``q``; H must be a multiple of Hkv.
        v: ``[B, N, Hkv, D]``, like ``k``.
        symbols: which blocks to compute; ``None`` computes all of them.
        out: ``[B, M, H, D]``, written in place; a new tensor with undefined cached rows if omitted.
        softmax_scale: defaults to ``D ** -0.5``.
        kv_len: int32 ``[B]``, valid keys of each batch item; defaults to that of the grid.
        lse: optional fp32 ``[B, H, M]``, gets the natural log of each row's softmax sum.
        forecast: what cached rows of ``out`` get, where they are read as they are (by an output
            projection that has to be called as a module); needs ``symbols``.
        online: keep to the online softmax. Some backends have a faster one, whose results differ
            in the last bits and which does tiles again whose scores rise far along the keys.
        redone: optional int32 ``[4]``, zeros at first. Element 0 counts the tiles that were done
            again. The others are a backend's memory: given the same tensor in call after call (on
            one stream), it keeps to the online softmax once three calls in a row did more than a
            tenth of their tiles again. Decided on the device, without the host.
        summary: what stands for skipped blocks; needs symbols. Methods that are defined by dropping
            have none.
        backend: take exactly this one; by default the best that accepts the call.

    Returns:
        ``out``.

    Raises:
        ValueError: an argument has a wrong type, shape, dtype or device, requires grad, or ``out``
            or ``lse`` overlaps itself or an input.
        NotImplementedError: no backend accepts; the message gives the reasons of each.
    """
    check_dtype("q", q, float_dtypes)
    if q.ndim != 4:
        raise ValueError(f"q must be [B, M, H, D], got {tuple(q.shape)}")
    batch, seqlen_q, num_heads, head_dim = q.shape
    check_positive("seqlen_q", seqlen_q)
    check_positive("num_heads", num_heads)
    check_positive("head_dim", head_dim)
    check_tensor("k", k)
    if k.ndim != 4 or k.shape[0] != batch or k.shape[3] != head_dim:
        raise ValueError(f"k must be [{batch}, N, Hkv, {head_dim}], got {tuple(k.shape)}")
    if k.shape[2] == 0 or num_heads % k.shape[2]:
        raise ValueError(
            f"k must have a number of heads that divides {num_heads}, got {k.shape[2]}"
        )
    check_positive("seqlen_kv", k.shape[1])
    check_shape("v", v, k.shape)
    for name, tensor in (("k", k), ("v", v)):
        check_dtype(name, tensor, (q.dtype,))
        check_device(name, tensor, q.device)
    if symbols is not None:
        check_symbols(symbols)
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
    given_out = out is not None
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
    if redone is not None:
        check_shape("redone", redone, (REDONE,))
        check_dtype("redone", redone, (torch.int32,))
        check_device("redone", redone, q.device)
    if not isinstance(online, bool):
        raise ValueError(f"online must be a bool, got {type(online).__name__}")
    if forecast is not None:
        _check_forecast(forecast, q, symbols)
    if summary is not None:
        if symbols is None:
            raise ValueError("summary needs symbols: without them no block is skipped, got None")
        check_summary(summary, k, symbols.grid.num_kv_blocks, symbols.grid.block_n)
    check_no_grad(q=q, k=k, v=v, out=out, lse=lse)
    if given_out or lse is not None:
        read = {"q": q, "k": k, "v": v, "kv_len": kv_len}
        if symbols is not None:
            read |= {"symbols.q_bits": symbols.q_bits, "symbols.kv_bits": symbols.kv_bits}
        if forecast is not None:
            read |= {f"forecast.terms[{i}]": term for i, term in enumerate(forecast.terms)}
            read["forecast.coefficients"] = forecast.coefficients
        if summary is not None:
            read |= {"summary.k": summary.k, "summary.v": summary.v, "summary.log_n": summary.log_n}
        check_written({"out": out, "lse": lse}, read)
    if softmax_scale is None:
        softmax_scale = head_dim**-0.5
    else:
        check_number("softmax_scale", softmax_scale)
        softmax_scale = float(softmax_scale)
    if batch:
        call = AttentionCall(
            q, k, v, out, lse, symbols, kv_len, softmax_scale, forecast, online, redone, summary
        )
        execute("attention", call, backend)
    return out


def _check_forecast(forecast: ForecastTerms, q: Tensor, symbols: Symbols | None) -> None:
    if not isinstance(forecast, ForecastTerms):
        raise ValueError(f"forecast must be ForecastTerms, got {type(forecast).__name__}")
    if symbols is None:
        raise ValueError("forecast needs symbols: without them no tile is cached, got None")
    if not isinstance(forecast.terms, Sequence):
        kind = type(forecast.terms).__name__
        raise ValueError(f"forecast.terms must be a sequence of tensors, got {kind}")
    if len(forecast.terms) == 0:
        raise ValueError("forecast.terms must hold at least one tensor, got none")
    batch, _, num_heads, head_dim = q.shape
    first = forecast.terms[0]
    check_tensor("forecast.terms[0]", first)
    rows = first.shape[1] if first.ndim == 4 else 0
    for index, term in enumerate(forecast.terms):
        name = f"forecast.terms[{index}]"
        check_shape(name, term, (batch, rows, num_heads, head_dim))
        check_dtype(name, term, float_dtypes)
        check_device(name, term, q.device)
        check_no_grad(**{name: term})
    check_int("forecast.row_offset", forecast.row_offset)
    check_rows("forecast.terms", rows, forecast.row_offset, symbols, batch)
    coefficients = forecast.coefficients
    check_tensor("forecast.coefficients", coefficients)
    if coefficients.ndim != 1 or len(coefficients) < len(forecast.terms):
        raise ValueError(
            f"forecast.coefficients must be [T], T at least {len(forecast.terms)}, "
            f"got {list(coefficients.shape)}"
        )
    check_dtype("forecast.coefficients", coefficients, (torch.float32,))
    check_device("forecast.coefficients", coefficients, q.device)


declare("attention", AttentionCall, public="sparse_attention", writes=("out", "lse", "redone"))


def write_forecast_rows(call: AttentionCall) -> None:
    """Write the cached rows of ``call.out`` that the forecast covers, with torch; if there is one.

    Backends on a GPU have a kernel for it (``_forecast_tiles``), which leaves computed tiles out.
    """
    forecast, symbols = call.forecast, call.symbols
    if forecast is None or symbols is None:
        return
    start, rows = forecast.row_offset, forecast.terms[0].shape[1]
    total = sum_of_terms(forecast.terms, forecast.coefficients, None)
    out = call.out[:, start : start + rows]
    live = tile_mask(symbols, rows, start)[..., None]
    out.copy_(torch.where(live, out, total.to(out.dtype)))


@register("attention", "reference", rank=0)
def _reference(call: AttentionCall) -> None:
    """The definition: every score masked, in fp64: what fp32 rounds off one, its exponential keeps.

    (In fp32 on Apple's GPUs, which have nothing wider.) Summaries are more keys.
    """
    write_forecast_rows(call)
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
    bias = None
    if call.summary is not None and call.symbols is not None:
        means = (
            x.float().repeat_interleave(groups, dim=2) for x in (call.summary.k, call.summary.v)
        )
        k, v = (torch.cat(pair, dim=1) for pair in zip((k, v), means, strict=True))
        bias = summary_bias(call.summary, call.symbols, call.kv_len)
        bias = bias.repeat_interleave(grid.block_m, -2)[..., :seqlen_q, :]
        keep = torch.cat([keep, bias > -torch.inf], -1)
    dtype = wide(k.device)
    score = torch.einsum("bmhd,bnhd->bhmn", call.q.to(dtype), k.to(dtype)) * call.softmax_scale
    if bias is not None:
        score[..., seqlen_kv:] += bias
    score = score.masked_fill(~keep, -torch.inf)
    lse = score.logsumexp(-1)  # [B, H, M], -inf for an empty row
    prob = score.softmax(-1).masked_fill(~keep, 0.0).float()
    new = torch.einsum("bhmn,bnhd->bmhd", prob, v).to(call.out.dtype)
    call.out.copy_(torch.where(keep_row.mT[..., None], new, call.out))
    if call.lse is not None:
        call.lse.copy_(torch.where(keep_row, lse, call.lse))


def summary_bias(summary: Summary, symbols: Symbols, kv_len: Tensor | None) -> Tensor:
    """What is added to the scores of summaries, -inf for those that take no part.

    Returns:
        fp32 ``[B, H, Mb, Nb * r]``.
    """
    grid = symbols.grid
    per_block = summary.log_n.shape[1] // grid.num_kv_blocks
    absent = symbols.kv_mask()
    if kv_len is not None:
        start = torch.arange(grid.num_kv_blocks, device=kv_len.device) * grid.block_n
        absent = absent | (start >= kv_len[:, None, None, None])
    absent = absent.repeat_interleave(per_block, -1)
    return summary.log_n[:, None, None].masked_fill(absent, -torch.inf)
