"""GEMM-O: add the computed heads onto the forecast projection of the cached ones.

The output projection is linear in the heads, ``y = bias + sum_h O_h W_h``, and the forecast is
linear in the history, so the cached heads' part of y can be forecast after the projection:
``sum_{h cached} forecast(O_h) W_h = sum_i c_i B_i`` with ``B_i = sum_{h cached} F_i,h W_h``
(arXiv 2509.25401, section 3.4). ``gemm_o_update`` makes the B_i on an Update step,
``sparse_gemm_o`` uses them on the Dispatch steps that follow.

Letters in shapes: B batch, R rows, H num_heads, D head_dim, N out_features, E always-on features,
T = forecast order + 1 terms.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flashomni.dispatch import declare, execute, register
from flashomni.kernels.common.checks import (
    check_device,
    check_dtype,
    check_no_grad,
    check_positive,
    check_shape,
    check_tensor,
    check_written,
    float_dtypes,
)
from flashomni.kernels.common.rows import check_rows, check_symbols, tile_mask
from flashomni.symbols import Symbols


@dataclass(frozen=True)
class GemmOCall:
    """What a backend of ``gemm_o`` gets. It writes ``out`` in place and returns nothing."""

    o: Tensor
    weight: Tensor
    bias: Tensor | None
    always: Tensor | None
    bias_terms: Tensor | None
    coefficients: Tensor | None
    out: Tensor
    symbols: Symbols
    row_offset: int


@dataclass(frozen=True)
class GemmOUpdateCall:
    """What a backend of ``gemm_o_update`` gets. It writes ``out`` and ``bias_terms`` in place."""

    terms: list[Tensor]
    weight: Tensor
    bias: Tensor | None
    always: Tensor | None
    out: Tensor
    bias_terms: Tensor
    symbols: Symbols
    row_offset: int


def sparse_gemm_o(
    o: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    symbols: Symbols,
    bias_terms: Tensor | None = None,
    coefficients: Tensor | None = None,
    *,
    always: Tensor | None = None,
    row_offset: int = 0,
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Project the computed heads and add the forecast of the cached ones.

    For each row r in query block i = (row_offset + r) // block_m, W_h head h's columns of
    ``weight`` and W_on the columns after those of the heads::

        out[b, r] = bias + sum_t coefficients[t] * bias_terms[t, b, r]
                  + sum over h with S_c[i, h] = 1 of o[b, r, h] @ W_h.T
                  + always[b, r] @ W_on.T

    Cached tiles of ``o`` are never read: they may be undefined or NaN.

    Args:
        o: ``[B, R, H, D]``, last dim contiguous, other strides free (a run of tokens).
        weight: ``[N, H * D + E]``, dtype of ``o``; a slice of a wider matrix is fine.
        bias: ``[N]`` or ``None``.
        symbols: S_c decides; S_s is not read.
        bias_terms: ``[T, B, R, N]`` from :func:`gemm_o_update` with these symbols; ``None`` when
            no tile is cached.
        coefficients: fp32 ``[T]`` on the device: the forecast's weights at this step.
        always: ``[B, R, E]``, input columns that belong to no head (the MLP half of FLUX's fused
            ``proj_out``); ``None`` when E = 0.
        row_offset: position of the first row in the sequence.
        out: ``[B, R, N]``, every element is written; a new tensor if omitted.
        backend: take exactly this one; by default the best that accepts the call.

    Returns:
        ``out``.

    Raises:
        ValueError: an argument has a wrong type, shape, dtype or device, requires grad, or what is
            written overlaps itself or an input.
        NotImplementedError: no backend accepts; the message gives the reasons of each.
    """
    given, out = out, _check(o, weight, bias, always, symbols, row_offset, out)
    if (bias_terms is None) != (coefficients is None):
        raise ValueError("bias_terms and coefficients belong together, got only one of them")
    if bias_terms is not None and coefficients is not None:
        check_tensor("bias_terms", bias_terms)
        check_tensor("coefficients", coefficients)
        if coefficients.ndim != 1:
            raise ValueError(f"coefficients must be [T], got {list(coefficients.shape)}")
        check_shape("bias_terms", bias_terms, (coefficients.shape[0], *out.shape))
        check_dtype("bias_terms", bias_terms, float_dtypes)
        check_device("bias_terms", bias_terms, o.device)
        check_shape("coefficients", coefficients, (bias_terms.shape[0],))
        check_dtype("coefficients", coefficients, (torch.float32,))
        check_device("coefficients", coefficients, o.device)
    check_no_grad(bias_terms=bias_terms, coefficients=coefficients)
    if given is not None:
        read = _read(weight, bias, always, symbols)
        check_written(
            {"out": out}, {"o": o, "bias_terms": bias_terms, "coefficients": coefficients, **read}
        )
    if out.numel():
        call = GemmOCall(
            o, weight, bias, always, bias_terms, coefficients, out, symbols, row_offset
        )
        execute("gemm_o", call, backend)
    return out


