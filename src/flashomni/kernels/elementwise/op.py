"""What lies between the products, one pass over memory each: definitions in torch.

Norm and modulation, gate and residual, norm and RoPE, the terms of a forecast and their sum: an op
each. ``reference`` and ``cpu`` are the definitions; they round after every operation, as the stock
models do. The kernels of ``portable`` compute in fp32 and round once; they serve ``sm90`` too.
Modulation may be of a wider dtype than the tokens, whose dtype the result has.
Every function takes ``backend``, as the big ops do, and raises ``ValueError`` for an argument of a
wrong type, shape, dtype or device, by its name.

Letters in shapes: B batch, R rows (tokens), K features, H num_heads, D head_dim.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from flashomni.dispatch import declare, execute, not_on, register
from flashomni.kernels.common.rope import Rope, apply_rope, rms_norm
from flashomni.kernels.elementwise._checks import (
    MAX_TERMS,
    check_differences,
    check_norm_rope,
    check_streams,
    check_weighted_sum,
)

__all__ = ["MAX_TERMS"]  # beside what is defined here
NORMS = ("layer", "rms")


@dataclass(frozen=True)
class ModulatedNormCall:
    """What a backend of ``modulated_norm`` gets; it returns a new tensor."""

    x: Tensor
    scale: Tensor
    shift: Tensor | None
    eps: float
    weight: Tensor | None = None
    kind: str = "layer"


@dataclass(frozen=True)
class GatedResidualCall:
    """What a backend of ``gated_residual`` gets; it returns a new tensor."""

    x: Tensor
    y: Tensor
    gate: Tensor
    eps: float | None = None
    weight: Tensor | None = None


@dataclass(frozen=True)
class GatedResidualNormCall:
    """What a backend of ``gated_residual_norm`` gets; it returns two new tensors."""

    x: Tensor
    y: Tensor
    gate: Tensor
    scale: Tensor
    shift: Tensor
    eps: float


@dataclass(frozen=True)
class NormRopeCall:
    """What a backend of ``norm_rope`` gets. It writes ``q`` in place and returns nothing."""

    q: Tensor
    weight: Tensor | None
    eps: float | None
    rope: Rope | None
    rope_layout: str


@dataclass(frozen=True)
class DifferencesCall:
    """What a backend of ``differences`` gets; it returns new tensors."""

    value: Tensor
    minus: Tensor | None
    old: Sequence[Tensor]
    gaps: Sequence[float]
    dtype: torch.dtype


@dataclass(frozen=True)
class WeightedSumCall:
    """What a backend of ``weighted_sum`` gets; it returns a new tensor."""

    terms: Sequence[Tensor]
    coefficients: Tensor
    base: Tensor | None
    dtype: torch.dtype


def modulated_norm(
    x: Tensor,
    scale: Tensor,
    shift: Tensor | None,
    eps: float,
    weight: Tensor | None = None,
    kind: str = "layer",
    *,
    backend: str | None = None,
) -> Tensor:
    """``norm(x) * (1 + scale) + shift``.

    Args:
        x: ``[B, R, K]``.
        scale: ``[B, K]``.
        shift: ``[B, K]``, or ``None`` for none.
        eps: epsilon of the norm.
        weight: ``[K]`` of the norm, in the dtype of ``x``, or ``None``.
        kind: of the norm: ``"layer"`` or ``"rms"``.
    """
    if kind not in NORMS:
        raise ValueError(f"kind must be one of {', '.join(NORMS)}, got {kind!r}")
    vectors = {"scale": scale} if shift is None else {"scale": scale, "shift": shift}
    check_streams(x, {}, vectors, eps, weight)
    call = ModulatedNormCall(x, scale, shift, eps, weight, kind)
    return execute("modulated_norm", call, backend)


def gated_residual(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    eps: float | None = None,
    weight: Tensor | None = None,
    *,
    backend: str | None = None,
) -> Tensor:
    """``x + gate * y``, or ``x + gate * RMSNorm(y)``.

    Args:
        x: ``[B, R, K]``.
        y: ``[B, R, K]``.
        gate: ``[B, K]``.
        eps: epsilon of the norm of ``y``; ``None`` leaves it out.
        weight: ``[K]`` of that norm, in the dtype of ``x``, or ``None``.
    """
    if weight is not None and eps is None:
        raise ValueError("weight needs eps, got None")
    check_streams(x, {"y": y}, {"gate": gate}, 0.0 if eps is None else eps, weight)
    return execute("gated_residual", GatedResidualCall(x, y, gate, eps, weight), backend)


def gated_residual_norm(
    x: Tensor,
    y: Tensor,
    gate: Tensor,
    scale: Tensor,
    shift: Tensor,
    eps: float,
    *,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """:func:`gated_residual`, and :func:`modulated_norm` of it."""
    check_streams(x, {"y": y}, {"gate": gate, "scale": scale, "shift": shift}, eps)
    call = GatedResidualNormCall(x, y, gate, scale, shift, eps)
    total, normed = execute("gated_residual_norm", call, backend)
    return total, normed


def norm_rope_(
    q: Tensor,
    weight: Tensor | None,
    eps: float | None,
    rope: Rope | None,
    rope_layout: str = "interleaved",
    *,
    backend: str | None = None,
) -> None:
    """RMSNorm over head_dim and RoPE, in place.

    Args:
        q: ``[B, R, H, D]``.
        weight: ``[D]`` or ``None``.
        eps: epsilon of the norm; ``None`` leaves the norm out.
        rope: ``(cos, sin)`` each fp32 ``[R, D / 2]``, or ``[B or 1, R, H or 1, D / 2]`` where items
            or heads have tables of their own; or ``None``.
        rope_layout: ``"interleaved"``, pairs are neighbours, or ``"half"``, j and j + D / 2.
    """
    check_norm_rope(q, weight, eps, rope, rope_layout)
    if eps is None and rope is None:
        return
    execute("norm_rope", NormRopeCall(q, weight, eps, rope, rope_layout), backend)


def differences(
    value: Tensor,
    minus: Tensor | None,
    old: Sequence[Tensor],
    gaps: Sequence[float],
    dtype: torch.dtype | None = None,
    *,
    backend: str | None = None,
) -> list[Tensor]:
    """A value and its differences: ``f_0 = value - minus``, ``f_i = (f_{i-1} - old_{i-1}) / gap``.

    Args:
        value: any shape.
        minus: what to subtract from it, or ``None``.
        old: the terms ``f_0 ..`` at the anchor before, up to three.
        gaps: for each of them what its difference is divided by, not 0.
        dtype: of the result; by default that of ``value``.

    Returns:
        ``len(old) + 1`` new tensors.
    """
    check_differences(value, minus, old, gaps, dtype)
    dtype = value.dtype if dtype is None else dtype
    return list(execute("differences", DifferencesCall(value, minus, old, gaps, dtype), backend))


def weighted_sum(
    terms: Sequence[Tensor],
    coefficients: Tensor,
    base: Tensor | None,
    dtype: torch.dtype,
    *,
    backend: str | None = None,
) -> Tensor:
    """``base + sum_i coefficients[i] * terms[i]`` in fp32, then in ``dtype``.

    Args:
        terms: up to four tensors of one shape.
        coefficients: fp32, at least as many.
        base: a tensor of that shape, or ``None``.
        dtype: of the result.
    """
    check_weighted_sum(terms, coefficients, base, dtype)
    return execute("weighted_sum", WeightedSumCall(terms, coefficients, base, dtype), backend)


def sum_of_terms(terms: Sequence[Tensor], coefficients: Tensor, base: Tensor | None) -> Tensor:
    """The definition of :func:`weighted_sum`, in fp32, on every device."""
    total = torch.zeros((), device=coefficients.device) if base is None else base.float()
    for weight, term in zip(coefficients, terms, strict=False):
        total = total + weight * term.float()
    return total


declare("modulated_norm", ModulatedNormCall, public="modulated_norm")
declare("gated_residual", GatedResidualCall, public="gated_residual")
declare("gated_residual_norm", GatedResidualNormCall, public="gated_residual_norm", many=True)
declare("norm_rope", NormRopeCall, public="norm_rope_", writes=("q",))
declare("differences", DifferencesCall, public="differences", many=True)
declare("weighted_sum", WeightedSumCall, public="weighted_sum")


def _definition(op: str) -> Callable[[Callable], Callable]:
    """Register a definition as ``reference``, on every device, and as ``cpu``."""

    def refuses(call: Any) -> list[str]:
        return not_on("cpu", first_tensor(call))

    def keep(run: Callable) -> Callable:
        register(op, "cpu", rank=10, refuses=refuses, device="cpu")(run)
        return register(op, "reference", rank=0)(run)

    return keep


def first_tensor(call: Any) -> Tensor:
    """The tensor whose device decides, of any call of this file."""
    if isinstance(call, WeightedSumCall):
        return call.terms[0]
    if isinstance(call, DifferencesCall):
        return call.value
    return call.q if isinstance(call, NormRopeCall) else call.x


@_definition("modulated_norm")
def _modulated_norm(call: ModulatedNormCall) -> Tensor:
    x, weight = call.x, call.weight
    if call.kind == "rms":
        normed = rms_norm(x, weight, call.eps)
    else:
        normed = torch.nn.functional.layer_norm(x, x.shape[-1:], weight, eps=call.eps)
    normed = normed * (1 + call.scale[:, None])
    return (normed if call.shift is None else normed + call.shift[:, None]).to(x.dtype)


@_definition("gated_residual")
def _gated_residual(call: GatedResidualCall) -> Tensor:
    y = call.y if call.eps is None else rms_norm(call.y, call.weight, call.eps)
    return (call.x + call.gate[:, None] * y).to(call.x.dtype)


@_definition("gated_residual_norm")
def _gated_residual_norm(call: GatedResidualNormCall) -> tuple[Tensor, Tensor]:
    x = _gated_residual(GatedResidualCall(call.x, call.y, call.gate))
    return x, _modulated_norm(ModulatedNormCall(x, call.scale, call.shift, call.eps))


@_definition("norm_rope")
def _norm_rope(call: NormRopeCall) -> None:
    q = call.q
    new = q if call.eps is None else rms_norm(q, call.weight, call.eps)
    q.copy_(new if call.rope is None else apply_rope(new, *call.rope, call.rope_layout))


@_definition("differences")
def _differences(call: DifferencesCall) -> list[Tensor]:
    value, minus, dtype = call.value, call.minus, call.dtype
    wide = value.to(dtype)
    terms = [wide.clone() if minus is None else wide - minus.to(dtype)]
    for term, gap in zip(call.old, call.gaps, strict=True):
        terms.append(((terms[-1].float() - term.float()) / gap).to(dtype))
    return terms


@_definition("weighted_sum")
def _weighted_sum(call: WeightedSumCall) -> Tensor:
    return sum_of_terms(call.terms, call.coefficients, call.base).to(call.dtype)
