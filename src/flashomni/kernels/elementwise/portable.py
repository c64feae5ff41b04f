"""The passes of ``elementwise`` as Triton kernels: fp32 inside, one rounding at the end.

All are bound by memory. Norms take one program a row; the others walk over the elements as rows of
a fixed width, because a stream is often a run of rows of a longer sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashomni.dispatch import not_on, register
from flashomni.kernels.common import portable
from flashomni.kernels.common.rope import Rope
from flashomni.kernels.elementwise.op import first_tensor

BLOCK = 2048  # elements of a program that has no row of its own
PAIRS = 32  # (token, head) pairs of a program of `_norm_rope_kernel`


@triton.jit(do_not_specialize=["rows", "eps"])
def _modulate_kernel(
    x, y, gate, scale, shift, weight, sum_out, out, rows, x_stride_b, x_stride_r, y_stride_b,
    y_stride_r, gate_stride, scale_stride, shift_stride, eps, FEATURES: tl.constexpr,
    PADDED: tl.constexpr, RMS: tl.constexpr, NORMS_Y: tl.constexpr,
):  # fmt: skip
    """One row: ``x + gate * y`` where there is a ``y``, its modulated norm where there is one.

    ``RMS``: that norm takes no mean off. ``NORMS_Y``: ``y`` is normed so first, and ``weight`` is
    of that norm.
    """
    row, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    k = tl.arange(0, PADDED)
    inside = k < FEATURES
    value = tl.load(x + b * x_stride_b + row * x_stride_r + k, inside, other=0.0).to(tl.float32)
    at = (b * rows + row) * FEATURES + k
    if y is not None:
        more = tl.load(y + b * y_stride_b + row * y_stride_r + k, inside, other=0.0).to(tl.float32)
        if NORMS_Y:
            more *= tl.rsqrt(tl.sum(more * more, 0) / FEATURES + eps)
            if weight is not None:
                more *= tl.load(weight + k, inside, other=0.0).to(tl.float32)
        value += tl.load(gate + b * gate_stride + k, inside, other=0.0).to(tl.float32) * more
        value = value.to(sum_out.dtype.element_ty)
        tl.store(sum_out + at, value, inside)
        value = value.to(tl.float32)
    if out is not None:
        mean = 0.0 if RMS else tl.sum(value, 0) / FEATURES
        centred = tl.where(inside, value - mean, 0.0)
        normed = centred * tl.rsqrt(tl.sum(centred * centred, 0) / FEATURES + eps)
        if weight is not None:
            normed *= tl.load(weight + k, inside, other=0.0).to(tl.float32)
        normed *= 1 + tl.load(scale + b * scale_stride + k, inside, other=0.0).to(tl.float32)
        if shift is not None:
            normed += tl.load(shift + b * shift_stride + k, inside, other=0.0)
        tl.store(out + at, normed.to(out.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["rows", "eps"])
def _norm_rope_kernel(
    q, weight, cos, sin, rows, q_stride_b, q_stride_r, q_stride_h, cos_stride_r, cos_stride_d,
    cos_stride_b, cos_stride_h, eps, HEADS: tl.constexpr, HEAD_DIM: tl.constexpr,
    PADDED_DIM: tl.constexpr, HAS_NORM: tl.constexpr, OWN_TABLES: tl.constexpr,
    HALF: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """``PAIRS`` (token, head) pairs: they lie side by side where heads do.

    ``OWN_TABLES``: items or heads have RoPE tables of their own. ``HALF``: the members of a pair
    lie ``HEAD_DIM // 2`` apart, so the two halves of a head are two tensors.
    """
    pair = tl.program_id(0).to(tl.int64) * PAIRS + tl.arange(0, PAIRS)
    row, head = pair // HEADS, pair % HEADS
    at = tl.program_id(1).to(tl.int64) * q_stride_b + row * q_stride_r + head * q_stride_h
    q += at[:, None]
    half = tl.arange(0, PADDED_DIM // 2)
    known = (row < rows)[:, None] & (half < HEAD_DIM // 2)[None, :]
    table = row[:, None] * cos_stride_r + half[None, :] * cos_stride_d
    if OWN_TABLES:
        table += tl.program_id(1).to(tl.int64) * cos_stride_b + head[:, None] * cos_stride_h
    if HALF:
        a = tl.load(q + half[None, :], known, other=0.0).to(tl.float32)
        b = tl.load(q + HEAD_DIM // 2 + half[None, :], known, other=0.0).to(tl.float32)
        if HAS_NORM:
            factor = tl.rsqrt((tl.sum(a * a, 1) + tl.sum(b * b, 1)) / HEAD_DIM + eps)[:, None]
            a *= factor
            b *= factor
            if weight is not None:
                inside = half < HEAD_DIM // 2
                second = weight + HEAD_DIM // 2
                a *= tl.load(weight + half, inside, other=0.0).to(tl.float32)[None, :]
                b *= tl.load(second + half, inside, other=0.0).to(tl.float32)[None, :]
        c = tl.load(cos + table, known, other=0.0)
        s = tl.load(sin + table, known, other=0.0)
        tl.store(q + half[None, :], (a * c - b * s).to(q.dtype.element_ty), known)
        tl.store(q + HEAD_DIM // 2 + half[None, :], (b * c + a * s).to(q.dtype.element_ty), known)
    else:
        dim = tl.arange(0, PADDED_DIM)
        inside = (row < rows)[:, None] & (dim < HEAD_DIM)[None, :]
        value = tl.load(q + dim[None, :], inside, other=0.0).to(tl.float32)
        if HAS_NORM:
            value *= tl.rsqrt(tl.sum(value * value, 1) / HEAD_DIM + eps)[:, None]
            if weight is not None:
                value *= tl.load(weight + dim, dim < HEAD_DIM, other=0.0).to(tl.float32)[None, :]
        if cos is not None:
            c = tl.load(cos + table, known, other=0.0)
            s = tl.load(sin + table, known, other=0.0)
            a, b = tl.split(tl.reshape(value, [PAIRS, PADDED_DIM // 2, 2]))
            value = tl.reshape(tl.join(a * c - b * s, b * c + a * s), [PAIRS, PADDED_DIM])
        tl.store(q + dim[None, :], value.to(q.dtype.element_ty), inside)


@triton.jit
def _load(x, stride, at, inside, WIDTH: tl.constexpr):
    """Elements ``at`` of a tensor whose rows of ``WIDTH`` lie ``stride`` apart; 0: no gaps."""
    if WIDTH:
        x += (at // WIDTH).to(tl.int64) * stride + at % WIDTH
    else:
        x += at
    return tl.load(x, inside, other=0.0).to(tl.float32)


@triton.jit
def _elements(count, IS_LONG: tl.constexpr, BLOCK: tl.constexpr):
    """``(indices of this program, which exist)``; 64 bits only where they are needed."""
    first = tl.program_id(0).to(tl.int64) * BLOCK if IS_LONG else tl.program_id(0) * BLOCK
    at = first + tl.arange(0, BLOCK)
    return at, at < count


@triton.jit(
    do_not_specialize=["per_0", "per_1", "per_2"]
)  # a count that 16 divides makes loads wide
def _differences_kernel(
    value, minus, old_0, old_1, old_2, new_0, new_1, new_2, new_3, count, value_stride,
    minus_stride, per_0, per_1, per_2, VALUE_WIDTH: tl.constexpr, MINUS_WIDTH: tl.constexpr,
    IS_LONG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, inside = _elements(count, IS_LONG, BLOCK)
    term = _load(value, value_stride, at, inside, VALUE_WIDTH)
    if minus is not None:
        term -= _load(minus, minus_stride, at, inside, MINUS_WIDTH)
    tl.store(new_0 + at, term.to(new_0.dtype.element_ty), inside)
    if old_0 is not None:
        term = (term - _load(old_0, 0, at, inside, 0)) * per_0
        tl.store(new_1 + at, term.to(new_1.dtype.element_ty), inside)
    if old_1 is not None:
        term = (term - _load(old_1, 0, at, inside, 0)) * per_1
        tl.store(new_2 + at, term.to(new_2.dtype.element_ty), inside)
    if old_2 is not None:
        term = (term - _load(old_2, 0, at, inside, 0)) * per_2
        tl.store(new_3 + at, term.to(new_3.dtype.element_ty), inside)


@triton.jit
def _weighted_sum_kernel(
    base, term_0, term_1, term_2, term_3, coefficients, out, count, base_stride,
    WIDTH: tl.constexpr, IS_LONG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    at, inside = _elements(count, IS_LONG, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    if base is not None:
        total = _load(base, base_stride, at, inside, WIDTH)
    total += tl.load(coefficients) * _load(term_0, 0, at, inside, 0)
    if term_1 is not None:
        total += tl.load(coefficients + 1) * _load(term_1, 0, at, inside, 0)
    if term_2 is not None:
        total += tl.load(coefficients + 2) * _load(term_2, 0, at, inside, 0)
    if term_3 is not None:
        total += tl.load(coefficients + 3) * _load(term_3, 0, at, inside, 0)
    tl.store(out + at, total.to(out.dtype.element_ty), inside)


def modulated_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
    weight: Tensor | None = None,
    kind: str = "layer",
) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _modulate(x, None, None, scale, shift, None, out, eps, weight, rms=kind == "rms")
    return out


def gated_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    eps: float | None = None,
    weight: Tensor | None = None,
) -> Tensor:
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    norms = eps is not None
    _modulate(x, y, gate, None, None, out, None, eps or 0.0, weight, norms_y=norms)
    return out


def gated_residual_norm(
    x: Tensor, y: Tensor, gate: Tensor, scale: Tensor, shift: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    total, out = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    _modulate(x, y, gate, scale, shift, total, out, eps)
    return total, out


def _modulate(
    x: Tensor,
    y: Tensor | None,
    gate: Tensor | None,
    scale: Tensor | None,
    shift: Tensor | None,
    sum_out: Tensor | None,
    out: Tensor | None,
    eps: float,
    weight: Tensor | None = None,
    rms: bool = False,
    norms_y: bool = False,
) -> None:
    batch, rows, features = x.shape
    x = x if x.stride(-1) == 1 else x.contiguous()
    y, gate, scale, shift, weight = map(_unit_stride, (y, gate, scale, shift, weight))
    padded = triton.next_power_of_2(features)
    _modulate_kernel[(rows, batch)](
        x, y, gate, scale, shift, weight, sum_out, out, rows, *x.stride()[:2],
        *((0, 0) if y is None else y.stride()[:2]),
        *(0 if t is None else t.stride(0) for t in (gate, scale, shift)),
        eps, FEATURES=features, PADDED=padded, RMS=rms, NORMS_Y=norms_y,
        num_warps=min(max(padded // 512, 1), 16),
    )  # fmt: skip


def norm_rope_(
    q: Tensor,
    weight: Tensor | None,
    eps: float | None,
    rope: Rope | None,
    rope_layout: str = "interleaved",
) -> None:
    batch, rows, num_heads, head_dim = q.shape
    if q.stride(-1) != 1:
        raise ValueError(f"q: the last dim must be contiguous, got stride {q.stride(-1)}")
    cos, sin = (None, None) if rope is None else rope
    strides, own = (0, 0, 0, 0), False
    if cos is not None and sin is not None:
        if cos.stride() != sin.stride():
            sin = sin.contiguous()
            cos = cos.contiguous()
        own = cos.ndim == 4
        item, row, head, dim = cos.stride() if own else (0, cos.stride(0), 0, cos.stride(1))
        if own:  # of a size of 1 there is one for all
            item, head = (
                0 if size == 1 else stride
                for size, stride in ((cos.shape[0], item), (cos.shape[2], head))
            )
        strides = row, dim, item, head
    _norm_rope_kernel[(triton.cdiv(rows * num_heads, PAIRS), batch)](
        q, weight, cos, sin, rows, *q.stride()[:3], *strides, 0.0 if eps is None else eps,
        HEADS=num_heads, HEAD_DIM=head_dim, PADDED_DIM=max(triton.next_power_of_2(head_dim), 2),
        HAS_NORM=eps is not None, OWN_TABLES=own, HALF=rope is not None and rope_layout == "half",
        PAIRS=PAIRS,
    )  # fmt: skip


def differences(
    value: Tensor,
    minus: Tensor | None,
    old: Sequence[Tensor],
    gaps: Sequence[float],
    dtype: torch.dtype,
) -> list[Tensor]:
    new = [torch.empty(value.shape, dtype=dtype, device=value.device) for _ in (0, *old)]
    per = [*(1 / gap for gap in gaps), 0.0, 0.0, 0.0][:3]
    value, value_stride, value_width = _as_rows(value)
    minus_stride = minus_width = 0
    if minus is not None:
        minus, minus_stride, minus_width = _as_rows(minus)
    count = value.numel()
    _differences_kernel[(triton.cdiv(count, BLOCK),)](
        value, minus, *_padded([term.contiguous() for term in old], 3), *_padded(new, 4), count,
        value_stride, minus_stride, *per, VALUE_WIDTH=value_width, MINUS_WIDTH=minus_width,
        IS_LONG=_is_long(count), BLOCK=BLOCK,
    )  # fmt: skip
    return new


def weighted_sum(
    terms: Sequence[Tensor], coefficients: Tensor, base: Tensor | None, dtype: torch.dtype
) -> Tensor:
    out = torch.empty(terms[0].shape, dtype=dtype, device=terms[0].device)
    stride = width = 0
    if base is not None:
        base, stride, width = _as_rows(base)
    count = out.numel()
    _weighted_sum_kernel[(triton.cdiv(count, BLOCK),)](
        base, *_padded([term.contiguous() for term in terms], 4), coefficients, out, count, stride,
        WIDTH=width, IS_LONG=_is_long(count), BLOCK=BLOCK,
    )  # fmt: skip
    return out


def _is_long(count: int) -> bool:
    return count >= 2**31 - BLOCK


def _padded(tensors: Sequence[Tensor], count: int) -> list[Tensor | None]:
    return [*tensors, *[None] * (count - len(tensors))]


def _unit_stride(x: Tensor | None) -> Tensor | None:
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def _as_rows(x: Tensor) -> tuple[Tensor, int, int]:
    """``(x, stride, width)``: its rows of ``width`` elements lie ``stride`` apart; 0: no gaps.

    A run of rows of a longer sequence is that as it stands; what is neither is copied.
    """
    inner, width = x.ndim, 1
    while inner and (x.shape[inner - 1] == 1 or x.stride(inner - 1) == width):
        inner -= 1
        width *= x.shape[inner]
    if inner == 0:
        return x, 0, 0
    stride = reach = x.stride(inner - 1)
    while inner and (x.shape[inner - 1] == 1 or x.stride(inner - 1) == reach):
        inner -= 1
        reach *= x.shape[inner]
    return (x, stride, width) if inner == 0 else (x.contiguous(), 0, 0)


def _refuses(call: Any) -> list[str]:
    return not_on(portable.DEVICE, first_tensor(call))


def _register(op: str, run: Callable[[Any], Any]) -> None:
    register(
        op, "portable", rank=portable.RANK, refuses=_refuses, available=portable.available,
        serves=("sm90",), device=portable.DEVICE,
    )(run)  # fmt: skip


_register(
    "modulated_norm", lambda c: modulated_norm(c.x, c.scale, c.shift, c.eps, c.weight, c.kind)
)
_register("gated_residual", lambda c: gated_residual(c.x, c.y, c.gate, c.eps, c.weight))
_register(
    "gated_residual_norm",
    lambda c: gated_residual_norm(c.x, c.y, c.gate, c.scale, c.shift, c.eps),
)
_register("norm_rope", lambda c: norm_rope_(c.q, c.weight, c.eps, c.rope, c.rope_layout))
_register("differences", lambda c: differences(c.value, c.minus, c.old, c.gaps, c.dtype))
_register("weighted_sum", lambda c: weighted_sum(c.terms, c.coefficients, c.base, c.dtype))