def gemm_o_update(
    terms: list[Tensor],
    weight: Tensor,
    bias: Tensor | None,
    symbols: Symbols,
    *,
    always: Tensor | None = None,
    row_offset: int = 0,
    out: Tensor | None = None,
    bias_terms: Tensor | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """The dense projection, and the cached heads' part of it for every term.

    With ``o = terms[0]``, and the notation of :func:`sparse_gemm_o`::

        out[b, r]           = bias + sum over all h of o[b, r, h] @ W_h.T + always[b, r] @ W_on.T
        bias_terms[t, b, r] = sum over h with S_c[i, h] = 0 of terms[t][b, r, h] @ W_h.T

    ``bias_terms`` must be made from the terms of O under the *new* symbols: differences of those
    of two Updates are wrong wherever the mask changed in between.

    Args:
        terms: T tensors ``[B, R, H, D]``: O itself, then its scaled differences.
        weight: ``[N, H * D + E]``.
        bias: ``[N]`` or ``None``; it enters ``out`` only.
        symbols: S_c of the steps to come.
        always: ``[B, R, E]`` or ``None``.
        row_offset: position of the first row in the sequence.
        out: ``[B, R, N]``; a new tensor if omitted.
        bias_terms: ``[T, B, R, N]``, any float dtype; a new tensor in the dtype of o if omitted.
        backend: take exactly this one; by default the best that accepts the call.

    Returns:
        ``(out, bias_terms)``.

    Raises:
        ValueError: an argument has a wrong type, shape, dtype or device, requires grad, or what is
            written overlaps itself or an input.
        NotImplementedError: no backend accepts; the message gives the reasons of each.
    """
    if not isinstance(terms, (list, tuple)):
        kind = type(terms).__name__
        raise ValueError(f"terms must be a list of tensors, got {kind}")
    if not terms:
        raise ValueError("terms must hold at least one tensor, got none")
    o, given = terms[0], (out, bias_terms)
    out = _check(o, weight, bias, always, symbols, row_offset, out)
    for index, term in enumerate(terms):
        check_shape(f"terms[{index}]", term, o.shape)
        check_dtype(f"terms[{index}]", term, float_dtypes)
        check_device(f"terms[{index}]", term, o.device)
        check_no_grad(**{f"terms[{index}]": term})
    if bias_terms is None:
        bias_terms = out.new_empty(len(terms), *out.shape)
    else:
        check_shape("bias_terms", bias_terms, (len(terms), *out.shape))
        check_dtype("bias_terms", bias_terms, float_dtypes)
        check_device("bias_terms", bias_terms, o.device)
    check_no_grad(bias_terms=bias_terms)
    if given[0] is not None or given[1] is not None:
        read = _read(weight, bias, always, symbols)
        read |= {f"terms[{index}]": term for index, term in enumerate(terms)}
        check_written({"out": out, "bias_terms": bias_terms}, read)
    if out.numel():
        call = GemmOUpdateCall(
            list(terms), weight, bias, always, out, bias_terms, symbols, row_offset
        )
        execute("gemm_o_update", call, backend)
    return out, bias_terms


def _check(
    o: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    always: Tensor | None,
    symbols: Symbols,
    row_offset: int,
    out: Tensor | None,
) -> Tensor:
    """Check what both ops share; return ``out``, made if there is none."""
    check_dtype("o", o, float_dtypes)
    check_tensor("weight", weight)
    check_symbols(symbols)
    if always is not None:
        check_tensor("always", always)
    if o.ndim != 4 or o.shape[2] != symbols.num_heads:
        raise ValueError(f"o must be [B, R, {symbols.num_heads}, D], got {tuple(o.shape)}")
    batch, rows, num_heads, head_dim = o.shape
    check_positive("num_heads", num_heads)
    check_positive("head_dim", head_dim)
    if always is not None and always.ndim != 3:
        raise ValueError(f"always must be [{batch}, {rows}, E], got {list(always.shape)}")
    extra = 0 if always is None else always.shape[-1]
    features = num_heads * head_dim + extra
    if weight.ndim != 2 or weight.shape[1] != features:
        raise ValueError(
            f"weight must be [N, {num_heads} * {head_dim} + {extra}], got {tuple(weight.shape)}"
        )
    check_rows("o", rows, row_offset, symbols, batch)
    check_device("symbols", symbols.q_bits, o.device)
    optional = [
        ("weight", weight, tuple(weight.shape)),
        ("bias", bias, (weight.shape[0],)),
        ("always", always, (batch, rows, extra)),
        ("out", out, (batch, rows, weight.shape[0])),
    ]
    for name, tensor, shape in optional:
        if tensor is not None:
            check_shape(name, tensor, shape)
            check_dtype(name, tensor, (o.dtype,))
            check_device(name, tensor, o.device)
    check_no_grad(o=o, weight=weight, bias=bias, always=always, out=out)
    return o.new_empty(batch, rows, weight.shape[0]) if out is None else out


def _read(
    weight: Tensor, bias: Tensor | None, always: Tensor | None, symbols: Symbols
) -> dict[str, Tensor | None]:
    """What both ops read beside the heads, by name."""
    bits = {"symbols.q_bits": symbols.q_bits}
    return {"weight": weight, "bias": bias, "always": always, **bits}


declare("gemm_o", GemmOCall, public="sparse_gemm_o", writes=("out",))
declare("gemm_o_update", GemmOUpdateCall, public="gemm_o_update", writes=("out", "bias_terms"))


def _linear_fp32(x: Tensor, weight: Tensor) -> Tensor:
    return torch.nn.functional.linear(x.float(), weight.float())


@register("gemm_o", "reference", rank=0)
def _reference(call: GemmOCall) -> None:
    """The definition, in fp32."""
    width = call.o.shape[2] * call.o.shape[3]
    live = tile_mask(call.symbols, call.o.shape[1], call.row_offset)[..., None]
    y = _linear_fp32(call.o.masked_fill(~live, 0.0).flatten(2), call.weight[:, :width])
    if call.always is not None:
        y += _linear_fp32(call.always, call.weight[:, width:])
    if call.bias is not None:
        y += call.bias.float()
    if call.bias_terms is not None and call.coefficients is not None:
        y += torch.einsum("t,tbrn->brn", call.coefficients, call.bias_terms.float())
    call.out.copy_(y)


@register("gemm_o_update", "reference", rank=0)
def _update_reference(call: GemmOUpdateCall) -> None:
    """The definition, in fp32."""
    o = call.terms[0]
    width = o.shape[2] * o.shape[3]
    cached = ~tile_mask(call.symbols, o.shape[1], call.row_offset)[..., None]
    heads = call.weight[:, :width]
    y = _linear_fp32(o.flatten(2), heads)
    if call.always is not None:
        y += _linear_fp32(call.always, call.weight[:, width:])
    if call.bias is not None:
        y += call.bias.float()
    for index, term in enumerate(call.terms):
        call.bias_terms[index].copy_(_linear_fp32(term.masked_fill(~cached, 0.0).flatten(2), heads))
    call.out.copy_(y)
