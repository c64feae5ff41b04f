"""GEMM-Q: project only the computed (query block, head) tiles; contract and definition in torch.

Letters in shapes: B batch, R rows of x, K in_features, H num_heads, D head_dim.
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
    check_number,
    check_positive,
    check_shape,
    check_tensor,
    check_written,
    float_dtypes,
)
from flashomni.kernels.common.rope import Rope, apply_rope, pair_tables, rms_norm
from flashomni.kernels.common.rows import check_rows, check_symbols, tile_mask
from flashomni.symbols import Symbols


@dataclass(frozen=True)
class GemmQCall:
    """What a backend gets. It writes ``out`` in place and returns nothing."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    out: Tensor
    symbols: Symbols
    row_offset: int
    norm_weight: Tensor | None
    norm_eps: float | None
    rope: Rope | None  # [R, D / 2] each: an entry for each pair
    rope_layout: str


def sparse_gemm_q(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    symbols: Symbols,
    *,
    row_offset: int = 0,
    norm_weight: Tensor | None = None,
    norm_eps: float | None = None,
    rope: Rope | None = None,
    rope_layout: str = "interleaved",
    out: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Project the tokens of the computed tiles to queries (arXiv 2509.25401, section 3.4).

    For each token r of x in query block i = (row_offset + r) // block_m, each head h with
    S_c[i, h] = 1, and W_h, b_h that head's rows of ``weight`` and ``bias``::

        q          = x[b, r] @ W_h.T + b_h
        q          = q / sqrt(mean(q ** 2) + norm_eps) * norm_weight      if norm_eps is given
        out[b,r,h] = q * cos[r] + rotate(q) * sin[r]                      if rope is given

    ``rotate`` maps a pair (a, b) to (-b, a). Pairs are neighbours, as FLUX and HunyuanVideo have
    them, or with ``rope_layout="half"`` the dims j and j + D / 2. Cached tiles are never written;
    nothing may read them.

    Args:
        x: ``[B, R, K]``, a run of tokens of the sequence that ``symbols`` is about.
        weight: ``[H * D, K]``, dtype of ``x``; rows may be strided.
        bias: ``[H * D]`` or ``None``.
        symbols: S_c decides; S_s is not read.
        row_offset: position of ``x[:, 0]`` in the sequence (the text length when ``x`` is the
            vision stream of a text-first model). It need not be a multiple of ``block_m``.
        norm_weight: ``[D]``, the scale of the RMSNorm; ``None`` scales by 1.
        norm_eps: epsilon of the RMSNorm over head_dim; ``None`` leaves the norm out.
        rope: ``(cos, sin)``, each fp32 ``[R, D / 2]``, an entry for each pair, or ``[R, D]``, that
            of a pair repeated for both members. What :func:`pack_rope` returns is read fastest.
        rope_layout: ``"interleaved"`` or ``"half"``.
        out: ``[B, R, H, D]``, last dim contiguous; a new tensor with undefined cached tiles if
            omitted.
        backend: take exactly this one; by default the best that accepts the call.

    Returns:
        ``out``.

    Raises:
        ValueError: an argument has a wrong type, shape, dtype or device, requires grad, or ``out``
            overlaps itself or an input.
        NotImplementedError: no backend accepts; the message gives the reasons of each.
    """
    check_dtype("x", x, float_dtypes)
    check_tensor("weight", weight)
    check_symbols(symbols)
    if x.ndim != 3:
        raise ValueError(f"x must be [B, R, K], got {tuple(x.shape)}")
    batch, rows, in_features = x.shape
    num_heads = symbols.num_heads
    check_positive("in_features", in_features)
    check_positive("num_heads", num_heads)
    if weight.ndim != 2 or weight.shape[1] != in_features or weight.shape[0] % num_heads:
        raise ValueError(
            f"weight must be [{num_heads} * D, {in_features}], got {tuple(weight.shape)}"
        )
    head_dim = weight.shape[0] // num_heads
    check_positive("head_dim", head_dim)
    check_rows("x", rows, row_offset, symbols, batch)
    check_device("symbols", symbols.q_bits, x.device)
    optional = [
        ("weight", weight, tuple(weight.shape)),
        ("bias", bias, (num_heads * head_dim,)),
        ("norm_weight", norm_weight, (head_dim,)),
    ]
    for name, tensor, shape in optional:
        if tensor is not None:
            check_shape(name, tensor, shape)
            check_dtype(name, tensor, (x.dtype,))
            check_device(name, tensor, x.device)
    if norm_weight is not None and norm_eps is None:
        raise ValueError("norm_weight needs norm_eps, got None")
    if norm_eps is not None:
        check_number("norm_eps", norm_eps, least=0.0)
        norm_eps = float(norm_eps)
    if rope is not None:
        if not isinstance(rope, (tuple, list)) or len(rope) != 2:
            raise ValueError(f"rope must be a pair (cos, sin), got {type(rope).__name__}")
        check_tensor("rope cos", rope[0])
        if head_dim % 2:
            raise ValueError(f"rope needs an even head_dim, got {head_dim}")
        for name, table in (("rope cos", rope[0]), ("rope sin", rope[1])):
            width = head_dim // 2 if rope[0].shape[-1:] == (head_dim // 2,) else head_dim
            check_shape(name, table, (rows, width))
            check_dtype(name, table, (torch.float32,))
            check_device(name, table, x.device)
        rope = pair_tables(rope, rope_layout, head_dim)
    cos, sin = (None, None) if rope is None else rope
    check_no_grad(x=x, weight=weight, bias=bias, norm_weight=norm_weight, cos=cos, sin=sin, out=out)
    if out is None:
        out = x.new_empty(batch, rows, num_heads, head_dim)
    else:
        check_shape("out", out, (batch, rows, num_heads, head_dim))
        check_dtype("out", out, (x.dtype,))
        check_device("out", out, x.device)
        read = {"x": x, "weight": weight, "bias": bias, "norm_weight": norm_weight}
        read |= {"rope cos": cos, "rope sin": sin, "symbols.q_bits": symbols.q_bits}
        check_written({"out": out}, read)
    if batch and rows:
        norm = (norm_weight, norm_eps)
        call = GemmQCall(x, weight, bias, out, symbols, row_offset, *norm, rope, rope_layout)
        execute("gemm_q", call, backend)
    return out


declare("gemm_q", GemmQCall, public="sparse_gemm_q", writes=("out",))


@register("gemm_q", "reference", rank=0)
def _reference(call: GemmQCall) -> None:
    """The definition: the whole projection in fp32, dead tiles thrown away."""
    bias = None if call.bias is None else call.bias.float()
    q = torch.nn.functional.linear(call.x.float(), call.weight.float(), bias)
    q = q.unflatten(-1, (call.symbols.num_heads, -1))
    if call.norm_eps is not None:
        scale = None if call.norm_weight is None else call.norm_weight.float()
        q = rms_norm(q, scale, call.norm_eps)
    if call.rope is not None:
        q = apply_rope(q, *call.rope, call.rope_layout)
    live = tile_mask(call.symbols, call.x.shape[1], call.row_offset)[..., None]
    call.out.copy_(torch.where(live, q.to(call.out.dtype), call.out))
